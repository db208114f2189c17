"""Cross-encoder scores from the pickle of {query: {passage: score}} that sentence-transformers publishes.

Unpickling would run whatever code a file names, and 160 million entries would take some 20 GB as Python objects. So the
file is read as a stream of opcodes, of which only those that make dictionaries of numbers are known, and the entries go
to the disk as they come: 8 bytes each.
"""

import array
import io
import pickletools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from etils import epath
from jaxtyping import Float32, Int32, Int64

from jaxembed.datasets.originals import Original, opened
from jaxembed.errors import InputError

_BLOCK = 1 << 20
_LONGEST = 1 << 10  # no opcode that is accepted is longer: LONG1 has 257 bytes
_MOST_STACKED = 1 << 22  # pickle writes a dictionary in pieces of 1,000 entries

_NUMBERS = frozenset("JKM\x8aG")  # BININT, BININT1, BININT2, LONG1, BINFLOAT
_NOTHING = frozenset("\x80\x95\x94qr")  # PROTO, FRAME, MEMOIZE, BINPUT, LONG_BINPUT: no entry is taken from the memo
_DICT, _MARK, _SET_ITEMS, _SET_ITEM, _STOP = "}", "(", "u", "s", "."
_ACCEPTED = _NUMBERS | _NOTHING | {_DICT, _MARK, _SET_ITEMS, _SET_ITEM, _STOP}


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of passages, query by query, on the disk.

    Attributes:
        queries: their ids, ascending.
        starts: where the entries of each query begin.
        ends: where they end.
        passages: ids of passages, query by query.
        values: the score of each.
    """

    queries: Int64[np.ndarray, " queries"]
    starts: Int64[np.ndarray, " queries"]
    ends: Int64[np.ndarray, " queries"]
    passages: Int32[np.ndarray, " entries"]
    values: Float32[np.ndarray, " entries"]

    def of(self, query: int) -> dict[int, float]:
        """Passage to score; empty for a query that has none."""
        place = int(np.searchsorted(self.queries, query))
        if place == len(self.queries) or self.queries[place] != query:
            return {}
        entries = slice(self.starts[place], self.ends[place])
        return dict(zip(self.passages[entries].tolist(), self.values[entries].tolist()))


def store_scores(path: epath.Path, original: Original, directory: Path) -> Scores:
    """Reads the pickle once and leaves its entries in two files of `directory`, mapped into memory.

    Raises:
        InputError: see `read_scores`; an id beyond 32 bits, a score that is not finite, a query that comes twice.
    """
    queries, counts = array.array("q"), array.array("q")
    passages_file, values_file = directory / "score_passages.bin", directory / "score_values.bin"
    largest = np.iinfo(np.int32).max
    with open(passages_file, "wb") as passages, open(values_file, "wb") as values:
        for query, ids, scores in read_scores(path, original):
            if not 0 <= query <= largest or (len(ids) and (ids.min() < 0 or ids.max() > largest)):
                raise InputError(f"{path}: query {query}: expected ids from 0 to {largest:,}")
            with np.errstate(over="ignore"):
                rounded = scores.astype(np.float32)
            if not np.isfinite(rounded).all():
                passage = ids[~np.isfinite(rounded)][0]
                raise InputError(f"{path}: query {query}: the score of passage {passage} is not a finite number")
            ids.astype(np.int32).tofile(passages)
            rounded.tofile(values)
            queries.append(query)
            counts.append(len(ids))
    order = np.argsort(np.asarray(queries, np.int64), kind="stable")
    ascending = np.asarray(queries, np.int64)[order]
    repeated = ascending[1:][ascending[1:] == ascending[:-1]]
    if len(repeated):
        raise InputError(f"{path}: query {repeated[0]} comes twice")
    ends = np.cumsum(np.asarray(counts, np.int64))
    starts = ends - np.asarray(counts, np.int64)
    # An empty file cannot be mapped.
    found = [
        np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)
        for file, dtype in ((passages_file, np.int32), (values_file, np.float32))
    ]
    return Scores(ascending, starts[order], ends[order], *found)


def read_scores(path: epath.Path, original: Original) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Each query of the pickle with its passages (int64) and their scores (float64), in the file's order.

    Nothing is executed: an opcode that does not make a dictionary, a whole number or a float ends the reading.

    Raises:
        InputError: file, offset in the pickle and opcode of what is not {query: {passage: score}} in pickle protocol 2
            to 5, or the file is truncated.
    """
    with opened(path, original, "scores") as stream:
        window = _Window(stream)
        try:
            yield from _entries(window, pickletools.genops(window.buffer))
        except _Refused as refused:
            raise InputError(f"{path}: {refused}. Expected a pickle of {{query: {{passage: score}}}}") from None
        except ValueError:  # of genops: an unknown opcode, or the argument of one that is cut off or malformed
            raise InputError(f"{path}: {window.failure()}. Nothing of it was executed") from None
        while stream.read(_BLOCK):  # to the checksum at the end
            pass


class _Refused(Exception):
    """Not what is expected; the message says what and where."""


class _Window:
    """A stretch of the stream in memory, moved on between opcodes; `genops` reads from `buffer`."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.buffer = io.BytesIO()
        self.offset = 0  # of the buffer's first byte
        self._stream = stream
        self.limit = 0  # an opcode that begins behind it might not be wholly in the buffer
        self.move()

    def move(self) -> None:
        """Drops what was read and reads on."""
        self.offset += self.buffer.tell()
        rest, block = self.buffer.read(), self._stream.read(_BLOCK)
        self.buffer.seek(0)
        self.buffer.truncate()
        self.buffer.write(rest + block)
        self.buffer.seek(0)
        self.limit = len(rest) + len(block) - (_LONGEST if block else 0)

    def failure(self) -> str:
        """Where and why `genops` could not go on: the buffer begins with a whole opcode."""
        self.buffer.seek(0)
        position = 0
        try:
            for _ in pickletools.genops(self.buffer):
                position = self.buffer.tell()
        except ValueError:
            pass
        code = self.buffer.getvalue()[position : position + 1]
        where = f"byte {self.offset + position:,} of the pickle"
        opcode = next((one for one in pickletools.opcodes if one.code == code.decode("latin-1")), None)
        if not code or (opcode is not None and opcode.code in _ACCEPTED):
            return f"{where}: the pickle is cut off"
        return f"{where}: opcode {opcode.name if opcode else f'0x{code.hex()}, which is none,'} is refused"


class _Dict:
    """A dictionary in the making, of numbers (`passages`, `scores`) or, at the bottom, of such dictionaries."""

    __slots__ = ("passages", "scores")

    def __init__(self) -> None:
        self.passages: list[np.ndarray] = []
        self.scores: list[np.ndarray] = []


def _entries(window: _Window, opcodes: Iterator[Any]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Follows the pickle's stack machine, of which only numbers, marks and dictionaries are left."""
    stack: list[Any] = []
    marks: list[int] = []
    protocol = None

    def refused(problem: str) -> _Refused:
        return _Refused(f"byte {window.offset + position:,} of the pickle: {problem}")

    for opcode, argument, position in opcodes:
        code = opcode.code
        if code in _NUMBERS:
            stack.append(argument)
        elif code == _DICT:
            stack.append(_Dict())
        elif code == _MARK:
            marks.append(len(stack))
        elif code in (_SET_ITEMS, _SET_ITEM):
            if code == _SET_ITEMS and not marks:
                raise refused("SETITEMS without a MARK")
            start = marks.pop() if code == _SET_ITEMS else len(stack) - 2
            items = stack[start:] if start > 0 else []
            if start < 1 or len(items) % 2 or not isinstance(stack[start - 1], _Dict) or (marks and marks[-1] >= start):
                raise refused(f"{opcode.name} without a dictionary and pairs before it")
            del stack[start:]
            try:
                yield from _set(stack, items[::2], items[1::2])
            except _Refused as problem:
                raise refused(str(problem)) from None
        elif code == _STOP:
            if protocol is None or marks or len(stack) != 1 or not isinstance(stack[0], _Dict):
                raise refused("it ends without being one dictionary of dictionaries")
        elif code not in _NOTHING:
            raise refused(f"opcode {opcode.name} is refused, and nothing was executed")
        elif code == "\x80":
            protocol = argument
            if not 2 <= argument <= 5:
                raise refused(f"protocol {argument}, expected 2 to 5")
        if position > window.limit:
            window.move()
            if len(stack) > _MOST_STACKED:
                raise refused(f"{len(stack):,} numbers that belong to no dictionary yet")


def _set(stack: Sequence[Any], keys: list[Any], values: list[Any]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Puts pairs into the dictionary on top of the stack; the outer one gives its pairs away instead."""
    target = stack[-1]
    if set(map(type, keys)) - {int}:
        raise _Refused("a key that is no whole number")
    kinds = set(map(type, values))
    if kinds <= {int, float} and len(stack) > 1:
        try:
            target.passages.append(np.array(keys, np.int64))
            target.scores.append(np.array(values, np.float64))
        except OverflowError:
            raise _Refused("a number beyond 64 bits") from None
    elif kinds == {_Dict} and len(stack) == 1:
        for query, inner in zip(keys, values):
            yield query, _joined(inner.passages, np.int64), _joined(inner.scores, np.float64)
    elif kinds:
        found = "/".join(sorted("dictionary" if kind is _Dict else "number" for kind in kinds))
        raise _Refused(f"a {found} as value at depth {'1' if len(stack) == 1 else '2 or more'}")


def _joined(pieces: list[np.ndarray], dtype: Any) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else np.zeros(0, dtype)
