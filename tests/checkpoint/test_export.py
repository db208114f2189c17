"""Exported models in sentence-transformers: the same ids and embeddings, in both ways of marking a role."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2.sandbox
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, BloomConfig, BloomModel

from jaxembed.checkpoint import export
from jaxembed.checkpoint.export import (
    ExportError,
    chat_template,
    edge_texts,
    verify_export,
    write_sentence_transformers,
)
from jaxembed.checkpoint.model_card import model_card
from jaxembed.errors import InputError
from jaxembed.text.format import (
    DEFAULT_TEXT_FORMAT,
    ROLES,
    TEXT_FORMAT_FILE,
    UDEVER,
    UDEVER_MARKERS,
    Role,
    RoleName,
    TextFormat,
    read_text_format,
)
from jaxembed.text.tokenizer import TextTokenizer, train_byte_level_bpe, with_markers

BPE = train_byte_level_bpe([Path(dataclasses.__file__).read_text()], 400)
FORMATS = {
    "prefixes": dataclasses.replace(DEFAULT_TEXT_FORMAT, max_length=24),
    "markers": dataclasses.replace(UDEVER, max_length=24),
    "instructions": TextFormat(Role("[BOQ]", "[EOQ]", "Find {{ code }}: "), Role("[BOD]", "[EOD]", "\n"), 24),
    "one prefix": TextFormat(Role("", "[EOQ]"), Role("", "[EOD]", "Passage: "), 24, normalize=False),
}


class Exported:
    """A tiny random BLOOM, written in a text format; transformers' BloomModel stands for our decoder."""

    def __init__(self, directory: Path, text_format: TextFormat) -> None:
        tokenizer = with_markers(BPE, UDEVER_MARKERS) if text_format.has_suffixes else BPE
        self.tokenizer = TextTokenizer(tokenizer, text_format)
        config = BloomConfig(vocab_size=410, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
        torch.manual_seed(0)
        self.model = BloomModel(config).eval()
        self.directory = write_sentence_transformers(
            directory,
            huggingface_config={**config.to_dict(), "architectures": ["BloomModel"]},
            tokenizer=self.tokenizer,
            write_weights=self.write_weights,
            model_card=model_card(name="tiny", text_format=text_format, dim=32),
        )

    def write_weights(self, directory: Path) -> None:
        self.model.save_pretrained(directory)
        (directory / "config.json").unlink()

    @torch.inference_mode()
    def encode(self, texts: list[str], role: RoleName) -> np.ndarray:
        last = [self.model(torch.tensor(ids[None].astype(np.int64)))[0][0, -1] for ids in self.tokenizer(texts, role)]
        embeddings = torch.stack(last)
        if self.tokenizer.text_format.normalize:
            embeddings = torch.nn.functional.normalize(embeddings)
        return embeddings.numpy()


@pytest.fixture(scope="module", params=FORMATS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("models") / "tiny", FORMATS[request.param])


@pytest.fixture(scope="module")
def reader(exported: Exported) -> SentenceTransformer:
    return SentenceTransformer(str(exported.directory), device="cpu")


def sentence_transformers_ids(model: SentenceTransformer, texts: list[str], role: RoleName) -> list[list[int]]:
    features = model.preprocess(texts, prompt=model.prompts[role], task=role)
    return [ids[mask.bool()].tolist() for ids, mask in zip(features["input_ids"], features["attention_mask"])]


@pytest.mark.parametrize("role", ROLES)
def test_ids_and_embeddings_of_edge_texts(exported: Exported, reader: SentenceTransformer, role: RoleName) -> None:
    texts = edge_texts(exported.tokenizer.text_format)
    ids = [each.tolist() for each in exported.tokenizer(texts, role)]
    assert max(map(len, ids)) == 24
    assert sentence_transformers_ids(reader, texts, role) == ids
    embeddings = (reader.encode_query if role == "query" else reader.encode_document)(texts)
    np.testing.assert_allclose(embeddings, exported.encode(texts, role), atol=1e-5)


def test_ids_of_any_text(exported: Exported, reader: SentenceTransformer) -> None:
    @given(st.lists(st.text(max_size=40), min_size=1, max_size=4), st.sampled_from(ROLES))
    @settings(max_examples=40, deadline=None)
    def check(texts: list[str], role: RoleName) -> None:
        ids = [each.tolist() for each in exported.tokenizer(texts, role)]
        assert sentence_transformers_ids(reader, texts, role) == ids

    check()


def test_plain_encode_is_the_query_side(exported: Exported, reader: SentenceTransformer) -> None:
    np.testing.assert_allclose(reader.encode(["a b"]), exported.encode(["a b"], "query"), atol=1e-5)


def test_verification(exported: Exported) -> None:
    found = verify_export(exported.directory, exported.encode, exported.tokenizer)
    assert found is not None
    assert found.difference < 1e-5
    assert f"{found.texts} edge texts" in str(found)


def test_the_directory_reads_as_what_was_written(exported: Exported) -> None:
    again = TextTokenizer.from_directory(exported.directory)
    assert again.text_format == exported.tokenizer.text_format
    assert again.fingerprint == exported.tokenizer.fingerprint
    assert again.pad_id == 3


def test_transformers_reads_the_tokenizer(exported: Exported) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported.directory)
    assert (tokenizer.padding_side, tokenizer.model_max_length, tokenizer.pad_token) == ("left", 24, "<pad>")
    assert list(tokenizer("x")) == ["input_ids", "attention_mask"]
    if exported.tokenizer.text_format.has_suffixes:
        assert {"[EOQ]", "[EOD]"} <= set(tokenizer.all_special_tokens)


@pytest.mark.parametrize("text_format", [FORMATS["prefixes"], FORMATS["markers"]])
def test_markers_as_text_differ_only_where_markers_are(tmp_path: Path, text_format: TextFormat) -> None:
    model = Exported(tmp_path / "tiny", dataclasses.replace(text_format, literal_markers="text"))
    assert verify_export(model.directory, model.encode, model.tokenizer) is not None
    reader = SentenceTransformer(str(model.directory), device="cpu")
    text = "a </s> b"
    assert sentence_transformers_ids(reader, [text], "query") != [
        ids.tolist() for ids in model.tokenizer([text], "query")
    ]


def test_difference_is_an_error_that_names_it(exported: Exported) -> None:
    def other_ids(texts: list[str], role: RoleName) -> list[np.ndarray]:
        ids = exported.tokenizer(texts, role)
        return [each[:-1] if role == "document" and text == "\n" else each for text, each in zip(texts, ids)]

    def other_embeddings(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[list[str], RoleName], np.ndarray]:
        return lambda texts, role: change(exported.encode(texts, role))

    with pytest.raises(ExportError, match=r"tokenises otherwise.*role document, text '\\n'"):
        verify_export(exported.directory, exported.encode, other_ids)
    for change in (lambda each: each * 1.01, lambda each: each * np.nan):
        with pytest.raises(ExportError, match=r"another embedding.*role query, text 'how do I"):
            verify_export(exported.directory, other_embeddings(change), exported.tokenizer)
    with pytest.raises(ExportError, match="shape"):
        verify_export(exported.directory, other_embeddings(lambda each: each[:, :16]), exported.tokenizer)


def test_no_verification_without_sentence_transformers(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert verify_export(exported.directory, exported.encode, exported.tokenizer) is None


@pytest.mark.parametrize(
    ("prompt", "task", "expected"),
    [
        ("[BOQ]", None, "[BOQ]x[EOQ]"),
        ("[BOD]", None, "[BOD]x[EOD]"),
        ("[BOD]", "query", "[BOD]x[EOD]"),
        ("[BOD]Code: ", None, "[BOD]Code: x[EOD]"),
        (None, "document", "[BOD]x[EOD]"),
        (None, None, "[BOQ]x[EOQ]"),
        ("Code: ", None, "[BOQ]Code: x[EOQ]"),
        ("Code: ", "document", "[BOD]Code: x[EOD]"),
    ],
)
def test_chat_template(prompt: str | None, task: str | None, expected: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    if prompt is not None:
        messages.insert(0, {"role": "system", "content": prompt})
    # As transformers sets it up.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(chat_template(UDEVER))
    variables: dict[str, Any] = {"messages": messages, **({"task": task} if task else {})}
    assert template.render(**variables) == expected


def test_chat_template_refuses_readers_that_would_lose_the_end_marker(exported: Exported) -> None:
    """sentence-transformers 5.4 and 5.5 hand `restore_suffix` on; benchmarks/versions.py runs them."""
    text_format = exported.tokenizer.text_format
    if not text_format.has_suffixes:
        assert not (exported.directory / "chat_template.jinja").exists()
        return
    settings = json.loads((exported.directory / "sentence_bert_config.json").read_text())
    arguments = settings["processing_kwargs"]["chat_template"]
    tokenizer = AutoTokenizer.from_pretrained(exported.directory)
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False).startswith(
        exported.tokenizer.text_format.query.prompt
    )
    with pytest.raises(jinja2.TemplateError, match=r"sentence-transformers 5\.7"):
        tokenizer.apply_chat_template(messages, tokenize=False, **arguments)


def write(directory: Path, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "huggingface_config": {"model_type": "bloom", "hidden_size": 8},
        "tokenizer": TextTokenizer(BPE, DEFAULT_TEXT_FORMAT),
        "write_weights": lambda path: (path / "model.safetensors").write_bytes(b""),
        "model_card": "card",
    }
    return write_sentence_transformers(directory, **{**arguments, **changes})


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    target = write(tmp_path / "a" / "model")
    with pytest.raises(InputError, match="overwrite"):
        write(target)
    assert write(target, model_card="new", overwrite=True) == target
    assert (target / "README.md").read_text() == "new"
    (target / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        write(target, overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        write(target / "notes.txt")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]


def test_an_interrupted_export_leaves_what_was_there(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "new", write_weights=fail)
    assert list(tmp_path.iterdir()) == []
    target = write(tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):
        write(target, write_weights=fail, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "model.safetensors").read_bytes() == b""
    # What a kill leaves behind is not mistaken for a model, and does not stand in the way.
    (tmp_path / ".model.incomplete").mkdir()
    (tmp_path / ".model.incomplete" / "stale").touch()
    write(target, overwrite=True)
    assert not (target / "stale").exists()


def test_layout(tmp_path: Path) -> None:
    target = write(tmp_path / "model", tokenizer=TextTokenizer(with_markers(BPE, UDEVER_MARKERS), UDEVER))
    read = {str(path.relative_to(target)): path for path in target.rglob("*") if path.is_file()}
    assert set(read) == {
        "1_Pooling/config.json",
        "2_Normalize/config.json",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "config_sentence_transformers.json",
        "jaxembed_text_format.json",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    values = {name: json.loads(path.read_text()) for name, path in read.items() if name.endswith(".json")}
    assert [module["path"] for module in values["modules.json"]] == ["", "1_Pooling", "2_Normalize"]
    pooling = values["1_Pooling/config.json"]
    assert [key for key, on in pooling.items() if on is True] == ["pooling_mode_lasttoken", "include_prompt"]
    assert (pooling["pooling_mode"], pooling["word_embedding_dimension"]) == ("lasttoken", 8)
    assert values["config_sentence_transformers.json"]["requirements"] == {"sentence-transformers": ">=5.7"}
    assert values["tokenizer_config.json"]["additional_special_tokens"] == list(UDEVER_MARKERS)
    assert values["tokenizer_config.json"]["tokenizer_class"] == "BloomTokenizerFast"
    assert values["sentence_bert_config.json"]["max_seq_length"] == 300
    with pytest.raises(InputError, match="hidden_size"):
        write(tmp_path / "other", huggingface_config={"model_type": "bloom"})


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize(
    ("pooling", "mode", "key"),
    [
        ("last", "lasttoken", "pooling_mode_lasttoken"),
        ("mean", "mean", "pooling_mode_mean_tokens"),
        ("weighted_mean", "weightedmean", "pooling_mode_weightedmean_tokens"),
        ("first", "cls", "pooling_mode_cls_token"),
    ],
)
def test_pooling_and_attention(
    tmp_path: Path, pooling: Any, mode: str, key: str, include_prompt: bool, causal: bool
) -> None:
    text_format = dataclasses.replace(DEFAULT_TEXT_FORMAT, pooling=pooling, include_prompt=include_prompt)
    config = {"model_type": "bloom", "hidden_size": 8, **({} if causal else {"is_causal": False})}
    target = write(tmp_path / "model", tokenizer=TextTokenizer(BPE, text_format), huggingface_config=config)

    def read(name: str) -> dict[str, Any]:
        return json.loads((target / name).read_text())

    found = read("1_Pooling/config.json")
    assert found["pooling_mode"] == mode
    assert [name for name, on in found.items() if name.startswith("pooling_mode_") and on] == [key]
    assert found["include_prompt"] == include_prompt
    tokenizer = read("tokenizer_config.json")
    assert tokenizer["padding_side"] == ("left" if pooling == "last" else "right")
    assert tokenizer["tokenizer_class"] == ("BloomTokenizerFast" if causal else "TokenizersBackend")
    assert read("config.json") == config
    sentence_transformers = read("config_sentence_transformers.json")
    oldest = "5.1" if causal else "6.0"
    if pooling == "first" and not include_prompt:
        oldest = "6.2"
    assert sentence_transformers["__version__"] == {"sentence_transformers": f"{oldest}.0"}
    expected = {"sentence-transformers": f">={oldest}", **({} if causal else {"transformers": ">=5.24"})}
    assert sentence_transformers.get("requirements", expected) == expected
    assert ("requirements" in sentence_transformers) == (oldest != "5.1")
    (target / TEXT_FORMAT_FILE).unlink()  # what others wrote would be read as the same
    assert read_text_format(target) == text_format


def test_a_reader_that_is_too_old_is_an_error_that_says_so(exported: Exported, tmp_path: Path) -> None:
    shutil.copytree(exported.directory, tmp_path / "model")
    path = tmp_path / "model" / "config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"requirements": {"transformers": ">=99"}}))
    with pytest.raises(ExportError, match=r"cannot be verified, sentence-transformers .* refuses it here.*>=99"):
        verify_export(tmp_path / "model", exported.encode, exported.tokenizer)


def test_model_card() -> None:
    card = model_card(
        name="org/tiny",
        text_format=dataclasses.replace(UDEVER, literal_markers="text"),
        dim=32,
        base_model="bigscience/bloom-560m",
        license="bigscience-bloom-rail-1.0",
        training_data=[{"name": "a|b", "pairs": 3772, "dropped": 2}],
        config={"seed": 0, "data": {"train": [{"name": "${x}"}]}},
        results=[{"data": "stdlib", "metric": "MRR@10", "before": 0.1, "after": 0.33333, "BM25": None}],
        versions={"jax": "0.10.2"},
    )
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "sentence-similarity", "feature-extraction", "jaxembed"],
        "base_model": "bigscience/bloom-560m",
        "license": "bigscience-bloom-rail-1.0",
    }
    for line in (
        "| stdlib | MRR@10 | 0.1000 | 0.3333 | – |",
        "| a\\|b | 3,772 | 2 |",
        '| query | `"[BOQ]"` + text + token `"[EOQ]"` |',
        "| jax | 0.10.2 |",
        'model = SentenceTransformer("org/tiny")',
        'model = Embedder.from_pretrained("org/tiny")',
    ):
        assert line in body.splitlines()
    assert "literal_markers: text" in body
    config = body.partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(config) == {"seed": 0, "data": {"train": [{"name": "${x}"}]}}
    assert "base_model" not in model_card(name="x", text_format=UDEVER, dim=1, base_model="/runs/model")
