"""A Hugging Face directory's weights as a model's parameters, and back, by the family's weight map.

One source tensor is in memory at a time, beside what is being filled. Everything that can be wrong with names, shapes
and dtypes is found before the first one is read.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike
from tqdm import tqdm

from jaxembed.checkpoint.safetensors import TensorRef, TensorSpec, file_inside, open_tensors, raw_bytes, read_json
from jaxembed.errors import InputError
from jaxembed.models.weights import ParameterPath, Plan, WeightRule, assignments, resolve, shorten

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
) -> dict[ParameterPath, np.ndarray]:
    """The parameters that `abstract_state` describes, from the safetensors files of `directory`.

    `prefixes` and `ignored` as in `jaxembed.models.weights.resolve`. All parameters become `dtype`; with `None`, each
    gets the dtype that `abstract_state` has for it. Raises `InputError` for damaged files, for tensors that are
    missing or too many, and for a wrong shape or dtype, before any tensor is read.
    """
    refs = open_tensors(directory)
    plan = resolve(refs, weight_map, layers, prefixes=prefixes, ignored=ignored, where=str(directory))
    _check(plan, refs, abstract_state, layers)
    state = {
        path: np.empty(like.shape, np.dtype(like.dtype if dtype is None else dtype))
        for path, like in abstract_state.items()
    }
    total = sum(refs[assignment.source].nbytes for assignment in plan.assignments)
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, disable=not progress) as bar:
        for assignment in plan.assignments:
            ref = refs[assignment.source]
            place = ... if assignment.index is None else assignment.index
            state[assignment.path][place] = assignment.rule.relayout.to_jax(ref.read())
            bar.update(ref.nbytes)
    return state


def iter_huggingface(
    state: Mapping[ParameterPath, Any],
    weight_map: Sequence[WeightRule],
    layers: int,
    prefix: str = "",
    *,
    dtype: DTypeLike | None = None,
) -> tuple[list[TensorSpec], Iterator[tuple[str, np.ndarray]]]:
    """The way back: specs and values of all tensors in Hugging Face's names and layout, for `write_safetensors`.

    `state` holds numpy or jax arrays; each tensor is taken from its device when its turn comes. They keep their dtype
    unless `dtype` is given.
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
            array = np.asarray(array if assignment.index is None else array[assignment.index])
            yield spec.name, assignment.rule.relayout.to_huggingface(array).astype(spec.dtype, copy=False)

    return specs, tensors()


def weights_hash(state: Mapping[ParameterPath, Any], weight_map: Sequence[WeightRule], layers: int) -> str:
    """SHA-256 of a model's tensors under their canonical names: the same for every container, prefix and head."""
    return hash_tensors(*iter_huggingface(state, weight_map, layers))


def hash_tensors(specs: Iterable[TensorSpec], tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """SHA-256 of names, dtypes, shapes and values in Hugging Face's layout, in the order given (the canonical one)."""
    digest = hashlib.sha256()
    for spec, (_, array) in zip(specs, tensors):
        digest.update(json.dumps([spec.name, spec.dtype_name, list(spec.shape)]).encode())
        digest.update(raw_bytes(array))
    return digest.hexdigest()


def _check(
    plan: Plan, refs: Mapping[str, TensorRef], abstract_state: Mapping[ParameterPath, ShapeDtype], layers: int
) -> None:
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
