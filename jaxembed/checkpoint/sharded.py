"""A Hugging Face directory's weights straight into sharded parameters: each process reads its own bytes only.

Of every tensor a process reads the part that its devices hold, once, run by run; a layer is put into its stack on the
devices as soon as it is read. So a host has its part of one layer in memory at a time, or of the vocabulary table.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxembed import hosts
from jaxembed.checkpoint.buffers import Buffers
from jaxembed.checkpoint.huggingface import ShapeDtype, WeightsHash, in_order, open_checked
from jaxembed.checkpoint.model_directory import of_one_layer
from jaxembed.checkpoint.peft import PeftAdapter
from jaxembed.checkpoint.safetensors import Box, StoredTensor
from jaxembed.errors import InputError
from jaxembed.models.weights import Assignment, ParameterPath, Plan, WeightRule

State = dict[ParameterPath, jax.Array]


def load_sharded(
    directory: str | os.PathLike[str],
    abstract_state: Mapping[ParameterPath, ShapeDtype],
    shardings: Mapping[ParameterPath, jax.sharding.Sharding],
    weight_map: Sequence[WeightRule],
    layers: int,
    *,
    prefixes: Sequence[str] = (),
    ignored: Sequence[str] = (),
    dtype: Any,
    progress: bool = True,
    adapter: PeftAdapter | None = None,
) -> tuple[State, str | Callable[[], str] | None]:
    """The parameters that `abstract_state` describes, where the shardings have them, in `dtype`.

    With them comes the checkpoint's `WeightsHash` where a cast loses it, as from `load_weights`. Where the mesh has
    devices of other processes too it is a function, which all of them have to call: no process has read it all.

    Args:
        shardings: of the (stacked) parameters.
        prefixes, ignored: as in `jaxembed.models.weights.resolve`.
        adapter: merged into the tensors that it changes, which each process reads whole.

    Raises:
        InputError: as `load_weights`.
    """
    refs, plan = open_checked(directory, abstract_state, weight_map, layers, prefixes=prefixes, ignored=ignored)
    cast = any(refs[each.source].dtype != dtype for each in plan.assignments) or adapter is not None
    alone = all(sharding.is_fully_addressable for sharding in shardings.values())
    found = WeightsHash() if cast and alone else None
    files = _versions(refs)
    stacks = {each.path for each in plan.assignments if each.index is not None}
    state = _zeros({path: abstract_state[path].shape for path in stacks}, shardings, dtype)
    buffers = Buffers()
    total = sum(refs[each.source].nbytes for each in plan.assignments)
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, disable=not progress) as bar:
        for index, group in itertools.groupby(plan.assignments, lambda each: each.index):
            arrays: State = {}
            for each in group:
                ref, name = refs[each.source], each.source.removeprefix(plan.prefix)
                whole = None
                if adapter is not None and adapter.changes(name):
                    stored = ref.read(buffers)
                    whole = adapter.merge(name, stored)
                    buffers.give(stored)
                like = abstract_state[each.path].shape[0 if index is None else 1 :]
                sharding = of_one_layer(shardings[each.path], index is not None)
                taken = None if found is None else functools.partial(found.add, name)
                arrays[each.path] = _read(each, ref, like, sharding, dtype, buffers, whole, taken)
                bar.update(ref.nbytes)
            if index is None:
                state |= arrays
            else:
                # One layer at a time is on its way to the devices.
                state |= jax.block_until_ready(_put_layer({path: state[path] for path in arrays}, arrays, index))
    if cast and not alone:
        return state, functools.partial(_hash_together, refs, plan, adapter, files)
    return state, None if found is None else found.hexdigest()


def _read(
    each: Assignment,
    ref: StoredTensor,
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    dtype: Any,
    buffers: Buffers,
    whole: np.ndarray | None,
    taken: Callable[[np.ndarray], object] | None,
) -> jax.Array:
    """One tensor in our layout, where its sharding has it.

    Args:
        shape: in our layout.
        whole: the tensor, where it is not as it is stored.
        taken: called with the whole tensor; every device is this process's then.
    """
    split, axes = ref.shape if each.rule.relayout.split is None else each.rule.relayout.split, each.rule.relayout.axes
    # How the tensor lies in the file, its axes split as ours are, and which of them is which of ours.
    split = np.broadcast_to(np.int8(0), ref.shape).reshape(split).shape
    axes = tuple(range(len(split))) if axes is None else axes
    here = sharding.addressable_devices_indices_map(shape)
    indices = {device: _box(index, shape) for device, index in here.items() if index is not None}
    wanted = {box: tuple(box[axes.index(axis)] for axis in range(len(split))) for box in indices.values()}
    parts: dict[Box, np.ndarray] = {}
    for box in joined(wanted.values()):
        if whole is None:
            values = ref.read_box(split, box, buffers)
        else:
            values = whole.reshape(split)[tuple(slice(*each) for each in box)]
        if taken is not None:
            taken(values.reshape(ref.shape))
        shared = False
        for ours, theirs in wanted.items():
            if all(low >= start and high <= stop for (low, high), (start, stop) in zip(theirs, box)):
                inside = tuple(slice(low - start, high - start) for (low, high), (start, _) in zip(theirs, box))
                parts[ours] = in_order(values[inside].transpose(axes)).astype(dtype, copy=False)
                shared = shared or np.may_share_memory(parts[ours], values)
        (buffers.leave if shared else buffers.give)(values)
    held = [jax.device_put(parts[box], device) for device, box in indices.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, held)


def joined(boxes: Iterable[Box]) -> list[Box]:
    """Boxes of a grid, each joined to the one behind it along any axis."""
    found = sorted(set(boxes))
    for axis in range(len(found[0])):
        lines: dict[Box, list[Box]] = {}
        for box in found:
            lines.setdefault(box[:axis] + box[axis + 1 :], []).append(box)
        found = []
        for line in lines.values():
            line.sort(key=lambda box: box[axis])
            for number, box in enumerate(line):
                if number and found[-1][axis][1] == box[axis][0]:
                    start = found.pop()[axis][0]
                    found.append((*box[:axis], (start, box[axis][1]), *box[axis + 1 :]))
                else:
                    found.append(box)
    return found


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(each.indices(size)[:2] for each, size in zip(index, shape))


def _zeros(
    shapes: Mapping[ParameterPath, tuple[int, ...]],
    shardings: Mapping[ParameterPath, jax.sharding.Sharding],
    dtype: Any,
) -> State:
    def make() -> State:
        return {path: jnp.zeros(shape, dtype) for path, shape in shapes.items()}

    return jax.jit(make, out_shardings={path: shardings[path] for path in shapes})()


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(stacks: State, layer: State, index: int) -> State:
    return {path: jax.lax.dynamic_update_index_in_dim(stacks[path], layer[path], index, 0) for path in layer}


def _versions(refs: Mapping[str, StoredTensor]) -> dict[Path, tuple[int, int]]:
    """Size and time of the files."""
    stats = {file: file.stat() for file in {ref.file for ref in refs.values()}}
    return {file: (stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()}


def _hash_together(
    refs: Mapping[str, StoredTensor], plan: Plan, adapter: PeftAdapter | None, files: Mapping[Path, tuple[int, int]]
) -> str:
    """The `WeightsHash` of a checkpoint, of which each process reads some tensors.

    Raises:
        InputError: the files are not those that were loaded.
    """
    if files != (found := _versions(refs)):
        other = next(file for file in files if files[file] != found[file])
        raise InputError(f"{other}: has been replaced since the model was loaded, whose hash is asked for now")
    mine, buffers = WeightsHash(), Buffers()
    count = hosts.count()
    for each in plan.assignments[jax.process_index() % count :: count]:
        name = each.source.removeprefix(plan.prefix)
        stored = refs[each.source].read(buffers)
        mine.add(name, stored if adapter is None else adapter.merge(name, stored))
        buffers.give(stored)
    everyone = WeightsHash()
    for part in hosts.gather("weights hash", mine.to_json()):
        everyone.join(part)
    return everyone.hexdigest()
