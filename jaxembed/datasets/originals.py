"""The original files of a data set: where they are found, and their lines, whatever they are packed in."""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from etils import epath
from tqdm import tqdm

from jaxembed.errors import InputError

PROGRESS_FROM_BYTES = 64 << 20
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError)
"""What reading a truncated or corrupt archive raises."""

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Original:
    """A file as its publisher offers it.

    Attributes:
        names: under which it is looked for, in this order.
        url: where it is downloaded from.
        size: of the download, for people.
        member: its name inside the archive, where the download is one.
    """

    names: tuple[str, ...]
    url: str
    size: str
    member: str | None = None

    def find(self, directory: epath.Path) -> epath.Path:
        """The file in a directory.

        Raises:
            InputError: it is not there, or empty.
        """
        for name in self.names:
            path = directory / name
            if path.exists():
                if path.stat().length == 0:
                    raise InputError(f"{path}: empty file; expected the download of {self.size} from {self.url}")
                return path
        raise InputError(f"{directory}: no {' or '.join(self.names)} there; get it ({self.size}) from {self.url}")


@contextmanager
def opened(path: epath.Path, original: Original, task: str) -> Iterator[IO[bytes]]:
    """The file's bytes, out of gzip and tar where it is in them, with a bar over what is read of a large file.

    Raises:
        InputError: it cannot be read, is truncated or corrupt, or is an archive without `original.member`; the first
            two also where the bytes are read.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            gzipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            hidden = size < PROGRESS_FROM_BYTES
            with tqdm(total=size, unit="B", unit_scale=True, desc=f"{task}: {path.name}", disable=hidden) as bar:
                counted = io.BufferedReader(_Counted(file, bar), _BLOCK)
                content = io.BufferedReader(gzip.GzipFile(fileobj=counted), _BLOCK) if gzipped else counted
                yield content if content.peek(512)[257:262] != b"ustar" else _member(content, original, path)
    except DAMAGE as error:
        raise InputError(
            f"{path}: truncated or corrupt ({error}); get it again ({original.size}) from {original.url}"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def numbered_lines(path: epath.Path, original: Original, task: str) -> Iterator[tuple[int, bytes]]:
    """The lines without their ends, numbered from 1."""
    with opened(path, original, task) as content:
        for number, line in enumerate(content, start=1):
            yield number, line.rstrip(b"\r\n")


def count_lines(path: epath.Path, original: Original) -> int:
    """How many lines `numbered_lines` gives."""
    count, last = 0, b"\n"
    with opened(path, original, "counting") as content:
        while block := content.read(_BLOCK):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")


def text_of(line: bytes, path: epath.Path, number: int) -> str:
    """A line as text.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x} at position {error.start + 1} of the line"
        raise InputError(f"{path}:{number}: not UTF-8: {byte}") from None


def _member(content: IO[bytes], original: Original, path: epath.Path) -> IO[bytes]:
    names = []
    archive = tarfile.open(fileobj=content, mode="r|")  # noqa: SIM115 (its member is read later)
    for entry in archive:
        names.append(entry.name)
        if entry.isfile() and entry.name.rpartition("/")[2] == original.member:
            member = archive.extractfile(entry)
            assert member is not None
            return member
    raise InputError(f"{path}: the archive holds no {original.member}; it holds {', '.join(names) or 'nothing'}")


class _Counted(io.RawIOBase):
    """A file that moves a bar as it is read."""

    def __init__(self, file: IO[bytes], bar: tqdm) -> None:
        self._file, self._bar = file, bar

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        block = self._file.read(len(buffer))
        buffer[: len(block)] = block
        self._bar.update(len(block))
        return len(block)
