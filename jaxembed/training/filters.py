"""What trains: filters over the parameter tree, parameters of their own where it is a part of one, and which decay."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jaxembed.config import LoraConfig, TrainingConfig
from jaxembed.errors import InputError
from jaxembed.models.parts import with_adapters, with_token_rows, with_upper_layers

Filter = Callable[[tuple[Any, ...], Any], bool]

TRAINABLE: Mapping[str, Filter] = {
    "full": lambda path, variable: True,
    "bitfit": lambda path, variable: path[-1] == "bias",
    "lora": lambda path, variable: path[-2:-1] == ("lora",),
    "last_layers": lambda path, variable: path[0] in ("upper_layers", "last_layer", "final_norm"),
    "rows": lambda path, variable: False,
}
"""By name. `bitfit` (arXiv 2106.10199): every bias, those of the norms included, as in SGPT (arXiv 2202.08904).

`lora` (arXiv 2106.09685) and `last_layers` are over a decoder `with_parts`."""


def trains(config: TrainingConfig, layers: int) -> Filter:
    """The filter over the state of a decoder `with_parts` that splits off what trains."""
    chosen = TRAINABLE[config.trainable]
    whole_stack = config.last_layers is not None and config.last_layers >= layers

    def keep(path: tuple[Any, ...], variable: Any) -> bool:
        return chosen(path, variable) or path[0] == "token_rows" or (whole_stack and path[0] == "layers")

    return keep


def with_parts(model: Any, config: TrainingConfig, layers: int, tokens: Sequence[int], seed: int) -> Any:
    """The decoder with parameters of their own for what trains in part; the same one where nothing does.

    Args:
        tokens: ids of `config.train_tokens`.
        seed: of the adapters.

    Raises:
        InputError: the decoder has fewer layers than are to train.
    """
    if config.last_layers is not None:
        if config.last_layers > layers:
            raise InputError(f"training.last_layers: {config.last_layers}, but the decoder has {layers} layers")
        if config.last_layers > 1:
            model = with_upper_layers(model, config.last_layers - 1)
    if config.trainable == "lora":
        lora = config.lora or LoraConfig()
        key = jax.random.fold_in(jax.random.key(seed), 1)  # not that of random weights
        model = with_adapters(model, key, lora.targets, lora.rank, lora.alpha)
    if tokens:
        model = with_token_rows(model, tokens)
    return model


def decays(state: nnx.State) -> nnx.State:
    """Where weight decay applies: to matrices, not to biases and norms."""
    return nnx.map_state(lambda path, variable: variable.replace(is_matrix(path)), state)


def is_matrix(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is a matrix, by its path."""
    return path[-1] in ("kernel", "table") or path[-2:-1] == ("lora",)


def count(state: nnx.State) -> int:
    """Number of single parameters."""
    return sum(variable.size for _, variable in nnx.to_flat_state(state))
