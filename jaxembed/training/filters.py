"""What trains: filters over the parameter tree, and which of it decays."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

Filter = Callable[[tuple[Any, ...], Any], bool]

TRAINABLE: Mapping[str, Filter] = {
    "full": lambda path, variable: True,
    "bitfit": lambda path, variable: path[-1] == "bias",
}
"""By name. `bitfit` (arXiv 2106.10199): every bias, those of the norms included, as in SGPT (arXiv 2202.08904)."""


def decays(state: nnx.State) -> nnx.State:
    """Where weight decay applies: to matrices, not to biases and norms."""
    return nnx.map_state(lambda path, variable: variable.replace(path[-1] in ("kernel", "table")), state)


def count(state: nnx.State) -> int:
    """Number of single parameters."""
    return sum(variable.size for _, variable in nnx.to_flat_state(state))
