"""The texts of a run: every kind of source, tokenizers from everywhere, the options of a source."""

import json
import logging
import shutil

import pytest

from jaxembed.config import load_config
from jaxembed.errors import InputError
from jaxembed.text.format import DEFAULT_TEXT_FORMAT, TEXT_FORMAT_FILE
from jaxembed.text.tokenizer import TextTokenizer
from jaxembed.training.texts import configured_format, prepare_texts, prepare_tokenizer, read_sources

from runs import Workshop, make_rows, write_jsonl

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCRATCH = {"scratch": {"layers": 2, "dim": 16, "heads": 2}}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop"))


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


def test_markers_that_a_tokenizer_lacks_become_its_next_tokens(workshop, load, tmp_path, caplog):
    spare = tmp_path / "spare"
    shutil.copytree(workshop.base, spare)
    (spare / TEXT_FORMAT_FILE).unlink()
    config = json.loads((spare / "config.json").read_text())
    markers = {"query": {"prefix": "[BOQ]", "suffix": "[EOQ]"}, "document": {"prefix": "[BOD]", "suffix": "[EOD]"}}
    with pytest.raises(InputError, match=r"264 rows, too few for 268 tokens.*no spare rows"):
        prepare_tokenizer(load(model={"path": str(spare)}, text_format=markers), [], tmp_path / "tokenizer")
    (spare / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with caplog.at_level(logging.INFO):
        found = prepare_tokenizer(load(model={"path": str(spare)}, text_format=markers), [], tmp_path / "tokenizer")
    assert "[BOQ] = 264, [EOQ] = 265, [BOD] = 266, [EOD] = 267" in caplog.text
    for role, begin, end in (("query", 264, 265), ("document", 266, 267)):
        [ids] = found(["some words"], role)
        assert (ids[0], ids[-1]) == (begin, end)
    again = prepare_tokenizer(load(model={"path": str(spare)}, text_format=markers), [], tmp_path / "tokenizer")
    assert again.fingerprint == found.fingerprint


def test_sources_with_options_of_their_own(workshop, load, tmp_path):
    rows = [{"anchor": f"a{n}", "positive": f"p{n}", "negative_1": f"x{n}", "negative_2": f"y{n}"} for n in range(4)]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    sources = [
        {"kind": "jsonl", "name": "one", "path": path, "query_instruction": "find ", "hard_negatives": 1},
        {"kind": "jsonl", "name": "two", "path": path, "symmetric": True},
    ]

    def load_with(*changes):
        merged = [source | change for source, change in zip(sources, [*changes, {}, {}])]
        return load(data={"train": merged, "cache_dir": str(tmp_path / "cache")})

    config = load_with()
    examples = read_sources(config.data.train, config.data)
    tokenizer = prepare_tokenizer(config, examples, tmp_path / "tokenizer")
    table, data_sets = prepare_texts(config, examples, tokenizer)
    decode = tokenizer.tokenizer.decode
    first, second = ([decode(table[text].tolist()) for text in found.texts[0] if text >= 0] for found in data_sets)
    assert first == ["query: find a0", "document: p0", "document: x0"]
    assert second == ["query: a0", "query: p0", "query: x0", "query: y0"]
    config = load_with({"hard_negatives": 3})
    with pytest.raises(InputError, match=r"data\.train\.0\.hard_negatives: 3 hard negatives a query, but one has 2"):
        prepare_texts(config, examples, tokenizer)
