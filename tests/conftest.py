"""For all tests: eight virtual devices, and the shapes in signatures checked at run time.

Both hold in this process only: what a test starts as a command sees one device and no checks.
"""

import jax
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a whole number is a float, as for any type checker

# The inside of the package. Modules at its boundary check what they are given themselves, which is tested; and
# `training.gradient` has a dataclass that holds arrays, their shapes or their partition specs by turns.
INSIDE = (
    "data.plan",
    "evaluation.retrieval",
    "mining.filters",
    "mining.search",
    "models",
    "ops",
    "sharding",
    "text.packing",
    "training.losses",
)

jax.config.update("jax_num_cpu_devices", 8)
install_import_hook([f"jaxembed.{module}" for module in INSIDE], "conftest.checked")
