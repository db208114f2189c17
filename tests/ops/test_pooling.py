"""Pooling against plain indexing and float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxembed.ops.pooling import mean_states, places, take_positions

X = np.random.default_rng(0).normal(size=(3, 7, 5)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).integers(1, 9, (3, 7)).astype(np.float32)
bounds = arrays(np.int32, (2, 3, 4), elements=st.integers(0, 6)).map(lambda pair: np.sort(pair, axis=0))


@given(arrays(np.int32, (3, 4), elements=st.integers(-1, 6)))
@settings(max_examples=50, deadline=None)
def test_each_slot_gets_the_state_of_its_own_row(positions: np.ndarray) -> None:
    found = np.asarray(take_positions(jnp.asarray(X), jnp.asarray(positions)))
    for row, slot in np.ndindex(positions.shape):
        np.testing.assert_array_equal(found[row, slot], X[row, max(positions[row, slot], 0)])


def test_gradient_reaches_the_positions_alone() -> None:
    positions = jnp.array([[6, 2], [0, 0], [3, 3]])
    gradient = jax.grad(lambda x: take_positions(x, positions).sum())(jnp.asarray(X))
    counts = np.zeros((3, 7))
    np.add.at(counts, (np.arange(3)[:, None], np.asarray(positions)), 1)
    np.testing.assert_array_equal(gradient, np.broadcast_to(counts[:, :, None], X.shape))


@given(bounds, st.booleans(), arrays(np.bool_, (3, 4)))
@settings(max_examples=50, deadline=None)
def test_means_are_those_of_numpy(bounds: np.ndarray, weighted: bool, empty: np.ndarray) -> None:
    first, last = np.where(empty, -1, bounds)
    weights = jnp.asarray(WEIGHTS) if weighted else None
    found = np.asarray(mean_states(*map(jnp.asarray, (X, first, last)), weights))
    assert found.dtype == np.float32
    for row, slot in np.ndindex(empty.shape):
        if empty[row, slot]:
            np.testing.assert_array_equal(found[row, slot], 0)
            continue
        inside = slice(first[row, slot], last[row, slot] + 1)
        expected = np.average(
            X[row, inside].astype(np.float64), axis=0, weights=WEIGHTS[row, inside] if weighted else None
        )
        np.testing.assert_allclose(found[row, slot], expected, atol=1e-6)


def test_gradient_of_a_mean_is_its_weights() -> None:
    first, last = jnp.array([[1], [0], [-1]]), jnp.array([[3], [6], [-1]])
    gradient = np.asarray(jax.grad(lambda x: mean_states(x, first, last, jnp.asarray(WEIGHTS)).sum())(jnp.asarray(X)))
    shares = np.zeros((3, 7))
    shares[0, 1:4] = WEIGHTS[0, 1:4] / WEIGHTS[0, 1:4].sum()
    shares[1] = WEIGHTS[1] / WEIGHTS[1].sum()
    np.testing.assert_allclose(gradient, np.broadcast_to(shares[:, :, None], X.shape), atol=1e-7)


def test_bfloat16_states_are_averaged_in_float32() -> None:
    states = jnp.full((1, 4096, 1), 1.0, jnp.bfloat16).at[0, ::2].set(1.0078125)
    found = mean_states(states, jnp.array([[0]]), jnp.array([[4095]]))
    np.testing.assert_allclose(found, (1 + 1.0078125) / 2, rtol=1e-6)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_places_are_counted_from_the_beginning_of_a_segment(lengths: list[int], before: int, after: int) -> None:
    numbers = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    segments = np.concatenate([np.zeros(before, int), numbers, np.zeros(after, int)]).astype(np.int32)
    inside = segments > 0
    expected = np.concatenate([np.arange(1, length + 1) for length in lengths])
    np.testing.assert_array_equal(np.asarray(places(jnp.asarray(segments[None])))[0, inside], expected)
