"""The mesh, the rules, and what moves between chips: the hooks of many chips against those of one."""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxembed.errors import InputError
from jaxembed.models.bloom import Bloom, BloomConfig
from jaxembed.sharding import (
    BATCH_AXES,
    MESH_AXES,
    RULES,
    Alone,
    Chips,
    Hooks,
    check_divisible,
    compute_dtype,
    make_mesh,
    named_shardings,
    partition_spec,
    partition_specs,
)

from blooms import abstract_bloom

CONFIG = BloomConfig(vocab_size=50, dim=32, layers=3, heads=4)


def flat(state) -> dict[tuple, nnx.Variable]:
    return dict(nnx.to_flat_state(state))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((), (8, 1, 1)),
        ((-1, 4), (2, 4, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 1, -1), (1, 1, 8)),
        ((2, 4, 1), (2, 4, 1)),
        ((1, -1, 2), (1, 4, 2)),
    ],
)
def test_mesh_takes_what_the_others_leave(sizes: Any, expected: tuple[int, ...]) -> None:
    mesh = make_mesh(*sizes)
    assert tuple(mesh.shape[axis] for axis in MESH_AXES) == expected
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


def test_mesh_of_some_devices() -> None:
    mesh = make_mesh(devices=jax.devices()[2:4])
    assert [d.id for d in mesh.devices.flat] == [2, 3]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), r"3 × 1 × 1 does not make the 8 devices that are here; set one of them to -1"),
        ((-1, 3, 1), "-1 × 3 × 1 does not make the 8 devices that are here; choose sizes that divide them"),
        ((-1, 16, 1), "does not make the 8 devices"),
        ((-1, -1, 1), "at most one of them -1"),
        ((0, 1, 1), "must be positive"),
        ((8, 1, -2), "must be positive"),
    ],
)
def test_a_mesh_that_cannot_be_is_an_error_that_says_why(sizes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_mesh(*sizes)


@dataclasses.dataclass(frozen=True)
class SliceDevice:
    """As much of a TPU of several slices as a mesh asks of it."""

    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def test_only_data_goes_from_slice_to_slice() -> None:
    devices = [SliceDevice(index) for index in (0, 0, 1, 1)]
    for sizes in ((1, 4, 1), (1, 2, 2), (1, 1, 4)):
        with pytest.raises(InputError, match=r"mesh\.data: 1 is no multiple of the 2 slices; .* only data"):
            make_mesh(*sizes, devices=devices)


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("topology", "sizes", "slices"),
    [
        ("v5e:2x4", (4, 4, 1), 2),
        ("v5e:2x4", (2, 4, 2), 2),
        ("v5e:4x4", (3, 16, 1), 3),
        ("v5e:4x8", (16, 2, 1), 1),
        ("v5p:2x4x4", (4, 8, 1), 1),
        ("v6e:4x4", (2, 8, 1), 1),
        ("v5p:2x2x4", (2, 8, 2), 2),
    ],
)
def test_mesh_of_a_topology(topology: str, sizes: tuple[int, ...], slices: int) -> None:
    """Every shape has a mesh; on several slices each is a block of `data`."""
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    devices = list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    mesh = make_mesh(*sizes, devices=devices)
    assert tuple(mesh.shape.values()) == sizes
    assert len({id(device) for device in mesh.devices.flat}) == len(devices)
    if slices > 1:
        for number, block in enumerate(np.split(mesh.devices, slices)):
            assert {device.slice_index for device in block.flat} == {number}


def test_rules_name_axes_of_the_mesh() -> None:
    assert set(RULES.values()) <= {*MESH_AXES, None}


def test_specs_of_a_bloom() -> None:
    specs = {path: v.get_value() for path, v in flat(partition_specs(nnx.state(abstract_bloom(CONFIG)))).items()}
    assert specs["table",] == PartitionSpec(None, "fsdp")
    assert specs["layers", "qkv", "kernel"] == PartitionSpec(None, None, "fsdp", "tensor", None)
    assert specs["last_layer", "out", "kernel"] == PartitionSpec("tensor", None, "fsdp")
    assert specs["layers", "down", "kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["layers", "up", "bias"] == PartitionSpec(None, "tensor")
    assert specs["layers", "down", "bias"] == PartitionSpec(None, None)
    for path, variable in flat(nnx.state(abstract_bloom(CONFIG))).items():
        assert len(specs[path]) == len(variable.axes) == len(variable.shape), path
        assert ("fsdp" in specs[path]) == (path[-1] in ("kernel", "table")), path


def test_parameters_made_on_the_mesh_lie_as_the_rules_say() -> None:
    """No chip ever holds more than its part of a matrix: vocabulary and layers are cut along the model dimension."""
    mesh = make_mesh(2, 4)
    abstract = nnx.state(abstract_bloom(CONFIG))
    shardings = named_shardings(partition_specs(abstract), mesh)
    zeros = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract), out_shardings=shardings)()
    for path, variable in flat(zeros).items():
        part = variable[...].addressable_shards[0].data.shape
        expected = [size // 4 if axis == "embed" else size for axis, size in zip(variable.axes, variable.shape)]
        assert part == tuple(expected), path


def test_a_mesh_that_does_not_divide_the_model_names_the_parameter() -> None:
    state = nnx.state(abstract_bloom(CONFIG))
    check_divisible(state, make_mesh(1, 8, 1))
    check_divisible(state, make_mesh(2, 1, 4))
    with pytest.raises(
        InputError, match=r"mesh\.tensor: 8 does not divide the 'heads' dimension 4 of parameter last_layer/out/kernel"
    ):
        check_divisible(state, make_mesh(1, 1, 8))
    odd = nnx.state(abstract_bloom(BloomConfig(vocab_size=50, dim=20, layers=2, heads=4)))
    with pytest.raises(InputError, match=r"mesh\.fsdp: 8 does not divide the 'embed' dimension 20 of parameter "):
        check_divisible(odd, make_mesh(1, 8, 1))


def test_both_hooks_are_hooks() -> None:
    assert isinstance(Alone(), Hooks)
    assert isinstance(Chips(), Hooks)


@pytest.fixture(scope="module")
def model() -> Bloom:
    graph, state = nnx.split(abstract_bloom(CONFIG))
    rng = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("sizes", [(8, 1), (2, 4), (1, 8)])
def test_chips_together_hold_what_one_alone_has(model: Bloom, sizes: tuple[int, int], check_vma: bool) -> None:
    """Each hook, inside a `shard_map`, in value and in gradient."""
    mesh = make_mesh(*sizes)
    rng = np.random.default_rng(1)
    ids = jnp.asarray(rng.integers(0, 50, (8, 6)))
    rows = jnp.asarray(rng.normal(size=(16, 5)), jnp.float32)
    parameters = {"kernel": model.last_layer.out.kernel, "bias": model.last_layer.up.bias, "table": model.table}
    targets = [rng.normal(size=shape).astype(np.float32) for shape in ((4, 8, 32), (128,), (8, 6, 32), (16, 5))]

    def results(hooks: Hooks, parameters, ids, rows) -> tuple[jax.Array, ...]:
        return (
            hooks.weight(parameters["kernel"], jnp.float32),
            hooks.weight(parameters["bias"], jnp.float32),
            hooks.lookup(parameters["table"], ids, jnp.float32),
            hooks.everyone(rows),
        )

    def loss(outputs, targets) -> jax.Array:
        return jnp.stack([(output * target).sum() for output, target in zip(outputs, targets)]).sum()

    alone = results(Alone(), parameters, ids, rows)
    expected = jax.grad(lambda p, r: loss(results(Alone(), p, ids, r), targets), argnums=(0, 1))(parameters, rows)

    specs = {"kernel": PartitionSpec(None, None, "fsdp"), "bias": PartitionSpec(), "table": PartitionSpec(None, "fsdp")}
    everything = PartitionSpec()
    by_chip = PartitionSpec(BATCH_AXES)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs, by_chip, by_chip, (everything, everything, by_chip, everything)),
        out_specs=((by_chip, by_chip, by_chip, by_chip), (specs, by_chip)),
        axis_names=set(BATCH_AXES),
        check_vma=check_vma,
    )
    def together(parameters, ids, rows, targets):

        def vary(x, have):
            return jax.lax.pcast(x, tuple(a for a in BATCH_AXES if a not in have), to="varying")

        kernel, bias, lookup, everyone = targets
        targets = vary(kernel, ()), vary(bias, ()), lookup, vary(everyone, ())
        parameters = {
            "kernel": parameters["kernel"].replace(vary(parameters["kernel"][...], ("fsdp",))),
            "bias": parameters["bias"].replace(vary(parameters["bias"][...], ())),
            "table": parameters["table"].replace(vary(parameters["table"][...], ("fsdp",))),
        }
        outputs = results(Chips(), parameters, ids, rows)
        gradient = jax.grad(lambda p, r: loss(results(Chips(), p, ids, r), targets), argnums=(0, 1))(parameters, rows)
        summed = {
            "kernel": jax.tree.map(lambda g: jax.lax.psum(g, "data"), gradient[0]["kernel"]),
            "bias": jax.tree.map(lambda g: jax.lax.psum(g, BATCH_AXES), gradient[0]["bias"]),
            "table": jax.tree.map(lambda g: jax.lax.psum(g, "data"), gradient[0]["table"]),
        }
        return outputs, (summed, gradient[1])

    outputs, (gradient, row_gradient) = together(parameters, ids, rows, tuple(map(jnp.asarray, targets)))
    # Eight chips side by side: each has the whole weight and all embeddings, and the looked-up rows of its own ids.
    for name, index in (("kernel", 0), ("bias", 1), ("everyone", 3)):
        for copy in np.split(np.asarray(outputs[index]), 8):
            np.testing.assert_array_equal(copy, alone[index], err_msg=name)
    np.testing.assert_array_equal(outputs[2], alone[2])
    # Each chip added its own loss of the whole weights and of all embeddings: eight times one's.
    for name, copies in (("kernel", 8), ("bias", 8), ("table", 1)):
        np.testing.assert_allclose(gradient[name][...], copies * expected[0][name][...], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(row_gradient, 8 * expected[1], rtol=1e-5)


def test_a_layer_of_a_stack_is_gathered_along_its_own_axis(model: Bloom) -> None:
    """A scan takes the layer axis from the array and leaves it in the names."""
    kernel = model.layers.qkv.kernel
    mesh = make_mesh(1, 8)

    def first(kernel: nnx.Param) -> jax.Array:
        return jax.lax.scan(lambda _, k: (0, Chips().weight(k, jnp.float32)), 0, kernel)[1]

    spec = partition_spec(kernel.axes)
    gathered = jax.shard_map(first, mesh=mesh, in_specs=(spec,), out_specs=PartitionSpec(), check_vma=False)
    np.testing.assert_array_equal(jax.jit(gathered)(kernel), kernel[...])


def test_a_weight_moves_in_the_dtype_of_the_computation(model: Bloom) -> None:
    spec = partition_spec(model.table.axes)
    gather = jax.shard_map(
        lambda table: Chips().weight(table, jnp.bfloat16),
        mesh=make_mesh(1, 8),
        in_specs=(spec,),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    text = str(jax.make_jaxpr(gather)(model.table))
    assert "bf16[50,32] = all_gather" in text


def test_named_shardings_reach_into_any_tree() -> None:
    mesh = make_mesh()
    found = named_shardings({"a": [PartitionSpec("data"), PartitionSpec()]}, mesh)
    assert found == {"a": [NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())]}


class FakeDevice:
    def __init__(self, platform: str, capability: str | None = None):
        self.platform = platform
        if capability is not None:
            self.compute_capability = capability


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("auto", FakeDevice("cpu"), jnp.float32),
        ("auto", FakeDevice("tpu"), jnp.bfloat16),
        ("auto", FakeDevice("gpu", "7.5"), jnp.float32),
        ("auto", FakeDevice("gpu", "8.0"), jnp.bfloat16),
        ("auto", FakeDevice("gpu", "9.0"), jnp.bfloat16),
        ("auto", FakeDevice("gpu", "10.0"), jnp.bfloat16),
        ("bfloat16", FakeDevice("cpu"), jnp.bfloat16),
        ("float32", FakeDevice("tpu"), jnp.float32),
    ],
)
def test_compute_dtype(name: str, device: FakeDevice, expected) -> None:
    assert compute_dtype(name, [device]) == expected
