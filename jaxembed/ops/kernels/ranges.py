"""Where the texts of packed rows begin and end, for the kernels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Ranges = tuple[Int[Array, "rows _"], Int[Array, "rows _"]]
"""Begin and end (exclusive) of a range of positions for each token."""


def visible_ranges(segments: Int[Array, "rows length"], causal: bool) -> tuple[Ranges, Ranges]:
    """The keys that each query sees, and the queries that see each key, where a text is one run of its row.

    A token of padding (0) sees itself alone: rows of nothing else cost next to nothing.
    """
    length = segments.shape[1]
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segments.shape)
    change = (segments[:, 1:] != segments[:, :-1]) | (segments[:, 1:] == 0)
    edge = jnp.ones_like(segments[:, :1], bool)
    begin = jax.lax.cummax(jnp.where(jnp.concatenate([edge, change], axis=1), place, 0), axis=1)
    ends = jnp.where(jnp.concatenate([change, edge], axis=1), place + 1, length)
    end = jax.lax.cummin(ends, axis=1, reverse=True)
    return ((begin, place + 1), (place, end)) if causal else ((begin, end), (begin, end))


def fill(ranges: Ranges, multiple: int) -> Ranges:
    """Ranges for a length that is a multiple; those of the tokens beyond the row are empty, and keep the order."""
    length = ranges[0].shape[1]
    begin, end = (jnp.pad(x, ((0, 0), (0, -length % multiple)), constant_values=length) for x in ranges)
    return begin, end
