"""Directories of models: written whole or not at all, and never over something else.

In a bucket nothing can be renamed: what was there is deleted first, a marker says that a model is being written, and
the files without which there is none (`config.json`, the records) come last.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from etils import epath
from tqdm import tqdm

from jaxembed.errors import FULL_DISK, InputError

try:
    import fcntl
except ImportError:  # on Windows; nothing is locked there
    fcntl = None

INCOMPLETE = "jaxembed_incomplete"
"""Where it is, a model in a bucket is being written, or its writer was killed."""

_LAST = ("adapter_config.json", "config.json", "jaxembed_orbax.json")
_COPIED_BYTES = 16 << 20  # at once

ModelPath = Path | epath.Path


def model_path(path: str | os.PathLike[str]) -> ModelPath:
    """Where a model is written: a local path, or one in a bucket (`gs://…`), which `pathlib` would not keep."""
    return epath.Path(path) if in_bucket(path) else Path(path).expanduser()


def in_bucket(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


@contextlib.contextmanager
def new_directory(target: ModelPath) -> Iterator[Path]:
    """An empty local directory that becomes `target`, in place of what is there, at the end of the block.

    What bears the name is whole, also after a kill at any time; after an error nothing is left. The directory lies
    beside a local target, and what was there is there until then. For a bucket it is a temporary one, whose files are
    uploaded in the end, to those that are there already by `Uploads`.

    Raises:
        InputError: the local target is a mount point, cannot be written, or is being written by another process.
    """
    if not isinstance(target, Path):
        with _new_in_bucket(target) as partial:
            yield partial
        return
    target = Path(os.path.realpath(target))
    if os.path.ismount(target):
        raise InputError(f"{target}: is a mount point, which cannot be replaced; choose a directory in it")
    partial, old = target.with_name(f".{target.name}.incomplete"), target.with_name(f".{target.name}.old")
    lock = _hold(partial, target)
    try:
        if old.exists() and not target.exists():  # killed between two renames
            old.rename(target)
        for entry in partial.iterdir():  # of a process that was killed
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        yield partial
        _rename(partial, target, old)
    except BaseException:
        _remove(partial)
        raise
    finally:
        if lock is not None:
            os.close(lock)


class Uploads:
    """Takes finished files to a directory in a bucket, one at a time, while the next one is made; a context manager."""

    def __init__(self, target: epath.Path) -> None:
        self._target = target
        self._thread = ThreadPoolExecutor(1)
        self._coming: Future[None] | None = None

    def __enter__(self) -> "Uploads":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        if self._coming is not None and error[0] is None:
            self._coming.result()

    def __call__(self, file: Path) -> None:
        """The file is deleted here once it is there; no more than one is waited for."""
        if self._coming is not None:
            self._coming.result()
        self._coming = self._thread.submit(self._move, file)

    def _move(self, file: Path) -> None:
        _copy(file, self._target / file.name)
        file.unlink()


def download(source: epath.Path, target: Path) -> None:
    """Copies a directory of a bucket."""
    for name, file in _files(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _copy(file, target / name)


def fetched(source: epath.Path, cache: Path) -> Path:
    """A copy of a directory of a bucket, in `cache`; one that is there is taken while the files are the same.

    Raises:
        InputError: there is no such directory, or a model is being written there.
    """
    files = dict(_files(source)) if source.is_dir() else {}
    if not files:
        raise InputError(f"{source}: expected the directory of a model, found nothing")
    if INCOMPLETE in files:
        raise InputError(f"{source}: a model is being written there, or its writer was killed; wait, or write it again")
    found = {name: epath.Path(file).stat() for name, file in sorted(files.items())}
    key = json.dumps([os.fspath(source), [[name, stat.length, stat.mtime] for name, stat in found.items()]])
    target = cache / hashlib.sha256(key.encode()).hexdigest()[:16] / source.name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=cache) as temporary,
        tqdm(desc=f"{source}", total=sum(stat.length for stat in found.values()), unit="B", unit_scale=True) as bar,
    ):
        partial = Path(temporary) / source.name
        for name, stat in found.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(files[name], partial / name)
            bar.update(stat.length)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first
                raise
    return target


def is_incomplete(target: ModelPath) -> bool:
    """Whether there is nothing but what a killed process wrote of a model."""
    return in_bucket(target) and (target / INCOMPLETE).exists()


def refuse_target(target: ModelPath, source: Path, overwrite: bool) -> None:
    """Refuses a directory that a conversion of `source` must not write.

    Raises:
        InputError: it is not empty and `overwrite` is False or it is no model directory, or it holds the source.
    """
    if isinstance(target, Path) and target.parts and target.parts[0].endswith(":"):  # of gs://bucket/model
        raise InputError(f"{target}: this model is written to a local directory; write it there, then copy it")
    if not target.exists() or is_incomplete(target):
        return
    if not target.is_dir():
        raise InputError(f"{target}: is a file; a model is written as a directory")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{target}: is not empty; choose another directory, or allow it with --overwrite")
    if not in_bucket(target) and Path(os.path.realpath(source)).is_relative_to(os.path.realpath(target)):
        raise InputError(f"{target}: is, or holds, the source {source}; choose another directory")
    if not (target / "config.json").exists() or (target / ".git").exists():
        raise InputError(f"{target}: is no model directory, so it is not overwritten; choose another one")


@contextlib.contextmanager
def _new_in_bucket(target: epath.Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="jaxembed-") as folder:
        partial = Path(folder) / target.name
        partial.mkdir()
        if target.exists():
            target.rmtree()
        target.mkdir(parents=True, exist_ok=True)
        (target / INCOMPLETE).write_bytes(b"a model is being written here\n")
        try:
            yield partial
            for name, file in sorted(_files(partial), key=lambda each: (each[0] in _LAST, each[0])):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                _copy(file, target / name)
            (target / INCOMPLETE).unlink()
        except BaseException:
            with contextlib.suppress(Exception):  # it is what failed, perhaps
                target.rmtree()
            raise


def _files(directory: ModelPath, inside: str = "") -> Iterator[tuple[str, ModelPath]]:
    """All files below a directory, with their paths in it."""
    for entry in directory.iterdir():
        if entry.is_dir():
            yield from _files(entry, f"{inside}{entry.name}/")
        else:
            yield f"{inside}{entry.name}", entry


def _copy(source: ModelPath, target: ModelPath) -> None:
    with source.open("rb") as old, target.open("wb") as new:
        shutil.copyfileobj(old, new, _COPIED_BYTES)


def _hold(partial: Path, target: Path) -> int | None:
    """Makes the directory, or takes that of a killed process, and locks it, which a kill ends too; gives the lock."""
    made, lock = False, None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        while True:
            made = not partial.exists()
            partial.mkdir(exist_ok=True)
            if fcntl is None:
                return None
            lock = os.open(partial, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                made = False
                raise InputError(f"{target}: another process is writing it; wait, or choose another one") from None
            except OSError:  # a file system without locks
                return lock
            if partial.exists() and os.path.samestat(os.fstat(lock), partial.stat()):
                return lock
            os.close(lock)  # its holder has just finished with it
            lock = None
    except BaseException as error:
        if lock is not None:
            os.close(lock)
        if made:
            _remove(partial)
        if isinstance(error, OSError) and error.errno not in FULL_DISK:
            raise InputError(f"{target}: cannot be written: {error}") from error
        raise


def _remove(partial: Path, patience: float = 5.0) -> None:
    """Again until it is gone: threads of Orbax may still write into it after one of them has failed."""
    deadline = time.monotonic() + patience
    while True:
        shutil.rmtree(partial, ignore_errors=True)
        time.sleep(0.05)
        if not partial.exists() or time.monotonic() > deadline:
            return


def _rename(partial: Path, target: Path, old: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)
