"""Attention inside packed segments: the plain implementation, which all kernels are measured against."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 64
"""Queries that are scored at once. Causal, keys after a block's last query are never touched: half of the work."""


def attention(
    q: Float[Array, "rows queries heads head_dim"],
    k: Float[Array, "rows length heads head_dim"],
    v: Float[Array, "rows length heads head_dim"],
    segments: Int[Array, "rows length"],
    slopes: Float[Array, " heads"] | None = None,
    positions: Int[Array, "rows queries"] | None = None,
    *,
    causal: bool = True,
) -> Float[Array, "rows queries heads head_dim"]:
    """softmax(q kᵀ / √head_dim + slope · (key − query)) v over the keys of a query's own segment.

    Args:
        segments: the text that each key belongs to; padding (0) attends to padding, which nobody reads.
        slopes: ALiBi's, or None for none. Positions are those in the row: softmax takes differences only.
        positions: where in the row each query stands; −1, an empty slot, reads as 0. None: query i stands at i.
        causal: over the keys up to the query itself; False: over those after it too, whose ALiBi term is positive, as
            in transformers, where it depends on the key alone (`build_alibi_tensor` of modeling_bloom.py).

    The softmax is in float32, the result in the dtype of `v`.
    """
    rows, length = segments.shape
    if positions is not None:
        positions = jnp.maximum(positions, 0)
        own = jnp.take_along_axis(segments, positions, axis=1, mode="clip")
        return _attend(q, k, v, segments, own, positions, slopes, causal)
    blocks = [slice(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]
    place = jnp.broadcast_to(jnp.arange(length), (rows, length))
    outputs = []
    for block in blocks:
        keys = slice(block.stop if causal else length)
        outputs.append(
            _attend(
                q[:, block], k[:, keys], v[:, keys], segments[:, keys], segments[:, block], place[:, block], slopes,
                causal,
            )
        )  # fmt: skip
    return jnp.concatenate(outputs, axis=1) if len(outputs) > 1 else outputs[0]


def _attend(
    q: Float[Array, "rows queries heads head_dim"],
    k: Float[Array, "rows keys heads head_dim"],
    v: Float[Array, "rows keys heads head_dim"],
    key_segments: Int[Array, "rows keys"],
    query_segments: Int[Array, "rows queries"],
    positions: Int[Array, "rows queries"],
    slopes: Float[Array, " heads"] | None,
    causal: bool,
) -> Float[Array, "rows queries heads head_dim"]:
    distance = jnp.arange(k.shape[1]) - positions[:, :, None]
    visible = key_segments[:, None, :] == query_segments[:, :, None]
    if causal:
        visible = (distance <= 0) & visible
    scores = jnp.einsum("rqhd,rkhd->rhqk", q / math.sqrt(q.shape[-1]), k, preferred_element_type=jnp.float32)
    if slopes is not None:
        scores = scores + slopes[:, None, None] * distance[:, None].astype(jnp.float32)
    scores = jnp.where(visible[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("rhqk,rkhd->rqhd", weights, v)
