"""The tiled loss against float64 numpy on the whole matrix, in value and gradient, and its memory; the others against
sentence-transformers and formulas written down again."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import losses as theirs

from jaxembed.training.losses import (
    LOWEST,
    CandidateMask,
    RowMask,
    automatic_tile,
    cosent,
    distill_cosine,
    distill_kl,
    distill_mse,
    focal,
    info_nce,
    joint,
    margin_mse,
    spread_out,
)

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
        asked, known = RowMask(positives), CandidateMask(valid)
        losses, _ = info_nce(queries, candidates, asked, known, temperature, tile)
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

    def ints(n, *more):
        return shape(n, jnp.int32, *more)

    def flags(n):
        return shape(n, jnp.bool_)

    function = jax.grad(lambda *x: info_nce(*x, temperature=0.05, tile=tile)[0].sum(), argnums=(0, 1))
    asked: Any = RowMask(
        ints(queries), ints(queries), flags(queries), flags(queries), flags(queries), ints(queries, 4), ints(queries),
        shape(queries, jnp.float32),
    )  # fmt: skip
    known: Any = CandidateMask(
        flags(candidates), ints(candidates), flags(candidates), ints(candidates), ints(candidates, 2)
    )
    embeddings = shape(queries, jnp.float32, 16), shape(candidates, jnp.float32, 16)
    lowered = jax.jit(function).lower(*embeddings, asked, known)
    compiled: Any = lowered.compile()
    assert f"{queries},{candidates}]" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < queries * candidates * 4 // 2


def test_automatic_tile() -> None:
    assert automatic_tile(64, 128) == 128
    assert automatic_tile(0, 5) == 5
    for queries in (1024, 65_536, 10**7):
        tile = automatic_tile(queries, 2 * queries)
        assert tile == 128 or tile * queries * 4 <= 64 * 2**20


# ---- masks


def met_by(asked: RowMask, known: CandidateMask, logits: np.ndarray) -> np.ndarray:
    """Who meets whom, pair by pair."""
    a: Any = jax.tree.map(np.asarray, asked)
    k: Any = jax.tree.map(np.asarray, known)
    met = np.zeros(logits.shape, bool)
    for i, j in np.ndindex(*met.shape):
        allowed = a.own[i] if a.examples[i] == k.examples[j] else a.others[i]
        hard = a.negatives[i] or not k.negatives[j]
        text = k.texts[j] not in a.avoided[i] and a.texts[i] not in k.avoided[j]
        met[i, j] = j == a.positives[i] or (k.valid[j] and allowed and hard and text and logits[i, j] <= a.limits[i])
    return met


@given(seed=st.integers(0, 10_000), tile=st.sampled_from([1, 4, 17, 64]))
@settings(max_examples=30, deadline=None)
def test_masks_are_those_of_every_pair(seed: int, tile: int) -> None:
    """Every mask at once; losses, sums, and the gradients of both."""
    queries, candidates, positives, valid = random_case(seed)
    rng = np.random.default_rng(seed)
    asked = RowMask(
        positives,
        rng.integers(0, 5, QUERIES),
        *(rng.random(QUERIES) < 0.8 for _ in range(3)),
        rng.integers(-1, 12, (QUERIES, 2)),
        rng.integers(0, 12, QUERIES),
        rng.normal(5, 10, QUERIES).astype(np.float32),
    )
    known = CandidateMask(
        valid,
        rng.integers(0, 5, CANDIDATES),
        rng.random(CANDIDATES) < 0.5,
        rng.integers(0, 12, CANDIDATES),
        rng.integers(-1, 12, (CANDIDATES, 1)),
    )
    asked, known = jax.tree.map(jnp.asarray, (asked, known))

    def weighted(queries, candidates):
        losses, log_sums = info_nce(queries, candidates, asked, known, 0.05, tile)
        weights = jnp.asarray(WEIGHTS, jnp.float32)
        return (losses * weights + log_sums * weights[::-1]).sum(), (losses, log_sums)

    gradients, (losses, log_sums) = jax.grad(weighted, argnums=(0, 1), has_aux=True)(queries, candidates)
    q, c = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (queries, candidates))
    logits = q @ c.T / 0.05
    met = met_by(asked, known, logits.detach().numpy())
    sums = torch.logsumexp(logits.masked_fill(~torch.tensor(met), -torch.inf), 1)
    expected = sums - logits[torch.arange(QUERIES), torch.tensor(positives).long()]
    weights = torch.tensor(WEIGHTS)
    (expected * weights + sums * weights.flip(0)).sum().backward()
    np.testing.assert_allclose(losses, expected.detach().numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(log_sums, sums.detach().numpy(), rtol=1e-5, atol=1e-5)
    for found, tensor in zip(gradients, (q, c)):
        reference_gradient: Any = tensor.grad
        assert np.abs(found - reference_gradient.numpy()).max() <= 1e-5 * reference_gradient.abs().max()


def test_a_row_that_meets_nobody_adds_nothing() -> None:
    queries, candidates, _, valid = random_case(5)

    def total(queries, candidates):
        _, nobody = info_nce(queries, candidates, RowMask(), CandidateMask(jnp.zeros_like(valid)), 0.05, 4)
        losses, log_sums = info_nce(
            queries, candidates, RowMask(jnp.arange(QUERIES)), CandidateMask(jnp.ones_like(valid)), 0.05, 4
        )
        joined = joint(losses, log_sums, [nobody, nobody])
        return joined.sum(), (joined, losses, nobody)

    gradients, (joined, losses, nobody) = jax.grad(total, argnums=(0, 1), has_aux=True)(queries, candidates)
    np.testing.assert_array_equal(nobody, LOWEST)
    np.testing.assert_array_equal(joined, losses)
    assert all(np.isfinite(g).all() for g in gradients)


# ---- the other losses


@given(losses=st.lists(st.floats(0, 50, width=32), min_size=1, max_size=5), gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
@settings(deadline=None, max_examples=50)
def test_focal(losses: list[float], gamma: float) -> None:
    x = np.array(losses, np.float64)
    p = np.exp(-x)
    found, slope = jax.value_and_grad(lambda x: focal(x, gamma).sum())(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, ((-np.expm1(-x)) ** gamma * x).sum(), rtol=1e-5, atol=1e-6)
    if gamma >= 1:
        exact = (1 - p) ** gamma + gamma * (1 - p) ** (gamma - 1) * p * x
        np.testing.assert_allclose(slope, exact, rtol=1e-4, atol=1e-5)
    assert np.isfinite(slope).all()


@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.1, 1.0, 10.0]), distinct=st.sampled_from([1, 2, 4, 30]))
@settings(deadline=None, max_examples=50)
def test_cosent_is_that_of_all_pairs(seed: int, spread: float, distinct: int) -> None:
    """Ties, grades that are all the same, pairs that take no part, logits up to some hundreds."""
    rng = np.random.default_rng(seed)
    scores = (spread * rng.normal(size=12)).astype(np.float32)
    grades, members = rng.integers(0, distinct, 12).astype(np.float32), rng.random(12) < 0.7
    grades[~members] = np.nan
    found, slope = jax.value_and_grad(cosent)(jnp.asarray(scores), jnp.asarray(grades), jnp.asarray(members), 0.05)
    s = torch.tensor(scores[members], dtype=torch.float64, requires_grad=True)
    pairs = (s[:, None] - s[None, :])[torch.tensor(grades[members][:, None] < grades[members][None, :])] / 0.05
    expected = torch.logsumexp(torch.cat([torch.zeros(1, dtype=torch.float64), pairs]), 0)
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5, atol=1e-5)
    gradient = torch.autograd.grad(expected, s, allow_unused=True)[0]
    whole = np.zeros(12)
    if gradient is not None:
        whole[members] = gradient.numpy()
    np.testing.assert_allclose(slope, whole, atol=1e-5 * max(np.abs(whole).max(), 1e-3))


@pytest.mark.slow
def test_cosent_on_many_pairs() -> None:
    rng = np.random.default_rng(0)
    scores, grades = rng.uniform(-1, 1, 4096).astype(np.float32), rng.integers(0, 6, 4096).astype(np.float32)
    found, slope = jax.value_and_grad(cosent)(jnp.asarray(scores), jnp.asarray(grades), jnp.ones(4096, bool), 0.05)
    vectors = np.stack([scores.astype(np.float64), np.sqrt(1 - scores.astype(np.float64) ** 2)], 1)
    unit = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(4096, 2)
    leaf = torch.tensor(vectors, requires_grad=True)
    columns = [unit, leaf]
    module = theirs.CoSENTLoss(None, similarity_fct=lambda a, b: (a * b).sum(1))
    expected = module.compute_loss_from_embeddings(columns, torch.tensor(grades))
    expected.backward()
    assert float(found) == pytest.approx(expected.item(), rel=1e-5)
    gradient: Any = leaf.grad
    assert np.abs(slope - gradient.numpy()[:, 0]).max() <= 1e-5 * gradient[:, 0].abs().max()


def test_documents_without_a_score_are_not_distilled() -> None:
    """Neither in value nor in gradient; a query with one score has no loss."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(3, 4)).astype(np.float32)
    teacher[0, 2] = teacher[2, 1:] = np.nan
    for loss in (distill_kl, margin_mse):
        summed: Any = lambda s, loss=loss: loss(s, jnp.asarray(teacher)).sum()  # noqa: E731 (too small for a def)
        found, slope = jax.value_and_grad(summed)(jnp.asarray(student))
        losses = loss(jnp.asarray(student), jnp.asarray(teacher))
        short = loss(jnp.asarray(np.delete(student, 2, 1)[:1]), jnp.asarray(np.delete(teacher, 2, 1)[:1]))
        np.testing.assert_allclose(losses[0], short[0], rtol=1e-6)
        np.testing.assert_allclose(losses[2], 0, atol=1e-7)
        assert np.isfinite(found)
        np.testing.assert_allclose(slope[0, 2], 0, atol=1e-7)
        np.testing.assert_allclose(slope[2], 0, atol=1e-7)


@pytest.mark.parametrize(("loss", "metric"), [(distill_cosine, "cosine"), (distill_mse, "mse")])
def test_distillation_to_embeddings_is_that_of_sentence_transformers(loss, metric: str) -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(5, DIM)).astype(np.float32), rng.normal(size=(5, DIM)).astype(np.float32)
    module = theirs.EmbedDistillLoss(None, distance_metric=metric)
    leaf = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    expected = module.compute_loss_from_embeddings([leaf], [torch.tensor(teacher)])
    expected.backward()
    gradient: Any = leaf.grad
    found, slope = jax.value_and_grad(lambda s: loss(s, jnp.asarray(teacher)).mean())(jnp.asarray(student))
    assert float(found) == pytest.approx(expected.item(), rel=1e-5)
    assert np.abs(slope - gradient.numpy()).max() <= 1e-5 * gradient.abs().max()


@pytest.mark.parametrize(("texts", "dim"), [(1, 8), (5, 8), (8, 8), (40, 8), (300, 8)])
def test_spread_is_that_of_sentence_transformers(texts: int, dim: int) -> None:
    """With more texts than dimensions and with fewer."""
    x = np.random.default_rng(0).normal(size=(texts, dim)) + 0.5
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    module = theirs.GlobalOrthogonalRegularizationLoss(None, similarity_fct=lambda a, b: a @ b.T)
    for term in (0, 1):
        leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        expected = module.compute_gor(leaf)[term]
        expected.backward()
        gradient: Any = leaf.grad
        found, slope = jax.value_and_grad(lambda x, term=term: spread_out(x)[term])(jnp.asarray(x))
        assert float(found) == pytest.approx(expected.item(), rel=1e-5, abs=1e-9)
        assert np.abs(slope - gradient.numpy()).max() <= 1e-5 * gradient.abs().max()
