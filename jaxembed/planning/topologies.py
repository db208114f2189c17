"""TPU slices by the cloud's own names, and their devices for compiling, on a machine that has none of them."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from jaxembed.errors import InputError

_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
}
_LAYOUTS: Mapping[str, Mapping[int, str]] = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT}
"""Generation → number of chips → how they are laid out, for slices that the cloud has under a name of its own."""

_CORES_IN_NAME = {"v4": 2, "v5p": 2}
"""Cloud names of these count TensorCores, two a chip: v5p-8 has four chips."""

_DEVICES_OF_CHIP = {"tpu7x": 2}
"""Where JAX sees more than one device a chip."""

_GENERATIONS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e"}

# Nothing here needs a TPU: that none is asked for, and that two processes may compile at once.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

# The compiler recurses deeper than its threads' own stacks allow, for bloom-3b on tpu7x, and the process dies.
_STACK_SIZE = "--fibers_default_thread_stack_size", 4 << 20


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice."""

    name: str
    """As it was asked for."""
    generation: str
    """v4, v5e, v5p, v6e or tpu7x."""
    layout: str
    """Chips along each dimension, such as 2x4."""

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.layout.split("x")))

    @property
    def devices_of_chip(self) -> int:
        """Devices that JAX sees of each chip."""
        return _DEVICES_OF_CHIP.get(self.generation, 1)

    @property
    def devices(self) -> int:
        return self.chips * self.devices_of_chip

    def __str__(self) -> str:
        return f"{self.name} ({self.chips} chip{'s' if self.chips > 1 else ''}, {self.generation}:{self.layout})"


def find_topology(name: str) -> Topology:
    """The slice of a cloud name (v5e-8, v5p-64) or of a layout of chips (v5p:2x2x4).

    Raises:
        InputError: no such slice; lists those that there are.
    """
    if match := re.fullmatch(r"([a-z0-9]+)-(\d+)", name.lower()):
        generation, number = _ALIASES.get(match[1], match[1]), int(match[2])
        chips, rest = divmod(number, _CORES_IN_NAME.get(generation, 1))
        layout = _LAYOUTS.get(generation, {}).get(chips)
        if layout is not None and not rest:
            return Topology(name, generation, layout)
    elif match := re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)+)", name.lower()):
        generation, layout = _ALIASES.get(match[1], match[1]), match[2]
        dimensions = 2 if generation in ("v5e", "v6e") else 3
        if generation in _GENERATIONS and len(layout.split("x")) == dimensions and "0" not in layout.split("x"):
            return Topology(name, generation, layout)
    raise InputError(f"--topology: no TPU slice is called {name!r}; there are {known_names()}")


def known_names() -> str:
    """The names of all slices, and how a layout is written, for messages and `--help`."""
    named = [
        f"{generation}-{' '.join(str(chips * _CORES_IN_NAME.get(generation, 1)) for chips in layouts)}"
        for generation, layouts in _LAYOUTS.items()
    ]
    return f"{', '.join(named)}, or a layout of chips such as v5e:2x4, v5p:2x2x4, tpu7x:2x2x1"


def topology_devices(topology: Topology) -> list[Any]:
    """The devices of the slice, which can be compiled for and not run on.

    Raises:
        InputError: libtpu is not installed, or does not know this layout.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    option, size = _STACK_SIZE
    if option not in (given := os.environ.get("LIBTPU_INIT_ARGS", "")):
        os.environ["LIBTPU_INIT_ARGS"] = f"{given} {option}={size}".strip()
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("compiling for a TPU needs libtpu, its compiler: pip install 'jaxembed[tpu]' (Linux, no TPU)")
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if topology.generation == "v4":
        options["chip_config_name"] = "megacore"
    if topology.chips == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{topology.generation}:{topology.layout}", **options
        )
    except Exception as error:  # libtpu's own, of several types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"--topology {topology.name}: libtpu does not have it: {reason}") from error
    return list(found.devices)
