"""What a TPU chip can do at most, and how much memory a program may take there: one table, with its sources.

Peaks are of a chip, not of a device: tpu7x shows JAX two devices a chip. Sources:

1. Google's pages docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: bf16 rate, memory bandwidth, bandwidth of all
   interchip links, both directions. Read again for v5e, v5p and the rate of v6e and tpu7x; the rest from memory.
2. `jax.experimental.pallas.tpu.get_tpu_info_for_chip`, which agrees on rate and bandwidth to 1 %
   (tests/planning/test_chips.py) but for v5p's bandwidth: 2,460 GB/s there, 2,765 in (1), which makes the bound lower.
3. The text of the compiler's RESOURCE_EXHAUSTED: memory that a program may take.
"""

import dataclasses
from collections.abc import Mapping

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip."""

    flops: float
    """bfloat16 operations a second, a multiply-add counted as two (1)."""
    memory_bandwidth: float
    """Bytes a second between the chip and its memory (1)."""
    link_bandwidth: float
    """Bytes a second over all links to other chips, both directions together (1)."""
    device_memory: float
    """GiB that the compiler lets a program take on each device (3)."""
    kind: str
    """`device_kind` in JAX."""


CHIPS: Mapping[str, Chip] = {
    "v4": Chip(275e12, 1228e9, 600e9, 30.75, "TPU v4"),
    "v5e": Chip(197e12, 819e9, 400e9, 15.75, "TPU v5 lite"),
    "v5p": Chip(459e12, 2765e9, 1200e9, 95.74, "TPU v5"),
    "v6e": Chip(918e12, 1640e9, 800e9, 31.25, "TPU v6 lite"),
    "tpu7x": Chip(2307e12, 7370e9, 1200e9, 94.75, "TPU7x"),
}
