"""From the states of all positions to one vector a text."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def take_positions(
    x: Float[Array, "rows length dim"], positions: Int[Array, "rows slots"]
) -> Float[Array, "rows slots dim"]:
    """The states at `positions`, each taken within its row. An empty slot (−1) gives the state at 0."""
    return jnp.take_along_axis(x, jnp.maximum(positions, 0)[:, :, None], axis=1, mode="clip")
