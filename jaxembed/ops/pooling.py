"""From the states of all positions to one vector a text."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def take_positions(
    x: Float[Array, "rows length dim"], positions: Int[Array, "rows slots"]
) -> Float[Array, "rows slots dim"]:
    """The states at `positions`, each taken within its row. An empty slot (−1) gives the state at 0."""
    return jnp.take_along_axis(x, jnp.maximum(positions, 0)[:, :, None], axis=1, mode="clip")


def mean_states(
    x: Float[Array, "rows length dim"],
    first: Int[Array, "rows slots"],
    last: Int[Array, "rows slots"],
    weights: Float[Array, "rows length"] | None = None,
) -> Float[Array, "rows slots dim"]:
    """Σ w x / Σ w over the positions `first` … `last` of each slot, float32; w is 1 where no weights are given.

    An empty slot (−1, −1) gives zeros.
    """
    position = jnp.arange(x.shape[1])
    inside = (position >= first[:, :, None]) & (position <= last[:, :, None])
    shares = inside.astype(jnp.float32) if weights is None else jnp.where(inside, weights[:, None, :], 0.0)
    shares = shares / jnp.maximum(shares.sum(-1, keepdims=True), 1.0)
    # The highest precision: a TPU's default would round the states to bfloat16.
    return jnp.einsum("rsl,rld->rsd", shares, x.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def places(segments: Int[Array, "rows length"]) -> Int[Array, "rows length"]:
    """Where each position stands within its own segment, counted from 1: the weights of SGPT (arXiv 2202.08904)."""
    position = jnp.arange(segments.shape[1])
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return position - jax.lax.cummax(jnp.where(begins, position, 0), axis=1) + 1
