"""Weights from directories that transformers wrote, and back, byte for byte."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import BloomConfig, BloomForCausalLM, BloomModel

from jaxembed.checkpoint.huggingface import iter_huggingface, load_weights, read_config, weights_hash
from jaxembed.checkpoint.safetensors import open_tensors, raw_bytes, write_safetensors
from jaxembed.errors import InputError
from jaxembed.models.weights import TRANSPOSE, Relayout, WeightRule

from checkpoints import stored_bytes

LAYERS, HEADS, HEAD_DIM, VOCAB = 3, 6, 8, 97
DIM = HEADS * HEAD_DIM
BLOOM = {"prefixes": ("transformer.",), "ignored": ("lm_head.weight",), "progress": False}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def bloom_map() -> tuple[WeightRule, ...]:
    def norm(pattern: str, *path: str) -> list[WeightRule]:
        return [WeightRule(f"{pattern}.weight", (*path, "scale")), WeightRule(f"{pattern}.bias", (*path, "bias"))]

    def linear(pattern: str, *path: str, kernel=TRANSPOSE, **bias) -> list[WeightRule]:
        rule = WeightRule(f"{pattern}.weight", (*path, "kernel"), kernel)
        return [rule, WeightRule(f"{pattern}.bias", (*path, "bias"), **bias)]

    qkv_kernel = Relayout("qkv kernel", (3 * DIM, -1), (HEADS, 3, HEAD_DIM, -1), (3, 1, 0, 2))
    qkv_bias = Relayout("qkv bias", (3 * DIM,), (HEADS, 3, HEAD_DIM), (1, 0, 2))
    out_kernel = Relayout("out kernel", (-1, DIM), (-1, HEADS, HEAD_DIM), (1, 2, 0))
    layer, attention = "h.{layer}", "h.{layer}.self_attention"
    return (
        WeightRule("word_embeddings.weight", ("embedding",)),
        *norm("word_embeddings_layernorm", "embedding_norm"),
        *norm(f"{layer}.input_layernorm", "layers", "attention_norm"),
        *linear(f"{attention}.query_key_value", "layers", "qkv", kernel=qkv_kernel, relayout=qkv_bias),
        *linear(f"{attention}.dense", "layers", "out", kernel=out_kernel),
        *norm(f"{layer}.post_attention_layernorm", "layers", "mlp_norm"),
        *linear(f"{layer}.mlp.dense_h_to_4h", "layers", "up"),
        *linear(f"{layer}.mlp.dense_4h_to_h", "layers", "down"),
        *norm("ln_f", "final_norm"),
    )


def abstract_bloom(layers: int = LAYERS, dtype=jnp.float32) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    layer = {
        ("attention_norm", "scale"): (DIM,),
        ("attention_norm", "bias"): (DIM,),
        ("qkv", "kernel"): (DIM, 3, HEADS, HEAD_DIM),
        ("qkv", "bias"): (3, HEADS, HEAD_DIM),
        ("out", "kernel"): (HEADS, HEAD_DIM, DIM),
        ("out", "bias"): (DIM,),
        ("mlp_norm", "scale"): (DIM,),
        ("mlp_norm", "bias"): (DIM,),
        ("up", "kernel"): (DIM, 4 * DIM),
        ("up", "bias"): (4 * DIM,),
        ("down", "kernel"): (4 * DIM, DIM),
        ("down", "bias"): (DIM,),
    }
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {("embedding",): (VOCAB, DIM)}
    for name in ("embedding_norm", "final_norm"):
        shapes |= {(name, "scale"): (DIM,), (name, "bias"): (DIM,)}
    shapes |= {("last_layer", *path): shape for path, shape in layer.items()}
    if layers > 1:
        shapes |= {("layers", *path): (layers - 1, *shape) for path, shape in layer.items()}
    return {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()}


def save_bloom(directory: Path, kind=BloomModel, dtype: str = "float32", layers: int = LAYERS, **options):
    tied = options.pop("tied", True)
    config = BloomConfig(vocab_size=VOCAB, hidden_size=DIM, n_layer=layers, n_head=HEADS, tie_word_embeddings=tied)
    model = kind(config)
    torch.manual_seed(0)
    # Biases and norms start as constants, which would hide a mix-up. The head comes last: it changes no other draw.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.to(getattr(torch, dtype)).save_pretrained(directory, **options)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["20KB", "5GB"])
@pytest.mark.parametrize(
    ("kind", "tied", "prefix"), [(BloomModel, True, ""), (BloomForCausalLM, False, "transformer.")]
)
def test_round_trip_is_byte_identical(tmp_path: Path, dtype: str, size: str, kind, tied: bool, prefix: str):
    save_bloom(tmp_path / "source", kind, dtype, tied=tied, max_shard_size=size)
    assert (size == "20KB") == (tmp_path / "source" / "model.safetensors.index.json").exists()
    state, _ = load_weights(tmp_path / "source", abstract_bloom(), bloom_map(), LAYERS, dtype=DTYPES[dtype], **BLOOM)
    specs, tensors = iter_huggingface(state, bloom_map(), LAYERS, prefix)
    write_safetensors(tmp_path / "target", specs, tensors, max_shard_bytes=20_000 if size == "20KB" else 5_000_000_000)
    source = stored_bytes(tmp_path / "source")
    assert source.pop("lm_head.weight", None) is None or not tied
    assert stored_bytes(tmp_path / "target") == source
    assert BloomModel.from_pretrained(tmp_path / "source").config.n_layer == LAYERS


def test_what_we_write_transformers_loads(tmp_path: Path):
    model = save_bloom(tmp_path / "source", BloomForCausalLM)
    state, _ = load_weights(tmp_path / "source", abstract_bloom(), bloom_map(), LAYERS, **BLOOM)
    write_safetensors(tmp_path / "target", *iter_huggingface(state, bloom_map(), LAYERS), max_shard_bytes=50_000)
    model.config.save_pretrained(tmp_path / "target")
    loaded, info = BloomModel.from_pretrained(tmp_path / "target", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(7)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).last_hidden_state, model.transformer(ids).last_hidden_state)


def test_parameters_compute_what_torch_computes(tmp_path: Path):
    model = save_bloom(tmp_path)
    state, _ = load_weights(tmp_path, abstract_bloom(), bloom_map(), LAYERS, **BLOOM)
    x = torch.randn(1, 5, DIM)
    for layer in range(LAYERS):
        attention = model.h[layer].self_attention
        last = layer == LAYERS - 1
        own = {
            path[1:]: v if last else v[layer] for path, v in state.items() if path[0] == ("layers", "last_layer")[last]
        }
        with torch.no_grad():
            expected_qkv = attention._reshape(attention.query_key_value(x))
            expected_out = attention.dense(x)[0]
        qkv = np.einsum("ld,dthk->thlk", x[0].numpy(), own["qkv", "kernel"]) + own["qkv", "bias"][:, :, None]
        for found, expected in zip(qkv, expected_qkv):
            np.testing.assert_allclose(found, expected[0].numpy(), atol=1e-4)
        context = x[0].numpy().reshape(5, HEADS, HEAD_DIM)
        out = np.einsum("lhk,hkd->ld", context, own["out", "kernel"]) + own["out", "bias"]
        np.testing.assert_allclose(out, expected_out.numpy(), atol=1e-4)


def test_one_layer_has_no_stack(tmp_path: Path):
    save_bloom(tmp_path, layers=1)
    state, _ = load_weights(tmp_path, abstract_bloom(1), bloom_map(), 1, **BLOOM)
    assert not any(path[0] == "layers" for path in state)
    specs, tensors = iter_huggingface(state, bloom_map(), 1)
    expected = stored_bytes(tmp_path)
    assert {name: bytes(raw_bytes(array)) for name, array in tensors} == {name: e[2] for name, e in expected.items()}
    assert {spec.name for spec in specs} == expected.keys()


def test_dtypes(tmp_path: Path):
    save_bloom(tmp_path, dtype="bfloat16")
    wide, _ = load_weights(tmp_path, abstract_bloom(dtype=jnp.bfloat16), bloom_map(), LAYERS, **BLOOM)
    own, _ = load_weights(tmp_path, abstract_bloom(dtype=jnp.bfloat16), bloom_map(), LAYERS, dtype=None, **BLOOM)
    assert {array.dtype for array in wide.values()} == {np.dtype(np.float32)}
    assert {array.dtype for array in own.values()} == {np.dtype(ml_dtypes.bfloat16)}
    specs, tensors = iter_huggingface(wide, bloom_map(), LAYERS, dtype=ml_dtypes.bfloat16)
    expected = stored_bytes(tmp_path)
    assert {name: bytes(raw_bytes(array)) for name, array in tensors} == {name: e[2] for name, e in expected.items()}
    assert {spec.dtype_name for spec in specs} == {"BF16"}


def test_the_hash_is_of_the_weights_only(tmp_path: Path):
    save_bloom(tmp_path / "plain")
    save_bloom(tmp_path / "head", BloomForCausalLM, tied=False, max_shard_size="20KB")
    states = [
        load_weights(tmp_path / name, abstract_bloom(), bloom_map(), LAYERS, **BLOOM)[0] for name in ("plain", "head")
    ]
    assert states[0].keys() == states[1].keys()
    first = weights_hash(states[0], bloom_map(), LAYERS)
    assert first == weights_hash(states[1], bloom_map(), LAYERS)
    assert first == weights_hash({path: jnp.asarray(array) for path, array in states[0].items()}, bloom_map(), LAYERS)
    states[0]["layers", "qkv", "bias"][1, 2, 0, 0] += 1
    changed = weights_hash(states[0], bloom_map(), LAYERS)
    half = {path: array.astype(np.float16) for path, array in states[1].items()}
    assert len({first, changed, weights_hash(half, bloom_map(), LAYERS)}) == 3


def rewrite(directory: Path, **changes) -> None:
    tensors = {name: torch.from_numpy(ref.read().copy()) for name, ref in open_tensors(directory).items()}
    tensors |= changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    safetensors.torch.save_file(kept, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ln_f.bias": None}, r"missing \(1\): ln_f.bias → final_norm/bias$"),
        ({"h.1.mlp.dense_h_to_4h.bias": None}, r"h.1.mlp.dense_h_to_4h.bias → layers/up/bias\[1\]$"),
        ({"h.3.ln.bias": torch.ones(2)}, r"belong nowhere \(1\): h.3.ln.bias$"),
        ({"h.3.mlp.dense_h_to_4h.bias": torch.ones(2)}, r"h.3.mlp.dense_h_to_4h.bias \(the config has 3 layers\)"),
        (
            {"h.2.self_attention.query_key_value.weight": torch.ones(DIM, 3 * DIM)},
            rf"model.safetensors: tensor 'h.2.*' has shape \[{DIM}, {3 * DIM}\], expected \[{3 * DIM}, {DIM}\]",
        ),
        ({"ln_f.bias": torch.ones(DIM, dtype=torch.int8)}, "model.safetensors: tensor 'ln_f.bias' is I8"),
    ],
)
def test_weights_of_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes, message: str):
    save_bloom(tmp_path)
    rewrite(tmp_path, **changes)
    monkeypatch.setattr("jaxembed.checkpoint.safetensors.TensorRef.read", lambda _: pytest.fail("a tensor was read"))
    with pytest.raises(InputError, match=message) as error:
        load_weights(tmp_path, abstract_bloom(), bloom_map(), LAYERS, **BLOOM)
    assert str(tmp_path) in str(error.value)


def test_a_map_that_does_not_fit_the_model(tmp_path: Path):
    save_bloom(tmp_path)
    state = abstract_bloom()
    state["adapter",] = state.pop(("final_norm", "bias"))
    with pytest.raises(InputError, match="without a rule: adapter; rules without a parameter: final_norm/bias"):
        load_weights(tmp_path, state, bloom_map(), LAYERS, **BLOOM)
    state = abstract_bloom()
    state["layers", "up", "bias"] = jax.ShapeDtypeStruct((LAYERS, 4 * DIM), jnp.float32)
    with pytest.raises(InputError, match="stacked 3 times, but 3 layers stack 2 times"):
        load_weights(tmp_path, state, bloom_map(), LAYERS, **BLOOM)


def test_config(tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "bloom"}))
    assert read_config(tmp_path) == {"model_type": "bloom"}
    for text in ("[]", "{", ""):
        file.write_text(text)
        with pytest.raises(InputError, match=r"config.json"):
            read_config(tmp_path)
    file.unlink()
    with pytest.raises(InputError, match=r"'config.json' is missing"):
        read_config(tmp_path)
    with pytest.raises(InputError, match="no such directory"):
        read_config(tmp_path / "nowhere")
