"""Attention on GPU as Pallas kernels (Triton) that never leave a text: FlashAttention-2 with segments and ALiBi inside.

Packed rows are short texts, one after another, so most of the [length, length] square is masked. What a query sees is
one range of keys: from the begin of its text to itself, or to the end of its text; and a key is seen from one range of
queries. Neither begins nor ends of these ranges ever decrease along a row, so that a block's range is that from its
first begin to its last end. The kernels loop over it, and know nothing else of segments or causality.

Softmax is computed online (arXiv 2307.08691) to base 2; the forward pass keeps the logarithm of each query's sum, from
which the backward pass has the weights again. Arrays stay [rows, length, heads, head_dim], as the projections give
them; a tile is [block, width], with zeros beyond head_dim and beyond the row. Products accumulate in float32. No atomic
additions: the same inputs give the same bits.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from jaxembed.ops.kept import kept, kept_flat
from jaxembed.ops.kernels.ranges import Ranges, fill, visible_ranges

UNSEEN = -1e30
"""The score of a key that a query does not see; finite, so that a query that has seen none yet has no NaN."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one kernel cuts its work."""

    queries: int
    keys: int
    """Block sizes: powers of two, at least 16."""
    warps: int
    """Groups of 32 threads that share a block."""
    stages: int
    """Iterations whose loads are under way at once."""


@dataclasses.dataclass(frozen=True)
class Tilings:
    """Of the three kernels: forward; gradient of the queries; gradient of keys and values."""

    forward: Tiling
    queries: Tiling
    keys: Tiling

    @property
    def largest(self) -> int:
        """The largest block, which all others divide."""
        return max(block for each in (self.forward, self.queries, self.keys) for block in (each.queries, each.keys))


HALF_TILINGS: Mapping[int, Tilings] = {
    16: Tilings(Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2)),
    32: Tilings(Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2)),
    64: Tilings(Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2)),
    128: Tilings(Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2)),
    256: Tilings(Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 1), Tiling(32, 64, 8, 1)),
}
"""By the width of a tile, for bfloat16 and float16."""

SINGLE_TILINGS: Mapping[int, Tilings] = {
    width: Tilings(*(Tiling(block, block, 4, 1),) * 3)
    for width, block in ((16, 32), (32, 32), (64, 32), (128, 32), (256, 16))
}
"""The same for float32, whose products are kept from the tensor cores' 10 bits."""


def tile_width(head_dim: int) -> int:
    """Values of a head that a tile holds: a power of two that tensor cores take."""
    return max(16, pl.next_power_of_2(head_dim))


def flash_attention(
    q: Float[Array, "rows length heads head_dim"],
    k: Float[Array, "rows length heads head_dim"],
    v: Float[Array, "rows length heads head_dim"],
    segments: Int[Array, "rows length"],
    slopes: Float[Array, " heads"] | None = None,
    *,
    causal: bool = True,
    tilings: Tilings | None = None,
    interpret: bool = False,
) -> Float[Array, "rows length heads head_dim"]:
    """`ops.attention.attention` on GPU, of any length, with head_dim up to the widest tile.

    Args:
        segments: the text of each token, 0 for padding. A text is one run of its row; a token of padding, which nobody
            reads, sees itself alone.
        slopes: ALiBi's, not differentiated.
        tilings: None takes those of the tables.
        interpret: runs the kernels as JAX operations, on any device.
    """
    if tilings is None:
        tilings = (SINGLE_TILINGS if q.dtype == jnp.float32 else HALF_TILINGS)[tile_width(q.shape[-1])]
    slopes = None if slopes is None else jnp.asarray(slopes, jnp.float32)
    seen, seen_from = visible_ranges(segments, causal)
    seen, seen_from = (fill(ranges, tilings.largest) for ranges in (seen, seen_from))
    return _attend(q, k, v, seen, seen_from, slopes, tilings, interpret)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(
    q: Array, k: Array, v: Array, seen: Ranges, seen_from: Ranges, slopes: Array | None, tilings: Tilings,
    interpret: bool,
) -> Array:  # fmt: skip
    return attention_forward(q, k, v, seen, slopes, tilings.forward, interpret)[0]


def _attend_keeping(
    q: Array, k: Array, v: Array, seen: Ranges, seen_from: Ranges, slopes: Array | None, tilings: Tilings,
    interpret: bool,
) -> tuple[Array, tuple[Any, ...]]:  # fmt: skip
    out, log_sums = attention_forward(q, k, v, seen, slopes, tilings.forward, interpret)
    out, log_sums = kept_flat(out), kept(log_sums)
    return out, (q, k, v, seen, seen_from, slopes, out, log_sums)


def _attend_backward(
    tilings: Tilings, interpret: bool, kept: tuple[Any, ...], d_out: Array
) -> tuple[Array, Array, Array, None, None, None]:
    q, k, v, seen, seen_from, slopes, out, log_sums = kept
    products = jnp.einsum("rlhd,rlhd->rhl", d_out, out, preferred_element_type=jnp.float32)
    products = jnp.pad(products, ((0, 0), (0, 0), (0, log_sums.shape[2] - q.shape[1])))
    given = (q, k, v, d_out, log_sums, products)
    d_q = query_gradient(*given, seen, slopes, tilings.queries, interpret)
    d_k, d_v = key_gradient(*given, seen_from, slopes, tilings.keys, interpret)
    return d_q, d_k, d_v, None, None, None


_attend.defvjp(_attend_keeping, _attend_backward)

Tiles = Float[Array, "rows length heads head_dim"]
Statistics = Float[Array, "rows heads _"]
"""A float32 number a query, for lengths filled up to that of the ranges."""


def attention_forward(
    q: Tiles, k: Tiles, v: Tiles, seen: Ranges, slopes: Array | None, tiling: Tiling, interpret: bool = False
) -> tuple[Tiles, Statistics]:
    """The result, and log₂ Σ 2^score of each query."""
    specs, block = _Specs(q, seen, slopes), tiling.queries
    return pl.pallas_call(
        partial(_forward_kernel, tiling=tiling, length=q.shape[1], head_dim=q.shape[3]),
        grid=specs.grid(block),
        in_specs=[*specs.common(block), specs.tile(block), specs.row, specs.row],
        out_specs=[specs.tile(block), specs.statistics(block)],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, v.dtype),
            jax.ShapeDtypeStruct((q.shape[0], q.shape[2], specs.padded), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="attention_forward",
    )(*seen, slopes, q, k, v)


def query_gradient(
    q: Tiles, k: Tiles, v: Tiles, d_out: Tiles, log_sums: Statistics, products: Statistics, seen: Ranges,
    slopes: Array | None, tiling: Tiling, interpret: bool = False,
) -> Tiles:  # fmt: skip
    """dq, where `products` is d_out · out of each query."""
    specs, block = _Specs(q, seen, slopes), tiling.queries
    statistics = specs.statistics(block)
    return pl.pallas_call(
        partial(_query_gradient_kernel, tiling=tiling, length=q.shape[1], head_dim=q.shape[3]),
        grid=specs.grid(block),
        in_specs=[
            *specs.common(block), specs.tile(block), specs.row, specs.row, specs.tile(block), statistics, statistics,
        ],
        out_specs=specs.tile(block),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="attention_query_gradient",
    )(*seen, slopes, q, k, v, d_out, log_sums, products)  # fmt: skip


def key_gradient(
    q: Tiles, k: Tiles, v: Tiles, d_out: Tiles, log_sums: Statistics, products: Statistics, seen_from: Ranges,
    slopes: Array | None, tiling: Tiling, interpret: bool = False,
) -> tuple[Tiles, Tiles]:  # fmt: skip
    """dk and dv."""
    specs, block = _Specs(q, seen_from, slopes), tiling.keys
    return pl.pallas_call(
        partial(_key_gradient_kernel, tiling=tiling, length=q.shape[1], head_dim=q.shape[3]),
        grid=specs.grid(block),
        in_specs=[
            *specs.common(block), specs.row, specs.tile(block), specs.tile(block), specs.row, specs.row_statistics,
            specs.row_statistics,
        ],
        out_specs=[specs.tile(block), specs.tile(block)],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="attention_key_gradient",
    )(*seen_from, slopes, q, k, v, d_out, log_sums, products)  # fmt: skip


class _Specs:
    """Which part of an array program (block, row, head) is given."""

    def __init__(self, q: Tiles, ranges: Ranges, slopes: Array | None):
        self.rows, self.length, self.heads, head_dim = q.shape
        self.padded, width = ranges[0].shape[1], tile_width(head_dim)
        self.width, self.alibi = width, slopes is not None
        self.row = pl.BlockSpec((None, self.padded, None, width), lambda _, row, head: (row, 0, head, 0))
        self.row_statistics = pl.BlockSpec((None, None, self.padded), lambda _, row, head: (row, head, 0))

    def grid(self, block: int) -> tuple[int, int, int]:
        return pl.cdiv(self.length, block), self.rows, self.heads

    def tile(self, block: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, block, None, self.width), lambda i, row, head: (row, i, head, 0))

    def statistics(self, block: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, block), lambda i, row, head: (row, head, i))

    def common(self, block: int) -> tuple[pl.BlockSpec | None, ...]:
        """Of the ranges of a block's tokens (begin, end), and of the slopes."""
        tokens = pl.BlockSpec((None, block), lambda i, row, head: (row, i))
        slopes = pl.BlockSpec((self.heads,), lambda _, row, head: (0,)) if self.alibi else None
        return tokens, tokens, slopes


def _forward_kernel(
    begin_ref: Any, end_ref: Any, slopes_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any,
    log_sums_ref: Any, *, tiling: Tiling, length: int, head_dim: int,
) -> None:  # fmt: skip
    """A block of queries over the keys that it sees."""
    block, start = tiling.queries, pl.program_id(0) * tiling.queries
    load = partial(_load, length=length, head_dim=head_dim)
    query, slope = start + jnp.arange(block), _slope(slopes_ref)
    begin, end, q = begin_ref[...], end_ref[...], load(q_ref, 0, block, start)

    def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, weight, most = carry
        key = i * tiling.keys + jnp.arange(tiling.keys)
        k, v = (load(ref, i * tiling.keys, tiling.keys) for ref in (k_ref, v_ref))
        scores = _scores(_dot(q, k.T), query[:, None], key[None, :], slope, head_dim)
        scores = jnp.where(_inside(key[None, :], begin[:, None], end[:, None]), scores, UNSEEN)
        more = jnp.maximum(most, scores.max(axis=1))
        weights, kept = jnp.exp2(scores - more[:, None]), jnp.exp2(most - more)
        total = kept[:, None] * total + _dot(weights.astype(v.dtype), v)
        return total, kept * weight + weights.sum(axis=1), more

    nothing = jnp.zeros((block, q.shape[1]), jnp.float32), jnp.zeros(block, jnp.float32), jnp.full(block, UNSEEN)
    total, weight, most = jax.lax.fori_loop(*_blocks(begin_ref, end_ref, tiling.keys), step, nothing)
    _store(out_ref, total / weight[:, None], start, length, head_dim)
    log_sums_ref[...] = most + jnp.log2(weight)


def _query_gradient_kernel(
    begin_ref: Any, end_ref: Any, slopes_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any,
    d_out_ref: Any, log_sums_ref: Any, products_ref: Any, d_q_ref: Any, *, tiling: Tiling, length: int, head_dim: int,
) -> None:  # fmt: skip
    """dq of a block of queries, over the keys that it sees."""
    block, start = tiling.queries, pl.program_id(0) * tiling.queries
    load = partial(_load, length=length, head_dim=head_dim)
    query, slope = start + jnp.arange(block), _slope(slopes_ref)
    begin, end, log_sums, products = begin_ref[...], end_ref[...], log_sums_ref[...], products_ref[...]
    q, d_out = (load(ref, 0, block, start) for ref in (q_ref, d_out_ref))

    def step(i: Array, d_q: Array) -> Array:
        key = i * tiling.keys + jnp.arange(tiling.keys)
        k, v = (load(ref, i * tiling.keys, tiling.keys) for ref in (k_ref, v_ref))
        scores = _scores(_dot(q, k.T), query[:, None], key[None, :], slope, head_dim)
        seen = _inside(key[None, :], begin[:, None], end[:, None])
        weights = jnp.where(seen, jnp.exp2(scores - log_sums[:, None]), 0.0)
        d_scores = weights * (_dot(d_out, v.T) - products[:, None])
        return d_q + _dot(d_scores.astype(k.dtype), k)

    d_q = jax.lax.fori_loop(*_blocks(begin_ref, end_ref, tiling.keys), step, jnp.zeros(q.shape, jnp.float32))
    _store(d_q_ref, d_q / math.sqrt(head_dim), start, length, head_dim)


def _key_gradient_kernel(
    begin_ref: Any, end_ref: Any, slopes_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any,
    d_out_ref: Any, log_sums_ref: Any, products_ref: Any, d_k_ref: Any, d_v_ref: Any, *, tiling: Tiling, length: int,
    head_dim: int,
) -> None:  # fmt: skip
    """dk and dv of a block of keys, over the queries that see it. Scores are [keys, queries]: no product transposes."""
    block, start = tiling.keys, pl.program_id(0) * tiling.keys
    load = partial(_load, length=length, head_dim=head_dim)
    key, slope = start + jnp.arange(block), _slope(slopes_ref)
    begin, end = begin_ref[...], end_ref[...]
    k, v = (load(ref, 0, block, start) for ref in (k_ref, v_ref))

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_k, d_v = carry
        queries = pl.ds(i * tiling.queries, tiling.queries)
        query = i * tiling.queries + jnp.arange(tiling.queries)
        q, d_out = (load(ref, i * tiling.queries, tiling.queries) for ref in (q_ref, d_out_ref))
        log_sums, products = log_sums_ref[queries], products_ref[queries]
        scores = _scores(_dot(k, q.T), query[None, :], key[:, None], slope, head_dim)
        seen = _inside(query[None, :], begin[:, None], end[:, None])
        weights = jnp.where(seen, jnp.exp2(scores - log_sums[None, :]), 0.0)
        d_v = d_v + _dot(weights.astype(d_out.dtype), d_out)
        d_scores = weights * (_dot(v, d_out.T) - products[None, :])
        return d_k + _dot(d_scores.astype(q.dtype), q), d_v

    nothing = jnp.zeros(k.shape, jnp.float32)
    d_k, d_v = jax.lax.fori_loop(*_blocks(begin_ref, end_ref, tiling.queries), step, (nothing, nothing))
    _store(d_k_ref, d_k / math.sqrt(head_dim), start, length, head_dim)
    _store(d_v_ref, d_v, start, length, head_dim)


def _blocks(begin_ref: Any, end_ref: Any, other: int) -> tuple[Array, Array]:
    """The first and the last (exclusive) block of `other` tokens in the ranges of this block's tokens."""
    return begin_ref[0] // other, pl.cdiv(end_ref[end_ref.shape[0] - 1], other)


def _dot(a: Array, b: Array) -> Array:
    """a · b, float32: of float32 to its 24 bits."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return plgpu.dot(a, b, precision=precision)


def _slope(slopes_ref: Any) -> Array | None:
    return None if slopes_ref is None else slopes_ref[pl.program_id(2)] * math.log2(math.e)


def _scores(products: Array, query: Array, key: Array, slope: Array | None, head_dim: int) -> Array:
    """q·k / √head_dim + slope · (key − query), times log₂ e."""
    scores = products * (math.log2(math.e) / math.sqrt(head_dim))
    return scores if slope is None else scores + slope * (key - query).astype(jnp.float32)


def _inside(place: Array, begin: Array, end: Array) -> Array:
    return (place >= begin) & (place < end)


def _load(ref: Any, start: Any, block: int, place: Any = None, *, length: int, head_dim: int) -> Array:
    """[block, width] from `start` on, which is `place` in the row, with zeros beyond the row and the head."""
    part = ref.at[pl.ds(start, block), :]
    mask = _present(start if place is None else place, block, ref.shape[1], length, head_dim)
    return plgpu.load(part) if mask is None else plgpu.load(part, mask=mask, other=0.0)


def _store(ref: Any, values: Array, place: Any, length: int, head_dim: int) -> None:
    block, width = values.shape
    mask = _present(place, block, width, length, head_dim)
    plgpu.store(ref, values.astype(ref.dtype), mask=mask)


def _present(place: Any, block: int, width: int, length: int, head_dim: int) -> Array | None:
    """Which elements of a tile exist; None: all."""
    tokens = (place + jnp.arange(block) < length)[:, None] if length % block else None
    values = (jnp.arange(width) < head_dim)[None, :] if head_dim < width else None
    if tokens is None or values is None:
        return values if tokens is None else jnp.broadcast_to(tokens, (block, width))
    return tokens & values
