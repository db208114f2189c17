"""Pooling against plain indexing."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxembed.ops.pooling import take_positions

X = np.random.default_rng(0).normal(size=(3, 7, 5)).astype(np.float32)


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
