"""BEIR folders and MS MARCO's files, against the same made of dicts."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxembed.data import beir
from jaxembed.data.beir import read_beir
from jaxembed.data.sources import Examples, read_rows, summary
from jaxembed.data.text_store import Picked, PickedRows
from jaxembed.errors import InputError

Rows = list[dict[str, Any]]
CORPUS = {"d1": ("Title", "one"), "d2": ("", "two"), "d3": ("", " "), "d4": ("", "four"), "d5": ("", "q one")}
QUERIES = {"q1": "q one", "q2": "q two", "q3": ""}


def jsonl(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def folder(path: Path, qrels: list[tuple[str, str, Any]] | None, corpus=CORPUS, queries=QUERIES, end: str = "") -> Path:
    jsonl(
        path / f"corpus.jsonl{end}", [{"_id": i, "title": title, "text": text} for i, (title, text) in corpus.items()]
    )
    jsonl(path / f"queries.jsonl{end}", [{"_id": i, "text": text, "metadata": {}} for i, text in queries.items()])
    if qrels is not None:
        (path / "qrels").mkdir(exist_ok=True)
        lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in qrels)]
        (path / "qrels" / "train.tsv").write_text("\n".join(lines) + "\n")
    return path


def read(path: Path, **options: Any) -> Examples:
    return read_beir(path, name="marco", cache_dir=path / "cache", **options)


def columns(found: Examples) -> list[tuple[str, str, tuple[str, ...]]]:
    negatives = [tuple(row) for row in found.negatives] or [()] * len(found)
    return list(zip(found.anchors, found.positives, negatives, strict=True))


@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_beir_folder(tmp_path: Path, end: str) -> None:
    qrels = [
        ("q1", "d1", 1),
        ("q2", "d2", 2),
        ("q1", "d2", 0),
        ("q1", "d1", 1),
        ("q1", "d3", 1),
        ("q3", "d1", 1),
        ("q1", "d5", 1),
    ]
    found = read(folder(tmp_path, qrels, end=end))
    assert columns(found) == [("q one", "Title one", ()), ("q two", "two", ())]
    assert found.ids == ["train.tsv:2", "train.tsv:3"]
    assert found.dropped == {
        "judged not relevant": 1, "duplicate": 1, "empty text": 2, "anchor equal to its positive": 1,
    }  # fmt: skip
    assert isinstance(found.positives, Picked)
    assert summary(found).startswith("marco: BEIR (no negatives a query), 2 pairs kept, 5 dropped (2 empty text, ")


QRELS = {
    "qrels/train.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t1\n",
    "qrels/train.jsonl": '{"query-id": "q1", "corpus-id": "d1", "score": 1}\n'
    '{"query-id": "q2", "corpus-id": "d2", "score": 1}\n',
    "qrels.train.jsonl": '{"qid": "q1", "pid": "d1", "relevance": 1}\n{"qid": "q2", "pid": "d2", "relevance": 1.0}\n',
    "qrels.train.tsv": "q1\t0\td1\t1\nq2\t0\td2\t1\n",
    "qrels/train.tsv.gz": "q1 0 d1 1\nq2 0 d2 1\n",
    "qrels/train.csv": "query-id,corpus-id,score\nq1,d1,1\nq2,d2,1\n",
}


@pytest.mark.parametrize(("name", "content"), QRELS.items())
def test_judgements_of_every_kind(tmp_path: Path, name: str, content: str) -> None:
    folder(tmp_path, None)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    assert columns(read(tmp_path)) == [("q one", "Title one", ()), ("q two", "two", ())]


@pytest.mark.parametrize("name", ["queries.csv", "queries.train.csv"])
def test_queries_with_commas(tmp_path: Path, name: str) -> None:
    folder(tmp_path, [("q1", "d1", 1)])
    (tmp_path / "queries.jsonl").unlink()
    (tmp_path / name).write_text('_id,text\nq1,"one, two"\n')
    assert columns(read(tmp_path)) == [("one, two", "Title one", ())]


def test_ms_marcos_own_files(tmp_path: Path) -> None:
    (tmp_path / "collection.tsv").write_text("7\tpassage seven\n8\tpassage eight\n9\tpassage nine\n")
    (tmp_path / "queries.train.tsv").write_text("1\twhat is seven\n2\twhat is eight\n")
    (tmp_path / "qrels.train.tsv").write_text("1\t0\t7\t1\n2\t0\t8\t1\n")
    mined = jsonl(
        tmp_path / "hard.jsonl.gz",
        [{"qid": 1, "pos": [7], "neg": {"bm25": [8, 9], "other": [9, 7]}}, {"qid": 2, "neg": [9]}],
    )
    found = read(tmp_path, mined=mined)
    assert columns(found) == [
        ("what is seven", "passage seven", ("passage eight", "passage nine")),
        ("what is eight", "passage eight", ("passage nine",)),
    ]
    assert "BEIR (1 to 2 negatives a query)" in summary(found)
    assert columns(read(tmp_path, mined=mined, mined_negatives=1)) == [
        ("what is seven", "passage seven", ("passage eight",)),
        ("what is eight", "passage eight", ("passage nine",)),
    ]


def test_triples_by_id_need_no_judgements(tmp_path: Path) -> None:
    folder(tmp_path, None)
    (tmp_path / "triples.tsv").write_text("q1\td1\td2\nq1\td1\td4\nq2\td2\td1\nq1\td1\td2\n")
    found = read(tmp_path, mined=tmp_path / "triples.tsv")
    assert columns(found) == [("q one", "Title one", ("two", "four")), ("q two", "two", ("Title one",))]


ids = st.sampled_from([f"d{i}" for i in range(9)])
judged = st.lists(st.tuples(st.sampled_from(["q0", "q1", "q2", "q3"]), ids, st.integers(0, 2)), min_size=1, max_size=20)
mined_rows = st.lists(
    st.tuples(
        st.sampled_from(["q0", "q1", "q2", "q3"]),
        st.dictionaries(st.sampled_from("abc"), st.lists(ids, max_size=5), max_size=3),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(qrels=judged, mined=mined_rows, blank=st.sets(ids, max_size=3), limit=st.integers(1, 4), block=st.integers(1, 5))
def test_against_dicts(
    tmp_path_factory: Any, qrels: list, mined: list, blank: set[str], limit: int, block: int
) -> None:
    tmp_path = tmp_path_factory.mktemp("beir")
    corpus = {f"d{i}": ("", " " if f"d{i}" in blank else f"document {i}") for i in range(9)}
    queries = {f"q{i}": f"query {i}" for i in range(4)}
    folder(tmp_path, qrels, corpus, queries)
    file = jsonl(tmp_path / "mined.jsonl", [{"qid": query, "neg": systems} for query, systems in mined])

    pairs: list[tuple[str, str]] = []
    for query, document, grade in qrels:
        if grade > 0 and document not in blank and (query, document) not in pairs:
            pairs.append((query, document))
    negatives: dict[str, list[str]] = {}
    for query, systems in mined:
        own = negatives.setdefault(query, [])
        for turn in range(5):
            for listed in systems.values():
                if turn < len(listed) and listed[turn] not in own:
                    own.append(listed[turn])
    expected = []
    for query, document in pairs:
        good = [one for one in negatives.get(query, []) if one not in blank and (query, one) not in pairs]
        expected.append((queries[query], corpus[document][1], {corpus[one][1] for one in good}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beir, "_BLOCK", block)
        if not pairs:
            with pytest.raises(InputError, match="no pair left"):
                read(tmp_path, mined=file)
            return
        found = columns(read(tmp_path, mined=file, mined_negatives=9))
        few = columns(read(tmp_path, mined=file, mined_negatives=limit))
    assert [(anchor, positive, set(others)) for anchor, positive, others in found] == expected
    for (_, _, others), (_, _, all_of_them) in zip(few, found):
        assert len(set(others)) == len(others) <= limit
        assert set(others) <= set(all_of_them)


BAD = [
    ("qrels/train.tsv", "q1\td1\n", ":5: expected the columns query-id, corpus-id, score, found 2"),
    ("qrels/train.tsv", "q1\td1\tx\n", ":5: column 'score': expected a finite number, found 'x'"),
    ("qrels/train.tsv", "q9\td1\t1\n", ":5: no query has the id 'q9'"),
    ("qrels/train.tsv", "q1\td9\t1\n", ":5: no document has the id 'd9'"),
    ("corpus.jsonl", '{"_id": "x"}\n', ":6: no column 'text'"),
    ("queries.jsonl", '{"_id": "x", "text": null}\n', ":4: column 'text': expected a string, found null"),
    ("mined.jsonl", '{"qid": "q9", "neg": ["d1"]}\n', ":2: no query has the id 'q9'"),
    ("mined.jsonl", '{"qid": "q1", "neg": ["d9"]}\n', ":2: no document has the id 'd9'"),
    ("mined.jsonl", '{"qid": "q1", "neg": "d9"}\n', ":2: column 'neg': expected a list of ids, found a string"),
    (
        "mined.jsonl",
        '{"qid": "q1", "neg": {"a": [1.5]}}\n',
        ":2: column 'neg', 'a'[0]: expected a string, found a number",
    ),
    ("mined.jsonl", '{"qid": "q1"}\n', ":2: no column 'neg' or 'negatives'"),
    ("mined.jsonl", "[]\n", ":2: expected a JSON object, found a list"),
]


@pytest.mark.parametrize(("name", "line", "words"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_row_is_named_or_counted(tmp_path: Path, name: str, line: str, words: str) -> None:
    folder(tmp_path, [("q1", "d1", 1), ("q2", "d2", 1), ("q2", "d1", 1)])
    jsonl(tmp_path / "mined.jsonl", [{"qid": "q1", "neg": ["d2"]}])
    with (tmp_path / name).open("a") as file:
        file.write(line)
    with pytest.raises(InputError) as caught:
        read(tmp_path, mined=tmp_path / "mined.jsonl")
    assert f"{tmp_path / name}{words}" in str(caught.value)
    assert "bad_rows: skip" in str(caught.value)
    found = read(tmp_path, mined=tmp_path / "mined.jsonl", bad_rows="skip")
    assert found.dropped == {"bad row": 1}
    assert columns(found)[0] == ("q one", "Title one", ("two",))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no corpus there; looked for corpus\.jsonl"):
        read(tmp_path)
    folder(tmp_path, None)
    with pytest.raises(InputError, match=r"no judgements of the split 'train' there; looked for qrels/train\.tsv"):
        read(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path, qrels=tmp_path / "nowhere.tsv")


def test_the_fingerprint_follows_every_file(tmp_path: Path) -> None:
    folder(tmp_path, [("q1", "d1", 1), ("q2", "d2", 1)])
    jsonl(tmp_path / "mined.jsonl", [{"qid": "q1", "neg": ["d2"]}])
    seen = {read(tmp_path).fingerprint}
    for options in ({}, {"mined_negatives": 3}):
        seen.add(read(tmp_path, mined=tmp_path / "mined.jsonl", **options).fingerprint)
    assert len(seen) == 3
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "mined.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        seen.add(read(tmp_path, mined=tmp_path / "mined.jsonl").fingerprint)
    assert len(seen) == 7


def test_tevatron_with_a_corpus(tmp_path: Path) -> None:
    corpus = jsonl(tmp_path / "corpus.jsonl", [{"docid": i, "title": t, "text": x} for i, (t, x) in CORPUS.items()])
    rows = [
        {
            "query_id": "1",
            "query_text": "a",
            "positive_document_ids": ["d1", "d3"],
            "negative_document_ids": ["d2", "d1", "d3"],
        },
        {"query_id": "2", "query_text": "b", "positive_document_ids": ["d2"], "negative_document_ids": []},
        {"query_id": "3", "query_text": "c", "positive_document_ids": [], "negative_document_ids": []},
        {"query_id": "4", "query_text": "b", "positive_document_ids": ["d2"], "negative_document_ids": []},
    ]
    path = jsonl(tmp_path / "train.jsonl", rows)

    def found(**options: Any) -> Examples:
        return read_rows(path, name="rows", cache_dir=tmp_path / "cache", **{"corpus": corpus, **options})

    examples = found()
    assert columns(examples) == [("a", "Title one", ("two",)), ("b", "two", ())]
    assert isinstance(examples.negatives, PickedRows)
    assert examples.dropped == Counter(
        {"empty text": 1, "negative that is a positive": 2, "no positive": 1, "duplicate": 1}
    )
    assert columns(found(corpus=tmp_path)) == columns(examples)  # the folder
    assert examples.negative_counts.tolist() == [1, 0]
    with pytest.raises(InputError, match="tevatron with document ids names documents by id; give their corpus"):
        found(corpus=None)
    jsonl(path, [*rows, {"query_text": "d", "positive_document_ids": ["d99"]}])
    with pytest.raises(InputError, match=r"train\.jsonl:5: the corpus has no document with the id 'd99'"):
        found()
    assert found(bad_rows="skip").dropped["bad row"] == 1
    jsonl(path, [{"query": "q", "answer": "a"}])
    with pytest.raises(InputError, match="has no documents by id; leave out corpus"):
        found()


def test_memory_of_rows(tmp_path: Path) -> None:
    """A pair needs its rows, whatever the texts are."""
    corpus = {f"d{i}": ("", f"document {i}") for i in range(200)}
    queries = {f"q{i}": f"query {i}" for i in range(50)}
    folder(tmp_path, [(f"q{i}", f"d{i}", 1) for i in range(50)], corpus, queries)
    mined = jsonl(
        tmp_path / "m.jsonl", [{"qid": f"q{i}", "neg": [f"d{(i + j) % 200}" for j in range(1, 12)]} for i in range(50)]
    )
    found = read(tmp_path, mined=mined)
    assert isinstance(found.negatives, PickedRows)
    assert found.negatives.rows.dtype == np.int32
    assert found.negatives.rows.shape == (50, 11)
