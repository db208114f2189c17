"""Epoch plans: nothing lost, nothing twice, nothing by chance, and no text twice in a batch where that can be."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from jaxembed.data.plan import DataSet, Mixing, epoch_plan, run_plan
from jaxembed.errors import InputError


def hashes_of(texts):
    """A hash for each text number, in no order."""
    return (np.arange(texts, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)


def distinct(*sizes, columns=2, weights=None):
    """Data sets in which every text is another, and the hashes of the texts."""
    total = sum(sizes)
    texts = np.arange(total * columns).reshape(total, columns)
    parts = np.split(texts, np.cumsum(sizes)[:-1])
    weights = weights or [None] * len(sizes)
    sets = [DataSet(f"set {i}", part, weight) for i, (part, weight) in enumerate(zip(parts, weights))]
    return sets, hashes_of(total * columns)


def count_clashes(order, texts, text_hashes):
    """Examples that share a text with an earlier one of their batch, counted one by one."""
    clashes = 0
    for batch in order:
        seen = set()
        for example in batch:
            own = {int(text_hashes[text]) for text in texts[example] if text >= 0}
            clashes += bool(own & seen)
            seen |= own
    return clashes


sizes = st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 0)


@given(sizes=sizes, batch_size=st.integers(1, 20), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_example_at_most_once_and_less_than_a_batch_dropped(sizes, batch_size, seed, epoch):
    sets, hashes = distinct(*sizes)
    if sum(sizes) < batch_size:
        with pytest.raises(InputError, match=f"batch_size is {batch_size} pairs and the data has {sum(sizes)}"):
            epoch_plan(sets, hashes, batch_size, seed, epoch)
        return
    plan = epoch_plan(sets, hashes, batch_size, seed, epoch)
    examples = plan.order.ravel()
    assert plan.order.shape == (sum(sizes) // batch_size, batch_size)
    assert len(set(examples.tolist())) == len(examples)
    assert examples.min() >= 0
    assert examples.max() < sum(sizes)
    assert (plan.clashes, plan.swapped) == (0, 0)


@given(
    texts=st.lists(st.lists(st.integers(-1, 30), min_size=3, max_size=3), min_size=8, max_size=60),
    batch_size=st.integers(1, 8),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_the_clashes_it_tells_are_those_that_are_there(texts, batch_size, seed):
    texts = np.array(texts)
    sets, hashes = [DataSet("a", texts[:5]), DataSet("b", texts[5:])], hashes_of(31)
    plan = epoch_plan(sets, hashes, batch_size, seed, 0)
    # Which example of a group is the one too many differs between the two counts; whether there is one does not.
    assert (plan.clashes > 0) == (count_clashes(plan.order, texts, hashes) > 0)
    examples = plan.order.ravel().tolist()
    assert len(set(examples)) == len(examples)


@given(
    pairs=st.integers(1, 12),
    batch_size=st.integers(2, 8),
    batches=st.integers(4, 8),
    column=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=80, deadline=None)
def test_no_clash_where_each_text_is_shared_by_two(pairs, batch_size, batches, column, seed):
    """Anchor with anchor, document with document, anchor with document."""
    total = batch_size * batches
    pairs = min(pairs, total // 2)
    texts = np.arange(total * 3).reshape(total, 3)
    texts[total - pairs :, column[0]] = texts[:pairs, column[1]]
    plan = epoch_plan([DataSet("a", texts)], hashes_of(total * 3), batch_size, seed, 0)
    assert plan.clashes == 0
    assert count_clashes(plan.order, texts, hashes_of(total * 3)) == 0
    assert sorted(plan.order.ravel().tolist()) == list(range(total))


def test_an_example_that_has_a_text_twice_does_not_clash_with_itself():
    texts = np.repeat(np.arange(12)[:, None], 3, axis=1)
    plan = epoch_plan([DataSet("a", texts)], hashes_of(12), 6, 0, 0)
    assert (plan.clashes, plan.swapped) == (0, 0)


def test_what_cannot_be_parted_is_counted():
    texts = np.stack([np.arange(12), np.full(12, 12)], axis=1)
    assert epoch_plan([DataSet("a", texts)], hashes_of(13), 6, 0, 0).clashes == 10
    assert epoch_plan([DataSet("a", texts)], hashes_of(13), 12, 0, 0).clashes == 11
    assert epoch_plan([DataSet("a", texts)], hashes_of(13), 1, 0, 0).clashes == 0


def test_the_same_inputs_give_the_same_plan_and_others_another():
    def plan(seed=3, epoch=1, batch_size=8, sizes=(50, 30), shift=0, weights=None):
        sets, hashes = distinct(*sizes, weights=weights)
        return epoch_plan(sets, hashes + np.uint64(shift), batch_size, seed, epoch)

    first = plan()
    np.testing.assert_array_equal(plan().order, first.order)
    assert plan().hash == first.hash
    changes = [
        {"seed": 4},
        {"epoch": 2},
        {"batch_size": 4},
        {"sizes": (49, 31)},
        {"shift": 1},
        {"weights": [50.0, 30.0]},
    ]
    hashes = [plan(**change).hash for change in changes]
    assert len({first.hash, *hashes}) == len(changes) + 1
    assert (plan(epoch=2).order != first.order).any()


def test_data_sets_are_spread_evenly():
    sets, hashes = distinct(3000, 1000)
    plan = epoch_plan(sets, hashes, 40, 0, 0)
    of_the_second = (plan.order >= 3000).sum(axis=1)
    assert np.abs(of_the_second - 10).max() <= 3
    assert of_the_second.sum() == 1000


def test_weights_are_shares_and_nothing_comes_again_before_all_came():
    sets, hashes = distinct(100, 60, weights=[1.0, 3.0])
    plans = [epoch_plan(sets, hashes, 10, 0, epoch) for epoch in range(5)]
    seen = np.concatenate([plan.order.ravel() for plan in plans])
    assert all((plan.order < 100).sum() == 40 for plan in plans)
    counts = Counter(seen.tolist())
    assert {counts[example] for example in range(100)} == {2}
    assert {counts[example] for example in range(100, 160)} == {10}
    # The second set comes twice an epoch; no example meets itself in a batch.
    assert all(len(set(batch.tolist())) == 10 for plan in plans for batch in plan.order)
    assert all(plan.clashes == 0 for plan in plans)


def test_a_weight_beside_none_is_in_examples():
    sets, hashes = distinct(100, 60, weights=[None, 300.0])
    assert (epoch_plan(sets, hashes, 16, 0, 0).order < 100).sum() == 40


def test_a_cap_is_what_an_epoch_takes_and_the_next_one_goes_on():
    sets, hashes = distinct(100, 30)
    plans = [epoch_plan(sets, hashes, 10, 0, epoch, Mixing(cap=40)) for epoch in range(5)]
    assert all(plan.order.shape == (7, 10) for plan in plans)
    counts = Counter(np.concatenate([plan.order.ravel() for plan in plans]).tolist())
    assert {counts[example] for example in range(100)} == {2}
    assert {counts[example] for example in range(100, 130)} == {5}


def test_a_cap_counts_for_data_sets_without_a_weight():
    sets, hashes = distinct(1000, 100, weights=[None, 300.0])
    plan = epoch_plan(sets, hashes, 10, 0, 0, Mixing(cap=100))
    assert plan.order.size == 200
    assert (plan.order >= 1000).sum() == 150


HOMOGENEOUS = Mixing(homogeneous=True)


@given(
    sizes=st.lists(st.integers(8, 60), min_size=1, max_size=4),
    weights=st.lists(st.one_of(st.none(), st.floats(0.1, 100)), min_size=4, max_size=4),
    cap=st.one_of(st.none(), st.integers(1, 70)),
    batch_size=st.integers(1, 8),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_homogeneous_batches(sizes, weights, cap, batch_size, seed):
    sets, hashes = distinct(*sizes, weights=weights[: len(sizes)])
    mixing = Mixing(homogeneous=True, cap=cap)
    epochs = 6
    try:
        plans = [epoch_plan(sets, hashes, batch_size, seed, epoch, mixing) for epoch in range(epochs)]
    except InputError:
        assert cap is not None  # the capped data is not one whole batch
        return
    ends = np.cumsum(sizes)
    order = np.concatenate([plan.order for plan in plans])
    of = np.searchsorted(ends, order, side="right")
    assert (of == of[:, :1]).all()
    for number, size in enumerate(sizes):
        # A pass is over before an example comes again, and leaves out less than a batch.
        own = order[of[:, 0] == number]
        a_pass = size // batch_size
        for start in range(0, len(own), a_pass):
            examples = own[start : start + a_pass].ravel()
            assert len(np.unique(examples)) == len(examples)
    if any(weight is not None for weight in weights[: len(sizes)]):
        shares = np.array([min(size, cap or size) if w is None else w for size, w in zip(sizes, weights)])
    else:
        shares = np.minimum(sizes, cap or max(sizes)).astype(float)
    expected = len(order) * shares / shares.sum()
    # An epoch counts whole examples, so that shares are rounded once; what is left is less than a batch a data set.
    rounding = epochs * len(sizes) * (1 + plans[0].order.shape[0] / sum(sizes) * len(sizes))
    assert np.abs(np.bincount(of[:, 0], minlength=len(sizes)) - expected).max() <= 1 + rounding


def test_no_text_twice_in_a_batch_of_one_set():
    texts = np.arange(160 * 2).reshape(160, 2)
    texts[100:110, 0] = texts[:10, 0]
    sets = [DataSet("a", texts[:120]), DataSet("b", texts[120:])]
    hashes = hashes_of(320)
    for epoch in range(5):
        plan = epoch_plan(sets, hashes, 10, 0, epoch, HOMOGENEOUS)
        assert plan.clashes == 0
        assert count_clashes(plan.order, texts, hashes) == 0


def test_a_data_set_smaller_than_a_batch_of_its_own():
    sets, hashes = distinct(100, 5, 0)
    with pytest.raises(InputError, match=r"'set 1' has 5 pairs, and a batch of one data set has 10.*data\.batches"):
        epoch_plan(sets, hashes, 10, 0, 0, HOMOGENEOUS)


@pytest.mark.parametrize("homogeneous", [True, False])
@pytest.mark.parametrize(
    ("weights", "cap", "shares"),
    [
        ((1.0, 2.0, 5.0), None, (1, 2, 5)),
        ((None, None, None), None, (700, 1300, 4000)),
        ((None, None, None), 1000, (700, 1000, 1000)),
        ((None, 2000.0, None), 500, (500, 2000, 500)),
    ],
)
def test_shares_over_ten_thousand_batches(homogeneous, weights, cap, shares):
    """Of batches, or of examples, closer than chance would have it: the hypothesis of these shares is not rejected."""
    sizes, batch_size, batches = (700, 1300, 4000), 16, 10_000
    sets, hashes = distinct(*sizes, weights=weights)
    schedule = run_plan(sets, hashes, batch_size, 0, steps=batches, mixing=Mixing(homogeneous, cap))
    ends = np.cumsum(sizes)
    found = np.zeros(3, np.int64)
    for step in range(batches):
        of = np.bincount(np.searchsorted(ends, schedule.batch(step), side="right"), minlength=3)
        assert not homogeneous or (of > 0).sum() == 1
        found += of // batch_size if homogeneous else of
    expected = np.array(shares) / sum(shares) * found.sum()
    assert chisquare(found, expected).pvalue > 0.99


def test_a_resumed_schedule_goes_on_identically():
    sets, hashes = distinct(70, 130, weights=[2.0, 1.0])
    whole = run_plan(sets, hashes, 8, 0, steps=300, mixing=HOMOGENEOUS)
    batches = [whole.batch(step) for step in range(300)]
    again = run_plan(sets, hashes, 8, 0, steps=300, mixing=HOMOGENEOUS)
    for step in (299, 150, *range(151, 299)):
        np.testing.assert_array_equal(again.batch(step), batches[step])
    assert again.hash == whole.hash
    assert run_plan(sets, hashes, 8, 0, steps=300).hash != whole.hash


@given(
    total=st.integers(5, 40),
    batch_size=st.integers(1, 5),
    epochs=st.sampled_from([0.3, 1, 2.5, 4]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_the_schedule_is_the_epochs_one_after_the_other(total, batch_size, epochs, seed):
    sets, hashes = distinct(total)
    schedule = run_plan(sets, hashes, batch_size, seed, epochs=epochs)
    plans = [epoch_plan(sets, hashes, batch_size, seed, epoch) for epoch in range(4)]
    expected = np.concatenate([plan.order for plan in plans])
    assert schedule.steps == max(1, round(epochs * (total // batch_size)))
    for step in np.random.default_rng(seed).permutation(schedule.steps).tolist():
        np.testing.assert_array_equal(schedule.batch(step), expected[step])
        epoch, index = schedule.position(step)
        assert step == epoch * schedule.steps_per_epoch + index
    assert schedule.hash == plans[0].hash
    for step in (-1, schedule.steps):
        with pytest.raises(IndexError, match=f"step {step} "):
            schedule.batch(step)


def test_the_schedule_serves_threads():
    sets, hashes = distinct(64)
    schedule = run_plan(sets, hashes, 4, 0, steps=100)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(schedule.batch, range(100)))
    expected = np.concatenate([epoch_plan(sets, hashes, 4, 0, epoch).order for epoch in range(7)])[:100]
    np.testing.assert_array_equal(np.stack(found), expected)


def test_the_length_of_a_run_is_given_once():
    sets, hashes = distinct(8)
    for lengths in ({}, {"epochs": 1, "steps": 3}):
        with pytest.raises(InputError, match="exactly one"):
            run_plan(sets, hashes, 2, 0, **lengths)


def test_a_million_examples_take_seconds():
    total = 1_000_000
    texts = np.arange(2 * total).reshape(total, 2)
    texts[: total // 10, 1] = total + np.random.default_rng(0).integers(0, total // 50, total // 10)
    began = time.perf_counter()
    plan = epoch_plan([DataSet("a", texts)], hashes_of(2 * total), 1024, 0, 0)
    assert time.perf_counter() - began < 20
    assert plan.clashes == 0
    assert plan.swapped > 0
