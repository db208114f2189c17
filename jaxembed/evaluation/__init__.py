"""Judging embedders: mteb's tasks and benchmarks, local tasks, dev sets, ranking metrics, BM25.

>>> from jaxembed.evaluation import MTEBModel
>>> mteb.evaluate(MTEBModel("my-embedder"), mteb.get_tasks(tasks=["SciFact"]))  # doctest: +SKIP

The names below are imported when they are first used: mteb, and PyTorch with it, come with the extra `eval` only.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxembed.errors import InputError

if TYPE_CHECKING:
    from jaxembed.evaluation.mteb_model import MTEBModel
    from jaxembed.evaluation.mteb_tasks import to_mteb
    from jaxembed.evaluation.run import benchmark_tasks, evaluate, named_tasks

__all__ = ["MTEBModel", "benchmark_tasks", "evaluate", "named_tasks", "to_mteb"]

_MODULES = {
    "MTEBModel": "jaxembed.evaluation.mteb_model",
    "benchmark_tasks": "jaxembed.evaluation.run",
    "evaluate": "jaxembed.evaluation.run",
    "named_tasks": "jaxembed.evaluation.run",
    "to_mteb": "jaxembed.evaluation.mteb_tasks",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("jaxembed"):
            raise
        raise InputError(f"{name} needs {error.name}: pip install 'jaxembed[eval]'") from error
    globals()[name] = value
    return value
