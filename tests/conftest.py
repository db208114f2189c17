"""For all tests: eight virtual devices, and the shapes in signatures checked at run time; fixtures that several share.

Devices and checks hold in this process only: what a test starts as a command sees one device and no checks.
"""

import tempfile
from collections.abc import Iterator

import jax
import pytest
from beartype import BeartypeConf, beartype
from etils.epath import backend
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

from buckets import Bucket

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

COMPILED = tempfile.TemporaryDirectory(prefix="jaxembed-compiled-")


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Half of the time of a tiny run goes into XLA's optimisations.

    Many runs are alike: a program that was compiled once in this process is read from the disk when it is met again.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", COMPILED.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """Empty."""
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    found = Bucket(skip_instance_cache=True)
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: found)
    return found
