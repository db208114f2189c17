"""Packing: texts of any length into rows of a fixed one, several texts a row, with little padding.

`Rows` is what the decoder takes. Two callers fill them: training packs one batch into rows of one length
(`best_fit_rows`), encoding packs any number of texts into calls of a few shapes (`plan_calls`).
"""

import dataclasses
import heapq
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows. A text is one segment of one row; its embedding is read in one slot of that row."""

    tokens: Int[np.ndarray, "rows length"]
    segments: Int[np.ndarray, "rows length"]
    """1, 2, … for the texts of a row, 0 for padding."""
    first: Int[np.ndarray, "rows slots"]
    """Position of each text's first token that may be pooled, −1 for an empty slot."""
    last: Int[np.ndarray, "rows slots"]
    """Position of each text's last token, −1 for an empty slot."""
    texts: Int[np.ndarray, "rows slots"]
    """Which text each slot holds, −1 for an empty slot."""


@dataclasses.dataclass(frozen=True, order=True)
class RowShape:
    """The shape of one compiled call."""

    length: int
    rows: int
    slots: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def slots_of(length: int) -> int:
    """How many texts a row may hold: enough for texts of eight tokens, of four in short rows."""
    return max(1, length // 4) if length <= 64 else length // 8


def best_fit_rows(lengths: Int[np.ndarray, " texts"], row_length: int, slots: int) -> list[list[int]]:
    """Best-fit decreasing: the longest text first, each into the fullest row that still takes it.

    Returns:
        The texts of each row; as many rows as it takes.

    Raises:
        ValueError: a text without tokens, or longer than a row.
    """
    _check_lengths(lengths, row_length)
    rows: list[list[int]] = []
    free: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows by tokens left
    open_spaces = 0  # bit s is set where free[s] holds a row
    for text in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[text])
        candidates = open_spaces >> length
        if candidates:
            space = length + (candidates & -candidates).bit_length() - 1
            row = free[space].pop()
            if not free[space]:
                open_spaces ^= 1 << space
        else:
            space, row = row_length, len(rows)
            rows.append([])
        rows[row].append(text)
        left = space - length
        if left and len(rows[row]) < slots:
            free[left].append(row)
            open_spaces |= 1 << left
    return rows


def deal_rows(rows: Sequence[list[int]], chips: int, most: int) -> list[list[list[int]]]:
    """The rows of each chip, at most `most`, so that all hold about as many texts: the fullest row first, each to the
    chip with the fewest texts so far (Graham's longest processing time, SIAM J. Appl. Math. 17, 1969).
    """
    dealt: list[list[list[int]]] = [[] for _ in range(chips)]
    loads = [(0, chip) for chip in range(chips)]
    for row in sorted(rows, key=len, reverse=True):
        texts, chip = heapq.heappop(loads)
        dealt[chip].append(row)
        if len(dealt[chip]) < most:
            heapq.heappush(loads, (texts + len(row), chip))
    return dealt


def fill_rows(
    texts: Sequence[Int[np.ndarray, " _"]],
    members: Sequence[Sequence[int]],
    shape: RowShape,
    pad: int = 0,
    skipped: Sequence[int] | Int[np.ndarray, " texts"] | None = None,
) -> Rows:
    """Lays the texts of each row one after another; rows without members are padding.

    Args:
        skipped: of each text, how many leading tokens are not pooled; None: all are. The last token always is.
    """
    tokens = np.full((shape.rows, shape.length), pad, np.int32)
    segments = np.zeros((shape.rows, shape.length), np.int32)
    first = np.full((shape.rows, shape.slots), -1, np.int32)
    last = np.full((shape.rows, shape.slots), -1, np.int32)
    which = np.full((shape.rows, shape.slots), -1, np.int32)
    for row, inside in enumerate(members):
        start = 0
        for slot, text in enumerate(inside):
            ids = texts[text]
            stop = start + len(ids)
            tokens[row, start:stop] = ids
            segments[row, start:stop] = slot + 1
            first[row, slot] = start if skipped is None else min(start + skipped[text], stop - 1)
            last[row, slot] = stop - 1
            which[row, slot] = text
            start = stop
    return Rows(tokens, segments, first, last, which)


def call_shapes(max_length: int, tokens: int, chips: int = 1) -> tuple[RowShape, ...]:
    """The shapes of encoding: at most five of about `tokens` tokens a chip, and a small one for a single query.

    Rows are a multiple of `chips`, which share them.

    Between a whole and a half row lies one of three quarters (and so below), which keeps texts of just over half a row
    from wasting the rest: of the sets tried, these lengths left least padding on sentences, functions and passages.
    """
    shares = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 8) if max_length <= 1024 else (1, 1 / 2, 1 / 4, 1 / 8, 1 / 32)
    lengths = dict.fromkeys(16 * math.ceil(share * max_length / 16) for share in shares)
    query = min(64, max(lengths))
    shapes = [RowShape(length, chips * max(1, tokens // length), slots_of(length)) for length in lengths]
    return tuple(dict.fromkeys([*shapes, RowShape(query, chips, slots_of(query))]))


def plan_calls(
    lengths: Int[np.ndarray, " texts"], shapes: Sequence[RowShape]
) -> list[tuple[RowShape, list[list[int]]]]:
    """Distributes texts over calls of the given shapes.

    Each text goes to the shortest rows that hold it, longest rows first; what is left free there, in rows and in a
    half-empty last call, is filled with shorter texts, the longest that fits each time. What is left for the very last
    call goes into the smallest shape that holds it.

    Returns:
        For each call its shape and the texts of each of its rows.

    Raises:
        ValueError: a text without tokens, or longer than the longest row.
    """
    _check_lengths(lengths, max(shape.length for shape in shapes))
    by_length: dict[int, list[int]] = {}
    for text in np.argsort(lengths, kind="stable")[::-1].tolist():
        by_length.setdefault(int(lengths[text]), []).append(text)
    waiting = sum(1 << length for length in by_length)

    def take(at_most: int) -> tuple[int, int] | None:
        """The longest waiting text of at most that many tokens."""
        nonlocal waiting
        length = (waiting & ((1 << (at_most + 1)) - 1)).bit_length() - 1
        if length < 0:
            return None
        text = by_length[length].pop()
        if not by_length[length]:
            waiting ^= 1 << length
        return text, length

    by_rows = sorted({shape.length: shape for shape in sorted(shapes, key=lambda s: s.tokens)}.values(), reverse=True)
    calls: list[tuple[RowShape, list[list[int]]]] = []
    for index, shape in enumerate(by_rows):
        shorter = by_rows[index + 1].length if index + 1 < len(by_rows) else 0
        rows: list[list[int]] = []
        while waiting.bit_length() - 1 > shorter or (rows and waiting and len(rows) % shape.rows):
            row: list[int] = []
            space = shape.length
            while len(row) < shape.slots and (found := take(space)):
                row.append(found[0])
                space -= found[1]
            rows.append(row)
        calls.extend((shape, rows[i : i + shape.rows]) for i in range(0, len(rows), shape.rows))
    if calls:
        shape, rows = calls[-1]
        needed = max(sum(int(lengths[text]) for text in row) for row in rows)
        most = max(map(len, rows))
        fitting = [s for s in shapes if s.rows >= len(rows) and s.length >= needed and s.slots >= most]
        calls[-1] = (min(fitting, key=lambda s: s.tokens), rows)
    return calls


def density(calls: Sequence[tuple[RowShape, list[list[int]]]], lengths: Int[np.ndarray, " texts"]) -> float:
    """Share of the computed positions that hold a token of a text."""
    total = sum(shape.tokens for shape, _ in calls)
    return float(np.sum(lengths)) / total if total else 1.0


def _check_lengths(lengths: Int[np.ndarray, " texts"], longest: int) -> None:
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= longest:
        raise ValueError(f"texts of {lengths.min()} to {lengths.max()} tokens do not fit rows of {longest}")
