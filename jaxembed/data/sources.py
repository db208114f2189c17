"""Where training pairs come from: `Examples`, the columns that every source gives, and the reader of JSONL files."""

import gzip
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Literal

from etils import epath
from tqdm import tqdm

from jaxembed.errors import InputError

EMPTY_TEXT = "empty text"
DUPLICATE = "duplicate"
SAME_TEXT = "anchor equal to its positive"
BAD_ROW = "bad row"

_MEBIBYTE = 1 << 20
_PROGRESS_FROM_BYTES = 64 * _MEBIBYTE
_JSON_TYPES = {
    dict: "an object",
    list: "a list",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    type(None): "null",
}


@dataclass(frozen=True)
class Examples:
    """The pairs of one source, as columns of equal length, and what became of the rows that are not among them.

    Attributes:
        name: the source's name in the config, in metrics and in the model card.
        anchors: queries, one a pair.
        positives: the document that each query should find.
        negatives: hard negatives of each query, none or as many as the source has columns for.
        ids: where each pair comes from, "medquad.jsonl.gz:17" or "json.decoder:JSONDecoder.decode".
        dropped: how many rows were left out, by reason.
        fingerprint: changes when the texts may have changed; does not depend on where the source lies.
    """

    name: str
    anchors: list[str]
    positives: list[str]
    negatives: list[tuple[str, ...]]
    ids: list[str]
    dropped: dict[str, int]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.anchors)


def summary(examples: Examples) -> str:
    """One line for the log: "medquad: 12,471 pairs kept, 3 dropped (2 duplicate, 1 empty text)"."""
    kept = f"{examples.name}: {len(examples):,} pair{'' if len(examples) == 1 else 's'} kept"
    return f"{kept}, {describe_dropped(examples.dropped)}"


def describe_dropped(dropped: dict[str, int]) -> str:
    """ "3 dropped (2 duplicate, 1 empty text)", the most frequent reason first."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items(), key=lambda item: -item[1]))
    return f"{sum(dropped.values()):,} dropped" + (f" ({reasons})" if reasons else "")


def read_jsonl(
    path: str | os.PathLike[str],
    *,
    name: str,
    anchor: str = "anchor",
    positive: str = "positive",
    negatives: Sequence[str] = (),
    bad_rows: Literal["error", "skip"] = "error",
) -> Examples:
    """Pairs from a file with one JSON object a line, in the file's order; gzip-compressed if its name ends in ".gz".

    A row whose texts are empty, that repeats an earlier (anchor, positive), or whose anchor equals its positive is
    dropped and counted. Blank lines do not count as rows. Texts are kept as they are, white space included.

    Args:
        path: a local file or any path that `etils.epath` knows, "gs://…" too.
        name: the source's name.
        anchor: the column of queries.
        positive: the column of documents that answer them.
        negatives: the columns of hard negatives.
        bad_rows: "error" stops at the first row that is not UTF-8, not JSON, not an object, lacks a column, or holds
            something else than a string there; "skip" drops and counts such rows.

    Raises:
        InputError: the file is missing, cannot be decompressed, has a bad row (see `bad_rows`), or gives no pair.
    """
    file = epath.Path(path).expanduser()
    columns = (anchor, positive, *negatives)
    fingerprint = _fingerprint(file, name, columns)
    anchors, positives, hard_negatives, ids = [], [], [], []
    dropped: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    for number, line in _numbered_lines(file, name):
        try:
            query, document, *others = texts = _parse_row(line, columns)
        except InputError as error:
            if bad_rows == "error":
                remedy = "Mend the row, or have such rows dropped and counted with data.bad_rows: skip"
                raise InputError(f"{file}:{number}: {error}. {remedy}") from None
            dropped[BAD_ROW] += 1
            continue
        if not all(text.strip() for text in texts):
            dropped[EMPTY_TEXT] += 1
        elif query == document:
            dropped[SAME_TEXT] += 1
        elif (query, document) in seen:
            dropped[DUPLICATE] += 1
        else:
            seen.add((query, document))
            anchors.append(query)
            positives.append(document)
            hard_negatives.append(tuple(others))
            ids.append(f"{file.name}:{number}")
    if not anchors:
        raise InputError(f"{file}: no pair left of {sum(dropped.values()):,} rows, {describe_dropped(dropped)}")
    return Examples(name, anchors, positives, hard_negatives, ids, dict(dropped), fingerprint)


@contextmanager
def _opened(path: epath.Path, name: str) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (data source {name!r})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read (data source {name!r}): {error.strerror or error}") from None


def _numbered_lines(path: epath.Path, name: str) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, numbered from 1."""
    number = 0
    with _opened(path, name) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        progress = tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=size < _PROGRESS_FROM_BYTES)
        try:
            with progress, gzip.open(file) if path.suffix == ".gz" else file as lines:
                for number, line in enumerate(lines, start=1):
                    if number % 1024 == 0:
                        progress.update(file.tell() - progress.n)
                    if line.strip():
                        yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            damage = f"the gzip file is truncated or corrupt after line {number} ({error})"
            raise InputError(f"{path}: {damage}. Copy or download it again") from None


def _fingerprint(path: epath.Path, name: str, columns: Sequence[str]) -> str:
    """Hash of the columns' names and of the file's size, time, first and last MiB: no full read of a large file."""
    with _opened(path, name) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            time = os.stat(path).st_mtime_ns
        except FileNotFoundError:  # in a bucket, where `epath` knows seconds
            time = path.stat().mtime
        digest = hashlib.sha256(json.dumps([*columns, size, time]).encode())
        for start in (0, max(0, size - _MEBIBYTE)):
            file.seek(start)
            digest.update(file.read(_MEBIBYTE))
    return digest.hexdigest()


def _parse_row(line: bytes, columns: Sequence[str]) -> list[str]:
    """The texts of the columns. An InputError here says what is wrong, not where."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1} of the line"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg} at character {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON that can be read: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"expected a JSON object, found {_JSON_TYPES[type(row)]}")
    texts = []
    for column in columns:
        if column not in row:
            has = ", ".join(map(repr, row)) or "none"
            raise InputError(f"no column {column!r}; columns of this row: {has}")
        text = row[column]
        if not isinstance(text, str):
            raise InputError(f"column {column!r}: expected a string, found {_JSON_TYPES[type(text)]}")
        if not _is_unicode(text):
            raise InputError(
                f"column {column!r}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no text"
            )
        texts.append(text)
    return texts


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
