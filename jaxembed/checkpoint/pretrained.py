"""From a name to a decoder on the devices: a directory or hub id, its config, its weights."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxembed.checkpoint.huggingface import load_weights, read_config
from jaxembed.errors import InputError
from jaxembed.models import Family, family_of
from jaxembed.sharding import check_divisible, named_shardings, partition_specs

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*/config.json"]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder and what is needed to write it out again."""

    model: Any
    """The `nnx.Module`."""
    family: Family
    config: Any
    """The family's config."""
    huggingface_config: Mapping[str, Any]
    """The whole of `config.json`, keys that this package does not read included."""


def find_directory(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """A directory as it is, or the local snapshot of a Hugging Face hub id, downloaded where needed.

    Raises:
        InputError: neither a directory nor a repository that can be had; says which of the two was tried and why it
            failed.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or str(name).count("/") > 1 or str(name).startswith((".", "/", "~")):
        raise InputError(f"{name}: expected the directory of a model, found {'a file' if path.exists() else 'nothing'}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                str(name),
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir).expanduser(),
                local_files_only=local_files_only,
                allow_patterns=_HUB_FILES,
            )
        )
    except GatedRepoError:
        why = "the repository is gated: accept its terms on its page and pass token="
    except RevisionNotFoundError:
        why = f"the repository has no revision {revision!r}"
    except RepositoryNotFoundError:
        why = "there is no such directory here, and no such repository on the hub (a private one needs token=)"
    except HFValidationError:
        why = "this is neither a directory nor the form of a hub id (owner/name)"
    except Exception as error:  # offline, no route, a full disk: what the HTTP client raises differs by version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        gave = "it is not in the local cache (local_files_only=True)" if local_files_only else f"the hub gave: {reason}"
        why = f"there is no such directory here, and {gave}"
    raise InputError(f"{name}: {why}")


def abstract_decoder(family: Family, config: Any) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and shapes of a decoder, without any memory."""
    return nnx.split(jax.eval_shape(lambda key: family.model(key, config), jax.random.key(0)))


def load_decoder(
    directory: str | os.PathLike[str], *, dtype: Any = jnp.float32, mesh: Mesh | None = None, progress: bool = True
) -> Decoder:
    """Reads a Hugging Face or sentence-transformers directory.

    Args:
        dtype: of the parameters.
        mesh: where to put them, by the rules table; None: on the default device.

    Raises:
        InputError: config or weights are missing, damaged, not of a supported architecture, or not divided by the mesh.
    """
    huggingface_config = read_config(directory)
    family = family_of(huggingface_config)
    config = family.config.from_huggingface(huggingface_config)
    graph, abstract = abstract_decoder(family, config)
    if mesh is not None:
        check_divisible(abstract, mesh)
    flat = {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(abstract)}
    arrays = load_weights(
        directory,
        flat,
        family.weight_map(config),
        config.layers,
        prefixes=family.prefixes,
        ignored=family.ignored,
        dtype=np.dtype(dtype),
        progress=progress,
    )
    state = nnx.from_flat_state({path: variable.replace(arrays[path]) for path, variable in flat.items()})
    if mesh is None:
        state = jax.tree.map(jnp.asarray, state)
    else:
        state = jax.device_put(state, named_shardings(partition_specs(abstract), mesh))
    return Decoder(nnx.merge(graph, state), family, config, huggingface_config)


def random_decoder(family: Family, config: Any, seed: int, mesh: Mesh | None = None) -> Decoder:
    """A decoder with random weights, made where they will live.

    Raises:
        InputError: the mesh does not divide it.
    """
    graph, abstract = abstract_decoder(family, config)
    if mesh is not None:
        check_divisible(abstract, mesh)
    shardings = named_shardings(partition_specs(abstract), mesh) if mesh is not None else None
    initialise = jax.jit(lambda key: nnx.split(family.model(key, config))[1], out_shardings=shardings)
    return Decoder(nnx.merge(graph, initialise(jax.random.key(seed))), family, config, config.to_huggingface())
