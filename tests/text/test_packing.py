"""Packing: nothing lost, nothing twice, nothing overlapping, little empty."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.text.packing import (
    RowShape,
    best_fit_rows,
    call_shapes,
    deal_rows,
    density,
    fill_rows,
    plan_calls,
    slots_of,
)

row_lengths = st.integers(1, 200)


@st.composite
def texts_and_rows(draw) -> tuple[np.ndarray, int]:
    row_length = draw(row_lengths)
    return np.array(draw(st.lists(st.integers(1, row_length), max_size=60)), np.int64), row_length


def assert_all_once(members: list[list[int]], texts: int) -> None:
    assert sorted(text for inside in members for text in inside) == list(range(texts))


def naive_best_fit(lengths: np.ndarray, row_length: int) -> int:
    """Rows that best-fit decreasing needs, by its definition."""
    left: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [row for row, space in enumerate(left) if space >= length]
        if fitting:
            left[min(fitting, key=left.__getitem__)] -= length
        else:
            left.append(row_length - length)
    return len(left)


@given(texts_and_rows(), st.integers(1, 8))
@settings(deadline=None)
def test_rows_hold_every_text_once_within_their_length_and_slots(case: tuple[np.ndarray, int], slots: int) -> None:
    lengths, row_length = case
    rows = best_fit_rows(lengths, row_length, slots)
    assert_all_once(rows, len(lengths))
    for inside in rows:
        assert 1 <= len(inside) <= slots
        assert lengths[inside].sum() <= row_length


@given(texts_and_rows())
@settings(deadline=None)
def test_as_many_rows_as_best_fit_decreasing(case: tuple[np.ndarray, int]) -> None:
    """Which is within 11/9 of the fewest, plus one; and no two rows could be one, as for every first or best fit."""
    lengths, row_length = case
    rows = best_fit_rows(lengths, row_length, slots=len(lengths) + 1)
    assert len(rows) == naive_best_fit(lengths, row_length)
    filled = sorted(int(lengths[inside].sum()) for inside in rows)
    assert len(filled) < 2 or filled[0] + filled[1] > row_length


def test_rows_are_the_same_every_time() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 300)
    assert best_fit_rows(lengths, 128, 16) == best_fit_rows(lengths.copy(), 128, 16)


def test_many_texts_take_no_time_to_speak_of() -> None:
    lengths = np.random.default_rng(0).integers(1, 512, 50_000)
    rows = best_fit_rows(lengths, 512, 64)
    assert lengths.sum() / (512 * len(rows)) > 0.99


@given(texts_and_rows(), st.integers(1, 8), st.integers(0, 3), st.none() | st.integers(0, 9))
@settings(deadline=None)
def test_filled_rows_are_the_texts(case: tuple[np.ndarray, int], slots: int, spare: int, skip: int | None) -> None:
    lengths, row_length = case
    texts = [np.arange(length, dtype=np.int32) + 1000 * (i + 1) for i, length in enumerate(lengths)]
    members = best_fit_rows(lengths, row_length, slots)
    shape = RowShape(row_length, len(members) + spare, slots)
    skipped = None if skip is None else [(skip + i) % 10 for i in range(len(texts))]
    rows = fill_rows(texts, members, shape, 7, skipped)
    assert rows.tokens.shape == rows.segments.shape == (shape.rows, row_length)
    assert rows.first.shape == rows.last.shape == rows.texts.shape == (shape.rows, slots)
    np.testing.assert_array_equal(rows.tokens[rows.segments == 0], 7)
    assert (rows.segments > 0).sum() == lengths.sum()
    np.testing.assert_array_equal(rows.texts >= 0, rows.last >= 0)
    np.testing.assert_array_equal(rows.texts >= 0, rows.first >= 0)
    assert sorted(rows.texts[rows.texts >= 0]) == list(range(len(texts)))
    for row, slot in np.argwhere(rows.texts >= 0):
        ids = texts[rows.texts[row, slot]]
        place = np.flatnonzero(rows.segments[row] == slot + 1)
        np.testing.assert_array_equal(place, np.arange(place[0], place[0] + len(ids)))
        np.testing.assert_array_equal(rows.tokens[row, place], ids)
        assert rows.last[row, slot] == place[-1]
        assert rows.first[row, slot] == min(place[0] + (skipped[rows.texts[row, slot]] if skipped else 0), place[-1])


@given(st.integers(1, 9000), st.integers(1, 70_000), st.integers(1, 9))
def test_at_most_six_shapes_one_of_them_small(max_length: int, tokens: int, chips: int) -> None:
    shapes = call_shapes(max_length, tokens, chips)
    assert len(shapes) == len(set(shapes)) <= 6
    assert max(shape.length for shape in shapes) >= max_length
    assert min(shape.tokens for shape in shapes) <= 64 * chips
    for shape in shapes:
        assert shape.rows >= 1
        assert shape.rows % chips == 0
        assert shape.slots >= 1
        assert shape.tokens <= chips * max(tokens, shape.length)


@given(
    st.integers(1, 600).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), max_size=80))),
    st.sampled_from([64, 512, 4096]),
)
@settings(deadline=None)
def test_calls_hold_every_text_once_within_their_shape(case: tuple[int, list[int]], tokens: int) -> None:
    max_length, lengths = case[0], np.array(case[1], np.int64)
    shapes = call_shapes(max_length, tokens)
    calls = plan_calls(lengths, shapes)
    assert_all_once([inside for _, rows in calls for inside in rows], len(lengths))
    for shape, rows in calls:
        assert shape in shapes
        assert 1 <= len(rows) <= shape.rows
        for inside in rows:
            assert 1 <= len(inside) <= shape.slots
            assert lengths[inside].sum() <= shape.length
    assert 0 < density(calls, lengths) <= 1


def test_no_texts_need_no_calls() -> None:
    nothing = np.array([], np.int64)
    assert best_fit_rows(nothing, 64, 8) == []
    assert plan_calls(nothing, call_shapes(512, 4096)) == []
    assert density([], nothing) == 1
    rows = fill_rows([], [], RowShape(4, 2, 1))
    assert (rows.last == -1).all()
    assert (rows.segments == 0).all()


@pytest.mark.parametrize("length", [1, 20, 64])
def test_a_single_query_takes_the_small_shape(length: int) -> None:
    ((shape, rows),) = plan_calls(np.array([length]), call_shapes(512, 16_384))
    assert (shape.length, shape.rows, rows) == (64, 1, [[0]])


def test_the_last_call_takes_the_smallest_shape_that_holds_it() -> None:
    shapes = call_shapes(512, 4096)
    ((shape, _),) = plan_calls(np.array([500]), shapes)
    assert shape.tokens == min(s.tokens for s in shapes if s.length >= 500)


def clipped(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 2, 512).astype(np.int64)


RNG = np.random.default_rng(0)
SENTENCES, FUNCTIONS = clipped(RNG.lognormal(3, 0.6, 3000)), clipped(RNG.lognormal(4.8, 0.8, 3000))
PASSAGES = clipped(RNG.normal(180, 80, 3000))


@pytest.mark.parametrize(
    "lengths",
    [SENTENCES, FUNCTIONS, PASSAGES, np.concatenate([SENTENCES, FUNCTIONS, PASSAGES]), np.full(2000, 512)],
    ids=["sentences", "functions", "passages", "all", "full"],
)
def test_little_is_computed_for_nothing(lengths: np.ndarray, record_property) -> None:
    calls = plan_calls(lengths, call_shapes(512, 8192))
    record_property("density", density(calls, lengths))
    assert density(calls, lengths) >= 0.9


@given(st.integers(1, 10_000))
def test_slots_suit_texts_of_eight_tokens_or_four(length: int) -> None:
    typical = 4 if length <= 64 else 8
    assert slots_of(length) == max(1, math.floor(length / typical))


@pytest.mark.parametrize("lengths", [[5, 17], [0, 3]])
def test_texts_that_fit_no_row_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit rows of 16"):
        best_fit_rows(np.array(lengths), 16, 4)
    with pytest.raises(ValueError, match="do not fit rows of 16"):
        plan_calls(np.array(lengths), [RowShape(16, 2, 4)])


@given(st.lists(st.integers(1, 12), min_size=1, max_size=80), st.integers(1, 16), st.integers(0, 3))
def test_rows_are_dealt_so_that_chips_have_about_as_many_texts(sizes: list[int], chips: int, room: int) -> None:
    rows = [[index] * size for index, size in enumerate(sizes)]
    most = -(-len(rows) // chips) + room
    dealt = deal_rows(rows, chips, most)
    assert sorted(row[0] for some in dealt for row in some) == list(range(len(rows)))
    assert max(map(len, dealt)) <= most
    if room == 3 and len(rows) <= most:  # no limit: no chip is above another by more than its last row
        texts = [sum(map(len, some)) for some in dealt]
        assert max(texts) - min(texts) <= max(sizes)


def test_a_large_batch_is_dealt_nearly_evenly() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(80), 0.8, 3 * 1024), 5, 512).astype(np.int64)
    rows = best_fit_rows(lengths, 512, 64)
    dealt = deal_rows(rows, 64, -(-len(rows) // 64))
    assert max(sum(map(len, some)) for some in dealt) <= 1.1 * len(lengths) / 64
