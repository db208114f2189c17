"""Stores of arrays, as Orbax wrote them, read by TensorStore: on the host or onto devices, each process its own parts.

Orbax lays every array out anew, twice, in memory of its own, and reads all at once: when one is damaged, the reads of
the others end in tracebacks of a loop that is closed by then.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import tensorstore
from etils import epath

from jaxembed.checkpoint.buffers import Buffers
from jaxembed.errors import InputError

# Both of Orbax's ways to commit (rename on a file system, marker file in a bucket) write it last.
COMMIT_MARKER = "commit_success.txt"

STORE_ERRORS = (OSError, ValueError, RuntimeError)  # Orbax and TensorStore raise these, for a full disk too

ArrayPath = tuple[str, ...]
_Entry = TypeVar("_Entry")
_Part = tuple[tuple[int, int], ...]
_GROUP_BYTES = 256 << 20
_INDEX_BYTES = 100 << 20  # of a store's lists of its arrays and their parts, in memory


def store_contents(directory: epath.PathLike) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays of a store, by their keys, joined by dots.

    Raises:
        InputError: it is no readable Orbax checkpoint.
    """
    contents, end = {}, b"/zarr.json"
    context = _context()
    try:
        if not (epath.Path(directory) / COMMIT_MARKER).exists():
            raise ValueError("it is not there, or was not written to its end")
        keys = tensorstore.KvStore.open(_kvstore(directory), context=context).result().list().result()
        names = [key.removesuffix(end).decode() for key in keys if key.endswith(end)]
        for name, opening in {name: _open_array(directory, name, context) for name in names}.items():
            stored = opening.result()
            contents[name] = jax.ShapeDtypeStruct(stored.shape, stored.dtype.numpy_dtype)
    except STORE_ERRORS as error:
        raise InputError(f"{directory}: not a readable Orbax checkpoint: {first_line(error)}") from error
    return contents


def read_store(
    directory: epath.PathLike, wanted: Mapping[ArrayPath, jax.ShapeDtypeStruct]
) -> Iterator[tuple[ArrayPath, jax.Array]]:
    """Reads some arrays of a store in the order given, in groups of the size in which they are written.

    Of an array that is sharded over several processes each reads its own parts.

    Args:
        wanted: shapes, dtypes and shardings.

    Raises:
        InputError: an array cannot be read.
    """
    context = _context()
    for group in in_groups(wanted.items(), lambda entry: math.prod(entry[1].shape) * entry[1].dtype.itemsize):
        reading: dict[ArrayPath, dict[_Part, Any]] = {}
        openings = {path: _open_array(directory, ".".join(path), context) for path, _ in group}
        for path, leaf in group:
            with _reading(directory, path):
                stored = openings[path].result()
                parts = set(_parts(leaf).values())
                reading[path] = {part: stored[tuple(slice(*ends) for ends in part)].read() for part in parts}
        for path, leaf in group:
            with _reading(directory, path):
                found = {part: future.result() for part, future in reading.pop(path).items()}
            pieces = [jax.device_put(found[part], device) for device, part in _parts(leaf).items()]
            yield path, jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, pieces)


def read_to_host(
    directory: epath.PathLike, wanted: Mapping[ArrayPath, jax.ShapeDtypeStruct], buffers: Buffers
) -> Iterator[tuple[ArrayPath, np.ndarray]]:
    """Reads some arrays of a store in the order given, each into memory that `buffers` gives.

    Raises:
        InputError: an array cannot be read.
    """
    context = _context(file_io_mode={"mode": "memmap"})
    sizes = {path: math.prod(leaf.shape) * leaf.dtype.itemsize for path, leaf in wanted.items()}
    ahead = _ReadAhead(directory, sum(sizes.values()))
    for path, leaf in wanted.items():
        ahead.advance(sizes[path])
        array = buffers.take(sizes[path]).view(leaf.dtype).reshape(leaf.shape)
        with _reading(directory, path):
            stored = _open_array(directory, ".".join(path), context).result()
            tensorstore.array(array, context=context).write(stored).result()
        yield path, array


class _ReadAhead:
    """Has the system read a store's files in the order in which they were written, somewhat ahead of who reads them.

    Of a mapped file it reads little at a time by itself, and waits for the disk each time.
    """

    def __init__(self, directory: epath.PathLike, nbytes: int) -> None:
        """Does nothing where fewer than half of the store's bytes will be read, or the system has no such call."""
        files = [(path.stat(), path) for path in Path(directory).rglob("*") if path.is_file()]
        self._files = [(stat.st_size, path) for stat, path in sorted(files, key=lambda file: -file[0].st_mtime_ns)]
        if not hasattr(os, "posix_fadvise") or 2 * nbytes < sum(size for size, _ in self._files):
            self._files = []
        self._wanted = _GROUP_BYTES

    def advance(self, nbytes: int) -> None:
        """So many bytes more will be read now."""
        self._wanted += nbytes
        while self._files and self._wanted > 0:
            size, path = self._files.pop()
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            self._wanted -= size


def absolute(directory: epath.PathLike) -> epath.Path:
    """Orbax misreads relative paths, and `resolve` those of buckets."""
    path = epath.Path(directory)
    return path if "://" in os.fspath(path) else path.resolve()


def _kvstore(directory: epath.PathLike) -> dict[str, Any]:
    state = os.fspath(absolute(directory) / "state")
    base = state if "://" in state else {"driver": "file", "path": state}
    return {"driver": "ocdbt", "base": base, "cache_pool": "cache_pool#index"}


def _context(**resources: Any) -> tensorstore.Context:
    return tensorstore.Context({**resources, "cache_pool#index": {"total_bytes_limit": _INDEX_BYTES}})


def _open_array(directory: epath.PathLike, name: str, context: tensorstore.Context) -> Any:
    """A future of the array; parts that its files lack are an error when they are read."""
    spec = {"driver": "zarr3", "kvstore": {**_kvstore(directory), "path": name}, "fill_missing_data_reads": False}
    return tensorstore.open(spec, context=context, open=True)


@contextlib.contextmanager
def _reading(directory: epath.PathLike, path: ArrayPath) -> Iterator[None]:
    """What TensorStore raises as an `InputError` that names the array."""
    try:
        yield
    except STORE_ERRORS as error:
        raise InputError(f"{directory}: {'/'.join(path)} cannot be read: {first_line(error)}") from error


def _parts(leaf: jax.ShapeDtypeStruct) -> dict[Any, _Part]:
    """By device of this process: where the part of an array begins and ends in each dimension."""
    sharding: Any = leaf.sharding
    return {
        device: tuple(ends.indices(size)[:2] for ends, size in zip(index, leaf.shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items()
    }


def in_groups(entries: Iterable[_Entry], nbytes: Callable[[_Entry], int]) -> Iterator[list[_Entry]]:
    group: list[_Entry] = []
    size = 0
    for entry in entries:
        if group and size + nbytes(entry) > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(entry)
        size += nbytes(entry)
    if group:
        yield group


def first_line(error: Exception) -> str:
    message = str(error).strip().partition(" [tensorstore_spec=")[0]
    return f"{type(error).__name__}: {message.splitlines()[0][:500] if message else '(no message)'}"
