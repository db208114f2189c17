import gzip
import shutil

import numpy as np
import pytest

from jaxembed.data.sources import DUPLICATE, EMPTY_TEXT, SAME_TEXT
from jaxembed.datasets import builders
from jaxembed.datasets.ms_marco import NO_POSITIVE
from jaxembed.datasets.prepared import open_builders, prepare_dataset, read_prepared
from jaxembed.errors import InputError

from originals import write_all_nli, write_ms_marco


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="module")
def marco(home):
    files = write_ms_marco(home / "marco")
    before, builders.SHARD_ROWS = builders.SHARD_ROWS, 16
    prepare_dataset("ms_marco", data_dir=home / "tfds", manual_dir=files.folder)
    builders.SHARD_ROWS = before
    return files


def test_ms_marco_is_read_by_id(home, marco):
    examples = read_prepared("ms_marco", name="marco", data_dir=home / "tfds")
    rows = list(open_builders("ms_marco", home / "tfds")[1].as_data_source("train"))
    assert len(examples) == len(rows) > 10
    assert examples.recognised == "MS MARCO with hard negatives"
    for place, row in enumerate(rows):
        assert examples.anchors[place] == marco.queries[row["query_id"]]
        assert examples.ids[place] == f"ms_marco:{row['query_id']}"
        assert examples.positives[place] == marco.passages[row["positive_ids"][0]]
        assert list(examples.negatives[place]) == [marco.passages[one] for one in row["negative_ids"]]
    assert examples.dropped[NO_POSITIVE] == 3
    assert examples.positives.rows.tolist() == [row["positive_ids"][0] for row in rows]


def test_texts_are_read_by_row_and_together(home, marco):
    store = read_prepared("ms_marco", name="marco", data_dir=home / "tfds").positives.store
    assert len(store) == len(marco.passages)
    assert list(store) == marco.passages
    rows = np.random.default_rng(0).integers(0, len(store), 50)
    assert store.texts(rows) == [marco.passages[row] for row in rows]
    assert store.texts([]) == []
    for row in (-1, len(store)):
        with pytest.raises(IndexError):
            store[row]


def test_all_nli_is_read_with_what_was_dropped(tmp_path):
    write_all_nli(tmp_path / "nli")
    path = tmp_path / "nli" / "AllNLI.tsv.gz"
    more = [
        ("a", "b", "entailment"),
        ("a", "c", "contradiction"),
        ("b", "c", "contradiction"),
    ]  # a → b, b → a, twice each
    more += [
        ("d", "d", "entailment"),
        ("d", "c", "contradiction"),
        ("e", "", "entailment"),
        ("e", "c", "contradiction"),
    ]
    lines = "".join(f"train\tSNLI\tx\t{one}\t{other}\t{label}\n" for one, other, label in more)
    path.write_bytes(path.read_bytes() + gzip.compress(lines.encode()))
    (builder,) = prepare_dataset("all_nli", data_dir=tmp_path, manual_dir=tmp_path / "nli")
    expected, dropped = {}, {EMPTY_TEXT: 0, SAME_TEXT: 0, DUPLICATE: 0}
    for number, row in enumerate(builder.as_data_source("train")):
        anchor, positive, negative = (row[key].decode() for key in ("anchor", "positive", "negative"))
        reason = SAME_TEXT if anchor == positive else DUPLICATE if (anchor, positive) in expected else None
        reason = reason if anchor and positive else EMPTY_TEXT
        if reason:
            dropped[reason] += 1
        else:
            expected[anchor, positive] = negative, number
    examples = read_prepared("all_nli", name="nli", data_dir=tmp_path)
    assert list(zip(examples.anchors, examples.positives)) == list(expected)
    assert examples.negatives == [(negative,) for negative, _ in expected.values()]
    assert examples.ids == [f"all_nli:{number}" for _, number in expected.values()]
    assert examples.dropped == {reason: count for reason, count in dropped.items() if count}
    assert dropped[SAME_TEXT] >= 2
    assert dropped[DUPLICATE] >= 2
    assert dropped[EMPTY_TEXT] == 2


def test_a_split_takes_part_of_it(home, marco):
    whole, part, rest = (
        read_prepared("ms_marco", name="m", data_dir=home / "tfds", split=split)
        for split in ("train", "train[:5]", "train[5:]")
    )
    assert part.anchors == whole.anchors[:5]
    assert rest.anchors == whole.anchors[5:]
    assert [list(row) for row in part.negatives] == [list(row) for row in whole.negatives[:5]]
    assert len({whole.fingerprint, part.fingerprint, rest.fingerprint}) == 3
    for split in ("test", "train[", "train[:0]"):
        with pytest.raises(InputError, match="data source 'm'"):
            read_prepared("ms_marco", name="m", data_dir=home / "tfds", split=split)


def test_the_fingerprint_follows_the_content_not_the_place(home, marco, tmp_path):
    def fingerprint(data_dir):
        return read_prepared("ms_marco", name="marco", data_dir=data_dir).fingerprint

    before = fingerprint(home / "tfds")
    shutil.copytree(home / "tfds", tmp_path / "copied")
    assert fingerprint(tmp_path / "copied") == before
    other = write_ms_marco(tmp_path / "other", seed=1)
    prepare_dataset("ms_marco", data_dir=tmp_path / "tfds", manual_dir=other.folder)
    assert fingerprint(tmp_path / "tfds") != before


def test_what_is_not_prepared_is_prepared_from_a_manual_directory(marco, tmp_path):
    with pytest.raises(
        InputError, match=r"ms_marco is not prepared in .*jaxembed\.prepare --dataset ms_marco --data-dir"
    ):
        read_prepared("ms_marco", name="marco", data_dir=tmp_path)
    examples = read_prepared("ms_marco", name="marco", data_dir=tmp_path, manual_dir=marco.folder)
    assert len(examples) > 10
    assert read_prepared("ms_marco", name="marco", data_dir=tmp_path).fingerprint == examples.fingerprint
