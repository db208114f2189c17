"""Files that are whole or not there."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from etils import epath

TEMPORARY = ".tmp"
"""How the names of unfinished files end; they begin with a dot."""


@contextlib.contextmanager
def new_file(path: epath.Path | Path) -> Iterator[IO[bytes]]:
    """A file to write that gets its name, and replaces what had it, at the end of the block.

    After an error nothing is left; after a kill there may be a `.NAME.….tmp` beside it.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            yield file
            if is_local(path):
                file.flush()
                os.fsync(file.fileno())  # else the name could outlive what it stands for
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_local(path: epath.Path | Path) -> bool:
    """Whether it is no path of a bucket."""
    return "://" not in os.fspath(path)
