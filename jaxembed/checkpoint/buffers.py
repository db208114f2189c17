"""Memory for tensors on their way, used again: pages that a process has not touched yet cost more than a copy does."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

_Item = TypeVar("_Item")

_ALIGNMENT = 64  # what JAX takes over on a CPU without a copy
_LARGEST_KEPT = 512 << 20


def aligned_empty(nbytes: int) -> np.ndarray:
    """Bytes that JAX takes over on CPU without a copy."""
    return _aligned(np.empty(nbytes + _ALIGNMENT, np.uint8), nbytes)


class Buffers:
    """Buffers that come back; safe to use from several threads."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._taken: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> np.ndarray:
        """Aligned bytes, of any content."""
        with self._lock:
            largest = 2 * nbytes + (1 << 20)
            fitting = [index for index, buffer in enumerate(self._free) if nbytes <= _room(buffer) <= largest]
            if fitting:
                buffer = self._free.pop(min(fitting, key=lambda index: len(self._free[index])))
            else:
                buffer = np.empty(nbytes + _ALIGNMENT, np.uint8)
            self._taken[id(buffer)] = buffer
        return _aligned(buffer, nbytes)

    def give(self, array: np.ndarray) -> None:
        """Takes back what `take` gave, by any view of it; nobody may look at it any more. Other memory is ignored."""
        owner = _owner(array)
        with self._lock:
            if self._taken.pop(id(owner), None) is not None and owner.nbytes <= _LARGEST_KEPT:
                self._free.append(owner)

    def leave(self, array: np.ndarray) -> None:
        """What `take` gave stays with who has it, and goes when nobody looks at it any more."""
        with self._lock:
            self._taken.pop(id(_owner(array)), None)


def read_ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """The same, the next one made in a thread while the present one is worked on; none of them is None."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = reader.submit(next, items, None)
            yield item


def _owner(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _room(buffer: np.ndarray) -> int:
    return buffer.nbytes - _ALIGNMENT


def _aligned(buffer: np.ndarray, nbytes: int) -> np.ndarray:
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + nbytes]
