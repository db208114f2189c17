"""For all tests: eight virtual devices, and jaxtyping's shapes checked at run time by beartype."""

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
# Where signatures state shapes. Not `training.gradient`: its `Batch` holds arrays, shapes or partition specs by turns.
SHAPED = ("data.plan", "evaluation", "models", "ops", "sharding", "text", "training.losses", "training.filters")
install_import_hook([f"jaxembed.{module}" for module in SHAPED], "beartype.beartype")
