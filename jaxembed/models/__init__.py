"""Decoder families: one file each, and the table that finds them by Hugging Face's `model_type`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxembed.errors import InputError
from jaxembed.models import bloom
from jaxembed.models.weights import WeightRule


@dataclasses.dataclass(frozen=True)
class Family:
    """What the rest of the package needs to know of a decoder."""

    config: type
    """With `from_huggingface` and `to_huggingface`."""
    model: Callable[..., Any]
    """(key, config) → the decoder with random weights."""
    weight_map: Callable[[Any], tuple[WeightRule, ...]]
    prefixes: tuple[str, ...]
    """What may stand before every tensor's name."""
    ignored: tuple[str, ...]
    """Tensors of a checkpoint that a text encoder has no use for."""
    tokenizer_class: str
    """The tokenizer's name in transformers."""


FAMILIES: Mapping[str, Family] = {
    "bloom": Family(
        config=bloom.BloomConfig,
        model=bloom.Bloom,
        weight_map=bloom.weight_map,
        prefixes=("transformer.",),
        ignored=("lm_head.weight",),
        tokenizer_class="BloomTokenizerFast",
    )
}


def family_of(huggingface_config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family that a `config.json`, which `where` names in messages, asks for.

    Raises:
        InputError: an architecture that is not supported.
    """
    name = huggingface_config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(
            f"{where}: unknown architecture: model_type is {name!r}, supported are {', '.join(map(repr, FAMILIES))}"
        )
    return FAMILIES[name]
