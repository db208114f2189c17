"""The Hugging Face hub: the files of a model from there, a saved model to there, one sentence where that fails."""

import glob
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from etils import epath

from jaxembed.checkpoint.directories import fetched, in_bucket
from jaxembed.errors import InputError

logger = logging.getLogger(__name__)

# Weights in the order in which they are preferred; the first kind that a repository has is the only one wanted.
_SHARD = r"[-_]\d+-of-\d+"
_WEIGHTS = (
    re.compile(r"model\.safetensors"),
    re.compile(rf"model({_SHARD}\.safetensors|\.safetensors\.index\.json)"),
    re.compile(r"pytorch_model\.bin"),
    re.compile(rf"pytorch_model({_SHARD}\.bin|\.bin\.index\.json)"),
    re.compile(r"adapter_model\.safetensors"),
)
# Config, tokenizer and text format, and the modules of sentence-transformers: not what lies in onnx/ or checkpoints.
_DESCRIPTION = re.compile(r"[^/]+(?<!\.index)\.(json|jinja|model|txt|md)|LICENSE|\d+_\w+/config\.json")
# What a model pushed over another one must not leave beside it: readers would take it for a part of the new one.
_STALE = (
    *_WEIGHTS,
    re.compile(r"chat_template\.jinja|(adapter_config|added_tokens|special_tokens_map)\.json|\d+_\w+/config\.json"),
)
# Without a list of the repository's files: what a cached snapshot has to hold where the repository has it.
_CACHED = [
    *("config.json", "tokenizer.json", "model.safetensors", "model[-_]*-of-*.safetensors"),
    *("adapter_config.json", "adapter_model.safetensors"),
]


BUCKET_CACHE = "~/.cache/jaxembed/models"


def find_directory(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """A directory as it is, or a local copy of one in a bucket, or of a Hugging Face hub id, downloaded where needed.

    Only the files that a model is read from are downloaded (`wanted_files`). Where the hub cannot be reached, the
    snapshot in the cache is taken, if it is whole. Of a directory in a bucket (`gs://…`) each machine copies all files.

    Args:
        revision: branch, tag or commit; None is the main branch.
        token: the hub's access token; None takes the one of the environment or of `hf auth login`.
        cache_dir: None is huggingface_hub's own, and `BUCKET_CACHE` for what is in a bucket.
        local_files_only: takes what is in the cache and asks nobody.

    Raises:
        InputError: neither a directory nor a repository that can be had; says which of the two was tried and why it
            failed.
    """
    if in_bucket(name):
        if local_files_only:
            raise InputError(f"{name}: is not on this machine; copy it here")
        return fetched(epath.Path(name), Path(BUCKET_CACHE if cache_dir is None else cache_dir).expanduser())
    path = Path(os.path.expanduser(name))  # that of Path raises where there is no such user
    if path.is_dir():
        return path
    if path.exists() or str(name).count("/") > 1 or str(name).startswith((".", "/", "~")):
        raise InputError(f"{name}: expected the directory of a model, found {'a file' if path.exists() else 'nothing'}")
    cache = None if cache_dir is None else Path(cache_dir).expanduser()
    try:
        return _snapshot(str(name), revision, token, cache, local_files_only)
    except Exception as error:
        raise InputError(f"{name}: {_why_not_found(error, revision, local_files_only)}") from error


def wanted_files(files: Iterable[str]) -> list[str]:
    """Of a repository's files those that a model is read from.

    These are its descriptions (config, tokenizer, text format, model card) and its weights once: safetensors where it
    has them, else `pytorch_model.bin`; whole where it has them whole, else in shards.
    """
    files = list(files)
    kinds = ([file for file in files if kind.fullmatch(file)] for kind in _WEIGHTS)
    return [file for file in files if _DESCRIPTION.fullmatch(file)] + next(filter(None, kinds), [])


def push_directory(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Add a jaxembed model",
    exist_ok: bool = False,
    replace_model_card: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads a saved model in one commit; makes the repository where it is not there.

    What the repository has of an earlier model and this one lacks (shards, another format of weights, a chat template)
    is deleted in the same commit, so that nobody reads half of each. Other files stay.

    Args:
        repo_id: owner/name on the hub.
        token: an access token with permission to write; None takes the one of the environment or of `hf auth login`.
        private: of a repository that is made; None is the owner's default.
        exist_ok: pushes to a repository that is there too.
        replace_model_card: replaces the README.md that the repository has.
        revision: the branch, made where it is not there; None is the main branch.
        create_pr: proposes the commit as a pull request to the main branch instead.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        InputError: no model in the directory, no token, no permission, no hub id, or the repository is there and
            `exist_ok` is off.
    """
    check_push(repo_id, token=token, revision=revision, create_pr=create_pr)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    directory = Path(directory)
    ours = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    if "config.json" not in ours:
        raise InputError(f"{directory}: expected a saved model, found no config.json")
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=exist_ok or create_pr).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        theirs = {file.rfilename for file in api.model_info(repo_id, revision=revision).siblings or ()}
        if "README.md" in theirs and not replace_model_card:
            ours.pop("README.md", None)
        stale = [file for file in sorted(theirs - set(ours)) if any(kind.fullmatch(file) for kind in _STALE)]
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, path) for name, path in ours.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    except Exception as error:
        raise InputError(f"{repo_id}: {_why_not_pushed(error, exist_ok)}") from error
    return (commit.pr_url if create_pr else None) or commit.commit_url


def check_push(repo_id: str, *, token: str | None = None, revision: str | None = None, create_pr: bool = False) -> None:
    """What of `push_directory` can be refused without asking the hub, so before a model is saved for it.

    Raises:
        InputError: no hub id, no token, or a pull request to a branch.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise InputError(f"{repo_id}: this is not the form of a hub id (owner/name)") from None
    if not (token or get_token()):
        raise InputError(f"{repo_id}: no token to push with: pass token=, or log in with `hf auth login`")
    if create_pr and revision is not None:
        raise InputError(f"{repo_id}: create_pr proposes to the main branch; leave out revision={revision!r}")


def _snapshot(
    name: str, revision: str | None, token: str | bool | None, cache_dir: Path | None, local_files_only: bool
) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError

    def snapshot(patterns: list[str], local: bool) -> Path:
        options = {"revision": revision, "token": token, "cache_dir": cache_dir}
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=local, **options))

    if local_files_only:
        return snapshot(_CACHED, local=True)
    try:
        files = [file.rfilename for file in HfApi(token=token).model_info(name, revision=revision).siblings or ()]
    except (HFValidationError, RevisionNotFoundError):
        raise
    except Exception as error:  # no route, no token: what the HTTP client raises differs by version
        try:
            directory = snapshot(_CACHED, local=True)
        except LocalEntryNotFoundError:
            raise error from None
        logger.warning("%s: taken from the local cache, for asking the hub failed: %s", name, _reason(error))
        return directory
    return snapshot([glob.escape(file) for file in wanted_files(files)], local=False)


def _why_not_found(error: Exception, revision: str | None, local_files_only: bool) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError too
        return "the repository is gated: accept its terms on its page and pass token="
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such directory here, and no such repository on the hub (a private one needs token=)"
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no revision {revision!r}"
    if isinstance(error, HFValidationError):
        return "this is neither a directory nor the form of a hub id (owner/name)"
    if local_files_only:
        which = f" in revision {revision!r}" if revision else ""
        return f"there is no such directory here, and it is not whole in the local cache{which} (local_files_only=True)"
    if _status(error) == 401:
        return "the hub does not accept the token"
    return f"there is no such directory here, and asking the hub failed: {_reason(error)}"


def _why_not_pushed(error: Exception, exist_ok: bool) -> str:
    status = _status(error)
    if status == 401:
        return "the hub does not accept the token"
    if status == 403:
        return "the token has no permission to write there"
    if status == 409 and not exist_ok:
        return "the repository is there already; exist_ok=True pushes to it, create_pr=True proposes the model to it"
    return f"pushing failed: {_reason(error)}"


def _status(error: Exception) -> int | None:
    """The HTTP status that the hub answered with, if it answered."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
