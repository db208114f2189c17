"""`Embedder` against sentence-transformers on the same directory, and against itself in other company."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from sentence_transformers.util import quantize_embeddings
from transformers import BloomConfig as TorchConfig
from transformers import BloomForCausalLM, BloomModel

import jaxembed
from jaxembed import Embedder, InputError, Role, TextFormat
from jaxembed.checkpoint.export import Verification, edge_texts
from jaxembed.checkpoint.pretrained import Decoder, load_decoder
from jaxembed.models import FAMILIES
from jaxembed.models.bloom import BloomConfig
from jaxembed.sharding import make_mesh
from jaxembed.text.format import DEFAULT_TEXT_FORMAT, TEXT_FORMAT_FILE, UDEVER, UDEVER_MARKERS, Pooling
from jaxembed.text.packing import RowShape
from jaxembed.text.tokenizer import TextTokenizer, train_byte_level_bpe, with_markers

from blooms import from_torch, random_bloom

CONFIG = BloomConfig(vocab_size=416, dim=32, layers=2, heads=4)
FORMATS = {
    "prefixes": dataclasses.replace(DEFAULT_TEXT_FORMAT, max_length=48),
    "markers": dataclasses.replace(UDEVER, max_length=48),
    "instructions": TextFormat(Role("[BOQ]", "[EOQ]", "Find code: "), Role("[BOD]", "[EOD]"), 48, normalize=False),
}
WORDS = [line.strip() for line in Path(dataclasses.__file__).read_text().splitlines() if line.strip()]
PLAIN = train_byte_level_bpe(WORDS, 400)
TOKENIZER = with_markers(PLAIN, UDEVER_MARKERS)
MIXED = [" ".join(WORDS[i : i + i % 7]) for i in range(24)]


def bloom() -> BloomModel:
    """The same at every call."""
    torch.manual_seed(0)
    return random_bloom(CONFIG)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers leaves a decoder: no text format, a key of its own in the config."""
    directory = tmp_path_factory.mktemp("source")
    model = bloom()
    model.config.remark = {"by": "someone"}
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text(TOKENIZER.to_str())
    return directory


@dataclasses.dataclass(frozen=True)
class Saved:
    directory: Path
    model: Embedder
    reader: SentenceTransformer
    verification: Verification | None


@pytest.fixture(scope="module", params=FORMATS)
def saved(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    directory = tmp_path_factory.mktemp("saved") / "model"
    found = Embedder.from_pretrained(source, text_format=FORMATS[request.param]).save_pretrained(directory)
    reader = SentenceTransformer(str(directory), device="cpu")
    return Saved(directory, Embedder.from_pretrained(directory), reader, found)


@pytest.fixture(scope="module")
def model(source: Path) -> Embedder:
    return Embedder.from_pretrained(source, text_format=FORMATS["prefixes"])


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """What JAX compiled during the test."""
    found: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def close(found: Any, expected: Any) -> None:
    """To 1e-5 of the vectors' length."""
    found, expected = np.atleast_2d(found), np.atleast_2d(expected)
    scale = np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=1e-5)


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "encode": lambda m, x: m.encode(x),
    "encode_query": lambda m, x: m.encode_query(x),
    "encode_document": lambda m, x: m.encode_document(x),
    "prompt_name": lambda m, x: m.encode(x, prompt_name="document"),
    "positions": lambda m, x: m.encode(x, "query", None, 4, False),
    "prompt": lambda m, x: m.encode_query(x, prompt="Code: "),
    "prompt of a document": lambda m, x: m.encode_document(x, prompt="Code: "),
    "prompt with a marker": lambda m, x: m.encode_query(x, prompt="[BOQ]Code: "),
    "empty prompt": lambda m, x: m.encode_query(x, prompt=""),
    "normalised": lambda m, x: m.encode_query(x, normalize_embeddings=True),
    "truncated": lambda m, x: m.encode_query(x, truncate_dim=8, normalize_embeddings=True),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_same_as_sentence_transformers(saved: Saved, call: str) -> None:
    texts = [*edge_texts(saved.model.text_format), *MIXED]
    found = CALLS[call](saved.model, texts)
    assert found.dtype == np.float32
    close(found, CALLS[call](saved.reader, texts))
    one = CALLS[call](saved.model, texts[0])
    assert one.shape == CALLS[call](saved.reader, texts[0]).shape == found.shape[1:]
    close(one, found[0])


POOLED = [
    ("mean", True, "causal"),
    ("mean", False, "causal"),
    ("weighted_mean", True, "causal"),
    ("weighted_mean", False, "causal"),
    ("last", True, "bidirectional"),
    ("mean", False, "bidirectional"),
    ("first", True, "bidirectional"),
    ("first", False, "bidirectional"),
]


@pytest.fixture(scope="module", params=POOLED, ids=lambda each: "-".join(map(str, each)))
def pooled(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Saved in one of the other poolings, or with attention both ways."""
    pooling, include_prompt, attention = request.param
    directory = tmp_path_factory.mktemp("pooled") / "model"
    instructed = Role("query: ", instruction="Find the code that does this. ")
    text_format = dataclasses.replace(
        FORMATS["prefixes"], query=instructed, pooling=pooling, include_prompt=include_prompt
    )
    decoder = load_decoder(source, attention=attention, progress=False)
    found = Embedder(decoder, TextTokenizer(PLAIN, text_format)).save_pretrained(directory)
    model = Embedder.from_pretrained(directory)
    assert (model.text_format, model.decoder.config.causal) == (text_format, attention == "causal")
    return Saved(directory, model, SentenceTransformer(str(directory), device="cpu"), found)


@pytest.mark.parametrize("call", ["encode", "encode_document", "prompt", "empty prompt"])
def test_poolings_are_those_of_sentence_transformers(pooled: Saved, call: str) -> None:
    texts = [*edge_texts(pooled.model.text_format), *MIXED]
    found = CALLS[call](pooled.model, texts)
    close(found, CALLS[call](pooled.reader, texts))
    close(CALLS[call](pooled.model, texts[0]), found[0])


def test_pooled_exports_are_verified_and_read_back_from_their_files_alone(pooled: Saved, tmp_path: Path) -> None:
    assert pooled.verification is not None
    assert pooled.verification.difference < 1e-5
    shutil.copytree(pooled.directory, tmp_path / "model")
    (tmp_path / "model" / TEXT_FORMAT_FILE).unlink()
    again = Embedder.from_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(again.encode_query(MIXED), pooled.model.encode_query(MIXED))
    np.testing.assert_array_equal(again.encode_document(MIXED), pooled.model.encode_document(MIXED))


def test_options_make_a_difference(source: Path) -> None:
    """Else the equalities above were cheap."""
    found = []
    for pooling, include_prompt, attention in POOLED:
        text_format = dataclasses.replace(FORMATS["prefixes"], pooling=pooling, include_prompt=include_prompt)
        decoder = load_decoder(source, attention=attention, progress=False)
        found.append(Embedder(decoder, TextTokenizer(TOKENIZER, text_format)).encode_query(MIXED[1:7], batch_size=2))
    assert min(np.abs(found[a] - found[b]).max() for a in range(len(POOLED)) for b in range(a)) > 1e-3


def test_the_first_token_of_a_causal_decoder_is_refused(source: Path) -> None:
    with pytest.raises(InputError, match='"first" with causal attention'):
        Embedder.from_pretrained(source, text_format=dataclasses.replace(FORMATS["prefixes"], pooling="first"))


@pytest.mark.parametrize("dim", [None, 20])
@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_precision(saved: Saved, precision: Any, dim: int | None) -> None:
    texts = [*MIXED, *MIXED[:3]]
    options = {"truncate_dim": dim, "normalize_embeddings": True}
    floats = saved.model.encode_query(texts, **options)
    found = saved.model.encode_query(texts, precision=precision, **options)
    expected = quantize_embeddings(floats, precision)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    # Whole with sentence-transformers, where rounding may take a number over the edge of its step.
    theirs = saved.reader.encode_query(texts, precision=precision, **options)
    assert (found.dtype, found.shape) == (theirs.dtype, theirs.shape)
    if precision in ("binary", "ubinary"):
        assert (np.unpackbits(found.view(np.uint8)) != np.unpackbits(theirs.view(np.uint8))).mean() < 0.002
    elif precision != "float32":
        assert np.abs(found.astype(int) - theirs).max() <= 1
        assert (found != theirs).mean() < 0.02
        for encoder in (saved.model, saved.reader):
            with pytest.raises(ValueError, match="from a single embedding"):
                encoder.encode(texts[0], precision=precision)


def test_ranges_from_elsewhere(model: Embedder) -> None:
    documents = model.encode_document(MIXED)
    ranges = np.stack([documents.min(0), documents.max(0)])
    expected = quantize_embeddings(model.encode_query(MIXED), "int8", ranges)
    np.testing.assert_array_equal(model.encode_query(MIXED, precision="int8", ranges=ranges), expected)
    for text, vector in zip(MIXED[:3], expected):  # the same alone as among others
        one = model.encode_query(text, precision="int8", calibration_embeddings=documents)
        np.testing.assert_array_equal(one, vector)
    assert model.encode("one text", precision="ubinary").shape == (4,)
    assert model.encode([], precision="int8").shape == (0, 32)
    with pytest.raises(InputError, match="from a single embedding; give `ranges` or `calibration_embeddings`"):
        model.encode("one text", precision="int8")


@pytest.mark.parametrize("name", ["document", "passage"])
def test_a_model_that_sentence_transformers_wrote(source: Path, tmp_path: Path, name: str) -> None:
    decoder = without(source, tmp_path / "decoder")
    (decoder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BloomTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"})
    )
    transformer = modules.Transformer(str(decoder), max_seq_length=32)
    parts = [transformer, modules.Pooling(32, "lasttoken"), modules.Normalize()]
    prompts = {"query": "q: ", name: "p: "}
    theirs = SentenceTransformer(modules=parts, prompts=prompts, device="cpu")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = Embedder.from_pretrained(tmp_path / "theirs")
    assert (ours.text_format.query, ours.text_format.max_length) == (Role("q: "), 32)
    close(ours.encode_query(MIXED), theirs.encode_query(MIXED))
    close(ours.encode_document(MIXED), theirs.encode_document(MIXED))


def test_similarity_is_that_of_sentence_transformers(saved: Saved) -> None:
    queries, documents = saved.model.encode_query(MIXED[:3]), saved.model.encode_document(MIXED[3:9])
    expected = saved.reader.similarity(queries, documents).numpy()
    np.testing.assert_allclose(saved.model.similarity(queries, documents), expected, atol=1e-6)
    np.testing.assert_allclose(saved.model.similarity(queries[0], documents), expected[:1], atol=1e-6)
    assert saved.model.similarity(saved.model.encode([]), documents).shape == (0, 6)


@pytest.mark.parametrize(
    ("sizes", "pooling"),
    [((2, 4, 1), "last"), pytest.param((2, 2, 2), "mean", marks=pytest.mark.slow)],
    ids=str,
)
def test_a_mesh_gives_what_one_device_gives(
    source: Path, model: Embedder, sizes: tuple[int, int, int], pooling: Pooling
) -> None:
    mesh = make_mesh(*sizes)
    text_format = dataclasses.replace(model.text_format, pooling=pooling)
    split = Embedder.from_pretrained(source, text_format=text_format, mesh=mesh)
    alone = model if pooling == "last" else Embedder.from_pretrained(source, text_format=text_format)
    texts = MIXED * 2 + [f"{text} {number}" for number, text in enumerate(MIXED * 2)]
    found = split.encode_document(texts, truncate_dim=20)
    np.testing.assert_allclose(found, alone.encode_document(texts, truncate_dim=20), rtol=0, atol=1e-6)
    np.testing.assert_allclose(split.encode_query(texts[5]), alone.encode_query(texts[5]), rtol=0, atol=1e-6)
    assert all(shape.rows % (sizes[0] * sizes[1]) == 0 for shape in split.compiled_shapes)
    assert split.model.table.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, "fsdp")), 2)


def test_weights_come_to_the_mesh(source: Path, model: Embedder, tmp_path: Path) -> None:
    """Also those that are elsewhere at first, and from there into an export."""
    split = Embedder(load_decoder(source, progress=False), model.tokenizer, mesh=make_mesh(8))
    texts, expected = MIXED[1:4], model.encode(MIXED[1:4])
    np.testing.assert_allclose(split.encode(texts), expected, rtol=0, atol=1e-6)
    split.replace_state(nnx.map_state(lambda _, leaf: leaf.replace(leaf[...] * 0.5), nnx.state(model.model)))
    assert np.abs(split.encode(texts) - expected).max() > 1e-3
    split.replace_state(nnx.state(model.model))
    np.testing.assert_allclose(split.encode(texts), expected, rtol=0, atol=1e-6)
    split.save_pretrained(tmp_path / "saved", verify=False)
    model.save_pretrained(tmp_path / "alone", verify=False)
    assert (tmp_path / "saved/model.safetensors").read_bytes() == (tmp_path / "alone/model.safetensors").read_bytes()


def test_a_mesh_that_does_not_divide_the_model(source: Path, model: Embedder) -> None:
    mesh = make_mesh(1, 3, devices=jax.devices()[:3])
    with pytest.raises(InputError, match=r"mesh\.fsdp: 3 does not divide the 'embed' dimension 32 of parameter"):
        Embedder.from_pretrained(source, text_format=model.text_format, mesh=mesh)
    with pytest.raises(InputError, match=r"mesh\.fsdp: 3 does not divide"):
        Embedder(model.decoder, model.tokenizer, mesh=mesh)


def test_saved_and_loaded_again(source: Path, saved: Saved, tmp_path: Path) -> None:
    assert saved.verification is not None
    assert saved.verification.difference < 1e-5
    first = Embedder.from_pretrained(source, text_format=saved.model.text_format)
    assert saved.model.model_hash == first.model_hash
    assert saved.model.tokenizer.fingerprint == first.tokenizer.fingerprint
    np.testing.assert_array_equal(saved.model.encode(MIXED), first.encode(MIXED))
    expected = safetensors.torch.load_file(source / "model.safetensors")
    found = safetensors.torch.load_file(saved.directory / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.numpy().tobytes() == found[name].numpy().tobytes(), name
    config, original = (json.loads((d / "config.json").read_text()) for d in (saved.directory, source))
    assert config.pop("torch_dtype") == original.pop("dtype") == "float32"
    assert config == original
    assert config["remark"] == {"by": "someone"}
    saved.model.save_pretrained(tmp_path / "again", verify=False)
    for file in saved.directory.rglob("*"):
        again = tmp_path / "again" / file.relative_to(saved.directory)
        if file.is_file() and file.name != "README.md":  # it names the directory
            assert file.read_bytes() == again.read_bytes(), file


def test_nothing_is_overwritten_unasked(model: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model.save_pretrained("~/model", card="mine", verify=False) is None
    assert (tmp_path / "model" / "README.md").read_text() == "mine"
    with pytest.raises(InputError, match="is not empty"):
        model.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model", overwrite=True, verify=False)
    assert (tmp_path / "model" / "README.md").read_text() != "mine"


def variant(source: Path, directory: Path, kind: str) -> Path:
    """The same decoder in another container."""
    causal = BloomForCausalLM(TorchConfig(**CONFIG.to_huggingface()))
    causal.transformer.load_state_dict(bloom().state_dict())
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    causal.to(dtype).save_pretrained(directory, max_shard_size="20KB" if kind == "sharded" else "5GB")
    assert (directory / "model.safetensors.index.json").exists() == (kind == "sharded")
    shutil.copy(source / "tokenizer.json", directory)
    return directory


@pytest.mark.parametrize("kind", ["causal", "sharded", "bfloat16"])
def test_other_containers(source: Path, model: Embedder, tmp_path: Path, kind: str) -> None:
    other = Embedder.from_pretrained(variant(source, tmp_path / kind, kind), text_format=model.text_format)
    if kind != "bfloat16":
        assert other.model_hash == model.model_hash
        np.testing.assert_array_equal(other.encode(MIXED), model.encode(MIXED))
        return
    # The file's values, widened: what a float32 file with the same values gives.
    wide = {k: v.bfloat16().float() for k, v in safetensors.torch.load_file(source / "model.safetensors").items()}
    shutil.copytree(source, tmp_path / "wide")
    safetensors.torch.save_file(wide, tmp_path / "wide" / "model.safetensors")
    same = Embedder.from_pretrained(tmp_path / "wide", text_format=model.text_format)
    assert other.model_hash != model.model_hash
    np.testing.assert_array_equal(other.encode(MIXED), same.encode(MIXED))
    other.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


def test_bfloat16(source: Path, model: Embedder, tmp_path: Path) -> None:
    half = Embedder.from_pretrained(source, text_format=model.text_format, dtype="bfloat16")
    found = half.encode(MIXED[:4])
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert (found * model.encode(MIXED[:4])).sum(1).min() > 0.99
    assert half.save_pretrained(tmp_path / "half") is not None  # compared in float32
    tensors = safetensors.torch.load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = Embedder.from_pretrained(tmp_path / "half", dtype="bfloat16")
    # Loaded, a model has the hash of its file; saved, that of what was written.
    assert half.model_hash == model.model_hash != again.model_hash
    assert again.model_hash in (tmp_path / "half" / "README.md").read_text()


texts_of_any_length = st.lists(
    st.one_of(st.text(max_size=12), st.integers(0, 80).map(lambda n: " ".join(WORDS[n : n + n // 4]))), max_size=12
)


@given(texts=texts_of_any_length, batch_size=st.sampled_from([None, 3]))
@settings(max_examples=15, deadline=None)
def test_order_and_neighbours(texts: list[str], batch_size: int | None) -> None:
    """Every text gets, in its place, what it gets alone."""
    model = shared_model()
    found = model.encode_document(texts, batch_size=batch_size)
    assert found.shape == (len(texts), 32)
    for text, vector in zip(texts, found):
        np.testing.assert_allclose(vector, model.encode_document(text), rtol=0, atol=1e-5)


_SHARED: list[Embedder] = []


def shared_model() -> Embedder:
    """One for all examples of hypothesis, which takes no module fixture."""
    if not _SHARED:
        decoder = Decoder(from_torch(CONFIG, bloom()), FAMILIES["bloom"], CONFIG, CONFIG.to_huggingface())
        _SHARED.append(Embedder(decoder, TextTokenizer(TOKENIZER, FORMATS["prefixes"])))
    return _SHARED[0]


def test_windows_are_put_together_again(model: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model.encode(MIXED)
    monkeypatch.setattr("jaxembed.embedder._FIRST_WINDOW", 3)
    monkeypatch.setattr("jaxembed.embedder._WINDOW", 7)
    close(model.encode(MIXED), expected)
    close(model.encode(MIXED[:3]), expected[:3])


def test_equal_texts_are_computed_once(model: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenized: list[str] = []
    call = TextTokenizer.__call__

    def counting(self: TextTokenizer, texts: list[str], role: Any) -> list[np.ndarray]:
        tokenized.extend(texts)
        return call(self, texts, role)

    monkeypatch.setattr(TextTokenizer, "__call__", counting)
    found = model.encode(["b", "a", "b", "", "a", "b"])
    assert tokenized == ["b", "a", ""]
    np.testing.assert_array_equal(found[[0, 1, 0, 3, 1, 0]], found)
    assert len(np.unique(found, axis=0)) == 3


@pytest.mark.parametrize("texts", [[], (), np.array([], dtype=str), iter(())])
def test_no_texts(model: Embedder, texts: Any) -> None:
    found = model.encode(texts)
    assert (found.shape, found.dtype) == ((0, 32), np.float32)
    assert model.encode([], truncate_dim=8).shape == (0, 8)


def test_any_iterable_of_texts(model: Embedder) -> None:
    expected = model.encode(["a", "b c"])
    for texts in (("a", "b c"), np.array(["a", "b c"]), np.array(["a", "b c"], object), (x for x in ["a", "b c"])):
        np.testing.assert_array_equal(model.encode(texts), expected)
    np.testing.assert_array_equal(model.encode(np.str_("a")), model.encode("a"))


@pytest.mark.parametrize(
    ("sentences", "message"),
    [
        (None, "sentences: expected a text or a list of texts, got NoneType"),
        (3, "got int"),
        (b"ab", "got bytes"),
        ({"a": 1}, "got dict"),
        ({"a"}, "got set"),
        (np.array("a"), r"array of shape \(\)"),
        (np.array([["a"]]), r"array of shape \(1, 1\)"),
        (["a", None], r"sentences\[1\]: expected a string, got NoneType: None"),
        ([["a", "b"]], r"sentences\[0\]: expected a string, got list: \['a', 'b'\]"),
        (["a", "b", "\ud800"], r"sentences\[2\]: not valid Unicode"),
        ("\ud800", r"sentences\[0\]: not valid Unicode"),
    ],
)
def test_what_is_no_text(model: Embedder, sentences: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.encode(sentences)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_name": "passage"}, 'expected "query" or "document", got \'passage\''),
        ({"prompt": 3}, "prompt: expected a string, got int"),
        ({"prompt": "word " * 60}, "leave no room for a text"),
        ({"truncate_dim": 0}, "truncate_dim: expected a whole number from 1 to 32, found 0"),
        ({"truncate_dim": 33}, "from 1 to 32, found 33"),
        ({"truncate_dim": 8.0}, r"found 8\.0"),
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1, found 0"),
        ({"batch_size": "4"}, "batch_size"),
        ({"precision": "float16"}, "precision: expected one of float32, int8, .* found 'float16'"),
        ({"precision": "int8", "ranges": np.zeros((2, 16))}, r"ranges: expected shape \(2, 32\)"),
    ],
)
def test_arguments_out_of_range(model: Embedder, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.encode(["a"], **arguments)


def test_similarity_of_what_does_not_fit(model: Embedder) -> None:
    vectors = model.encode(["a", "b"])
    with pytest.raises(InputError, match="one width"):
        model.similarity(vectors, vectors[:, :8])
    with pytest.raises(InputError, match="expected embeddings"):
        model.similarity(["a"], vectors)
    with pytest.raises(InputError, match="expected float embeddings, found int8"):
        model.similarity(vectors, model.encode(["a", "b"], precision="binary"))


def test_truncation_and_length(model: Embedder) -> None:
    whole = model.encode(MIXED, normalize_embeddings=False)
    lengths = np.linalg.norm(whole, axis=1, keepdims=True)
    assert (np.abs(lengths - 1) > 0.1).all()
    close(model.encode(MIXED), whole / lengths)
    short = model.encode(MIXED, truncate_dim=np.int64(8))
    close(short, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True))
    np.testing.assert_array_equal(model.encode(MIXED, truncate_dim=8, normalize_embeddings=False), whole[:, :8])


def test_a_text_beyond_the_maximum_loses_its_tail(model: Embedder) -> None:
    long = "word " * 100
    np.testing.assert_array_equal(model.encode(long), model.encode(long + "and more"))


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bar(model: Embedder, capsys: pytest.CaptureFixture[str], shown: bool) -> None:
    model.encode(["a", "b", "a"], show_progress_bar=shown)
    assert ("2/2" in capsys.readouterr().err) == shown


def test_few_shapes_are_compiled(source: Path, compilations: list[str]) -> None:
    model = Embedder.from_pretrained(source, text_format=FORMATS["prefixes"])
    compilations.clear()
    model.encode_query("sort a dict")
    assert model.compiled_shapes == {RowShape(length=48, rows=1, slots=12)}
    generator = np.random.default_rng(0)
    for count in (*range(1, 30), 100, 257):
        lengths = generator.integers(0, generator.choice([2, 8, 40]), count)
        model.encode([" ".join(generator.choice(WORDS, length)) for length in lengths])
    assert 1 < len(model.compiled_shapes) <= 6
    # Nothing else is compiled either, whatever the number of texts.
    assert len(compilations) == len(model.compiled_shapes)


def test_other_weights_are_not_compiled_again(source: Path, compilations: list[str]) -> None:
    model = Embedder.from_pretrained(source, text_format=FORMATS["prefixes"])
    first = model.encode(["a"])
    doubled = jax.tree.map(lambda x: 1.1 * x, model._state)
    compilations.clear()
    model.replace_state(doubled)
    assert np.abs(model.encode(["a"]) - first).max() > 1e-3
    assert not compilations


@pytest.mark.parametrize("dtype", ["float16", "half", None, 3])
def test_dtypes_that_are_none(source: Path, dtype: Any) -> None:
    with pytest.raises(InputError, match="dtype: expected auto, float32 or bfloat16, found"):
        Embedder.from_pretrained(source, text_format=FORMATS["prefixes"], dtype=dtype)


def test_a_text_format_as_in_a_config(source: Path) -> None:
    keys = {"query": {"prefix": "query: "}, "document": {"prefix": "document: "}, "max_length": 48}
    assert Embedder.from_pretrained(source, text_format=keys).text_format == FORMATS["prefixes"]
    for wrong in ({"queries": {}}, "udever"):
        with pytest.raises(InputError, match="text_format"):
            Embedder.from_pretrained(source, text_format=wrong)


def test_udever_needs_no_text_format(source: Path) -> None:
    assert Embedder.from_pretrained(source).text_format == UDEVER


def without(source: Path, directory: Path, **changes: Any) -> Path:
    """A copy whose tokenizer has no markers, and other values in its config."""
    shutil.copytree(source, directory)
    (directory / "tokenizer.json").write_text(train_byte_level_bpe(WORDS, 400).to_str())
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


def test_a_directory_without_text_format(source: Path, tmp_path: Path) -> None:
    directory = without(source, tmp_path / "plain")
    with pytest.raises(InputError, match=r"no text format found.*give one as `text_format`, for example \{") as error:
        Embedder.from_pretrained(directory)
    example = str(error.value).partition("for example ")[2]
    assert Embedder.from_pretrained(directory, text_format=json.loads(example)).encode("a").shape == (32,)


def test_an_unknown_architecture_is_said_first(source: Path, tmp_path: Path) -> None:
    directory = without(source, tmp_path / "bert", model_type="bert")
    with pytest.raises(InputError, match="unknown architecture: model_type is 'bert', supported are 'bloom'"):
        Embedder.from_pretrained(directory)


def test_a_tokenizer_of_another_model(source: Path, tmp_path: Path) -> None:
    directory = without(source, tmp_path / "large")
    (directory / "tokenizer.json").write_text(with_markers(TOKENIZER, [f"[{n}]" for n in range(20)]).to_str())
    with pytest.raises(InputError, match=r"the tokenizer has 424 tokens, .* only 416 rows"):
        Embedder.from_pretrained(directory)


def test_the_package_imports_nothing_until_it_is_used() -> None:
    code = "import sys, jaxembed; assert not {'jax', 'numpy', 'transformers'} & set(sys.modules); print(dir(jaxembed))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f"'{name}'" in shown for name in jaxembed.__all__)


def test_public_names() -> None:
    assert jaxembed.TextFormat is TextFormat
    assert isinstance(jaxembed.__version__, str)
    with pytest.raises(AttributeError, match="no attribute 'Embeder'"):
        jaxembed.Embeder  # noqa: B018 (to be looked up)
