"""Merged checkpoints against float64 numpy; what does not fit together is refused."""

import dataclasses
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxembed.checkpoint.convert import convert, open_source, plan_conversion
from jaxembed.checkpoint.merging import PARALLEL, Merge, average, merge, slerp
from jaxembed.embedder import Embedder
from jaxembed.errors import InputError
from jaxembed.text.format import DEFAULT_TEXT_FORMAT, TEXT_FORMAT_FILE, TextFormat, write_text_format
from jaxembed.text.tokenizer import TextTokenizer, train_byte_level_bpe

from checkpoints import SHAPE, bytes_of, listing, random_weights, small_files, stored_bytes, write_checkpoint

numbers = st.floats(-100, 100, width=32)
tensors = arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 5)), elements=numbers)


def slerp64(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """The formula again, in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = (a * b).sum() / lengths if lengths else 1.0
    if abs(cosine) > PARALLEL:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def scale(*values: np.ndarray) -> float:
    return max(float(np.abs(value).max()) for value in values) + 1e-30


@settings(max_examples=200, deadline=None)
@given(data=st.data(), first=tensors, count=st.integers(1, 4))
def test_average_equals_float64(data: st.DataObject, first: np.ndarray, count: int) -> None:
    others = [data.draw(arrays.arrays(np.float32, first.shape, elements=numbers)) for _ in range(count - 1)]
    weights = np.array(data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count)), float)
    weights /= weights.sum()
    found = average([first, *others], weights.tolist())
    expected = sum(weight * tensor.astype(np.float64) for weight, tensor in zip(weights, [first, *others]))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * scale(first, *others))


@settings(max_examples=300, deadline=None)
@given(data=st.data(), a=tensors, t=st.floats(0, 1))
def test_slerp_equals_float64(data: st.DataObject, a: np.ndarray, t: float) -> None:
    b = data.draw(arrays.arrays(np.float32, a.shape, elements=numbers))
    found, expected = slerp(a, b, t), slerp64(a, b, t)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * scale(a, b))


def test_what_is_equal_stays_as_it_is() -> None:
    a = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32)
    np.testing.assert_array_equal(average([a, a, a], [0.3, 0.3, 0.4]), a)
    np.testing.assert_array_equal(slerp(a, a.copy(), 0.37), a)


def test_slerp_keeps_the_length_of_unit_vectors_and_meets_its_ends() -> None:
    random = np.random.default_rng(0)
    a, b = (x / np.linalg.norm(x) for x in random.standard_normal((2, 40)).astype(np.float32))
    for t in (0.1, 0.5, 0.8):
        assert abs(np.linalg.norm(slerp(a, b, t)) - 1) < 1e-6
    np.testing.assert_allclose(slerp(a, b, 0.0), a, atol=1e-7)
    np.testing.assert_allclose(slerp(a, b, 1.0), b, atol=1e-7)
    np.testing.assert_array_equal(slerp(a, -a, 0.25), average([a, -a], [0.75, 0.25]))
    np.testing.assert_array_equal(slerp(a, np.zeros_like(a), 0.25), average([a, np.zeros_like(a)], [0.75, 0.25]))


def expected(models: list[dict[str, torch.Tensor]], combine: Callable[..., np.ndarray]) -> dict[str, np.ndarray]:
    names = [name.removeprefix("transformer.") for name in models[0]]
    bare = [{name.removeprefix("transformer."): tensor for name, tensor in model.items()} for model in models]
    return {name: combine(*(model[name].double().numpy() for model in bare)) for name in names}


def read(directory: Path) -> dict[str, torch.Tensor]:
    files = (safetensors.torch.load_file(file) for file in sorted(directory.glob("*.safetensors")))
    return {name: tensor for tensors in files for name, tensor in tensors.items()}


WEIGHTS = [1.0, 2.0, 5.0]
WAYS = {
    "average": (WEIGHTS, None, lambda *x: sum(w / 8 * each for w, each in zip(WEIGHTS, x))),
    "slerp": (None, 0.3, lambda a, b: slerp64(a, b, 0.3)),
}


@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints_equal_float64(tmp_path: Path, method: str, dtype: str) -> None:
    """Containers, prefixes and dtypes of the others do not matter; the result is a directory like the first."""
    weights, t, combine = WAYS[method]
    models = [
        random_weights(dtype, seed=1),
        random_weights("float32", "transformer.", seed=2),
        random_weights("float16", seed=3),
    ][: 3 if method == "average" else 2]
    paths = [write_checkpoint(tmp_path / f"model-{index}", model) for index, model in enumerate(models)]
    convert(plan_conversion(open_source(paths[1]), "orbax"), tmp_path / "orbax", progress=False)
    sources = [open_source(path) for path in (paths[0], tmp_path / "orbax", *paths[2:])]
    target = tmp_path / "merged"
    summary = merge(Merge(sources, method, weights, t), target, progress=False)
    found = read(target)
    wanted = expected(models, combine)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert str(tensor.dtype) == f"torch.{dtype}"
        accuracy = 2e-6 if dtype == "float32" else 2**-8
        np.testing.assert_allclose(
            tensor.double().numpy(), wanted[name], rtol=accuracy, atol=2e-6 * scale(wanted[name])
        )
    embedder = Embedder.from_pretrained(target, dtype="float32")
    assert embedder.model_hash == summary.weights_hash
    assert embedder.text_format == DEFAULT_TEXT_FORMAT
    card = (target / "README.md").read_text()
    hashes = [Embedder.from_pretrained(path).model_hash for path in paths]
    shares = [0.125, 0.25, 0.625] if method == "average" else [0.7, 0.3]
    for share, source, found_hash in zip(shares, sources, hashes):
        assert f"* {share:g} of `{source.path.name}`, weights `{found_hash}`" in card
    assert summary.weights_hash in card


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_another_dtype(tmp_path: Path, dtype: str) -> None:
    models = [random_weights("bfloat16", seed=seed) for seed in (1, 2)]
    sources = [open_source(write_checkpoint(tmp_path / str(seed), model)) for seed, model in enumerate(models)]
    merge(Merge(sources), tmp_path / "merged", dtype=np.dtype(dtype), progress=False)
    wanted = expected(models, lambda a, b: (a + b) / 2)
    for name, tensor in read(tmp_path / "merged").items():
        assert str(tensor.dtype) == f"torch.{dtype}"
        np.testing.assert_allclose(
            tensor.double().numpy(), wanted[name], rtol=1e-3 if dtype == "float16" else 1e-6, atol=1e-6
        )
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["torch_dtype"] == dtype


def test_a_model_merged_with_itself_is_itself(tmp_path: Path) -> None:
    tensors = random_weights("bfloat16")
    source = open_source(write_checkpoint(tmp_path / "model", tensors))
    merge(Merge([source, source, source], weights=[1, 1, 1]), tmp_path / "average", progress=False)
    merge(Merge([source, source], "slerp", t=0.4), tmp_path / "slerp", progress=False)
    for name in ("average", "slerp"):
        assert stored_bytes(tmp_path / name) == bytes_of(tensors)


def test_orbax_and_plain_directories_stay_what_they_are(tmp_path: Path) -> None:
    models = [random_weights("float32", "transformer.", seed=seed) for seed in (1, 2)]
    for model in models:
        model["lm_head.weight"] = model["transformer.word_embeddings.weight"].clone()
    paths = [write_checkpoint(tmp_path / str(seed), model) for seed, model in enumerate(models)]
    for path in paths:
        (path / TEXT_FORMAT_FILE).unlink()
    sources = [open_source(path) for path in paths]
    merge(Merge(sources), tmp_path / "plain", progress=False)
    found, wanted = read(tmp_path / "plain"), {n: (models[0][n] + models[1][n]) / 2 for n in models[0]}
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)
    ours = small_files(tmp_path / "plain", without=["README.md"])
    assert ours == small_files(paths[0], without=["README.md"])
    assert "* 0.5 of `0`, weights `" in (tmp_path / "plain" / "README.md").read_text()
    convert(plan_conversion(sources[0], "orbax"), tmp_path / "orbax", progress=False)
    merge(Merge([open_source(tmp_path / "orbax"), sources[1]]), tmp_path / "merged", progress=False)
    assert (tmp_path / "merged" / "jaxembed_orbax.json").exists()
    convert(plan_conversion(open_source(tmp_path / "merged"), "hf"), tmp_path / "back", progress=False)
    assert stored_bytes(tmp_path / "back") == stored_bytes(tmp_path / "plain")


def change_config(path: Path) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_norm_epsilon": 0.5}))


def change_tokenizer(path: Path) -> None:
    raw = train_byte_level_bpe(["words of another kind", "zebra"], SHAPE.vocab_size)
    TextTokenizer(raw, DEFAULT_TEXT_FORMAT).save(path)


def change_format(path: Path) -> None:
    query = dataclasses.replace(DEFAULT_TEXT_FORMAT.query, instruction="Find: ")
    write_text_format(dataclasses.replace(DEFAULT_TEXT_FORMAT, query=query), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_config, r"b/config.json: epsilon is 0.5; in .*a it is"),
        (change_tokenizer, r"b: tokenizer: '.*' is (no )?token"),
        (change_format, r"b: text format: query.instruction is 'Find: '; in .*a it is ''"),
        (lambda path: write_text_format(TextFormat(max_length=9), path), r"text format: query.prefix is ''"),
    ],
)
def test_models_that_do_not_fit_are_refused(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    paths = [write_checkpoint(tmp_path / name, random_weights(seed=seed)) for seed, name in enumerate("ab")]
    change(paths[1])
    with pytest.raises(InputError, match=message):
        Merge([open_source(path) for path in paths])
    assert "merged" not in listing(tmp_path)


def test_a_tokenizer_with_the_same_tokens_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [write_checkpoint(tmp_path / name, random_weights(seed=seed)) for seed, name in enumerate("ab")]
    file = paths[1] / "tokenizer.json"
    values = json.loads(file.read_text())
    values["pre_tokenizer"]["add_prefix_space"] = True
    file.write_text(json.dumps(values))
    with caplog.at_level(logging.WARNING):
        Merge([open_source(path) for path in paths])
    assert "has the same tokens" in caplog.text


def test_a_text_format_in_one_of_two(tmp_path: Path) -> None:
    paths = [write_checkpoint(tmp_path / name, random_weights(seed=seed)) for seed, name in enumerate("ab")]
    (paths[1] / TEXT_FORMAT_FILE).unlink()
    sources = [open_source(path) for path in paths]
    merge(Merge(sources), tmp_path / "merged", progress=False)
    assert Embedder.from_pretrained(tmp_path / "merged").text_format == DEFAULT_TEXT_FORMAT
    with pytest.raises(InputError, match=r"has no text format, but .* has: name that model first"):
        Merge(sources[::-1])


def test_a_head_in_one_of_two(tmp_path: Path) -> None:
    models = [random_weights(seed=1), random_weights(seed=2)]
    models[1]["lm_head.weight"] = models[1]["word_embeddings.weight"].clone()
    paths = [write_checkpoint(tmp_path / name, model) for name, model in zip("ab", models)]
    merge(Merge([open_source(path) for path in paths]), tmp_path / "embedder", progress=False)  # has no use for it
    for path in paths:
        (path / TEXT_FORMAT_FILE).unlink()
    sources = [open_source(path) for path in paths]
    with pytest.raises(InputError, match=r"a: no tensor 'lm_head.weight', which .*b has"):
        merge(Merge(sources), tmp_path / "merged", progress=False)
    with pytest.raises(InputError, match=r"a: no tensor 'lm_head.weight', which .*b has"):
        merge(Merge(sources[::-1]), tmp_path / "merged", progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "slerp"}, "--t: expected a number from 0"),
        ({"method": "slerp", "t": 1.5}, "found 1.5"),
        ({"method": "slerp", "t": 0.5, "weights": [1, 1]}, "--weights belongs to --method average"),
        ({"t": 0.5}, "--t belongs to --method slerp"),
        ({"weights": [1.0]}, "expected 2 numbers, one a model, found 1"),
        ({"weights": [1.0, -1.0]}, "at least 0, not all 0"),
        ({"weights": [0.0, 0.0]}, "at least 0, not all 0"),
        ({"weights": [1.0, math.nan]}, "at least 0, not all 0"),
    ],
)
def test_ways_that_make_no_sense(tmp_path: Path, options: dict[str, object], message: str) -> None:
    source = open_source(write_checkpoint(tmp_path / "a", random_weights()))
    with pytest.raises(InputError, match=message):
        Merge([source, source], **options)


def test_numbers_of_models(tmp_path: Path) -> None:
    source = open_source(write_checkpoint(tmp_path / "a", random_weights()))
    with pytest.raises(InputError, match="expected two models or more, found 1"):
        Merge([source])
    with pytest.raises(InputError, match="--method slerp: expected two models, found 3"):
        Merge([source] * 3, "slerp", t=0.5)
