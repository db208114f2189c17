"""Normalisations, with statistics in float32 whatever the dtype of the input."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*batch dim"], scale: Float[Array, " dim"], bias: Float[Array, " dim"], epsilon: float
) -> Float[Array, "*batch dim"]:
    """LayerNorm (arXiv 1607.06450) over the last dimension, in the dtype of `x`.

    The backward pass needs `x` alone, where JAX's own would keep several float32 arrays of its size.
    """
    normalised, _ = _normalised(x, epsilon)
    return (normalised * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def _normalised(x: Array, epsilon: float) -> tuple[Array, Array]:
    """Without scale and bias, in float32; and 1/σ."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    return centred * inverse, inverse


def _layer_norm_forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, tuple[Array, ...]]:
    return layer_norm(x, scale, bias, epsilon), (x, scale, bias)


def _layer_norm_backward(epsilon: float, kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    x, scale, bias = kept
    normalised, inverse = _normalised(x, epsilon)
    wide = gradient.astype(jnp.float32)
    scaled = wide * scale.astype(jnp.float32)
    along = (scaled * normalised).mean(-1, keepdims=True)
    of_x = inverse * (scaled - scaled.mean(-1, keepdims=True) - normalised * along)
    positions = tuple(range(x.ndim - 1))
    of_scale, of_bias = (wide * normalised).sum(positions), wide.sum(positions)
    return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def unit_norm(x: Float[Array, "*batch dim"], epsilon: float = 1e-12) -> Float[Array, "*batch dim"]:
    """x / max(‖x‖₂, ε) over the last dimension, as `torch.nn.functional.normalize`; the gradient of a zero is zero."""
    squared = jnp.sum(jnp.square(x), -1, keepdims=True)
    safe = jnp.where(squared > epsilon**2, squared, 1.0)
    return x * jnp.where(squared > epsilon**2, jax.lax.rsqrt(safe), 1 / epsilon)
