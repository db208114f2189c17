"""From a name to a decoder: where it is looked for, what is said when it is not there, where its weights lie."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from huggingface_hub import errors

from jaxembed.checkpoint.huggingface import iter_huggingface
from jaxembed.checkpoint.pretrained import find_directory, load_decoder, random_decoder
from jaxembed.errors import InputError
from jaxembed.models import FAMILIES
from jaxembed.models.bloom import BloomConfig
from jaxembed.sharding import make_mesh

from blooms import in_jax, random_bloom

CONFIG = BloomConfig(vocab_size=64, dim=32, layers=3, heads=4)


def flat(model: nnx.Module) -> dict[tuple[Any, ...], jax.Array]:
    return {tuple(path): variable[...] for path, variable in nnx.to_flat_state(nnx.state(model))}


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert find_directory(tmp_path / "org") == tmp_path / "org"
    assert find_directory("org/model") == Path("org/model")
    assert find_directory("~/org") == tmp_path / "org"
    (tmp_path / "file").touch()
    for name, found in {
        tmp_path / "nowhere": "nothing",
        "./nowhere": "nothing",
        "~/nowhere": "nothing",
        "a/b/c": "nothing",
        "gs://bucket/model": "nothing",
        "file": "a file",
    }.items():
        with pytest.raises(InputError, match=f"{name}: expected the directory of a model, found {found}$"):
            find_directory(name)


def test_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(name=name, **options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = find_directory("org/model", revision="v1", token="secret", cache_dir="cache", local_files_only=True)
    assert found == tmp_path
    wanted = asked.pop("allow_patterns")
    assert asked == {
        "name": "org/model",
        "revision": "v1",
        "token": "secret",
        "cache_dir": Path("cache"),
        "local_files_only": True,
    }
    assert {"*.json", "*.safetensors"} <= set(wanted)
    assert not any("bin" in pattern for pattern in wanted)


def hub_error(kind: type[Exception]) -> Exception:
    """Without the response of a server, which some of them want."""
    error = kind.__new__(kind)
    error.args = ("the hub's own words\nand more",)
    return error


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (errors.GatedRepoError, {}, "gated: accept its terms on its page and pass token="),
        (errors.RevisionNotFoundError, {"revision": "v9"}, "no revision 'v9'"),
        (errors.RepositoryNotFoundError, {}, "no such directory here, and no such repository on the hub"),
        (errors.HFValidationError, {}, "neither a directory nor the form of a hub id"),
        (
            errors.LocalEntryNotFoundError,
            {"local_files_only": True},
            r"not in the local cache \(local_files_only=True\)",
        ),
        (errors.LocalEntryNotFoundError, {}, "no such directory here, and the hub gave: the hub's own words$"),
        (errors.OfflineModeIsEnabled, {}, "the hub gave: the hub's own words$"),
        (errors.HfHubHTTPError, {}, "the hub gave: "),
        (OSError, {}, "the hub gave: the hub's own words$"),
        (errors.HfHubHTTPError.__bases__[0], {}, "the hub gave: the hub's own words$"),
    ],
)
def test_what_the_hub_refuses(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], options: dict[str, Any], message: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=f"^org/model: .*{message}"):
        find_directory("org/model", **options)


def test_offline_in_earnest(tmp_path: Path) -> None:
    for options in ({"local_files_only": True}, {"local_files_only": True, "revision": "v1"}):
        with pytest.raises(InputError, match=r"org/model: .*local cache"):
            find_directory("org/model", cache_dir=tmp_path, **options)
    with pytest.raises(InputError, match="the form of a hub id"):
        find_directory("not an id/at all", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_on_one_device_and_on_eight(tmp_path: Path, dtype: Any) -> None:
    reference = random_bloom(CONFIG)
    reference.save_pretrained(tmp_path)
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
