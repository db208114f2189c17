"""Shapes of released decoders by name, so that a plan needs no download.

From the published configs of `bigscience/bloom-*`; `izhx/udever-bloom-*` have the shape of the BLOOM they began as.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxembed.checkpoint.hub import find_directory
from jaxembed.checkpoint.peft import base_config, base_directory
from jaxembed.checkpoint.pretrained import with_attention
from jaxembed.config import ModelConfig
from jaxembed.errors import InputError
from jaxembed.models import Family, family_of

_BLOOM = {
    "560m": (24, 1024, 16),
    "1b1": (24, 1536, 16),
    "1b7": (24, 2048, 16),
    "3b": (30, 2560, 32),
    "7b1": (30, 4096, 32),
}


def _bloom(layers: int, dim: int, heads: int) -> dict[str, Any]:
    return {"model_type": "bloom", "vocab_size": 250_880, "hidden_size": dim, "n_layer": layers, "n_head": heads}


RELEASED: Mapping[str, Mapping[str, Any]] = {
    **{f"bigscience/bloom-{size}": _bloom(*shape) for size, shape in _BLOOM.items()},
    **{f"izhx/udever-bloom-{size}": _bloom(*_BLOOM[size]) for size in ("560m", "1b1", "3b", "7b1")},
}
"""Hub id → the keys of its `config.json` that a shape is read from."""


def decoder_shape(config: ModelConfig) -> tuple[Family, Any]:
    """Family and shape of the decoder at `model.path`: by its name, else from its directory or the hub's local cache.

    Raises:
        InputError: it is none of the released ones and not on this machine, or of no supported architecture.
    """
    assert config.path is not None
    if config.path in RELEASED and not Path(config.path).exists():
        found, where = RELEASED[config.path], config.path
    else:
        try:
            directory = find_directory(config.path, local_files_only=True)
        except InputError as error:
            raise InputError(
                f"model.path: {error}. A plan downloads nothing; known by name are {', '.join(RELEASED)}"
            ) from error
        base = base_directory(directory)
        found, where = base_config(directory, base), str(base / "config.json")
    values = with_attention(found, config.attention)
    family = family_of(values, where)
    return family, family.config.from_huggingface(values, where)
