"""Names of TPU slices, and what is said of those that do not exist."""

import importlib.util

import pytest

from jaxembed.errors import InputError
from jaxembed.planning import topologies
from jaxembed.planning.topologies import find_topology, topology_devices


@pytest.mark.parametrize(
    ("name", "generation", "layout", "chips", "devices"),
    [
        ("v5e-8", "v5e", "2x4", 8, 8),
        ("v5litepod-16", "v5e", "4x4", 16, 16),
        ("v5e-64", "v5e", "8x8", 64, 64),
        ("v5p-8", "v5p", "2x2x1", 4, 4),  # its name counts TensorCores
        ("v5p-64", "v5p", "2x4x4", 32, 32),
        ("v6e-64", "v6e", "8x8", 64, 64),
        ("V6E-8", "v6e", "2x4", 8, 8),
        ("v5p:2x2x4", "v5p", "2x2x4", 16, 16),
        ("tpu7x:2x2x1", "tpu7x", "2x2x1", 4, 8),
    ],
)
def test_names(name: str, generation: str, layout: str, chips: int, devices: int) -> None:
    found = find_topology(name)
    assert (found.generation, found.layout, found.chips, found.devices) == (generation, layout, chips, devices)
    assert f"{chips} chip" in str(found)


@pytest.mark.parametrize("name", ["v5e-7", "v5p-4", "v9-8", "v5e:2x2x2", "v5p:2x4", "v5e", "8", "v5e:0x4"])
def test_unknown_names_list_what_there_is(name: str) -> None:
    with pytest.raises(InputError, match=r"no TPU slice is called .*v5e-1 4 8 .*v5p-8 16 .*tpu7x:2x2x1"):
        find_topology(name)


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'jaxembed\[tpu\]'"):
        topology_devices(find_topology("v5e-8"))


@pytest.mark.tpu
def test_every_named_slice_is_one_that_libtpu_knows() -> None:
    for generation, layouts in topologies._LAYOUTS.items():
        for chips in layouts:
            cores = topologies._CORES_IN_NAME.get(generation, 1)
            topology = find_topology(f"{generation}-{chips * cores}")
            devices = topology_devices(topology)
            assert len(devices) == topology.devices == chips * topology.devices_of_chip, topology
    assert len(topology_devices(find_topology("tpu7x:2x2x1"))) == 8
    with pytest.raises(InputError, match="libtpu does not have it"):
        topology_devices(find_topology("v5e:3x5"))
