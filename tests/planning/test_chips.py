"""Peaks against those that JAX knows of."""

import pytest
from jax.experimental.pallas import tpu

from jaxembed.planning.chips import CHIPS
from jaxembed.planning.topologies import find_topology, topology_devices

CORES = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1, "tpu7x": 2}
NAMES = {"tpu7x": "7x"}


@pytest.mark.parametrize("generation", CHIPS)
def test_peaks(generation: str) -> None:
    chip, cores = CHIPS[generation], CORES[generation]
    known = tpu.get_tpu_info_for_chip(tpu.ChipVersion(NAMES.get(generation, generation)), 1)
    assert chip.flops == pytest.approx(known.bf16_ops_per_second * cores, rel=0.01)
    expected = known.mem_bw_bytes_per_second * cores
    assert chip.memory_bandwidth == pytest.approx(expected, rel=0.13 if generation == "v5p" else 0.01)
    # What a program may take is a little less than what is there.
    capacity = known.hbm_capacity_bytes * cores / 2**30 / (2 if generation == "tpu7x" else 1)
    assert 0.9 * capacity < chip.device_memory <= capacity


@pytest.mark.tpu
@pytest.mark.parametrize(("generation", "name"), [("v5e", "v5e-8"), ("v5p", "v5p-8"), ("v6e", "v6e-8")])
def test_kinds(generation: str, name: str) -> None:
    assert {device.device_kind for device in topology_devices(find_topology(name))} == {CHIPS[generation].kind}
