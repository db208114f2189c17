"""Which parameters train, and which of them decay."""

import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from pydantic import ValidationError

from jaxembed.config import LoraConfig, OptimizerConfig, OptimizerGroup, TrainingConfig
from jaxembed.data.loader import RowLayout, TextTable, pack_batch
from jaxembed.errors import InputError
from jaxembed.models.bloom import Bloom, BloomConfig
from jaxembed.sharding import make_mesh, named_shardings, partition_specs
from jaxembed.training.filters import TRAINABLE, count, decays, trains, with_parts
from jaxembed.training.gradient import Batch, LossOptions, global_value_and_grad
from jaxembed.training.step import initial_state, make_optimizer, make_step, put_batch

from blooms import QUICK, abstract_bloom, from_torch, random_bloom

CONFIG = BloomConfig(50, 16, 3, 4)


def trainable(name: str, model: Bloom) -> nnx.State:
    return nnx.split(model, TRAINABLE[name], ...)[1]


def section(trainable: str, **options: Any) -> TrainingConfig:
    return TrainingConfig(steps=1, trainable=trainable, **options)


def split(config: TrainingConfig, model: Any, layers: int, tokens: Sequence[int] = ()) -> Any:
    """(graph, what trains, what is frozen) of the decoder with its parts."""
    return nnx.split(with_parts(model, config, layers, tokens, seed=0), trains(config, layers), ...)


def paths(state: nnx.State) -> set[str]:
    return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


def test_full_is_everything() -> None:
    _, state, frozen = nnx.split(abstract_bloom(CONFIG), TRAINABLE["full"], ...)
    assert count(state) == count(nnx.state(abstract_bloom(CONFIG)))
    assert not nnx.to_flat_state(frozen)


def test_bitfit_is_the_biases_of_every_layer_and_norm() -> None:
    state = trainable("bitfit", abstract_bloom(CONFIG))
    layer = {(name, "bias") for name in ("attention_norm", "qkv", "out", "mlp_norm", "up", "down")}
    assert {path for path, _ in nnx.to_flat_state(state)} == {
        ("table_norm", "bias"),
        ("final_norm", "bias"),
        *(("layers", *path) for path in layer),
        *(("last_layer", *path) for path in layer),
    }
    assert count(state) == 16 * (2 + 3 * (2 + 3 + 1 + 4 + 1))


def test_bitfit_of_560m() -> None:
    assert count(trainable("bitfit", abstract_bloom(BloomConfig(250_880, 1024, 24, 16)))) == 272_384


def test_matrices_decay_and_nothing_else() -> None:
    """Seen through optax: with no gradient, what decays is what moves."""
    state = jax.tree.map(lambda x: jnp.ones(x.shape), trainable("full", abstract_bloom(CONFIG)))
    optimiser = optax.adamw(0.5, weight_decay=0.5, mask=decays)
    updates, _ = optimiser.update(jax.tree.map(jnp.zeros_like, state), optimiser.init(state), state)
    moved: Any = optax.apply_updates(state, updates)
    for path, variable in nnx.to_flat_state(moved):
        expected = 0.75 if path[-1] in ("kernel", "table") else 1.0
        np.testing.assert_array_equal(variable[...], expected, err_msg=str(path))


def test_nothing_of_bitfit_decays() -> None:
    state = trainable("bitfit", abstract_bloom(CONFIG))
    assert not any(jax.tree.leaves(decays(state)))


# ---- parts


def test_lora_trains_its_adapters_and_nothing_else() -> None:
    config = section("lora", lora=LoraConfig(rank=2, targets=["qkv", "down"]))
    _, moving, frozen = split(config, from_torch(CONFIG, random_bloom(CONFIG)), 3)
    layer = {"qkv/lora/a", "qkv/lora/b", "down/lora/a", "down/lora/b"}
    assert paths(moving) == {f"{stack}/{name}" for stack in ("layers", "last_layer") for name in layer}
    assert count(moving) == 3 * 2 * (16 + 3 * 16 + 64 + 16)
    assert paths(frozen) == paths(nnx.state(abstract_bloom(CONFIG)))
    assert all(jax.tree.leaves(decays(moving)))


@pytest.mark.parametrize(("layers", "stacks"), [(1, set()), (2, {"upper_layers"}), (3, {"layers"})])
def test_the_last_layers_train_with_the_final_norm(layers: int, stacks: set[str]) -> None:
    model = from_torch(CONFIG, random_bloom(CONFIG))
    _, moving, frozen = split(section("last_layers", last_layers=layers), model, 3)
    assert {path.split("/")[0] for path in paths(moving)} == {"last_layer", "final_norm", *stacks}
    of_a_layer = count(nnx.state(model.last_layer))
    assert count(moving) == layers * of_a_layer + 2 * 16, "the slices that train alone"
    assert count(frozen) == (3 - layers) * of_a_layer + 2 * 16 + 50 * 16
    assert ("layers/qkv/kernel" in paths(frozen)) == (layers < 3)


def test_more_layers_than_there_are() -> None:
    with pytest.raises(InputError, match=r"training\.last_layers: 4, but the decoder has 3 layers"):
        split(section("last_layers", last_layers=4), abstract_bloom(CONFIG), 3)


@pytest.mark.parametrize("kind", ["rows", "bitfit", "lora", "last_layers"])
def test_rows_train_alone_or_with_others(kind: str) -> None:
    options = {"last_layers": 1} if kind == "last_layers" else {}
    config = section(kind, train_tokens=["[BOQ]", "[EOQ]"], **options)
    model = from_torch(CONFIG, random_bloom(CONFIG))
    without = paths(split(config, model, 3)[1])
    _, moving, frozen = split(config, model, 3, [49, 7])
    assert paths(moving) == {*without, "token_rows/table"}
    assert "table" in paths(frozen)
    np.testing.assert_array_equal(moving["token_rows"]["table"][...], model.table[jnp.array([7, 49])])
    assert bool(without) == (kind != "rows")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"trainable": "bitfit", "lora": {"rank": 2}}, "training.lora is for trainable: lora, found trainable: bitfit"),
        ({"trainable": "lora", "last_layers": 2}, "training.last_layers is for trainable: last_layers"),
        ({"trainable": "last_layers"}, "needs training.last_layers"),
        ({"trainable": "rows"}, "needs training.train_tokens"),
        ({"train_tokens": ["a"]}, "with trainable: full all rows train"),
        ({"trainable": "lora", "lora": {"targets": []}}, "at least 1 item"),
        ({"trainable": "lora", "lora": {"targets": ["up", "up"]}}, "expected each target once"),
        ({"trainable": "lora", "lora": {"targets": ["table"]}}, "'qkv', 'out', 'up' or 'down'"),
        ({"trainable": "lora", "lora": {"rank": 0}}, "greater than or equal to 1"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        TrainingConfig(steps=1, **options)


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({"match": "("}, "expected a regular expression"),
        ({"match": "bias"}, "give learning_rate or weight_decay"),
        ({"match": "bias", "learning_rate": 0.0}, "greater than 0"),
        ({"match": "bias", "weight_decay": -1.0}, "greater than or equal to 0"),
    ],
)
def test_groups_that_say_nothing_sensible(group: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        OptimizerConfig(groups=[group])


# ---- training of parts

SHAPE = BloomConfig(vocab_size=64, dim=32, layers=4, heads=4)
QUERIES, STEPS = 8, 3
OPTIONS = LossOptions(temperature=0.1, tile=5)
KINDS = {
    "lora": (section("lora", lora=LoraConfig(rank=4, alpha=8.0), train_tokens=["a", "b"]), [2, 5, 60]),
    "last_layers": (section("last_layers", last_layers=2), []),
    "bitfit": (section("bitfit", train_tokens=["a"]), [2, 3, 60]),
}
"""What trains, and the rows that train with it."""


def batch_of(step: int, mesh: Mesh, chunk_rows: int = 1) -> Batch:
    """Every text begins with token 2 or 3, as with markers."""
    random = np.random.default_rng(step)
    lengths = np.random.default_rng(0).integers(2, 12, 2 * QUERIES)
    texts = [random.integers(4, SHAPE.vocab_size, length).astype(np.int32) for length in lengths]
    for number, text in enumerate(texts):
        text[0] = 2 + number % 2
    layout = RowLayout(
        16, slots=6, chunk_rows=chunk_rows, chips=mesh.size // mesh.shape["tensor"], chunks=(), density=1
    )
    examples = np.arange(2 * QUERIES).reshape(2, QUERIES).T
    table = TextTable((cast(Any, texts),), np.zeros(1, int), lengths, np.arange(2 * QUERIES, dtype=np.uint64))
    return put_batch(pack_batch(table, examples, np.zeros(QUERIES, int), layout), mesh)


def parts_of(kind: str, mesh: Mesh) -> Any:
    """(graph, what trains, what is frozen), on the mesh; adapters are not at their beginning."""
    config, tokens = KINDS[kind]
    graph, moving, frozen = split(config, from_torch(SHAPE, random_bloom(SHAPE)), SHAPE.layers, tokens)
    random = np.random.default_rng(3)

    def shake(path: tuple[Any, ...], variable: Any) -> Any:
        apart = path[-2:-1] == ("lora",) or path[0] == "token_rows"
        noise = 0.1 * random.normal(size=variable.shape).astype(np.float32)
        return variable.replace(variable[...] + noise) if apart else variable

    moving = nnx.map_state(shake, moving)
    placed = [jax.device_put(state, named_shardings(partition_specs(state), mesh)) for state in (moving, frozen)]
    return graph, *placed


def arrays(state: nnx.State) -> dict[tuple[Any, ...], np.ndarray]:
    return {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(state)}


def run(kind: str, mesh: Mesh, *, check_vma: bool = False, options: LossOptions = OPTIONS, rate: float = 1e-3) -> Any:
    """(losses, what trains before and after, what is frozen before and after) of some steps, and the compiled step."""
    graph, moving, frozen = parts_of(kind, mesh)
    before, held = arrays(moving), arrays(frozen)
    config = OptimizerConfig(
        learning_rate=rate, epsilon=1e-6, weight_decay=0.1, clip_norm=0.5, warmup_steps=0, schedule="constant",
        groups=[OptimizerGroup(match="bias|norm|lora/b", learning_rate=3 * rate)],
    )  # fmt: skip
    optimizer = make_optimizer(config, STEPS)
    state = initial_state(optimizer, moving, mesh)
    step: Any = make_step(graph, moving, frozen, optimizer, options, QUERIES, mesh, check_vma)
    compiled = step.lower(state, frozen, batch_of(0, mesh)).compile(QUICK)
    losses = []
    for number in range(STEPS):
        state, metrics = compiled(state, frozen, batch_of(number, mesh))
        losses.append(float(metrics.loss))
    assert {leaf.shape for leaf in jax.tree.leaves(state.optimizer)} <= {(), *(x.shape for x in before.values())}
    return np.array(losses), (before, arrays(state.trainable)), (held, arrays(frozen)), compiled


def one_device() -> Mesh:
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {kind: run(kind, one_device(), check_vma=True) for kind in KINDS}


@pytest.mark.parametrize("kind", list(KINDS))
def test_frozen_parameters_stay_as_they_are_and_all_others_move(kind: str, alone: dict[str, Any]) -> None:
    _, (before, after), (held, frozen), _ = alone[kind]
    for path, array in held.items():
        assert array.tobytes() == frozen[path].tobytes(), path
    for path, array in before.items():
        moved = (
            np.any(array != after[path], axis=tuple(range(1, array.ndim))) if array.ndim > 1 else array != after[path]
        )
        if path[0] == "token_rows":
            assert moved.tolist() == [True, *moved[1:].tolist()], "the row of a marker"
        elif path[-2:] != ("qkv", "bias"):
            assert moved.all(), path


@pytest.mark.parametrize(
    ("kind", "sizes", "check_vma"),
    [
        ("lora", (2, 2, 2), False),
        ("last_layers", (2, 4, 1), True),
        pytest.param("lora", (2, 4, 1), True, marks=pytest.mark.slow),
        pytest.param("last_layers", (2, 2, 2), False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_mesh_changes_nothing(
    kind: str, sizes: tuple[int, int, int], check_vma: bool, alone: dict[str, Any], record_property
) -> None:
    losses, (before, after), _, _ = alone[kind]
    found, (_, moved), _, _ = run(kind, make_mesh(*sizes), check_vma=check_vma)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    worst = {}
    for path, start in before.items():
        ours, theirs = moved[path], after[path]
        if path[-2:] == ("qkv", "bias"):  # the key part is noise
            ours, theirs, start = (np.delete(x, 1, axis=-3) for x in (ours, theirs, start))
        worst[path] = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - start)
    record_property("weights", float(max(worst.values())))
    assert max(worst.values()) <= 1e-4, worst


def gradient(graph: nnx.GraphDef, moving: nnx.State, frozen: nnx.State) -> dict[tuple[Any, ...], np.ndarray]:
    function = global_value_and_grad(graph, moving, frozen, OPTIONS, QUERIES, one_device(), check_vma=True)
    return arrays(jax.jit(function, compiler_options=QUICK)(moving, frozen, batch_of(0, one_device()))[1])


@functools.cache
def gradient_of_everything() -> Any:
    """`gradient` for all models of `SHAPE` that train whole, compiled once."""
    graph, moving, frozen = nnx.split(from_torch(SHAPE, random_bloom(SHAPE)), TRAINABLE["full"], ...)
    function = global_value_and_grad(graph, moving, frozen, OPTIONS, QUERIES, one_device(), check_vma=True)
    compiled = jax.jit(function, compiler_options=QUICK)
    return lambda model: arrays(compiled(*nnx.split(model, TRAINABLE["full"], ...)[1:], batch_of(0, one_device()))[1])


def test_gradients_of_parts_follow_from_those_of_the_whole() -> None:
    """dL/da = s · dL/dW · bᵀ, dL/db = s · aᵀ · dL/dW, at W + s · a · b; a row's is that of the table."""
    graph, moving, frozen = parts_of("lora", one_device())
    found = gradient(graph, moving, frozen)
    scaling, parts = 8 / 4, arrays(moving)
    formulas = {
        "qkv": ("ldr,lrqhk->lqdhk", "lqdhk,lrqhk->ldr", "ldr,lqdhk->lrqhk"),
        "out": ("lhkr,lrd->lhkd", "lhkd,lrd->lhkr", "lhkr,lhkd->lrd"),
        "up": ("ldr,lrm->ldm", "ldm,lrm->ldr", "ldr,ldm->lrm"),
        "down": ("lmr,lrd->lmd", "lmd,lrd->lmr", "lmr,lmd->lrd"),
    }
    model = from_torch(SHAPE, random_bloom(SHAPE))
    for (stack, target), (sum_of, _, _) in (((s, t), f) for s in ("layers", "last_layer") for t, f in formulas.items()):
        a, b = parts[stack, target, "lora", "a"], parts[stack, target, "lora", "b"]
        alone = stack == "last_layer"
        added = scaling * np.einsum(sum_of.replace("l", "") if alone else sum_of, a, b)
        module = getattr(getattr(model, stack), target)
        module.kernel = module.kernel.replace(module.kernel[...] + added)
    ids = np.array(KINDS["lora"][1])
    model.table = model.table.replace(model.table[...].at[ids].set(parts["token_rows", "table"]))
    whole = gradient_of_everything()(model)
    for path, array in found.items():
        if path[0] == "token_rows":
            expected = whole["table",][ids]
        else:
            stack, target, _, name = path
            formula = formulas[target][1 if name == "a" else 2]
            formula = formula.replace("l", "") if stack == "last_layer" else formula
            kernel = whole[stack, target, "kernel"]
            other = parts[stack, target, "lora", "b" if name == "a" else "a"]
            expected = scaling * np.einsum(formula, *((kernel, other) if name == "a" else (other, kernel)))
        assert np.abs(array - expected).max() <= 1e-5 * np.abs(expected).max(), path


def test_gradients_of_the_last_layers_are_those_of_the_whole() -> None:
    found = gradient(*parts_of("last_layers", one_device()))
    whole = gradient_of_everything()(from_torch(SHAPE, random_bloom(SHAPE)))
    for path, array in found.items():
        expected = whole["layers", *path[1:]][-1:] if path[0] == "upper_layers" else whole[path]
        assert np.abs(array - expected).max() <= 1e-5 * np.abs(whole["layers", *path[1:]] if path[0] == "upper_layers"
                                                                else expected).max(), path  # fmt: skip


def test_frozen_layers_keep_nothing_for_a_backward_pass() -> None:
    """A decoder of many layers of which one trains needs far less memory than with all of them."""
    deep = BloomConfig(vocab_size=64, dim=32, layers=17, heads=4)
    options = LossOptions(temperature=0.1, chunk_checkpoint="none")
    found = {}
    for layers in (2, 17):
        config = section("last_layers", last_layers=layers)
        graph, moving, frozen = split(config, from_torch(deep, random_bloom(deep)), 17)
        function = global_value_and_grad(graph, moving, frozen, options, QUERIES, one_device())
        compiled = jax.jit(function).lower(moving, frozen, batch_of(0, one_device(), chunk_rows=16)).compile(QUICK)
        found[layers] = compiled.memory_analysis().temp_size_in_bytes
    assert found[2] < found[17] / 3, found


def test_adapters_move_under_bfloat16() -> None:
    """By steps that bfloat16 parameters would lose."""
    rate = 1e-5
    options = LossOptions(temperature=0.1, dtype=jnp.bfloat16)
    _, (before, after), (held, frozen), _ = run("lora", one_device(), options=options, rate=rate)
    for path, array in before.items():
        change = np.abs(after[path] - array)
        assert array.dtype == np.float32
        if path[0] != "token_rows":
            assert np.mean(change > rate / 2) > 0.8, path
            lost = np.asarray(jnp.asarray(after[path], jnp.bfloat16) == jnp.asarray(array, jnp.bfloat16))
            assert lost.mean() > 0.5, path
    for path, array in held.items():
        assert array.tobytes() == frozen[path].tobytes(), path
