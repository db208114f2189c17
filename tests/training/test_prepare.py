import json
import logging
import re
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxembed.config import load_config
from jaxembed.errors import InputError
from jaxembed.sharding import make_mesh
from jaxembed.text.format import DEFAULT_TEXT_FORMAT, TEXT_FORMAT_FILE
from jaxembed.text.tokenizer import TextTokenizer
from jaxembed.training import prepare
from jaxembed.training.prepare import (
    configured_format,
    prepare_batches,
    prepare_decoder,
    prepare_tokenizer,
    read_sources,
)

from runs import SHAPE, Workshop, make_rows, quick_compilation, write_jsonl  # noqa: F401 (a fixture)

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


def test_sources_are_read_in_order_with_a_line_of_counts_each(workshop, load, caplog):
    rows = make_rows(5, seed=3)
    rows[1]["anchor"] = ""
    path = write_jsonl(workshop.folder / "few.jsonl", rows)
    path.write_text(path.read_text() + "not json\n")
    (workshop.folder / "code").mkdir()
    (workshop.folder / "code" / "m.py").write_text(
        'def add(a, b):\n    """Return the sum of two numbers."""\n    c = a + b\n    return c\n'
    )
    sources = [
        {"kind": "jsonl", "name": "few", "path": str(path), "negatives": ["hard"]},
        {"kind": "python", "name": "code", "path": str(workshop.folder / "code"), "part": "all"},
    ]
    config = load(data={"train": sources, "bad_rows": "skip"})
    with caplog.at_level(logging.INFO):
        few, code = read_sources(config.data.train, config.data)
    assert (len(few), few.negatives[0], few.dropped) == (4, (rows[0]["hard"],), {"empty text": 1, "bad row": 1})
    assert code.anchors == ["Return the sum of two numbers."]
    assert "few: 4 pairs kept, 2 dropped (1 empty text, 1 bad row)" in caplog.messages
    assert "code: 1 pair kept, 0 dropped" in caplog.messages
    with pytest.raises(InputError, match=r"few\.jsonl:6: not JSON"):
        read_sources(config.data.train, load().data)


def test_every_kind_of_source_is_read(workshop, load, tmp_path, caplog):
    (tmp_path / "marco" / "qrels").mkdir(parents=True)
    corpus = [{"_id": "d1", "title": "", "text": "one"}, {"_id": "d2", "title": "", "text": "two"}]
    write_jsonl(tmp_path / "marco" / "corpus.jsonl", corpus)
    write_jsonl(tmp_path / "marco" / "queries.jsonl", [{"_id": "q1", "text": "which?"}])
    (tmp_path / "marco" / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    write_jsonl(tmp_path / "mined.jsonl", [{"qid": "q1", "neg": ["d2"]}])
    write_jsonl(
        tmp_path / "ids.jsonl",
        [{"query_id": "1", "query_text": "which?", "positive_document_ids": ["d2"], "negative_document_ids": ["d1"]}],
    )
    write_jsonl(tmp_path / "graded.jsonl", [{"a": "x", "b": "y", "g": 3}])
    labelled = [{"text": f"text {n}", "label": n % 2} for n in range(6)]
    write_jsonl(tmp_path / "labelled.jsonl", labelled)
    sources = [
        {"kind": "beir", "name": "marco", "path": str(tmp_path / "marco"), "split": "dev",
         "mined": str(tmp_path / "mined.jsonl")},
        {"kind": "jsonl", "name": "ids", "path": str(tmp_path / "ids.jsonl"), "corpus": str(tmp_path / "marco")},
        {"kind": "jsonl", "name": "graded", "path": str(tmp_path / "graded.jsonl"), "anchor": "a", "positive": "b",
         "score": "g"},
        {"kind": "jsonl", "name": "labelled", "path": str(tmp_path / "labelled.jsonl"), "label_negatives": 2},
    ]  # fmt: skip
    config = load(data={"train": sources, "cache_dir": str(tmp_path / "cache")})
    with caplog.at_level(logging.INFO):
        marco, ids, graded, labels = read_sources(config.data.train, config.data)
    assert (marco.anchors[0], marco.positives[0], list(marco.negatives[0])) == ("which?", "one", ["two"])
    assert (ids.anchors[0], ids.positives[0], list(ids.negatives[0])) == ("which?", "two", ["one"])
    assert graded.scores.tolist() == [[3.0]]
    assert labels.negative_counts.tolist() == [2] * 6
    for line in (
        "marco: BEIR (1 negative a query), 1 pair kept, 0 dropped",
        "ids: tevatron with document ids (1 negative a query), 1 pair kept, 0 dropped",
        "labelled: labelled texts (2 negatives a query), 6 pairs kept, 0 dropped",
    ):
        assert line in caplog.messages
    # Both name the corpus by its content, and find it on the disk once.
    assert len(list((tmp_path / "cache" / "stores").iterdir())) == 2


def test_the_configured_format_says_all_that_the_config_does(load):
    assert configured_format(load()) is None
    section = {
        "query": {"prefix": "[Q]", "suffix": "[E]", "instruction": "find "},
        "document": {"prefix": "[D]", "suffix": "[E]"},
        "max_length": 77,
        "normalize": False,
        "literal_markers": "text",
    }
    found = configured_format(load(text_format=section))
    assert found is not None
    values = json.loads(json.dumps(found.to_dict()))
    assert values["query"] == section["query"]
    assert values["document"] == {**section["document"], "instruction": ""}
    assert all(values[key] == section[key] for key in ("max_length", "normalize", "literal_markers"))


def test_a_tokenizer_is_trained_on_the_training_texts(workshop, load, tmp_path):
    config = load(model=SCRATCH, tokenizer={"train_vocab_size": 300})
    examples = read_sources(config.data.train, config.data)
    trained = prepare_tokenizer(config, examples, tmp_path / "run")
    assert trained.vocab_size == 300
    assert trained.text_format == DEFAULT_TEXT_FORMAT
    ids = trained(examples[0].positives, "document")
    assert max(map(max, ids)) >= 260, "no merge of letters that are frequent there"
    saved = TextTokenizer.from_directory(tmp_path / "run")
    assert saved.fingerprint == trained.fingerprint
    assert saved.special_tokens == trained.special_tokens


def test_a_resumed_run_has_the_tokenizer_of_its_beginning_and_a_new_run_its_own(workshop, load, tmp_path):
    config = load(model=SCRATCH, tokenizer={"train_vocab_size": 300})
    examples = read_sources(config.data.train, config.data)
    first = prepare_tokenizer(config, examples, tmp_path)
    other = load(model=SCRATCH, tokenizer={"train_vocab_size": 320}, text_format={"max_length": 20})
    resumed = prepare_tokenizer(other, examples, tmp_path, resume=True)
    assert resumed.fingerprint == first.fingerprint
    begun = prepare_tokenizer(other, examples, tmp_path)  # such as after a run that was refused
    assert (begun.vocab_size, begun.text_format.max_length) == (320, 20)


def test_a_given_tokenizer(workshop, load, tmp_path):
    expected = TextTokenizer.from_directory(workshop.base)
    for number, path in enumerate((workshop.base, workshop.base / "tokenizer.json")):
        config = load(model=SCRATCH, tokenizer={"path": str(path)})
        assert prepare_tokenizer(config, [], tmp_path / str(number)).fingerprint == expected.fingerprint


def test_a_models_tokenizer_has_its_own_format_unless_another_is_given(workshop, load, tmp_path, caplog):
    base = shutil.copytree(workshop.base, tmp_path / "base")
    own = prepare_tokenizer(load("--model.path", base), [], tmp_path / "own")
    assert own.fingerprint == TextTokenizer.from_directory(base).fingerprint
    given = prepare_tokenizer(load("--model.path", base, "--text_format.max_length", 30), [], tmp_path / "given")
    assert given.text_format.max_length == 30
    (base / TEXT_FORMAT_FILE).unlink()
    with caplog.at_level(logging.INFO):
        default = prepare_tokenizer(load("--model.path", base), [], tmp_path / "default")
    assert default.text_format == DEFAULT_TEXT_FORMAT
    assert "using the default text format" in caplog.text


def test_a_tokenizer_without_end_token_gets_one(workshop, load, tmp_path, caplog):
    base = shutil.copytree(workshop.base, tmp_path / "base")
    raw = json.loads((base / "tokenizer.json").read_text())
    assert raw["post_processor"] is not None
    (base / "tokenizer.json").write_text(json.dumps(raw | {"post_processor": None}))
    with caplog.at_level(logging.INFO):
        tokenizer = prepare_tokenizer(load("--model.path", base), [], tmp_path / "run")
    assert "every text will end with </s>" in caplog.text
    assert tokenizer(["a text"], "query")[0][-1] == tokenizer.tokenizer.token_to_id("</s>")
    again = prepare_tokenizer(load("--model.path", base), [], tmp_path / "run", resume=True)
    assert again.fingerprint == tokenizer.fingerprint


def test_special_tokens_outlive_a_resumption(workshop, load, tmp_path):
    base = shutil.copytree(workshop.base, tmp_path / "base")
    (base / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<unk>", "eos_token": "</s>"}))
    begun = prepare_tokenizer(load("--model.path", base), [], tmp_path / "run")
    resumed = prepare_tokenizer(load("--model.path", base), [], tmp_path / "run", resume=True)
    assert begun.pad_id == resumed.pad_id == 0
    assert resumed.special_tokens == begun.special_tokens == {"pad_token": "<unk>", "eos_token": "</s>"}


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
