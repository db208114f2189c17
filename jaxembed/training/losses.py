"""Contrastive losses as pure functions of embeddings."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_LOWEST = float(jnp.finfo(jnp.float32).min)


def automatic_tile(queries: int, candidates: int) -> int:
    """Candidates a tile: all of them for small batches, else as many as make a tile of logits 64 MiB."""
    return min(candidates, max(128, 2**24 // max(queries, 1)))


def info_nce(
    queries: Float[Array, "queries dim"],
    candidates: Float[Array, "candidates dim"],
    positives: Int[Array, " queries"],
    valid: Bool[Array, " candidates"],
    temperature: float,
    tile: int,
) -> Float[Array, " queries"]:
    """InfoNCE (arXiv 1807.03748) of each query against all candidates, of which one is its positive.

    lossᵢ = log Σⱼ exp(qᵢ·cⱼ / τ) − qᵢ·c₊ / τ, the sum over valid candidates.

    Logits are float32 and exist for `tile` candidates at a time, in the forward pass as a running log-sum-exp, in the
    backward pass computed again: memory is O(queries · (tile + dim)), for any number of candidates.

    Args:
        positives: the number of each query's positive among the candidates.
        valid: False for candidates that fill a gap.
        temperature: τ.
    """
    pad = -len(candidates) % tile
    candidates = jnp.pad(candidates.astype(jnp.float32), ((0, pad), (0, 0)))
    valid = jnp.pad(valid, (0, pad))
    return _tiled(queries.astype(jnp.float32), candidates, positives, valid, temperature, tile)


def _logits(queries: Array, block: Array, valid: Array, temperature: float) -> Float[Array, "queries tile"]:
    scores = jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST) / temperature
    return jnp.where(valid, scores, _LOWEST)


def _tiles(candidates: Array, valid: Array, tile: int) -> tuple[Array, Array, Array]:
    count = len(candidates) // tile
    return candidates.reshape(count, tile, -1), valid.reshape(count, tile), jnp.arange(count) * tile


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _tiled(queries: Array, candidates: Array, positives: Array, valid: Array, temperature: float, tile: int) -> Array:
    return _tiled_forward(queries, candidates, positives, valid, temperature, tile)[0]


def _tiled_forward(
    queries: Array, candidates: Array, positives: Array, valid: Array, temperature: float, tile: int
) -> tuple[Array, Any]:
    def body(carry: tuple[Array, Array, Array], x: tuple[Array, Array, Array]) -> tuple[Any, None]:
        highest, total, positive = carry
        logits = _logits(queries, x[0], x[1], temperature)
        higher = jnp.maximum(highest, logits.max(1))
        total = total * jnp.exp(highest - higher) + jnp.exp(logits - higher[:, None]).sum(1)
        is_positive = positives[:, None] == x[2] + jnp.arange(tile)
        return (higher, total, positive + jnp.where(is_positive, logits, 0.0).sum(1)), None

    zero = queries[:, 0] * 0 + candidates[0, 0] * 0  # varies over chips as the inputs do, which the scan's type demands
    (highest, total, positive), _ = jax.lax.scan(body, (zero + _LOWEST, zero, zero), _tiles(candidates, valid, tile))
    log_sum = highest + jnp.log(total)
    return log_sum - positive, (queries, candidates, positives, valid, log_sum)


def _tiled_backward(temperature: float, tile: int, residuals: Any, cotangent: Array) -> tuple[Any, ...]:
    queries, candidates, positives, valid, log_sum = residuals

    def body(query_gradient: Array, x: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        block, block_valid, start = x
        softmax = jnp.exp(_logits(queries, block, block_valid, temperature) - log_sum[:, None])
        is_positive = positives[:, None] == start + jnp.arange(tile)
        slope = (softmax - is_positive) * (cotangent / temperature)[:, None]
        highest = jax.lax.Precision.HIGHEST
        query_gradient = query_gradient + jnp.matmul(slope, block, precision=highest)
        return query_gradient, jnp.matmul(slope.T, queries, precision=highest)

    zero = queries * 0 + candidates[0] * 0
    query_gradient, blocks = jax.lax.scan(body, zero, _tiles(candidates, valid, tile))
    return query_gradient, blocks.reshape(candidates.shape), None, None


_tiled.defvjp(_tiled_forward, _tiled_backward)
