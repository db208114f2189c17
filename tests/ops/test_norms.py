"""Normalisations against torch, in value and gradient, and at their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxembed.ops.norms import layer_norm, unit_norm

floats = st.floats(-100, 100, width=32)


@given(arrays(np.float32, (3, 8), elements=floats), st.sampled_from([1e-5, 1e-3]))
@settings(max_examples=50, deadline=None)
def test_layer_norm_is_that_of_torch(x: np.ndarray, epsilon: float) -> None:
    rng = np.random.default_rng(0)
    scale, bias = rng.normal(size=(2, 8)).astype(np.float32)
    expected = torch.nn.functional.layer_norm(
        torch.tensor(x, dtype=torch.float64), (8,), torch.tensor(scale).double(), torch.tensor(bias).double(), epsilon
    )
    found = layer_norm(jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias), epsilon)
    # Where all numbers of a row are nearly one, their differences are rounding, divided by √ε at most.
    slack = 1e-5 + np.abs(x).max(1, keepdims=True) * 1e-6 / np.sqrt(
        x.astype(np.float64).var(1, keepdims=True) + epsilon
    )
    assert (np.abs(found - expected.numpy()) <= slack * 3).all()


def test_layer_norm_of_bfloat16_has_statistics_in_float32() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(10, 1, (4, 512)), jnp.bfloat16)
    ones, zeros = jnp.ones(512), jnp.zeros(512)
    found = layer_norm(x, ones, zeros, 1e-5)
    assert found.dtype == jnp.bfloat16
    exact = layer_norm(x.astype(jnp.float32), ones, zeros, 1e-5)
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


@given(arrays(np.float32, (4, 6), elements=floats))
@settings(max_examples=50, deadline=None)
def test_unit_norm_is_that_of_torch(x: np.ndarray) -> None:
    x[np.linalg.norm(x, axis=1) < 1e-10] = 0  # below, float32 squares vanish
    expected = torch.nn.functional.normalize(torch.tensor(x, dtype=torch.float64), dim=-1)
    np.testing.assert_allclose(unit_norm(jnp.asarray(x)), expected, atol=1e-6)


def test_gradient_of_unit_norm_is_that_of_torch() -> None:
    x, weights = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    leaf = torch.tensor(x, requires_grad=True)
    (torch.nn.functional.normalize(leaf, dim=-1) * torch.tensor(weights)).sum().backward()
    found = jax.grad(lambda x: (unit_norm(x) * weights).sum())(jnp.asarray(x))
    assert leaf.grad is not None
    np.testing.assert_allclose(found, leaf.grad, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_nothing_is_not_a_number_at_zero(value: float) -> None:
    """Empty slots may hold anything; a NaN there would spread to every weight."""
    x = jnp.full((2, 4), value)
    assert np.isfinite(unit_norm(x)).all()
    assert np.isfinite(jax.grad(lambda x: unit_norm(x).sum())(x)).all()
