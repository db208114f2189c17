"""What trains in part, back in the decoder's own parameters: adapters added, rows put in place, stacks put together.

The sums are those of float64, rounded once to float32, so that they hang neither on the device nor on the order in
which it adds. They are taken tensor by tensor on the host, in Hugging Face's layout.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from jaxembed.checkpoint.huggingface import in_order
from jaxembed.hosts import put, to_host
from jaxembed.models.parts import Adapter
from jaxembed.models.weights import Assignment, ParameterPath, Relayout, WeightRule, assignments

TABLE, ROWS = ("table",), ("token_rows", "table")
_BLOCK_ROWS = 1024  # summed at once: float64 is twice the memory


@dataclasses.dataclass(frozen=True)
class LowRank:
    """An adapter of a linear layer in Hugging Face's layout: its weight becomes weight + scaling · b · a."""

    a: Float[np.ndarray, "rank inputs"]
    b: Float[np.ndarray, "outputs rank"]
    scaling: float

    def added_to(self, weight: Float[np.ndarray, "outputs inputs"]) -> Float[np.ndarray, "outputs inputs"]:
        """The merged weight, float32."""
        merged = np.empty(weight.shape, np.float32)
        a = self.a.astype(np.float64)
        for start in range(0, len(weight), _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            merged[block] = weight[block].astype(np.float64) + self.scaling * (self.b[block].astype(np.float64) @ a)
        return merged


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of the vocabulary table."""

    ids: Sequence[int]
    values: Float[np.ndarray, "rows dim"]

    def put_into(self, table: Float[np.ndarray, "vocab dim"]) -> Float[np.ndarray, "vocab dim"]:
        """The table with these rows, float32."""
        merged = table.astype(np.float32)
        merged[list(self.ids)] = self.values
        return merged


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a decoder has besides its own parameters (`jaxembed.models.parts`)."""

    variables: Mapping[ParameterPath, Any]
    """Of all its parameters: shapes and axes; values may be elsewhere."""
    scaling: float
    """Of its adapters."""
    ids: Sequence[int]
    """Tokens whose rows stand apart."""
    read: Callable[[ParameterPath], np.ndarray]
    """The values of an adapter's parameter, or of the rows, on the host."""

    @classmethod
    def of(cls, model: Any, read: Callable[[ParameterPath], np.ndarray] | None = None) -> "Parts":
        """Those of a model, real or, where `read` is given, abstract."""
        variables = {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model))}
        scalings = {module.scaling for _, module in nnx.iter_modules(model) if isinstance(module, Adapter)}
        rows = getattr(model, "token_rows", None)
        held = read or (lambda path: to_host(variables[path][...]))
        return cls(variables, scalings.pop() if scalings else 1.0, () if rows is None else rows.ids, held)

    def changes(self, path: ParameterPath) -> bool:
        """Whether the decoder's own parameter is another one after merging, by adapters or by rows."""
        return bool(self.ids) if path == TABLE else _beside(path, "a") in self.variables

    def upper(self, path: ParameterPath) -> ParameterPath | None:
        """Where the upper part of a stack lies, of a decoder whose stack is cut in two."""
        upper = ("upper_layers", *path[1:])
        return upper if path[0] == "layers" and upper in self.variables else None

    def place(self, each: Assignment) -> tuple[ParameterPath, int | None]:
        """Where a tensor lies, and its index in the stack that lies there."""
        upper = self.upper(each.path)
        if each.index is None or upper is None:
            return each.path, each.index
        below = self.variables[each.path].shape[0]
        return (each.path, each.index) if each.index < below else (upper, each.index - below)

    def low_rank(self, each: Assignment) -> LowRank:
        """The adapter of a kernel that `changes`."""
        kernel, paths = self.variables[each.path], [_beside(each.path, name) for name in "ab"]
        a, b = (self.read(path) if each.index is None else self.read(path)[each.index] for path in paths)
        stack = 0 if each.index is None else 1
        axes = kernel.axes[stack:]
        inputs = [axes.index(axis) for axis in self.variables[paths[0]].axes[stack:-1]]
        return _in_huggingface_order(a, b, kernel.shape[stack:], inputs, each.rule.relayout, self.scaling)

    def merged(self, each: Assignment, weight: np.ndarray) -> np.ndarray:
        """A tensor that `changes`, in Hugging Face's layout and float32."""
        if each.path == TABLE:
            return Rows(self.ids, self.read(ROWS)).put_into(weight)
        return self.low_rank(each).added_to(weight)


def _beside(path: ParameterPath, name: str) -> ParameterPath:
    """Of a kernel, its adapter's parameter; nothing that is there of others."""
    return (*path[:-1], "lora", name) if path[-1] == "kernel" else ()


def _in_huggingface_order(
    a: np.ndarray, b: np.ndarray, shape: Sequence[int], inputs: Sequence[int], relayout: Relayout, scaling: float
) -> LowRank:
    """Our `a` [inputs …, rank] and `b` [rank, outputs …] as matrices, columns and rows in the order of theirs."""
    theirs = relayout.huggingface_shape(shape)

    def order(dimension: int, kept: Sequence[int]) -> np.ndarray:
        """For each of our elements along the kept dimensions, its number along one of theirs."""
        numbers = np.arange(theirs[dimension])[(slice(None), None) if dimension == 0 else None]
        ours = relayout.to_jax(np.broadcast_to(numbers, theirs))
        return ours[tuple(slice(None) if axis in kept else 0 for axis in range(ours.ndim))].ravel()

    rank, outputs = a.shape[-1], [axis for axis in range(len(shape)) if axis not in inputs]
    ordered_a, ordered_b = np.empty((rank, theirs[1]), a.dtype), np.empty((theirs[0], rank), b.dtype)
    ordered_a[:, order(1, inputs)] = a.reshape(-1, rank).T
    ordered_b[order(0, outputs)] = b.reshape(rank, -1).T
    return LowRank(ordered_a, ordered_b, scaling)


def huggingface_shapes(
    weight_map: Sequence[WeightRule], layers: int, own: Mapping[ParameterPath, Any]
) -> dict[str, tuple[int, ...]]:
    """Shapes of a decoder's tensors by Hugging Face's names."""
    shapes = {}
    for each in assignments(weight_map, layers):
        shape = own[each.path].shape
        shapes[each.source] = each.rule.relayout.huggingface_shape(shape if each.index is None else shape[1:])
    return shapes


def merged_parameters(
    model: Any, own: Iterable[ParameterPath], weight_map: Sequence[WeightRule], layers: int
) -> dict[ParameterPath, jax.Array]:
    """A decoder's own parameters with all of its parts in them, where they were.

    What an adapter or a row changes is float32; so is a stack of which a part trained.
    """
    parts = Parts.of(model)
    places: dict[ParameterPath, list[Assignment]] = {}
    for each in assignments(weight_map, layers):
        places.setdefault(each.path, []).append(each)
    arrays = {}
    for path in own:
        held = parts.variables[path][...]
        if (upper := parts.upper(path)) is not None:
            both = (held, parts.variables[upper][...])
            held = jax.device_put(jnp.concatenate([part.astype(jnp.float32) for part in both]), held.sharding)
        elif parts.changes(path):
            held = put(_merged_parameter(parts, places[path], held), held.sharding)
        arrays[path] = held
    return arrays


def _merged_parameter(parts: Parts, places: Sequence[Assignment], held: jax.Array) -> np.ndarray:
    merged = np.empty(held.shape, np.float32)
    for each in places:
        relayout = each.rule.relayout
        ours = to_host(held if each.index is None else held[each.index])
        weight = parts.merged(each, relayout.to_huggingface(ours, in_order))
        merged[... if each.index is None else each.index] = relayout.to_jax(weight)
    return merged
