"""A corpus as one sequence of rows over all of its files: looked through once, then read shard by shard, never held."""

import itertools
import logging
import os
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from etils import epath

from jaxembed.data.files import is_local
from jaxembed.data.id_texts import CORPUS_KEYS, QUERY_KEYS, TextColumns, id_texts, text_columns
from jaxembed.data.rows import modification_time, overlaps
from jaxembed.errors import InputError
from jaxembed.text.format import RoleName

logger = logging.getLogger(__name__)

_NAME = "input"  # in messages and progress bars
_WILD = re.compile(r"[*?\[]")

Text = tuple[str, str]
"""Id and text."""
BadRows = Literal["error", "skip"]


@dataclass(frozen=True)
class Fields:
    """Columns of the rows; None takes what is usual."""

    id: str | None = None
    """None: "_id", "docid", …, the first that a file has, else FILE:LINE."""
    text: str | None = None
    title: str | None = None
    """None: "title", where a row has it; "": none."""


@dataclass(frozen=True)
class File:
    """A file of the corpus as it was found."""

    path: str
    bytes: int
    modified: int


@dataclass(frozen=True)
class Part:
    """A file of the corpus as it was read."""

    file: File
    rows: int
    label: str
    """Stands for the file in ids."""
    columns: TextColumns


@dataclass(frozen=True)
class Survey:
    """What a look through the whole corpus found."""

    parts: Sequence[Part]
    texts: int
    skipped: int
    """Rows that cannot be read, among the parts' rows."""
    sample: Sequence[str]
    """Texts drawn from everywhere, the same at every survey."""


def find_files(patterns: Sequence[str]) -> list[File]:
    """The files that names and patterns stand for, those of a pattern in alphabetical order, each once.

    Raises:
        InputError: a name that is no file or is not UTF-8, or a pattern that matches none.
    """
    found: dict[str, File] = {}
    for pattern in patterns:
        for path in _matches(pattern):
            if not is_unicode(str(path)):
                raise InputError(
                    f"--input {str(path)!r}: the name is not UTF-8, in which ids and manifest are; rename it"
                )
            found.setdefault(os.path.abspath(path) if is_local(path) else str(path), _found(path))
    return list(found.values())


def is_unicode(text: str) -> bool:
    """False for what the system gave as bytes that are not UTF-8."""
    return text.isascii() or text == text.encode(errors="replace").decode()


def refuse_changed(files: Sequence[File]) -> None:
    """Refuses files that are no longer as they were found.

    Raises:
        InputError: names the first one.
    """
    for file in files:
        path = epath.Path(file.path)
        if not path.exists() or _found(path) != file:
            raise InputError(
                f"--input {path}: was changed while the job ran, so that the embeddings may be of both states; remove "
                "them, and start again"
            )


def _found(path: epath.Path) -> File:
    return File(str(path), path.stat().length, modification_time(path))


def _matches(pattern: str) -> list[epath.Path]:
    path = epath.Path(pattern).expanduser()
    if path.is_dir():
        raise InputError(f"--input {pattern}: is a folder; expected files, such as {str(path).rstrip('/')}/*.jsonl.gz")
    if path.exists():
        return [path]
    wild = _WILD.search(str(path))
    if wild is None:
        raise InputError(f"--input {pattern}: no such file")
    folder, slash, _ = str(path)[: wild.start()].rpartition("/")
    rest = str(path)[len(folder + slash) :]
    files = sorted(str(one) for one in epath.Path(folder or slash or ".").glob(rest) if not one.is_dir())
    if not files:
        raise InputError(f"--input {pattern}: matches no file")
    return [epath.Path(one) for one in files]


def survey(
    files: Sequence[File], fields: Fields, role: RoleName, bad_rows: BadRows, *, sample: int = 0, progress: bool = True
) -> Survey:
    """Reads every row once: what cannot be read is said before the long part, and the number of texts is known.

    Args:
        role: whose usual columns are looked for.
        sample: how many texts are drawn, at most.

    Raises:
        InputError: with file and line, a row that cannot be read, unless `bad_rows` is "skip"; or there is no text.
    """
    names = [epath.Path(file.path).name for file in files]
    times = Counter(names)
    keys = CORPUS_KEYS if role == "document" else QUERY_KEYS
    keys = (keys[0] if fields.id is None else (fields.id,), keys[1] if fields.text is None else (fields.text,))
    parts: list[Part] = []
    texts = skipped = 0
    drawn: list[str] = []
    random = np.random.default_rng(0)
    for file, name in zip(files, names):
        path = epath.Path(file.path)
        columns = text_columns(path, _NAME, keys, title=fields.title, ids_needed=fields.id is not None)
        if columns.text is None and (fields.id is not None or fields.text is not None or fields.title):
            missing = " or ".join(map(repr, keys[0] if fields.id is not None else (*keys[0], *keys[1])))
            raise InputError(
                f"{path}:1: no column {missing}, so the file is taken for one without header, of id, text or id, "
                "title, text; the columns that --id-field, --text-field and --title-field name need a header"
            )
        label = name if times[name] == 1 else file.path
        rows = 0
        for number, found in id_texts(path, name, columns, label=label, progress=progress):
            rows += 1
            if isinstance(found, InputError):
                if bad_rows == "error":
                    raise InputError(_bad_row(path, number, found))
                if not skipped:
                    logger.warning("%s:%d: %s; skipped, as all such rows will be", path, number, found)
                skipped += 1
                continue
            texts += 1
            if len(drawn) < sample:
                drawn.append(found[1])
            elif sample and (place := int(random.integers(texts))) < sample:  # reservoir sampling
                drawn[place] = found[1]
        parts.append(Part(file, rows, label, columns))
    if not texts:
        held = f"{skipped:,} rows, none of which can be read" if skipped else "no row"
        raise InputError(f"--input: no text in {', '.join(file.path for file in files[:3])}: {held}")
    return Survey(parts, texts, skipped, drawn)


def read_shards(parts: Sequence[Part], shards: Sequence[range], bad_rows: BadRows) -> Iterator[list[Text]]:
    """The texts of each shard, without rows that cannot be read; files are gone through once.

    Args:
        shards: rows, counted through all files; ascending and apart.

    Raises:
        InputError: a file has changed since the survey.
    """
    rows = _rows(parts, shards)
    for shard in shards:
        found, count = [], 0
        for path, number, one in itertools.islice(rows, len(shard)):
            count += 1
            if not isinstance(one, InputError):
                found.append(one)
            elif bad_rows == "error":
                raise InputError(_bad_row(path, number, one))
        if count < len(shard):
            raise InputError("--input: fewer rows than when the job began; a file was changed meanwhile")
        yield found


def _rows(parts: Sequence[Part], shards: Sequence[range]) -> Iterator[tuple[epath.Path, int, Text | InputError]]:
    first = 0
    starts, stops = [shard.start for shard in shards], [shard.stop for shard in shards]
    for part in parts:
        inside = range(first, first + part.rows)
        near = shards[bisect_right(stops, inside.start) : bisect_left(starts, inside.stop)]
        if wanted := overlaps(inside, near):
            path = epath.Path(part.file.path)
            found = id_texts(path, _NAME, part.columns, label=part.label, spans=wanted, progress=False)
            yield from ((path, *each) for each in found)
        first = inside.stop


def _bad_row(path: epath.Path, number: int, error: InputError) -> str:
    return f"{path}:{number}: {error}. Mend the row, or have such rows dropped and counted with --bad-rows skip"
