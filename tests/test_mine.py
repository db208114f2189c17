"""`jaxembed mine` from files to a file, with a tiny model: against embeddings and a sort; killed and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxembed import mine
from jaxembed.__main__ import run_command
from jaxembed.data.beir import read_beir
from jaxembed.data.sources import read_rows
from jaxembed.embedder import Embedder

from runs import ENVIRONMENT, make_rows, write_base, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", make_rows(60))


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Embeds; the search is on all eight. Compiling for them takes longer than all of these tests."""
    with monkeypatch.context() as patch:
        patch.setattr("jaxembed.sharding.local_mesh", lambda: None)
        yield patch


def run(*arguments: object) -> int:
    return run_command(mine.main, [str(argument) for argument in arguments])


def nearest(model: Path, data: Path, document_role: str = "document") -> dict[str, list[str]]:
    """Of each query all documents of the file that do not answer it, best first, by the embedder's own numbers."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    documents = list(
        dict.fromkeys([row["positive"] for row in rows] + [row["negative"] for row in rows if "negative" in row])
    )
    queries = list(dict.fromkeys(row["anchor"] for row in rows))
    embedder = Embedder.from_pretrained(model)
    q, d = embedder.encode_query(queries), embedder.encode(documents, document_role)
    scores = (q.astype(float) @ d.astype(float).T).astype(np.float32)
    found = {}
    for query, row in zip(queries, scores):
        own = {each["positive"] for each in rows if each["anchor"] == query} | {query}
        order = np.argsort(-row, kind="stable")
        found[query] = [documents[index] for index in order if documents[index] not in own]
    return found


def test_the_nearest_documents_are_written(
    tmp_path: Path, model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mined.jsonl.gz"
    assert run("--model", model, "--data", data, "--output", output, "--negatives", 3, "--ranks", "2-9") == 0
    found = read_rows(output, name="mined")
    expected = nearest(model, data)
    pairs = [(row["anchor"], row["positive"]) for row in map(json.loads, data.read_text().splitlines())]
    assert list(zip(found.anchors, found.positives)) == pairs
    assert [list(negatives) for negatives in found.negatives] == [expected[anchor][1:4] for anchor, _ in pairs]
    printed = capsys.readouterr().out
    assert "ranks 2 to 9" in printed
    assert f"{output}: 60 rows, sentence-transformers" in printed
    assert "0 of 60 queries got fewer than the 3 negatives asked for" in printed


@pytest.mark.slow
def test_all_devices_embed(tmp_path: Path, model: Path, data: Path, one_device: pytest.MonkeyPatch) -> None:
    found = []
    for output in (tmp_path / "one.jsonl", tmp_path / "all.jsonl"):
        assert run("--model", model, "--data", data, "--output", output, "--format", "flagembedding", "--scores") == 0
        found.append([json.loads(line) for line in output.read_text().splitlines()])
        one_device.undo()
    for one, several in zip(*found, strict=True):
        assert one["neg"] == several["neg"]
        np.testing.assert_allclose(one["neg_scores"], several["neg_scores"], rtol=0, atol=2e-6)


def test_the_other_options(tmp_path: Path, model: Path, data: Path) -> None:
    arguments = ["--model", model, "--data", data, "--work", tmp_path / "work"]
    first = tmp_path / "first.jsonl"
    assert run(*arguments, "--output", first, "--symmetric", "--format", "flagembedding", "--scores") == 0
    expected = nearest(model, data, "query")
    for row in map(json.loads, first.read_text().splitlines()):
        assert row["neg"] == expected[row["query"]][:5]
        assert row["neg_scores"] == sorted(row["neg_scores"], reverse=True)
    drawn = [tmp_path / f"drawn-{seed}.jsonl" for seed in (0, 1)]
    for seed, output in enumerate(drawn):
        assert run(*arguments, "--output", output, "--sample", "--seed", seed, "--share", 0.99, "--only-full") == 0
    assert drawn[0].read_bytes() != drawn[1].read_bytes()
    assert run(*arguments, "--output", tmp_path / "near.jsonl", "--approximate", "--block", 16) == 0
    assert run(*arguments, "--output", tmp_path / "prompt.jsonl", "--query-prompt", "Find: ") == 0
    # Queries; documents as queries and as documents; queries with another prompt.
    assert len(list((tmp_path / "work").glob("queries-*"))) == 2
    assert len(list((tmp_path / "work").glob("documents-*"))) == 2


def test_a_corpus_and_cross_scores(tmp_path: Path, model: Path, data: Path) -> None:
    texts = [f"{row['hard']} more" for row in make_rows(40, seed=5)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"_id": f"p{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    scores = tmp_path / "scores.jsonl"
    with open(scores, "w") as file:
        for row in rows:
            for text, score in [(row["positive"], 9.0), *((text, i % 12) for i, text in enumerate(texts))]:
                file.write(json.dumps({"query": row["anchor"], "document": text, "score": score}) + "\n")
    output = tmp_path / "mined.jsonl"
    assert run(
        "--model", model, "--data", data, "--corpus", corpus, "--output", output, "--negatives", 30,
        "--cross-scores", scores, "--cross-margin", 3,
    ) == 0  # fmt: skip
    allowed = {text for i, text in enumerate(texts) if i % 12 <= 6}
    for negatives in read_rows(output, name="mined").negatives:
        assert set(negatives) == allowed


def test_a_beir_folder_gets_negatives_by_id(tmp_path: Path, model: Path, data: Path) -> None:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    documents = list(dict.fromkeys(row["positive"] for row in rows))
    queries = list(dict.fromkeys(row["anchor"] for row in rows))
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"p{i}", "text": text} for i, text in enumerate(documents)])
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": text} for i, text in enumerate(queries)])
    judged = {(queries.index(row["anchor"]), documents.index(row["positive"])) for row in rows}
    lines = "".join(f"q{query}\tp{document}\t1\n" for query, document in sorted(judged))
    (folder / "qrels" / "train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{lines}")
    output = tmp_path / "mined.jsonl"
    assert run("--model", model, "--data", folder, "--output", output, "--format", "beir", "--ranks", "1-20") == 0
    found = read_beir(folder, name="mined", mined=output, cache_dir=tmp_path / "cache")
    expected = nearest(model, data)
    for anchor, negatives in zip(found.anchors, found.negatives):
        assert list(negatives) == expected[anchor][:5]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, model: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", make_rows(40))
    texts = [{"id": str(number), "text": f"{row['positive']} {number}"} for number, row in enumerate(make_rows(10_000))]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts)
    arguments = ["--model", model, "--data", data, "--corpus", corpus]
    command = [sys.executable, "-m", "jaxembed.mine", *map(str, arguments), "--output", str(tmp_path / "killed.jsonl")]
    process = subprocess.Popen(
        command, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    work = tmp_path / "killed.jsonl.work"
    try:
        deadline = time.monotonic() + 120
        while not list(work.glob("documents-*/progress.json")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed.jsonl").exists()
    done = json.loads(next(work.glob("documents-*/progress.json")).read_text())["done"]
    assert done >= 8192
    kept = {file: file.stat().st_mtime_ns for file in work.glob("queries-*/progress.json")}
    assert kept
    for name in ("killed", "whole"):
        command[-1] = str(tmp_path / f"{name}.jsonl")
        subprocess.run(command, env=os.environ | ENVIRONMENT, check=True, capture_output=True)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "30"], "--ranks: expected two ranks such as 30-100, found '30'"),
        (["--ranks", "9-3"], "ranks: expected 1 ≤ first ≤ last"),
        (["--share", "2"], "share of the positive's score"),
        (["--cross-margin", "3"], "--cross-scores and --cross-margin have to be given together"),
        (["--negatives", "0"], "number of negatives"),
        (["--format", "beir"], "--format beir: writes ids only"),
        (["--format", "gritlm", "--scores"], "has no place for scores"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--model", "./nowhere"], "./nowhere: expected the directory of a model"),
        (["--output", "mined.txt"], "mined.txt: expected a name that ends in"),
    ],
)
def test_errors_come_before_the_work(
    tmp_path: Path, model: Path, data: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = ["--model", model, "--data", data, "--output", tmp_path / "mined.jsonl", *arguments]
    assert run(*given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "mined.jsonl").exists()
    assert not list(tmp_path.glob("*.work/documents-*"))
