"""A teacher's embeddings: which row belongs to which text, whatever was dropped, and what is wrong with a file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxembed.data.beir import read_beir
from jaxembed.data.sources import Examples, TextRows, read_jsonl, read_rows
from jaxembed.data.teacher import open_teacher
from jaxembed.errors import InputError

DIM = 6


def vector_of(text: str) -> np.ndarray:
    return np.random.default_rng(list(text.encode()) or [0]).normal(size=DIM).astype(np.float32)


def saved(path: Path, texts: list[str]) -> Path:
    np.save(path, np.stack([vector_of(text) for text in texts]))
    return path


def check(examples: Examples, files: dict[str, Path], without: tuple[str, ...] = ()) -> None:
    """Every text of every example has the embedding that its author computed of it."""
    teacher = open_teacher(files, examples.rows, examples.name, "key", dim=DIM)
    count = int(examples.negative_counts.max(initial=0))
    negatives = np.where(np.arange(count + 1) < examples.negative_counts[:, None], np.arange(count + 1), -1)
    found = teacher.of(np.arange(len(examples)), np.zeros(len(examples), int), negatives)
    assert found.shape == (len(examples), 3 + count, DIM)
    for row in range(len(examples)):
        given = list(examples.negatives[row]) if len(examples.negatives) else []
        texts = [examples.anchors[row], examples.positives[row], *given]
        kinds = ["anchors", "positives", *["negatives"] * len(given)]
        for vector, text, kind in zip(found[row], texts, kinds):
            np.testing.assert_array_equal(vector, np.full(DIM, np.nan) if kind in without else vector_of(text))
        assert np.isnan(found[row, len(texts) :]).all()


def test_rows_that_are_dropped_count(tmp_path: Path) -> None:
    """Duplicates, empty texts, negatives that are positives, several positives, different numbers of negatives."""
    rows: list[tuple[str, list[str], list[str]]] = [
        ("a", ["b"], ["x", "y"]), ("a", ["b"], ["z"]), ("", ["c"], []), ("d", ["e", "f"], ["e", " ", "w"]),
        ("g", [], ["v"]), ("h", ["i"], []),
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(dict(zip(("query", "pos", "neg"), row))) + "\n\n" for row in rows))
    examples = read_rows(path, name="rows")
    assert list(examples.anchors) == ["a", "d", "d", "h"]
    files = {
        "anchors": saved(tmp_path / "a.npy", [anchor for anchor, _, _ in rows]),
        "positives": saved(tmp_path / "p.npy", [text for _, positives, _ in rows for text in positives]),
        "negatives": saved(tmp_path / "n.npy", [text for _, _, negatives in rows for text in negatives]),
    }
    check(examples, files)
    check(examples, {"positives": files["positives"]}, without=("anchors", "negatives"))


def test_named_columns_and_a_split(tmp_path: Path) -> None:
    """Rows of another split, and such as cannot be read, do not count; an array may have an axis for the columns."""
    lines = [
        {"q": f"q{n // 2}", "d": f"d{n // 2}", "n": f"n{n}", "m": f"m{n}", "split": "ab"[n % 5 == 0]} for n in range(12)
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("not json\n" + "".join(map("{}\n".format, map(json.dumps, lines))))
    examples = read_jsonl(
        path, name="x", anchor="q", positive="d", negatives=["n", "m"], split="a", bad_rows="skip"
    )  # fmt: skip
    own = [line for line in lines if line["split"] == "a"]
    assert 0 < len(examples) < len(own)
    files = {
        "anchors": saved(tmp_path / "a.npy", [line["q"] for line in own]),
        "negatives": saved(tmp_path / "n.npy", [line[key] for line in own for key in "nm"]),
    }
    np.save(files["negatives"], np.load(files["negatives"]).reshape(len(own), 2, DIM))
    check(examples, files, without=("positives",))


def test_documents_of_a_corpus(tmp_path: Path) -> None:
    """By the rows of queries and corpus; the same for rows that name documents by id."""
    documents, queries = [f"document {n}" for n in range(9)], [f"query {n}" for n in range(5)]
    for name, texts in (("corpus", documents), ("queries", queries)):
        lines = [json.dumps({"_id": f"{name[0]}{n}", "title": "", "text": text}) for n, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "train.tsv").write_text("q4\tc8\t1\nq1\tc3\t1\nq1\tc3\t1\nq2\tc0\t0\nq0\tc7\t1\n")
    mined = tmp_path / "mined.jsonl"
    mined.write_text(json.dumps({"qid": "q1", "neg": ["c3", "c5", "c0"]}) + "\n")
    folder: dict[str, Any] = {"name": "beir", "cache_dir": tmp_path / "cache"}
    files = {"anchors": saved(tmp_path / "a.npy", queries), "documents": saved(tmp_path / "d.npy", documents)}
    check(read_beir(tmp_path, mined=mined, **folder), files)
    check(read_beir(tmp_path, **folder), files)
    rows = [{"query_text": "z", "positive_document_ids": ["c2", "c4"], "negative_document_ids": ["c4", "c6"]}] * 2
    rows.insert(1, {"query_text": "y", "positive_document_ids": ["c1"], "negative_document_ids": []})
    (tmp_path / "ids.jsonl").write_text("\n".join(map(json.dumps, rows)))
    examples = read_rows(tmp_path / "ids.jsonl", corpus=tmp_path / "corpus.jsonl", **folder)
    assert len(examples) == 3
    check(examples, {**files, "anchors": saved(tmp_path / "i.npy", ["z", "y", "z"])})
    with pytest.raises(InputError, match=r"key.positives: beir has no such texts of its own; it has anchors"):
        open_teacher({"positives": files["documents"]}, examples.rows, "beir", "key", dim=DIM)


ROWS = TextRows(np.arange(3), np.arange(3)[:, None], np.zeros((3, 0), int), {"anchors": 3, "positives": 3})


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (np.ones((3, 4, 5), np.float32), {"dim": 5}, r"12 rows, but s has 3 anchors; every row that is read counts"),
        (np.ones(3, np.float32), {"dim": 3}, r"expected an array of floats \[texts, dim\], found float32 \[3\]"),
        (np.ones((3, 4), np.int64), {"dim": 4}, r"expected an array of floats \[texts, dim\], found int64 \[3, 4\]"),
        (np.ones((3, 8)), {"dim": 4}, r"has 8 dimensions, the model 4; they have to be equal; truncate_dim: 4 takes"),
        (np.ones((3, 8)), {"dim": 4, "truncate_dim": 6}, r"8 dimensions, of which truncate_dim takes 6, the model 4"),
        (np.ones((3, 4)), {"dim": 8}, r"the teacher has 4 dimensions, the model 8; they have to be equal$"),
        (np.ones((3, 4)), {"dim": 8, "truncate_dim": 8}, r"the teacher has 4 dimensions, of which"),
        (np.array([[1.0, 2], [0, 0], [1, 1]]), {"dim": 2}, r"row 1 \(from 0\) holds only zeros"),
        (np.array([[1.0, 2], [3, 0], [np.nan, 1]]), {"dim": 2}, r"row 2 \(from 0\) holds NaN or infinity"),
        (np.array([[1, np.inf], [3, 0], [1, 1]], np.float16), {"dim": 2}, r"row 0 \(from 0\) holds NaN or infinity"),
        (None, {"dim": 2}, r"no such file"),
        (b"1 2 3", {"dim": 2}, r"not a \.npy file"),
        (np.array([{}, {}]), {"dim": 2}, r"not a \.npy file"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, array: Any, options: dict[str, int], message: str) -> None:
    path = tmp_path / "a.npy"
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif array is not None:
        np.save(path, array)
    with pytest.raises(InputError, match=rf"data\.anchors: {path}: .*{message}"):
        open_teacher({"anchors": path}, ROWS, "s", "data", **options)


def test_of_a_longer_teacher_the_first_dimensions_are_taken(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(3, 9)).astype(np.float16)
    np.save(tmp_path / "a.npy", array)
    teacher = open_teacher({"anchors": tmp_path / "a.npy"}, ROWS, "s", "key", dim=4, truncate_dim=4)
    found = teacher.of(np.array([2, 0]), np.zeros(2, int), np.zeros((2, 0), int))
    np.testing.assert_array_equal(found[:, 0], array[[2, 0], :4].astype(np.float32))
    assert np.isnan(found[:, 1]).all()
    assert isinstance(teacher.arrays["anchors"].base, np.memmap)


def test_pairs_that_are_made_have_none(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{n}", "label": "ab"[n % 2]}) + "\n" for n in range(8)))
    with pytest.raises(InputError, match=r"key: the texts of l have no order of their own"):
        open_teacher({}, read_rows(path, name="l").rows, "l", "key", dim=2)
    with pytest.raises(InputError, match=r"key.anchors: gs://b/a.npy is not local"):
        open_teacher({"anchors": "gs://b/a.npy"}, ROWS, "s", "key", dim=2)
