"""`jaxembed search`: exact hits with their texts, embeddings that are used again, and its messages."""

import dataclasses
import gzip
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxembed import encode, search
from jaxembed.__main__ import run_command
from jaxembed.embedder import Embedder
from jaxembed.encoding import job
from jaxembed.errors import InputError
from jaxembed.evaluation.searching import open_corpus

from runs import make_rows, write_base, write_jsonl

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = [{"_id": f"d{n}", "text": f"{row['positive']} {n}"} for n, row in enumerate(make_rows(90))]
QUERIES = [ROWS[17]["text"], "abc def", ""]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[tuple[str, float]]]:
    """Ids and cosines of the ten best of each query, by sorting all in float64."""
    embedder = Embedder.from_pretrained(model)
    queries = embedder.encode_query(QUERIES).astype(np.float64)
    documents = embedder.encode_document([row["text"] for row in ROWS]).astype(np.float64)
    found = []
    for query in queries:
        cosines = documents @ query / np.linalg.norm(documents, axis=1) / np.linalg.norm(query)
        found.append([(ROWS[row]["_id"], cosines[row]) for row in np.argsort(-cosines)[:10]])
    return found


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", ROWS)


def run(*arguments: object) -> int:
    return run_command(search.main, [str(argument) for argument in arguments])


def found(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[list[dict[str, Any]]]:
    """The hits of each query."""
    capsys.readouterr()
    assert run("--json", *arguments) == 0
    return [json.loads(line)["hits"] for line in capsys.readouterr().out.splitlines()]


def check(hits: list[list[dict[str, Any]]], expected: list[list[tuple[str, float]]], texts: bool = True) -> None:
    text = {row["_id"]: row["text"] for row in ROWS}
    assert [[hit["id"] for hit in some] for some in hits] == [[one for one, _ in some] for some in expected]
    for some, wanted in zip(hits, expected):
        np.testing.assert_allclose([hit["score"] for hit in some], [cosine for _, cosine in wanted], atol=2e-6)
        assert all(hit["text"] == (text[hit["id"]] if texts else None) for hit in some)


@pytest.fixture
def no_embedding(monkeypatch: pytest.MonkeyPatch) -> Any:
    """From its call on a text that is embedded as a document is a failure."""

    def forbid() -> None:
        encode = Embedder.encode

        def refuse(self: Embedder, sentences: Any, prompt_name: str | None = None, *args: Any, **options: Any) -> Any:
            assert prompt_name != "document" or not list(sentences), "embedded again"
            return encode(self, sentences, prompt_name, *args, **options)

        monkeypatch.setattr(Embedder, "encode", refuse)

    return forbid


def test_embedded_once(
    model: Path, corpus: Path, expected: Any, capsys: pytest.CaptureFixture[str], no_embedding: Any
) -> None:
    given = ("--model", model, "--corpus", corpus, *QUERIES)
    check(found(capsys, *given), expected)
    [directory] = corpus.with_name("corpus.jsonl.index").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in directory.glob("embeddings*")}
    assert before
    no_embedding()
    check(found(capsys, *given, "--top-k", 3), [some[:3] for some in expected])
    assert before == {path.name: path.stat().st_mtime_ns for path in directory.glob("embeddings*")}


def test_one_corpus_by_two_names(
    monkeypatch: pytest.MonkeyPatch, model: Path, corpus: Path, expected: Any, capsys: Any, no_embedding: Any
) -> None:
    monkeypatch.chdir(corpus.parent)
    check(found(capsys, "--model", model, "--corpus", corpus.name, *QUERIES), expected)
    no_embedding()
    check(found(capsys, "--model", model, "--corpus", corpus, *QUERIES), expected)


def test_a_corpus_that_changes_while_it_is_open(
    model: Path, corpus: Path, expected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    embedder = Embedder.from_pretrained(model)
    opened = open_corpus(str(corpus), embedder)
    query = embedder.encode_query(QUERIES[:1])
    [before] = opened.search(query, 3)
    write_jsonl(corpus, ROWS[::-1])
    [changed] = opened.search(query, 3)
    corpus.unlink()
    [gone] = opened.search(query, 3)
    assert [hit.id for hit in before] == [one for one, _ in expected[0][:3]]
    assert before[0].text == QUERIES[0]
    assert changed == gone == [dataclasses.replace(hit, text=None) for hit in before]
    assert [message for message in caplog.messages if "without texts" in message] == [
        f"{corpus} was changed since, so ids are shown without texts"
    ]


def test_damaged_embeddings_are_made_anew_as_the_message_says(
    model: Path, corpus: Path, expected: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--model", model, "--corpus", corpus, *QUERIES)
    assert run(*given) == 0
    [shard] = corpus.with_name("corpus.jsonl.index").glob("*/*.npy")
    shard.write_bytes(shard.read_bytes()[:200])
    assert run(*given) == 2
    assert f"{shard}: embeddings that cannot be read" in (said := capsys.readouterr().err)
    assert "remove it, of .npy also the .ids.json beside it, then encode the corpus again" in said
    shard.unlink()
    shard.with_suffix(".ids.json").unlink()
    check(found(capsys, *given), expected)


def test_what_has_changed_is_embedded_anew(
    tmp_path: Path, model: Path, corpus: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "jaxembed")
    index = tmp_path / "kept"
    given = ("--corpus", corpus, "--index", index, "--top-k", 1, QUERIES[0])
    [[first]] = found(capsys, "--model", model, *given)
    other = write_base(tmp_path / "other", scale=0.3)
    [[second]] = found(capsys, "--model", other, *given)
    assert first["id"] == second["id"] == "d17"
    assert first["score"] != second["score"]
    write_jsonl(corpus, ROWS[:17] + ROWS[18:])
    [[third]] = found(capsys, "--model", model, *given)
    assert third["id"] != "d17"
    assert len(list(index.iterdir())) == 3
    assert caplog.text.count("of another model or another version of the corpus; embedding anew") == 2
    assert not (tmp_path / "corpus.jsonl.index").exists()


def test_killed_while_it_embeds(
    monkeypatch: pytest.MonkeyPatch, model: Path, corpus: Path, expected: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "_finish", lambda *_: pytest.fail("killed"))
    given = ("--model", model, "--corpus", corpus, *QUERIES)
    with pytest.raises(pytest.fail.Exception):
        run(*given)
    monkeypatch.undo()
    check(found(capsys, *given), expected)


@pytest.mark.parametrize("kind", [pytest.param("csv.gz", marks=pytest.mark.slow), "parquet", "txt"])
def test_kinds_of_files(tmp_path: Path, model: Path, expected: Any, capsys: Any, kind: str) -> None:
    path = tmp_path / f"corpus.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "txt":
        path.write_text("\n".join(row["text"] for row in ROWS))
        expected = [[(f"corpus.txt:{int(one[1:]) + 1}", cosine) for one, cosine in some] for some in expected]
    else:
        lines = ["key,passage\n", *(f'{row["_id"]},"{row["text"]}"\n' for row in ROWS)]
        path.write_bytes(gzip.compress("".join(lines).encode()))
    fields = ("--id-field", "key") if kind == "csv.gz" else ()
    hits = found(capsys, "--model", model, "--corpus", path, *fields, *QUERIES)
    assert [[(hit["id"], hit["text"]) for hit in some] for some in hits] == [
        [(one, ROWS[int(one.split(":")[-1]) - 1 if kind == "txt" else int(one[1:])]["text"]) for one, _ in some]
        for some in expected
    ]


@pytest.mark.parametrize("format", ["parquet", pytest.param("npy", marks=pytest.mark.slow)])
def test_a_folder_that_encode_wrote(
    tmp_path: Path, model: Path, corpus: Path, expected: Any, capsys: Any, caplog: Any, no_embedding: Any, format: str
) -> None:
    """Of four shards, rows that could not be read among them, all those of one."""
    lines = [line for pair in zip(corpus.read_text().splitlines(), ["{"] * 40) for line in pair]
    lines += corpus.read_text().splitlines()[40:]
    lines[100:100] = ["{"] * 50
    corpus.write_text("\n".join(lines))
    folder = tmp_path / "embeddings"
    given = ("--model", model, "--input", corpus, "--output", folder, "--format", format, "--shard-size", 50)
    assert encode.main([*map(str, given), "--bad-rows", "skip"]) == 0
    no_embedding()
    given = ("--model", model, "--corpus", folder, *QUERIES)
    check(found(capsys, *given), expected)
    corpus.unlink()
    check(found(capsys, *given), expected, texts=False)
    assert "corpus.jsonl is not there any more, so ids are shown without texts" in caplog.text


@pytest.mark.slow
def test_a_cut_width_is_taken_for_queries_too(tmp_path: Path, model: Path, corpus: Path, capsys: Any) -> None:
    folder = tmp_path / "embeddings"
    given = ("--model", model, "--input", corpus, "--output", folder, "--truncate-dim", 5)
    assert encode.main([*map(str, given)]) == 0
    [[hit]] = found(capsys, "--model", model, "--corpus", folder, "--top-k", 1, QUERIES[1])
    embedder = Embedder.from_pretrained(model)
    documents = embedder.encode_document([row["text"] for row in ROWS], truncate_dim=5)
    cosines = embedder.similarity(embedder.encode_query([QUERIES[1]], truncate_dim=5), documents)[0]
    assert hit["id"] == ROWS[int(cosines.argmax())]["_id"]
    assert hit["score"] == pytest.approx(cosines.max(), abs=2e-6)


def test_folders_that_do_not_fit(tmp_path: Path, model: Path, corpus: Path, capsys: Any) -> None:
    folder, other = tmp_path / "embeddings", write_base(tmp_path / "other", scale=0.3)
    assert encode.main(["--model", str(model), "--input", str(corpus), "--output", str(folder)]) == 0

    def message(*arguments: object) -> str:
        capsys.readouterr()
        assert run("query", "--model", model, "--corpus", folder, *arguments) == 2
        return capsys.readouterr().err

    assert "embeddings of another model, weights " in message("--model", other)
    assert "--index: the folder " in message("--index", tmp_path)
    assert "--symmetric: the folder " in message("--symmetric")
    manifest = json.loads((folder / "manifest.json").read_text())
    for change, wanted in (
        ({"complete": False}, "not complete; start `jaxembed encode` again"),
        ({"job": manifest["job"] | {"precision": "int8"}}, "embeddings in int8; search needs float32"),
        ({"job": manifest["job"] | {"tokenizer and text format": "1"}}, "embedded by another tokenizer or text format"),
        ({"parts": 3}, "manifest.json: cannot be read"),
    ):
        (folder / "manifest.json").write_text(json.dumps(manifest | change))
        assert wanted in message()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    [shard] = folder.glob("*.parquet")
    shard.write_bytes(shard.read_bytes()[:1000])
    assert f"{shard}: embeddings that cannot be read" in message()
    shutil.rmtree(folder)
    folder.mkdir()
    assert "a folder without manifest.json; expected a file, a pattern" in message()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["q", "--corpus", "nowhere.jsonl"], "error: --corpus nowhere.jsonl: no such file"),
        (["q", "--corpus", "~nouser/corpus.jsonl"], "error: --corpus ~nouser/corpus.jsonl: no such file"),
        (["q", "--model", "./nowhere"], "./nowhere: expected the directory of a model"),
        (["q", "--top-k", "0"], "--top-k: expected a whole number of at least 1, found 0"),
        ([], "no query; give one, in quotes, or --interactive"),
        (["q", "--text-field", "body"], "corpus.jsonl:1: expected the keys 'body', found '_id', 'text'"),
        (["q", "--index", "gs://bucket/index"], "give a local --index"),
    ],
)
def test_errors(model: Path, corpus: Path, capsys: Any, arguments: list[str], message: str) -> None:
    assert run("--model", model, "--corpus", corpus, *arguments) == 2
    assert message in capsys.readouterr().err


def test_interactive(
    monkeypatch: pytest.MonkeyPatch, model: Path, corpus: Path, expected: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"\n{QUERIES[0]}\n   \n{QUERIES[1]}\n"))
    check(
        found(capsys, "--model", model, "--corpus", corpus, "--interactive", QUERIES[2]), [expected[2], *expected[:2]]
    )


def test_a_bad_query_does_not_end_the_session(
    monkeypatch: pytest.MonkeyPatch, model: Path, corpus: Path, expected: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    encode_query = Embedder.encode_query

    def refuse(self: Embedder, sentences: Any, **options: Any) -> Any:
        if sentences == ["bad"]:
            raise InputError("no such word")
        return encode_query(self, sentences, **options)

    monkeypatch.setattr(Embedder, "encode_query", refuse)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"bad\n{QUERIES[0]}\n"))
    assert run("--json", "--model", model, "--corpus", corpus, "--interactive") == 1
    said = capsys.readouterr()
    check([json.loads(line)["hits"] for line in said.out.splitlines()], expected[:1])
    assert "error: 'bad': no such word\n" in said.err


def test_a_query_that_is_not_utf_8(
    monkeypatch: pytest.MonkeyPatch, model: Path, corpus: Path, expected: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Is refused, typed or given as an argument; the queries after it are answered."""
    typed = b"\xff\xfe bad\n" + QUERIES[0].encode() + b"\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    assert run("--json", "--model", model, "--corpus", corpus, "--interactive") == 1
    said = capsys.readouterr()
    check([json.loads(line)["hits"] for line in said.out.splitlines()], expected[:1])
    assert r"error: '\udcff\udcfe bad': a query that is not UTF-8" in said.err
    assert run("--model", model, "--corpus", corpus, b"caf\xe9".decode(errors="surrogateescape")) == 2
    assert capsys.readouterr().err.endswith("error: a query that is not UTF-8\n")


def test_lines(monkeypatch: pytest.MonkeyPatch, model: Path, corpus: Path, capsys: Any) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    assert run("--model", model, "--corpus", corpus, "--top-k", 2, QUERIES[0]) == 0
    first, one, two, *rest = capsys.readouterr().out.split("\n")
    assert first == QUERIES[0]
    assert one.startswith("   1  ")
    assert f"  d17  {QUERIES[0]}"[:50] in one
    assert two.startswith("   2  ")
    assert len(one) <= 70
    assert rest == ["", ""]
