"""Texts by id on the disk: corpora that are never in memory.

One directory a store, written whole or not at all. It is memory-mapped, so that a text costs no memory:

    texts.bin       UTF-8, one text after the other
    offsets.npy     int64 [texts + 1], where each begins in texts.bin
    ids.bin         UTF-8, the ids in the same order
    id_offsets.npy  int64 [texts + 1]
    hashes.npy      uint64 [texts], `text_hash` of the ids, ascending
    order.npy       int32 or int64 [texts], the row of each of these
    blank.npy       int64, rows whose text is empty or only white space
    meta.json       counts, and how many rows of the source were skipped
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, overload

import numpy as np
from etils import epath
from jaxtyping import Bool, Int, Int64, UInt8, UInt64
from tqdm import tqdm

from jaxembed.data.cache import built_once, text_hash
from jaxembed.data.id_texts import id_texts, text_columns
from jaxembed.data.rows import SKIP_REMEDY, file_fingerprint
from jaxembed.errors import InputError

log = logging.getLogger(__name__)

_FORMAT = 1
_BLOCK = 1 << 16
_READ = 1 << 12  # texts read together

CORPUS_FILES = ("corpus.jsonl", "corpus.tsv", "corpus.csv", "corpus.parquet", "collection.tsv")


@dataclass(frozen=True, eq=False)
class TextStore:
    """Texts on the disk, by row; `rows_of` finds the rows of ids.

    Attributes:
        directory: where the arrays lie.
        fingerprint: changes whenever the texts or ids may have changed.
        skipped: rows of the source that could not be read, or whose id an earlier one has.
        blank: rows whose text is empty or only white space.
    """

    directory: Path
    fingerprint: str
    skipped: int
    blank: Int64[np.ndarray, " blank"]
    _texts: UInt8[np.ndarray, " bytes"]
    _offsets: Int64[np.ndarray, " texts+1"]
    _ids: UInt8[np.ndarray, " id_bytes"]
    _id_offsets: Int64[np.ndarray, " texts+1"]
    _hashes: UInt64[np.ndarray, " texts"]
    _order: Int[np.ndarray, " texts"]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, row: int) -> str:
        return self._texts[self._offsets[row] : self._offsets[row + 1]].tobytes().decode()

    def texts(self, rows: Int[np.ndarray, " rows"]) -> list[str]:
        return [self[row] for row in rows.tolist()]

    def id_of(self, row: int) -> str:
        return self._id_bytes(row).decode()

    def bytes_of(self, rows: Int[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
        """The length of each text in UTF-8."""
        return self._offsets[rows + 1] - self._offsets[rows]

    def rows_of(self, ids: Sequence[str]) -> Int64[np.ndarray, " ids"]:
        """The row of each id, −1 where there is none; compared letter by letter, not by hash alone."""
        return np.concatenate([self._find(ids[at : at + _BLOCK]) for at in range(0, len(ids), _BLOCK)] or [_NO_ROWS])

    def _find(self, ids: Sequence[str]) -> Int64[np.ndarray, " ids"]:
        encoded = [one.encode() for one in ids]
        wanted = np.fromiter(map(text_hash, ids), np.uint64, len(ids))
        places = np.searchsorted(self._hashes, wanted)
        inside = np.minimum(places, len(self) - 1)
        hit = self._hashes[inside] == wanted
        rows = np.where(hit, self._order[inside], -1).astype(np.int64)
        for place in np.flatnonzero(hit)[~self._are(rows[hit], [encoded[at] for at in np.flatnonzero(hit)])].tolist():
            at = int(places[place])
            # Ids of one hash stand beside each other.
            while self._id_bytes(int(rows[place])) != encoded[place]:
                at += 1
                if at == len(self) or self._hashes[at] != wanted[place]:
                    rows[place] = -1
                    break
                rows[place] = self._order[at]
        return rows

    def _are(self, rows: Int64[np.ndarray, " rows"], ids: Sequence[bytes]) -> Bool[np.ndarray, " rows"]:
        """Whether these rows have these ids."""
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        starts, ends = self._id_offsets[rows], self._id_offsets[rows + 1]
        same = ends - starts == lengths
        letters = np.frombuffer(b"".join(one for one, fits in zip(ids, same.tolist()) if fits), np.uint8)
        counts = lengths[same]
        first = np.cumsum(counts) - counts
        owner = np.repeat(np.arange(len(counts)), counts)
        found = self._ids[starts[same][owner] + np.arange(len(owner)) - first[owner]]
        same[same] = np.bincount(owner, found != letters, len(counts)) == 0
        return same

    def _id_bytes(self, row: int) -> bytes:
        return self._ids[self._id_offsets[row] : self._id_offsets[row + 1]].tobytes()


_NO_ROWS = np.zeros(0, np.int64)


class Texts(Protocol):
    """Texts on the disk by row: a `TextStore`, or the passages of a prepared data set."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> str: ...

    def texts(self, rows: Int[np.ndarray, " rows"], /) -> list[str]:
        """The texts of several rows, read together."""
        ...


@dataclass(frozen=True, eq=False)
class Picked(Sequence[str]):
    """Texts of a store, by row; read from the disk when they are asked for."""

    store: Texts
    rows: Int[np.ndarray, " texts"]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Picked": ...
    def __getitem__(self, index: int | slice) -> "str | Picked":
        if isinstance(index, slice):
            return Picked(self.store, self.rows[index])
        return self.store[int(self.rows[index])]

    def __iter__(self) -> Iterator[str]:
        for at in range(0, len(self), _READ):
            yield from self.store.texts(self.rows[at : at + _READ])


@dataclass(frozen=True, eq=False)
class PickedRows(Sequence[Sequence[str]]):
    """For each example texts of a store, by row; those that an example has come first, then −1."""

    store: Texts
    rows: Int[np.ndarray, "examples columns"]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Picked: ...
    @overload
    def __getitem__(self, index: slice) -> "PickedRows": ...
    def __getitem__(self, index: int | slice) -> "Picked | PickedRows":
        if isinstance(index, slice):
            return PickedRows(self.store, self.rows[index])
        row = self.rows[index]
        return Picked(self.store, row[row >= 0])


def find_file(folder: epath.Path, names: Sequence[str], what: str) -> epath.Path:
    """The first of the names that is in the folder, plain or with ".gz" behind it.

    Raises:
        InputError: there is none.
    """
    for name in names:
        for found in (folder / name, folder / f"{name}.gz"):
            if found.exists():
                return found
    raise InputError(f"{folder}: no {what} there; looked for {', '.join(names)}, each with or without .gz")


def find_corpus(path: epath.Path) -> epath.Path:
    """The file itself, or the corpus in a folder."""
    return find_file(path, CORPUS_FILES, "corpus") if path.is_dir() else path


def store_of_file(
    path: epath.Path,
    name: str,
    *,
    keys: tuple[Sequence[str], Sequence[str]],
    directory: str | os.PathLike[str],
    bad_rows: Literal["error", "skip"] = "error",
) -> TextStore:
    """The store of a file of texts with ids; built once for each state of the file.

    Args:
        path: the file.
        name: of the data source.
        keys: as in `text_columns`, where the kinds of files are named.
        directory: local folder of the caches.
        bad_rows: what a row that cannot be read leads to, and an id that stands there twice.

    Raises:
        InputError: with file, line and key.
    """
    fingerprint = file_fingerprint(path, name, ["text store", str(_FORMAT), *keys[0], *keys[1]])

    def texts() -> Iterator[tuple[str, str] | None]:
        columns = text_columns(path, name, keys)
        for number, found in id_texts(path, name, columns):
            if not isinstance(found, InputError):
                yield found
            elif bad_rows == "error":
                raise InputError(f"{path}:{number}: {found}. {SKIP_REMEDY}")
            else:
                yield None

    store = _built(texts, fingerprint, directory, f"{path}", bad_rows)
    log.info("%s: %s has %s texts, on disk in %s", name, path, f"{len(store):,}", store.directory)
    return store


def build_text_store(
    texts: Callable[[], Iterable[tuple[str, str]]], *, fingerprint: str, directory: str | os.PathLike[str], name: str
) -> TextStore:
    """The store of (id, text): the one that is there, else a new one.

    Args:
        texts: gives them from the beginning, whenever it is called.
        fingerprint: changes whenever the texts may have changed.
        directory: local folder of the caches.
        name: of the texts, for messages.

    Raises:
        InputError: an id that stands there twice, no text at all, or a disk that is full.
    """
    return _built(texts, fingerprint, directory, name, "error")


def _built(
    texts: Callable[[], Iterable[tuple[str, str] | None]],
    fingerprint: str,
    directory: str | os.PathLike[str],
    name: str,
    bad_rows: Literal["error", "skip"],
) -> TextStore:
    """`texts` may give None for rows that were skipped."""

    def opened(at: Path) -> TextStore:
        store = _open(at, fingerprint)
        if store.skipped and bad_rows == "error":
            raise ValueError(f"built with {store.skipped:,} rows skipped")
        return store

    folder = hashlib.sha256(f"{_FORMAT} {fingerprint}".encode()).hexdigest()[:32]
    final = Path(directory).expanduser() / "stores" / folder
    return built_once(final, opened, lambda at: _write(at, texts(), name, bad_rows), "text store")


def _write(
    directory: Path, texts: Iterable[tuple[str, str] | None], name: str, bad_rows: Literal["error", "skip"]
) -> None:
    blank: list[int] = []
    count = skipped = 0
    with (
        open(directory / "texts.bin", "wb") as text_file,
        open(directory / "ids.bin", "wb") as id_file,
        open(directory / "lengths.tmp", "wb") as lengths,
        open(directory / "id_lengths.tmp", "wb") as id_lengths,
        open(directory / "unsorted.tmp", "wb") as hashes,
        tqdm(unit=" texts", desc=f"{name} to the disk", delay=2) as bar,
    ):
        for found in texts:
            if found is None:
                skipped += 1
                continue
            one, text = found
            lengths.write(text_file.write(text.encode()).to_bytes(8, "little"))
            id_lengths.write(id_file.write(one.encode()).to_bytes(8, "little"))
            hashes.write(text_hash(one).to_bytes(8, "little"))
            if not text.strip():
                blank.append(count)
            count += 1
            if count % 1024 == 0:
                bar.update(1024)
    if not count:
        raise InputError(f"{name}: no text with an id" + (f", {skipped:,} rows skipped" if skipped else ""))
    for column, target in (("lengths", "offsets"), ("id_lengths", "id_offsets")):
        _to_offsets(directory / f"{column}.tmp", directory / f"{target}.npy", count)
    unsorted = np.memmap(directory / "unsorted.tmp", np.uint64, "r")
    order = np.argsort(unsorted, kind="stable").astype(np.int32 if count < 2**31 else np.int64)
    np.save(directory / "order.npy", order)
    ascending = np.lib.format.open_memmap(directory / "hashes.npy", "w+", np.uint64, (count,))
    for at in range(0, count, _BLOCK):
        ascending[at : at + _BLOCK] = unsorted[order[at : at + _BLOCK]]
    ascending.flush()
    del unsorted
    for column in ("lengths", "id_lengths", "unsorted"):
        (directory / f"{column}.tmp").unlink()
    np.save(directory / "blank.npy", np.array(blank, np.int64))
    sizes = {column: (directory / f"{column}.bin").stat().st_size for column in ("texts", "ids")}
    meta: dict[str, Any] = {"format": _FORMAT, "count": count, "bytes": sizes, "skipped": skipped, "source": name}
    (directory / "meta.json").write_text(json.dumps(meta, indent=1))
    store = _open(directory, "")
    repeated = _repeated_ids(store)
    if repeated and bad_rows == "error":
        first, second = repeated[0]
        raise InputError(
            f"{name}: the id {store.id_of(first)!r} stands there twice, in rows {first + 1} and {second + 1}"
        )
    if repeated:
        (directory / "meta.json").write_text(json.dumps(meta | {"skipped": skipped + len(repeated)}, indent=1))


def _to_offsets(lengths: Path, offsets: Path, count: int) -> None:
    found = np.memmap(lengths, np.int64, "r")
    target = np.lib.format.open_memmap(offsets, "w+", np.int64, (count + 1,))
    end = 0
    for at in range(0, count, _BLOCK):
        ends = end + np.cumsum(found[at : at + _BLOCK])
        target[at + 1 : at + 1 + len(ends)] = ends
        end = int(ends[-1])
    target.flush()


def _repeated_ids(store: TextStore) -> list[tuple[int, int]]:
    """Pairs of rows with the same id, the first of them and a later one."""
    found = []
    for at in range(0, len(store) - 1, _BLOCK):
        block = store._hashes[at : at + _BLOCK + 1]
        for place in (at + np.flatnonzero(block[1:] == block[:-1])).tolist():
            row = int(store._order[place + 1])
            first = int(store.rows_of([store.id_of(row)])[0])
            if first != row:
                found.append((first, row))
    return sorted(found, key=lambda pair: pair[1])


def _open(directory: Path, fingerprint: str) -> TextStore:
    meta = json.loads((directory / "meta.json").read_text())
    count = meta["count"]
    if meta["format"] != _FORMAT:
        raise ValueError(f"its format is {meta['format']}, expected {_FORMAT}")
    offsets, id_offsets, hashes, order = (
        np.asarray(np.load(directory / f"{name}.npy", mmap_mode="r"))
        for name in ("offsets", "id_offsets", "hashes", "order")
    )
    if (len(offsets), len(id_offsets), len(hashes), len(order)) != (count + 1, count + 1, count, count):
        raise ValueError("its arrays are not as long as meta.json says")
    bins = []
    for name, ends in (("texts", offsets), ("ids", id_offsets)):
        size = (directory / f"{name}.bin").stat().st_size
        if not size == meta["bytes"][name] == ends[-1]:
            raise ValueError(f"{name}.bin has {size} bytes, expected {meta['bytes'][name]}")
        # An empty file cannot be mapped.
        bins.append(np.asarray(np.memmap(directory / f"{name}.bin", np.uint8, "r") if size else np.zeros(0, np.uint8)))
    blank = np.load(directory / "blank.npy")
    return TextStore(
        directory, fingerprint, meta["skipped"], blank, bins[0], offsets, bins[1], id_offsets, hashes, order
    )
