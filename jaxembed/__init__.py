"""Pretrained decoder language models into text and code embedders, in JAX.

>>> from jaxembed import Embedder
>>> model = Embedder.from_pretrained("my-embedder")  # doctest: +SKIP
>>> model.similarity(model.encode_query("sort a dict"), model.encode_document(functions))  # doctest: +SKIP

The names below are imported when they are first used, so that `import jaxembed` and `--help` take no time.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxembed.embedder import Embedder
    from jaxembed.errors import InputError
    from jaxembed.quantization import quantize_embeddings
    from jaxembed.text.format import Role, TextFormat

    __version__: str

__all__ = ["Embedder", "InputError", "Role", "TextFormat", "__version__", "quantize_embeddings"]

_MODULES = {
    "Embedder": "jaxembed.embedder",
    "InputError": "jaxembed.errors",
    "Role": "jaxembed.text.format",
    "TextFormat": "jaxembed.text.format",
    "quantize_embeddings": "jaxembed.quantization",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)


def _version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("jaxembed")
    except importlib.metadata.PackageNotFoundError:
        return "0+not.installed"
