"""From a directory to a decoder on the devices: its config, its weights."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxembed import hosts
from jaxembed.checkpoint.huggingface import load_weights
from jaxembed.checkpoint.model_directory import is_model_directory, load_stored, read_record
from jaxembed.checkpoint.parts import huggingface_shapes, merged_parameters
from jaxembed.checkpoint.peft import base_config, base_directory, is_adapter, read_adapter
from jaxembed.checkpoint.sharded import load_sharded
from jaxembed.errors import InputError
from jaxembed.models import Family, family_of
from jaxembed.models.weights import ParameterPath
from jaxembed.sharding import check_divisible, named_shardings, partition_specs

Attention = Literal["causal", "bidirectional"]


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
    weights_hash: str | Callable[[], str] | None = None
    """`WeightsHash` of the checkpoint where the parameters were cast; None: it is theirs. A function where no process
    has read all of them, which every process has to call."""


def flat_state(state: nnx.State) -> dict[ParameterPath, Any]:
    """The state's variables by path."""
    return {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def abstract_decoder(family: Family, config: Any) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and shapes of a decoder, without any memory."""
    return nnx.split(jax.eval_shape(lambda key: family.model(key, config), jax.random.key(0)))


def with_attention(huggingface_config: Mapping[str, Any], attention: Attention | None) -> Mapping[str, Any]:
    """The `config.json` with this attention, as transformers 5 reads it (`is_causal`); None leaves it as it is."""
    if attention is None or (attention == "causal") == huggingface_config.get("is_causal", True):
        return huggingface_config
    return {**huggingface_config, "is_causal": attention == "causal"}


def load_decoder(
    directory: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    progress: bool = True,
    attention: Attention | None = None,
    base: Path | None = None,
) -> Decoder:
    """Reads a Hugging Face, sentence-transformers or Orbax model directory, or an adapter, merged into its base.

    Args:
        dtype: of the parameters.
        mesh: where to put them, by the rules table; None: on the default device.
        attention: instead of what the directory says.
        base: the directory of an adapter's base model; None looks for it where the adapter says.

    Raises:
        InputError: config or weights are missing, damaged, not of a supported architecture, or not divided by the mesh.
    """
    given = directory = Path(directory)
    if is_adapter(given):
        directory = base or base_directory(given)
    huggingface_config = with_attention(base_config(given, directory), attention)
    where = str(directory / "config.json")
    family = family_of(huggingface_config, where)
    config = family.config.from_huggingface(huggingface_config, where)
    graph, abstract = abstract_decoder(family, config)
    if mesh is not None:
        check_divisible(abstract, mesh)
    flat = flat_state(abstract)
    rules = family.weight_map(config)
    specs = None if mesh is None else named_shardings(partition_specs(abstract), mesh)
    adapter = None
    if given != directory:
        adapter = read_adapter(given, rules, huggingface_shapes(rules, config.layers, flat), family.prefixes)
        if is_model_directory(directory):
            raise InputError(f"{given}: its base model {directory} is an Orbax directory; expected a Hugging Face one")
    shardings = None if specs is None else {path: leaf.get_value() for path, leaf in flat_state(specs).items()}
    if is_model_directory(directory):
        arrays = load_stored(
            directory, flat, shardings, rules, config.layers, dtype=jnp.dtype(dtype), progress=progress
        )
        found = read_record(directory).weights_hash
    elif shardings is not None:
        arrays, found = load_sharded(
            directory,
            flat,
            shardings,
            rules,
            config.layers,
            prefixes=family.prefixes,
            ignored=family.ignored,
            dtype=np.dtype(dtype),
            progress=progress,
            adapter=adapter,
        )
    else:
        arrays, found = load_weights(
            directory,
            flat,
            rules,
            config.layers,
            prefixes=family.prefixes,
            ignored=family.ignored,
            dtype=np.dtype(dtype),
            progress=progress,
            adapt=None if adapter is None else adapter.merge,
        )
    state = nnx.from_flat_state({path: variable.replace(arrays[path]) for path, variable in flat.items()})
    state = jax.tree.map(jnp.asarray, state) if specs is None else hosts.put_tree(state, specs)
    return Decoder(nnx.merge(graph, state), family, config, huggingface_config, found)


def merged_decoder(decoder: Decoder) -> Decoder:
    """The decoder with its parts (`jaxembed.models.parts`) merged into its own parameters; itself where it has none."""
    graph, abstract = abstract_decoder(decoder.family, decoder.config)
    own = flat_state(abstract)
    if own.keys() == flat_state(nnx.state(decoder.model)).keys():
        return decoder
    rules = decoder.family.weight_map(decoder.config)
    arrays = merged_parameters(decoder.model, own, rules, decoder.config.layers)
    state = nnx.from_flat_state({path: variable.replace(arrays[path]) for path, variable in own.items()})
    return dataclasses.replace(decoder, model=nnx.merge(graph, state), weights_hash=None)


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
