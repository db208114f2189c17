"""The activation of the decoder's MLP."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_SLOPE = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """½ x (1 + tanh(√(2/π) (x + 0.044715 x³))) (arXiv 1606.08415, §2), in float32, in the dtype of `x`.

    The backward pass needs `x` alone, where JAX's own would keep several arrays of its size.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jnp.tanh(_inner(wide)))).astype(x.dtype)


def _inner(wide: Array) -> Array:
    return _SLOPE * wide * (1 + _CUBIC * jnp.square(wide))


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    wide = x.astype(jnp.float32)
    # ½ (1 + tanh u) = σ(2u); in other words than forward, or XLA would share one tanh, and write it out.
    share = jax.nn.sigmoid(2 * _inner(wide))
    slope = share + share * (1 - share) * wide * 2 * _SLOPE * (1 + 3 * _CUBIC * jnp.square(wide))
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)
