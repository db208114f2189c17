"""Models from the hub and to the hub, against a server on this machine that speaks the endpoints they need."""

import base64
import hashlib
import json
import re
import shutil
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from jaxembed import Embedder, InputError
from jaxembed.checkpoint.hub import find_directory, push_directory
from jaxembed.checkpoint.pretrained import Decoder
from jaxembed.models import FAMILIES
from jaxembed.models.bloom import BloomConfig
from jaxembed.text.format import DEFAULT_TEXT_FORMAT
from jaxembed.text.tokenizer import TextTokenizer, train_byte_level_bpe

from blooms import from_torch, random_bloom
from buckets import served

Files = dict[str, bytes]
TOKEN, READ_TOKEN = "hf_write", "hf_read"


class Hub:
    """Repositories in memory, and what was asked of them."""

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, Files]] = {}
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.downloads: list[str] = []
        self.requests = 0
        self.broken = False
        self.commits: list[str] = []
        self.proposed: Files = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def files(self, repository: str, revision: str) -> Files | None:
        """Of a branch or a commit."""
        branches = self.branches[repository]
        return branches.get(revision) or next((x for x in branches.values() if sha(x) == revision), None)

    def commit(self, files: Files, lines: list[dict[str, Any]]) -> Files:
        """The files after a commit, which comes as a line with the message and one for each file."""
        files = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.commits.append(lines[0]["value"]["summary"])
        return files

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def sha(files: Files) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """What huggingface_hub asks: a model's information, tree and files; create, branch, preupload, commit."""

    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        hub, path = self.hub, urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        hub.requests += 1
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|(tree))/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            repository, tree, revision = api.groups()
        elif file:
            repository, revision, name = file.groups()
        else:
            return self.answer(404)
        if hub.broken:
            return self.answer(500)
        if token not in ("", TOKEN, READ_TOKEN):
            return self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        if repository not in hub.branches or (repository in hub.private and not token):
            return self.answer(404, X_Error_Code="RepoNotFound")
        files = hub.files(repository, revision or "main")
        if files is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if file:
            if repository in hub.gated and not token:
                return self.answer(401, X_Error_Code="GatedRepo")
            hub.downloads += [name] * (self.command == "GET")
            return self.answer(200, files[name], ETag=f'"{sha({name: files[name]})}"', X_Repo_Commit=sha(files))
        if tree:
            entries = [{"type": "file", "path": f, "size": len(x), "oid": sha({f: x})} for f, x in files.items()]
            return self.answer(200, entries)
        self.answer(200, {"id": repository, "sha": sha(files), "siblings": [{"rfilename": f} for f in files]})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        hub, (_, _, path, _, query, _) = self.hub, urllib.parse.urlparse(urllib.parse.unquote(self.path))
        hub.requests += 1
        lines = [json.loads(x) for x in self.rfile.read(int(self.headers["Content-Length"])).splitlines()]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path == "/api/validate-yaml":
            return self.answer(200, {})
        if token != TOKEN:
            return self.answer(403 if token == READ_TOKEN else 401, {"error": "no"})
        if path == "/api/repos/create":
            repository = f"{lines[0]['organization'] or 'me'}/{lines[0]['name']}"
            known = repository in hub.branches
            hub.branches.setdefault(repository, {"main": {".gitattributes": b""}})
            if lines[0].get("visibility") == "private":
                hub.private.add(repository)
            return self.answer(409 if known else 200, {"url": f"{hub.url}/{repository}"})
        parts = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path)
        assert parts, path
        repository, action, revision = parts.groups()
        branches = hub.branches[repository]
        if action == "branch":
            known = revision in branches
            branches.setdefault(revision, branches["main"])
            return self.answer(409 if known else 200, {})
        if action == "preupload":
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer(200, {"files": [{"path": f["path"], **regular} for f in lines[0]["files"]]})
        files = hub.commit(branches[revision], lines)
        if "create_pr=1" in query:
            hub.proposed = files
        else:
            branches[revision] = files
        address = f"{hub.url}/{repository}"
        self.answer(
            200,
            {
                "commitUrl": f"{address}/commit/{sha(files)}",
                "commitOid": sha(files),
                "pullRequestUrl": f"{address}/discussions/1",
            },
        )


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    # What HF_ENDPOINT and HF_HOME set, which huggingface_hub reads when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield hub
    hub.close()


def contents(directory: Path) -> Files:
    return {x.relative_to(directory).as_posix(): x.read_bytes() for x in directory.rglob("*") if x.is_file()}


def repository(*names: str) -> Files:
    return {name: f"content of {name}".encode() for name in names}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory that looks like a saved model."""
    for name, data in repository("README.md", "config.json", "model.safetensors", "1_Pooling/config.json").items():
        (tmp_path / "saved" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "saved" / name).write_bytes(data)
    return tmp_path / "saved"


def test_a_directory_is_taken_as_it_is(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert find_directory(tmp_path / "org") == tmp_path / "org"
    assert find_directory("org/model") == Path("org/model")
    assert find_directory("~/org") == tmp_path / "org"
    (tmp_path / "file").touch()
    with served(monkeypatch):
        for name, found in {
            tmp_path / "nowhere": "nothing",
            "./nowhere": "nothing",
            "~/nowhere": "nothing",
            "~nobody-of-that-name/model": "nothing",
            "a/b/c": "nothing",
            "gs://bucket/model": "nothing",
            "file": "a file",
        }.items():
            with pytest.raises(InputError, match=f"{name}: expected the directory of a model, found {found}$"):
                find_directory(name)
    assert hub.requests == 0


DESCRIPTION = (
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "merges.txt",
    "chat_template.jinja",
    "README.md",
    "LICENSE",
)
MODULES = ("modules.json", "1_Pooling/config.json")
SHARDS = ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "model_00002-of-00002.safetensors")
BIN_SHARDS = ("pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "pytorch_model_00002-of-00002.bin")
BIN = ("pytorch_model.bin",)
ELSE = (
    ".gitattributes",
    "flax_model.msgpack",
    "tf_model.h5",
    "tf_model.h5.index.json",
    "training_args.bin",
    "optimizer.pt",
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "onnx/model.onnx",
    "onnx/config.json",
    "onnx/tokenizer.json",
    "original/model.safetensors",
    "checkpoint-500/pytorch_model.bin",
)


@pytest.mark.parametrize(
    ("wanted", "unwanted"),
    [
        (("model.safetensors",), SHARDS + BIN + BIN_SHARDS),
        (SHARDS, BIN + BIN_SHARDS),
        (BIN, BIN_SHARDS),
        (BIN_SHARDS, ()),
        ((), ()),
    ],
)
def test_only_what_a_model_is_read_from(hub: Hub, wanted: tuple[str, ...], unwanted: tuple[str, ...]) -> None:
    files = repository(*ELSE, *unwanted, *DESCRIPTION, *MODULES, *wanted)
    hub.branches["org/model"] = {"main": files}
    expected = {name: files[name] for name in (*DESCRIPTION, *MODULES, *wanted)}
    assert contents(find_directory("org/model")) == expected
    assert sorted(hub.downloads) == sorted(expected)


def test_revision_token_and_cache(hub: Hub, tmp_path: Path) -> None:
    first, second = ({**repository("model.safetensors"), "config.json": text} for text in (b"1", b"2"))
    hub.branches["org/model"] = {"main": first, "v2": second}
    hub.private.add("org/model")
    with pytest.raises(InputError, match="no such repository"):
        find_directory("org/model")
    found = find_directory("org/model", token=READ_TOKEN, cache_dir=tmp_path / "other")
    assert contents(found) == first
    assert found.is_relative_to(tmp_path / "other" / "models--org--model")
    for revision in ("v2", sha(second)):
        found = find_directory("org/model", revision=revision, token=READ_TOKEN)
        assert contents(found) == second
        assert found.is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("org/gated", {}, "the repository is gated: accept its terms on its page and pass token=$"),
        ("org/missing", {}, "there is no such directory here, and no such repository on the hub"),
        ("org/model", {"revision": "v9"}, "the repository has no revision 'v9'$"),
        ("org/model", {"token": "hf_wrong"}, "the hub does not accept the token$"),
        ("not an id/at all", {}, "this is neither a directory nor the form of a hub id"),
        ("not an id/at all", {"local_files_only": True}, "this is neither a directory nor the form of a hub id"),
        ("org/model", {"local_files_only": True}, r"not whole in the local cache \(local_files_only=True\)$"),
        ("org/model", {"local_files_only": True, "revision": "v2"}, "in the local cache in revision 'v2' "),
    ],
)
def test_what_cannot_be_had(hub: Hub, name: str, options: dict[str, Any], message: str) -> None:
    hub.branches = {"org/model": {"main": repository("config.json")}, "org/gated": {"main": repository("config.json")}}
    hub.gated.add("org/gated")
    with pytest.raises(InputError, match=f"^{name}: .*{message}") as error:
        find_directory(name, **options)
    assert "\n" not in str(error.value)
    assert not (options.get("local_files_only") and hub.requests)


def test_no_route(hub: Hub, saved: Path) -> None:
    hub.broken = True
    with pytest.raises(InputError, match=r"^org/model: .*, and asking the hub failed: .*500 Internal Server Error"):
        find_directory("org/model")
    hub.close()
    with pytest.raises(InputError, match=r"^org/model: .*, and asking the hub failed: .*[Cc]onnection refused$"):
        find_directory("org/model")
    with pytest.raises(InputError, match=r"^org/model: pushing failed: .*[Cc]onnection refused$"):
        push_directory(saved, "org/model", token=TOKEN)
    with pytest.raises(InputError, match=r"expected a saved model, found no config\.json$"):
        push_directory(saved.parent, "org/model", token=TOKEN)


def test_the_cache_serves_when_the_hub_does_not(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.branches["org/model"] = {"main": repository("config.json", *SHARDS)}
    found = find_directory("org/model")
    asked = hub.requests
    assert find_directory("org/model", local_files_only=True) == found
    assert hub.requests == asked
    hub.close()
    assert find_directory("org/model") == found
    assert "taken from the local cache, for asking the hub failed: " in caplog.text
    (found / SHARDS[1]).unlink()  # as an interrupted download leaves it
    for local, message in ((True, "not whole in the local cache"), (False, "asking the hub failed")):
        with pytest.raises(InputError, match=message):
            find_directory("org/model", local_files_only=local)


@pytest.fixture(scope="module")
def model() -> Embedder:
    config = BloomConfig(vocab_size=320, dim=32, layers=2, heads=4)
    decoder = Decoder(from_torch(config, random_bloom(config)), FAMILIES["bloom"], config, config.to_huggingface())
    words = ["sort a dict by value", "def add(a, b): return a + b"]
    return Embedder(decoder, TextTokenizer(train_byte_level_bpe(words, 300), DEFAULT_TEXT_FORMAT))


def test_a_cache_that_another_tool_filled(hub: Hub, model: Embedder, tmp_path: Path) -> None:
    """Its layout on the disk: snapshots of links into blobs, a file with the commit of each branch."""
    model.save_pretrained(tmp_path / "saved", verify=False)
    root, commit = tmp_path / "cache" / "models--org--model", "0" * 40
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    for name, data in contents(tmp_path / "saved").items():
        blob, link = root / "blobs" / hashlib.sha256(data).hexdigest(), root / "snapshots" / commit / name
        blob.write_bytes(data)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    shutil.rmtree(tmp_path / "saved")
    for revision in (None, "main", commit):
        assert find_directory("org/model", revision=revision, local_files_only=True) == root / "snapshots" / commit
    again = Embedder.from_pretrained("org/model", local_files_only=True)
    assert again.model_hash == model.model_hash
    assert hub.requests == 0


def test_pushed_and_loaded_again(hub: Hub, model: Embedder, tmp_path: Path) -> None:
    address = model.push_to_hub("org/model", token=TOKEN, private=True)
    assert address == f"{hub.url}/org/model/commit/{sha(hub.branches['org/model']['main'])}"
    assert hub.private == {"org/model"}
    assert hub.commits == ["Add a jaxembed model"]
    model.save_pretrained(tmp_path / "saved", verify=False)
    pushed, saved = dict(hub.branches["org/model"]["main"]), contents(tmp_path / "saved")
    assert pushed.pop(".gitattributes") == b""
    card = pushed.pop("README.md").decode()
    assert 'Embedder.from_pretrained("org/model")' in card
    assert card.replace("org/model", "saved") == saved.pop("README.md").decode()
    assert pushed == saved
    again = Embedder.from_pretrained("org/model", token=READ_TOKEN)
    assert again.model_hash == model.model_hash
    np.testing.assert_array_equal(again.encode(["sort"]), model.encode(["sort"]))


def test_the_model_card(hub: Hub, model: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxembed.embedder.verify_export", lambda *_: None)
    hub.branches["org/model"] = {"main": {"README.md": b"theirs"}}
    for options, card in (({}, b"theirs"), ({"card": "mine"}, b"mine"), ({"replace_model_card": True}, b"# org/model")):
        model.push_to_hub("org/model", token=TOKEN, exist_ok=True, **options)
        assert card in hub.branches["org/model"]["main"]["README.md"]


def test_pushed_over_an_earlier_model(hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {**repository(".gitattributes", "figure.png", "onnx/model.onnx"), "README.md": b"mine"}
    stale = repository(*SHARDS, *BIN, "chat_template.jinja", "2_Normalize/config.json", "special_tokens_map.json")
    earlier = kept | stale | {"config.json": b"old"}
    hub.branches["org/model"] = {"main": earlier}
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    address = push_directory(saved, "org/model", create_pr=True, commit_message="Better")
    assert address == f"{hub.url}/org/model/discussions/1"
    assert hub.commits == ["Better"]
    assert hub.branches["org/model"] == {"main": earlier}
    assert hub.proposed == contents(saved) | kept

    push_directory(saved, "org/model", exist_ok=True, revision="v2")
    assert hub.branches["org/model"] == {"main": earlier, "v2": contents(saved) | kept}
    push_directory(saved, "org/model", exist_ok=True, replace_model_card=True)
    assert hub.branches["org/model"]["main"] == kept | contents(saved)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("org/new", {}, "no token to push with: pass token=, or log in with `hf auth login`$"),
        ("org/new", {"token": "hf_wrong"}, "the hub does not accept the token$"),
        ("org/new", {"token": READ_TOKEN}, "the token has no permission to write there$"),
        ("org/model", {"token": TOKEN}, "the repository is there already; exist_ok=True"),
        ("not an id/at all", {"token": TOKEN}, "this is not the form of a hub id"),
        ("org/new", {"token": TOKEN, "create_pr": True, "revision": "v2"}, "leave out revision='v2'$"),
    ],
)
def test_what_is_not_pushed(hub: Hub, saved: Path, name: str, options: dict[str, Any], message: str) -> None:
    hub.branches["org/model"] = {"main": repository("config.json")}
    with pytest.raises(InputError, match=f"^{name}: .*{message}"):
        push_directory(saved, name, **options)
    assert hub.branches == {"org/model": {"main": repository("config.json")}}


def test_nothing_is_saved_for_a_push_that_cannot_be(hub: Hub, model: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "save_pretrained", lambda *_, **__: pytest.fail("saved"))
    with pytest.raises(InputError, match="no token"):
        model.push_to_hub("org/model")
    assert hub.requests == 0
