"""The vector of each text in packed rows: which hidden states are read, by the pooling of the text format."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxembed.errors import InputError
from jaxembed.ops.pooling import mean_states, places
from jaxembed.text.format import Pooling


def pooled_states(
    model: Any,
    tokens: Int[Array, "rows length"],
    segments: Int[Array, "rows length"],
    first: Int[Array, "rows slots"],
    last: Int[Array, "rows slots"],
    pooling: Pooling,
    **options: Any,
) -> Float[Array, "rows slots dim"]:
    """Σ w h / Σ w over the final hidden states h of each text, float32, of whatever length.

    `last` and `first`: the state at that position, and the last layer runs there alone. `mean`: all from `first` to
    `last`, w = 1. `weighted_mean` (SGPT, arXiv 2202.08904): the same with w = 1, 2, … from the beginning of the text's
    sequence, also where `first` stands further on. As sentence-transformers' Pooling computes them.

    Args:
        model: a decoder, with the method `states`.
        first, last: positions of the first and the last token that are pooled, −1 for an empty slot.
        options: of `states`.
    """
    if pooling in ("last", "first"):
        return model.states(tokens, segments, last if pooling == "last" else first, **options)
    weights = places(segments).astype(jnp.float32) if pooling == "weighted_mean" else None
    return mean_states(model.states(tokens, segments, **options), first, last, weights)


def check_pooling(pooling: Pooling, causal: bool) -> None:
    """Refuses a pooling that reads nothing of the text.

    Raises:
        InputError: the first token under causal attention, which sees no other one.
    """
    if pooling == "first" and causal:
        raise InputError(
            'text_format.pooling: "first" with causal attention: the first token sees no other one, so that all texts '
            "would have one embedding; choose another pooling, or bidirectional attention (model.attention)"
        )
