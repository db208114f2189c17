"""Training checkpoints and stores of arrays: the one file that knows Orbax's v1 API.

A checkpoint is a directory `<directory>/<step>` that holds the leaves of a tree of `jax.Array`s under flat names and a
small JSON record. What the containers of the tree were (dicts, tuples, the named tuples of optax) is not stored: the
tree is restored into the structure, shapes, dtypes and shardings that the reader gives.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from jaxembed import hosts
from jaxembed.checkpoint.stores import (
    COMMIT_MARKER,
    STORE_ERRORS,
    ArrayPath,
    absolute,
    first_line,
    in_groups,
    read_store,
    store_contents,
)
from jaxembed.errors import InputError, OperationError

log = logging.getLogger(__name__)
# Orbax tells every step of every save through absl, and every failure with its traceback before it raises it.
logging.getLogger("absl").setLevel(logging.CRITICAL)

TEMPORARY_INFIX = ".orbax-checkpoint-tmp"

_CHUNK_BYTES = 64 << 20  # of an array, in a file


class CheckpointError(OperationError):
    """A checkpoint could not be written, or none of those that are there can be read. Names the directory and step."""


def leaf_names(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name: the keys on the way to each joined by dots, `params.layers.qkv.bias`.

    Characters other than letters, digits, `_`, `-` and `~` within a key are percent-encoded, so that names are safe as
    keys of any store and different paths have different names.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {
        ".".join(quote(jax.tree_util.keystr((key,), simple=True), safe="").replace(".", "%2E") for key in path): leaf
        for path, leaf in leaves
    }
    if len(named) != len(leaves):
        raise ValueError(
            "two leaves of the tree have the same name: keys that differ by type only, as 0 and '0', do not do"
        )
    return named


class TrainingCheckpoints:
    """The checkpoints of one run, in a directory that belongs to them; a context manager.

    Saves run in the background: `save` returns once the arrays are copied to the host (the caller may donate them to
    the next step at once), and a save that fails is reported by the next `save`, by `wait`, or on leaving the context.
    A checkpoint counts only once it is complete, and older ones are deleted only after a newer one is: by the next
    `save` or `wait`, so that the disk must hold `keep` + 1.

    Of several processes all make the same calls, in a directory that all see: each writes and reads its own parts,
    process 0 lists, chooses and deletes.
    """

    def __init__(self, directory: epath.PathLike, keep: int):
        """Opens (and makes, where it is missing) the directory.

        Args:
            directory: local path or `gs://`; conventionally `run_dir/checkpoints`.
            keep: how many of the newest readable checkpoints stay.

        Raises:
            InputError: `keep` is below 1, or the directory cannot be made.
        """
        if keep < 1:
            raise InputError(f"checkpoint.keep: expected at least 1, found {keep}")
        self.directory = absolute(directory)
        self.keep = keep
        self._pending: tuple[int, ocp.AsyncResponse[None]] | None = None
        self._unreadable: set[int] = set()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the checkpoint directory {self.directory}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            # Of several processes one may leave alone, and the others not be where they could be asked.
            self._await_save() if error is not None and hosts.count() > 1 else self.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            log.error("%s", failure)

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending; whether each can be read is known only after reading it."""
        return complete_steps(self.directory)

    def save(self, step: int, state: Any, info: dict[str, Any]) -> None:
        """Starts to save `state` as the checkpoint of `step`, after the save before it has ended.

        A step that has a readable checkpoint already is left alone: the same run writes the same bytes.

        Args:
            step: number of optimiser steps taken.
            state: tree of `jax.Array`s, trainable part and optimiser state only; its leaves may be sharded.
            info: what JSON holds; given back, and to the check, by `restore_latest`.

        Raises:
            CheckpointError: the save before this one failed, or this one failed at once.
            InputError: there is a newer checkpoint: the directory is another run's, or this run was not resumed.
        """
        self.wait()
        steps = self._readable_steps()
        if step in steps:
            log.info("step %d already has a checkpoint in %s", step, self.directory)
            return
        if steps and steps[-1] > step:
            raise InputError(
                f"cannot save step {step} in {self.directory}: it holds a checkpoint of step {steps[-1]}. "
                "Resume that run, or give this one another run_dir."
            )
        # Orbax refuses arrays without elements (the stacked layers of a model with one layer are such).
        arrays = {name: leaf for name, leaf in leaf_names(state).items() if leaf.size}
        try:
            self._remove_leftovers()
            response = ocp.save_async(self.directory / str(step), arrays, overwrite=True, custom_metadata=info)
        except Exception as error:
            raise self._failure(step, error) from error
        self._pending = step, response

    def wait(self) -> None:
        """Returns when the save under way, if any, is complete and the checkpoints beyond `keep` are deleted.

        Raises:
            CheckpointError: that save failed.
        """
        if self._await_save():
            for old in self._readable_steps()[: -self.keep]:
                self._delete(old)

    def _await_save(self) -> bool:
        """Whether there was a save under way; it is complete. Raises `CheckpointError` where it failed."""
        if self._pending is None:
            return False
        (step, response), self._pending = self._pending, None
        try:
            response.result()
        except Exception as error:
            raise self._failure(step, error) from error
        self._unreadable.discard(step)
        return True

    def discard(self, step: int) -> bool:
        """Deletes the checkpoint of a step, unless there is no other; whether it did."""
        self.wait()
        steps = self._listed()
        if step not in steps or len(steps) == 1:
            return False
        self._delete(step)
        hosts.barrier("checkpoint discarded")
        return True

    def restore_latest(
        self, like: Any, check: Callable[[dict[str, Any]], None] | None = None
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Reads the newest checkpoint that can be read; those newer than it are named in a warning.

        Args:
            like: tree of `jax.ShapeDtypeStruct` with shardings; the mesh may differ from the one that saved.
            check: called with the record of the checkpoint before its arrays are read; what it raises comes out.

        Returns:
            Step, tree of `jax.Array` with the structure and shardings of `like`, and record; None where there is
            no checkpoint.

        Raises:
            InputError: the checkpoint holds other leaves, shapes or dtypes than `like` asks for.
            CheckpointError: there are checkpoints, and none can be read.
        """
        self.wait()
        reasons = []
        for step in reversed(self._listed()):
            path = self.directory / str(step)
            info: dict[str, Any] = {}
            stored, arrays, failure = {}, {}, ""
            try:
                stored = store_contents(path)
                info = _record(path)
            except InputError as error:
                failure = str(error).removeprefix(f"{path}: ")
            if failure := _anyones("record read", failure):
                reasons.append(self._skip(step, failure))
                continue
            if check is not None:
                check(info)
            wanted = leaf_names(like)
            _compare(path, stored, wanted)
            try:
                arrays = dict(read_store(path, {(name,): leaf for name, leaf in wanted.items() if leaf.size}))
            except InputError as error:
                failure = str(error).removeprefix(f"{path}: ")
            if failure := _anyones("arrays read", failure):
                reasons.append(self._skip(step, failure))
                continue
            leaves = [arrays[name,] if leaf.size else _no_elements(leaf) for name, leaf in wanted.items()]
            return step, jax.tree.unflatten(jax.tree.structure(like), leaves), info
        if reasons:
            raise CheckpointError(f"none of the checkpoints in {self.directory} can be read: " + "; ".join(reasons))
        return None

    def _listed(self) -> list[int]:
        """`steps` as process 0 finds them: others may look before or after it deletes one."""
        return json.loads(hosts.broadcast("checkpoints", json.dumps(self.steps() if hosts.is_main() else [])))

    def _readable_steps(self) -> list[int]:
        return [step for step in self._listed() if step not in self._unreadable]

    def _delete(self, step: int) -> None:
        if hosts.is_main():
            path = self.directory / str(step)
            # Without its marker a half-deleted directory is no checkpoint, whenever this is interrupted.
            (path / COMMIT_MARKER).unlink(missing_ok=True)
            path.rmtree(missing_ok=True)

    def _skip(self, step: int, failure: str) -> str:
        self._unreadable.add(step)
        reason = f"step {step}: {failure}"
        log.warning("skipped an unreadable checkpoint in %s, %s", self.directory, reason)
        return reason

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        try:
            self._remove_leftovers()
        except OSError as other:
            log.warning("could not remove the incomplete checkpoint of step %d: %s", step, other)
        return CheckpointError(
            f"could not save the checkpoint of step {step} in {self.directory}: {first_line(error)}. "
            f"Complete checkpoints there: steps {self.steps()}."
        )

    def _remove_leftovers(self) -> None:
        """Removes what interrupted saves and deletions left; called only while no save is under way."""
        if hosts.is_main():
            for path in _entries(self.directory):
                half_deleted = path.name.isdecimal() and not (path / COMMIT_MARKER).exists()
                if TEMPORARY_INFIX in path.name or half_deleted:
                    path.rmtree(missing_ok=True)


def newest_checkpoint(directory: epath.PathLike) -> tuple[epath.Path, dict[str, Any]]:
    """The newest training checkpoint whose record and list of arrays can be read, and the record.

    It is a store, whose keys are the names of the tree's leaves (`leaf_names`).

    Raises:
        InputError: there is none.
    """
    directory, reasons = absolute(directory), []
    for step in reversed(complete_steps(directory)):
        path = directory / str(step)
        try:
            return path, checkpoint_record(path)
        except InputError as error:
            reasons.append(str(error))
            log.warning("skipped an unreadable checkpoint: %s", error)
    raise InputError(f"{directory}: no checkpoint that can be read" + "".join(f"; {reason}" for reason in reasons))


def complete_steps(directory: epath.PathLike) -> list[int]:
    """Steps that have a complete checkpoint in the directory, ascending; whether each can be read is another matter."""
    return sorted(
        int(path.name)
        for path in _entries(absolute(directory))
        if path.name.isdecimal() and (path / COMMIT_MARKER).exists()
    )


def checkpoint_record(path: epath.PathLike) -> dict[str, Any]:
    """The record of a training checkpoint.

    Raises:
        InputError: it, or the list of the checkpoint's arrays, cannot be read.
    """
    store_contents(path)
    return _record(path)


def write_store(
    directory: epath.PathLike,
    arrays: Iterable[tuple[ArrayPath, jax.Array]],
    written: Callable[[ArrayPath], object] = lambda path: None,
) -> None:
    """Writes arrays to a new Orbax checkpoint as they come.

    They are gathered to groups of at most 256 MiB (a larger array is one of its own), and one group is written while
    the next one gathers. The checkpoint is whole, and has its name, when this returns.

    Args:
        directory: of the checkpoint; must not exist.
        arrays: with their keys in the nested dicts of the checkpoint.
        written: called when an array is written, and its memory may be used again.

    Raises:
        CheckpointError: the checkpoint cannot be written.
    """
    directory = absolute(directory)
    writing: list[tuple[ocp.AsyncResponse[None], list[ArrayPath]]] = []

    def wait() -> None:
        for response, paths in writing:
            response.result()
            for path in paths:
                written(path)
        writing.clear()

    try:
        with _store_context():
            for group in in_groups(arrays, lambda entry: entry[1].nbytes):
                wait()
                paths = [path for path, _ in group]
                writing.append((ocp.partial.save_async(directory, _nested(group)), paths))
            wait()
            ocp.partial.finalize(directory)
    except STORE_ERRORS as error:
        raise CheckpointError(f"could not write {directory}: {first_line(error)}") from error
    finally:
        for response, _ in writing:  # after an error: nothing is written any more when the caller cleans up
            with contextlib.suppress(Exception):
                response.result()


def _entries(directory: epath.Path) -> list[epath.Path]:
    """What it holds; a bucket has no folders, so that one where nothing was written yet is not there."""
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []


def _record(path: epath.PathLike) -> dict[str, Any]:
    try:
        info = ocp.metadata(absolute(path)).custom_metadata
    except Exception as error:
        raise InputError(f"{path}: its record cannot be read: {first_line(error)}") from error
    if not isinstance(info, dict):
        raise InputError(f"{path}: its record is missing")
    return info


def _store_context() -> ocp.Context:
    context = ocp.Context()
    # Weights do not compress, and trying takes longer than writing.
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    return context


def _nested(entries: Iterable[tuple[ArrayPath, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*folders, name), leaf in entries:
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = leaf
    return tree


def _compare(path: epath.Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    wanted = {name: leaf for name, leaf in wanted.items() if leaf.size}
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or extra:
        raise InputError(
            f"the checkpoint {path} holds another state than this run's: missing there {missing[:5]}, not expected "
            f"{extra[:5]} ({len(missing)} and {len(extra)} leaves). Resume with the config and version that wrote it."
        )
    for name, leaf in wanted.items():
        found = stored[name]
        if tuple(found.shape) != tuple(leaf.shape) or jnp.dtype(found.dtype) != jnp.dtype(leaf.dtype):
            raise InputError(
                f"the checkpoint {path} has {name} as {found.dtype}{list(found.shape)}, "
                f"expected {jnp.dtype(leaf.dtype)}{list(leaf.shape)}. Resume with the config that wrote it."
            )


def _anyones(name: str, failure: str) -> str:
    """The failure of any process: what one cannot read, none may use."""
    return next((each for each in hosts.gather(name, failure) if each), "")


def _no_elements(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return hosts.put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
