"""Plans at the size that they are for: udever-bloom-560m on 8 to 256 chips of TPU v5e, traced or compiled."""

from pathlib import Path

import pytest

from jaxembed.planning.chips import GIB
from jaxembed.planning.plan import Inputs, Plan, TracedTraining, plan_training
from jaxembed.planning.topologies import find_topology
from jaxembed.planning.workload import Lengths

pytestmark = [pytest.mark.tpu, pytest.mark.slow]

CONFIG = str(Path(__file__).parents[2] / "configs" / "udever-bloom-560m.yaml")
LENGTHS = Lengths(60, 300)


def inputs(topology: str, *overrides: object) -> Inputs:
    return Inputs(CONFIG, tuple(map(str, overrides)), find_topology(topology), LENGTHS)


def planned(topology: str, *overrides: object) -> Plan:
    return plan_training(inputs(topology, *overrides), compile_changes=0)


def traced(topology: str, *overrides: object) -> TracedTraining:
    return TracedTraining.of(inputs(topology, *overrides))


def work(step: TracedTraining) -> float:
    """FLOPs of all chips for the tokens that texts hold."""
    return step.flops.total * step.workload.density


@pytest.mark.parametrize("trainable", ["full", "bitfit"])
def test_a_step_fits_on_eight_chips(trainable: str) -> None:
    """And the memory formula agrees with the compiler to 15 %."""
    plan = planned(
        "v5e-8", "--training.trainable", trainable, "--mesh.fsdp", 8, "--mesh.data", 1, "--training.chunk_rows", 16
    )
    assert plan.compiled.fits
    assert plan.compiled.total < 15.75 * GIB
    assert plan.memory.total == pytest.approx(plan.compiled.total, rel=0.15)


def test_memory_of_one_chunk_by_formula() -> None:
    """No loop carries gradients there."""
    plan = planned("v5p-64", "--training.trainable", "full", "--training.chunk_rows", 16)
    assert plan.load.rows.startswith("1 chunk(s)")
    assert plan.memory.total == pytest.approx(plan.compiled.total, rel=0.15)


def test_memory_of_frozen_weights_that_the_compiler_copies() -> None:
    """Those in bfloat16, on tpu7x: a third of what this step takes."""
    plan = planned(
        "tpu7x:2x2x1", "--training.trainable", "bitfit", "--model.param_dtype", "bfloat16", "--training.chunk_rows", 4
    )
    assert plan.memory.total == pytest.approx(plan.compiled.total, rel=0.15)


def test_memory_of_weights_that_fill_no_tiles() -> None:
    """Heads of 80 numbers, and a table of which a chip holds 160 of each row."""
    plan = planned(
        "v5e-64", "--model.path", "bigscience/bloom-3b", "--training.trainable", "full", "--mesh.fsdp", 16,
        "--training.chunk_rows", 8,
    )  # fmt: skip
    assert plan.memory.arguments == pytest.approx(plan.compiled.arguments, rel=0.01)
    assert plan.memory.total == pytest.approx(plan.compiled.total, rel=0.15)


@pytest.mark.parametrize("trainable", ["full", "bitfit"])
def test_work_a_chip_falls_with_chips(trainable: str) -> None:
    """One global batch of 49,152 texts: FLOPs a chip times density fall as 1 / chips from 8 to 256."""
    options = (
        "--training.trainable", trainable, "--training.batch_size", 16_384, "--training.chunk_rows", 8,
        "--mesh.fsdp", 8,
    )  # fmt: skip
    steps = {chips: traced(f"v5e-{chips}", *options) for chips in (8, 16, 64, 256)}
    assert steps[8].workload.texts >= 32_768
    for chips, step in steps.items():
        assert work(step) == pytest.approx(work(steps[8]), rel=0.05), chips
        assert step.memory.total <= 1.02 * steps[8].memory.total, chips


def test_compiled_memory_does_not_rise_with_chips() -> None:
    options = ("--training.batch_size", 16_384, "--training.chunk_rows", 8, "--mesh.fsdp", 8)
    few, many = planned("v5e-8", *options), planned("v5e-256", *options)
    assert few.compiled.fits
    assert many.compiled.fits
    assert many.compiled.total <= 1.02 * few.compiled.total


def test_a_batch_of_65536_fits_on_64_chips() -> None:
    """With chunks; a text costs what it costs in a batch of 1,024."""
    options = ("--training.chunk_rows", 8, "--mesh.fsdp", 8)
    large = planned("v5e-64", "--training.batch_size", 65_536, *options)
    assert large.compiled.fits
    small = traced("v5e-64", "--training.batch_size", 1024, "--training.chunk_rows", 1, "--mesh.fsdp", 8)
    cost = large.flops.total * large.load.density / large.load.texts
    assert cost == pytest.approx(work(small) / small.workload.texts, rel=0.05)
