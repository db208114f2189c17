"""From the epoch plan to packed global batches: which texts, in which rows, on which chip.

A batch depends on the plan and the step alone; the mesh decides only where its rows lie. `Batches` is random access, so
that a resumed run needs nothing but its step. Grain carries it: threads, prefetch, the next index.
"""

import dataclasses
import functools
import hashlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from jaxtyping import Float, Int, UInt64

from jaxembed import hosts
from jaxembed.data.cache import TokenCache, build_token_cache
from jaxembed.data.known import KnownPositives
from jaxembed.data.plan import DataSet, Rotation, Schedule
from jaxembed.data.sources import Examples
from jaxembed.data.teacher import TeacherEmbeddings
from jaxembed.data.text_store import Picked, PickedRows
from jaxembed.text.format import RoleName
from jaxembed.text.packing import RowShape, best_fit_rows, deal_rows, fill_rows
from jaxembed.text.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

CHUNK_TOKENS = {"cpu": 1024, "gpu": 16_384, "tpu": 8192}
"""Tokens that a chip runs at once in training, by platform, where the config does not say."""

LOCAL_FIELDS = {"tokens": 1, "segments": 1, "first": 1, "last": 1, "teacher": 0}
"""Fields of a batch of which only the part of some chips is made, and the axis that is split over the chips."""

_SAMPLED_BATCHES = 24  # packed at the start to choose the row length and the numbers of chunks
_SAMPLED_TEXTS = 400_000  # fewer batches where they have more texts: each is packed for several row lengths


class Texts(Protocol):
    """The token ids of numbered texts: all that the packer asks of them."""

    @property
    def lengths(self) -> Int[np.ndarray, " texts"]: ...

    def __getitem__(self, text: int, /) -> Int[np.ndarray, " tokens"]: ...


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


@dataclasses.dataclass(frozen=True)
class TextSource:
    """The examples of a source, and how their texts are read."""

    examples: Examples
    tokenizer: TextTokenizer
    roles: tuple[RoleName, RoleName] = ("query", "document")
    """Of anchors and of documents."""
    weight: float | None = None
    """Of the data set."""
    negatives: int = 0
    """Hard negatives of a query that are taken."""
    rotates: bool = False
    """Whether each pass takes the next ones, so that all its documents are tokenised."""


def tokenize_examples(
    sources: Sequence[TextSource], cache_dir: str | os.PathLike[str]
) -> tuple[TextTable, list[DataSet]]:
    """Every text of the sources as token ids, once, and the data sets as rows of that table.

    Columns of a data set are anchor, positive, then hard negatives, as many as any source takes (−1 where an example
    has fewer). Texts that lie in a store are read from the disk in batches, those alone that an example names, once
    however many do.

    Args:
        cache_dir: local folder of the token caches.
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

    tables: list[Int[np.ndarray, "examples columns"]] = []
    picked: dict[tuple[str, str, RoleName], list[_Picking]] = {}
    negatives = max(source.negatives for source in sources)
    for source in sources:
        examples, reader = source.examples, source.tokenizer
        more, taken, width = None, source.negatives, 2 + negatives
        if source.rotates:
            more, taken = examples.more_positives, int(examples.negative_counts.max(initial=0))
            width = 2 + taken + (more.rows.shape[1] if more else 0)
        texts = np.full((len(examples), width), -1, np.int64)
        for part in _text_columns(examples, taken, source.roles, more):
            if isinstance(part.texts, Picked):
                key = part.texts.store.fingerprint, reader.fingerprint, part.role
                picked.setdefault(key, []).append(_Picking(part.texts, part, texts, reader))
                continue
            cache = build_token_cache(
                part.texts,
                part.role,
                reader,
                source_fingerprint=part.fingerprint,
                directory=cache_dir,
                progress=hosts.is_main(),
            )
            texts[part.examples, part.columns] = add(cache, reader, part.role) + np.arange(len(cache))
        tables.append(texts)
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
            progress=hosts.is_main(),
        )
        first = add(cache, parts[0].reader, role)
        for part in parts:
            part.table[part.of.examples, part.of.columns] = first + np.searchsorted(named, part.texts.rows)
    data_sets = [
        _rotating(source, texts, negatives) if source.rotates else DataSet(source.examples.name, texts, source.weight)
        for source, texts in zip(sources, tables)
    ]
    counts = [len(cache) for cache in caches]
    table = TextTable(
        tuple(caches),
        np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64),
        np.concatenate([cache.lengths for cache in caches]),
        np.concatenate([cache.hashes for cache in caches]),
        tuple(skipped),
    )
    return table, data_sets


def _rotating(source: TextSource, texts: Int[np.ndarray, "examples columns"], negatives: int) -> DataSet:
    """Of anchor, positive, all negatives, further positives."""
    end = 2 + int(source.examples.negative_counts.max(initial=0))
    positives = np.concatenate([texts[:, 1:2], texts[:, end:]], axis=1)
    rotation = Rotation(positives.astype(np.int32), texts[:, 2:end].astype(np.int32), source.negatives)
    first = np.full((len(texts), 2 + negatives), -1, np.int64)
    first[:, 0] = texts[:, 0]
    everyone = np.arange(len(texts))
    first[:, 1 : 2 + source.negatives] = rotation.texts(everyone, np.zeros_like(everyone))
    return DataSet(source.examples.name, first, source.weight, rotation)


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


def _text_columns(
    source: Examples, negatives: int, roles: tuple[RoleName, RoleName], more_positives: PickedRows | None = None
) -> Iterator[_Texts]:
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
    if more_positives is not None:
        for place, column in enumerate(more_positives.rows.T, 2 + len(places)):
            rows = np.flatnonzero(column >= 0)
            found = Picked(more_positives.store, column[rows])
            documents.append(_Texts(document, found, "", rows, np.full(len(rows), place)))
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
        if chunk_rows is None:  # as few chunks, but no rows that no batch fills
            most = -(-max(rows) // chips)
            per_chunk = -(-most // -(-most // per_chunk))
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
class _Visit:
    """The examples of a batch with the texts that they have in it."""

    examples: Int[np.ndarray, " examples"]
    data_set: Int[np.ndarray, " examples"]
    texts: Int[np.ndarray, "examples columns"]
    positives: Int[np.ndarray, " examples"]
    """Which of its positives each example has, and which of its negatives, −1 for none."""
    negatives: Int[np.ndarray, "examples negatives"]


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
    rotations: tuple[Rotation | None, ...] = ()
    """Of the data sets, where one rotates."""
    teachers: tuple[TeacherEmbeddings | None, ...] = ()
    """A teacher's embeddings of the data sets, where one has them."""
    mine: tuple[int, ...] | None = None
    """The chips whose rows are filled here, ascending; None: all."""

    @functools.cached_property
    def known(self) -> KnownPositives:
        """The positives of every query of the run, for those it meets in a batch."""
        pairs = [self.texts[:, :2]]
        for number, rotation in enumerate(self.rotations):
            if rotation is not None:
                example, column = np.nonzero(rotation.positives >= 0)
                anchors = self.texts[self._first[number] + example, 0]
                pairs.append(np.stack([anchors, rotation.positives[example, column]], axis=1))
        anchors, positives = np.concatenate(pairs).T
        return KnownPositives.of(self.table.hashes[anchors], self.table.hashes[positives])

    @functools.cached_property
    def _first(self) -> Int[np.ndarray, " data_sets"]:
        """The first example of each data set."""
        return np.searchsorted(self.data_set, np.arange(max(len(self.rotations), len(self.teachers))))

    def _visit(self, step: int) -> "_Visit":
        examples = self.schedule.batch(step)
        texts, data_set = self.texts[examples], self.data_set[examples]
        positives = np.zeros(len(examples), np.int64)
        negatives = np.tile(np.arange(texts.shape[1] - 2), (len(examples), 1))
        for number, rotation in enumerate(self.rotations):
            if rotation is not None:
                here = np.flatnonzero(data_set == number)
                own, passes = examples[here] - self._first[number], self.schedule.passes(step)[here]
                texts[here, 1 : 2 + rotation.taken] = rotation.texts(own, passes)
                positives[here], negatives[here, : rotation.taken] = rotation.picks(own, passes)
        return _Visit(examples, data_set, texts, positives, np.where(texts[:, 2:] >= 0, negatives, -1))

    def _scores_of(self, visit: "_Visit") -> Float[np.ndarray, "examples columns"] | None:
        if self.scores is None or not any(self.rotations):
            return None if self.scores is None else self.scores[visit.examples]
        columns = np.concatenate([np.zeros_like(visit.positives)[:, None], 1 + visit.negatives], axis=1)
        columns = np.minimum(columns, self.scores.shape[1] - 1)
        found = np.take_along_axis(self.scores[visit.examples], columns, 1)
        found[:, 1:][visit.negatives < 0] = np.nan
        return found

    def _taught(self, visit: "_Visit") -> Float[np.ndarray, "examples texts dim"] | None:
        dim = next((each.dim for each in self.teachers if each is not None), None)
        if dim is None:
            return None
        queries = np.arange(len(visit.texts))
        if self.mine is not None:
            queries = queries.reshape(self.layout.chips, -1)[list(self.mine)].ravel()
        found = np.full((len(queries), visit.texts.shape[1], dim), np.nan, np.float32)
        for number, teacher in enumerate(self.teachers):
            if teacher is not None:
                place = np.flatnonzero(visit.data_set[queries] == number)
                here = queries[place]
                own = visit.examples[here] - self._first[number]
                found[place] = teacher.of(own, visit.positives[here], visit.negatives[here])
        return found

    def __len__(self) -> int:
        return self.schedule.steps

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The fields of `training.gradient.Batch` as numpy arrays, `step` and what `pack_batch` gives beside them."""
        step = int(index)
        visit = self._visit(step)
        texts = visit.texts
        fields = pack_batch(
            self.table, texts, visit.data_set, self.layout, self.pad, self.table.skipped_of(texts),
            hashes=self.table.hashes[texts], known=self.known, scores=self._scores_of(visit),
            teacher=self._taught(visit), mine=self.mine,
        )  # fmt: skip
        return {**fields, "step": step}


def sample_lengths(
    schedule: Schedule, table: TextTable, texts: Int[np.ndarray, "examples columns"]
) -> list[Int[np.ndarray, " texts"]]:
    """Lengths of the texts of a few batches of the first epoch, spread over it.

    To the first the longest text of all is added, which rows must hold whatever the sample.
    """
    steps = min(schedule.steps, schedule.steps_per_epoch)
    sampled = max(2, min(_SAMPLED_BATCHES, _SAMPLED_TEXTS // (schedule.batch_size * texts.shape[1])))
    chosen = np.unique(np.linspace(0, steps - 1, min(steps, sampled)).astype(int))
    rows = [texts[schedule.batch(int(step))].ravel() for step in chosen]
    samples = [table.lengths[row[row >= 0]] for row in rows]
    return [np.append(samples[0], table.lengths.max()), *samples[1:]]


def pack_batch(
    table: Texts,
    texts: Int[np.ndarray, "examples columns"],
    data_set: Int[np.ndarray, " examples"],
    layout: RowLayout,
    pad: int = 0,
    skipped: Int[np.ndarray, "examples columns"] | None = None,
    *,
    hashes: UInt64[np.ndarray, "examples columns"] | None = None,
    known: KnownPositives | None = None,
    scores: Float[np.ndarray, "examples scored"] | None = None,
    teacher: Float[np.ndarray, "examples columns dim"] | None = None,
    mine: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Packs the texts of a batch and says where each is found again.

    Rows are dealt to the chips so that each holds about as many texts; texts are numbered anchors first, then the
    documents column by column, and keep these numbers whatever the chip they lie on.

    Args:
        skipped: how many leading tokens of each text are not pooled; None: all are.
        hashes: of each text, by which equal ones are known; None: by their numbers.
        known: positives of the queries elsewhere in the data, by the same hashes.
        scores: of each example's documents.
        teacher: a teacher's embeddings of each example's texts, NaN for those without; of the examples of `mine` only.
        mine: the chips whose rows are wanted, ascending; None: all. Everything else, and what lies in which row, is the
            same whichever they are.

    Returns:
        The fields of a batch, of which `LOCAL_FIELDS` have the part of the chips in `mine` only; `mine`; and of the
        whole batch `texts_used`, `tokens_used` and `positions`, how many its rows have.
    """
    examples = len(texts)
    flat = texts.T.ravel()
    present = np.flatnonzero(flat >= 0)
    lengths = table.lengths[flat[present]].astype(np.int64)
    packed = best_fit_rows(lengths, layout.row_length, layout.slots)
    chips, per_chunk = layout.chips, layout.chunk_rows
    chunks = layout.chunks_for(len(packed))
    by_chip = deal_rows(packed, chips, chunks * per_chunk)
    most = max(sum(map(len, rows)) for rows in by_chip)
    usual = math.ceil(1.1 * len(flat) / chips)  # a little more than needed, so that batches seldom differ in shape
    capacity = len(flat) if chips == 1 else usual if most <= usual else -(-most // 8) * 8
    shape = RowShape(layout.row_length, chunks * per_chunk, layout.slots)
    pick = np.zeros((chips, capacity), np.int32)
    place = np.zeros(len(flat), np.int32)
    for chip, rows in enumerate(by_chip):
        inside = [text for row in rows for text in row]
        pick[chip, : len(inside)] = [row * layout.slots + slot for row, x in enumerate(rows) for slot in range(len(x))]
        place[present[inside]] = chip * capacity + np.arange(len(inside))
    mine = range(chips) if mine is None else mine
    ids: list[np.ndarray] = [np.zeros(0, np.int32)] * len(present)
    for text in (text for chip in mine for row in by_chip[chip] for text in row):
        ids[text] = table[int(flat[present[text]])]
    left_out = None if skipped is None else skipped.T.ravel()[present]
    filled = [fill_rows(ids, by_chip[chip], shape, pad, left_out) for chip in mine]

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
        "teacher": (np.zeros((examples * len(mine) // chips, 0, 0)) if teacher is None else teacher).astype(np.float32),
        "data_set": data_set.astype(np.int32),
        "data_sets": data_set.astype(np.int32),
        "mine": np.asarray(mine, np.int32),
        "texts_used": len(present),
        "tokens_used": int(lengths.sum()),
        "positions": chips * shape.tokens,
    }


def iterate(batches: Batches, start: int) -> Iterator[dict[str, Any]]:
    """Batches from step `start` on, made ahead of time by background threads."""
    dataset = grain.MapDataset.source(batches)[start:]
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
