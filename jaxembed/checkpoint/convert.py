"""A model from one container to another, tensor by tensor: Hugging Face and Orbax model directories, exports.

A `Source` has its tensors under Hugging Face's names, wherever they lie, checked before the first one is read. Each
goes through the decoder's layout on its way, is hashed while it passes, and is let go when it is written.
"""

import functools
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jaxembed
from jaxembed.checkpoint.buffers import Buffers, read_ahead
from jaxembed.checkpoint.directories import ModelPath, Uploads, new_directory, refuse_target
from jaxembed.checkpoint.export import exported_config, is_causal, write_description
from jaxembed.checkpoint.huggingface import (
    WEIGHT_DTYPES,
    WeightsHash,
    check_weights,
    in_order,
    open_weights,
    read_config,
)
from jaxembed.checkpoint.model_card import model_card
from jaxembed.checkpoint.model_directory import (
    EXTRA,
    RECORD_FILE,
    WEIGHTS,
    OrbaxTensor,
    Record,
    is_model_directory,
    read_record,
    read_tensors,
    stored_tensors,
)
from jaxembed.checkpoint.orbax import write_store
from jaxembed.checkpoint.parts import huggingface_shapes
from jaxembed.checkpoint.peft import base_config, base_directory, is_adapter, read_adapter, tokenizer_directory
from jaxembed.checkpoint.pretrained import abstract_decoder, flat_state
from jaxembed.checkpoint.safetensors import StoredTensor, TensorSpec, file_inside, write_safetensors
from jaxembed.checkpoint.stores import ArrayPath
from jaxembed.errors import InputError
from jaxembed.models import Family, family_of
from jaxembed.models.pooled import check_pooling
from jaxembed.models.weights import Plan, assignments, resolve
from jaxembed.text.format import TextFormat, write_json
from jaxembed.text.tokenizer import TextTokenizer

Container = Literal["orbax", "hf", "sentence-transformers"]

# Weights of this and of other libraries, and what their tools leave behind.
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5"),
    *(".msgpack", ".msgpack.index.json", ".onnx", ".onnx_data", ".gguf", ".pkl", ".pickle", ".npz", ".ot"),
)
_MODULE_FOLDER = re.compile(r"\d+_\w+")  # of sentence-transformers


@dataclass(frozen=True)
class Source:
    """Where a model comes from: its tensors under Hugging Face's names, and what describes it."""

    path: Path
    kind: Literal["Hugging Face", "Orbax", "training run", "adapter"]
    family: Family
    config: Any
    """The family's config."""
    huggingface_config: Mapping[str, Any]
    plan: Plan
    """Its decoder's tensors in canonical order; `ignored` are the others."""
    tensors: Mapping[str, TensorSpec]
    read: Callable[[Sequence[str], Buffers], Iterator[tuple[str, np.ndarray]]]
    """Names → names and values, in the order given; the buffers give the memory of values and may get it back."""
    weights_hash: str | None = None
    """`WeightsHash` of the decoder's tensors, where the source has it written down."""
    tokenizer: TextTokenizer | None = None
    """Of a training run or an adapter, which have no small files of a model; None: they are in `path`."""
    card: Callable[[str, str], str] | None = None
    """(the target's name, hash of its weights) → the model card of a training run."""
    state: str = ""
    """Of a training run: after which step."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion will do, for a table; and, when it is done, did."""

    source: Source
    to: Container
    dtype: np.dtype[Any] | None
    """Of all tensors; None: each keeps its own."""
    specs: Sequence[TensorSpec]
    """Of all tensors that are carried over, in their order, in the dtype that they get."""
    dropped: Sequence[str]
    """Tensors that the target has no place for."""

    @property
    def names(self) -> list[str]:
        """The source's names of `specs`."""
        names = [each.source for each in self.source.plan.assignments]
        return names + [name for name in self.source.plan.ignored if name not in self.dropped]

    @property
    def nbytes(self) -> int:
        """Bytes that are written."""
        return sum(spec.nbytes for spec in self.specs)

    def rows(self) -> Iterator[tuple[str, str, str, str, str]]:
        """Source tensor, parameter, shape there, dtype (→ the new one) and relayout, of every tensor of the source."""
        places = {each.source: each for each in self.source.plan.assignments}
        specs = {spec.name: spec for spec in self.specs}
        for name in [*places, *self.source.plan.ignored]:
            tensor, each = self.source.tensors[name], places.get(name)
            dtype = tensor.dtype_name
            if name in specs and specs[name].dtype != tensor.dtype:
                dtype += f" → {specs[name].dtype_name}"
            target = (
                "/".join(each.stored) if each else "dropped" if name in self.dropped else "carried beside the model"
            )
            yield name, target, str(list(tensor.shape)), dtype, each.rule.relayout.name if each else ""


@dataclass(frozen=True)
class Summary:
    """What was written."""

    target: ModelPath
    state: str
    """`Source.state`."""
    tensors: int
    nbytes: int
    dtypes: Sequence[str]
    weights_hash: str
    dropped: Sequence[str]
    """Tensors of the source that the target has no place for."""
    not_copied: Sequence[str]
    """Files of the source that are neither its weights nor were copied."""

    def __str__(self) -> str:
        what = f"{self.tensors} tensors, {self.nbytes / 1e9:.3f} GB, {' and '.join(self.dtypes)}"
        state = f" ({self.state})" if self.state else ""
        lines = [f"{self.target}{state}: {what}, weights {self.weights_hash}"]
        if self.dropped:
            lines.append(f"dropped, as an embedder has no use for it: {', '.join(self.dropped)}")
        if self.not_copied:
            lines.append(f"not copied: {', '.join(self.not_copied)}")
        return "\n".join(lines)


def open_source(path: Path) -> Source:
    """A Hugging Face, sentence-transformers or Orbax model directory, all names, shapes and dtypes checked.

    Or an adapter, whose tensors are those of its base with the adapter merged into them.

    Raises:
        InputError: something is missing, too many, damaged or of another architecture; names file and tensor.
    """
    if is_adapter(path):
        return _open_adapter(path)
    huggingface_config = read_config(path)
    where = str(path / "config.json")
    family = family_of(huggingface_config, where)
    config = family.config.from_huggingface(huggingface_config, where)
    rules = family.weight_map(config)
    tensors: Mapping[str, StoredTensor]
    recorded = None
    if is_model_directory(path):
        record = read_record(path)
        recorded, prefix = record.weights_hash, record.prefix
        tensors = stored_tensors(path, rules, config.layers, prefix)
        places = tuple(assignments(rules, config.layers, prefix))
        plan = Plan(places, prefix, tuple(sorted(tensors.keys() - {each.source for each in places})))
    else:
        tensors = open_weights(path)
        plan = resolve(tensors, rules, config.layers, prefixes=family.prefixes, ignored=family.ignored, where=str(path))
    check_weights(plan, tensors, flat_state(abstract_decoder(family, config)[1]), config.layers)
    for name in plan.ignored:
        if tensors[name].dtype not in WEIGHT_DTYPES:
            found = tensors[name].dtype_name
            raise InputError(f"{tensors[name].file}: tensor {name!r} is {found}; weights are F32, F16 or BF16")
    kind = "Hugging Face" if recorded is None else "Orbax"

    def read(names: Sequence[str], buffers: Buffers) -> Iterator[tuple[str, np.ndarray]]:
        stored = [tensors[name] for name in names]
        if recorded is not None:
            return read_tensors((tensor for tensor in stored if isinstance(tensor, OrbaxTensor)), buffers)
        return ((tensor.name, tensor.read(buffers)) for tensor in stored)

    return Source(path, kind, family, config, huggingface_config, plan, tensors, read, recorded)


def _open_adapter(path: Path) -> Source:
    directory = base_directory(path)
    base = open_source(directory)
    family, prefix = base.family, base.plan.prefix
    own = flat_state(abstract_decoder(family, base.config)[1])
    rules = family.weight_map(base.config)
    adapter = read_adapter(path, rules, huggingface_shapes(rules, base.config.layers, own), family.prefixes)
    tensors = {
        name: TensorSpec(name, np.dtype(np.float32), spec.shape) if adapter.changes(name.removeprefix(prefix)) else spec
        for name, spec in base.tensors.items()
    }

    def read(names: Sequence[str], buffers: Buffers) -> Iterator[tuple[str, np.ndarray]]:
        for name, array in base.read(names, buffers):
            merged = adapter.merge(name.removeprefix(prefix), array)
            if merged is not array:
                buffers.give(array)
            yield name, merged

    huggingface_config = base_config(path, directory)
    return replace(
        base,
        path=path,
        kind="adapter",
        config=family.config.from_huggingface(huggingface_config, str(path)),
        huggingface_config=huggingface_config,
        tensors=tensors,
        read=read,
        weights_hash=None,
        tokenizer=TextTokenizer.from_directory(tokenizer_directory(path, directory)),
    )


def plan_conversion(source: Source, to: Container, dtype: np.dtype[Any] | None = None) -> Conversion:
    """What `convert` will do: all tensors of the source, in `dtype` where one is given."""
    dropped = source.plan.ignored if to == "sentence-transformers" else ()
    names = [each.source for each in source.plan.assignments]
    specs = []
    for name in [*names, *(name for name in source.plan.ignored if name not in dropped)]:
        tensor = source.tensors[name]
        # Readers of an export look for AutoModel's names, which have no prefix.
        name = name.removeprefix(source.plan.prefix) if to == "sentence-transformers" else name
        specs.append(TensorSpec(name, tensor.dtype if dtype is None else np.dtype(dtype), tensor.shape))
    return Conversion(source, to, None if dtype is None else np.dtype(dtype), specs, dropped)


def convert(
    conversion: Conversion,
    target: ModelPath,
    *,
    text_format: TextFormat | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    verify: Callable[[Path], None] | None = None,
    progress: bool = True,
) -> Summary:
    """Writes the target; it bears its name only when it is whole, and verified where that is asked for.

    What goes to a bucket is in a temporary directory first: a file of weights at a time, or, where it is verified or is
    an Orbax directory, all of it.

    Args:
        text_format: of a sentence-transformers directory; None: the source's own.
        max_shard_bytes: of a safetensors file, unless one tensor is larger.
        overwrite: replaces a model directory that is at `target`.
        verify: called with the finished directory, before it gets its name; what it raises leaves nothing.

    Raises:
        InputError: the target is there, the source has no text format, or its values are not those it recorded.
        CheckpointError: the target cannot be written.
    """
    source, to = conversion.source, conversion.to
    refuse_target(target, source.path, overwrite)
    tokenizer = source.tokenizer
    if to == "sentence-transformers" and tokenizer is None:
        tokenizer = TextTokenizer.from_directory(source.path, text_format)
    if tokenizer is not None:
        check_pooling(tokenizer.text_format.pooling, is_causal(source.huggingface_config))
    found, not_copied = WeightsHash(), []
    with new_directory(target) as partial:
        with (
            tqdm(total=conversion.nbytes, desc="convert", unit="B", unit_scale=True, disable=not progress) as bar,
            _Passing(conversion, found, bar) as passing,
        ):
            if to == "orbax":
                _write_orbax(partial, conversion, passing)
            elif isinstance(target, Path) or verify is not None:
                write_safetensors(partial, conversion.specs, passing.all(), max_shard_bytes=max_shard_bytes)
            else:
                with Uploads(target) as uploads:
                    write_safetensors(
                        partial, conversion.specs, passing.all(), max_shard_bytes=max_shard_bytes, take=uploads
                    )
        weights_hash = found.hexdigest()
        unchanged = all(spec.dtype == source.tensors[name].dtype for spec, name in zip(conversion.specs, passing.names))
        if source.weights_hash is not None and unchanged and weights_hash != source.weights_hash:
            raise InputError(
                f"{source.path}: damaged: the weights have the hash {weights_hash}, recorded is {source.weights_hash}"
            )
        if tokenizer is not None:
            config = exported_config(source.huggingface_config, {spec.dtype for spec in conversion.specs})
            make_card = source.card or functools.partial(_card, source, tokenizer)
            card = make_card(target.name, weights_hash)
            write_description(partial, config, tokenizer, card, source.family.tokenizer_class)
        else:
            not_copied = _copy_files(source.path, partial)
            config = _config(conversion)
            if config != source.huggingface_config:
                (partial / "config.json").unlink()
                write_json(partial / "config.json", config)
        if to == "orbax":  # last: where the record is, the model is whole
            record = Record(jaxembed=jaxembed.__version__, prefix=source.plan.prefix, weights_hash=weights_hash)
            write_json(partial / RECORD_FILE, record.model_dump())
        if verify is not None:
            verify(partial)
    dtypes = sorted({spec.dtype_name for spec in conversion.specs})
    return Summary(
        target,
        source.state,
        len(conversion.specs),
        conversion.nbytes,
        dtypes,
        weights_hash,
        conversion.dropped,
        not_copied,
    )


class _Passing:
    """The tensors of a conversion on their way, hashed by a second thread; a context manager."""

    def __init__(self, conversion: Conversion, found: WeightsHash, bar: tqdm) -> None:
        source = conversion.source
        self._source, self._found, self._bar = source, found, bar
        self.places = {each.source: each for each in source.plan.assignments}
        self.names = conversion.names
        self._specs = dict(zip(self.names, conversion.specs))
        self._thread = ThreadPoolExecutor(1)
        self._hashing: tuple[Future[None], np.ndarray] | None = None
        self.buffers = Buffers()

    def __enter__(self) -> "_Passing":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        if self._hashing is not None and error[0] is None:
            self._hashing[0].result()

    def tensors(self, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Source's names and values in the target's dtype, in Hugging Face's layout."""
        for name, stored in read_ahead(self._source.read(names, self.buffers)):
            array = stored.astype(self._specs[name].dtype, copy=False)
            if array is not stored:
                self.buffers.give(stored)
            if name in self.places:
                if self._hashing is not None:
                    self._hashing[0].result()  # one at a time, so that no more than a few tensors are in memory
                key = name.removeprefix(self._source.plan.prefix)
                self._hashing = self._thread.submit(self._found.add, key, array), array
            yield name, array
            self._bar.update(array.nbytes)

    def all(self) -> Iterator[tuple[str, np.ndarray]]:
        """The target's names and values; each has been in the decoder's layout on its way."""
        move = functools.partial(in_order, buffers=self.buffers)
        for name, array in self.tensors(self.names):
            ours = out = array
            if name in self.places and self._source.kind == "Hugging Face":  # others come from there
                relayout = self.places[name].rule.relayout
                ours = move(relayout.to_jax(array))
                out = relayout.to_huggingface(ours, move)
            yield self._specs[name].name, out
            self.release(array, ours, out)

    def release(self, *arrays: np.ndarray) -> None:
        """The arrays' memory may be used again, as soon as it is hashed."""
        for index, array in enumerate(arrays):
            if any(np.may_share_memory(array, other) for other in arrays[:index]):
                continue
            if self._hashing is not None and np.may_share_memory(self._hashing[1], array):
                self._hashing[0].add_done_callback(functools.partial(_give_back, self.buffers, array))
            else:
                self.buffers.give(array)


def _give_back(buffers: Buffers, array: np.ndarray, _: Future[None]) -> None:
    buffers.give(array)


def _write_orbax(partial: Path, conversion: Conversion, passing: _Passing) -> None:
    held: dict[ArrayPath, np.ndarray] = {}
    cpu = jax.local_devices(backend="cpu")[0]

    def arrays(names: Sequence[str]) -> Iterator[tuple[ArrayPath, jax.Array]]:
        for name, array in passing.tensors(names):
            path, ours = (name,), array
            if (each := passing.places.get(name)) is not None:
                path = each.stored
                ours = in_order(each.rule.relayout.to_jax(array), passing.buffers)
            if not np.may_share_memory(ours, array):
                passing.release(array)
            held[path] = ours
            yield path, jax.device_put(ours, cpu, may_alias=True)  # without a copy

    def written(path: ArrayPath) -> None:
        passing.release(held.pop(path))

    write_store(partial / WEIGHTS, arrays(list(passing.places)), written)
    extra = [name for name in passing.names if name not in passing.places]
    if extra:
        write_store(partial / EXTRA, arrays(extra), written)


def _card(source: Source, tokenizer: TextTokenizer, name: str, weights_hash: str) -> str:
    return model_card(
        name=name,
        text_format=tokenizer.text_format,
        dim=source.config.dim,
        description=f"Converted from `{source.path.name}`.",
        causal=is_causal(source.huggingface_config),
        weights_hash=weights_hash,
    )


def _config(conversion: Conversion) -> Mapping[str, Any]:
    """`config.json`, with the dtype that the weights have now if that is another one."""
    before = {conversion.source.tensors[name].dtype for name in conversion.names}
    after = {spec.dtype for spec in conversion.specs}
    config = conversion.source.huggingface_config
    if before == after:
        return config
    keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["torch_dtype"]
    return {**config, **dict.fromkeys(keys, jnp.result_type(*after).name)}


def _copy_files(source: Path, target: Path) -> list[str]:
    """Copies all files but the model's weights, byte for byte, and the folders of modules; returns what it left out."""
    left = []
    for entry in sorted(source.iterdir()):
        name = entry.name
        if name.startswith(".") or name in (WEIGHTS, EXTRA, RECORD_FILE):
            continue
        if entry.is_dir() and _MODULE_FOLDER.fullmatch(name):
            for file in sorted(path for path in entry.rglob("*") if not path.is_dir()):
                inside = file.relative_to(source)
                (target / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file_inside(source, inside.as_posix()), target / inside)
        elif entry.is_dir():
            left.append(f"{name}/")
        elif not name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(file_inside(source, name), target / name)
        elif not name.startswith(("model", "pytorch_model")):
            left.append(name)
    return left
