"""Local tasks from files: what is recognised, and what is wrong with a file said or counted."""

import gzip
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxembed.errors import InputError
from jaxembed.evaluation.task_reader import parse_task, read_task
from jaxembed.evaluation.tasks import (
    BitextTask,
    ClassificationTask,
    ClusteringTask,
    LocalTask,
    PairTask,
    RerankingTask,
    RetrievalTask,
    StsTask,
)

Rows = Sequence[dict[str, Any]]
CORPUS = [{"_id": "d1", "title": "T", "text": " one "}, {"_id": "d2", "title": "", "text": "two"}]
QUERIES = [{"_id": "q1", "text": "first"}, {"_id": "q2", "text": "second"}, {"_id": "q3", "text": "of no split"}]
QRELS = [("q1", "d1", 2), ("q1", "d2", 0), ("q2", "d2", 1)]


def jsonl(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def beir(
    path: Path, qrels: Sequence[tuple[str, str, Any]] = QRELS, queries: Rows = QUERIES, split: str = "test"
) -> Path:
    jsonl(path / "corpus.jsonl.gz", CORPUS)
    jsonl(path / "queries.jsonl", queries)
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in qrels)]
    (path / "qrels").mkdir(exist_ok=True)
    (path / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return path


def test_a_beir_folder(tmp_path: Path) -> None:
    task = read_task(beir(tmp_path / "nq"), instruction="find ", language="deu-Latn")
    assert task == RetrievalTask(
        "nq",
        {"q1": "first", "q2": "second"},
        {"d1": "T  one", "d2": "two"},
        {"q1": {"d1": 2}, "q2": {"d2": 1}},
        instruction="find ",
        language="deu-Latn",
    )
    beir(tmp_path / "nq", [("q3", "d1", 1)], split="dev")
    assert list(read_task(tmp_path / "nq", split="dev", name="x").queries) == ["q3"]
    assert list(read_task(tmp_path / "nq").queries) == ["q1", "q2"]


def test_files_as_ms_marco_has_them(tmp_path: Path) -> None:
    (tmp_path / "collection.tsv").write_text("7\tone\n8\ttwo\n")
    (tmp_path / "queries.train.tsv").write_text("1\tfirst\n")
    (tmp_path / "queries.dev.tsv").write_text("2\tsecond\n")
    (tmp_path / "qrels.dev.tsv").write_text("2\t0\t8\t1\n")
    task = read_task(tmp_path, name="t")
    assert task == RetrievalTask("t", {"2": "second"}, {"7": "one", "8": "two"}, {"2": {"8": 1}})


def test_queries_that_name_their_documents(tmp_path: Path) -> None:
    jsonl(tmp_path / "de.corpus.jsonl", CORPUS)
    queries = [{"_id": 1, "text": "a", "relevant": "d2"}, {"_id": 2, "text": "b", "relevant": ["d1", "d2"]}]
    file = jsonl(tmp_path / "de.queries.jsonl", queries)
    for task in (read_task(file), read_task(tmp_path)):
        assert isinstance(task, RetrievalTask)
        assert task.relevant == {"1": {"d2": 1}, "2": {"d1": 1, "d2": 1}}
        assert task.corpus == {"d1": "T  one", "d2": "two"}
    jsonl(file, [*queries, {"_id": 3, "text": "c", "relevant": []}])
    assert read_task(file).notes == ("judged queries without a relevant document, left out: 1",)
    jsonl(tmp_path / "fr.corpus.jsonl", CORPUS)
    with pytest.raises(InputError, match=r"several files of corpus: de\.corpus\.jsonl, fr\.corpus\.jsonl; choose one"):
        read_task(tmp_path)
    (tmp_path / "de.corpus.jsonl").unlink()
    with pytest.raises(InputError, match=r"there is no de\.corpus\.jsonl beside it; give corpus"):
        read_task(file)


GRADED = [("a", "b", 1.5), ("c", "d", 0)]
LABELLED = [{"text": "x", "label": "l", "topic": 1}, {"text": "y", "label": "m", "topic": 2}]
RECOGNISED: list[tuple[str | None, Rows, LocalTask]] = [
    (None, [{"s1": a, "s2": b, "score": s} for a, b, s in GRADED], StsTask("t", ["a", "c"], ["b", "d"], [1.5, 0.0])),
    (None, [{"query": a, "code": b, "label": b == "b"} for a, b, _ in GRADED], PairTask("t", [*"ac"], [*"bd"], [1, 0])),
    ("sts", [{"s1": a, "s2": b, "label": b == "b"} for a, b, _ in GRADED], StsTask("t", [*"ac"], [*"bd"], [1.0, 0.0])),
    (
        None,
        [{"premise": "a", "hypothesis": "b", "label": x} for x in ("entailment", "neutral", "contradiction")],
        PairTask("t", ["a", "a"], ["b", "b"], [1, 0], notes=("neutral pairs, and those without a label, left out: 1",)),
    ),
    ("clustering", LABELLED, ClusteringTask("t", ["x", "y"], ["l", "m"])),
    (None, [{"src": "a", "tgt": "b", "lang": "da"}], BitextTask("t", ["a"], ["b"])),
    (
        None,
        [{"query": "a", "docs": ["x", "y"], "labels": [0, 1]}, {"query": "b", "docs": ["x"], "labels": [1]}],
        RerankingTask(
            "t", ["a"], [["x", "y"]], [[0, 1]],
            notes=("lists whose candidates are all relevant, or none of them, left out: 1",),
        ),
    ),
    (
        None,
        [{"query": "a", "positive": ["x"], "negative": ["y", "z"]}],
        RerankingTask("t", ["a"], [["x", "y", "z"]], [[1, 0, 0]]),
    ),
    (
        None,
        [{"query": "a", "answer": "x"}, {"query": "b", "answer": "y"}, {"query": "a", "answer": "y"}],
        RetrievalTask("t", {"q0": "a", "q1": "b"}, {"d0": "x", "d1": "y"}, {"q0": {"d0": 1, "d1": 1}, "q1": {"d1": 1}}),
    ),
    ("bitext", [{"title": "a", "abstract": "b"}], BitextTask("t", ["a"], ["b"])),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "rows", "expected"), RECOGNISED)
def test_files_are_recognised_by_their_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str | None, rows: Rows, expected: LocalTask
) -> None:
    task = read_task(jsonl(tmp_path / "t.jsonl.gz", rows), kind, "t")
    assert task == expected
    assert [message for message in caplog.messages if message.startswith("t: ")] == [
        f"t: {note}" for note in task.notes
    ]


def test_some_rows_of_a_file(tmp_path: Path) -> None:
    rows = [{"src": x, "tgt": f"{x} {y}", "lang": y} for x in "ab" for y in ("da", "no")]
    task = read_task(jsonl(tmp_path / "t.jsonl", rows), only="lang=no", name="t")
    assert task == BitextTask("t", ["a", "b"], ["a no", "b no"])


def test_the_first_row_that_is_meant_says_what_a_file_is(tmp_path: Path) -> None:
    rows = [{"lang": "en", "s1": "a", "s2": "b", "score": 1}, {"src": "a"}, {"src": "a", "tgt": "b", "lang": "da"}]
    file = jsonl(tmp_path / "t.jsonl", rows)
    notes = ("rows that could not be used, left out: 1",)
    assert read_task(file, name="t", only="lang=da", bad_rows="skip") == BitextTask("t", ["a"], ["b"], notes=notes)


def test_labelled_texts_to_learn_from_and_to_be_tested_on(tmp_path: Path) -> None:
    train, test = (
        jsonl(tmp_path / "a.jsonl", LABELLED),
        jsonl(tmp_path / "b.jsonl", [*LABELLED, {"text": "z", "label": "n"}]),
    )
    task = read_task(test, train=train)
    assert isinstance(task, ClassificationTask)
    assert (task.train_texts, task.train_labels) == (["x", "y"], ["l", "m"])
    assert (task.test_texts, task.test_labels) == (["x", "y", "z"], ["l", "m", "n"])
    assert task.notes == (
        "texts to be tested on that are among those to learn from, kept: 2",
        "texts to be tested on whose label no text to learn from has, kept: 1",
    )
    by_topic = read_task(train, train=train, label="topic")
    assert isinstance(by_topic, ClassificationTask)
    assert by_topic.test_labels == ["1", "2"]


def test_code_search_is_dealt_as_in_codesearchnet(tmp_path: Path) -> None:
    """Its repository: np.random.seed(0), a shuffle, chunks, the short one dropped."""
    rows = [{"docstring": f"q{n}", "code": f"c{n}"} for n in range(2300)]
    task = read_task(jsonl(tmp_path / "pairs.jsonl", rows), "code_search", "t")
    assert isinstance(task, RetrievalTask)
    order = np.arange(2300)
    np.random.seed(0)  # noqa: NPY002 (as their script does)
    np.random.shuffle(order)  # noqa: NPY002 (the same)
    assert [list(map(int, group)) for group in task.groups] == [order[:1000].tolist(), order[1000:2000].tolist()]
    assert task.notes == ("pairs of the last chunk, which is too short, left out: 300",)
    one = task.groups[1][7]
    assert (task.queries[one], task.corpus[one], task.relevant[one]) == (f"q{one}", f"c{one}", {one: 1})
    assert len(task.queries) == 2000
    few = read_task(jsonl(tmp_path / "few.jsonl", rows[:30]), "code_search", "t")
    assert [len(group) for group in few.groups] == [30]
    assert few.notes == ("pairs, fewer than 1,000, so that there are fewer distractors than 999: 30",)


WRONG: list[tuple[Rows, dict[str, Any], str]] = [
    ([{"src": "a", "tgt": "b"}, {"src": "a"}], {}, r"t\.jsonl:2: no column 'tgt'; .* bad_rows: skip"),
    ([{"s1": "a", "s2": "b", "score": 2}] * 2, {}, "all pairs have the grade 2"),
    ([{"s1": "a", "s2": "b", "score": 2}], {}, "expected 2 rows at least, found 1"),
    ([{"s1": "a", "s2": "b", "label": 3}], {"kind": "pairs"}, r"t\.jsonl:1: expected a label of 0 or 1, found 3"),
    (LABELLED, {}, "a classification task .give train=FILE"),
    (LABELLED, {"kind": "classification"}, "give train=FILE"),
    (LABELLED, {"kind": "bitext"}, "expected pairs, found labelled texts"),
    (LABELLED[:1], {"kind": "clustering"}, "expected two labels at least, found 'l' alone"),
    (LABELLED, {"kind": "cluster"}, "no kind 'cluster'; there are retrieval, code_search"),
    ([{"query": "a", "docs": ["x"], "labels": [1, 0]}], {}, r"t\.jsonl:1: column 'docs': expected a list of 2 texts"),
    ([{"query": "a", "docs": ["x"], "labels": [-1]}], {}, r"column 'labels'\[0\]: expected a whole number from 0 on"),
    ([{"src": "a", "tgt": "b"}], {"only": "lang=da"}, r"t\.jsonl:1: no column 'lang'"),
    ([{"src": "a", "tgt": "b"}], {"only": "src=x"}, "no row with src=x that can be read"),
    ([{"src": "a", "tgt": "b"}], {"only": "lang"}, "only: expected COLUMN=VALUE"),
    ([{"src": "a", "tgt": "b"}], {"anchor": "src"}, "anchor and positive go together"),
    ([{"src": "a", "tgt": "b"}], {"score": "tgt"}, "score only with them"),
    ([{"src": "a", "tgt": "b"}], {"format": "x"}, "no format 'x'; there are sentence-transformers"),
    ([{"src": " ", "tgt": "b"}], {}, "found 0 .*; rows with an empty text, left out: 1"),
    ([{"one": "a", "two": "b"}], {}, "those of no known format"),
    ([], {}, "no row that can be read"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "options", "message"), WRONG)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, rows: Rows, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_task(jsonl(tmp_path / "t.jsonl", rows), **options)


OPTIONS = ("train", "split", "corpus", "queries", "qrels", "anchor", "positive", "score", "text", "label", "format")


def test_options_that_a_task_has_no_use_for(tmp_path: Path) -> None:
    folder = beir(tmp_path / "folder")
    named = tmp_path / "named"
    jsonl(named / "de.corpus.jsonl", CORPUS)
    queries = jsonl(named / "de.queries.jsonl", [{"_id": 1, "text": "a", "relevant": "d1", "lang": "de"}])
    labelled = jsonl(tmp_path / "labelled" / "train.jsonl", LABELLED)
    jsonl(tmp_path / "labelled" / "test.jsonl", LABELLED)
    pairs = jsonl(tmp_path / "t.jsonl", [{"s1": a, "s2": b, "score": s} for a, b, s in GRADED])
    lists = jsonl(tmp_path / "lists.jsonl", [{"query": "a", "docs": ["x", "y"], "labels": [0, 1]}])
    of_pairs: dict[str, Any] = {"anchor": "s1", "positive": "s2"}
    given: list[tuple[Path, str | None, dict[str, Any], str]] = [
        (folder, None, {}, "split corpus queries qrels"),
        (named, None, {"only": "lang=de"}, "split corpus queries qrels"),
        (queries, None, {"only": "lang=de"}, "corpus"),
        (tmp_path / "labelled", None, {"only": "topic=1"}, "train split text label corpus queries"),
        (labelled, "classification", {"train": labelled}, "train text label"),
        (labelled, "clustering", {}, "text label"),
        (pairs, "sts", of_pairs, "anchor positive score format"),
        (lists, None, {}, ""),
    ]
    for path, kind, options, taken in given:
        for option in sorted({*OPTIONS} - {*taken.split()}):
            with pytest.raises(InputError, match=rf"^{path}: {option}: no option of "):
                read_task(path, kind, **{**options, option: "nli"})
    with pytest.raises(InputError, match="only: no option of a folder of retrieval; there are split, corpus, queries,"):
        read_task(folder, only="lang=de")
    with pytest.raises(InputError, match="train, text: no option of pairs of texts; there are anchor,"):
        read_task(pairs, "sts", train=labelled, text="s1")
    with pytest.raises(InputError, match="format without them"):
        read_task(pairs, **of_pairs, format="nli")


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ([("q1", "d9", 1)], r"test\.tsv:2: no document has the id 'd9'.*bad_rows: skip"),
        ([("q9", "d1", 1)], r"test\.tsv:2: no query has the id 'q9'"),
        ([("q1", "d1", 0.5)], r"test\.tsv:2: expected a whole number as grade, found 0\.5"),
        ([("q1", "d1", "x")], r"test\.tsv:2: column 'score': expected a finite number"),
        ([("q1", "d1", 1), ("q1", "d1", 0)], r"test\.tsv:3: query 'q1', document 'd1' is judged twice: 1, then 0\."),
        ([("q1", "d1", 0), ("q1", "d1", 2)], r"test\.tsv:3: query 'q1', document 'd1' is judged twice: 0, then 2\."),
        ([("q1", "d1", 0)], r"no query with a relevant document .*: judged queries without .*, left out: 1"),
    ],
)
def test_what_is_wrong_with_judgements_is_said(
    tmp_path: Path, qrels: Sequence[tuple[str, str, Any]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_task(beir(tmp_path, qrels))


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    queries = [*QUERIES, {"_id": "q4", "text": " "}, {"_id": "q4", "text": "again"}, {"_id": "q5"}]
    qrels = [*QRELS, *QRELS, ("q1", "d9", 1), ("q4", "d1", 1), ("q3", "d1", 0), ("q1", "d1", 1)]
    folder = beir(tmp_path / "skip", qrels, queries)
    jsonl(folder / "corpus.jsonl", [*CORPUS, {"_id": "d3", "text": ""}])
    (folder / "corpus.jsonl.gz").unlink()
    task = read_task(folder, bad_rows="skip")
    assert isinstance(task, RetrievalTask)
    assert task.relevant == {"q1": {"d1": 2}, "q2": {"d2": 1}}
    assert list(task.corpus) == ["d1", "d2", "d3"]
    assert task.notes == (
        "documents with an empty text, kept: 1",
        "empty queries, left out: 1",
        "judged queries without a relevant document, left out: 1",
        "rows that could not be used, left out: 4",
    )
    assert caplog.messages == [f"skip: {'; '.join(task.notes)}"]


@pytest.mark.parametrize("missing", ["corpus.jsonl.gz", "queries.jsonl", "qrels/test.tsv"])
def test_missing_files_are_named(tmp_path: Path, missing: str) -> None:
    folder = beir(tmp_path)
    (folder / missing).unlink()
    with pytest.raises(InputError, match=f"^{folder}: no "):
        read_task(folder, "retrieval")
    with pytest.raises(InputError, match=f"^{folder}: no "):
        read_task(folder)
    if missing != "qrels/test.tsv":
        with pytest.raises(InputError, match="nowhere: no such file"):
            read_task(folder, "retrieval", **{missing.partition(".")[0]: tmp_path / "nowhere"})


def test_tasks_of_a_command_line(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "clinc" / "learn, then.jsonl", LABELLED)
    test = jsonl(tmp_path / "clinc" / "test.jsonl.gz", LABELLED)
    task = parse_task(f"classification:{test},train={train},instruction=Sort, then label: ,bad_rows=skip")
    assert isinstance(task, ClassificationTask)
    assert (task.name, task.instruction) == ("clinc-test", "Sort, then label: ")
    assert parse_task(f"clustering:{test}").type == "Clustering"
    colon = jsonl(tmp_path / "a:b.jsonl", [{"src": "a", "tgt": "b"}])
    assert parse_task(str(colon)).name == f"{tmp_path.name}-a_b"
    for argument, message in (
        (f"clusters:{test}", "no kind 'clusters'; there are retrieval, code_search"),
        (f"{test},limit=3", "the option 'limit' is none; there are name, train"),
        (f"{test},name=a,name=b", "the option 'name' twice"),
        (f"{tmp_path}/none", "none: no such file or folder"),
        ("", r"expected \[KIND:\]PATH"),
    ):
        with pytest.raises(InputError, match=message):
            parse_task(argument)


def test_tasks_are_read_without_torch_and_mteb() -> None:
    code = "import sys, jaxembed.evaluation.task_reader, jaxembed.evaluation.classification\n"
    code += "assert not {'torch', 'mteb', 'sklearn'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def arguana(path: Path, queries: Rows, qrels: Sequence[tuple[str, str, Any]]) -> Path:
    """A folder in which some queries are documents."""
    beir(path, qrels, queries)
    jsonl(path / "corpus.jsonl.gz", [{"_id": f"x{n}", "title": "T", "text": f"claim  {n}"} for n in range(4)])
    return path


@pytest.mark.parametrize(
    ("queries", "qrels", "themselves"),
    [
        ([("x0", "claim 0"), ("x1", "claim 1"), ("z", "claim 2")], [("x0", "x1"), ("x1", "x0"), ("z", "x2")], True),
        # Ids that are numbers of two lists; a query that is judged to answer itself; most texts are others.
        ([("x0", "other"), ("x1", "another")], [("x0", "x1"), ("x1", "x0")], False),
        ([("x0", "claim 0"), ("x1", "claim 1")], [("x0", "x0"), ("x1", "x0")], False),
        ([("x0", "claim 0"), ("x1", "another")], [("x0", "x1"), ("x1", "x0")], False),
        ([("z", "claim 2")], [("z", "x2")], False),
    ],
)
def test_queries_that_are_documents_too(
    tmp_path: Path, queries: list[tuple[str, str]], qrels: list[tuple[str, str]], themselves: bool
) -> None:
    rows = [{"_id": one, "text": text} for one, text in queries]
    task = read_task(arguana(tmp_path / "arguana", rows, [(*pair, 1) for pair in qrels]))
    assert isinstance(task, RetrievalTask)
    assert task.ignore_identical_ids is themselves
    noted = "queries that are documents too, by id and text, each left out of its own results: 2"
    assert task.notes == ((noted,) if themselves else ())


@pytest.mark.parametrize(("label", "text"), [(True, "true"), (2.0, "2"), (7, "7"), ("a b", "a b")])
def test_labels_as_files_have_them(tmp_path: Path, label: Any, text: str) -> None:
    file = jsonl(tmp_path / "c.jsonl", [{"text": "a", "label": label}, {"text": "b", "label": "other"}])
    task = read_task(file, "clustering")
    assert isinstance(task, ClusteringTask)
    assert task.labels == [text, "other"]
    jsonl(file, [{"query": "q", "docs": ["a", "b"], "labels": [1.0, 0.0]}])
    lists = read_task(file)
    assert isinstance(lists, RerankingTask)
    assert lists.labels == [[1, 0]]
    jsonl(file, [{"text": "a", "label": 0.5}, {"text": "b", "label": "other"}])
    with pytest.raises(InputError, match="column 'label': expected a string, found a number"):
        read_task(file, "clustering")
    jsonl(file, [{"query": "q", "docs": ["a", "b"], "labels": [0.5, 0.0]}])
    with pytest.raises(InputError, match=r"column 'labels'\[0\]: expected a whole number from 0 on, found 0\.5"):
        read_task(file)


def test_a_language_that_mteb_does_not_know(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"query": "a", "answer": "b"}])
    with pytest.raises(InputError, match="language: expected mteb's code, such as eng-Latn, found 'english'"):
        read_task(file, language="english")
