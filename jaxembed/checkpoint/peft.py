"""Adapters as the library PEFT writes and reads them: `adapter_config.json` and `adapter_model.safetensors`.

A directory of an adapter holds what is added to a base model, and names that. It may have tokenizer and text format of
its own; where it has none, the base's are used.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxembed import hosts
from jaxembed.checkpoint.directories import ModelPath, new_directory
from jaxembed.checkpoint.hub import find_directory
from jaxembed.checkpoint.huggingface import read_config
from jaxembed.checkpoint.parts import ROWS, TABLE, LowRank, Parts, Rows
from jaxembed.checkpoint.safetensors import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorSpec,
    open_file,
    read_json,
    write_safetensors,
)
from jaxembed.errors import InputError
from jaxembed.models.weights import WeightRule, assignments, shorten
from jaxembed.text.format import write_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B, _TOKENS = ".lora_A.weight", ".lora_B.weight", ".token_adapter.trainable_tokens_delta"
_CAUSAL = "jaxembed_is_causal"  # where it is another attention than PEFT gives the base
# What another value of would change the meaning of the tensors.
_EXPECTED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "target_parameters": (None, []),
    # Others begin by changing the base.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """An adapter, to be merged into the tensors of its base by their Hugging Face names without a prefix."""

    low_ranks: Mapping[str, LowRank]
    rows: Mapping[str, Rows]

    def merge(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """The tensor with what the adapter changes of it, float32; itself where that is nothing."""
        if name in self.low_ranks:
            return self.low_ranks[name].added_to(tensor)
        return self.rows[name].put_into(tensor) if name in self.rows else tensor

    def changes(self, name: str) -> bool:
        """Whether `merge` changes a tensor of this name."""
        return name in self.low_ranks or name in self.rows


def is_adapter(directory: Path) -> bool:
    """Whether there is an adapter, and no model of its own."""
    own = (SINGLE_FILE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")
    return (directory / CONFIG_FILE).is_file() and not any((directory / name).exists() for name in own)


def base_directory(directory: Path, find: Callable[..., Path] = find_directory) -> Path:
    """The directory of an adapter's base model; of a model, its own.

    Args:
        find: `find_directory`, with options for the hub.

    Raises:
        InputError: the adapter names no base, or it is not there, or is an adapter itself.
    """
    if not is_adapter(directory):
        return directory
    config = _read_config(directory)
    file, name = directory / CONFIG_FILE, config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(f"{file}: expected the base model under 'base_model_name_or_path', found {name!r}")
    try:
        base = find(name, revision=config.get("revision"))
    except InputError as error:
        raise InputError(f"{file}: its base model cannot be had: {error}") from error
    if is_adapter(base):
        raise InputError(f"{file}: its base model {name} is an adapter too; merge that one first")
    return base


def base_config(directory: Path, base: Path) -> dict[str, Any]:
    """The `config.json` of an adapter's base model, with the attention that the adapter was trained with."""
    config = read_config(base)
    causal = _read_config(directory).get(_CAUSAL) if is_adapter(directory) else None
    return config if causal is None else {**config, "is_causal": causal}


def tokenizer_directory(directory: Path, base: Path) -> Path:
    """Where tokenizer and text format of an adapter are: beside it, or else its base's."""
    return directory if (directory / "tokenizer.json").is_file() else base


def read_adapter(
    directory: Path,
    weight_map: tuple[WeightRule, ...],
    shapes: Mapping[str, tuple[int, ...]],
    prefixes: tuple[str, ...],
) -> PeftAdapter:
    """Reads an adapter for a decoder.

    Args:
        shapes: of the decoder's tensors, by Hugging Face's names.
        prefixes: what may stand before these.

    Raises:
        InputError: it is damaged, of another kind than LoRA on linear layers, or does not fit the decoder; names file
            and key or tensor.
    """
    config, file = _read_config(directory), directory / WEIGHTS_FILE
    for key, expected in _EXPECTED.items():
        if config.get(key) not in expected:
            found = config.get(key)
            raise InputError(
                f"{directory / CONFIG_FILE}: {key}: expected {expected[0]!r}, found {found!r}: only LoRA on linear "
                "layers is read; merge the adapter with PEFT (merge_and_unload), and load the model that this gives"
            )
    tensors = {name: ref.read() for name, ref in open_file(directory, WEIGHTS_FILE).items()}
    low_ranks, rows, left = {}, {}, []
    table = next((rule.pattern for rule in weight_map if rule.path == TABLE), "")
    for full, tensor in tensors.items():
        name = full.removeprefix(_PREFIX)
        name = next((name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)), name)
        if name.endswith(_B) and full.removesuffix(_B) + _A in tensors:
            continue
        if name.endswith(_A) and (b := tensors.get(full.removesuffix(_A) + _B)) is not None:
            weight = name.removesuffix(_A) + ".weight"
            if shapes.get(weight) == (len(b), tensor.shape[-1]) and b.shape[-1] == len(tensor):
                scaling = _scaling(config, full.removesuffix(_A).removeprefix(_PREFIX), len(tensor), directory)
                low_ranks[weight] = LowRank(tensor, b, scaling)
                continue
        if name.removesuffix(_TOKENS) + ".weight" == table and name.endswith(_TOKENS):
            rows[table] = Rows(_token_ids(config, table, shapes[table], tensor.shape, directory), tensor)
            continue
        left.append(f"{full} {list(tensor.shape)}")
    if left:
        raise InputError(f"{file}: tensors that belong nowhere in the base model ({len(left)}): {shorten(left)}")
    return PeftAdapter(low_ranks, rows)


def write_adapter(
    directory: ModelPath, decoder: Any, base: str, describe: Callable[[Path], object] = lambda partial: None
) -> None:
    """Writes the adapters of a decoder, and the rows of its table that stand apart, as PEFT does.

    Every process calls it, for each may have a part of them; process 0 writes.

    Args:
        directory: made, or replaced; local or in a bucket.
        decoder: a `Decoder` whose model has adapters.
        base: directory or hub id of the decoder without them.
        describe: writes what else the directory is to hold into the one that becomes it.
    """
    rules, layers = decoder.family.weight_map(decoder.config), decoder.config.layers
    parts = Parts.of(decoder.model)
    tensors: dict[str, np.ndarray] = {}
    targets, rank, scaling, token_ids = set(), 0, 1.0, {}
    for each in assignments(rules, layers):
        if not parts.changes(each.path):
            continue
        module = each.source.removesuffix(".weight")
        if each.path == TABLE:
            tensors[_PREFIX + module + _TOKENS] = parts.read(ROWS)
            token_ids = {module: list(parts.ids)}
            continue
        low_rank = parts.low_rank(each)
        tensors[_PREFIX + module + _A], tensors[_PREFIX + module + _B] = low_rank.a, low_rank.b
        targets.add(each.rule.pattern.removesuffix(".weight").rpartition(".")[2])
        rank, scaling = len(low_rank.a), low_rank.scaling
    if not hosts.is_main():
        return
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scaling * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "trainable_token_indices": token_ids or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        **({} if decoder.config.causal else {_CAUSAL: False}),
    }
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]
    with new_directory(directory) as partial:
        describe(partial)
        [file] = write_safetensors(partial, specs, tensors.items(), max_shard_bytes=1 << 62)
        file.rename(partial / WEIGHTS_FILE)
        write_json(partial / CONFIG_FILE, config)


def named_base(name: str) -> str:
    """How an adapter names its base: a hub id as it is, a directory by its whole path."""
    path = Path(name).expanduser()
    return os.fspath(path.absolute()) if path.is_dir() else name


@functools.lru_cache(maxsize=4)
def _pattern(expression: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({expression})$")


def _scaling(config: Mapping[str, Any], module: str, rank: int, directory: Path) -> float:
    """alpha / rank, or alpha / √rank (arXiv 2312.03732), with the alpha of the module where it has its own."""
    own = config.get("alpha_pattern") or {}
    alpha = next((own[key] for key in own if _pattern(key).match(module)), config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise InputError(f"{directory / CONFIG_FILE}: lora_alpha: expected a number, found {alpha!r}")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _token_ids(
    config: Mapping[str, Any], table: str, shape: tuple[int, ...], found: tuple[int, ...], directory: Path
) -> list[int]:
    ids = config.get("trainable_token_indices")
    if isinstance(ids, dict):
        ids = next((ids[key] for key in ids if table.removesuffix(".weight").endswith(key.rpartition(".")[2])), None)
    whole = isinstance(ids, list) and all(type(each) is int and 0 <= each < shape[0] for each in ids)
    if isinstance(ids, list) and whole and found == (len(ids), shape[1]):
        return ids
    raise InputError(
        f"{directory / CONFIG_FILE}: trainable_token_indices: expected the ids of {found[0]} rows of {shape[0]:,}, "
        f"found {ids!r:.200}"
    )


def _read_config(directory: Path) -> dict[str, Any]:
    config = read_json(directory / CONFIG_FILE)
    if not isinstance(config, dict):
        raise InputError(f"{directory / CONFIG_FILE}: a JSON object expected, found {type(config).__name__}")
    return config
