"""Safetensors files of a model directory: found, checked and mapped tensor by tensor, and written in shards.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the header's length, a JSON header
`{name: {dtype, shape, data_offsets}}`, then the tensors' bytes without gaps. It is read here, not by the safetensors
package, so that numpy gets bfloat16, one tensor at a time is in memory, and every defect names its file and tensor
before a byte of weights is read.
"""

import abc
import functools
import itertools
import json
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from jaxembed.checkpoint.buffers import Buffers, aligned_empty
from jaxembed.errors import InputError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the safetensors package's own limit

# In the safetensors package's order, narrow to wide; files are laid out from wide to narrow, so that all is aligned.
_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}
_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


Box = tuple[tuple[int, int], ...]
"""A part of an array: where it starts and stops along each axis."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor whose values come later."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """The dtype as safetensors spells it, such as `"BF16"`."""
        return _DTYPE_NAMES[self.dtype]


@dataclass(frozen=True)
class StoredTensor(TensorSpec, abc.ABC):
    """A tensor in a file, not read yet."""

    file: Path

    @abc.abstractmethod
    def read(self, buffers: Buffers | None = None) -> np.ndarray:
        """The values, in C order; `buffers` may give the memory.

        Raises:
            InputError: they cannot be read; names file and tensor.
        """

    def read_box(self, shape: tuple[int, ...], box: Box, buffers: Buffers | None = None) -> np.ndarray:
        """A part of the values, seen as an array of `shape`; not necessarily in C order.

        Raises:
            InputError: they cannot be read; names file and tensor.
        """
        return self.read(buffers).reshape(shape)[tuple(slice(*each) for each in box)]


Stored = TypeVar("Stored", bound=StoredTensor)


@dataclass(frozen=True)
class TensorRef(StoredTensor):
    """A tensor in a safetensors file, at a byte offset that has been checked."""

    offset: int

    def read(self, buffers: Buffers | None = None) -> np.ndarray:
        return self._read_runs([self.offset], self.nbytes, buffers).reshape(self.shape)

    def read_box(self, shape: tuple[int, ...], box: Box, buffers: Buffers | None = None) -> np.ndarray:
        """In C order; of the file only the bytes of the box are read."""
        strides = [math.prod(shape[axis + 1 :]) * self.dtype.itemsize for axis in range(len(shape))]
        sizes = [stop - start for start, stop in box]
        # What lies together: along the innermost axis that the box cuts, with all that is behind it.
        cut = max((axis for axis, size in enumerate(sizes) if size < shape[axis]), default=0)
        before = (np.arange(*each) * stride for each, stride in zip(box[:cut], strides))
        starts = functools.reduce(np.add.outer, before, np.int64(self.offset + box[cut][0] * strides[cut]))
        return self._read_runs(starts.ravel().tolist(), sizes[cut] * strides[cut], buffers).reshape(sizes)

    def _read_runs(self, starts: Sequence[int], size: int, buffers: Buffers | None) -> np.ndarray:
        """The values in so many bytes from each start, one after the other.

        Read, not mapped: pages of a mapped file count as this process's memory until the last view is gone.
        """
        nbytes = len(starts) * size
        values = aligned_empty(nbytes) if buffers is None else buffers.take(nbytes)
        view, done = values.data, 0
        try:
            with self.file.open("rb", buffering=0) as stream:
                for end, start in enumerate(starts, 1):
                    stream.seek(start)
                    while done < end * size and (count := stream.readinto(view[done : end * size])):
                        done += count  # at most 2 GiB at once
                    if done < end * size:
                        raise InputError(
                            f"{self.file}: tensor {self.name!r} ends early: the file was cut since it was opened"
                        )
        except OSError as error:
            raise InputError(f"{self.file}: tensor {self.name!r} cannot be read: {error.strerror or error}") from error
        values.flags.writeable = False
        return values.view(self.dtype)


def open_tensors(directory: str | os.PathLike[str]) -> dict[str, TensorRef]:
    """All tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists, by name.

    Only headers are read. Raises `InputError`, naming file and tensor, where there are no weights, a file is damaged,
    lies outside the directory, or contradicts the index.
    """
    directory = Path(directory)
    if os.path.lexists(directory / SINGLE_FILE):
        return {ref.name: ref for ref in _read_header(file_inside(directory, SINGLE_FILE))}
    if os.path.lexists(directory / INDEX_FILE):
        return open_shards(file_inside(directory, INDEX_FILE), _read_header)
    raise InputError(_nothing_found(directory))


def open_file(directory: Path, name: str) -> dict[str, TensorRef]:
    """All tensors of one safetensors file of a directory, by name; `InputError` as from `open_tensors`."""
    return {ref.name: ref for ref in _read_header(file_inside(directory, name))}


def file_inside(directory: Path, name: str) -> Path:
    """The path of the file `name` of a model directory; links may not lead out of the directory.

    The links of a hub cache snapshot into the `blobs` of the same model are followed. Raises `InputError` if the file
    is elsewhere or is not there.
    """
    root = Path(os.path.realpath(directory))
    try:
        target = Path(os.path.realpath(root / name))
    except ValueError as error:  # null bytes, lone surrogates
        raise InputError(f"{directory}: {name!r} is no file name") from error
    if not any(target.is_relative_to(folder) for folder in (root, *_hub_blobs(root))):
        raise InputError(f"{directory}: {name!r} leads out of the model directory, to {str(target)!r}")
    if not target.is_file():
        raise InputError(f"{directory}: {name!r} is missing")
    return directory / name


def open_shards(index_file: Path, list_tensors: Callable[[Path], Iterable[Stored]]) -> dict[str, Stored]:
    """All tensors of the shards that an index file lists, by name; `list_tensors` lists those of one shard.

    Raises `InputError`, naming file and tensor, where a shard is missing, lies outside the directory, or contradicts
    the index.
    """
    directory = index_file.parent
    index = read_json(index_file)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f'{index_file}: expected {{"weight_map": {{tensor: file}}}}')
    found: dict[str, Stored] = {}
    # Every place is checked before any file is opened.
    for shard, file in [(shard, file_inside(directory, shard)) for shard in sorted(set(weight_map.values()))]:
        for tensor in list_tensors(file):
            where = f"{file}: tensor {tensor.name!r}"
            if tensor.name in found:
                raise InputError(f"{where} is in {str(found[tensor.name].file)!r} too")
            if tensor.name not in weight_map:
                raise InputError(f"{where} is not listed in {index_file.name}")
            found[tensor.name] = tensor
            if weight_map[tensor.name] != shard:
                raise InputError(f"{where} is in {weight_map[tensor.name]!r} according to {index_file.name}")
    for name, shard in weight_map.items():
        if name not in found:
            raise InputError(f"{directory / shard}: tensor {name!r} is listed in {index_file.name}, but not there")
    return found


def write_safetensors(
    directory: str | os.PathLike[str],
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
    take: Callable[[Path], object] | None = None,
    writer: int = 0,
    writers: int = 1,
) -> list[Path]:
    """Writes `model.safetensors`, or shards of at most `max_shard_bytes` and their index; returns the files' paths.

    `tensors` yields the values of `specs`, in the same order; one is held at a time. Files get their names when all
    of them are complete, and then replace whatever safetensors weights the directory had. `metadata` is the header's,
    by default `{"format": "pt"}`, as transformers writes it.

    With `take` each file of weights gets its name when it is complete, and is given to `take`, which may move it
    elsewhere. Of several `writers`, all of whom go through `tensors`, each writes files in turn.

    Raises `InputError` if a file cannot be written and `ValueError` if `tensors` are not those of `specs`.
    """
    if len({spec.name for spec in specs}) != len(specs):
        raise ValueError("specs: a tensor's name occurs twice")
    shards = _split(specs, max_shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE_FILE]
    file = directory = Path(directory)
    values = iter(tensors)
    pending: dict[Path, Path] = {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for number, (name, shard) in enumerate(zip(names, shards)):
            file = directory / name
            if number % writers != writer:
                deque(itertools.islice(values, len(shard)), maxlen=0)
                continue
            pending[file] = directory / f"{name}.tmp"
            _write_file(pending[file], shard, values, dict(metadata or {"format": "pt"}))
            if take is not None:
                os.replace(pending.pop(file), file)
                take(file)
        if next(values, None) is not None:
            raise ValueError("tensors: more of them than specs")
        if len(shards) > 1:
            file = directory / INDEX_FILE
            pending[file] = directory / f"{INDEX_FILE}.tmp"
            pending[file].write_text(_index(names, shards), encoding="utf-8")
        for file, temporary in pending.items():
            os.replace(temporary, file)
        for file in directory.iterdir() if take is None else ():
            if _WEIGHT_FILE.fullmatch(file.name) and file not in pending:
                file.unlink()
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror or error}") from error
    finally:
        for temporary in pending.values():
            temporary.unlink(missing_ok=True)
    return list(pending)


def read_json(file: Path) -> Any:
    """A file's JSON value. Raises `InputError` naming the file, also where a key occurs twice in an object."""
    try:
        text = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    return _parse_json(file, text)


def raw_bytes(array: np.ndarray) -> memoryview:
    """The values as they lie in a file, in C order; no copy where they lie so already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _read_header(file: Path) -> list[TensorRef]:
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if prefix == b"version ":
                raise InputError(
                    f"{file}: a git-lfs pointer, not the weights: run `git lfs pull`, or download the file"
                )
            if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise InputError(
                    f"{file}: a header of {length:,} bytes announced in a file of {size:,}: "
                    "truncated, or no safetensors file"
                )
            header = _parse_json(file, stream.read(length))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    if not isinstance(header, dict):
        raise InputError(f"{file}: the header is no JSON object")
    data = 8 + length
    refs = [_parse_entry(file, name, entry, data) for name, entry in header.items() if name != "__metadata__"]
    end = data
    for ref in sorted(refs, key=lambda ref: (ref.offset, ref.nbytes)):
        if ref.offset != end:
            problem = "overlaps the tensor before it" if ref.offset < end else "leaves a gap before it"
            raise InputError(f"{file}: tensor {ref.name!r} {problem}: starts at {ref.offset - data}, not {end - data}")
        end += ref.nbytes
        if end > size:
            raise InputError(
                f"{file}: tensor {ref.name!r} ends at byte {end:,} of a file of {size:,}: truncated; fetch it again"
            )
    if end != size:
        raise InputError(f"{file}: {size - end:,} bytes behind the last tensor belong to none")
    return refs


def _parse_entry(file: Path, name: str, entry: Any, data: int) -> TensorRef:
    where = f"{file}: tensor {name!r}"
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if all(
            type(size) is int and size >= 0 for size in shape
        ):
            pass
        case _:
            raise InputError(
                f"{where}: expected dtype, shape and data_offsets in the header, found {str(entry)[:200]!r}"
            )
    if dtype not in _DTYPES:
        raise InputError(f"{where}: dtype {dtype!r} cannot be read; weights are F32, F16 or BF16")
    ref = TensorRef(name, _DTYPES[dtype], tuple(shape), file, data + begin)
    if begin < 0 or end - begin != ref.nbytes:
        raise InputError(
            f"{where}: {dtype} {shape} takes {ref.nbytes:,} bytes; the header gives it bytes {begin} to {end}"
        )
    return ref


def _parse_json(file: Path, text: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
        return result

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: JSON expected: {error}") from error


def _hub_blobs(root: Path) -> list[Path]:
    """The blobs folder that belongs to `models--org--name/snapshots/revision[/…]`, if `root` is such a place."""
    return [
        folder.parent / "blobs"
        for folder in root.parents
        if folder.name == "snapshots" and folder.parent.name.startswith("models--")
    ]


def _nothing_found(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory}: no such directory"
    found = sorted(file.name for file in directory.iterdir() if file.suffix in (".safetensors", ".bin", ".pt", ".h5"))
    message = (
        f"{directory}: no weights: looked for {SINGLE_FILE} and {INDEX_FILE}, found {', '.join(found) or 'neither'}"
    )
    if any(name.startswith("pytorch_model") for name in found):
        message += (
            "; convert it once, where torch is installed: "
            f"`transformers.AutoModel.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})`"
        )
    return message


def _split(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _write_file(
    file: Path, shard: list[TensorSpec], values: Iterator[tuple[str, np.ndarray]], metadata: dict[str, str]
) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    begins: dict[str, int] = {}
    end = 0
    for spec in sorted(shard, key=lambda spec: (-_DTYPE_RANK[spec.dtype], spec.name)):
        begins[spec.name], end = end, end + spec.nbytes
        offsets = [begins[spec.name], end]
        header[spec.name] = {"dtype": spec.dtype_name, "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for spec in shard:
            name, array = next(values, ("nothing", np.empty(0)))
            if (name, array.dtype, array.shape) != (spec.name, spec.dtype, spec.shape):
                raise ValueError(f"tensors: expected {spec}, found {name!r}, {array.dtype}, {array.shape}")
            stream.seek(8 + len(text) + begins[name])
            stream.write(raw_bytes(array))


def _index(names: Sequence[str], shards: Sequence[Sequence[TensorSpec]]) -> str:
    weight_map = {spec.name: name for name, shard in zip(names, shards) for spec in shard}
    total = sum(spec.nbytes for shard in shards for spec in shard)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
