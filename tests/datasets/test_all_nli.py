import functools
import gzip
import http.server
import threading

import numpy as np
import pytest
from etils import epath

from jaxembed.datasets import all_nli
from jaxembed.datasets.all_nli import draw_triples, read_judgements
from jaxembed.datasets.originals import Original
from jaxembed.datasets.prepared import open_builders, prepare_dataset
from jaxembed.errors import InputError

from originals import write_all_nli


def ancestor(rows):
    """Each sentence's entailments and contradictions, as `training_nli_v2.py` collects them, in its order."""
    found = {}
    for row in rows:
        if row["split"] == "train":
            one, other = row["sentence1"].strip(), row["sentence2"].strip()
            for left, right in ((one, other), (other, one)):
                labels = found.setdefault(left, {"entailment": set(), "contradiction": set(), "neutral": set()})
                labels[row["label"]].add(right)
    return {one: labels for one, labels in found.items() if labels["entailment"] and labels["contradiction"]}


def write(path, text):
    path.write_bytes(gzip.compress(text.encode()))
    return epath.Path(path)


def triples_of(path, seed=0):
    judgements = read_judgements(epath.Path(path))
    return [tuple(judgements.sentences[i] for i in row) for row in draw_triples(judgements, seed)]


@pytest.mark.parametrize("seed", range(4))
def test_triples_are_the_ancestors(tmp_path, seed):
    expected = ancestor(write_all_nli(tmp_path, rows=150, seed=seed))
    triples = triples_of(tmp_path / "AllNLI.tsv.gz")
    assert len(triples) == 2 * len(expected) > 10
    for (anchor, positive, negative), (other, turned, far), sentence in zip(triples[::2], triples[1::2], expected):
        assert anchor == turned == sentence
        assert {positive, other} <= expected[sentence]["entailment"]
        assert {negative, far} <= expected[sentence]["contradiction"]


def test_draws_are_even_and_each_its_own(tmp_path):
    header = "split\tdataset\tfilename\tsentence1\tsentence2\tlabel\n"
    rows = "".join(
        f"train\tSNLI\tx\tanchor\t{label} {number}\t{label}\n"
        for label in ("entailment", "contradiction")
        for number in range(4)
    )
    path = write(tmp_path / "AllNLI.tsv.gz", header + rows)
    drawn = [triple for seed in range(300) for triple in triples_of(path, seed)]
    counts = {}
    for anchor, positive, negative in drawn:
        for text in (anchor, positive, negative):
            counts[text] = counts.get(text, 0) + 1
    assert counts.pop("anchor") == 600
    assert len(counts) == 8
    assert all(110 < count < 190 for count in counts.values())
    same = sum(one[1:] == (other[0], other[2]) for one, other in zip(drawn[::2], drawn[1::2]))
    assert same < 40  # of 300, 1 in 16 by chance


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train\ta\tb", "expected 4 columns, found 3"),
        ("train\ta\tb\tentailment\tmore", "expected 4 columns, found 5"),
        ("train\ta\tb\tmaybe", "label: expected one of contradiction, entailment, neutral, found 'maybe'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "x.gz", f"split\tsentence1\tsentence2\tlabel\ndev\ta\tb\t-\n{line}\n")
    with pytest.raises(InputError, match=f"{path}:3: {message}"):
        read_judgements(path)


def test_the_header_names_the_columns(tmp_path):
    path = write(tmp_path / "x.gz", "split\tsentence1\tlabel\n")
    with pytest.raises(InputError, match=f"{path}:1: expected the columns .* found no sentence2"):
        read_judgements(path)
    with pytest.raises(InputError, match=":1: expected the columns"):
        read_judgements(write(path, ""))


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes(b"split\tsentence1\tsentence2\tlabel\ntrain\ta\t\xff\tneutral\n")
    with pytest.raises(InputError, match=f"{path}:2: not UTF-8"):
        read_judgements(epath.Path(path))


def test_tfds_reads_what_was_written(tmp_path):
    write_all_nli(tmp_path / "originals")
    (builder,) = prepare_dataset("all_nli", data_dir=tmp_path, manual_dir=tmp_path / "originals")
    assert builder.info.full_name == "all_nli/1.0.0"
    found = [
        tuple(row[k].decode() for k in ("anchor", "positive", "negative")) for row in builder.as_data_source("train")
    ]
    assert found == triples_of(tmp_path / "originals" / "AllNLI.tsv.gz")


def test_a_file_without_triples_is_an_error(tmp_path):
    (tmp_path / "originals").mkdir()
    write(
        tmp_path / "originals" / "AllNLI.tsv.gz",
        "split\tsentence1\tsentence2\tlabel\ntrain\ta\tb\tentailment\ntrain\tc\td\tcontradiction\n",
    )
    with pytest.raises(InputError, match="no sentence with both an entailment and a contradiction"):
        prepare_dataset("all_nli", data_dir=tmp_path, manual_dir=tmp_path / "originals")
    assert not open_builders("all_nli", tmp_path)[0].is_prepared()


@pytest.fixture
def server(tmp_path):
    """A folder that is served on this machine, and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_without_a_manual_directory_the_file_is_downloaded(tmp_path, server, monkeypatch):
    folder, address = server
    original = Original(all_nli.ALL_NLI.names, f"{address}/AllNLI.tsv.gz", "41 MB")
    monkeypatch.setattr(all_nli, "ALL_NLI", original)
    with pytest.raises(InputError, match=rf"{address}/AllNLI.tsv.gz: cannot be downloaded .*41 MB.*--manual-dir"):
        prepare_dataset("all_nli", data_dir=tmp_path / "tfds")
    write_all_nli(folder)
    (builder,) = prepare_dataset("all_nli", data_dir=tmp_path / "tfds")
    assert len(builder.as_data_source("train")) == len(triples_of(folder / "AllNLI.tsv.gz"))
    assert np.all([path.stat().st_size for path in (tmp_path / "tfds" / "downloads").rglob("*.gz")])
