"""Texts by id on the disk: what goes in comes out, by row and by id, and nothing of it stays in memory."""

import gzip
import json
import logging
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.data import text_store
from jaxembed.data.id_texts import CORPUS_KEYS, QUERY_KEYS
from jaxembed.data.text_store import (
    Picked,
    PickedRows,
    TextStore,
    build_text_store,
    find_corpus,
    store_of_file,
)
from jaxembed.errors import InputError

anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


def build(directory: Path, texts: dict[str, str], fingerprint: str = "f") -> TextStore:
    return build_text_store(texts.items, fingerprint=fingerprint, directory=directory, name="texts")


def of_file(path: Path, directory: Path, **options) -> TextStore:
    return store_of_file(epath.Path(path), "corpus", **{"keys": CORPUS_KEYS, "directory": directory, **options})


@given(texts=st.dictionaries(anything, anything, min_size=1, max_size=30), data=st.data(), block=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_holds_every_text_by_row_and_by_id(
    tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str], data: st.DataObject, block: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_store, "_BLOCK", block)
        patch.setattr(text_store, "_READ", block)
        store = build(tmp_path_factory.mktemp("store"), texts)
        ids = list(texts)
        assert [store[row] for row in range(len(store))] == list(texts.values())
        assert [store.id_of(row) for row in range(len(store))] == ids
        wanted = data.draw(st.lists(st.one_of(st.sampled_from(ids), anything), max_size=20))
        assert store.rows_of(wanted).tolist() == [ids.index(one) if one in texts else -1 for one in wanted]
        assert store.blank.tolist() == [row for row, text in enumerate(texts.values()) if not text.strip()]
        np.testing.assert_array_equal(
            store.bytes_of(np.arange(len(store))), [len(text.encode()) for text in texts.values()]
        )
        rows = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=12))
        picked = Picked(store, np.array(rows, np.int64))
        expected = [list(texts.values())[row] for row in rows]
        assert list(picked) == expected == [picked[place] for place in range(len(rows))]
        assert list(picked[1:5]) == expected[1:5]
        assert list(reversed(picked)) == expected[::-1]


def test_ids_of_one_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_store, "text_hash", len)
    store = build(tmp_path, {"a": "1", "bb": "2", "b": "3", "c": "4", "cc": "5"})
    assert store.rows_of(["c", "b", "a", "cc", "bb", "d", "dd", "ddd"]).tolist() == [3, 2, 0, 4, 1, -1, -1, -1]


def test_rows_of_several_texts(tmp_path: Path) -> None:
    rows = PickedRows(build(tmp_path, {"a": "x", "b": "y", "c": "z"}), np.array([[2, 0], [1, -1], [-1, -1]]))
    assert [list(row) for row in rows] == [["z", "x"], ["y"], []]
    assert list(map(len, rows)) == [2, 1, 0]
    assert [list(row) for row in rows[1:]] == [["y"], []]


def test_is_built_once_for_a_fingerprint(tmp_path: Path) -> None:
    build(tmp_path, {"a": "1"})

    def fail() -> Iterator[tuple[str, str]]:
        pytest.fail("read again")

    again = build_text_store(fail, fingerprint="f", directory=tmp_path, name="texts")
    assert again[0] == "1"
    assert build(tmp_path, {"a": "2"}, "other")[0] == "2"


PARTS = ["texts.bin", "ids.bin", "offsets.npy", "id_offsets.npy", "hashes.npy", "order.npy", "blank.npy", "meta.json"]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("harm", ["truncated", "removed"])
def test_a_damaged_one_is_built_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, harm: str) -> None:
    texts = {"a": "one", "b": " ", "c": "three"}
    path = build(tmp_path, texts).directory / name
    if harm == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])
    store = build(tmp_path, texts)
    assert [store[row] for row in range(3)] == list(texts.values())
    assert "is damaged" in caplog.text
    assert len(list((tmp_path / "stores").iterdir())) == 1


def test_an_id_that_stands_there_twice_is_an_error(tmp_path: Path) -> None:
    texts = [("a", "1"), ("b", "2"), ("c", "3"), ("b", "4")]
    with pytest.raises(InputError, match=r"texts: the id 'b' stands there twice, in rows 2 and 4"):
        build_text_store(lambda: texts, fingerprint="f", directory=tmp_path, name="texts")
    assert list((tmp_path / "stores").iterdir()) == []


def test_no_text_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="texts: no text"):
        build(tmp_path, {})


def test_a_full_disk_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write the text store in .*data\.cache_dir"):
            build(tmp_path, {str(i): f"text {i}" for i in range(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "stores").iterdir()) == []


ROWS = [{"_id": "d1", "title": "Title", "text": "text"}, {"_id": "d2", "title": "", "text": "alone"}]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "tsv", "tsv.gz", "header.tsv", "csv", "parquet"])
def test_corpora_of_every_kind(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"corpus.{kind}"
    header = "_id\ttitle\ttext\n" if kind == "header.tsv" else ""
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        data = {
            "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
            "csv": "_id,title,text\nd1,Title,text\nd2,,alone\n",
        }.get(kind.removesuffix(".gz"), header + "d1\tTitle\ttext\nd2\t\talone\n").encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    store = of_file(path, tmp_path)
    assert [store[row] for row in range(2)] == ["Title text", "alone"]
    assert store.rows_of(["d2", "d1"]).tolist() == [1, 0]


def test_ms_marcos_two_columns(tmp_path: Path) -> None:
    (tmp_path / "collection.tsv").write_text('0\ta "quoted" passage\n1\tanother\n')
    store = of_file(tmp_path / "collection.tsv", tmp_path)
    assert store[0] == 'a "quoted" passage'
    assert find_corpus(epath.Path(tmp_path)).name == "collection.tsv"


BAD_LINES = {
    '{"_id": "x"}': "no column 'text'",
    '{"_id": "x", "text": 1}': "column 'text': expected a string, found a number",
    '{"_id": null, "text": "a"}': "column '_id': expected a string, found null",
    '{"_id": "x", "text": "a", "title": 1}': "column 'title': expected a string, found a number",
    '{"docid": "x", "text": "a"}': "no column '_id'",
    "nothing": "not JSON",
}


@pytest.mark.parametrize(("line", "words"), BAD_LINES.items())
def test_a_bad_row_is_named_or_counted(tmp_path: Path, line: str, words: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(f'{{"_id": 7, "text": "a"}}\n\n{line}\n{{"_id": "8", "text": "b"}}\n')
    with pytest.raises(InputError) as caught:
        of_file(path, tmp_path)
    assert f"{path}:3: {words}" in str(caught.value)
    store = of_file(path, tmp_path, bad_rows="skip")
    assert [store.id_of(row) for row in range(len(store))] == ["7", "8"]
    assert store.skipped == 1
    assert of_file(path, tmp_path, bad_rows="skip").skipped == 1
    with pytest.raises(InputError, match=":3: "):
        of_file(path, tmp_path)


def test_an_id_that_comes_again_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "corpus.tsv"
    path.write_text("1\ta\n2\tb\n1\tc\n")
    with pytest.raises(InputError, match="the id '1' stands there twice"):
        of_file(path, tmp_path)
    store = of_file(path, tmp_path, bad_rows="skip")
    assert store.skipped == 1
    assert store[int(store.rows_of(["1"])[0])] == "a"


def test_columns_that_are_unknown_are_named(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"key": "1", "words": "a"}\n')
    with pytest.raises(InputError, match=r"corpus\.jsonl:1: expected the keys '_id' or 'docid' .*found 'key', 'words'"):
        of_file(path, tmp_path)
    (tmp_path / "queries.tsv").write_text("1\ta\tb\tc\n")
    with pytest.raises(InputError, match=r"queries\.tsv:1: expected the columns id, text or id, title, text, found 4"):
        of_file(tmp_path / "queries.tsv", tmp_path, keys=QUERY_KEYS)
    with pytest.raises(InputError, match=r"no corpus there; looked for corpus\.jsonl"):
        find_corpus(epath.Path(tmp_path / "stores"))


def test_the_log_says_where_it_lies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "corpus.tsv").write_text("1\ta\n2\tb\n")
    with caplog.at_level(logging.INFO):
        of_file(tmp_path / "corpus.tsv", tmp_path)
    assert "corpus.tsv has 2 texts, on disk in" in caplog.text


_MEASURED = """
import resource, sys
from jaxembed.data.text_store import build_text_store
def texts():
    for number in range(COUNT):
        yield str(number), f"passage {number} " * 12
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
COUNT = 1
build_text_store(texts, fingerprint="small", directory=sys.argv[1], name="texts")
before = peak()
COUNT = 400_000
store = build_text_store(texts, fingerprint="large", directory=sys.argv[1], name="texts")
print((peak() - before) / COUNT, sum(store.bytes_of(__import__("numpy").arange(len(store)))) / COUNT)
"""


def test_building_needs_few_bytes_a_text(tmp_path: Path) -> None:
    """What is counted includes pages of the files that are mapped, which the system takes back when it needs them."""
    found = subprocess.run([sys.executable, "-c", _MEASURED, str(tmp_path)], capture_output=True, text=True, check=True)
    memory, size = map(float, found.stdout.split())
    assert size > 150
    assert memory < 64
