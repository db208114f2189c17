"""Scores of a cross-encoder by id and by text, against a dict."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from jaxembed.errors import InputError
from jaxembed.mining import cross_scores
from jaxembed.mining.cross_scores import read_cross_scores
from jaxembed.mining.task import Collection, Task, make_task

DOCUMENTS = [f"text of {row}" for row in range(40)]
QUERIES = ["a", "b", "a", "c"]  # two ids with one text


@pytest.fixture
def task() -> Task:
    corpus = Collection([*DOCUMENTS, DOCUMENTS[3]], [str(100 + row) for row in range(41)])
    return make_task(
        Collection(QUERIES, ["q0", "q1", "q2", "q3"]),
        corpus,
        np.array([0, 1, 2, 3]),
        np.array([0, 1, 2, 3]),
        named=True,
    )


def by_id(task: Task) -> dict[tuple[int, int], float]:
    random = np.random.default_rng(0)
    pairs = random.integers(0, [4, 40], (60, 2))
    return {(int(query), int(row)): round(float(random.standard_normal()), 3) for query, row in pairs}


def check(found: cross_scores.CrossScores, expected: dict[tuple[int, int], float]) -> None:
    grid = found.of(np.arange(4)[:, None], np.arange(40)[None])
    for query in range(4):
        for row in range(40):
            value = expected.get((query, row), np.nan)
            np.testing.assert_array_equal(grid[query, row], np.float32(value).astype(float))
    assert np.isnan(found.of(np.array([1]), np.array([-1]))).all()


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "tsv"])
@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_by_id(tmp_path: Path, task: Task, kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_scores, "_AT_ONCE", at_once)
    expected = by_id(task)
    rows = [{"qid": f"q{query}", "pid": 100 + row, "score": score} for (query, row), score in expected.items()]
    rows.insert(3, {"qid": "stranger", "pid": 100, "score": 1.0})
    rows.insert(9, {"qid": "q1", "pid": 999, "score": 1.0})
    rows.insert(0, rows[-1] | {"score": -77.0})  # the later one counts
    if kind == "tsv":
        text = "qid\tpid\tscore\n" + "".join(f"{row['qid']}\t{row['pid']}\t{row['score']}\n" for row in rows)
    else:
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
    file = tmp_path / f"scores.{kind}"
    file.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    check(read_cross_scores(file, task), expected)


def test_by_text_and_by_another_id_of_a_text(tmp_path: Path, task: Task) -> None:
    file = tmp_path / "scores.jsonl"
    row = {"query": "a", "document": DOCUMENTS[5], "score": 0.5}
    file.write_text(json.dumps(row) + "\n")
    check(read_cross_scores(file, task), {(0, 5): 0.5, (2, 5): 0.5})
    file.write_text(json.dumps({"qid": "q1", "pid": "140", "score": 2}) + "\n")  # the id of a text that repeats 103's
    check(read_cross_scores(file, task), {(1, 3): 2.0})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"qid": "q1", "pid": "101"}', ":2: no column 'score'"),
        ('{"qid": "q1", "pid": "101", "score": "high"}', ":2: column 'score': expected a finite number, found 'high'"),
        ('{"qid": "q1", "score": 1}', ":2: no column 'pid'"),
        ('{"qid": null, "pid": "101", "score": 1}', ":2: column 'qid': expected a string"),
        ("{", ":2: not JSON"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, task: Task, row: str, message: str) -> None:
    file = tmp_path / "scores.jsonl"
    file.write_text('{"qid": "q0", "pid": "100", "score": 1.5}\n' + row + "\n")
    with pytest.raises(InputError, match=f"scores.jsonl{message}"):
        read_cross_scores(file, task)


def test_files_of_no_use(tmp_path: Path, task: Task) -> None:
    file = tmp_path / "scores.jsonl"
    file.write_text('{"qid": "x", "pid": "100", "score": 1.5}\n')
    with pytest.raises(InputError, match="none of its 1 scores is of a query and a document"):
        read_cross_scores(file, task)
    file.write_text('{"who": "x", "pid": "100", "score": 1.5}\n')
    with pytest.raises(InputError, match=r"scores.jsonl:1: expected a column out of 'qid'"):
        read_cross_scores(file, task)
