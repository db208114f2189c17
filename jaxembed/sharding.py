"""Where arrays live and what moves between chips: the mesh, the rules table, and the hooks of the decoder.

Parameters, optimiser state and batches are global arrays over a (`data`, `fsdp`, `tensor`) mesh. The gradient is one
`jax.shard_map` over (`data`, `fsdp`); inside it every array is this chip's part, and all that moves is written in
[`Chips`][]; encoding on a mesh does the same. [`Alone`][] has the same methods for code outside of a `shard_map`:
notebooks, one device.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
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

    On several TPU slices `data` is the outermost axis, so that nothing else crosses the network between them.

    Raises:
        InputError: the three numbers do not multiply to the number of devices, or `data` is no multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"mesh: sizes must be positive, at most one of them -1, found {dict(zip(MESH_AXES, sizes))}")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        given = " × ".join(map(str, sizes))
        advice = "choose sizes that divide them" if -1 in sizes else "set one of them to -1"
        raise InputError(
            f"mesh: data × fsdp × tensor = {given} does not make the {len(devices)} devices that are here; {advice}"
        )
    return Mesh(_arranged(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _arranged(sizes: list[int], devices: list[Any]) -> np.ndarray:
    """The devices in the shape of the mesh, neighbours in it near each other in the network."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    data, *inner = sizes
    if slices > 1 and data % slices and devices[0].platform == "tpu":
        raise InputError(
            f"mesh.data: {data} is no multiple of the {slices} slices; between slices only data, the outermost axis, "
            "is split"
        )

    def arrange(split: bool) -> np.ndarray:
        if slices > 1 and data % slices == 0:
            return mesh_utils.create_hybrid_device_mesh(
                (data // slices, *inner), (slices, 1, 1), devices, allow_split_physical_axes=split
            )
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=split)

    try:
        return arrange(split=devices[0].device_kind == "TPU v5 lite")  # as `jax.make_mesh` does
    except NotImplementedError:  # no axis of the mesh is a product of whole axes of the network
        return arrange(split=True)


def chips_of_process(mesh: Mesh) -> tuple[int, ...]:
    """The chips, numbered over `data` and `fsdp`, of which this process has a device; ascending."""
    groups = mesh.devices.reshape(-1, mesh.shape["tensor"])
    process = jax.process_index()
    return tuple(
        number for number, group in enumerate(groups) if any(device.process_index == process for device in group)
    )


def local_mesh(fsdp: int = 1) -> Mesh | None:
    """All devices of this process, weights split over `fsdp` of them; None where there is only one.

    Raises:
        InputError: `fsdp` does not divide the number of devices.
    """
    devices = jax.local_devices()
    if fsdp < 1 or len(devices) % fsdp:
        raise InputError(f"fsdp: expected a number that divides the {len(devices)} devices of this host, found {fsdp}")
    return None if len(devices) == 1 else make_mesh(-1, fsdp, devices=devices)


def partition_spec(axes: tuple[str, ...]) -> PartitionSpec:
    """The rules table applied to a parameter's logical axes."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def partition_specs(state: nnx.State) -> nnx.State:
    """The same state with every parameter replaced by its `PartitionSpec`."""
    return nnx.map_state(lambda _, variable: variable.replace(partition_spec(variable.axes)), state)


def named_shardings(specs: Any, mesh: Mesh) -> Any:
    """Every `PartitionSpec` of a tree as a `NamedSharding` on the mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def manual(specs: Any) -> Any:
    """The specs without `tensor`, which stays in the compiler's hands inside a `shard_map` over the batch axes."""

    def keep(spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(*(axis if axis in BATCH_AXES else None for axis in spec))

    return jax.tree.map(keep, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


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
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.shape["fsdp"] == 1:
            return w
        gather = partial(_gathered, axis=axes.index("embed"))
        split = PartitionSpec(*("tensor" if RULES[axis] == "tensor" else None for axis in axes))
        if "tensor" not in split or mesh.shape["tensor"] == 1:
            return gather(w)
        # By hand over `tensor` too: the compiler would gather the matrix over it first.
        return jax.shard_map(gather, in_specs=split, out_specs=split, axis_names={"tensor"}, check_vma=False)(w)

    def lookup(self, table: nnx.Param, ids: Int[Array, "rows length"], dtype: Any) -> Float[Array, "rows length dim"]:
        ids = jax.lax.all_gather(ids, "fsdp", axis=0, tiled=True)
        columns = table.at[ids].get(mode="clip").astype(dtype)  # this chip's columns, for the rows of its whole group
        return jax.lax.all_to_all(columns, "fsdp", split_axis=0, concat_axis=2, tiled=True)

    def everyone(self, x: Float[Array, "mine dim"]) -> Float[Array, "all dim"]:
        return jax.lax.all_gather(x, BATCH_AXES, axis=0, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(shard: Array, axis: int) -> Array:
    """The whole matrix of which each chip of `fsdp` has a part along an axis."""
    return jax.lax.all_gather(shard, "fsdp", axis=axis, tiled=True)


def _keep_nothing(shard: Array, axis: int) -> tuple[Array, None]:
    return _gathered(shard, axis), None


def _scattered(axis: int, _: None, gradient: Array) -> tuple[Array]:
    """This chip's part of the sum of gradients.

    That axis goes first, and the rest is laid out behind it: along the minor dimension the TPU compiler would sum the
    whole gradient on every chip, and then slice it.
    """
    front = jnp.moveaxis(gradient, axis, 0)
    rows = with_layout_constraint(front.reshape(len(front), -1), Layout(major_to_minor=(0, 1)))
    part = jax.lax.psum_scatter(rows, "fsdp", scatter_dimension=0, tiled=True)
    return (jnp.moveaxis(part.reshape(-1, *front.shape[1:]), 0, axis),)


_gathered.defvjp(_keep_nothing, _scattered)


def compute_dtype(name: str, devices: list[Any] | None = None) -> Any:
    """`auto`: bfloat16 on TPU and on GPUs of compute capability 8.0 and above, float32 elsewhere."""
    if name != "auto":
        return jnp.dtype(name)
    device = (devices or jax.devices())[0]
    capability = float(getattr(device, "compute_capability", 0) or 0)
    return jnp.dtype(jnp.bfloat16 if device.platform == "tpu" or capability >= 8.0 else jnp.float32)
