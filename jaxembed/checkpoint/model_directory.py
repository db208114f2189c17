"""Orbax model directories: a model for JAX, its layers unstacked, loaded straight into sharded stacked parameters.

`weights/` is an Orbax checkpoint of the decoder's tensors in our layout (`layers/3/qkv/kernel`). `extra/` is one of
what the source had besides, such as a head of its own, under the source's names and in its layout. The small files of
the source stay as they were. `jaxembed_orbax.json`, written last, holds what leads back to the very same names.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from jaxembed.checkpoint.buffers import Buffers, read_ahead
from jaxembed.checkpoint.huggingface import ShapeDtype, check_weights, in_order
from jaxembed.checkpoint.safetensors import StoredTensor, read_json
from jaxembed.checkpoint.stores import ArrayPath, read_store, read_to_host, store_contents
from jaxembed.errors import InputError
from jaxembed.models.weights import Assignment, ParameterPath, Plan, WeightRule, assignments, shorten

RECORD_FILE = "jaxembed_orbax.json"
WEIGHTS, EXTRA = "weights", "extra"


class Record(BaseModel):
    """What `jaxembed_orbax.json` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = 1
    jaxembed: str
    """The version that wrote the directory."""
    prefix: str
    """Before every tensor's name in the source."""
    weights_hash: str
    """`WeightsHash` of the decoder's tensors."""


def is_model_directory(directory: Path) -> bool:
    """Whether there is an Orbax model directory, whole or damaged."""
    return (directory / RECORD_FILE).is_file()


def read_record(directory: Path) -> Record:
    """Raises `InputError` where the record is damaged or of a later version of jaxembed."""
    file = directory / RECORD_FILE
    try:
        record = Record.model_validate(read_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if record.format != 1:
        raise InputError(f"{file}: format {record.format} is of a later jaxembed than this one, which reads format 1")
    return record


@dataclass(frozen=True)
class OrbaxTensor(StoredTensor):
    """A tensor of an Orbax model directory, under Hugging Face's name and in its shape."""

    path: ArrayPath
    """In the checkpoint `file`."""
    assignment: Assignment | None
    """None for what is no part of the decoder."""

    def read(self, buffers: Buffers | None = None) -> np.ndarray:
        return next(read_tensors([self], buffers or Buffers()))[1]


def stored_tensors(
    directory: Path, weight_map: Sequence[WeightRule], layers: int, prefix: str
) -> dict[str, OrbaxTensor]:
    """All tensors of an Orbax model directory by Hugging Face's names; those of the decoder in canonical order.

    Raises:
        InputError: damaged, or its arrays are not those of the decoder; names them.
    """
    contents = store_contents(directory / WEIGHTS)
    plan = list(assignments(weight_map, layers, prefix))
    missing = ["/".join(each.stored) for each in plan if ".".join(each.stored) not in contents]
    surplus = [key.replace(".", "/") for key in contents.keys() - {".".join(each.stored) for each in plan}]
    if missing or surplus:
        raise InputError(
            f"{directory / WEIGHTS}: these are not the weights of this model; missing: {shorten(missing) or 'none'}; "
            f"belonging nowhere: {shorten(sorted(surplus)) or 'none'}"
        )
    found = {}
    for each in plan:
        leaf = contents[".".join(each.stored)]
        try:
            shape = each.rule.relayout.huggingface_shape(leaf.shape)
        except ValueError as error:
            place = "/".join(each.stored)
            raise InputError(
                f"{directory / WEIGHTS}: {place} has shape {list(leaf.shape)}, which is not one by the config"
            ) from error
        found[each.source] = OrbaxTensor(each.source, leaf.dtype, shape, directory / WEIGHTS, each.stored, each)
    if (directory / EXTRA).exists():
        for name, leaf in store_contents(directory / EXTRA).items():
            found[name] = OrbaxTensor(name, leaf.dtype, leaf.shape, directory / EXTRA, (name,), None)
    return found


def read_tensors(tensors: Iterable[OrbaxTensor], buffers: Buffers) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values in Hugging Face's layout, in the order given."""
    for checkpoint, group in itertools.groupby(tensors, key=lambda tensor: tensor.file):
        by_path = {tensor.path: tensor for tensor in group}
        wanted = {path: jax.ShapeDtypeStruct(_our_shape(tensor), tensor.dtype) for path, tensor in by_path.items()}
        for path, array in read_ahead(read_to_host(checkpoint, wanted, buffers)):
            tensor = by_path[path]
            if tensor.assignment is not None:
                ours = array
                array = tensor.assignment.rule.relayout.to_huggingface(
                    ours, functools.partial(in_order, buffers=buffers)
                )
                if not np.may_share_memory(ours, array):
                    buffers.give(ours)
            yield tensor.name, array


def load_stored(
    directory: Path,
    abstract_state: Mapping[ParameterPath, ShapeDtype],
    shardings: Mapping[ParameterPath, jax.sharding.Sharding] | None,
    weight_map: Sequence[WeightRule],
    layers: int,
    *,
    dtype: Any,
    progress: bool = True,
) -> dict[ParameterPath, jax.Array]:
    """The parameters of a decoder from an Orbax model directory, each layer put into its stack when it is read.

    With shardings every process and device reads its own part only.

    Args:
        shardings: of the stacked parameters; None: on the default device.
        dtype: of all parameters.

    Raises:
        InputError: damaged, or its arrays are not those of the decoder; names them.
    """
    tensors = stored_tensors(directory, weight_map, layers, prefix="")
    plan = {each.stored: each for each in assignments(weight_map, layers)}
    check_weights(Plan(tuple(plan.values()), "", ()), tensors, abstract_state, layers)
    wanted = {}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for stored, each in plan.items():
        tensor = tensors[each.source]
        sharding = device if shardings is None else of_one_layer(shardings[each.path], each.index is not None)
        wanted[stored] = jax.ShapeDtypeStruct(_our_shape(tensor), tensor.dtype, sharding=sharding)
    state: dict[ParameterPath, jax.Array] = {}
    total = sum(tensors[each.source].nbytes for each in plan.values())
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, disable=not progress) as bar:
        for stored, array in read_store(directory / WEIGHTS, wanted):
            each = plan[stored]
            sharding = None if shardings is None else shardings[each.path]
            if each.index is None:
                state[each.path] = jax.device_put(jnp.asarray(array, dtype), sharding)
            else:
                if each.path not in state:
                    shape = abstract_state[each.path].shape
                    state[each.path] = jnp.zeros(shape, dtype, device=sharding)
                state[each.path] = _put_layer(state[each.path], array, each.index)
            bar.update(tensors[each.source].nbytes)
    return state


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(stack: jax.Array, layer: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer.astype(stack.dtype), index, 0)


def of_one_layer(sharding: jax.sharding.Sharding, stacked: bool) -> jax.sharding.Sharding:
    """How an array lies that goes into a parameter, or into its stack."""
    assert isinstance(sharding, jax.sharding.NamedSharding)
    return sharding.update(spec=jax.P(*sharding.spec[1:])) if stacked else sharding


def _our_shape(tensor: OrbaxTensor) -> tuple[int, ...]:
    if tensor.assignment is None:
        return tensor.shape
    return tensor.assignment.rule.relayout.to_jax(np.broadcast_to(np.int8(0), tensor.shape)).shape
