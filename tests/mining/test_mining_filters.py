"""Rules one by one against a loop, and draws against their probabilities."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.errors import InputError
from jaxembed.mining.filters import Filters, Funnel, choose, survivors

# Scores on a grid, so that limits are met exactly.
grid = st.integers(-20, 20).map(lambda number: number / 20)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), queries=st.integers(1, 4), ranks=st.integers(1, 12))
def test_each_rule_leaves_what_its_formula_says(data: st.DataObject, queries: int, ranks: int) -> None:
    numbers = st.lists(st.lists(grid, min_size=ranks, max_size=ranks), min_size=queries, max_size=queries)
    scores = -np.sort(-np.array(data.draw(numbers), np.float32), axis=1)
    cross = np.array(data.draw(numbers))
    cross[cross > 0.8] = np.nan
    positive, cross_positive = (np.array(data.draw(st.lists(grid, min_size=queries, max_size=queries))) for _ in "ab")
    cross_positive[cross_positive > 0.9] = np.nan
    there = (
        np.arange(ranks)
        < np.array(data.draw(st.lists(st.integers(0, ranks), min_size=queries, max_size=queries)))[:, None]
    )
    first = data.draw(st.integers(1, 5))
    filters = Filters(
        first,
        data.draw(st.integers(first, 12)),
        share=data.draw(st.none() | st.sampled_from([0.5, 0.95, 1.0])),
        margin=data.draw(st.none() | st.sampled_from([-0.25, 0.0, 0.25])),
        largest=data.draw(st.none() | grid),
        cross_margin=data.draw(st.none() | st.sampled_from([-0.25, 0.0, 0.5])),
    )
    found = dict(survivors(filters, there, scores, positive.astype(np.float32), cross, cross_positive))
    *_, last = found.values()
    for query in range(queries):
        for rank in range(1, ranks + 1):
            s, c = float(scores[query, rank - 1]), cross[query, rank - 1]
            best, best_cross = float(np.float32(positive[query])), cross_positive[query]
            kept = there[query, rank - 1] and filters.first <= rank <= filters.last
            if filters.share is not None:
                kept = kept and s <= filters.share * best and s <= best
            if filters.margin is not None:
                kept = kept and s <= best - filters.margin
            if filters.largest is not None:
                kept = kept and s <= filters.largest
            if filters.cross_margin is not None:
                known = not math.isnan(c) and not math.isnan(best_cross)
                kept = kept and known and c <= best_cross - filters.cross_margin
            assert last[query, rank - 1] == kept
    masks = list(found.values())
    assert all((later <= earlier).all() for earlier, later in pairwise(masks))
    on = [filters.share, filters.margin, filters.largest, filters.cross_margin, filters.cross_margin]
    assert len(found) == 1 + sum(rule is not None for rule in on)


def test_the_nearest_are_taken_first() -> None:
    left = np.array([[True, False, True, True], [False, False, False, False], [False, True, False, False]])
    assert choose(left, 2).tolist() == [[0, 2], [-1, -1], [1, -1]]
    assert choose(left, 6).tolist() == [[0, 2, 3, -1, -1, -1], [-1] * 6, [1, -1, -1, -1, -1, -1]]


def test_draws_are_even_and_in_the_order_of_ranks() -> None:
    left = np.tile(np.arange(10) % 2 == 0, (20_000, 1))
    columns = choose(left, 2, np.random.default_rng(0))
    assert (np.diff(columns, axis=1) > 0).all()
    pairs, counts = np.unique(columns, axis=0, return_counts=True)
    assert len(pairs) == math.comb(5, 2)
    chi_square = ((counts - 2000) ** 2 / 2000).sum()
    assert chi_square < 27.9  # p = .001 at 9 degrees of freedom


def test_draws_do_not_depend_on_how_queries_are_divided() -> None:
    left = np.random.default_rng(1).random((30, 9)) < 0.6
    whole = choose(left, 3, np.random.default_rng(5))
    random = np.random.default_rng(5)
    parts = [choose(part, 3, random) for part in np.split(left, [4, 17])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert (choose(left, 3, np.random.default_rng(6)) != whole).any()


def test_the_funnel_adds_up() -> None:
    funnel = Funnel()
    for _ in range(2):
        funnel.add("all", 1000, 10)
        funnel.add("some", 250, 9)
    assert funnel.rows() == [("all", "2,000", "–", "20"), ("some", "500", "25.0%", "18")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": 0}, "expected 1 ≤ first ≤ last, found 0–100"),
        ({"first": 9, "last": 3}, "found 9–3"),
        ({"share": 0.0}, "more than 0 and at most 1"),
        ({"share": 1.5}, "found 1.5"),
        ({"margin": math.inf}, "margin: expected a finite number"),
        ({"cross_margin": math.nan}, "cross margin: expected"),
    ],
)
def test_numbers_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Filters(**options)
