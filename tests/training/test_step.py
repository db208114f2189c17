"""Schedule and optimiser against torch and transformers; the step's bookkeeping and where its arrays live."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from jaxembed.config import OptimizerConfig, OptimizerGroup
from jaxembed.data.loader import RowLayout, TextTable, pack_batch
from jaxembed.errors import InputError
from jaxembed.sharding import make_mesh, named_shardings, partition_specs
from jaxembed.training.filters import TRAINABLE
from jaxembed.training.gradient import LossOptions
from jaxembed.training.step import initial_state, learning_rate, make_optimizer, make_step, put_batch

from blooms import from_torch, random_bloom
from runs import SHAPE

pytestmark = pytest.mark.usefixtures("quick_compilation")


def torch_optimizer(rate=1.0):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)


@settings(deadline=None, max_examples=30)
@given(schedule=st.sampled_from(["constant", "linear", "cosine"]), warmup=st.integers(0, 20), rest=st.integers(1, 40))
def test_learning_rates_are_those_of_transformers(schedule, warmup, rest):
    steps = warmup + rest
    config = OptimizerConfig(learning_rate=0.5, schedule=schedule, warmup_steps=warmup)
    optimizer = torch_optimizer(0.5)
    theirs = {
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, warmup),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, warmup, steps),
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, warmup, steps),
    }[schedule]()
    ours, expected = learning_rate(config, steps), []
    for _ in range(steps):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    np.testing.assert_allclose([float(np.asarray(ours(step))) for step in range(steps)], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("ratio", "warm"), [(0.0, 0), (0.1, 3), (1.0, 30)])
def test_warm_up_as_a_share_of_all_steps(ratio, warm):
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, schedule="constant", warmup_ratio=ratio), 30)
    expected = [step / warm if step < warm else 1.0 for step in range(30)]
    np.testing.assert_allclose([float(np.asarray(rate(step))) for step in range(30)], expected, rtol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_adamw_is_that_of_torch(clip):
    random = np.random.default_rng(0)
    shapes = {"kernel": (5, 4), "bias": (4,), "scale": (4,), "table": (7, 3)}
    start = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    state: Any = nnx.State({name: nnx.Param(jnp.asarray(value)) for name, value in start.items()})
    config = OptimizerConfig(
        learning_rate=0.1, weight_decay=0.3, beta1=0.8, beta2=0.95, epsilon=1e-6, clip_norm=clip, warmup_steps=0
    )
    ours = make_optimizer(config, 10)
    moments = ours.init(state)

    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    groups = [
        {"params": [theirs["kernel"], theirs["table"]], "weight_decay": 0.3},
        {"params": [theirs["bias"], theirs["scale"]], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.95), eps=1e-6)
    schedule = get_linear_schedule_with_warmup(adamw, 0, 10)
    for size in (1e-3, 1.0, 30.0, 0.1):
        gradient = {name: (size * random.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
        grads = nnx.State({name: nnx.Param(jnp.asarray(value)) for name, value in gradient.items()})
        updates, moments = ours.update(grads, moments, state)
        state = optax.apply_updates(state, updates)
        for name, value in gradient.items():
            theirs[name].grad = torch.tensor(value)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(theirs.values()), clip)
        adamw.step()
        schedule.step()
    for name, value in theirs.items():
        np.testing.assert_allclose(np.asarray(state[name][...]), value.detach().numpy(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_groups_are_those_of_torch(clip):
    """Two groups and the rest, with a schedule, against AdamW's parameter groups."""
    random = np.random.default_rng(0)
    shapes = {"kernel": (5, 4), "bias": (4,), "scale": (4,), "table": (7, 3)}
    start = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    state: Any = nnx.State({"up": {name: nnx.Param(jnp.asarray(value)) for name, value in start.items()}})
    config = OptimizerConfig(
        learning_rate=0.1, weight_decay=0.3, beta1=0.8, beta2=0.95, epsilon=1e-6, clip_norm=clip, warmup_steps=2,
        schedule="cosine",
        groups=[
            OptimizerGroup(match="bias|scale$", learning_rate=0.7, weight_decay=0.2),
            OptimizerGroup(match="^up/(table|bias)", learning_rate=0.01),
        ],
    )  # fmt: skip
    ours = make_optimizer(config, 10)
    moments = ours.init(state)

    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    groups = [
        {"params": [theirs["bias"], theirs["scale"]], "lr": 0.7, "weight_decay": 0.2},
        {"params": [theirs["table"]], "lr": 0.01, "weight_decay": 0.3},
        {"params": [theirs["kernel"]], "weight_decay": 0.3},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.95), eps=1e-6)
    schedule = get_cosine_schedule_with_warmup(adamw, 2, 10)
    for size in (1e-3, 1.0, 30.0, 0.1, 1.0):
        gradient = {name: (size * random.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
        grads = nnx.State({"up": {name: nnx.Param(jnp.asarray(value)) for name, value in gradient.items()}})
        updates, moments = ours.update(grads, moments, state)
        state = optax.apply_updates(state, updates)
        for name, value in gradient.items():
            theirs[name].grad = torch.tensor(value)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(theirs.values()), clip)
        adamw.step()
        schedule.step()
    for name, value in theirs.items():
        np.testing.assert_allclose(np.asarray(state["up"][name][...]), value.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_a_group_that_takes_nothing_is_refused():
    state = nnx.State({"up": {name: nnx.Param(jnp.zeros(2)) for name in ("kernel", "bias")}})
    groups = [OptimizerGroup(match="bias", learning_rate=1.0), OptimizerGroup(match="s$", weight_decay=0.0)]
    with pytest.raises(InputError, match=r"groups\.1\.match: 's\$' takes no parameter .* are up/bias, up/kernel"):
        make_optimizer(OptimizerConfig(groups=groups), 10).init(state)


def make_batch(mesh, seed, data_set):
    """A batch of 8 pairs of random ids."""
    random = np.random.default_rng(seed)
    texts = [random.integers(4, SHAPE.vocab_size, random.integers(2, 12)).astype(np.int32) for _ in range(16)]
    lengths = np.array([len(text) for text in texts])
    table = TextTable((texts,), np.array([0]), lengths, np.arange(16, dtype=np.uint64))
    rows = np.arange(16).reshape(2, 8).T
    layout = RowLayout(row_length=16, slots=4, chunk_rows=2, chips=mesh.size, chunks=(1, 8), density=0.5)
    return put_batch(pack_batch(table, rows, np.array(data_set), layout), mesh)


@pytest.mark.parametrize(("trainable", "axes"), [("full", (1, 1)), ("bitfit", (2, 2))])
def test_bookkeeping_of_a_step(trainable, axes):
    data, fsdp = axes
    mesh = make_mesh(data, fsdp, 1, jax.devices()[: data * fsdp])
    model = from_torch(SHAPE, random_bloom(SHAPE))
    graph, state = nnx.split(model)
    model = nnx.merge(graph, jax.device_put(state, named_shardings(partition_specs(state), mesh)))
    graph, moving, frozen = nnx.split(model, TRAINABLE[trainable], ...)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0, clip_norm=0.1), 10)
    step = make_step(graph, moving, frozen, optimizer, LossOptions(data_sets=3), 8, mesh)
    state = initial_state(optimizer, moving, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    before = jax.tree.map(np.array, state.trainable)
    data_set = [0, 1, 1, 2, 1, 1, 0, 1]
    previous = state
    for number in range(3):
        previous = state
        state, metrics = step(state, frozen, make_batch(mesh, number, data_set))
        sums, counts = np.asarray(metrics.by_data_set)
        assert counts.tolist() == [2, 5, 1]
        assert sums.sum() / 8 == pytest.approx(float(metrics.loss), rel=1e-6)
        assert float(metrics.gradient_norm) > 0.1, "the norm is that before clipping"
        squares = [np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(state.trainable)]
        assert float(metrics.weight_norm) == pytest.approx(np.sqrt(sum(squares)), rel=1e-5)
    assert int(state.step) == 3
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(previous)), "the state is not held twice"
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places)):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    assert step._cache_size() == 1, "one shape of batch, one compilation"
    moved = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.trainable))]
    assert all(moved)


def test_moments_lie_where_their_parameters_do():
    mesh = make_mesh(2, 2, 2)
    state = nnx.state(from_torch(SHAPE, random_bloom(SHAPE)))
    shardings = named_shardings(partition_specs(state), mesh)
    optimizer = make_optimizer(OptimizerConfig(), 10)
    found = initial_state(optimizer, jax.device_put(state, shardings), mesh)
    adam = next(part for part in jax.tree.leaves(found.optimizer, is_leaf=is_adam) if is_adam(part))
    for moment in (adam.mu, adam.nu):
        pairs = zip(jax.tree.leaves(moment), jax.tree.leaves(shardings))
        assert all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf, sharding in pairs)
        assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(moment))
    assert found.step.sharding.is_fully_replicated


def is_adam(part):
    return isinstance(part, optax.ScaleByAdamState)
