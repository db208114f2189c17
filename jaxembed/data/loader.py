"""From the epoch plan to packed global batches: which texts, in which rows, on which chip.

A batch depends on the plan and the step alone; the mesh decides only where its rows lie. `Batches` is random access, so
that a resumed run needs nothing but its step. Grain carries it: threads, prefetch, the next index.
"""

import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Float, Int, UInt64

from jaxembed.data.cache import TokenCache, build_token_cache
from jaxembed.data.known import KnownPositives
from jaxembed.data.plan import DataSet, Schedule
from jaxembed.data.sources import Examples
from jaxembed.data.text_store import Picked, PickedRows
from jaxembed.text.format import RoleName
from jaxembed.text.packing import RowShape, best_fit_rows, fill_rows
from jaxembed.text.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

CHUNK_TOKENS = {"cpu": 1024, "gpu": 32_768, "tpu": 32_768}
"""Tokens that a chip runs at once in training, by platform, where the config does not say."""

_SAMPLED_BATCHES = 24  # packed at the start to choose the row length and the numbers of chunks


@dataclasses.dataclass(frozen=True)
class TextTable:
    """The token ids of all texts of a run, from one or several caches, numbered through."""

    caches: tuple[TokenCache, ...]
    starts: Int[np.ndarray, " caches"]
    lengths: Int[np.ndarray, " texts"]
    hashes: UInt64[np.ndarray, " texts"]
    skipped: tuple[int, ...] = ()
    """How many leading tokens of the texts of each cache are not pooled (`TextTokenizer.skipped`); none: all are."""

    def __getitem__(self, text: int) -> Int[np.ndarray, " tokens"]:
        cache = int(np.searchsorted(self.starts, text, side="right")) - 1
        return self.caches[cache][text - int(self.starts[cache])]

    def skipped_of(self, texts: Int[np.ndarray, "*texts"]) -> Int[np.ndarray, "*texts"] | None:
        """`skipped` of each of these texts; None where it is nothing for all."""
        if not any(self.skipped):
            return None
        return np.asarray(self.skipped)[np.searchsorted(self.starts, texts, side="right") - 1]


def tokenize_examples(
    sources: Sequence[Examples],
    weights: Sequence[float | None],
    tokenizer: TextTokenizer,
    cache_dir: str | os.PathLike[str],
    negatives: int,
    own: Sequence[tuple[TextTokenizer, tuple[RoleName, RoleName]]] | None = None,
    limits: Sequence[int] | None = None,
) -> tuple[TextTable, list[DataSet]]:
    """Every text of the sources as token ids, once, and the data sets as rows of that table.

    Columns of a data set are anchor, positive, then `negatives` hard negatives (−1 where an example has fewer). Texts
    that lie in a store are read from the disk in batches, those alone that an example names, once however many do.

    Args:
        sources: what is tokenised.
        weights: of the data sets.
        tokenizer: of all sources.
        cache_dir: local folder of the token caches.
        negatives: columns of hard negatives.
        own: for each source its tokenizer and the roles of its anchors and of its documents, where they are not
            `tokenizer`, "query" and "document".
        limits: for each source how many hard negatives of a query are taken, at most `negatives`.
    """
    caches: list[TokenCache] = []
    skipped: list[int] = []
    numbered = 0

    def add(cache: TokenCache, reader: TextTokenizer, role: RoleName) -> int:
        """The number of the first text of the cache."""
        nonlocal numbered
        caches.append(cache)
        skipped.append(reader.skipped(role))
        numbered += len(cache)
        return numbered - len(cache)

    data_sets: list[DataSet] = []
    picked: dict[tuple[str, str, RoleName], list[_Picking]] = {}
    common: tuple[TextTokenizer, tuple[RoleName, RoleName]] = tokenizer, ("query", "document")
    readers = own or [common] * len(sources)
    for source, weight, (reader, roles), limit in zip(sources, weights, readers, limits or [negatives] * len(sources)):
        texts = np.full((len(source), 2 + negatives), -1, np.int64)
        for part in _text_columns(source, limit, roles):
            if isinstance(part.texts, Picked):
                key = part.texts.store.fingerprint, reader.fingerprint, part.role
                picked.setdefault(key, []).append(_Picking(part.texts, part, texts, reader))
                continue
            cache = build_token_cache(
                part.texts, part.role, reader, source_fingerprint=part.fingerprint, directory=cache_dir
            )
            texts[part.examples, part.columns] = add(cache, reader, part.role) + np.arange(len(cache))
        data_sets.append(DataSet(source.name, texts, weight))
    for (fingerprint, _, role), parts in picked.items():
        named = np.unique(np.concatenate([part.texts.rows for part in parts]))
        digest = hashlib.sha256(named.astype("<i8").tobytes()).hexdigest()
        cache = build_token_cache(
            Picked(parts[0].texts.store, named),
            role,
            parts[0].reader,
            source_fingerprint=f"{fingerprint}:{digest}",
            directory=cache_dir,
            distinct=True,
        )
        first = add(cache, parts[0].reader, role)
        for part in parts:
            part.table[part.of.examples, part.of.columns] = first + np.searchsorted(named, part.texts.rows)
    counts = [len(cache) for cache in caches]
    table = TextTable(
        tuple(caches),
        np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64),
        np.concatenate([cache.lengths for cache in caches]),
        np.concatenate([cache.hashes for cache in caches]),
        tuple(skipped),
    )
    return table, data_sets


@dataclasses.dataclass(frozen=True)
class _Texts:
    """Some texts of a source, and the examples and columns that they belong to."""

    role: RoleName
    texts: Sequence[str]
    fingerprint: str
    examples: Int[np.ndarray, " texts"]
    columns: Int[np.ndarray, " texts"]


@dataclasses.dataclass(frozen=True)
class _Picking:
    """Texts of a store that wait until all that is named of it is known."""

    texts: Picked
    of: _Texts
    table: Int[np.ndarray, "examples columns"]
    reader: TextTokenizer


def _text_columns(source: Examples, negatives: int, roles: tuple[RoleName, RoleName]) -> Iterator[_Texts]:
    """The anchors; then the documents, those that are in memory in one piece, so that each is tokenised once."""
    everyone = np.arange(len(source))
    query, document = roles
    yield _Texts(query, source.anchors, f"{source.fingerprint}:0", everyone, np.zeros_like(everyone))
    counts = np.minimum(source.negative_counts, negatives)
    places = range(int(counts.max(initial=0)))
    having = [np.flatnonzero(counts > place) for place in places]
    documents = [_Texts(document, source.positives, f"{source.fingerprint}:1", everyone, np.ones_like(everyone))]
    if isinstance(source.negatives, PickedRows):
        for place, rows in zip(places, having):
            found = Picked(source.negatives.store, source.negatives.rows[rows, place])
            documents.append(_Texts(document, found, "", rows, np.full(len(rows), 2 + place)))
    else:
        for place, rows in zip(places, having):
            found = [source.negatives[row][place] for row in rows.tolist()]
            documents.append(_Texts(document, found, "", rows, np.full(len(rows), 2 + place)))
    listed = [part for part in documents if not isinstance(part.texts, Picked)]
    yield from (part for part in documents if isinstance(part.texts, Picked))
    if listed:
        # A source without negatives keeps the cache that it had when every column had its own.
        column = "1" if len(documents) == 1 else f"documents:{len(places)}"
        fingerprint = f"{source.fingerprint}:{column}"
        yield _Texts(
            document,
            [text for part in listed for text in part.texts],
            fingerprint,
            np.concatenate([part.examples for part in listed]),
            np.concatenate([part.columns for part in listed]),
        )


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """The shape of a run's batches: rows of one length, `chunk_rows` a chip and chunk, a few numbers of chunks."""

    row_length: int
    slots: int
    chunk_rows: int
    chips: int
    chunks: tuple[int, ...]
    """Numbers of chunks that are compiled for, ascending; a batch takes the first that holds it."""
    density: float
    """Expected share of positions that hold a token."""
    filled: float = 1.0
    """The same share, of the rows that a batch needs alone: without those that fill its last chunk."""

    def chunks_for(self, rows: int) -> int:
        needed = -(-rows // (self.chunk_rows * self.chips))
        return next((chunks for chunks in self.chunks if chunks >= needed), needed)


def choose_layout(
    batches: Sequence[Int[np.ndarray, " texts"]],
    *,
    chips: int,
    dim: int,
    chunk_tokens: int,
    row_length: int | None = None,
    chunk_rows: int | None = None,
) -> RowLayout:
    """The layout with the least work for a sample of batches, given as the lengths of their texts.

    Work of a position is its matrix products, 24 · dim², and its attention, about 8 · dim · row_length / 2 (twice its
    operations, since it moves more for each).
    """
    longest = int(max(lengths.max() for lengths in batches))
    smallest = -(-longest // 16) * 16
    multiples = {-(-int(factor * smallest) // 16) * 16 for factor in (1, 1.25, 1.5, 2, 3, 4)}
    candidates = [row_length] if row_length else sorted(multiples)
    best: tuple[float, RowLayout] | None = None
    for length in candidates:
        slots = min(length, max(4, length // max(4, int(np.percentile(np.concatenate(batches), 5)))))
        per_chunk = chunk_rows or max(1, chunk_tokens // length)
        rows = [len(best_fit_rows(lengths, length, slots)) for lengths in batches]
        needed = sorted(-(-count // (per_chunk * chips)) for count in rows)
        chunks = tuple(sorted({needed[len(needed) // 2], needed[-1]}))
        layout = RowLayout(length, slots, per_chunk, chips, chunks, 0.0)
        positions = sum(layout.chunks_for(count) * per_chunk * chips * length for count in rows)
        tokens = sum(int(x.sum()) for x in batches)
        layout = dataclasses.replace(layout, density=tokens / positions, filled=tokens / (sum(rows) * length))
        work = positions * (24 * dim**2 + 4 * dim * length)
        if best is None or work < best[0]:
            best = work, layout
    assert best is not None
    return best[1]


@dataclasses.dataclass(frozen=True)
class Batches:
    """The global batches of a run, by step."""

    schedule: Schedule
    table: TextTable
    texts: Int[np.ndarray, "examples columns"]
    data_set: Int[np.ndarray, " examples"]
    layout: RowLayout
    pad: int = 0
    scores: Float[np.ndarray, "examples scored"] | None = None
    """`Examples.scores` of all data sets, NaN where there is none."""

    @functools.cached_property
    def known(self) -> KnownPositives:
        """The positives of every query of the run, for those it meets in a batch."""
        return KnownPositives.of(*(self.table.hashes[self.texts[:, column]] for column in (0, 1)))

    def __len__(self) -> int:
        return self.schedule.steps

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The fields of `training.gradient.Batch` as numpy arrays, and `step` and `tokens_used` beside them."""
        step = int(index)
        examples = self.schedule.batch(step)
        texts = self.texts[examples]
        fields = pack_batch(
            self.table, texts, self.data_set[examples], self.layout, self.pad, self.table.skipped_of(texts),
            hashes=self.table.hashes[texts], known=self.known,
            scores=None if self.scores is None else self.scores[examples],
        )  # fmt: skip
        return {**fields, "step": step}


def sample_lengths(
    schedule: Schedule, table: TextTable, texts: Int[np.ndarray, "examples columns"]
) -> list[Int[np.ndarray, " texts"]]:
    """Lengths of the texts of a few batches of the first epoch, spread over it.

    To the first the longest text of all is added, which rows must hold whatever the sample.
    """
    steps = min(schedule.steps, schedule.steps_per_epoch)
    chosen = np.unique(np.linspace(0, steps - 1, min(steps, _SAMPLED_BATCHES)).astype(int))
    rows = [texts[schedule.batch(int(step))].ravel() for step in chosen]
    samples = [table.lengths[row[row >= 0]] for row in rows]
    return [np.append(samples[0], table.lengths.max()), *samples[1:]]


def pack_batch(
    table: TextTable,
    texts: Int[np.ndarray, "examples columns"],
    data_set: Int[np.ndarray, " examples"],
    layout: RowLayout,
    pad: int = 0,
    skipped: Int[np.ndarray, "examples columns"] | None = None,
    *,
    hashes: UInt64[np.ndarray, "examples columns"] | None = None,
    known: KnownPositives | None = None,
    scores: Float[np.ndarray, "examples scored"] | None = None,
) -> dict[str, Any]:
    """Packs the texts of a batch and says where each is found again.

    Rows are dealt to the chips so that each holds about as many texts; texts are numbered anchors first, then the
    documents column by column, and keep these numbers whatever the chip they lie on.

    Args:
        skipped: how many leading tokens of each text are not pooled; None: all are.
        hashes: of each text, by which equal ones are known; None: by their numbers.
        known: positives of the queries elsewhere in the data, by the same hashes.
        scores: of each example's documents.
    """
    examples = len(texts)
    flat = texts.T.ravel()
    present = np.flatnonzero(flat >= 0)
    ids = [table[int(text)] for text in flat[present]]
    lengths = np.array([len(x) for x in ids])
    packed = best_fit_rows(lengths, layout.row_length, layout.slots)
    packed.sort(key=len, reverse=True)  # stable
    chips, per_chunk = layout.chips, layout.chunk_rows
    chunks = layout.chunks_for(len(packed))
    by_chip: list[list[list[int]]] = [[] for _ in range(chips)]
    for number, row in enumerate(packed):
        turn, chip = divmod(number, chips)
        by_chip[chip if turn % 2 == 0 else chips - 1 - chip].append(row)
    most = max(sum(map(len, rows)) for rows in by_chip)
    capacity = len(flat) if chips == 1 else max(-(-most // 8) * 8, -(-int(1.1 * len(flat) / chips) // 8) * 8)
    shape = RowShape(layout.row_length, chunks * per_chunk, layout.slots)
    left_out = None if skipped is None else skipped.T.ravel()[present]
    filled = [fill_rows(ids, rows, shape, pad, left_out) for rows in by_chip]
    pick = np.zeros((chips, capacity), np.int32)
    place = np.zeros(len(flat), np.int32)
    for chip, rows in enumerate(filled):
        slots = np.flatnonzero(rows.texts.ravel() >= 0)
        pick[chip, : len(slots)] = slots
        place[present[rows.texts.ravel()[slots]]] = chip * capacity + np.arange(len(slots))

    named = flat if hashes is None else hashes.T.ravel()
    distinct, numbers = np.unique(named[present], return_inverse=True)
    codes = np.full(len(flat), -1, np.int32)
    codes[present] = numbers
    others = np.zeros((examples, 0), np.int32)
    if known is not None:
        others = known.codes(named[:examples], named[examples : 2 * examples], distinct)

    def in_chunks(name: str) -> np.ndarray:
        parts = [getattr(rows, name).reshape(chunks, per_chunk, -1) for rows in filled]
        return np.concatenate(parts, axis=1)

    return {
        "tokens": in_chunks("tokens"),
        "segments": in_chunks("segments"),
        "first": in_chunks("first"),
        "last": in_chunks("last"),
        "pick": pick.ravel(),
        "own": place[:examples],
        "query_places": place[:examples],
        "candidates": place[examples:],
        "positives": np.arange(examples, dtype=np.int32),
        "valid": flat[examples:] >= 0,
        "query_codes": codes[:examples],
        "candidate_codes": codes[examples:],
        "known": others,
        "scores": np.zeros((examples, 0), np.float32) if scores is None else scores.astype(np.float32),
        "data_set": data_set.astype(np.int32),
        "data_sets": data_set.astype(np.int32),
        "tokens_used": int(lengths.sum()),
    }


def iterate(batches: Batches, start: int) -> Iterator[dict[str, Any]]:
    """Batches from step `start` on, made ahead of time by background threads."""
    dataset = grain.MapDataset.source(batches)[start:]
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
