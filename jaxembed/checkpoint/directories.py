"""Directories of models: written whole or not at all, and never over something else."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from jaxembed.errors import InputError


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """An empty directory beside `target` that takes its name, and its place, at the end of the block.

    So what bears the name is whole, also after a kill at any time; after an error nothing is left.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _rename(partial, target)
    except BaseException:
        _remove(partial)
        raise


def refuse_target(target: Path, source: Path, overwrite: bool) -> None:
    """Refuses a directory that a conversion of `source` must not write.

    Raises:
        InputError: it is not empty and `overwrite` is False or it is no model directory, or it holds the source.
    """
    if target.parts and target.parts[0].endswith(":"):  # of gs://bucket/model, as a path has it
        raise InputError(f"{target}: a model is written to a local directory; write it there, then copy it")
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target}: is a file; a model is written as a directory")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{target}: is not empty; choose another directory, or allow it with --overwrite")
    if Path(os.path.realpath(source)).is_relative_to(os.path.realpath(target)):
        raise InputError(f"{target}: is, or holds, the source {source}; choose another directory")
    if not (target / "config.json").is_file() or (target / ".git").exists():
        raise InputError(f"{target}: is no model directory, so it is not overwritten; choose another one")


def _remove(partial: Path, patience: float = 5.0) -> None:
    """Again until it is gone: threads of Orbax may still write into it after one of them has failed."""
    deadline = time.monotonic() + patience
    while True:
        shutil.rmtree(partial, ignore_errors=True)
        time.sleep(0.05)
        if not partial.exists() or time.monotonic() > deadline:
            return


def _rename(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)
