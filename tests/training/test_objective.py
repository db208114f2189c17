"""The losses of a batch against sentence-transformers and against float64, on one device and on eight."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P
from sentence_transformers import losses as theirs
from sentence_transformers.sentence_transformer.losses.matryoshka import shrink

from jaxembed.ops.norms import unit_norm
from jaxembed.sharding import BATCH_AXES, Chips, make_mesh
from jaxembed.training.batch import BATCH_SPECS, Batch
from jaxembed.training.objective import LossOptions, SetLoss, batch_losses

from blooms import QUICK
from objectives import reference_losses

QUERIES, NEGATIVES, DIM = 16, 2, 12
COLUMNS = 2 + NEGATIVES
SETS = np.arange(QUERIES) % 3


@dataclasses.dataclass(frozen=True)
class Case:
    """Raw embeddings of texts of which some are equal, some negatives missing, some documents known positives."""

    raw: np.ndarray
    examples: np.ndarray
    names: np.ndarray
    known: list[set[int]]
    scores: np.ndarray
    places: np.ndarray
    teacher: np.ndarray

    def batch(self, data_set: np.ndarray) -> Batch:
        flat = self.examples.T.ravel()
        codes = np.where(flat >= 0, self.names[flat], -1).astype(np.int32)
        places = np.where(flat >= 0, self.places[flat], 0).astype(np.int32)
        known = np.array([[*sorted(found), -1, -1][:2] for found in self.known], np.int32)
        rows = np.zeros((1, 8, 1), np.int32)
        return Batch(
            tokens=rows, segments=rows, first=rows, last=rows, pick=np.zeros(8, np.int32),
            own=places[:QUERIES], query_places=places[:QUERIES], candidates=places[QUERIES:],
            positives=np.arange(QUERIES, dtype=np.int32), valid=flat[QUERIES:] >= 0,
            query_codes=codes[:QUERIES], candidate_codes=codes[QUERIES:], known=known,
            scores=self.scores.astype(np.float32), teacher=self.teacher.astype(np.float32),
            data_set=data_set.astype(np.int32), data_sets=data_set.astype(np.int32),
        )  # fmt: skip


def case_of(seed: int, plain: bool = False) -> Case:
    """Plain: every text another one, nothing missing or known."""
    rng = np.random.default_rng(seed)
    count = QUERIES * COLUMNS
    examples = np.arange(count).reshape(QUERIES, COLUMNS)
    names = rng.permutation(count)
    known: list[set[int]] = [set() for _ in range(QUERIES)]
    raw = rng.normal(size=(count, DIM)) + 1.2  # cosines of about .6
    scores = rng.normal(size=(QUERIES, 1 + NEGATIVES)).round(1)
    if not plain:
        for _ in range(20):  # texts of other examples, in any role
            one, other = rng.integers(0, count, 2)
            names[one] = names[other]
        for query in rng.integers(0, QUERIES, 24):
            text = names[rng.integers(0, count)]
            if text != names[examples[query, 1]] and len(known[query]) < 2:
                known[query].add(int(text))
        scores[rng.random(scores.shape) < 0.2] = np.nan
        scores[:, 1] = rng.normal(size=QUERIES)
        examples[rng.random(QUERIES) < 0.3, 3] = -1
    places = rng.permutation(count)
    teacher = rng.normal(size=(QUERIES, COLUMNS, DIM)) + 0.5
    if not plain:
        teacher[(rng.random((QUERIES, COLUMNS)) < 0.2) | (examples < 0)] = np.nan
        teacher[3] = np.nan
    return Case(raw.astype(np.float32), examples, names, known, scores, places, teacher.astype(np.float32))


def ours(
    case: Case, options: LossOptions, data_set: np.ndarray, chips: int = 1, log_temperature: float | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Losses, gradient of their mean in the raw embeddings, and in the logarithm of the temperature."""
    mesh = make_mesh(chips, 1, 1, jax.devices()[:chips]) if chips < 8 else make_mesh(2, 4, 1)
    placed = np.zeros_like(case.raw)
    placed[case.places] = case.raw

    def per_chip(raw: Any, log_t: Any, batch: Batch) -> Any:
        def vary(x: Any, spec: Any) -> Any:
            return x if spec != P() else jax.lax.pcast(x, BATCH_AXES, to="varying")

        log_t, batch = vary(log_t, P()), jax.tree.map(vary, batch, BATCH_SPECS)

        def share(raw: Any, log_t: Any) -> Any:
            everyone = Chips().everyone(unit_norm(raw))
            found = batch_losses(everyone, batch, options, None if log_temperature is None else log_t)
            return found.sum() / QUERIES, found

        (_, found), (of_raw, of_log) = jax.value_and_grad(share, argnums=(0, 1), has_aux=True)(raw, log_t)
        return found, of_raw, jax.lax.psum(of_log, BATCH_AXES)

    split = P(BATCH_AXES)
    mapped = jax.shard_map(per_chip, mesh=mesh, in_specs=(split, P(), BATCH_SPECS), out_specs=(split, split, P()))
    function = jax.jit(mapped, compiler_options=QUICK)
    found, of_raw, of_log = function(placed, jnp.float32(log_temperature or 0), case.batch(data_set))
    return np.asarray(found), np.asarray(of_raw)[case.places], float(of_log)


def in_float64(case: Case, options: LossOptions, data_set: np.ndarray, log_temperature: float | None = None) -> Any:
    raw = torch.tensor(case.raw, dtype=torch.float64, requires_grad=True)
    log_t = torch.tensor(log_temperature or 0.0, dtype=torch.float64, requires_grad=True)
    found = reference_losses(
        torch.nn.functional.normalize(raw), case.examples, case.names.tolist(), data_set, options, case.known,
        case.scores, None if log_temperature is None else log_t, case.teacher,
    )  # fmt: skip
    of_raw, of_log = torch.autograd.grad(found.mean(), (raw, log_t), allow_unused=True)
    return found.detach().numpy(), of_raw.numpy(), 0.0 if of_log is None else float(of_log)


def assert_equal(found: Any, expected: Any) -> None:
    """The design's bounds: values to 1e-5, gradients to 1e-5 of the largest."""
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=2e-6)
    assert np.abs(found[1] - expected[1]).max() <= 1e-5 * np.abs(expected[1]).max()
    assert found[2] == pytest.approx(expected[2], rel=1e-5)


ALL_TERMS = SetLoss(query_query=True, document_document=True, document_query="joint")
VARIANTS: dict[str, LossOptions] = {
    "default": LossOptions(),
    "no masks": LossOptions(mask_duplicates=False, mask_known=False),
    "duplicates": LossOptions(mask_known=False, sets=(ALL_TERMS,) * 3),
    "known": LossOptions(mask_duplicates=False, sets=(ALL_TERMS,) * 3),
    "all terms": LossOptions(sets=(ALL_TERMS,) * 3, temperature=0.1),
    "query-query": LossOptions(sets=(SetLoss(query_query=True),) * 3),
    "document-document": LossOptions(sets=(SetLoss(document_document=True, hard_negatives=False),) * 3),
    "symmetric": LossOptions(sets=(SetLoss(document_query="symmetric", query_query=True),) * 3),
    "margin": LossOptions(sets=(dataclasses.replace(ALL_TERMS, margin=0.1),) * 3),
    "margin 0, symmetric": LossOptions(sets=(SetLoss(document_query="symmetric", margin=0.0),) * 3),
    "focal": LossOptions(sets=(SetLoss(focal=0.5, document_query="symmetric"),) * 3),
    "own negatives": LossOptions(sets=(SetLoss(in_batch=False),) * 3),
    "spread": LossOptions(spread_out=1.0, spread_out_mean=0.5),
    "matryoshka": LossOptions(matryoshka=((12, 1.0), (8, 0.5), (3, 0.25)), sets=(SetLoss(margin=0.1),) * 3),
    "cosent": LossOptions(sets=(SetLoss("cosent"),) * 3),
    "kl": LossOptions(sets=(SetLoss("kl", temperature=0.5, teacher_temperature=2.0),) * 3),
    "margin_mse": LossOptions(sets=(SetLoss("margin_mse", info_nce_weight=0.5),) * 3),
    "embedding_cosine": LossOptions(sets=(SetLoss("embedding_cosine"),) * 3),
    "embedding_mse": LossOptions(
        sets=(SetLoss("embedding_mse", weight=5.0, info_nce_weight=0.5), SetLoss(), SetLoss("embedding_cosine")),
        matryoshka=((12, 1.0), (5, 0.5)),
    ),
    "temperatures": LossOptions(sets=(SetLoss(temperature=0.1), SetLoss(margin=0.1), SetLoss(temperature=0.02))),
    "mixed": LossOptions(
        sets=(
            SetLoss(query_query=True, document_document=True, margin=0.1, focal=2.0, weight=0.5, temperature=0.1),
            SetLoss("kl", temperature=0.2, info_nce_weight=0.3, in_batch=False),
            SetLoss("cosent", weight=2.0),
        ),
        spread_out=0.3,
        matryoshka=((12, 1.0), (6, 2.0)),
    ),
    "switches": LossOptions(
        sets=(
            SetLoss(document_query="joint", hard_negatives=False),
            SetLoss(in_batch=False, document_query="symmetric"),
            SetLoss(document_query="symmetric", document_document=True),
        ),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_are_those_of_float64(name: str) -> None:
    """With equal texts, known positives, missing negatives and scores, in tiles that do not divide."""
    case, options = case_of(2), dataclasses.replace(VARIANTS[name], data_sets=3)
    assert_equal(ours(case, dataclasses.replace(options, tile=5), SETS), in_float64(case, options, SETS))


@pytest.mark.parametrize("name", VARIANTS)
def test_eight_devices_change_nothing(name: str) -> None:
    case, options = case_of(0), dataclasses.replace(VARIANTS[name], data_sets=3)
    assert_equal(ours(case, dataclasses.replace(options, tile=7), SETS, chips=8), in_float64(case, options, SETS))


@pytest.mark.parametrize("chips", [1, 8])
@pytest.mark.parametrize("name", ["default", "all terms", "mixed"])
def test_a_learned_temperature(name: str, chips: int) -> None:
    case, options = case_of(1), dataclasses.replace(VARIANTS[name], data_sets=3)
    arguments = case, options, SETS
    expected = in_float64(*arguments, log_temperature=-1.5)
    assert expected[2] != 0
    assert_equal(ours(*arguments, chips=chips, log_temperature=-1.5), expected)


def test_masks_are_met() -> None:
    """Else the comparisons above were cheap: each mask changes the loss of several queries."""
    case = case_of(0)
    plain = in_float64(case, dataclasses.replace(VARIANTS["no masks"], data_sets=3), SETS)[0]
    for options in (
        LossOptions(mask_known=False, data_sets=3),
        LossOptions(mask_duplicates=False, data_sets=3),
        LossOptions(mask_duplicates=False, mask_known=False, sets=(SetLoss(margin=0.1),) * 3),
    ):
        assert (np.abs(in_float64(case, options, SETS)[0] - plain) > 1e-4).sum() > 2


# ---- sentence-transformers

Loss = Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]


def st_loss(loss: Loss, dims: tuple[tuple[int, float], ...] = ()) -> Loss:
    """Matryoshka over a loss, as MatryoshkaLoss does it."""
    if not dims:
        return loss
    return lambda columns, labels: sum(
        weight * loss([shrink(column, dim) for column in columns], labels) for dim, weight in dims
    )


def ranking(**options: Any) -> Loss:
    module = theirs.MultipleNegativesRankingLoss(None, scale=20.0, **options)
    return module.compute_loss_from_embeddings


def spread(columns: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    module = theirs.GlobalOrthogonalRegularizationLoss(
        None,
        mean_weight=0.5,
        second_moment_weight=2.0,
        aggregation="sum",
    )
    found = module.compute_loss_from_embeddings(columns[:2])
    return ranking()(columns, labels) + found["gor_mean"] + found["gor_second_moment"]


def cosent(columns: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    return theirs.CoSENTLoss(None).compute_loss_from_embeddings(columns[:2], labels[:, 0])


def kl(temperature: float, teacher_temperature: float) -> Loss:
    module = theirs.DistillKLDivLoss(
        None,
        student_temperature=temperature,
        teacher_temperature=teacher_temperature,
    )
    return module.compute_loss_from_embeddings


def margin_mse(columns: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    return theirs.MarginMSELoss(None).compute_loss_from_embeddings(columns, labels)


def taught(metric: Literal["cosine", "mse"]) -> Loss:
    """Labels are the teacher's embeddings, [queries, columns, dim]."""

    def loss(columns: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        teacher = torch.nn.functional.normalize(labels, dim=-1)
        module = theirs.EmbedDistillLoss(None, distance_metric=metric)
        return module.compute_loss_from_embeddings(columns, list(teacher.unbind(1)))

    return loss


DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
PREFIXES = ((12, 1.0), (8, 0.5), (4, 0.25))


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (ranking(), LossOptions()),
        (ranking(directions=DIRECTIONS), LossOptions(sets=(ALL_TERMS,))),
        (
            ranking(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"),
            LossOptions(sets=(SetLoss(document_query="symmetric"),)),
        ),
        (ranking(directions=DIRECTIONS[:2]), LossOptions(sets=(SetLoss(query_query=True),))),
        (st_loss(ranking(), PREFIXES), LossOptions(matryoshka=PREFIXES)),
        (cosent, LossOptions(sets=(SetLoss("cosent"),))),
        (st_loss(cosent, PREFIXES), LossOptions(sets=(SetLoss("cosent"),), matryoshka=PREFIXES)),
        (kl(1.0, 1.0), LossOptions(sets=(SetLoss("kl"),))),
        (kl(0.2, 3.0), LossOptions(sets=(SetLoss("kl", temperature=0.2, teacher_temperature=3.0),))),
        (st_loss(kl(1.0, 1.0), PREFIXES), LossOptions(sets=(SetLoss("kl"),), matryoshka=PREFIXES)),
        (margin_mse, LossOptions(sets=(SetLoss("margin_mse"),))),
        (taught("cosine"), LossOptions(sets=(SetLoss("embedding_cosine"),))),
        (taught("mse"), LossOptions(sets=(SetLoss("embedding_mse"),))),
        (spread, LossOptions(spread_out=2.0, spread_out_mean=0.5)),
    ],
)
@pytest.mark.parametrize("chips", [1, 8])
def test_losses_are_those_of_sentence_transformers(loss: Loss, options: LossOptions, chips: int) -> None:
    case = case_of(3, plain=True)
    raw = torch.tensor(case.raw, dtype=torch.float64, requires_grad=True)
    embeddings = torch.nn.functional.normalize(raw)
    columns = [embeddings[case.examples[:, column]] for column in range(COLUMNS)]
    labels = case.teacher.astype(np.float64) if options.by_set[0].kind.startswith("embedding") else case.scores
    expected = loss(columns, torch.tensor(labels))
    (of_raw,) = torch.autograd.grad(expected, raw)
    found = ours(case, dataclasses.replace(options, tile=7), np.zeros(QUERIES, int), chips)
    assert found[0].mean() == pytest.approx(expected.item(), rel=1e-5)
    assert np.abs(found[1] - of_raw.numpy()).max() <= 1e-5 * of_raw.abs().max().item()
