"""Checkpoints of a tiny BLOOM as PyTorch's libraries lay them out, and what a directory holds, by their own readers."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch

from jaxembed.models.bloom import BloomConfig
from jaxembed.text.format import DEFAULT_TEXT_FORMAT
from jaxembed.text.tokenizer import TextTokenizer, train_byte_level_bpe

from blooms import random_bloom

SHAPE = BloomConfig(vocab_size=264, dim=24, layers=3, heads=3)
Container = Literal["safetensors", "safetensors shards", "bin", "bin shards"]
Tensors = dict[str, torch.Tensor]


def random_bits(dtype: str = "float32", prefix: str = "", *, head: bool = False, seed: int = 0) -> Tensors:
    """Tensors of any bits, so with NaNs that carry something, both zeros and subnormals among them."""
    random = torch.Generator().manual_seed(seed)

    def tensor(like: torch.Tensor) -> torch.Tensor:
        empty = torch.empty(like.shape, dtype=getattr(torch, dtype))
        bits = torch.randint(0, 256, (empty.nbytes,), dtype=torch.uint8, generator=random)
        return bits.view(empty.dtype).reshape(empty.shape)

    tensors = {prefix + name: tensor(like) for name, like in random_bloom(SHAPE).state_dict().items()}
    if head:
        tensors["lm_head.weight"] = tensor(tensors[f"{prefix}word_embeddings.weight"])
    return tensors


def random_weights(dtype: str = "float32", prefix: str = "", seed: int = 0) -> Tensors:
    """Tensors that a forward pass can be run with."""
    state = random_bloom(SHAPE, seed=seed).state_dict()
    return {prefix + name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}


def write_checkpoint(directory: Path, tensors: Tensors, container: Container = "safetensors") -> Path:
    """A whole model directory; its small files are laid out as nobody's `json.dump` does it."""
    directory.mkdir(parents=True, exist_ok=True)
    TextTokenizer(train_byte_level_bpe(["a few words", "and more"], SHAPE.vocab_size), DEFAULT_TEXT_FORMAT).save(
        directory
    )
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config = {"architectures": ["BloomModel"], **SHAPE.to_huggingface(), "torch_dtype": dtype}
    (directory / "config.json").write_text(json.dumps(config, indent=7) + "\n \n")
    (directory / "README.md").write_bytes(b"# A model\r\n")
    write_tensors(directory, tensors, container)
    return directory


def write_tensors(directory: Path, tensors: Tensors, container: Container = "safetensors") -> None:
    """Weights only: in one file, or in three shards and an index."""
    kind, _, shards = container.partition(" ")
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    save = safetensors.torch.save_file if kind == "safetensors" else torch.save
    if not shards:
        save(tensors, directory / f"{stem}.{suffix}")
        return
    weight_map = {}
    for shard in range(3):
        file = f"{stem}-{shard + 1:05}-of-00003.{suffix}"
        names = sorted(tensors)[shard::3]
        save({name: tensors[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def bytes_of(tensors: Tensors) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of each."""
    return {
        name: (str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


def stored_bytes(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Of all safetensors files of a directory, by the safetensors package."""
    files = (safetensors.torch.load_file(file) for file in sorted(directory.glob("*.safetensors")))
    return {name: entry for tensors in files for name, entry in bytes_of(tensors).items()}


def small_files(directory: Path, *, without: Iterable[str] = ()) -> dict[str, bytes]:
    """Contents of the files that are no weights."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.startswith(("model", "pytorch_model")) and path.name not in set(without)
    }


def listing(directory: Path) -> list[str]:
    """All that is below a directory, hidden or not."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def truncate_files(directory: Path) -> None:
    """Of an Orbax checkpoint, all but what says that it is complete."""
    for path in directory.rglob("*"):
        if path.is_file() and path.name != "commit_success.txt":
            os.truncate(path, path.stat().st_size // 2)
