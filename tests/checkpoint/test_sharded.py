"""Weights straight into sharded arrays: the same as on one device, and each process reads its own bytes only."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.checkpoint import sharded
from jaxembed.checkpoint.pretrained import load_decoder
from jaxembed.checkpoint.safetensors import open_tensors
from jaxembed.checkpoint.sharded import joined
from jaxembed.errors import InputError
from jaxembed.models.bloom import BloomConfig
from jaxembed.sharding import make_mesh

from blooms import random_bloom
from checkpoints import Container, random_weights, write_checkpoint, write_tensors
from runs import on_two_processes

CONFIG = BloomConfig(vocab_size=64, dim=32, layers=4, heads=4)


def flat(model: nnx.Module) -> dict[tuple[Any, ...], jax.Array]:
    return {tuple(path): variable[...] for path, variable in nnx.to_flat_state(nnx.state(model))}


def assert_same(found: nnx.Module, expected: nnx.Module) -> None:
    arrays = flat(expected)
    for path, array in flat(found).items():
        assert array.dtype == arrays[path].dtype
        np.testing.assert_array_equal(np.asarray(array), np.asarray(arrays[path]), err_msg=str(path))
    assert flat(found).keys() == arrays.keys()


@pytest.mark.parametrize(
    ("sizes", "stored", "container", "prefix", "dtype"),
    [
        ((1, 8, 1), "float32", "safetensors", "", jnp.float32),
        ((2, 2, 2), "float16", "safetensors shards", "transformer.", jnp.float32),
        ((8, 1, 1), "bfloat16", "safetensors", "transformer.", jnp.bfloat16),
        ((1, 2, 4), "float32", "bin", "", jnp.bfloat16),
    ],
    ids=str,
)
def test_as_on_one_device(
    tmp_path: Path, sizes: tuple[int, int, int], stored: str, container: Container, prefix: str, dtype: Any
) -> None:
    tensors = {
        prefix + name: tensor.to(getattr(torch, stored)) for name, tensor in random_bloom(CONFIG).state_dict().items()
    }
    write_tensors(tmp_path, tensors, container)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_huggingface()))
    alone = load_decoder(tmp_path, dtype=dtype, progress=False)
    spread = load_decoder(tmp_path, dtype=dtype, mesh=make_mesh(*sizes), progress=False)
    assert_same(spread.model, alone.model)
    assert spread.weights_hash == alone.weights_hash
    assert (spread.weights_hash is None) == (np.dtype(dtype).name == stored)
    kernel = spread.model.layers.up.kernel[...]
    assert kernel.addressable_shards[0].data.shape == (3, 32 // sizes[1], 128 // sizes[2])


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_part_of_a_tensor(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Only its bytes are read."""
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    bounds = [sorted(data.draw(st.sets(st.integers(0, size), min_size=2, max_size=2))) for size in shape]
    box = tuple((start, stop) for start, stop in bounds)
    folder = tmp_path_factory.mktemp("tensor")
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    safetensors.numpy.save_file({"other": np.zeros(3, np.float32), "values": values}, folder / "model.safetensors")
    found = open_tensors(folder)["values"].read_box(shape, box)
    np.testing.assert_array_equal(found, values[tuple(slice(*each) for each in box)])


def test_boxes_of_a_grid_are_joined() -> None:
    def grid(*axes: list[tuple[int, int]]) -> list[Any]:
        return list(itertools.product(*axes))

    halves = [(0, 4), (4, 8)]
    assert joined(grid(halves, [(0, 3)], halves)) == [((0, 8), (0, 3), (0, 8))]
    assert joined(grid([(0, 2), (6, 8)], halves)) == [((0, 2), (0, 8)), ((6, 8), (0, 8))]
    assert joined([((4, 8), (0, 4)), ((0, 4), (4, 8))]) == [((0, 4), (4, 8)), ((4, 8), (0, 4))]
    assert joined([((0, 4),), ((0, 4),)]) == [((0, 4),)]


def test_half_of_the_columns_is_half_of_the_bytes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, random_weights())
    ref = open_tensors(tmp_path)["word_embeddings.weight"]
    rows, columns = ref.shape
    before = _read_so_far()
    half = ref.read_box(ref.shape, ((0, rows), (0, columns // 2)))
    assert half.nbytes == ref.nbytes // 2
    assert half.nbytes <= _read_so_far() - before < half.nbytes + 1000


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", random_weights())
    low_rank = {"a": torch.randn(2, 24), "b": torch.randn(96, 2)}
    module = "base_model.model.h.1.mlp.dense_h_to_4h"
    config = {
        "peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4,
        "target_modules": ["dense_h_to_4h"],
    }  # fmt: skip
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    named = {f"{module}.lora_{key.upper()}.weight": tensor for key, tensor in low_rank.items()}
    safetensors.torch.save_file(named, tmp_path / "adapter" / "adapter_model.safetensors")
    alone = load_decoder(tmp_path / "adapter", progress=False)
    spread = load_decoder(tmp_path / "adapter", mesh=make_mesh(2, 4, 1), progress=False)
    assert_same(spread.model, alone.model)
    assert spread.weights_hash == alone.weights_hash is not None
    plain = load_decoder(base, progress=False)
    assert not np.array_equal(plain.model.layers.up.kernel[1], spread.model.layers.up.kernel[1])


def test_a_file_that_was_cut_since_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, random_weights())
    opened = sharded.open_checked

    def cut(*arguments: Any, **options: Any) -> Any:
        found = opened(*arguments, **options)
        os.truncate(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size - 100)
        return found

    monkeypatch.setattr(sharded, "open_checked", cut)
    with pytest.raises(InputError, match=r"model\.safetensors: tensor '.*' ends early: the file was cut since"):
        load_decoder(tmp_path, mesh=make_mesh(1, 8, 1), progress=False)


_PROCESS = """
import json, sys
from jaxembed import hosts
from jaxembed.config import DistributedConfig

folder, process, port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
hosts.initialize(DistributedConfig(coordinator=f"localhost:{port}", num_processes=2, process_id=process))
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxembed.checkpoint.pretrained import load_decoder
from jaxembed.errors import InputError
from jaxembed.sharding import make_mesh

def read():
    return int(open("/proc/self/io").readline().split()[1])

def flat(model):
    return {tuple(path): variable[...] for path, variable in nnx.to_flat_state(nnx.state(model))}

found = {}
for dtype in (jnp.float32, jnp.bfloat16):
    for sizes in ((1, 8, 1), (2, 4, 1), (1, 4, 2)):
        mesh = make_mesh(*sizes)
        load_decoder(folder, dtype=dtype, mesh=mesh, progress=False)
        before = read()
        decoder = load_decoder(folder, dtype=dtype, mesh=mesh, progress=False)
        found[f"{sizes} {jnp.dtype(dtype).name}"] = read() - before
        alone = load_decoder(folder, dtype=dtype, progress=False)
        for path, array in flat(decoder.model).items():
            whole = np.asarray(flat(alone.model)[path])
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])
    assert (decoder.weights_hash and decoder.weights_hash()) == alone.weights_hash
hosts.barrier("done")
import pathlib
file = pathlib.Path(folder) / "model.safetensors"
if process == 0:
    file.write_bytes(file.read_bytes())
hosts.barrier("replaced")
try:
    decoder.weights_hash()
except InputError as error:
    found["error"] = str(error)
print(json.dumps(found), file=sys.stderr)
hosts.barrier("all done")
"""


@pytest.mark.slow
def test_two_processes_read_half_each(tmp_path: Path) -> None:
    """And a hash that a cast loses is the same, put together from what each has read of it."""
    config = BloomConfig(vocab_size=4096, dim=128, layers=3, heads=4)
    random_bloom(config).save_pretrained(tmp_path / "model")
    errors = on_two_processes(_PROCESS, tmp_path / "model")
    tensors = open_tensors(tmp_path / "model").values()
    total = sum(ref.nbytes for ref in tensors)
    replicated = sum(ref.nbytes for ref in tensors if len(ref.shape) == 1)
    for error in errors:
        found = json.loads(error.splitlines()[-1])
        assert "model.safetensors: has been replaced since the model was loaded" in found.pop("error")
        for sizes, nbytes in found.items():
            half = replicated + (total - replicated) / 2
            expected = total if sizes.startswith("(2, 4, 1)") else half
            assert expected <= nbytes < expected * 1.05, (sizes, nbytes, expected, total)


def _read_so_far() -> int:
    """Bytes that this process has asked the system for."""
    return int(Path("/proc/self/io").read_text().split()[1])
