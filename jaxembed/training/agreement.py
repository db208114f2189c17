"""What has to be the same on all hosts of a run, compared before its first step: each reads its own copy."""

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxembed import hosts
from jaxembed.config import TrainConfig
from jaxembed.data.loader import Batches
from jaxembed.data.sources import Examples
from jaxembed.evaluation.dev_set import AnyDevSet
from jaxembed.training.report import software_versions

_ENDS = 1 << 20  # bytes of a file that are hashed from either end, as for the sources' token caches


def agree_on_start(config: TrainConfig) -> None:
    """Config and software.

    Raises:
        InputError: as `hosts.agree`, as all functions here.
    """
    if hosts.count() == 1:
        return
    of_each = {"distributed": True, "compile_cache": True, "data": {"cache_dir"}}
    values = config.model_dump(mode="json", exclude=of_each)
    hosts.agree("the config", {key: repr(value) for key, value in _flat(values).items()})
    hosts.agree("the software", {"python": platform.python_version(), **software_versions()})


def agree_on_data(examples: Sequence[Examples], dev_sets: Sequence[AnyDevSet]) -> None:
    """How much each source has, and the texts of the dev sets."""
    if hosts.count() == 1:
        return
    hosts.agree("the training data", {f"of {found.name}": f"{len(found):,} pairs" for found in examples})
    hosts.agree("the dev data", {f"of {found.name}": _digest(*map(_utf8, found.texts)) for found in dev_sets})


def agree_on_batches(batches: Batches) -> None:
    """The token caches, by their bytes, scores, and what is computed from them: the epoch plan, the shape of rows."""
    if hosts.count() == 1:
        return
    caches = {f"token cache {number}": cache.digest for number, cache in enumerate(batches.table.caches)}
    scores = [] if batches.scores is None else [batches.scores.tobytes()]
    hosts.agree(
        "the training data",
        {**caches, "scores": _digest(*scores), "epoch plan": batches.schedule.hash, "rows": repr(batches.layout)},
    )


def agree_on_base(directory: Path) -> None:
    """The files of the model that training starts from: sizes, first and last MiB."""
    if hosts.count() > 1:
        files = sorted(path for path in directory.iterdir() if path.suffix in (".safetensors", ".json", ".bin"))
        hosts.agree("the base model", {path.name: _ends(path) for path in files})


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _ends(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(_ENDS)
        file.seek(max(0, size - _ENDS))
        return f"{size:,} bytes, hash {_digest(first, file.read(_ENDS))}"


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    """Leaves of nested dicts and lists by their dotted keys."""
    if isinstance(values, dict):
        return {name: leaf for part, value in values.items() for name, leaf in _flat(value, f"{key}.{part}").items()}
    if isinstance(values, list):
        return {name: leaf for n, value in enumerate(values) for name, leaf in _flat(value, f"{key}.{n}").items()}
    return {key.removeprefix("."): values}
