import gzip
import json
import os
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.datasets import builders, ms_marco
from jaxembed.datasets.ms_marco import (
    COLLECTION,
    MARGIN,
    NO_NEGATIVE,
    NO_POSITIVE,
    PER_SYSTEM,
    SCORES,
    choose_negatives,
    hard_negatives,
    read_table,
)
from jaxembed.datasets.prepared import open_builders, prepare_dataset
from jaxembed.datasets.scores import store_scores
from jaxembed.errors import InputError

from originals import tar_of, write_ms_marco, write_scores


def ancestor(row, scores, systems, margin=MARGIN, most=PER_SYSTEM):
    """The loop of `train_bi-encoder_mnrl.py`, written down again: a set, and a count for each system."""
    threshold = min(scores[passage] for passage in row["pos"]) - margin
    chosen = set()
    for system in systems:
        added = 0
        for passage in row["neg"].get(system, []):
            if scores[passage] > threshold or passage in chosen:
                continue
            chosen.add(passage)
            added += 1
            if added >= most:
                break
    return chosen


@pytest.fixture
def files(tmp_path):
    return write_ms_marco(tmp_path / "originals")


def chosen_from(files, **options):
    scores = store_scores(SCORES.find(epath.Path(files.folder)), SCORES, files.folder)
    return choose_negatives(epath.Path(files.folder) / "msmarco-hard-negatives.jsonl.gz", scores, **options)


def write_rows(files, lines):
    path = files.folder / "msmarco-hard-negatives.jsonl.gz"
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))
    return path


passage = st.integers(0, 12)


@settings(max_examples=200, deadline=None)
@given(
    positives=st.lists(passage, min_size=1, max_size=3),
    mined=st.dictionaries(st.sampled_from("abcd"), st.lists(passage, max_size=10), max_size=4),
    values=st.lists(st.sampled_from([-4.0, -3.0, -0.5, 0.0, 0.5, 3.0, 3.5]), min_size=13, max_size=13),
    systems=st.permutations("abcd"),
    most=st.integers(1, 4),
    margin=st.sampled_from([0.0, 3.0]),
)
def test_the_rule_is_the_ancestors(positives, mined, values, systems, most, margin):
    scores = dict(enumerate(values))
    found = hard_negatives(positives, mined, scores, systems, margin, most)
    assert len(set(found)) == len(found)
    assert set(found) == ancestor({"pos": positives, "neg": mined}, scores, systems, margin, most)


def test_a_passage_that_is_not_compared_needs_no_score():
    scores = {0: 9.0, **dict.fromkeys(range(1, 6), 0.0)}
    assert hard_negatives([0], {"a": [1, 2, 3, 4, 5, 99]}, scores, ["a"]) == [1, 2, 3, 4, 5]
    with pytest.raises(KeyError):
        hard_negatives([0], {"a": [1, 2, 3, 4, 99]}, scores, ["a"])


def test_the_file_gives_what_the_ancestor_chooses(files):
    chosen = chosen_from(files)
    systems = list(next(row for row in files.rows if row["pos"])["neg"])
    assert chosen.systems == systems
    expected = {
        row["qid"]: (row["pos"], ancestor(row, files.scores[row["qid"]], systems)) for row in files.rows if row["pos"]
    }
    kept = {query: found for query, found in expected.items() if found[1]}
    assert chosen.queries.tolist() == list(kept)
    rows = list(chosen.rows(files.queries))
    for row, (positives, negatives) in zip(rows, kept.values()):
        assert row["query"] == files.queries[int(row["query_id"])]
        assert row["positive_ids"].tolist() == positives
        assert sorted(row["negative_ids"].tolist()) == sorted(negatives)
    without = sum(not row["pos"] for row in files.rows)
    dropped = {NO_POSITIVE: without, NO_NEGATIVE: len(expected) - len(kept)}
    assert chosen.dropped == {reason: count for reason, count in dropped.items() if count}
    assert without
    again = chosen_from(files)
    assert np.array_equal(chosen.negatives, again.negatives), "a fixed order"
    assert not np.array_equal(chosen.negatives, chosen_from(files, seed=1).negatives)


def test_each_system_comes_first_as_often_as_it_gives():
    """Shuffled: with one negative a query, the first system must not give them all."""
    files_scores = {0: 9.0, **dict.fromkeys(range(1, 11), 0.0)}
    order = hard_negatives([0], {"a": range(1, 6), "b": range(6, 11)}, files_scores, ["a", "b"])
    random = np.random.default_rng(0)
    first = [random.permutation(np.array(order))[0] for _ in range(400)]
    assert 120 < sum(one > 5 for one in first) < 280


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected"),
        ('{"qid": "1", "pos": [1], "neg": {}}', 'found "1" as qid'),
        ('{"qid": true, "pos": [1], "neg": {}}', "found true as qid"),
        ('{"qid": 1, "neg": {}}', "found null as pos"),
        ('{"qid": 1, "pos": [1], "neg": [2]}', r"found \[2\] as neg"),
        ('{"qid": 1, "pos": ["1"], "neg": {}}', "found other things in pos"),
        ('{"qid": 1, "pos": [-1], "neg": {}}', "found other things in pos"),
        ('{"qid": 1, "pos": [1], "neg": {"a": [2147483648]}}', "found other things in a"),
        ('{"qid": 1, "pos": [{"pid": 1, "ce-score": 0.5}], "neg": {}}', "in pos: this is the older file"),
        ('{"qid": 999999, "pos": [1], "neg": {}}', "no score for passage 1 of query 999999"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(files, line, message):
    rows = [json.dumps(row) for row in files.rows]
    path = write_rows(files, [*rows[:3], "", line, *rows[3:]])
    with pytest.raises(InputError, match=rf"{path}:5: .*{message}"):
        chosen_from(files)


def test_a_row_with_bytes_that_are_no_text(files):
    path = files.folder / "msmarco-hard-negatives.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"qid": 1, "pos": [], "neg": {}}\n{"\xff": 1}\n'))
    with pytest.raises(InputError, match=f"{path}:2: not UTF-8: byte 0xff"):
        chosen_from(files)


def test_rows_that_do_not_go_together(files):
    with pytest.raises(InputError, match=r":\d+: passage \d+ of query \d+, but the collection has 20"):
        chosen_from(files, passages=20)
    write_rows(files, [json.dumps(row) for row in files.rows[:2] + files.rows[:1]])
    with pytest.raises(InputError, match=f"query {files.rows[0]['qid']} comes twice"):
        chosen_from(files)
    write_rows(files, ['{"qid": 1, "pos": [], "neg": {}}'])
    with pytest.raises(InputError, match=r"no query with a positive and a hard negative.*1 query without a positive"):
        chosen_from(files)
    write_rows(files, [])
    with pytest.raises(InputError, match="the file is empty"):
        chosen_from(files)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"no tab", "found 1 columns"),
        (b"2\ta\tb", "found 3 columns"),
        (b"x2\ta", "an id that is b'x2'"),
        (b"-2\ta", "an id that is"),
        (b"\ta", "an id that is b''"),
        (b"3\ta", "expected id 2, found 3: .*a line is missing"),
        (b"2\t\xff", "not UTF-8: byte 0xff"),
    ],
)
def test_a_bad_passage_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "collection.tsv"
    path.write_bytes(b"0\ta\n1\tb\n" + line + b"\n")
    with pytest.raises(InputError, match=rf"{path}:3: .*{message}"):
        list(read_table(epath.Path(path), COLLECTION, "passages", counted_ids=True))


def test_passages_and_queries_are_read_as_the_ancestors_read_them(tmp_path):
    text = "0\t two  spaces \n1\tÄ中\t\r\n"
    path = tmp_path / "queries.train.tsv"
    path.write_text(text.replace("\t\r", " \r"))
    lines = [line.strip().split("\t") for line in path.read_text().splitlines()]
    assert [list(map(str, row)) for row in read_table(epath.Path(path), COLLECTION, "queries")] == lines


def built(files, data_dir):
    return prepare_dataset("ms_marco", data_dir=data_dir, manual_dir=files.folder)


def test_tfds_reads_what_was_written(files, tmp_path, monkeypatch):
    monkeypatch.setattr(builders, "SHARD_ROWS", 8)
    passages, queries = built(files, tmp_path / "tfds")
    assert (passages.info.full_name, queries.info.full_name) == (
        "ms_marco/passages/1.0.0",
        "ms_marco/hard_negatives/1.0.0",
    )
    source = passages.as_data_source(split="train")
    assert [row["text"].decode() for row in source] == files.passages
    assert len(list(passages.data_path.glob("*.array_record*"))) == 8
    assert passages.info.splits["train"].num_examples == 60
    expected = list(chosen_from(files).rows(files.queries))
    found = queries.as_data_source(split="train")
    assert len(found) == len(expected)
    for row, one in zip(found, expected):
        assert row["query"].decode() == one["query"]
        assert row["query_id"] == one["query_id"]
        assert np.array_equal(row["positive_ids"], one["positive_ids"])
        assert np.array_equal(row["negative_ids"], one["negative_ids"])
    metadata = queries.info.metadata
    assert (metadata["margin"], metadata["per_system"]) == (3.0, 5)
    assert metadata["dropped"][NO_POSITIVE] == 3


def test_archives_and_unpacked_files_give_the_same(files, tmp_path):
    one = built(files, tmp_path / "one")
    tar_of(files.folder / "collection.tsv", "collection.tsv")
    tar_of(files.folder / "queries.train.tsv", "queries.train.tsv").rename(files.folder / "queries.tar.gz")
    packed = files.folder / "msmarco-hard-negatives.jsonl.gz"
    (files.folder / "msmarco-hard-negatives.jsonl").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    other = built(files, tmp_path / "other")
    for left, right in zip(one, other):
        for path in left.data_path.glob("*.array_record*"):
            assert path.read_bytes() == (right.data_path / path.name).read_bytes()


def test_it_is_built_once(files, tmp_path, caplog):
    data_dir = tmp_path / "tfds"
    before = {path: os.stat(path).st_mtime_ns for b in built(files, data_dir) for path in b.data_path.iterdir()}
    with caplog.at_level("INFO"):
        built(files, data_dir)
    assert caplog.text.count("prepared already") == 2
    assert {path: os.stat(path).st_mtime_ns for path in before} == before


def test_the_builder_is_registered_with_tfds(files, tmp_path):
    built(files, tmp_path)
    source = tfds.data_source("ms_marco/passages", split="train", data_dir=tmp_path, download=False)
    assert source[17]["text"].decode() == files.passages[17]
    assert "tensorflow" not in sys.modules


def test_what_a_killed_build_left_is_in_nobodys_way(files, tmp_path):
    version = tmp_path / "ms_marco" / "passages" / "1.0.0"
    left = version.with_name("1.0.0.incomplete.ABCDEF")
    left.mkdir(parents=True)
    (left / "ms_marco-train.array_record-00000-of-00001").write_bytes(b"half")
    assert built(files, tmp_path)[0].info.splits["train"].num_examples == 60


def test_a_directory_that_is_no_whole_data_set_is_named(files, tmp_path):
    version = tmp_path / "ms_marco" / "passages" / "1.0.0"
    version.mkdir(parents=True)
    with pytest.raises(InputError, match=f"{version}: there, but not a data set that was prepared to its end"):
        built(files, tmp_path)


def test_a_build_that_fails_leaves_nothing(files, tmp_path):
    data_dir = tmp_path / "tfds"
    good = SCORES.find(epath.Path(files.folder)).read_bytes()
    for scores in ({}, {files.rows[0]["qid"]: {}}):
        write_scores(files.folder, scores)
        with pytest.raises(InputError, match="no score for passage"):
            built(files, data_dir)
        passages, queries = open_builders("ms_marco", data_dir)
        assert passages.is_prepared()
        assert not queries.is_prepared()
        left = [path.name for path in (data_dir / "ms_marco").rglob("*") if "incomplete" in path.name]
        assert not left
    SCORES.find(epath.Path(files.folder)).write_bytes(good)
    assert all(builder.is_prepared() for builder in built(files, data_dir))


@pytest.mark.parametrize(
    "name", ["collection.tsv", "queries.train.tsv", "msmarco-hard-negatives.jsonl.gz", SCORES.names[0]]
)
def test_a_missing_file_is_named_with_where_to_get_it(files, tmp_path, name):
    (files.folder / name).unlink()
    with pytest.raises(InputError, match=rf"no {name}.* there; get it \([\d.]+ [GM]B\) from https://"):
        built(files, tmp_path / "tfds")


def test_a_query_without_its_text_is_an_error(files, tmp_path):
    path = files.folder / "queries.train.tsv"
    query = next(row["qid"] for row in files.rows if row["pos"])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(f"{query}\t")))
    with pytest.raises(InputError, match=f"{path}: no query {query}, which msmarco-hard-negatives"):
        built(files, tmp_path / "tfds")


def test_a_manual_directory_that_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty"):
        with pytest.raises(InputError, match=f"{name}: no such directory, or nothing in it"):
            prepare_dataset("ms_marco", data_dir=tmp_path, manual_dir=tmp_path / name)
    with pytest.raises(InputError, match="there is none of that name; there are ms_marco, all_nli"):
        prepare_dataset("msmarco", data_dir=tmp_path)


def test_the_addresses_are_those_of_the_publishers():
    found = [one.url for one in (ms_marco.COLLECTION, ms_marco.QUERIES, ms_marco.NEGATIVES, ms_marco.SCORES)]
    assert all(url.startswith("https://") and url.endswith(".gz") for url in found)
