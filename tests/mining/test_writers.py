"""What is written in a format is read back by the reader of training data; a file is whole or not there."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from jaxembed.data.sources import read_rows
from jaxembed.errors import InputError
from jaxembed.mining.task import Collection, Ragged, make_task
from jaxembed.mining.writers import FORMATS, WITH_SCORES, Mined, check_output, write_mined

DOCUMENTS = ["d 0", "d 1", "d 2 'quoted' \"twice\"", "d 3 é\u2028\n", "d 4", "d 5"]


@pytest.fixture
def mined() -> Mined:
    """Two positives and two negatives, one and one, one and none."""
    task = make_task(
        Collection(["q 0", "q 1 ü", "q 2"], ["q0", "q1", "q2"]),
        Collection(DOCUMENTS, ["a", "b", "c", "d", "e", "f"]),
        np.array([0, 0, 1, 2]),
        np.array([1, 0, 2, 3]),
        named=True,
    )
    negatives = np.array([[4, 3], [5, -1], [-1, -1]])
    scores = np.array([[0.75, 0.5], [0.25, -np.inf], [-np.inf, -np.inf]], np.float32)
    return Mined(task, negatives, scores, Ragged(np.array([0.9, 0.8, 0.7, 0.6], np.float32), task.positives.offsets))


PAIRS = [("q 0", DOCUMENTS[1]), ("q 0", DOCUMENTS[0]), ("q 1 ü", DOCUMENTS[2]), ("q 2", DOCUMENTS[3])]
NEGATIVES = [(DOCUMENTS[4], DOCUMENTS[3])] * 2 + [(DOCUMENTS[5],), ()]
SCORES = [[0.9, 0.75, 0.5], [0.8, 0.75, 0.5], [0.7, 0.25, np.nan], [0.6, np.nan, np.nan]]


@pytest.mark.parametrize("to", [name for name in FORMATS if name != "beir"])
@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_what_is_written_is_read_back(tmp_path: Path, mined: Mined, to: str, name: str) -> None:
    file = tmp_path / name
    write_mined(file, mined, to, progress=False)
    found = read_rows(file, name="back")
    assert found.recognised
    assert list(zip(found.anchors, found.positives)) == PAIRS
    assert [tuple(negatives) for negatives in found.negatives] == NEGATIVES
    assert found.scores is None
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("to", ["sentence-transformers", "flagembedding"])
def test_scores_are_read_back(tmp_path: Path, mined: Mined, to: str) -> None:
    write_mined(tmp_path / "out.jsonl", mined, to, scores=True, progress=False)
    found = read_rows(tmp_path / "out.jsonl", name="back")
    assert found.scores is not None
    np.testing.assert_allclose(found.scores, SCORES, atol=1e-6)


def test_tevatron_has_ids_and_scores(tmp_path: Path, mined: Mined) -> None:
    write_mined(tmp_path / "out.jsonl", mined, "tevatron", scores=True, progress=False)
    row = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert row["query_id"] == "q0"
    assert row["negative_passages"][0] == {"docid": "e", "title": "", "text": "d 4", "score": 0.75}


def test_beir_names_ids(tmp_path: Path, mined: Mined) -> None:
    write_mined(tmp_path / "out.jsonl", mined, "beir", progress=False)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows == [
        {"qid": "q0", "pos": ["b", "a"], "neg": ["e", "d"]},
        {"qid": "q1", "pos": ["c"], "neg": ["f"]},
        {"qid": "q2", "pos": ["d"], "neg": []},
    ]


def test_only_full(tmp_path: Path, mined: Mined) -> None:
    assert write_mined(tmp_path / "out.jsonl", mined, "sentence-transformers", only_full=True, progress=False) == 2
    assert list(read_rows(tmp_path / "out.jsonl", name="back").anchors) == ["q 0", "q 0"]


def test_equal_results_give_equal_bytes(tmp_path: Path, mined: Mined) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_mined(tmp_path / name, mined, "gritlm", progress=False)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).count(b"\n") == 3


def test_a_failure_leaves_what_was_there(tmp_path: Path, mined: Mined, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text("before")

    def dies(*arguments: object) -> object:
        yield {"half": "a row"}
        raise KeyboardInterrupt

    monkeypatch.setitem(FORMATS, "gritlm", dies)
    with pytest.raises(KeyboardInterrupt):
        write_mined(file, mined, "gritlm", progress=False)
    assert file.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_what_is_refused_before_the_long_part(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text("before")
    check_output(file, "gritlm", overwrite=True)
    for path, options, message in (
        (file, {}, "is there already"),
        (tmp_path, {}, "is a folder"),
        (tmp_path / "out.txt", {}, r"ends in .jsonl or .jsonl.gz"),
        (tmp_path / "no" / "out.jsonl", {}, "no such folder"),
        (tmp_path / "new.jsonl", {"scores": True}, "has no place for scores"),
        (Path("gs://bucket/out.jsonl"), {}, "expected a local file"),
    ):
        with pytest.raises(InputError, match=message):
            check_output(path, "gritlm", **options)
    assert "gritlm" not in WITH_SCORES
