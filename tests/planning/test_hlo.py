"""The reader of compiled programs: every spelling in a short text of its own, then programs that say what they move."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxembed.planning.hlo import Collective, read_collectives
from jaxembed.sharding import make_mesh

HEAD = "HloModule jit_step, is_scheduled=true, num_partitions=8\n\n"


def read(*computations: str) -> list[Collective]:
    return read_collectives(HEAD + "\n\n".join(computations) + "\n")


def computation(name: str, *lines: str, entry: bool = False) -> str:
    *before, last = lines
    body = "".join(f"  {line}\n" for line in before) + f"  ROOT {last}\n"
    return f"{'ENTRY ' if entry else ''}%{name} (param: f32[8]) -> f32[8] {{\n{body}}}"


def entry(*lines: str) -> str:
    return computation("main", *lines, entry=True)


def gather(name: str, operand: str = "x", attributes: str = "", layout: str = "{0}", channel: int = 1) -> str:
    return (
        f"%{name} = bf16[8]{layout} all-gather(%{operand}), channel_id={channel}, "
        f"replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, dimensions={{0}}{attributes}"
    )


@pytest.mark.parametrize(
    ("spelling", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, to_apply=%sum", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[4], dimensions={0}", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x={0}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x={0}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x={0}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'b'}, x={0}", ((0, 1), (2, 3))),
        ("replica_groups={}, dimensions={0}", (tuple(range(8)),)),
    ],
)
def test_groups(spelling: str, groups: tuple) -> None:
    (found,) = read(entry(f"%a = f32[8]{{0}} all-reduce(%x), channel_id=1, {spelling}"))
    assert found.groups == groups
    assert found.group_size == len(groups[0])


def test_groups_in_an_unknown_spelling_are_an_error() -> None:
    with pytest.raises(ValueError, match="unknown spelling"):
        read(entry("%a = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups=everybody"))


def test_a_text_that_is_no_program_is_an_error() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        read_collectives("HloModule empty\n")


def test_a_group_of_one_moves_nothing() -> None:
    assert read(entry("%a = f32[8]{0} all-reduce(%x), replica_groups={{0},{1},{2},{3}}, to_apply=%sum")) == []


def test_several_arrays_at_once_in_tiled_layouts() -> None:
    """A tuple's type holds parentheses, of layouts, and comments."""
    results = "(f32[3,2]{1,0:T(2,128)S(1)}, bf16[5]{0:T(256)(128)(2,1)}, /*index=2*/pred[]{:T(512)}, f8e4m3fn[4]{0})"
    (a, b, c, d) = read(entry(f"%a = {results} all-reduce(%x, %y, %z, %w), replica_groups=[1,8]<=[8], to_apply=%sum"))
    assert [(each.dtype, each.shape, each.bytes) for each in (a, b, c, d)] == [
        ("f32", (3, 2), 24),
        ("bf16", (5,), 10),
        ("pred", (), 1),
        ("f8e4m3fn", (4,), 4),
    ]
    assert not a.in_loop
    assert not a.fused


def test_pieces_of_an_all_to_all_are_one_array() -> None:
    (found,) = read(entry("%a = (f32[2,3]{1,0}, f32[2,3]{1,0}) all-to-all(%x, %y), replica_groups=[4,2]<=[8]"))
    assert (found.shape, found.bytes) == ((2, 2, 3), 48)


@pytest.mark.parametrize(
    ("line", "kind", "shape"),
    [
        ("(f32[2]{0}, f32[16]{0}) all-gather-start(%x)", "all-gather", [(16,)]),
        ("((f32[2]{0}, f32[1]{0}), (f32[16]{0}, f32[8]{0})) all-gather-start(%x, %y)", "all-gather", [(16,), (8,)]),
        ("f32[16]{0} all-reduce-start(%x)", "all-reduce", [(16,)]),
        ("((f32[16]{0}), f32[2]{0}) reduce-scatter-start(%x)", "reduce-scatter", [(2,)]),
    ],
)
def test_what_is_started_arrives(line: str, kind: str, shape: list) -> None:
    found = read(
        entry(
            f"%s = {line}, channel_id=3, replica_groups=[1,8]<=[8], dimensions={{0}}",
            f"%d = f32[16]{{0}} {kind}-done(%s)",
        )
    )
    assert [each.kind for each in found] == [kind] * len(shape)
    assert [each.shape for each in found] == shape


def test_an_operation_wrapped_as_asynchronous() -> None:
    wrapped = computation("wrapped", "%x = f32[16]{0} parameter(0)", gather("g").replace("bf16[8]", "f32[2]"))
    start = "%s = ((f32[16]{0}), f32[2]{0}, u32[]) async-start(%x), calls=%wrapped"
    (found,) = read(wrapped, entry(start, "%d = f32[2]{0} async-done(%s)"))
    assert (found.kind, found.shape, found.fused) == ("all-gather", (2,), False)


def test_a_permutation_says_who_sends_to_whom() -> None:
    (found,) = read(
        entry(
            "%s = (f32[3]{0}, f32[3]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}",
            "%d = f32[3]{0} collective-permute-done(%s)",
        )
    )
    assert (found.groups, found.bytes, found.wire_bytes) == (((0, 1), (1, 0)), 12, 12)


# ---- loops


def loop(condition: str, body: str, attributes: str = "") -> str:
    return f"%w = (s32[], f32[8]) while(%state), condition=%{condition}, body=%{body}{attributes}"


def condition(name: str, bound: int) -> str:
    """As a TPU's compiler writes it: the bound, and a constant that has nothing to do with it."""
    return computation(
        name,
        "%other = s32[] constant(1000)",
        f"%bound = s32[]{{:T(128)}} constant({bound}), metadata={{}}",
        "%state = (s32[]{:T(128)}, f32[8]{0}) parameter(0)",
        "%counter = s32[]{:T(128)} get-tuple-element(%state), index=0",
        "%less = pred[]{:T(512)} compare(%counter, %bound), direction=LT",
    )


def body(name: str, *lines: str, step: int = 1) -> str:
    return computation(
        name,
        "%state = (s32[], f32[8]) parameter(0)",
        "%counter = s32[] get-tuple-element(%state), index=0",
        f"%one = s32[] constant({step})",
        "%next = s32[] add(%counter, %one)",
        *lines,
        "%end = (s32[], f32[8]) tuple(%next, %x)",
    )


def begin(value: int) -> tuple[str, str, str]:
    return (
        f"%first = s32[] constant({value})",
        "%counter = s32[] copy(%first)",
        "%state = (s32[], f32[8]) tuple(%counter, %x)",
    )


@pytest.mark.parametrize(("start", "step", "times"), [(0, 1, 12), (2, 1, 10), (0, 5, 3), (12, 1, 0)])
def test_trips_by_the_counter(start: int, step: int, times: int) -> None:
    program = [condition("c", 12), body("b", gather("g"), step=step), entry(*begin(start), loop("c", "b"))]
    (found,) = read(*program)
    assert (found.times, found.in_loop, found.total_bytes) == (times, True, 16 * times)


def test_trips_as_the_loop_says_and_loops_in_loops() -> None:
    known = ', backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}'
    found = read(
        condition("c", 12),
        body("inner", gather("g")),
        body("outer", "%first = s32[] constant(0)", "%state = (s32[], f32[8]) tuple(%first, %x)", loop("c", "inner")),
        entry(gather("h"), *begin(0), loop("c", "outer", known)),
    )
    assert [(each.times, each.in_loop) for each in found] == [(1, False), (36, True)]


def test_a_comparison_in_a_fusion() -> None:
    """As a CPU's compiler writes it."""
    fused = condition("c", 7).replace("compare(%counter, %bound), direction=LT", "fusion(%counter, %bound), calls=%f")
    (found,) = read(fused, body("b", gather("g")), entry(*begin(0), loop("c", "b")))
    assert found.times == 7


def test_a_loop_without_a_bound_is_an_error() -> None:
    endless = computation("c", "%state = (s32[], f32[8]) parameter(0)", "%t = pred[] custom-call(%state)")
    with pytest.raises(ValueError, match="no constant in its condition"):
        read(endless, body("b", gather("g")), entry(*begin(0), loop("c", "b")))


def test_both_branches_count() -> None:
    found = read(
        computation("one", gather("g")),
        computation("two", gather("g")),
        entry("%c = f32[8] conditional(%p, %x, %x), branch_computations={%one, %two}"),
    )
    assert len(found) == 2


# ---- TPU


def overlapped(chain: int, operand: str = "x") -> list[str]:
    """One all-gather as a TPU's compiler overlaps it with two fusions: begun, carried on twice, ended."""
    fusions = []
    for number, (name, layout) in enumerate(
        [
            ("start", "{0}"),
            ("async_collective_fusion.1", "{0:S(1)}"),
            ("async_collective_fusion.2", "{0}"),
            ("done", "{0}"),
        ]
    ):
        attributes = f', frontend_attributes={{chain_id="{chain}"}}'
        fusions.append(
            computation(
                f"{name}_{chain}",
                f"%x = bf16[2]{layout} parameter(0)",
                gather(f"g.{number}", attributes=attributes, layout=layout),
                f"%c = bf16[8]{layout} custom-call(%g.{number})",
            )
        )
    return fusions


def calls(*chains: int) -> list[str]:
    return [
        f"%f{chain}.{name} = bf16[8]{{0}} fusion(%x), kind=kCustom, calls=%{name}_{chain}"
        for chain in chains
        for name in ("start", "async_collective_fusion.1", "async_collective_fusion.2", "done")
    ]


def test_an_overlapped_gather_counts_once_in_each_place() -> None:
    """Two of one shape and channel in the loop, and one more of the same shape behind it."""
    found = read(
        *overlapped(0), *overlapped(1), *overlapped(2),
        condition("c", 4), body("b", *calls(0, 1)), entry(*begin(0), loop("c", "b"), *calls(2)),
    )  # fmt: skip
    assert [(each.times, each.fused) for each in found] == [(4, True), (4, True), (1, True)]


def test_a_gather_without_chains_counts_once_by_its_channel() -> None:
    fusions = [
        computation(f"f{number}", "%x = bf16[2]{0} parameter(0)", gather("g", channel=channel))
        for number, channel in enumerate((5, 5, 6))
    ]
    found = read(*fusions, entry(*(f"%c{n} = bf16[8]{{0}} fusion(%x), kind=kCustom, calls=%f{n}" for n in range(3))))
    assert len(found) == 2


def test_a_reduction_that_is_sliced_in_its_fusion_is_a_reduce_scatter() -> None:
    fusion = computation(
        "all-reduce-scatter",
        "%input = f32[200,128]{1,0:T(8,128)S(1)} parameter(0)",
        "%zero = f32[] constant(0)",
        "%padded = f32[256,128]{1,0:T(8,128)} pad(%input, %zero), padding=0_56x0_0",
        "%r = f32[256,128]{1,0:T(8,128)} all-reduce(%padded), channel_id=50, "
        "replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum",
        "%place = u32[] partition-id()",
        "%s = f32[32,128]{1,0:T(8,128)S(1)} dynamic-slice(%r, %place, %place), dynamic_slice_sizes={32,128}",
    )
    reduced = computation(
        "reduced",
        "%x = f32[8]{0} parameter(0)",
        "%r = f32[8]{0} all-reduce(%x), channel_id=51, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum",
    )
    scattered, whole = read(
        fusion, reduced,
        entry("%f = f32[32,128] fusion(%x), calls=%all-reduce-scatter", "%g = f32[8] fusion(%x), calls=%reduced"),
    )  # fmt: skip
    assert (scattered.kind, scattered.shape, scattered.wire_bytes) == ("reduce-scatter", (32, 128), 7 * 32 * 128 * 4)
    assert (whole.kind, whole.shape, whole.wire_bytes) == ("all-reduce", (8,), 2 * 7 / 8 * 32)


# ---- compiled programs

MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2)]


def exchange(mesh: Mesh) -> Any:
    """A program whose collectives are known, compiled for the mesh; on a mesh of one chip an axis moves nothing."""

    def each_chip(x: jax.Array) -> jax.Array:
        def layer(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
            whole = jax.lax.all_gather(carry, "fsdp", axis=0, tiled=True)  # [1,024, 128]
            return jax.lax.psum_scatter(jnp.tanh(whole), "fsdp", scatter_dimension=0, tiled=True), None

        x, _ = jax.lax.scan(layer, x, None, length=5)
        everyone = jax.lax.all_gather(jnp.int32(x), ("data", "fsdp"), axis=0, tiled=True)
        return jax.lax.psum(x, "data") + everyone.astype(jnp.float32).sum()

    part = 1024 // mesh.shape["fsdp"]
    spec = PartitionSpec(("data", "fsdp"))
    function = jax.shard_map(
        each_chip,
        mesh=mesh,
        in_specs=spec,
        out_specs=PartitionSpec("fsdp"),
        axis_names={"data", "fsdp"},
        check_vma=False,
    )
    chips = mesh.shape["data"] * mesh.shape["fsdp"]
    argument = jax.ShapeDtypeStruct((part * chips, 128), jnp.float32, sharding=NamedSharding(mesh, spec))
    return jax.jit(function).lower(argument).compile()


def assert_exchange(found: list[Collective], mesh: Mesh) -> None:
    data, fsdp, _ = mesh.devices.shape
    part = 1024 // fsdp
    expected = {("all-gather", ("data", "fsdp")[: 1 + (fsdp > 1)], "s32", part * data * fsdp * 128 * 4, 1)}
    expected |= {("all-reduce", ("data",), "f32", part * 128 * 4, 1)}
    if fsdp > 1:
        expected |= {("all-gather", ("fsdp",), "f32", 1024 * 128 * 4, 5)}
        expected |= {("reduce-scatter", ("fsdp",), "f32", part * 128 * 4, 5)}
    assert {(each.kind, each.axes(mesh), each.dtype, each.bytes, each.times) for each in found} == expected
    assert len(found) == len(expected)
    assert all(each.in_loop == (each.times == 5) for each in found)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_collectives_of_a_program_for_cpu(sizes: tuple[int, int, int]) -> None:
    mesh = make_mesh(*sizes)
    assert_exchange(read_collectives(exchange(mesh).as_text()), mesh)


def test_axes_go_by_the_place_in_the_mesh_not_by_device() -> None:
    devices = np.asarray(jax.devices())[[3, 1, 2, 0, 7, 5, 6, 4]].reshape(2, 4, 1)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    assert_exchange(read_collectives(exchange(mesh).as_text()), mesh)


@pytest.mark.tpu
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_collectives_of_a_program_for_tpu(sizes: tuple[int, int, int]) -> None:
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    from jax.experimental import topologies

    mesh = make_mesh(*sizes, devices=list(topologies.get_topology_desc("v5e:2x4", "tpu").devices))
    assert_exchange(read_collectives(exchange(mesh).as_text()), mesh)
