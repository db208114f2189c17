"""Names for what a layer keeps for its backward pass; all else is computed again from it."""

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Num

KEPT = "kept"
"""The name, for `jax.checkpoint_policies.save_only_these_names`."""


def kept(x: Num[Array, "*shape"]) -> Num[Array, "*shape"]:
    """The same array, under that name."""
    return checkpoint_name(x, KEPT)


def kept_flat(x: Num[Array, "rows length heads head_dim"]) -> Num[Array, "rows length heads head_dim"]:
    """The same; what is kept has one dimension for heads and head_dim, since a TPU pads the last one to 128."""
    return kept(jax.lax.collapse(x, 2)).reshape(x.shape)
