"""Where arrays live and what moves between chips: the mesh, the rules table, and the hooks of the decoder.

Parameters, optimiser state and batches are global arrays over a (`data`, `fsdp`, `tensor`) mesh. The gradient is one
`jax.shard_map` over (`data`, `fsdp`); inside it every array is this chip's part, and all that moves is written in
[`Chips`][]. [`Alone`][] has the same methods for code outside of a `shard_map`: encoding, notebooks, one device.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxembed.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
"""Mesh axes over which packed rows, and so texts, are split."""

RULES: Mapping[str, str | None] = {
    "layer": None,
    "vocab": None,
    "embed": "fsdp",
    "features": None,
    "qkv": None,
    "heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "rank": None,
    "rows": None,
}
"""From a parameter's logical axis to the mesh axis that splits it (None: whole on every chip).

`embed` is the model dimension of matrices, `features` that of biases and norms, which are too small to split; `rank` is
that of low-rank adapters, `rows` are those of the vocabulary table that train alone."""


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list[Any] | None = None) -> Mesh:
    """A (`data`, `fsdp`, `tensor`) mesh; −1 stands for the devices that the other two leave.

    Raises:
        InputError: the three numbers do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"mesh: sizes must be positive, at most one of them -1, found {dict(zip(MESH_AXES, sizes))}")
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise InputError(
            f"mesh: data × fsdp × tensor = {' × '.join(map(str, sizes))} does not make the {len(devices)} devices "
            "that are here; set one of them to -1"
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def partition_spec(axes: tuple[str, ...]) -> PartitionSpec:
    """The rules table applied to a parameter's logical axes."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def partition_specs(state: nnx.State) -> nnx.State:
    """The same state with every parameter replaced by its `PartitionSpec`."""
    return nnx.map_state(lambda _, variable: variable.replace(partition_spec(variable.axes)), state)


def named_shardings(specs: Any, mesh: Mesh) -> Any:
    """Every `PartitionSpec` of a tree as a `NamedSharding` on the mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def check_divisible(state: nnx.State, mesh: Mesh) -> None:
    """Refuses a mesh that does not divide the model.

    Raises:
        InputError: names the parameter, its dimension, and the mesh axis that does not divide it.
    """
    for path, variable in nnx.to_flat_state(state):
        for axis, size in zip(variable.axes, variable.shape):
            mesh_axis = RULES[axis]
            if mesh_axis is not None and size % mesh.shape[mesh_axis]:
                raise InputError(
                    f"mesh.{mesh_axis}: {mesh.shape[mesh_axis]} does not divide the {axis!r} dimension {size} of "
                    f"parameter {'/'.join(map(str, path))} with shape {tuple(variable.shape)}"
                )


@runtime_checkable
class Hooks(Protocol):
    """What the decoder and the loss ask of their surroundings."""

    def weight(self, parameter: nnx.Param, dtype: Any) -> Array:
        """A whole matrix in the dtype of the computation."""
        ...

    def lookup(self, table: nnx.Param, ids: Int[Array, "rows length"], dtype: Any) -> Float[Array, "rows length dim"]:
        """Rows of the vocabulary table."""
        ...

    def everyone(self, x: Float[Array, "mine dim"]) -> Float[Array, "all dim"]:
        """The rows of all chips, in the order of the chips."""
        ...


@dataclasses.dataclass(frozen=True)
class Alone:
    """The hooks of one device, and of arrays that XLA partitions by itself: nothing moves."""

    def weight(self, parameter: nnx.Param, dtype: Any) -> Array:
        return parameter[...].astype(dtype)

    def lookup(self, table: nnx.Param, ids: Int[Array, "rows length"], dtype: Any) -> Float[Array, "rows length dim"]:
        return table.at[ids].get(mode="clip").astype(dtype)

    def everyone(self, x: Float[Array, "mine dim"]) -> Float[Array, "all dim"]:
        return x


@dataclasses.dataclass(frozen=True)
class Chips:
    """The hooks inside a `shard_map` over (`data`, `fsdp`).

    Gradients take the transposed way: a gathered weight's cotangent is summed over `fsdp` by a reduce-scatter in the
    dtype of the computation, gathered embeddings' by one over both axes in float32. Nothing here crosses `data` but
    embeddings.
    """

    def weight(self, parameter: nnx.Param, dtype: Any) -> Array:
        w = parameter[...].astype(dtype)
        axes = parameter.axes[-w.ndim :]  # a layer taken from a stack keeps the stack's names
        if "embed" not in axes:
            return w
        return jax.lax.all_gather(w, "fsdp", axis=axes.index("embed"), tiled=True)

    def lookup(self, table: nnx.Param, ids: Int[Array, "rows length"], dtype: Any) -> Float[Array, "rows length dim"]:
        ids = jax.lax.all_gather(ids, "fsdp", axis=0, tiled=True)
        columns = table.at[ids].get(mode="clip").astype(dtype)  # this chip's columns, for the rows of its whole group
        return jax.lax.all_to_all(columns, "fsdp", split_axis=0, concat_axis=2, tiled=True)

    def everyone(self, x: Float[Array, "mine dim"]) -> Float[Array, "all dim"]:
        return jax.lax.all_gather(x, BATCH_AXES, axis=0, tiled=True)


def compute_dtype(name: str, devices: list[Any] | None = None) -> Any:
    """`auto`: bfloat16 on TPU and on GPUs of compute capability 8.0 and above, float32 elsewhere."""
    if name != "auto":
        return jnp.dtype(name)
    device = (devices or jax.devices())[0]
    capability = float(getattr(device, "compute_capability", 0) or 0)
    return jnp.dtype(jnp.bfloat16 if device.platform == "tpu" or capability >= 8.0 else jnp.float32)
