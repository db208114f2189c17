"""Normalisations, with statistics in float32 whatever the dtype of the input."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def layer_norm(
    x: Float[Array, "*batch dim"], scale: Float[Array, " dim"], bias: Float[Array, " dim"], epsilon: float
) -> Float[Array, "*batch dim"]:
    """LayerNorm (arXiv 1607.06450) over the last dimension, in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    return (centred * inverse * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def unit_norm(x: Float[Array, "*batch dim"], epsilon: float = 1e-12) -> Float[Array, "*batch dim"]:
    """x / max(‖x‖₂, ε) over the last dimension, as `torch.nn.functional.normalize`; the gradient of a zero is zero."""
    squared = jnp.sum(jnp.square(x), -1, keepdims=True)
    safe = jnp.where(squared > epsilon**2, squared, 1.0)
    return x * jnp.where(squared > epsilon**2, jax.lax.rsqrt(safe), 1 / epsilon)
