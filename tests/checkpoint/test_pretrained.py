"""From a directory to a decoder: what is said when it does not fit, and where its weights lie."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxembed.checkpoint.convert import convert, open_source, plan_conversion
from jaxembed.checkpoint.huggingface import iter_huggingface
from jaxembed.checkpoint.pretrained import load_decoder, random_decoder
from jaxembed.errors import InputError
from jaxembed.models import FAMILIES
from jaxembed.models.bloom import BloomConfig
from jaxembed.sharding import make_mesh

from blooms import in_jax, random_bloom

CONFIG = BloomConfig(vocab_size=64, dim=32, layers=3, heads=4)


def flat(model: nnx.Module) -> dict[tuple[Any, ...], jax.Array]:
    return {tuple(path): variable[...] for path, variable in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("container", ["Hugging Face", "Orbax"])
def test_weights_on_one_device_and_on_eight(tmp_path: Path, dtype: Any, container: str) -> None:
    reference = random_bloom(CONFIG)
    reference.save_pretrained(tmp_path)
    if container == "Orbax":
        convert(plan_conversion(open_source(tmp_path), "orbax"), tmp_path / "orbax", progress=False)
        tmp_path = tmp_path / "orbax"
    expected = in_jax(CONFIG, reference.state_dict())
    alone = load_decoder(tmp_path, dtype=dtype, progress=False)
    mesh = make_mesh(data=2, fsdp=4)
    spread = load_decoder(tmp_path, dtype=dtype, mesh=mesh, progress=False)
    assert alone.config == spread.config == CONFIG
    assert alone.huggingface_config["model_type"] == "bloom"
    for found in (flat(alone.model), flat(spread.model)):
        assert found.keys() == expected.keys()
        for path, array in found.items():
            assert array.dtype == dtype
            np.testing.assert_array_equal(np.asarray(array), expected[path].astype(jnp.dtype(dtype)))
    kernel = spread.model.last_layer.up.kernel[...]
    assert len(kernel.sharding.device_set) == 8
    assert kernel.addressable_shards[0].data.shape == (CONFIG.dim // 4, 4 * CONFIG.dim)
    assert len(alone.model.table[...].sharding.device_set) == 1
    assert alone.weights_hash == spread.weights_hash


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "unknown architecture: model_type is 'bert', supported are 'bloom'"),
        ({"model_type": None}, "model_type is None"),
        ({"n_layer": None}, "'n_layer' or 'num_hidden_layers'"),
        ({"n_head": 5}, "5 heads do not divide the hidden size 32"),
        ({"n_layer": 4}, r"missing \(12\)"),
        ({"n_layer": 2}, r"the config has 2 layers"),
        ({"vocab_size": 65}, r"has shape \[64, 32\], expected \[65, 32\]"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    random_bloom(CONFIG).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in changes or v}))
    with pytest.raises(InputError, match=message):
        load_decoder(tmp_path, progress=False)


def test_damaged_weights(tmp_path: Path) -> None:
    random_bloom(CONFIG).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"model\.safetensors: tensor .* truncated"):
        load_decoder(tmp_path, progress=False)
    file.unlink()
    with pytest.raises(InputError, match="no weights"):
        load_decoder(tmp_path, progress=False)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"'config\.json' is missing"):
        load_decoder(tmp_path, progress=False)


def test_a_damaged_orbax_directory(tmp_path: Path) -> None:
    random_bloom(CONFIG).save_pretrained(tmp_path / "source")
    convert(plan_conversion(open_source(tmp_path / "source"), "orbax"), tmp_path / "orbax", progress=False)
    config = json.loads((tmp_path / "orbax" / "config.json").read_text())
    for changes, message in (
        ({"n_layer": 4}, "weights: these are not the weights of this model; missing: layers/3"),
        ({"vocab_size": 65}, r"has shape \[64, 32\], expected \[65, 32\]"),
    ):
        (tmp_path / "orbax" / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(InputError, match=message):
            load_decoder(tmp_path / "orbax", progress=False)
    shutil.rmtree(tmp_path / "orbax" / "weights")
    with pytest.raises(InputError, match="weights: not a readable Orbax checkpoint"):
        load_decoder(tmp_path / "orbax", progress=False)


def test_one_layer_has_no_stack_in_an_orbax_directory(tmp_path: Path) -> None:
    config = BloomConfig(vocab_size=64, dim=32, layers=1, heads=4)
    reference = random_bloom(config)
    reference.save_pretrained(tmp_path / "source")
    convert(plan_conversion(open_source(tmp_path / "source"), "orbax"), tmp_path / "orbax", progress=False)
    found = flat(load_decoder(tmp_path / "orbax", progress=False).model)
    for path, array in in_jax(config, reference.state_dict()).items():
        np.testing.assert_array_equal(found[path], array)


def test_random_weights_do_not_depend_on_the_mesh() -> None:
    family = FAMILIES["bloom"]
    alone = random_decoder(family, CONFIG, seed=3)
    spread = random_decoder(family, CONFIG, seed=3, mesh=make_mesh(data=2, fsdp=4))
    for path, array in flat(alone.model).items():
        np.testing.assert_array_equal(array, flat(spread.model)[path])
    assert family.config.from_huggingface(alone.huggingface_config) == CONFIG
    # transformers takes them for a model of its own.
    specs, tensors = iter_huggingface(flat(alone.model), family.weight_map(CONFIG), CONFIG.layers)
    expected = {name: tuple(tensor.shape) for name, tensor in random_bloom(CONFIG).state_dict().items()}
    assert {spec.name: spec.shape for spec in specs} == expected
    assert all(torch.isfinite(torch.tensor(np.array(values))).all() for _, values in tensors)


def test_attention_is_that_of_the_directory_unless_another_is_asked_for(tmp_path: Path) -> None:
    random_bloom(CONFIG).save_pretrained(tmp_path)
    as_it_is = load_decoder(tmp_path, progress=False)
    assert as_it_is.config.causal
    assert load_decoder(tmp_path, attention="causal", progress=False).huggingface_config == as_it_is.huggingface_config
    both = load_decoder(tmp_path, attention="bidirectional", progress=False)
    assert not both.config.causal
    assert not both.model.last_layer.causal
    assert both.huggingface_config == {**as_it_is.huggingface_config, "is_causal": False}
    (tmp_path / "config.json").write_text(json.dumps(both.huggingface_config))
    assert not load_decoder(tmp_path, progress=False).config.causal
    back = load_decoder(tmp_path, attention="causal", progress=False)
    assert back.config.causal
    assert back.huggingface_config["is_causal"] is True
