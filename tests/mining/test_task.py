"""From pairs and a corpus to a task: against sets of texts."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.errors import InputError
from jaxembed.mining.inputs import read_task
from jaxembed.mining.task import Collection, make_task

words = st.sampled_from(["a", "b", "c", "d", "e", "f"])


@settings(max_examples=200, deadline=None)
@given(
    corpus=st.lists(words, min_size=1, max_size=12),
    queries=st.lists(words | st.sampled_from(["x", "y"]), min_size=1, max_size=6),
    data=st.data(),
)
def test_what_is_left_out_of_what(corpus: list[str], queries: list[str], data: st.DataObject) -> None:
    place = st.integers(0, len(corpus) - 1)
    positives = [data.draw(st.lists(place, min_size=1, max_size=4)) for _ in queries]
    candidates = data.draw(st.integers(1, len(corpus)))
    query_of = np.repeat(np.arange(len(queries)), [len(some) for some in positives])
    order = data.draw(st.permutations(range(len(query_of))))
    task = make_task(
        Collection(queries, [f"q{row}" for row in range(len(queries))]),
        Collection(corpus, [f"p{row}" for row in range(len(corpus))]),
        query_of[order],
        np.concatenate(positives)[order],
        candidates=candidates,
    )
    documents = list(task.documents)
    assert documents == list(dict.fromkeys(corpus))
    assert list(task.document_ids) == [f"p{corpus.index(text)}" for text in documents]
    assert set(documents[: task.candidates]) == set(corpus[:candidates])
    assert task.repeated == candidates - task.candidates
    for query, text in enumerate(queries):
        mine = [corpus[place] for place in np.concatenate(positives)[order][query_of[order] == query]]
        assert [documents[row] for row in task.positives[query]] == list(dict.fromkeys(mine))
        answers = {corpus[place] for other, some in zip(queries, positives) if other == text for place in some}
        expected = answers | ({text} & set(corpus))
        assert {documents[row] for row in task.left_out[query]} == expected
        assert (np.diff(task.left_out[query]) > 0).all()
    ids = [f"p{row}" for row in range(len(corpus))]
    assert [documents[row] for row in task.rows_of(ids)] == corpus
    assert task.rows_of(["nobody"]).tolist() == [-1]


def test_fingerprints_change_with_texts_and_order() -> None:
    def fingerprints(queries: list[str], corpus: list[str]) -> tuple[str, str]:
        task = make_task(Collection(queries, queries), Collection(corpus, corpus), np.array([0, 1]), np.array([0, 1]))
        return task.queries_fingerprint, task.documents_fingerprint

    first = fingerprints(["a", "b"], ["c", "d", "e"])
    assert fingerprints(["a", "b"], ["c", "d", "e"]) == first
    assert fingerprints(["b", "a"], ["c", "d", "e"])[0] != first[0]
    assert fingerprints(["a", "b"], ["c", "d", "f"])[1] != first[1]
    assert fingerprints(["a", "b"], ["c", "e", "d"])[1] != first[1]


def rows(path: Path, *values: dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))
    return path


PAIRS = (
    {"anchor": "q1", "positive": "d1", "negative": "d9"},
    {"anchor": "q2", "positive": "d2", "negative": "d1"},
    {"anchor": "q1", "positive": "d3", "negative": "d9"},
)


def beir(folder: Path, qrels: str = "q1\tp1\t1\nq2\tp2\t1\nq1\tp3\t2\nq2\tp3\t0\n") -> Path:
    rows(folder / "corpus.jsonl", *({"_id": f"p{i}", "title": "", "text": f"d{i}"} for i in (1, 2, 3, 4)),
         {"_id": "blank", "title": "", "text": " "}, {"_id": "again", "title": "", "text": "d4"})  # fmt: skip
    rows(folder / "queries.jsonl", *({"_id": f"q{i}", "text": f"q{i}"} for i in (1, 2, 3)))
    (folder / "qrels").mkdir()
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return folder


def test_pairs_alone(tmp_path: Path) -> None:
    task = read_task(rows(tmp_path / "pairs.jsonl", *PAIRS), None, tmp_path / "work")
    assert list(task.queries) == ["q1", "q2"]
    assert list(task.query_ids) == ["pairs.jsonl:1", "pairs.jsonl:2"]
    assert list(task.documents) == ["d1", "d2", "d3", "d9"]
    assert task.candidates == 4
    assert [found.tolist() for found in (task.positives[0], task.positives[1])] == [[0, 2], [1]]
    assert not task.named


def test_pairs_and_a_corpus(tmp_path: Path) -> None:
    corpus = rows(tmp_path / "corpus.jsonl", *({"id": i, "text": f"d{i}"} for i in (7, 3, 8)))
    task = read_task(rows(tmp_path / "pairs.jsonl", *PAIRS), corpus, tmp_path / "work")
    assert list(task.documents) == ["d7", "d3", "d8", "d1", "d2"]
    assert task.candidates == 3
    assert list(task.document_ids)[:3] == ["7", "3", "8"]
    assert task.positives[0].tolist() == [3, 1]
    assert task.rows_of(["3", "8", "d1"]).tolist() == [1, 2, -1]


def test_named_columns(tmp_path: Path) -> None:
    file = rows(tmp_path / "pairs.jsonl", {"x": "q", "y": "d", "z": "-"}, {"x": "p", "y": "e", "z": "-"})
    task = read_task(file, None, tmp_path / "work", anchor="x", positive="y")
    assert list(task.queries) == ["q", "p"]
    assert list(task.documents) == ["d", "e"]
    with pytest.raises(InputError, match="given together"):
        read_task(file, None, tmp_path / "work", anchor="x")


def test_a_beir_folder(tmp_path: Path) -> None:
    task = read_task(beir(tmp_path / "beir"), None, tmp_path / "work")
    assert list(task.queries) == ["q1", "q2"]
    assert list(task.query_ids) == ["q1", "q2"]
    assert list(task.documents) == ["d1", "d2", "d3", "d4"]
    assert list(task.document_ids) == ["p1", "p2", "p3", "p4"]
    assert task.candidates == 4
    assert task.repeated == 1
    assert [task.positives[query].tolist() for query in (0, 1)] == [[0, 2], [1]]
    assert task.named
    assert task.rows_of(["again", "p4", "blank", "?"]).tolist() == [3, 3, -1, -1]


def test_rows_with_document_ids(tmp_path: Path) -> None:
    corpus = beir(tmp_path / "beir") / "corpus.jsonl"
    row = {"query_text": "q", "positive_document_ids": ["p2"], "negative_document_ids": ["p1"]}
    task = read_task(rows(tmp_path / "ids.jsonl", row), corpus, tmp_path / "work")
    assert [task.documents[row] for row in task.positives[0]] == ["d2"]
    assert task.candidates == 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"anchor": "q1"}, r"pairs.jsonl:2: no column 'positive'"),
        ({"anchor": "q1", "positive": 3}, r"pairs.jsonl:2: column 'positive': expected a string, found a number"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, object], message: str) -> None:
    file = rows(tmp_path / "pairs.jsonl", {"anchor": "q", "positive": "d"}, row)
    with pytest.raises(InputError, match=message):
        read_task(file, None, tmp_path / "work")


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train.tsv:5: no document has the id 'p7'"):
        read_task(beir(tmp_path / "a", "q1\tp1\t1\nq2\tp2\t1\nq1\tp3\t2\nq2\tp7\t1\n"), None, tmp_path / "work")
    with pytest.raises(InputError, match="test"):
        read_task(beir(tmp_path / "b"), None, tmp_path / "work", split="test")
    graded = rows(tmp_path / "graded.jsonl", {"s1": "a", "s2": "b", "score": 3.5}, {"s1": "c", "s2": "b", "score": 1})
    with pytest.raises(InputError, match="graded pairs have no positives"):
        read_task(graded, None, tmp_path / "work")
    with pytest.raises(InputError, match=r"no such file|expected"):
        read_task(tmp_path / "pairs.jsonl", None, tmp_path / "work")
