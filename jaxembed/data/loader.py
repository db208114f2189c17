"""From the epoch plan to packed global batches: which texts, in which rows, on which chip.

A batch depends on the plan and the step alone; the mesh decides only where its rows lie. `Batches` is random access, so
that a resumed run needs nothing but its step. Grain carries it: threads, prefetch, the next index.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int, UInt64

from jaxembed.data.cache import TokenCache, build_token_cache
from jaxembed.data.plan import DataSet, Schedule
from jaxembed.data.sources import Examples
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

    def __getitem__(self, text: int) -> Int[np.ndarray, " tokens"]:
        cache = int(np.searchsorted(self.starts, text, side="right")) - 1
        return self.caches[cache][text - int(self.starts[cache])]


def tokenize_examples(
    sources: Sequence[Examples],
    weights: Sequence[float | None],
    tokenizer: TextTokenizer,
    cache_dir: str | os.PathLike[str],
    negatives: int,
) -> tuple[TextTable, list[DataSet]]:
    """Every text of the sources as token ids, once, and the data sets as rows of that table.

    Columns of a data set are anchor, positive, then `negatives` hard negatives (−1 where an example has fewer).
    """
    caches: list[TokenCache] = []
    data_sets: list[DataSet] = []
    start = 0
    for source, weight in zip(sources, weights):
        everyone = np.arange(len(source))
        columns: list[tuple[RoleName, list[str], Int[np.ndarray, " texts"]]] = [
            ("query", source.anchors, everyone),
            ("document", source.positives, everyone),
        ]
        counts = np.array([len(row) for row in source.negatives], np.int64)
        for place in range(min(negatives, counts.max(initial=0))):
            having = np.flatnonzero(counts > place)
            columns.append(("document", [source.negatives[row][place] for row in having], having))
        texts = np.full((len(source), 2 + negatives), -1, np.int64)
        for number, (role, column, rows) in enumerate(columns):
            fingerprint = f"{source.fingerprint}:{number}"
            cache = build_token_cache(column, role, tokenizer, source_fingerprint=fingerprint, directory=cache_dir)
            texts[rows, number] = start + np.arange(len(column))
            start += len(column)
            caches.append(cache)
        data_sets.append(DataSet(source.name, texts, weight))
    counts = [len(cache) for cache in caches]
    table = TextTable(
        tuple(caches),
        np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64),
        np.concatenate([cache.lengths for cache in caches]),
        np.concatenate([cache.hashes for cache in caches]),
    )
    return table, data_sets


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

    def __len__(self) -> int:
        return self.schedule.steps

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The fields of `training.gradient.Batch` as numpy arrays, and `step` and `tokens_used` beside them."""
        step = int(index)
        examples = self.schedule.batch(step)
        fields = pack_batch(self.table, self.texts[examples], self.data_set[examples], self.layout, self.pad)
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
) -> dict[str, Any]:
    """Packs the texts of a batch and says where each is found again.

    Rows are dealt to the chips so that each holds about as many texts; texts are numbered anchors first, then the
    documents column by column, and keep these numbers whatever the chip they lie on.
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
    filled = [fill_rows(ids, rows, shape, pad) for rows in by_chip]
    pick = np.zeros((chips, capacity), np.int32)
    place = np.zeros(len(flat), np.int32)
    for chip, rows in enumerate(filled):
        slots = np.flatnonzero(rows.texts.ravel() >= 0)
        pick[chip, : len(slots)] = slots
        place[present[rows.texts.ravel()[slots]]] = chip * capacity + np.arange(len(slots))

    def in_chunks(name: str) -> np.ndarray:
        parts = [getattr(rows, name).reshape(chunks, per_chunk, -1) for rows in filled]
        return np.concatenate(parts, axis=1)

    return {
        "tokens": in_chunks("tokens"),
        "segments": in_chunks("segments"),
        "last": in_chunks("last"),
        "pick": pick.ravel(),
        "own": place[:examples],
        "candidates": place[examples:],
        "positives": np.arange(examples, dtype=np.int32),
        "valid": flat[examples:] >= 0,
        "data_set": data_set.astype(np.int32),
        "tokens_used": int(lengths.sum()),
    }


def iterate(batches: Batches, start: int) -> Iterator[dict[str, Any]]:
    """Batches from step `start` on, made ahead of time by background threads."""
    dataset = grain.MapDataset.source(batches)[start:]
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
