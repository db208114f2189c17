"""GELU and its gradient, against torch in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxembed.ops.activations import gelu


@given(arrays(np.float32, (16,), elements=st.floats(-200, 200, width=32)))
@settings(max_examples=100, deadline=None)
def test_value_and_slope_are_those_of_torch(x: np.ndarray) -> None:
    leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.gelu(leaf, approximate="tanh")
    expected.sum().backward()
    assert leaf.grad is not None
    np.testing.assert_allclose(gelu(jnp.asarray(x)), expected.detach(), rtol=1e-6, atol=1e-6)
    slope = jax.grad(lambda x: gelu(x).sum())(jnp.asarray(x))
    np.testing.assert_allclose(slope, leaf.grad, rtol=1e-6, atol=2e-6)


def test_bfloat16_is_rounded_once() -> None:
    x, weights = jnp.asarray(np.random.default_rng(0).normal(0, 2, (2, 512)), jnp.bfloat16)
    wide = x.astype(jnp.float32)
    np.testing.assert_array_equal(gelu(x), gelu(wide).astype(jnp.bfloat16))
    found = jax.grad(lambda x: (gelu(x) * weights).sum())(x)
    exact = jax.grad(lambda x: (gelu(x) * weights.astype(jnp.float32)).sum())(wide)
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))
