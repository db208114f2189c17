"""The comparison of hidden states: what is the same, what is not, and where the difference begins."""

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import BloomForCausalLM

from jaxembed.checkpoint import parity
from jaxembed.checkpoint.parity import LayerDifference, LayerParity, compare_layers, verify_conversion
from jaxembed.errors import InputError
from jaxembed.models.bloom import BloomConfig
from jaxembed.text.format import DEFAULT_TEXT_FORMAT, TEXT_FORMAT_FILE, UDEVER, UDEVER_MARKERS
from jaxembed.text.tokenizer import TextTokenizer, train_byte_level_bpe, with_markers

from blooms import random_bloom

CONFIG = BloomConfig(vocab_size=410, dim=24, layers=3, heads=6)
NAMES = ["embeddings", "layer 0", "layer 1", "final"]
BPE = train_byte_level_bpe([Path(dataclasses.__file__).read_text()], 400)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLOOM as transformers saves it, with a tokenizer and the default text format."""
    directory = tmp_path_factory.mktemp("source")
    random_bloom(CONFIG).save_pretrained(directory)
    TextTokenizer(BPE, DEFAULT_TEXT_FORMAT).save(directory)
    return directory


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def change(directory: Path, name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = safetensors.torch.load_file(directory / WEIGHTS)
    tensors[name] = function(tensors[name])
    safetensors.torch.save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def random_states(texts: int = 3, layers: int = 2, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.normal(size=(layers + 1, 2 + text, 5)).astype(np.float32) for text in range(texts)]


def test_rows_are_their_formulas() -> None:
    theirs = random_states()
    ours = [states.copy() for states in theirs]
    ours[1][1, 0, 3] += 0.5
    ours[2][2, -1] *= -1
    found = compare_layers(ours, theirs)
    assert [row.name for row in found] == ["embeddings", "layer 0", "final"]
    deviations = [np.concatenate([states[layer].ravel() for states in theirs]).std() for layer in range(3)]
    np.testing.assert_allclose([row.deviation for row in found], deviations, rtol=1e-6)
    np.testing.assert_allclose(
        [row.difference for row in found], [0, 0.5, 2 * np.abs(theirs[2][2, -1]).max()], rtol=1e-6
    )
    np.testing.assert_allclose([row.cosine for row in found], [1, 1, -1], atol=1e-12)
    assert found[1].relative == found[1].difference / found[1].deviation
    assert [row.ok for row in found] == [True, False, False]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("sides", ["ours", "theirs", "both"])
def test_what_is_not_finite_is_never_ok(value: float, sides: str) -> None:
    ours, theirs = random_states(), random_states()
    for side in (ours,) if sides == "ours" else (theirs,) if sides == "theirs" else (ours, theirs):
        side[0][1, 0, 0] = value
    with np.errstate(invalid="ignore"):
        found = compare_layers(ours, theirs)
    result = LayerParity(tuple(found), "a reader", "three texts")
    assert [row.ok for row in found] == [True, False, True]
    assert not result.ok
    assert result.worst is found[1]
    assert "OTHER hidden states" in str(result)


@pytest.mark.parametrize(("difference", "ok"), [(0.0, True), (1e-9, False)])
def test_states_that_are_all_alike(difference: float, ok: bool) -> None:
    assert LayerDifference("final", difference, 0.0, 1.0).ok == ok


def test_nothing_compared_is_not_ok() -> None:
    assert not LayerParity((), "a reader", "no texts").ok
    with pytest.raises(InputError, match="same shapes"):
        compare_layers([], [])


def test_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"same shapes expected, found \[\(4, 2, 5\)\] and \[\(3, 2, 5\)\]"):
        compare_layers(random_states(1, 3), random_states(1, 2))


def test_a_copy_is_the_same(source: Path, copy: Path) -> None:
    result = verify_conversion(copy, source)
    assert result.ok, str(result)
    assert [layer.name for layer in result.layers] == NAMES
    assert all(layer.difference > 0 and layer.cosine > 0.999999 for layer in result.layers)
    assert result.reader.startswith("transformers 5.")
    assert result.sequences == "22 edge texts in both roles"
    lines = str(result).splitlines()
    assert [line.split("  ")[0] for line in lines[1:5]] == NAMES
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[5].startswith("the same hidden states as transformers 5.")


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("word_embeddings.weight", 0),
        ("word_embeddings_layernorm.bias", 0),
        ("h.0.mlp.dense_4h_to_h.bias", 1),
        ("h.1.self_attention.query_key_value.bias", 2),
        ("h.2.post_attention_layernorm.weight", 3),
        ("ln_f.bias", 3),
    ],
)
def test_the_first_layer_that_differs_is_the_one_that_was_changed(
    source: Path, copy: Path, name: str, first: int
) -> None:
    change(copy, name, lambda tensor: tensor + 0.02 * torch.randn(tensor.shape, generator=torch.Generator()))
    result = verify_conversion(copy, source)
    assert [layer.ok for layer in result.layers] == [index < first for index in range(4)], str(result)
    assert not result.ok
    assert NAMES.index(result.worst.name) >= first
    lines = str(result).splitlines()
    assert [line.endswith(" !") or " ! " in line for line in lines[1:5]] == [index >= first for index in range(4)]
    assert lines[5].startswith("OTHER hidden states than transformers")


def test_a_nan_among_the_weights_is_not_ok(source: Path, copy: Path) -> None:
    change(copy, "h.1.mlp.dense_4h_to_h.bias", lambda tensor: tensor * float("nan"))
    for converted, reference in ((copy, source), (source, copy), (copy, copy)):
        result = verify_conversion(converted, reference)
        assert [layer.ok for layer in result.layers] == [True, True, False, False]


def test_without_torch_the_reference_is_our_own_reading(
    source: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: None)
    result = verify_conversion(copy, source)
    assert result.ok
    assert {layer.difference for layer in result.layers} == {0.0}
    assert result.reader == "jaxembed's own reading of the source (torch is not installed)"
    assert "torch is not installed" in str(result)
    change(copy, "h.1.mlp.dense_4h_to_h.bias", lambda tensor: 1.1 * tensor)
    assert [layer.ok for layer in verify_conversion(copy, source).layers] == [True, True, False, False]


def test_nothing_here_imports_torch_at_the_top() -> None:
    code = (
        "import sys, jaxembed.checkpoint.parity, jaxembed.checkpoint.torch_files; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_markers_end_each_role(source: Path, copy: Path) -> None:
    TextTokenizer(with_markers(BPE, UDEVER_MARKERS), UDEVER).save(copy)
    result = verify_conversion(copy, source)
    assert result.ok, str(result)
    assert result.sequences == "22 edge texts in both roles"


def test_a_model_that_is_no_embedder_is_compared_on_plain_tokens(source: Path, copy: Path) -> None:
    (copy / TEXT_FORMAT_FILE).unlink()
    plain = verify_conversion(copy, source)
    assert plain.ok
    assert plain.sequences.endswith("edge texts without format")
    (copy / "tokenizer.json").unlink()
    assert verify_conversion(copy, source).sequences == "22 edge texts in both roles"  # the source's tokenizer
    as_bytes = verify_conversion(copy, copy)
    assert as_bytes.ok
    assert as_bytes.sequences.endswith("edge texts as bytes (no tokenizer)")


def test_a_base_tokenizer_gives_no_tokens_for_no_text(copy: Path) -> None:
    """bloom's own adds no end token; a sequence of nothing has no hidden states."""
    (copy / TEXT_FORMAT_FILE).unlink()
    tokenizer = TextTokenizer(BPE, DEFAULT_TEXT_FORMAT).tokenizer
    tokenizer.post_processor = None
    tokenizer.save(str(copy / "tokenizer.json"))
    result = verify_conversion(copy, copy)
    assert result.ok
    assert result.sequences == "10 edge texts without format"


def test_a_reference_with_a_head_and_prefixed_names(tmp_path: Path) -> None:
    """And a converted one without: transformers is quiet about it."""
    decoder = random_bloom(CONFIG)
    causal = BloomForCausalLM(decoder.config)
    causal.transformer.load_state_dict(decoder.state_dict())
    causal.save_pretrained(tmp_path / "causal")
    decoder.save_pretrained(tmp_path / "decoder")
    assert verify_conversion(tmp_path / "decoder", tmp_path / "causal").ok
    assert verify_conversion(tmp_path / "causal", tmp_path / "decoder").ok


def test_files_of_torch_on_either_side(source: Path, copy: Path) -> None:
    torch.save(safetensors.torch.load_file(copy / WEIGHTS), copy / "pytorch_model.bin")
    (copy / WEIGHTS).unlink()
    for converted, reference in ((copy, source), (source, copy)):
        assert verify_conversion(converted, reference).ok


def test_narrower_weights_are_compared_with_weights_rounded_alike(
    source: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = safetensors.torch.load_file(copy / WEIGHTS)
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    safetensors.torch.save_file(half, copy / WEIGHTS, metadata={"format": "pt"})
    assert not verify_conversion(copy, source).ok
    assert verify_conversion(copy, source, dtype="bfloat16").ok
    monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: None)
    assert not verify_conversion(copy, source).ok
    assert verify_conversion(copy, source, dtype="bfloat16").ok


def test_transformers_is_left_as_it_was(source: Path, copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    verify_conversion(copy, source)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_errors_name_the_directory(source: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        verify_conversion(tmp_path / "nothing", source)
    TextTokenizer(with_markers(BPE, [f"[{i}]" for i in range(20)] + list(UDEVER_MARKERS)), UDEVER).save(copy)
    with pytest.raises(InputError, match=r"the tokenizer gives token 42., the table has 410 rows"):
        verify_conversion(copy, source)
    random_bloom(dataclasses.replace(CONFIG, layers=2)).save_pretrained(tmp_path / "shallow")
    with pytest.raises(InputError, match="same shapes"):
        verify_conversion(tmp_path / "shallow", source)
