"""A Hugging Face directory's weights as a model's parameters, and back, by the family's weight map.

One source tensor is in memory at a time, beside what is being filled. Everything that can be wrong with names, shapes
and dtypes is found before the first one is read.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike
from tqdm import tqdm

from jaxembed.checkpoint.buffers import Buffers, aligned_empty
from jaxembed.checkpoint.safetensors import (
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    TensorSpec,
    file_inside,
    open_tensors,
    raw_bytes,
    read_json,
)
from jaxembed.errors import InputError
from jaxembed.hosts import to_host
from jaxembed.models.weights import ParameterPath, Plan, WeightRule, assignments, resolve, shorten

TORCH_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_BLOCK_BYTES = 4 << 20
WEIGHT_DTYPES = tuple(np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16))


class ShapeDtype(Protocol):
    """What has a shape and a dtype: `jax.ShapeDtypeStruct`, a jax or a numpy array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The model's `config.json`. Raises `InputError` where it is missing or no JSON object."""
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory")
    file = file_inside(directory, "config.json")
    config = read_json(file)
    if not isinstance(config, dict):
        raise InputError(f"{file}: a JSON object expected, found {type(config).__name__}")
    return config


def open_weights(directory: str | os.PathLike[str]) -> Mapping[str, StoredTensor]:
    """All tensors of a Hugging Face directory by name: of its safetensors files, else of its `pytorch_model.bin`.

    Raises:
        InputError: no weights, or files that are damaged; names file and tensor.
    """
    directory = Path(directory)
    has_torch, has_safetensors = (
        any(os.path.lexists(directory / name) for name in names) for names in (TORCH_FILES, (SINGLE_FILE, INDEX_FILE))
    )
    if has_torch and not has_safetensors:
        from jaxembed.checkpoint.torch_files import open_torch_tensors

        return open_torch_tensors(directory)
    return open_tensors(directory)


def open_checked(
    directory: str | os.PathLike[str],
    abstract_state: Mapping[ParameterPath, ShapeDtype],
    weight_map: Sequence[WeightRule],
    layers: int,
    *,
    prefixes: Sequence[str] = (),
    ignored: Sequence[str] = (),
) -> tuple[Mapping[str, StoredTensor], Plan]:
    """The tensors of a directory and what becomes of each.

    Raises:
        InputError: as `load_weights`; no tensor is read.
    """
    refs = open_weights(directory)
    plan = resolve(refs, weight_map, layers, prefixes=prefixes, ignored=ignored, where=str(directory))
    check_weights(plan, refs, abstract_state, layers)
    return refs, plan


def load_weights(
    directory: str | os.PathLike[str],
    abstract_state: Mapping[ParameterPath, ShapeDtype],
    weight_map: Sequence[WeightRule],
    layers: int,
    *,
    prefixes: Sequence[str] = (),
    ignored: Sequence[str] = (),
    dtype: DTypeLike | None = np.float32,
    progress: bool = True,
    adapt: Callable[[str, np.ndarray], np.ndarray] | None = None,
) -> tuple[dict[ParameterPath, np.ndarray], str | None]:
    """The parameters that `abstract_state` describes, from the weights of `directory`.

    With them comes the checkpoint's `WeightsHash` where a cast loses it, else None: then it is that of the parameters.

    `prefixes` and `ignored` as in `jaxembed.models.weights.resolve`. All parameters become `dtype`; with `None`, each
    gets the dtype that `abstract_state` has for it. `adapt` (name without prefix, tensor in Hugging Face's layout) may
    put another tensor in the place of each; the hash is that of what it gives.

    Raises `InputError` for damaged files, for tensors that are missing or too many, and for a wrong shape or dtype,
    before any tensor is read.
    """
    refs, plan = open_checked(directory, abstract_state, weight_map, layers, prefixes=prefixes, ignored=ignored)
    state = {
        path: np.empty(like.shape, np.dtype(like.dtype if dtype is None else dtype))
        for path, like in abstract_state.items()
    }
    cast = any(refs[each.source].dtype != state[each.path].dtype for each in plan.assignments)
    found = WeightsHash() if cast or adapt is not None else None
    buffers = Buffers()
    total = sum(refs[assignment.source].nbytes for assignment in plan.assignments)
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, disable=not progress) as bar:
        for assignment in plan.assignments:
            ref = refs[assignment.source]
            place = ... if assignment.index is None else assignment.index
            array = ref.read(buffers)
            if adapt is not None:
                stored, array = array, adapt(ref.name.removeprefix(plan.prefix), array)
                if array is not stored:
                    buffers.give(stored)
            moved = in_order(assignment.rule.relayout.to_jax(array), buffers)
            state[assignment.path][place] = moved
            if found is not None:
                found.add(ref.name.removeprefix(plan.prefix), array)
            if not np.may_share_memory(moved, array):
                buffers.give(moved)
            buffers.give(array)
            bar.update(ref.nbytes)
    return state, None if found is None else found.hexdigest()


def in_order(view: np.ndarray, buffers: Buffers | None = None) -> np.ndarray:
    """The same values in C order: the view itself, or a copy by XLA, block by block and ten times as quick as numpy's.

    `buffers` may give the memory of a copy.
    """
    if view.flags.c_contiguous:
        return view
    memory = aligned_empty(view.nbytes) if buffers is None else buffers.take(view.nbytes)
    values = memory.view(view.dtype).reshape(view.shape)
    _fill(values, view, jax.local_devices(backend="cpu")[0])
    return values


def _fill(values: np.ndarray, view: np.ndarray, device: Any) -> None:
    entry = view.nbytes // len(view)
    if entry > _BLOCK_BYTES and view.ndim > 1:
        for index in range(len(view)):
            _fill(values[index], view[index], device)
        return
    step = max(1, _BLOCK_BYTES // entry)
    for start in range(0, len(view), step):
        values[start : start + step] = jax.device_put(view[start : start + step], device)


def iter_huggingface(
    state: Mapping[ParameterPath, Any],
    weight_map: Sequence[WeightRule],
    layers: int,
    prefix: str = "",
    *,
    dtype: DTypeLike | None = None,
) -> tuple[list[TensorSpec], Iterator[tuple[str, np.ndarray]]]:
    """The way back: specs and values of all tensors in Hugging Face's names and layout, for `write_safetensors`.

    `state` holds numpy or jax arrays; each tensor is taken from its devices when its turn comes, to which every process
    that has a part has to come. They keep their dtype unless `dtype` is given.
    """
    plan = list(assignments(weight_map, layers, prefix))
    specs = []
    for assignment in plan:
        array = state[assignment.path]
        shape = array.shape if assignment.index is None else array.shape[1:]
        shape = assignment.rule.relayout.huggingface_shape(shape)
        specs.append(TensorSpec(assignment.source, np.dtype(array.dtype if dtype is None else dtype), shape))

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for assignment, spec in zip(plan, specs):
            array = state[assignment.path]
            # Indexed before it becomes numpy: only one layer leaves the device.
            array = to_host(array if assignment.index is None else array[assignment.index])
            yield spec.name, assignment.rule.relayout.to_huggingface(array, in_order).astype(spec.dtype, copy=False)

    return specs, tensors()


class WeightsHash:
    """SHA-256 of a model's tensors under their canonical names: of their bytes in Hugging Face's layout.

    The same for every container, order, shard, prefix and head. Each tensor has a digest of its own, so that it can be
    taken in while others are read.
    """

    def __init__(self) -> None:
        self._digests: dict[str, tuple[str, tuple[int, ...], str]] = {}

    def add(self, name: str, array: np.ndarray) -> None:
        """Takes in a tensor; `name` is without prefix. Safe to call from several threads."""
        self._digests[name] = (array.dtype.name, array.shape, hashlib.sha256(raw_bytes(array)).hexdigest())

    def to_json(self) -> str:
        """What has been taken in, for `join` in another process."""
        return json.dumps(self._digests)

    def join(self, other: str) -> None:
        """Takes in what another process has, by its `to_json`."""
        for name, (dtype, shape, digest) in json.loads(other).items():
            self._digests[name] = dtype, tuple(shape), digest

    def hexdigest(self) -> str:
        return hashlib.sha256(json.dumps(sorted(self._digests.items())).encode()).hexdigest()


def weights_hash(state: Mapping[ParameterPath, Any], weight_map: Sequence[WeightRule], layers: int) -> str:
    """The `WeightsHash` of a model's parameters."""
    return hash_tensors(iter_huggingface(state, weight_map, layers)[1])


def hash_tensors(tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """The `WeightsHash` of tensors and their names."""
    found = WeightsHash()
    for name, array in tensors:
        found.add(name, array)
    return found.hexdigest()


def check_weights(
    plan: Plan, refs: Mapping[str, StoredTensor], abstract_state: Mapping[ParameterPath, ShapeDtype], layers: int
) -> None:
    """Checks names, shapes and dtypes of what is to be loaded against the parameters of a decoder.

    Raises:
        InputError: names file and tensor.
    """
    mapped = {assignment.path for assignment in plan.assignments}
    if mapped != abstract_state.keys():
        unknown = ["/".join(path) for path in sorted(mapped - abstract_state.keys())]
        unfilled = ["/".join(path) for path in sorted(abstract_state.keys() - mapped)]
        raise InputError(
            "the weight map does not fit the model: parameters without a rule: "
            f"{shorten(unfilled) or 'none'}; rules without a parameter: {shorten(unknown) or 'none'}"
        )
    for assignment in plan.assignments:
        ref, shape = refs[assignment.source], tuple(abstract_state[assignment.path].shape)
        if assignment.index is not None and shape[0] != layers - 1:
            raise InputError(
                f"{assignment.target}: stacked {shape[0]} times, but {layers} layers stack {layers - 1} times"
            )
        expected = assignment.rule.relayout.huggingface_shape(shape if assignment.index is None else shape[1:])
        if ref.shape != expected:
            raise InputError(
                f"{ref.file}: tensor {ref.name!r} has shape {list(ref.shape)}, expected {list(expected)} by the config"
            )
        if ref.dtype not in WEIGHT_DTYPES:
            raise InputError(f"{ref.file}: tensor {ref.name!r} is {ref.dtype_name}; weights are F32, F16 or BF16")
