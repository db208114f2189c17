"""The nearest documents of each query, exactly: blocks of the corpus on all devices, one running list a query.

A score is the dot product in float64 of two float32 vectors, rounded to float32; of equal scores the lower row comes
first. Devices multiply in float32, in an order of their own, so they only propose candidates, some more than are asked
for; those get their scores in float64. The bound on a float32 product's error then proves that no other document could
be among the first k, or the query is searched again with a longer list.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int, Int32

from jaxembed.errors import InputError

_AXIS = "documents"
_PAIRS = 4096  # whose vectors are in memory in float64 at once
_LIST_ENTRIES = 1 << 24  # of long lists, in memory at once


@runtime_checkable
class Vectors(Protocol):
    """Rows of float32, in memory or on the disk: all that is asked of them is a slice at a time."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Blocks:
    """How much is compared at once.

    Attributes:
        documents: rows of the corpus on all devices together.
        queries: queries that meet them in one call; a call holds `documents` × `queries` scores.
    """

    documents: int = 32_768
    queries: int = 512


def nearest(
    queries: Float32[np.ndarray, "queries dim"],
    documents: Vectors,
    k: int,
    *,
    candidates: int | None = None,
    excluded: Sequence[Int[np.ndarray, " _"]] | None = None,
    blocks: Blocks = Blocks(),
    recall: float | None = None,
    devices: Sequence[Any] | None = None,
    progress: Callable[[int], object] = lambda rows: None,
) -> tuple[Int32[np.ndarray, "queries k"], Float32[np.ndarray, "queries k"]]:
    """Rows and scores of each query's k nearest documents, best first, of equal scores the lower row first.

    What is in memory: the queries, their lists of about 1.5 k entries, two blocks of documents and a block's scores.

    Args:
        queries: of unit length.
        documents: of unit length, `[documents, dim]`.
        k: how many are wanted; where there are fewer the rest is row −1 with score −∞.
        candidates: only the first so many rows of `documents`; None: all.
        excluded: for each query the rows that it does not want.
        recall: None is exact; a number lets `jax.lax.approx_max_k` miss the rest of a device's candidates.
        devices: that share each block; None: all of this process.
        progress: called with the number of documents after each block of the first pass.

    Raises:
        InputError: more documents than 32 bits count.
    """
    count = documents.shape[0] if candidates is None else candidates
    if count >= 2**31 - 1:
        raise InputError(f"expected fewer than {2**31 - 1:,} documents, found {count:,}; mine in parts of the corpus")
    excluded = [np.empty(0, np.int64)] * len(queries) if excluded is None else excluded
    mesh = _mesh(devices)
    rows = np.full((len(queries), k), -1, np.int32)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    todo = np.arange(len(queries))
    depth = k if recall is not None else k + max(16, k // 2)
    while len(todo) and count:
        depth = min(depth, count)
        missed = []
        step = max(1, len(queries) if len(todo) == len(queries) else _LIST_ENTRIES // depth)
        for start in range(0, len(todo), step):
            part = todo[start : start + step]
            left_out = [excluded[query] for query in part]
            proposed, floor = _propose(queries[part], documents, count, depth, left_out, blocks, recall, mesh, progress)
            found = _exact_order(queries[part], documents, proposed, blocks)
            width = min(k, depth)
            rows[part, :width], scores[part, :width] = (each[:, :width] for each in found)
            if recall is None and depth < count:
                # A document that was not proposed scored `floor` at most on the device, so in truth no more than this.
                possible = floor + np.float32(product_error(queries.shape[1]))
                missed.append(part[np.isfinite(floor) & (scores[part, width - 1] <= possible)])
        todo = np.concatenate(missed) if missed else todo[:0]
        depth, progress = 4 * depth, lambda rows: None
    return rows, scores


def product_error(dim: int) -> float:
    """Bound on |computed − true| of a float32 dot product of unit vectors, in any order of summation.

    γ_n = n·u / (1 − n·u) with u = 2⁻²⁴ (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 3.1); here
    twice that, which covers vectors whose length was rounded and the products in six bfloat16 passes of a TPU, and a
    little more for the rounding of the true score.
    """
    return (dim + 8) * 2.0**-23


def pair_scores(
    queries: Float32[np.ndarray, "queries dim"],
    documents: Vectors,
    query_of: Int[np.ndarray, " pairs"],
    row_of: Int[np.ndarray, " pairs"],
    block: int = Blocks.documents,
) -> Float32[np.ndarray, " pairs"]:
    """The scores of pairs, in float64 and then rounded to float32; documents are read once, block by block."""
    scores = np.empty(len(row_of), np.float32)
    order = np.argsort(row_of, kind="stable")
    ordered = row_of[order]
    begin = 0
    while begin < len(order):
        first = int(ordered[begin])
        end = int(np.searchsorted(ordered, first + block))
        vectors = documents[first : int(ordered[end - 1]) + 1]
        for start in range(begin, end, _PAIRS):
            pairs = order[start : min(start + _PAIRS, end)]
            left = queries[query_of[pairs]].astype(np.float64)
            right = vectors[row_of[pairs] - first].astype(np.float64)
            scores[pairs] = np.einsum("pd,pd->p", left, right)
        begin = end
    return scores


def _exact_order(
    queries: Float32[np.ndarray, "queries dim"],
    documents: Vectors,
    proposed: Int32[np.ndarray, "queries depth"],
    blocks: Blocks,
) -> tuple[Int32[np.ndarray, "queries depth"], Float32[np.ndarray, "queries depth"]]:
    """The proposed rows (−1: none) in the order of their scores, and the scores."""
    there = proposed >= 0
    rows = np.where(there, proposed, np.iinfo(np.int32).max)
    rows.sort(axis=1)  # then a stable sort by score leaves the lower row first
    proposed = np.where(rows == np.iinfo(np.int32).max, -1, rows).astype(np.int32)
    query_of, place = np.nonzero(proposed >= 0)
    scores = np.full(proposed.shape, -np.inf, np.float32)
    scores[query_of, place] = pair_scores(
        queries, documents, query_of, proposed[query_of, place].astype(np.int64), blocks.documents
    )
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(proposed, order, 1), np.take_along_axis(scores, order, 1)


def _propose(
    queries: Float32[np.ndarray, "queries dim"],
    documents: Vectors,
    count: int,
    depth: int,
    excluded: Sequence[Int[np.ndarray, " _"]],
    blocks: Blocks,
    recall: float | None,
    mesh: Mesh,
    progress: Callable[[int], object],
) -> tuple[Int32[np.ndarray, "queries depth"], Float32[np.ndarray, " queries"]]:
    """The rows (−1: none) with the largest float32 scores, and the lowest score of each full list, −∞ of others."""
    size = -(-min(blocks.documents, count) // mesh.size) * mesh.size
    width = min(blocks.queries, len(queries))
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(_AXIS))
    parts = [slice(start, min(start + width, len(queries))) for start in range(0, len(queries), width)]
    left_out = [_table(excluded[part], width) for part in parts]
    lists: list[tuple[Array, Array]] = [
        jax.device_put(
            (np.full((width, depth), -np.inf, np.float32), np.full((width, depth), -1, np.int32)), everywhere
        )
        for _ in parts
    ]
    compare = _compare(mesh, depth, recall)
    for first, vectors in _ahead(documents, count, size):
        block = jax.device_put(vectors, split)
        for index, part in enumerate(parts):
            some = jax.device_put((_filled(queries[part], width), left_out[index]), everywhere)
            lists[index] = compare(*lists[index], *some, block, np.int32(first), np.int32(count))
        jax.block_until_ready(lists)  # else blocks would pile up on the devices
        progress(min(size, count - first))
    scores = np.concatenate([np.asarray(found)[: part.stop - part.start] for (found, _), part in zip(lists, parts)])
    rows = np.concatenate([np.asarray(found)[: part.stop - part.start] for (_, found), part in zip(lists, parts)])
    return np.where(np.isfinite(scores), rows, -1), scores[:, -1]


@functools.lru_cache(maxsize=16)
def _compare(mesh: Mesh, depth: int, recall: float | None) -> Callable[..., tuple[Array, Array]]:
    """Compiled: the lists so far and a block of documents → the lists with that block in them."""

    def best(
        queries: Float[Array, "queries dim"],
        block: Float[Array, "mine dim"],
        excluded: Int[Array, "queries most"],
        first: Int[Array, ""],
        count: Int[Array, ""],
    ) -> tuple[Float[Array, "queries some"], Int[Array, "queries some"]]:
        rows = len(block)
        first = first + jax.lax.axis_index(_AXIS) * rows
        scores = jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)
        column = excluded - first
        column = jnp.where((column >= 0) & (column < rows), column, rows)  # others are dropped
        scores = scores.at[jnp.arange(len(queries))[:, None], column].set(-jnp.inf, mode="drop")
        scores = jnp.where(first + jnp.arange(rows) < count, scores, -jnp.inf)
        if recall is None:
            found, columns = jax.lax.top_k(scores, min(depth, rows))
        else:
            found, columns = jax.lax.approx_max_k(scores, min(depth, rows), recall_target=recall)
        return found, columns + first

    on_all = jax.shard_map(best, mesh=mesh, in_specs=(P(), P(_AXIS), P(), P(), P()), out_specs=P(None, _AXIS))

    def compare(
        scores: Float[Array, "queries depth"],
        rows: Int[Array, "queries depth"],
        queries: Float[Array, "queries dim"],
        excluded: Int[Array, "queries most"],
        block: Float[Array, "documents dim"],
        first: Int[Array, ""],
        count: Int[Array, ""],
    ) -> tuple[Float[Array, "queries depth"], Int[Array, "queries depth"]]:
        more, more_rows = on_all(queries, block, excluded, first, count)
        # Earlier rows stand first, so that equal scores stay in the order of rows.
        scores, places = jax.lax.top_k(jnp.concatenate([scores, more], 1), depth)
        return scores, jnp.take_along_axis(jnp.concatenate([rows, more_rows], 1), places, 1)

    return jax.jit(compare, out_shardings=NamedSharding(mesh, P()))


def _mesh(devices: Sequence[Any] | None) -> Mesh:
    devices = jax.local_devices() if devices is None else list(devices)
    return jax.make_mesh((len(devices),), (_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def _ahead(documents: Vectors, count: int, size: int) -> Iterator[tuple[int, Float32[np.ndarray, "size dim"]]]:
    """First row and vectors of each block, the last one filled with zeros; the next one is read meanwhile."""

    def read(first: int) -> Float32[np.ndarray, "size dim"]:
        return _filled(documents[first : min(first + size, count)], size)

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read, 0)
        for first in range(0, count, size):
            vectors = coming.result()
            if first + size < count:
                coming = reader.submit(read, first + size)
            yield first, vectors


def _filled(vectors: np.ndarray, rows: int) -> np.ndarray:
    if len(vectors) == rows:
        return vectors
    return np.concatenate([vectors, np.zeros((rows - len(vectors), vectors.shape[1]), vectors.dtype)])


def _table(excluded: Sequence[Int[np.ndarray, " _"]], rows: int) -> Int32[np.ndarray, "rows most"]:
    """One row a query, −1 where there is nothing more to leave out; few widths, for each is compiled for."""
    most = max((len(some) for some in excluded), default=0)
    table = np.full((rows, 1 << max(most - 1, 0).bit_length()), -1, np.int32)
    for row, some in zip(table, excluded):
        row[: len(some)] = some
    return table
