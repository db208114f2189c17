"""Attention against a float64 loop over queries: segments, padding, ALiBi, blocks, chosen positions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.ops import attention as module
from jaxembed.ops.alibi import alibi_slopes
from jaxembed.ops.attention import attention

ROWS, HEADS, HEAD_DIM = 2, 3, 4
fast = jax.jit(attention, static_argnames="causal")


def reference(q, k, v, segments, slopes, causal=True) -> np.ndarray:
    """One query at a time, over the keys of its segment (up to itself), ALiBi by the key's place in the segment."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    result = np.zeros_like(q)
    for row, head, query in np.ndindex(q.shape[0], q.shape[2], q.shape[1]):
        reach = query + 1 if causal else q.shape[1]
        keys = [key for key in range(reach) if segments[row, key] == segments[row, query]]
        scores = k[row, keys, head] @ q[row, query, head] / 2 + slopes[head] * np.array([key - keys[0] for key in keys])
        weights = np.exp(scores - scores.max())
        result[row, query, head] = weights / weights.sum() @ v[row, keys, head]
    return result


def random_inputs(length: int, cuts, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    q, k, v = (2 * rng.normal(size=(3, ROWS, length, HEADS, HEAD_DIM))).astype(np.float32)
    segments = np.zeros((ROWS, length), np.int32)
    for row in range(ROWS):
        segments[row] = np.searchsorted(sorted(cuts[row]), np.arange(length), side="right")
    return q, k, v, segments


@given(
    length=st.sampled_from([1, 7, 64, 65, 130]),
    cuts=st.lists(st.lists(st.integers(0, 130), max_size=5), min_size=ROWS, max_size=ROWS),
    alibi=st.booleans(),
    causal=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_attention_is_the_loop_over_queries(length: int, cuts: list[list[int]], alibi: bool, causal: bool) -> None:
    q, k, v, segments = random_inputs(length, cuts)
    slopes = alibi_slopes(HEADS) if alibi else np.zeros(HEADS, np.float32)
    found = fast(q, k, v, segments, slopes if alibi else None, causal=causal)
    np.testing.assert_allclose(found, reference(q, k, v, segments, slopes, causal), atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [7, 130])
def test_chosen_positions_get_what_all_get(length: int, causal: bool) -> None:
    q, k, v, segments = random_inputs(length, [[3, 5], [100]])
    positions = np.array([[length - 1, 0, 4, -1], [2, 2, -1, 6]], np.int32)
    rows = np.arange(ROWS)[:, None]
    everywhere = np.asarray(fast(q, k, v, segments, alibi_slopes(HEADS), causal=causal))
    chosen = fast(q[rows, np.maximum(positions, 0)], k, v, segments, alibi_slopes(HEADS), positions, causal=causal)
    # Both ways scores are larger: ALiBi adds up to slope · length.
    expected = everywhere[rows, np.maximum(positions, 0)]
    np.testing.assert_allclose(chosen, expected, atol=1e-6 if causal else 1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_are_one_block(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    """In value and in gradient."""
    q, k, v, segments = random_inputs(50, [[20], [1, 2, 45]])
    weights = np.random.default_rng(1).normal(size=v.shape).astype(np.float32)

    def loss(q, k, v) -> jax.Array:
        found = attention(q, k, v, jnp.asarray(segments), jnp.asarray(alibi_slopes(HEADS)), causal=causal)
        return (found * weights).sum()

    results = []
    for block in (64, 16):
        monkeypatch.setattr(module, "BLOCK", block)
        results.append(jax.jit(jax.value_and_grad(lambda *x: loss(*x), argnums=(0, 1, 2)))(q, k, v))
    for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_keys_after_a_block_are_never_touched() -> None:
    """Work grows with the half of the square: scores of [queries of a block, keys up to its end] only."""
    shape: Any = jax.ShapeDtypeStruct((1, 256, 1, 4), jnp.float32)
    text = str(jax.make_jaxpr(attention)(shape, shape, shape, jax.ShapeDtypeStruct((1, 256), jnp.int32)))
    assert all(f"f32[1,1,64,{keys}]" in text for keys in (64, 128, 192, 256))
    assert "f32[1,1,256,256]" not in text


def test_softmax_is_float32_and_the_result_has_the_dtype_of_the_values() -> None:
    q, k, v, segments = random_inputs(20, [[], []])
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    found = fast(q, k, v, segments, alibi_slopes(HEADS))
    assert found.dtype == jnp.bfloat16
    q, k, v = (np.asarray(x, np.float32) for x in (q, k, v))
    expected = reference(q, k, v, segments, alibi_slopes(HEADS))
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=0.05)


def test_padding_gives_numbers() -> None:
    """Nobody reads them, but a NaN would spread through the gradient."""
    q, k, v, _ = random_inputs(9, [[], []])

    def loss(q):
        return fast(q, k, v, np.zeros((ROWS, 9), np.int32), alibi_slopes(HEADS)).sum()

    assert np.isfinite(loss(q))
    assert np.isfinite(jax.grad(loss)(q)).all()
