"""Files of rows: JSON lines, TSV, CSV, Parquet and lines of text as numbered dicts, and what is wrong with a row said.

The name decides how a file is read: `.tsv`, `.csv`, `.parquet`, `.txt`, all else JSON lines; all but Parquet may end in
`.gz`. A line of text is a row with the one column "text".
"""

import csv
import gzip
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, TypeVar

from etils import epath
from tqdm import tqdm

from jaxembed.errors import InputError

Row = dict[str, Any]
_Item = TypeVar("_Item")

SKIP_REMEDY = "Mend the row, or have such rows dropped and counted with data.bad_rows: skip"

_MEBIBYTE = 1 << 20
_PROGRESS_FROM_BYTES = 64 * _MEBIBYTE
_PARQUET_ROWS = 4096  # decoded at once
_JSON_TYPES = {
    dict: "an object",
    list: "a list",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    type(None): "null",
}


def numbered_rows(
    path: epath.Path, name: str, *, spans: Sequence[range] | None = None, progress: bool = True
) -> Iterator[tuple[int, Row | InputError]]:
    """The rows of a file and their line numbers from 1 (of Parquet: row numbers), blank lines aside.

    A row that cannot be read is given as the error that says what is wrong, not where.

    Args:
        path: the file.
        name: of the data source, for messages and the progress bar.
        spans: places of the rows that are wanted, counted from 0, ascending and apart; None: all. Others are passed
            over unread, as far as the kind of file allows.
        progress: shows a bar for a large file.

    Raises:
        InputError: the file is missing, cannot be decompressed, or its header cannot be read.
    """
    kind = kind_of(path)
    if kind == "parquet":
        yield from _parquet_rows(path, name, spans)
    elif kind == "csv":
        yield from within(_csv_rows(path, name, progress), spans)
    elif kind == "tsv":
        yield from within(_tsv_rows(path, name, progress), spans)
    else:
        read = _text_row if kind == "txt" else _json_row
        lines = (found for found in _numbered_lines(path, name, progress) if found[1].strip())
        for number, line in within(lines, spans):
            yield number, read(line)


def within(items: Iterator[_Item], spans: Sequence[range] | None) -> Iterator[_Item]:
    """The items at these places, counted from 0; ascending and apart. None: all."""
    if spans is None:
        yield from items
        return
    place = 0
    for span in spans:
        yield from itertools.islice(items, span.start - place, span.stop - place)
        place = span.stop


def overlaps(part: range, spans: Sequence[range]) -> list[range]:
    """What of the spans lies in the part, counted from where the part begins."""
    found = (range(max(part.start, span.start), min(part.stop, span.stop)) for span in spans)
    return [range(span.start - part.start, span.stop - part.start) for span in found if span]


def numbered_fields(
    path: epath.Path, name: str, *, progress: bool = True
) -> Iterator[tuple[int, list[str] | InputError]]:
    """The fields of each line that is not blank, parted by tabs; quotes are letters like any other."""
    for number, line in _numbered_lines(path, name, progress):
        if line.strip():
            try:
                yield number, line.decode("utf-8-sig").rstrip("\r\n").split("\t")
            except UnicodeDecodeError as error:
                yield number, _not_utf8(line, error)


def kind_of(path: epath.Path) -> str:
    """ "tsv", "csv", "parquet", "txt" or "jsonl", by the file's name."""
    suffix = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    return suffix if suffix in ("tsv", "csv", "parquet", "txt") else "jsonl"


def file_fingerprint(path: epath.Path, name: str, options: Sequence[str]) -> str:
    """Hash of options and of the file's size, time, first and last MiB: no full read of a large file."""
    with _opened(path, name) as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256(json.dumps([*options, size, modification_time(path)]).encode())
        for start in (0, max(0, size - _MEBIBYTE)):
            file.seek(start)
            digest.update(file.read(_MEBIBYTE))
    return digest.hexdigest()


def modification_time(path: epath.Path) -> int:
    """Of a file, in nanoseconds; of one in a bucket, of which `epath` knows no more, in seconds."""
    try:
        return os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return path.stat().mtime


def value_at(row: Row, key: str) -> Any:
    """The value of a key that every row has to have."""
    if key not in row:
        raise InputError(f"no column {key!r}; columns of this row: {keys_of(row)}")
    return row[key]


def text_at(row: Row, key: str) -> str:
    """The text of a key that every row has to have."""
    return checked_text(value_at(row, key), f"column {key!r}")


def checked_text(value: Any, what: str) -> str:
    """The value, if it is text that can be encoded; `what` names it in the error."""
    if not isinstance(value, str):
        raise InputError(f"{what}: expected a string, found {type_name(value)}")
    if not _is_unicode(value):
        raise InputError(f"{what}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no text")
    return value


def keys_of(row: Row) -> str:
    return ", ".join(map(repr, row)) or "none"


def type_name(value: Any) -> str:
    return _JSON_TYPES.get(type(value), type(value).__name__)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _opened(path: epath.Path, name: str) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (data source {name!r})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read (data source {name!r}): {error.strerror or error}") from None


def _numbered_lines(path: epath.Path, name: str, progress: bool) -> Iterator[tuple[int, bytes]]:
    number = 0
    with _opened(path, name) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        hidden = not progress or size < _PROGRESS_FROM_BYTES
        bar = tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=hidden)
        try:
            with bar, gzip.open(file) if path.suffix == ".gz" else file as lines:
                for number, line in enumerate(lines, start=1):
                    if number % 1024 == 0:
                        bar.update(file.tell() - bar.n)
                    yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            damage = f"the gzip file is truncated or corrupt after line {number} ({error})"
            raise InputError(f"{path}: {damage}. Copy or download it again") from None


def _json_row(line: bytes) -> Row | InputError:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return _not_utf8(line, error)
    except json.JSONDecodeError as error:
        return InputError(f"not JSON: {error.msg} at character {error.colno}")
    except (ValueError, RecursionError) as error:
        return InputError(f"not JSON that can be read: {error}")
    if not isinstance(row, dict):
        return InputError(f"expected a JSON object, found {type_name(row)}")
    return row


def _text_row(line: bytes) -> Row | InputError:
    try:
        return {"text": line.decode("utf-8-sig").rstrip("\r\n")}
    except UnicodeDecodeError as error:
        return _not_utf8(line, error)


def _not_utf8(line: bytes, error: UnicodeDecodeError) -> InputError:
    return InputError(f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1} of the line")


def _tsv_rows(path: epath.Path, name: str, progress: bool) -> Iterator[tuple[int, Row | InputError]]:
    header = None
    for number, fields in numbered_fields(path, name, progress=progress):
        if header is None:
            if isinstance(fields, InputError):
                raise InputError(f"{path}:{number}: {fields}")
            header = _checked_header(fields, path)
        else:
            yield number, fields if isinstance(fields, InputError) else _row(header, fields)


def _csv_rows(path: epath.Path, name: str, progress: bool) -> Iterator[tuple[int, Row | InputError]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses fields of more than 128 KiB
    lines = (line.decode("utf-8-sig", "surrogateescape") for _, line in _numbered_lines(path, name, progress))
    reader = csv.reader(lines)
    header = None
    try:
        for fields in reader:
            if not fields:
                continue
            number = reader.line_num - sum(field.count("\n") for field in fields)
            readable = _is_unicode("".join(fields))
            if header is not None:
                yield number, _row(header, fields) if readable else InputError("not UTF-8")
            elif readable:
                header = _checked_header(fields, path)
            else:
                raise InputError(f"{path}:{number}: the header is not UTF-8")
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not CSV: {error}") from None


def _checked_header(fields: list[str], path: epath.Path) -> list[str]:
    doubled = sorted({field for field in fields if fields.count(field) > 1})
    if doubled:
        raise InputError(f"{path}:1: the header has {', '.join(map(repr, doubled))} more than once")
    return fields


def _row(header: list[str], fields: list[str]) -> Row | InputError:
    if len(fields) != len(header):
        columns = ", ".join(map(repr, header))
        return InputError(f"expected {len(header)} columns ({columns}), found {len(fields)}")
    return dict(zip(header, fields))


def _parquet_rows(path: epath.Path, name: str, spans: Sequence[range] | None) -> Iterator[tuple[int, Row | InputError]]:
    import pyarrow as pa  # slow to import, and few need it
    import pyarrow.parquet as pq

    number = 0
    with _opened(path, name) as file:
        try:
            opened = pq.ParquetFile(file)
            first = 0
            for group in range(opened.num_row_groups):
                part = range(first, first + opened.metadata.row_group(group).num_rows)
                wanted = overlaps(part, [part] if spans is None else spans)
                if wanted:
                    rows = (row for batch in opened.iter_batches(_PARQUET_ROWS, [group]) for row in batch.to_pylist())
                    for number, row in within(enumerate(rows, part.start + 1), wanted):
                        yield number, row
                first = part.stop
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not a Parquet file that can be read, after row {number}: {error}") from None
