"""Adapters in PEFT's format, against PEFT itself: it reads what we write, and we read what it writes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, BloomForCausalLM, BloomModel

from jaxembed import convert
from jaxembed.__main__ import run_command
from jaxembed.checkpoint.hub import wanted_files
from jaxembed.checkpoint.peft import CONFIG_FILE, WEIGHTS_FILE
from jaxembed.embedder import Embedder
from jaxembed.errors import InputError
from jaxembed.text.format import DEFAULT_TEXT_FORMAT

from checkpoints import stored_bytes
from runs import Workshop

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEXTS = ["a few words", "", "other words, more of them: qx wv", "z"]
LINEAR = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    workshop = Workshop(tmp_path_factory.mktemp("workshop"))
    lora = ("--training.trainable", "lora", "--optimizer.learning_rate", 0.1)
    assert workshop.train("lora", *lora, "--training.lora.rank", 3) == 0
    rows = ("--training.train_tokens", '["a", "e"]', "--training.lora.targets", "[qkv, up]")
    assert workshop.train("rows", *lora, *rows) == 0
    return workshop


def vectors(model: Any, embedder: Embedder) -> np.ndarray:
    """torch's embeddings of the texts as queries."""
    found = []
    for ids in embedder.tokenizer(TEXTS, "query"):
        with torch.no_grad():
            states = model(torch.tensor(ids[None].astype(np.int64))).last_hidden_state
        found.append(torch.nn.functional.normalize(states[0, -1], dim=-1).numpy())
    return np.stack(found)


@pytest.mark.parametrize("name", ["lora", "rows"])
def test_peft_reads_what_we_write(workshop: Workshop, name: str, record_property) -> None:
    run = workshop.folder / name
    model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(workshop.base), run / "adapter").eval()
    exported = Embedder.from_pretrained(run / "model", dtype="float32")
    found, expected = vectors(model, exported), exported.encode_query(TEXTS)
    record_property("difference", float(np.abs(found - expected).max()))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    base = vectors(AutoModel.from_pretrained(workshop.base), exported)
    assert np.abs(base - expected).max() > 0.05, "the adapter does nothing"
    config = model.peft_config["default"]
    assert (config.r, config.base_model_name_or_path) == (3 if name == "lora" else 16, str(workshop.base))
    # All of ours, and nothing that PEFT would have written besides.
    ours = load_file(run / "adapter" / WEIGHTS_FILE)
    theirs = peft.get_peft_model_state_dict(model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_sentence_transformers_reads_what_we_write(workshop: Workshop) -> None:
    run = workshop.folder / "rows"
    model = SentenceTransformer(str(run / "adapter"), device="cpu", local_files_only=True)
    expected = Embedder.from_pretrained(run / "model", dtype="float32").encode_query(TEXTS)
    np.testing.assert_allclose(model.encode(TEXTS, prompt_name="query"), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "rows"])
def test_our_own_adapter_merged_is_the_run_s_export(workshop: Workshop, tmp_path: Path, name: str) -> None:
    run = workshop.folder / name
    ours, exported = (Embedder.from_pretrained(run / part, dtype="float32") for part in ("adapter", "model"))
    assert ours.text_format == exported.text_format
    assert ours.model_hash == exported.model_hash
    np.testing.assert_array_equal(ours.encode_document(TEXTS), exported.encode_document(TEXTS))
    assert run_command(convert.main, [str(run / "adapter"), str(tmp_path / "merged"), "--verify"]) == 0
    assert stored_bytes(tmp_path / "merged") == stored_bytes(run / "model")


def written_by_peft(workshop: Workshop, directory: Path, model: Any = None, **options: Any) -> Any:
    """An adapter with random values, saved by PEFT; the model with it."""
    base = AutoModel.from_pretrained(workshop.base) if model is None else model
    base.config._name_or_path = base.name_or_path = str(workshop.base)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LINEAR, **options})
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name or "trainable_tokens" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "target_modules": ["dense"]},
        {
            "target_modules": ["query_key_value"],
            "layers_to_transform": [1],
            "layers_pattern": "h",
            "task_type": "FEATURE_EXTRACTION",
        },
        {"rank_pattern": {"dense": 2}, "alpha_pattern": {"h.0.mlp.dense_h_to_4h": 3, "dense": 1}},
        {"trainable_token_indices": [40, 7, 100]},
        {"trainable_token_indices": {"word_embeddings": [5, 70]}},
    ],
    ids=str,
)
def test_we_read_what_peft_writes(workshop: Workshop, tmp_path: Path, options: dict[str, Any], record_property) -> None:
    model = written_by_peft(workshop, tmp_path / "adapter", **options)
    ours = Embedder.from_pretrained(tmp_path / "adapter", dtype="float32")
    found, expected = ours.encode_query(TEXTS), vectors(model, ours)
    assert np.abs(vectors(AutoModel.from_pretrained(workshop.base), ours) - expected).max() > 0.05
    record_property("difference", float(np.abs(found - expected).max()))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_adapter_of_a_model_with_a_head(workshop: Workshop, tmp_path: Path) -> None:
    """Its names have `transformer.` in them."""
    base = BloomForCausalLM(BloomModel.from_pretrained(workshop.base).config)
    base.transformer.load_state_dict(BloomModel.from_pretrained(workshop.base).state_dict())
    model = written_by_peft(workshop, tmp_path / "adapter", base, task_type="CAUSAL_LM")
    assert any(".transformer.h.0." in name for name in load_file(tmp_path / "adapter" / WEIGHTS_FILE))
    ours = Embedder.from_pretrained(tmp_path / "adapter", dtype="float32")
    np.testing.assert_allclose(ours.encode_query(TEXTS), vectors(model.base_model.model.transformer, ours), atol=1e-5)


def test_training_goes_on_from_an_adapter(workshop: Workshop, tmp_path: Path, capsys) -> None:
    written_by_peft(workshop, tmp_path / "adapter")
    options = ("--model.path", tmp_path / "adapter", "--training.trainable", "lora", "--optimizer.learning_rate", 1e-9)
    assert workshop.train(tmp_path / "run", *options) == 0
    first, after = (
        Embedder.from_pretrained(path, dtype="float32") for path in (tmp_path / "adapter", tmp_path / "run" / "model")
    )
    np.testing.assert_allclose(after.encode_query(TEXTS), first.encode_query(TEXTS), atol=1e-5)
    assert not (tmp_path / "run" / "adapter").exists()
    assert run_command(convert.main, [str(tmp_path / "run"), str(tmp_path / "export")]) == 0
    assert stored_bytes(tmp_path / "export") == stored_bytes(tmp_path / "run" / "model")


def test_the_attention_travels_with_an_adapter(workshop: Workshop, tmp_path: Path) -> None:
    """Of a base that is causal by its own config."""
    options = ("--model.attention", "bidirectional", "--training.trainable", "lora", "--training.steps", 1)
    assert workshop.train("both ways", *options) == 0
    run = workshop.folder / "both ways"
    ours, exported = (Embedder.from_pretrained(run / part, dtype="float32") for part in ("adapter", "model"))
    np.testing.assert_array_equal(ours.encode_query(TEXTS), exported.encode_query(TEXTS))
    assert not (run / "adapter" / "modules.json").exists(), "sentence-transformers would run the base as it is"
    assert run_command(convert.main, [str(run / "adapter"), str(tmp_path / "merged")]) == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["is_causal"] is False


def test_another_format_than_the_base_s(workshop: Workshop, tmp_path: Path) -> None:
    written_by_peft(workshop, tmp_path / "adapter")
    given = {**DEFAULT_TEXT_FORMAT.to_dict(), "max_length": 20}
    assert Embedder.from_pretrained(tmp_path / "adapter", text_format=given).text_format.max_length == 20


def test_bfloat16_rounds_the_merged_weights_once(workshop: Workshop) -> None:
    ours, exported = (
        Embedder.from_pretrained(workshop.folder / "lora" / part, dtype="bfloat16") for part in ("adapter", "model")
    )
    np.testing.assert_array_equal(ours.encode_query(TEXTS), exported.encode_query(TEXTS))
    assert ours.model_hash == exported.model_hash, "that of the merged weights, whatever they were cast to"


@pytest.fixture
def adapter(workshop: Workshop, tmp_path: Path) -> Path:
    return Path(shutil.copytree(workshop.folder / "rows" / "adapter", tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("peft_type", "IA3", "peft_type: expected 'LORA', found 'IA3'"),
        ("bias", "all", "bias: expected 'none', found 'all'"),
        ("use_dora", True, "use_dora: expected False"),
        ("init_lora_weights", "pissa", "init_lora_weights: expected True, found 'pissa'"),
        ("modules_to_save", ["ln_f"], "modules_to_save: expected None"),
        ("base_model_name_or_path", None, "expected the base model under 'base_model_name_or_path'"),
        ("base_model_name_or_path", "/nowhere/at/all", "its base model cannot be had: /nowhere/at/all"),
        ("lora_alpha", "2", "lora_alpha: expected a number, found '2'"),
        ("trainable_token_indices", [1], "expected the ids of 2 rows of 264, found \\[1\\]"),
        ("trainable_token_indices", {"word_embeddings": [1, 264]}, "expected the ids of 2 rows of 264"),
    ],
)
def test_what_cannot_be_read_is_refused(adapter: Path, key: str, value: Any, expected: str) -> None:
    config = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps({**config, key: value}))
    with pytest.raises(InputError, match=expected) as error:
        Embedder.from_pretrained(adapter)
    assert CONFIG_FILE in str(error.value)


def test_tensors_that_fit_nowhere_are_refused(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS_FILE)
    name = next(name for name in tensors if "h.1" in name and name.endswith("query_key_value.lora_A.weight"))

    def refused(changed: dict[str, torch.Tensor], *names: str) -> None:
        save_file(changed, adapter / WEIGHTS_FILE)
        with pytest.raises(InputError, match="tensors that belong nowhere in the base model") as error:
            Embedder.from_pretrained(adapter)
        assert all(found in str(error.value) for found in (WEIGHTS_FILE, *names))

    other = name.replace("lora_A", "lora_B")
    refused({**tensors, name: tensors[name][:, 1:].contiguous()}, name)
    refused({key: value for key, value in tensors.items() if key != other}, name)
    refused({key.replace("h.1.", "h.7."): value for key, value in tensors.items()}, "h.7.")
    refused({**tensors, "base_model.model.ln_f.weight": torch.ones(16)}, "ln_f.weight")


def test_a_damaged_or_missing_file_is_named(adapter: Path) -> None:
    content = (adapter / WEIGHTS_FILE).read_bytes()
    (adapter / WEIGHTS_FILE).write_bytes(content[:-7])
    with pytest.raises(InputError, match=WEIGHTS_FILE):
        Embedder.from_pretrained(adapter)
    (adapter / WEIGHTS_FILE).unlink()
    with pytest.raises(InputError, match=WEIGHTS_FILE):
        Embedder.from_pretrained(adapter)


def test_an_adapter_of_an_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    config = json.loads((adapter / CONFIG_FILE).read_text())
    (other / CONFIG_FILE).write_text(json.dumps({**config, "base_model_name_or_path": str(adapter)}))
    with pytest.raises(InputError, match="is an adapter too; merge that one first"):
        Embedder.from_pretrained(other)


def test_an_adapter_s_files_are_downloaded() -> None:
    files = [CONFIG_FILE, WEIGHTS_FILE, "tokenizer.json", "optimizer.pt", "1_Pooling/config.json"]
    assert wanted_files(files) == [CONFIG_FILE, "tokenizer.json", "1_Pooling/config.json", WEIGHTS_FILE]
