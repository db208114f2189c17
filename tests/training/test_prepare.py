"""Decoder and batches of a run, and what is said of rows that are mostly empty."""

import logging
import re

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxembed.config import load_config
from jaxembed.sharding import make_mesh
from jaxembed.training import prepare
from jaxembed.training.prepare import prepare_batches, prepare_decoder
from jaxembed.training.texts import prepare_tokenizer, read_sources

from runs import SHAPE, Workshop, make_rows, write_jsonl

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCRATCH = {"scratch": {"layers": 2, "dim": 16, "heads": 2}}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 1, 1, jax.devices()[:1])


@pytest.fixture
def load(workshop):
    """The workshop's config, sections replaced, as a value."""
    return lambda *overrides, **sections: load_config(
        workshop.write_config("changed", **sections), [str(override) for override in overrides]
    )


def test_a_decoder_is_read_from_its_directory(workshop, load, tmp_path, mesh):
    config = load()
    tokenizer = prepare_tokenizer(config, [], tmp_path)
    decoder = prepare_decoder(config, tokenizer, mesh, "float32")
    expected = load_file(workshop.base / "model.safetensors")["word_embeddings.weight"]
    np.testing.assert_array_equal(np.asarray(decoder.model.table[...]), expected)
    assert decoder.config.layers == SHAPE.layers


def test_a_fresh_decoder_has_the_shape_of_the_config_and_weights_by_the_seed(workshop, load, tmp_path, mesh):
    config = load(model=SCRATCH, tokenizer={"path": str(workshop.base)})
    tokenizer = prepare_tokenizer(config, [], tmp_path)
    arrays = []
    for seed in (0, 0, 1):
        decoder = prepare_decoder(config.model_copy(update={"seed": seed}), tokenizer, mesh, "float32")
        arrays.append([np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(decoder.model))])
    same = [[np.array_equal(a, b) for a, b in zip(arrays[0], other)] for other in arrays[1:]]
    assert all(same[0])
    assert not all(same[1])
    assert (decoder.config.dim, decoder.config.layers, decoder.config.heads) == (16, 2, 2)
    assert decoder.config.vocab_size == 264
    larger = load(model={"scratch": {**SCRATCH["scratch"], "vocab_size": 300}}, tokenizer={"path": str(workshop.base)})
    assert prepare_decoder(larger, tokenizer, mesh, "float32").config.vocab_size == 300


def test_batches_hold_the_texts_of_the_plan(workshop, load, tmp_path, mesh):
    """Each text of a batch is found again where the batch says, token by token."""
    rows = make_rows(9, seed=4)
    second = write_jsonl(tmp_path / "b.jsonl", rows)
    sources = [
        {"kind": "jsonl", "name": "a", "path": str(workshop.data)},
        {"kind": "jsonl", "name": "b", "path": str(second), "negatives": ["hard"]},
    ]
    config = load(
        data={"train": sources, "cache_dir": str(tmp_path / "cache")},
        training={"batch_size": 10, "epochs": 1.5, "negatives": 1, "chunk_rows": 2},
    )
    examples = read_sources(config.data.train, config.data)
    tokenizer = prepare_tokenizer(config, examples, tmp_path / "run")
    batches = prepare_batches(config, examples, tokenizer, mesh, 16)
    assert len(batches) == 8  # 57 pairs, 5 batches an epoch
    anchors, positives = ([text for found in examples for text in getattr(found, n)] for n in ("anchors", "positives"))
    negatives = [None] * 48 + [row["hard"] for row in rows]
    seen = set()
    for step in range(len(batches)):
        fields = batches[step]
        numbers = batches.schedule.batch(step)
        seen |= set(numbers.tolist())
        assert fields["data_set"].tolist() == [int(number >= 48) for number in numbers]
        documents = [positives[n] for n in numbers] + [negatives[n] for n in numbers]
        assert fields["valid"].tolist() == [text is not None for text in documents]
        assert fields["tokens"].shape[1] == 2
        pairs = [("query", anchors[n], fields["own"][i]) for i, n in enumerate(numbers)]
        pairs += [("document", text, place) for text, place in zip(documents, fields["candidates"]) if text is not None]
        for role, text, place in pairs:
            expected = tokenizer.tokenizer.encode(f"{role}: {text}").ids  # texts here are shorter than max_length
            assert read_back(fields, place) == expected
    assert len(seen) > 48


SPARSE = re.compile(
    r"expected density (\S+): many of the computed positions hold no token; (?:"
    r"training\.row_length: (?P<row_length>\d+) \(or null\) would have (?P<then>\S+)|"
    r"no row length does better for the work it costs: (?P<reason>.*))"
)


@pytest.fixture
def layout_of(load, tmp_path, monkeypatch, caplog):
    """(lengths of the texts of some batches, `training` options) → the layout, and the warning of its density."""
    config = load()
    examples = read_sources(config.data.train, config.data)
    tokenizer = prepare_tokenizer(config, examples, tmp_path)

    def prepared(lengths, devices=1, dim=64, **options):
        monkeypatch.setattr(prepare, "sample_lengths", lambda *_: lengths)
        changed = load(training={"batch_size": 8, "steps": 6, **options})
        caplog.clear()
        mesh = make_mesh(devices, 1, 1, jax.devices()[:devices])
        layout = prepare_batches(changed, examples, tokenizer, mesh, dim).layout
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        return layout, [SPARSE.fullmatch(line) for line in warnings]

    return prepared


def random_lengths(count, low, high):
    random = np.random.default_rng(0)
    return [random.integers(low, high, count) for _ in range(5)]


def test_of_rows_that_are_too_long_it_says_which_length_does_better(layout_of):
    lengths = random_lengths(128, 5, 60)
    layout, (told,) = layout_of(lengths, row_length=1024, chunk_rows=4)
    assert layout.density == pytest.approx(float(told[1]), abs=0.006)
    assert layout.density < 0.85
    better, warnings = layout_of(lengths, row_length=int(told["row_length"]), chunk_rows=4)
    assert better.density == pytest.approx(float(told["then"]), abs=0.006)
    assert better.density > 0.85
    assert not warnings
    chosen, _ = layout_of(lengths, chunk_rows=4)
    assert chosen == better, "null chooses it"


def test_of_too_few_rows_it_says_what_would_fill_them(layout_of):
    lengths = random_lengths(128, 5, 60)
    layout, (told,) = layout_of(lengths, devices=8, row_length=64, chunk_rows=32)
    assert layout.density < 0.4
    said = re.fullmatch(
        r"a batch needs too few rows for 8 device\(s\) × 32 at once; training\.chunk_rows: (\d+) would have (\S+), "
        "a larger training.batch_size or fewer devices would fill those 256",
        told["reason"],
    )
    assert said
    better, warnings = layout_of(lengths, devices=8, row_length=64, chunk_rows=int(said[1]))
    assert better.density == pytest.approx(float(said[2]), abs=0.006)
    assert better.density > 0.85
    assert not warnings
    _, (told,) = layout_of(random_lengths(8, 5, 60), devices=8, chunk_rows=1)
    assert told["reason"].endswith("for 8 device(s) × 1 at once; a larger training.batch_size or fewer devices "
                                   "would fill those 8")  # fmt: skip


def test_of_texts_that_do_not_fill_rows_it_says_so(layout_of):
    layout, (told,) = layout_of([np.full(2000, 33)] * 3, dim=16)
    assert layout.row_length == 48
    assert told["reason"] == f"they fill {33 / 48:.0%} of the rows they need"


def test_of_dense_rows_it_says_nothing(layout_of):
    layout, warnings = layout_of(random_lengths(128, 5, 60))
    assert layout.density > 0.85
    assert not warnings


def read_back(fields, place):
    """The ids of the text whose embedding is the gathered one at that place."""
    slots = fields["last"].shape[-1]
    row, slot = divmod(int(fields["pick"][place]), slots)
    tokens, segments, last = (
        fields[name].reshape(-1, fields[name].shape[-1]) for name in ("tokens", "segments", "last")
    )
    end = int(last[row, slot])
    inside = segments[row] == segments[row, end]
    assert np.flatnonzero(inside)[-1] == end
    return tokens[row][inside].tolist()
