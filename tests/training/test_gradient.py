"""The gradient of any batch on any mesh: against torch in float64, against itself, and what it compiles to."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from jax.sharding import Mesh

from jaxembed.checkpoint.orbax import TrainingCheckpoints
from jaxembed.data.known import KnownPositives
from jaxembed.data.loader import RowLayout, TextTable, pack_batch
from jaxembed.models.bloom import BloomConfig
from jaxembed.planning.hlo import read_collectives
from jaxembed.sharding import Alone, make_mesh, named_shardings, partition_specs
from jaxembed.training.filters import TRAINABLE, count, decays
from jaxembed.training.gradient import (
    LOG_TEMPERATURE,
    Batch,
    LossOptions,
    embed_rows,
    global_value_and_grad,
    with_temperature,
    without_temperature,
)
from jaxembed.training.loop import restore
from jaxembed.training.objective import SetLoss
from jaxembed.training.step import TrainState, initial_state, make_step, put_batch

from blooms import QUICK, abstract_bloom, from_torch, in_jax, random_bloom
from objectives import reference_losses

CONFIG = BloomConfig(vocab_size=100, dim=32, layers=3, heads=4)
QUERIES, NEGATIVES, LONGEST, ROW = 16, 2, 20, 32
TEMPERATURE = 0.1
OPTIONS = LossOptions(temperature=TEMPERATURE, tile=5, data_sets=4, mask_known=False)
EVERYTHING = LossOptions(
    temperature=TEMPERATURE,
    tile=5,
    data_sets=4,
    sets=(
        SetLoss(query_query=True, document_document=True, document_query="symmetric", margin=0.1, focal=1.0),
        SetLoss("kl", temperature=0.5, info_nce_weight=0.5, in_batch=False),
        SetLoss("cosent", weight=2.0),
        SetLoss("embedding_cosine", weight=3.0, info_nce_weight=0.1),
    ),
    spread_out=0.5,
    spread_out_mean=0.5,
    matryoshka=((32, 1.0), (12, 0.5)),
)
"""With a temperature that is learned."""


# ---- batches


def texts_of(step: int) -> list[np.ndarray]:
    """Of the same lengths at every step, so that all batches have one shape."""
    lengths = np.random.default_rng(0).integers(1, LONGEST + 1, QUERIES * (2 + NEGATIVES))
    rng = np.random.default_rng(step)
    return [rng.integers(4, CONFIG.vocab_size, length).astype(np.int32) for length in lengths]


EXAMPLES = np.arange(QUERIES * (2 + NEGATIVES)).reshape(QUERIES, 2 + NEGATIVES)
EXAMPLES[::3, 3] = EXAMPLES[4, 2:] = -1  # hard negatives that an example lacks
DATA_SET = np.arange(QUERIES) % 4
NAMES = np.arange(EXAMPLES.size, dtype=np.uint64)
"""By which texts are known for equal; all are others, whatever their ids."""
_QUERY, _POSITIVE = NAMES[[0, 0, 4]], NAMES[[1, 9, 5]]
KNOWN = KnownPositives.of(_QUERY, _POSITIVE)
"""The positive of example 2 is one of query 0 elsewhere in the data, which `OPTIONS` does not ask about."""
SCORES = np.random.default_rng(1).normal(size=(QUERIES, 1 + NEGATIVES))
TEACHER = np.random.default_rng(2).normal(size=(QUERIES, 2 + NEGATIVES, CONFIG.dim))
TEACHER[7, 1] = TEACHER[EXAMPLES < 0] = np.nan


def batch_of(step: int, mesh: Mesh, chunk_rows: int, chunks: tuple[int, ...] = ()) -> Batch:
    chips = mesh.shape["data"] * mesh.shape["fsdp"]
    layout = RowLayout(ROW, slots=6, chunk_rows=chunk_rows, chips=chips, chunks=chunks, density=1.0)
    texts: Any = texts_of(step)
    table = TextTable((texts,), np.zeros(1, int), np.array([len(text) for text in texts]), NAMES)
    fields = pack_batch(
        table, EXAMPLES, DATA_SET, layout, hashes=NAMES[EXAMPLES], known=KNOWN, scores=SCORES, teacher=TEACHER
    )
    return put_batch(fields, mesh)


def one_device() -> Mesh:
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


# ---- the truth


@functools.cache
def reference(everything: bool = False) -> tuple[float, dict[tuple[str, ...], np.ndarray]]:
    """Loss and gradient of batch 0 in torch and float64: a text a row, no chunks, no tiles, the whole matrix."""
    model = random_bloom(CONFIG).double()
    texts = texts_of(0)
    ids, mask = np.full((len(texts), LONGEST), 3), np.zeros((len(texts), LONGEST), int)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    states = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
    embeddings = torch.nn.functional.normalize(states[torch.arange(len(texts)), torch.tensor(mask.sum(1) - 1)], dim=-1)
    log_temperature = torch.tensor(math.log(TEMPERATURE), dtype=torch.float64, requires_grad=True)
    if everything:
        known = [{int(NAMES[9])} if query == 0 else set() for query in range(QUERIES)]
        loss = reference_losses(
            embeddings, EXAMPLES, NAMES.tolist(), DATA_SET, EVERYTHING, known, SCORES, log_temperature, TEACHER
        ).mean()  # fmt: skip
    else:
        documents = EXAMPLES[:, 1:].T.ravel()
        scores = embeddings[EXAMPLES[:, 0]] @ embeddings[documents[documents >= 0]].T / TEMPERATURE
        loss = torch.nn.functional.cross_entropy(scores, torch.arange(QUERIES))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    found = in_jax(CONFIG, gradients)
    if log_temperature.grad is not None:
        found[(LOG_TEMPERATURE,)] = log_temperature.grad.numpy()
    return loss.item(), found


@functools.cache
def split(name: str) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    graph, train, frozen = nnx.split(from_torch(CONFIG, random_bloom(CONFIG)), TRAINABLE[name], ...)
    return graph, train, frozen


def assert_same_gradient(found: nnx.State, expected: dict[tuple[str, ...], np.ndarray], record=None) -> None:
    """max|Δ| ≤ 1e-5 · max|g| of a leaf; the key biases, whose true gradient is zero, are a part of the leaf `qkv`."""
    worst = {path: np.abs(v[...] - expected[path]).max() / np.abs(expected[path]).max() for path, v in flat(found)}
    if record is not None:
        record("gradient", float(max(worst.values())))
    assert max(worst.values()) <= 1e-5, worst


def flat(state: nnx.State) -> list[tuple[Any, Any]]:
    return list(nnx.to_flat_state(state))


def value_and_gradient(options: LossOptions, chunk_rows: int, trainable: str = "full") -> tuple[float, nnx.State]:
    graph, train, frozen = split(trainable)
    if options.matryoshka:
        train = with_temperature(train, TEMPERATURE)
    mesh = one_device()
    function = global_value_and_grad(graph, train, frozen, options, QUERIES, mesh, check_vma=True)
    function = jax.jit(function, compiler_options=QUICK)
    (loss, _), gradient = function(train, frozen, batch_of(0, mesh, chunk_rows))
    return float(loss), gradient


def test_the_task_does_not_saturate() -> None:
    """Else all equalities below were cheap."""
    assert 1 < reference()[0] < 6


@pytest.mark.parametrize("chunk_rows", [1, 3, 8, 64])
def test_chunks_change_nothing(chunk_rows: int, record_property) -> None:
    """64 holds the batch at once; 3 and 8 do not divide its rows, and the last chunk is filled with empty ones."""
    loss, gradient = value_and_gradient(OPTIONS, chunk_rows)
    expected, expected_gradient = reference()
    record_property("loss", abs(loss / expected - 1))
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_same_gradient(gradient, expected_gradient, record_property)


@pytest.mark.parametrize("chunk_rows", [3, 64])
def test_every_loss_at_once(chunk_rows: int, record_property) -> None:
    loss, gradient = value_and_gradient(EVERYTHING, chunk_rows)
    expected, expected_gradient = reference(everything=True)
    record_property("loss", abs(loss / expected - 1))
    assert loss == pytest.approx(expected, rel=1e-6)
    assert abs(expected_gradient[(LOG_TEMPERATURE,)]) > 0.1
    assert_same_gradient(gradient, expected_gradient, record_property)


def test_these_chunks_are_what_is_said_of_them() -> None:
    chunks = {rows: batch_of(0, one_device(), rows).tokens.shape[0] for rows in (1, 3, 8, 64)}
    assert chunks[64] == 1
    assert chunks[1] % 3
    assert chunks[1] % 8
    assert chunks[3] == math.ceil(chunks[1] / 3)
    assert chunks[8] == math.ceil(chunks[1] / 8) > 1


@pytest.mark.parametrize(
    ("chunk_checkpoint", "layer_checkpoint"), [("none", "dots"), ("none", "none"), ("dots", "none"), ("full", "full")]
)
def test_checkpoints_change_nothing(chunk_checkpoint: str, layer_checkpoint: str) -> None:
    options = dataclasses.replace(
        OPTIONS, chunk_checkpoint=chunk_checkpoint, layer_checkpoint=layer_checkpoint, tile=None
    )
    loss, gradient = value_and_gradient(options, chunk_rows=8)
    assert loss == pytest.approx(reference()[0], rel=1e-6)
    assert_same_gradient(gradient, reference()[1])


def test_bfloat16_is_near_and_gradients_are_float32() -> None:
    loss, gradient = value_and_gradient(dataclasses.replace(OPTIONS, dtype=jnp.bfloat16), chunk_rows=8)
    assert loss == pytest.approx(reference()[0], rel=0.02)
    found = np.concatenate([np.asarray(v[...]).ravel() for _, v in flat(gradient)])
    expected = np.concatenate([reference()[1][path].ravel() for path, _ in flat(gradient)])
    assert found.dtype == np.float32
    assert found @ expected / np.linalg.norm(found) / np.linalg.norm(expected) > 0.99


# ---- meshes

STEPS = 5


@dataclasses.dataclass(frozen=True)
class Run:
    losses: np.ndarray
    norms: np.ndarray
    by_data_set: np.ndarray
    before: dict[tuple[str, ...], np.ndarray]
    after: dict[tuple[str, ...], np.ndarray]
    text: str


def start(
    trainable: str, mesh: Mesh, chunk_rows: int, check_vma: bool, options: LossOptions = OPTIONS
) -> tuple[TrainState, nnx.State, Any]:
    """State, frozen part and compiled step, of AdamW with decay and clipping."""
    graph, train, frozen = split(trainable)
    if options.matryoshka:
        train = with_temperature(train, TEMPERATURE)
    # Epsilon above the rounding of the smallest gradients, which Adam would turn into whole steps.
    adamw = optax.adamw(1e-3, eps=1e-6, weight_decay=0.1, mask=decays)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), adamw)

    def place(state):
        return jax.device_put(state, named_shardings(partition_specs(state), mesh))

    train, frozen = place(jax.tree.map(jnp.copy, train)), place(frozen)
    state = initial_state(optimizer, train, mesh)
    step: Any = make_step(graph, train, frozen, optimizer, options, QUERIES, mesh, check_vma)
    return state, frozen, step.lower(state, frozen, batch_of(0, mesh, chunk_rows)).compile(QUICK)


def arrays(state: nnx.State) -> dict[tuple[str, ...], np.ndarray]:
    return {path: np.asarray(v[...]) for path, v in flat(state)}


def train(
    trainable: str,
    mesh: Mesh,
    chunk_rows: int,
    check_vma: bool,
    options: LossOptions = OPTIONS,
    steps: int = STEPS,
) -> Run:
    """Some steps, and the text of the compiled one."""
    state, frozen, compiled = start(trainable, mesh, chunk_rows, check_vma, options)
    before, metrics = arrays(state.trainable), []
    for number in range(steps):
        state, new = compiled(state, frozen, batch_of(number, mesh, chunk_rows))
        metrics.append(new)
    assert int(state.step) == steps
    return Run(
        np.array([m.loss for m in metrics]),
        np.array([m.gradient_norm for m in metrics]),
        np.array([m.by_data_set for m in metrics]),
        before,
        arrays(state.trainable),
        compiled.as_text(),
    )


@functools.cache
def alone(trainable: str, options: LossOptions = OPTIONS, steps: int = STEPS) -> Run:
    return train(trainable, one_device(), chunk_rows=64, check_vma=True, options=options, steps=steps)


def probe(trainable: str, weights: dict[tuple[str, ...], np.ndarray]) -> np.ndarray:
    """Embeddings of texts that no step has seen."""
    graph, train, frozen = split(trainable)
    moved = nnx.map_state(lambda path, v: v.replace(jnp.asarray(weights[path])), train)
    batch = batch_of(1000, one_device(), 64)
    rows = (field[0] for field in (batch.tokens, batch.segments, batch.first, batch.last))
    embeddings = embed_rows(nnx.merge(graph, moved, frozen), *rows, OPTIONS, Alone())
    return np.asarray(embeddings[batch.last[0] >= 0])


def assert_same_run(found: Run, expected: Run, record) -> None:
    """The design's rule for another mesh."""
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-5)
    np.testing.assert_allclose(found.by_data_set, expected.by_data_set, rtol=1e-5)
    worst = {}
    for path, before in expected.before.items():
        ours, theirs = found.after[path], expected.after[path]
        if path[-2:] == ("qkv", "bias"):  # [layer, qkv, heads, head_dim]: the key part is noise
            ours, theirs, before = (np.delete(x, 1, axis=-3) for x in (ours, theirs, before))
        worst[path] = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - before)
    record("losses", float(np.abs(found.losses / expected.losses - 1).max()))
    record("weights", float(max(worst.values())))
    assert max(worst.values()) <= 1e-4, worst


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("trainable", ["full", "bitfit"])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1)], ids=str)
def test_a_mesh_changes_nothing(sizes: tuple[int, int, int], trainable: str, check_vma: bool, record_property) -> None:
    """Five steps, and the one place where the gradient crosses `data`."""
    mesh = make_mesh(*sizes)
    found = train(trainable, mesh, chunk_rows=1, check_vma=check_vma)
    assert_same_run(found, alone(trainable), record_property)

    moves = read_collectives(found.text)
    outside = [move for move in moves if not move.in_loop and "data" in move.axes(mesh)]
    assert any(move.kind == "all-reduce" for move in outside)
    # Stronger than asked: in loops nothing at all crosses `data`, neither gradients nor anything else.
    assert not [move for move in moves if move.in_loop and "data" in move.axes(mesh)]
    # And over `fsdp`, where it is split, weights are gathered in the loops, which shows that they are seen.
    assert any(move.kind == "all-gather" and move.in_loop for move in moves) == (sizes[1] > 1)


@pytest.mark.slow
def test_tensor_may_be_all_of_the_mesh(record_property) -> None:
    found = train("bitfit", make_mesh(1, 1, 2, jax.devices()[:2]), chunk_rows=1, check_vma=False)
    assert_same_run(found, alone("bitfit"), record_property)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["full", "bitfit"])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_twenty_steps_are_those_of_one_device(sizes: tuple[int, int, int], trainable: str, record_property) -> None:
    found = train(trainable, make_mesh(*sizes), chunk_rows=1, check_vma=False, steps=20)
    expected = alone(trainable, steps=20)
    assert_same_run(found, expected, record_property)
    ours, theirs, before = (probe(trainable, weights) for weights in (found.after, expected.after, expected.before))
    record_property("probes", float(np.abs(ours - theirs).max()))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(theirs - before).max() > 1e-2, "nothing was learnt"
    assert expected.losses.min() > 0.5, "a saturated loss says nothing"


@pytest.mark.slow
def test_a_checkpoint_goes_on_on_another_mesh(tmp_path) -> None:
    """Written on eight chips that split the batch, restored where all three axes split something."""
    mesh, other_mesh = make_mesh(8, 1, 1), make_mesh(2, 2, 2)
    state, frozen, step = start("full", mesh, chunk_rows=1, check_vma=False)
    for number in range(2):
        state, _ = step(state, frozen, batch_of(number, mesh, chunk_rows=1))
    fresh, other_frozen, other_step = start("full", other_mesh, chunk_rows=1, check_vma=False)
    with TrainingCheckpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, state, {})
        checkpoints.wait()
        found = restore(checkpoints, fresh, {})
    assert found is not None
    done, restored = found
    assert done == int(restored.step) == 2
    for leaf, place, written in zip(*map(jax.tree.leaves, (restored, fresh, state))):
        assert leaf.sharding.is_equivalent_to(place.sharding, leaf.ndim)
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(written))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(restored.optimizer))
    for number in range(2, 4):
        state, expected = step(state, frozen, batch_of(number, mesh, chunk_rows=1))
        restored, metrics = other_step(restored, other_frozen, batch_of(number, other_mesh, chunk_rows=1))
        assert float(metrics.loss) == pytest.approx(float(expected.loss), rel=1e-5)
        assert float(metrics.weight_norm) == pytest.approx(float(expected.weight_norm), rel=1e-6)


def test_a_tensor_axis_changes_nothing(record_property) -> None:
    found = train("full", make_mesh(2, 2, 2), chunk_rows=1, check_vma=False)
    assert_same_run(found, alone("full"), record_property)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "check_vma"), [((2, 4, 1), True), ((8, 1, 1), False), ((2, 2, 2), False)], ids=str)
def test_a_mesh_changes_nothing_of_any_loss(sizes: tuple[int, int, int], check_vma: bool, record_property) -> None:
    found = train("full", make_mesh(*sizes), chunk_rows=1, check_vma=check_vma, options=EVERYTHING)
    assert_same_run(found, alone("full", EVERYTHING), record_property)
    assert found.before[(LOG_TEMPERATURE,)] != found.after[(LOG_TEMPERATURE,)]
    np.testing.assert_allclose(found.by_data_set[:, 0].sum(1) / QUERIES, found.losses, rtol=1e-6)


def test_a_learned_temperature_is_no_part_of_the_decoder() -> None:
    _, state, _ = split("full")
    rest, log_temperature = without_temperature(with_temperature(state, 0.1))
    assert jax.tree.structure(rest) == jax.tree.structure(state)
    assert log_temperature is not None
    assert float(jnp.exp(log_temperature)) == pytest.approx(0.1)
    assert without_temperature(state)[1] is None


def test_losses_of_data_sets_are_parts_of_the_loss() -> None:
    run = alone("bitfit")
    np.testing.assert_allclose(run.by_data_set[:, 0].sum(1) / QUERIES, run.losses, rtol=1e-6)
    np.testing.assert_array_equal(run.by_data_set[:, 1], np.tile(np.bincount(DATA_SET), (STEPS, 1)))


# ---- BitFit

ODD = BloomConfig(vocab_size=53, dim=30, layers=3, heads=5)
"""No activation below has as many numbers as a matrix of this model."""


def abstract_batch(pairs: int, chunks: int, chunk_rows: int, length: int, slots: int) -> Batch:
    def ints(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    rows = (chunks, chunk_rows)
    return Batch(
        tokens=ints(*rows, length),
        segments=ints(*rows, length),
        first=ints(*rows, slots),
        last=ints(*rows, slots),
        pick=ints(2 * pairs),
        own=ints(pairs),
        query_places=ints(pairs),
        candidates=ints(pairs),
        positives=ints(pairs),
        valid=ints(pairs, dtype=jnp.bool_),
        query_codes=ints(pairs),
        candidate_codes=ints(pairs),
        known=ints(pairs, 2),
        scores=ints(pairs, 0, dtype=jnp.float32),
        teacher=ints(pairs, 0, 0, dtype=jnp.float32),
        data_set=ints(pairs),
        data_sets=ints(pairs),
    )


def compiled_step(config: BloomConfig, trainable: str, batch: Batch, options: LossOptions) -> Any:
    """A whole step on one device, compiled from shapes alone."""
    graph, train, frozen = nnx.split(abstract_bloom(config), TRAINABLE[trainable], ...)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mask=decays))
    step: Any = make_step(graph, train, frozen, optimizer, options, batch.own.shape[0], one_device())
    count_of_steps: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(train, jax.eval_shape(optimizer.init, train), count_of_steps)
    return step.lower(state, frozen, batch).compile(QUICK)


def equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize("trainable", ["full", "bitfit"])
def test_bitfit_multiplies_for_no_weight(trainable: str) -> None:
    """Neither as traced nor as compiled; `full` shows that the reader would see it."""
    batch = abstract_batch(pairs=16, chunks=3, chunk_rows=2, length=32, slots=6)
    graph, train, frozen = nnx.split(abstract_bloom(ODD), TRAINABLE[trainable], ...)
    function = global_value_and_grad(graph, train, frozen, OPTIONS, 16, one_device())
    jaxpr = jax.make_jaxpr(function)(train, frozen, batch).jaxpr
    made = {
        (equation.primitive.name, tuple(sorted(equation.outvars[0].aval.shape)))
        for equation in equations(jaxpr)
        if equation.primitive.name in ("dot_general", "scatter-add")
    }
    weights = {("dot_general", (5, 6, 30)), ("dot_general", (30, 120)), ("scatter-add", (30, 53))}
    assert made & weights == (weights if trainable == "full" else set())

    text = compiled_step(ODD, trainable, batch, OPTIONS).as_text()
    sizes = {math.prod(map(int, shape.split(","))) for shape in re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)}
    assert sizes
    assert sizes & {30 * 30, 30 * 120} == ({30 * 30, 30 * 120} if trainable == "full" else set())


BLOOM_560M = BloomConfig(vocab_size=250_880, dim=1024, layers=24, heads=16)


def test_bitfit_of_560m_has_gradients_and_moments_of_biases_only() -> None:
    graph, train, frozen = nnx.split(abstract_bloom(BLOOM_560M), TRAINABLE["bitfit"], ...)
    function = global_value_and_grad(graph, train, frozen, OPTIONS, 16, one_device())
    _, gradient = jax.eval_shape(function, train, frozen, abstract_batch(16, 2, 2, 32, 6))
    assert {path[-1] for path, _ in flat(gradient)} == {"bias"}
    assert count(gradient) == 272_384
    moments = [x for x in jax.tree.leaves(jax.eval_shape(optax.adamw(1e-3).init, train)) if x.ndim]
    assert sum(x.size for x in moments) == 2 * 272_384


# ---- memory


@pytest.mark.parametrize("layer_checkpoint", ["none", "dots"])
def test_memory_does_not_grow_with_the_batch(layer_checkpoint: str, record_property) -> None:
    """bloom-560m, BitFit, chunks of 8 rows of 128 tokens, four texts a row: 64 pairs and 1,024, compiled, not run."""
    options = LossOptions(layer_checkpoint=layer_checkpoint)
    temporary = {}
    for pairs in (64, 1024):
        batch = abstract_batch(pairs, chunks=pairs // 16, chunk_rows=8, length=128, slots=16)
        memory = compiled_step(BLOOM_560M, "bitfit", batch, options).memory_analysis()
        temporary[pairs] = memory.temp_size_in_bytes
        record_property(f"{pairs} pairs, MB", memory.temp_size_in_bytes / 1e6)
    assert temporary[1024] < 1.05 * temporary[64]
