"""The tiled loss against float64 numpy on the whole matrix, in value and gradient, and its memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.training.losses import automatic_tile, info_nce

QUERIES, CANDIDATES, DIM = 6, 17, 8


def reference(queries, candidates, positives, valid, temperature):
    """Losses, and the gradients of their weighted sum, from the full matrix in float64."""
    q, c = queries.astype(np.float64), candidates.astype(np.float64)
    logits = np.where(valid, q @ c.T / temperature, -np.inf)
    highest = logits.max(1, keepdims=True)
    log_sum = highest[:, 0] + np.log(np.exp(logits - highest).sum(1))
    softmax = np.exp(logits - log_sum[:, None])
    rows = np.arange(len(q))
    slope = softmax.copy()
    slope[rows, positives] -= 1
    slope *= WEIGHTS[:, None] / temperature
    return log_sum - logits[rows, positives], slope @ c, slope.T @ q


WEIGHTS = np.linspace(0.5, 2, QUERIES)


def random_case(seed: int, normalize: bool = True):
    rng = np.random.default_rng(seed)
    queries, candidates = rng.normal(size=(QUERIES, DIM)), rng.normal(size=(CANDIDATES, DIM))
    if normalize:
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        candidates /= np.linalg.norm(candidates, axis=1, keepdims=True)
    positives = rng.permutation(CANDIDATES)[:QUERIES].astype(np.int32)
    valid = rng.random(CANDIDATES) < 0.7
    valid[positives] = True
    return queries.astype(np.float32), candidates.astype(np.float32), positives, valid


@jax.jit(static_argnums=(4, 5))
def tiled(queries, candidates, positives, valid, temperature, tile):
    def weighted(queries, candidates):
        losses = info_nce(queries, candidates, positives, valid, temperature, tile)
        return (losses * jnp.asarray(WEIGHTS, jnp.float32)).sum(), losses

    gradients, losses = jax.grad(weighted, argnums=(0, 1), has_aux=True)(queries, candidates)
    return losses, *gradients


@given(
    seed=st.integers(0, 10_000),
    tile=st.sampled_from([1, 4, 17, 64]),
    temperature=st.sampled_from([0.05, 1.0]),
    normalize=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_tiled_is_untiled(seed: int, tile: int, temperature: float, normalize: bool) -> None:
    """With negatives that are not there, tiles that do not divide, and logits in the hundreds."""
    case = random_case(seed, normalize)
    found, expected = tiled(*case, temperature, tile), reference(*case, temperature)
    scale = 1 if normalize else np.abs(case[0] @ case[1].T).max()
    # A loss is a difference of logits: its rounding is relative to those.
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, atol=1e-6 * scale / temperature)
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max() * max(1, scale / temperature / 20)


@pytest.mark.parametrize("tile", [1, 4, 64])
def test_the_mean_loss_to_1e_6_and_gradients_to_1e_5(tile: int) -> None:
    """The bounds of the design, on unit vectors at the usual temperature."""
    case = random_case(1)
    found, expected = tiled(*case, 0.05, tile), reference(*case, 0.05)
    np.testing.assert_allclose(np.mean(found[0]), expected[0].mean(), rtol=1e-6)
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def test_loss_is_the_cross_entropy_of_torch() -> None:
    queries, candidates, positives, _ = random_case(2)
    scores = torch.tensor(queries @ candidates.T).double() / 0.05
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor(positives).long(), reduction="none")
    found = tiled(queries, candidates, positives, np.ones(CANDIDATES, bool), 0.05, 5)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_candidate_that_is_not_there_has_no_part() -> None:
    """Whatever stands in its place, even where a whole tile is of that kind; and it gets no gradient."""
    queries, candidates, _, valid = random_case(3)
    positives = np.arange(8, 8 + QUERIES, dtype=np.int32)
    valid[:] = True
    valid[:8] = False
    wild = candidates.copy()
    wild[:8] *= 1e4
    ours, theirs = (tiled(queries, c, positives, valid, 0.05, 4) for c in (wild, candidates))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_array_equal(ours[2][:8], 0)


def test_bfloat16_embeddings_make_float32_losses() -> None:
    queries, candidates, positives, valid = random_case(4)
    queries, candidates = queries.astype(jnp.bfloat16), candidates.astype(jnp.bfloat16)
    losses, *gradients = tiled(queries, candidates, positives, valid, 0.05, 4)
    expected = reference(queries.astype(np.float32), candidates.astype(np.float32), positives, valid, 0.05)[0]
    assert losses.dtype == jnp.float32
    assert all(g.dtype == jnp.bfloat16 for g in gradients)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=2e-5)


def test_no_matrix_of_all_queries_and_candidates_exists() -> None:
    queries, candidates, tile = 512, 2048, 128

    def shape(n, dtype, *more):
        return jax.ShapeDtypeStruct((n, *more), dtype)

    function = jax.grad(lambda q, c, *x: info_nce(q, c, *x, temperature=0.05, tile=tile).sum(), argnums=(0, 1))
    arguments = shape(queries, jnp.float32, 16), shape(candidates, jnp.float32, 16)
    lowered = jax.jit(function).lower(*arguments, shape(queries, jnp.int32), shape(candidates, jnp.bool_))
    compiled: Any = lowered.compile()
    assert f"{queries},{candidates}]" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < queries * candidates * 4 // 2


def test_automatic_tile() -> None:
    assert automatic_tile(64, 128) == 128
    assert automatic_tile(0, 5) == 5
    for queries in (1024, 65_536, 10**7):
        tile = automatic_tile(queries, 2 * queries)
        assert tile == 128 or tile * queries * 4 <= 64 * 2**20
