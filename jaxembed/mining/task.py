"""What is to be mined: queries, the documents that answer them, and the documents that their negatives come from."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int, UInt64
from tqdm import tqdm

from jaxembed.data.cache import text_hash
from jaxembed.errors import InputError

_PROGRESS_FROM = 200_000  # texts


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, one behind the other."""

    values: np.ndarray
    offsets: Int[np.ndarray, " rows+1"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def row_of(self) -> Int[np.ndarray, " values"]:
        """The row in which each value stands."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))


@dataclass(frozen=True)
class Collection:
    """Texts and their ids, in a file's order; may hold a text twice. Both may lie on the disk.

    Attributes:
        find: ids → the place of each, −1 where there is none; None: in memory.
    """

    texts: Sequence[str]
    ids: Sequence[str]
    find: Callable[[Sequence[str]], Int[np.ndarray, " ids"]] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def places_of(self, ids: Sequence[str]) -> Int[np.ndarray, " ids"]:
        """The place of each id, −1 where there is none."""
        if self.find is not None:
            return self.find(ids)
        return np.array([self._places.get(name, -1) for name in ids], np.int64)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in reversed(list(enumerate(self.ids)))}


@dataclass(frozen=True)
class Task:
    """Queries and distinct documents.

    Attributes:
        queries, query_ids: each has a positive at least.
        documents, document_ids: every text once, the first of equal ones.
        candidates: the first so many documents may become negatives; the others are positives that the corpus lacks.
        positives: of each query the rows of its documents, in the order of the data.
        left_out: of each query the rows that are no negatives of it: the positives of all queries with its text, and
            its own text. They ascend.
        repeated: candidates whose text an earlier one has.
        queries_fingerprint, documents_fingerprint: change when a text or the order does.
        named: whether queries and documents have the ids of the data, not some that were made up here.
        corpus, row_of: all texts and ids, those of repeated texts too, and the document that each became.
    """

    queries: Sequence[str]
    query_ids: Sequence[str]
    documents: Sequence[str]
    document_ids: Sequence[str]
    candidates: int
    positives: Ragged
    left_out: Ragged
    repeated: int
    queries_fingerprint: str
    documents_fingerprint: str
    named: bool
    corpus: Collection
    row_of: Int[np.ndarray, " texts"]

    def rows_of(self, ids: Sequence[str]) -> Int[np.ndarray, " ids"]:
        """The documents of ids, −1 where there is none; repeated texts are one document."""
        places = self.corpus.places_of(ids)
        return np.where(places >= 0, self.row_of[places], -1)


def make_task(
    queries: Collection,
    corpus: Collection,
    query_of: Int[np.ndarray, " pairs"],
    place_of: Int[np.ndarray, " pairs"],
    *,
    candidates: int | None = None,
    blank: Int[np.ndarray, " blank"] | None = None,
    named: bool = False,
) -> Task:
    """The task of pairs (query, place in the corpus of a document that answers it); every query has one at least.

    Args:
        candidates: only the first so many texts of the corpus may become negatives; None: all.
        blank: places of texts that are empty or white space, which no pair names; they are no documents.
        named: whether the ids are those of the data.

    Raises:
        InputError: nothing to mine from.
    """
    candidates = len(corpus) if candidates is None else candidates
    hashes = _hashes(corpus.texts, "documents")
    known, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")  # of the distinct texts, by their first place
    if blank is not None:
        order = order[~np.isin(first[order], blank)]
    places = first[order]
    row_of_group = np.full(len(known), -1, np.int64)
    row_of_group[order] = np.arange(len(order))
    row_of = row_of_group[group]
    distinct = int(np.searchsorted(places, candidates))
    if not distinct or not len(query_of):
        raise InputError(f"expected queries with positives, and documents; found {len(query_of)} pairs, {distinct}")

    positives = _ragged(len(queries), query_of, row_of[place_of], ascending=False)
    query_hashes = _hashes(queries.texts, "queries")
    text_of = np.unique(query_hashes, return_inverse=True)[1]
    # Of each distinct text of a query: the rows that answer it under any of its ids, and the row that is that text.
    found = np.minimum(np.searchsorted(known, query_hashes), len(known) - 1)
    same = np.flatnonzero((known[found] == query_hashes) & (row_of_group[found] >= 0))
    owner = np.concatenate([text_of[positives.row_of], text_of[same]])
    rows = np.concatenate([positives.values, row_of_group[found[same]]])
    by_text = _ragged(int(text_of.max()) + 1, owner, rows, ascending=True)
    lengths = np.diff(by_text.offsets)[text_of]
    left_out = Ragged(
        np.concatenate([by_text[text] for text in text_of]), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    )
    return Task(
        queries.texts,
        queries.ids,
        Chosen(corpus.texts, places),
        Chosen(corpus.ids, places),
        distinct,
        positives,
        left_out,
        candidates - distinct - (0 if blank is None else int((blank < candidates).sum())),
        _fingerprint(query_hashes),
        _fingerprint(hashes[places]),
        named,
        corpus,
        row_of,
    )


class Chosen(Sequence[str]):
    """Some members of a sequence, in an order of their own."""

    def __init__(self, of: Sequence[str], places: Int[np.ndarray, " some"]) -> None:
        self._of, self._places = of, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self._of[int(place)] for place in self._places[row]]
        return self._of[int(self._places[row])]


class Joined(Sequence[str]):
    """Two sequences, one behind the other."""

    def __init__(self, first: Sequence[str], second: Sequence[str]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def __iter__(self) -> Iterator[str]:
        yield from self._first
        yield from self._second

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        return self._first[row] if row < len(self._first) else self._second[row - len(self._first)]


def _ragged(
    count: int, row_of: Int[np.ndarray, " pairs"], values: Int[np.ndarray, " pairs"], *, ascending: bool
) -> Ragged:
    """The distinct values of each row, in their order or ascending."""
    pairs = row_of.astype(np.int64) * (int(values.max(initial=0)) + 1) + values
    first = np.unique(pairs, return_index=True)[1]
    if not ascending:
        first.sort()
        first = first[np.argsort(row_of[first], kind="stable")]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of[first], minlength=count))])
    return Ragged(values[first].astype(np.int64), offsets.astype(np.int64))


def _hashes(texts: Sequence[str], name: str) -> UInt64[np.ndarray, " texts"]:
    shown: Iterable[str] = tqdm(texts, unit="text", desc=f"hash {name}", disable=len(texts) < _PROGRESS_FROM)
    return np.fromiter(map(text_hash, shown), np.uint64, len(texts))


def _fingerprint(hashes: UInt64[np.ndarray, " texts"]) -> str:
    return hashlib.sha256(hashes.tobytes()).hexdigest()
