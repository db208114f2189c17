"""A corpus to shards: against `Embedder.encode`, in every format; interrupted, and begun with something wrong."""

import copy
import csv
import dataclasses
import errno
import gzip
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from flax import nnx

from jaxembed import hosts, quantize_embeddings
from jaxembed.data.formats import title_and_text
from jaxembed.embedder import Embedder
from jaxembed.encoding import job
from jaxembed.encoding.job import Options, Summary, encode_corpus
from jaxembed.encoding.manifest import Manifest, read_manifest, read_ranges, write_manifest
from jaxembed.encoding.readers import Fields, find_files
from jaxembed.errors import InputError

from buckets import Bucket
from runs import make_rows, write_base, write_jsonl

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = [
    {"_id": f"d{number}", "title": row["anchor"] if number % 3 else "", "text": row["positive"]}
    for number, row in enumerate(make_rows(60))
]
TEXTS = [title_and_text(row["title"], row["text"]) for row in ROWS]
IDS = [row["_id"] for row in ROWS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    return Embedder.from_pretrained(write_base(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def expected(model: Embedder) -> np.ndarray:
    return model.encode_document(TEXTS)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", ROWS)


def encode(model: Embedder, files: Any, output: Any, **options: Any) -> Summary:
    given = [str(file) for file in (files if isinstance(files, list) else [files])]
    return encode_corpus(Options(given, str(output), **options), lambda: model, progress=False)


def read(directory: Any) -> tuple[list[str], np.ndarray]:
    """Ids and embeddings of all shards in their order, as pyarrow and numpy read them."""
    directory, ids, vectors = epath.Path(directory), [], []
    for name in json.loads((directory / "manifest.json").read_text())["shards"]:
        if name.endswith(".npy"):
            ids += json.loads((directory / name.replace(".npy", ".ids.json")).read_text())
            with (directory / name).open("rb") as file:
                vectors.append(np.load(file))
            continue
        with (directory / name).open("rb") as file:
            table = pq.read_table(file)
        assert table.schema.field("id").type == pa.string()
        embedding = table.column("embedding").combine_chunks()
        width = embedding.type.list_size
        ids += table.column("id").to_pylist()
        vectors.append(embedding.flatten().to_numpy().reshape(-1, width))
    return ids, np.concatenate(vectors)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def write_corpus(folder: Path, kind: str) -> Path:
    """The corpus in another kind of file."""
    path = folder / f"corpus.{kind}"
    lines = [json.dumps(row) for row in ROWS]
    if kind == "tsv":
        lines = ["\t".join(ROWS[0]), *("\t".join(row.values()) for row in ROWS)]
    elif kind == "headless.tsv":
        lines = ["\t".join(row.values()) for row in ROWS]
    elif kind.startswith("txt"):
        lines = [text.replace("\n", " ") for text in TEXTS]
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
        return path
    elif kind == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
        return path
    data = ("\n\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "tsv", "headless.tsv", "csv", "parquet", "txt", "txt.gz"])
def test_every_kind_of_file(tmp_path: Path, model: Embedder, expected: np.ndarray, kind: str) -> None:
    path = write_corpus(tmp_path, kind)
    encode(model, path, tmp_path / "out", shard_size=17)
    ids, vectors = read(tmp_path / "out")
    lines = [f"{path.name}:{2 * number + 1}" for number in range(len(TEXTS))]  # between blank ones
    assert ids == (lines if kind.startswith("txt") else IDS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("format", ["parquet", "npy"])
@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_every_precision(tmp_path: Path, model: Embedder, corpus: Path, precision: Any, format: Any) -> None:
    options = {"precision": precision, "format": format, "truncate_dim": 12, "role": "query", "prompt": "Find: "}
    encode(model, corpus, tmp_path / "out", **options)
    floats = model.encode_query(TEXTS, prompt="Find: ", truncate_dim=12)
    ids, vectors = read(tmp_path / "out")
    found = quantize_embeddings(floats, precision)
    assert (ids, vectors.dtype) == (IDS, found.dtype)
    np.testing.assert_array_equal(vectors, found)


def test_ranges_are_those_of_a_sample_or_of_another_job(
    tmp_path: Path, model: Embedder, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxembed.encoding.job.CALIBRATION_TEXTS", 20)
    encode(model, corpus, tmp_path / "int8", precision="int8", shard_size=16)
    ranges = read_ranges(tmp_path / "int8")
    floats = model.encode_document(TEXTS)
    assert (ranges[0] >= floats.min(0) - 1e-6).all()
    assert (ranges[1] <= floats.max(0) + 1e-6).all()
    assert np.abs(ranges - [floats.min(0), floats.max(0)]).max() > 1e-3  # of 20 texts
    encode(model, corpus, tmp_path / "again", precision="int8", shard_size=16)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "int8")
    encode(
        model, corpus, tmp_path / "queries", precision="int8", role="query", fields=Fields(text="text"), ranges=ranges
    )
    expected = model.encode_query(TEXTS, precision="int8", ranges=ranges)
    np.testing.assert_array_equal(read(tmp_path / "queries")[1], expected)
    np.testing.assert_array_equal(read_ranges(tmp_path / "int8", model.model_hash), ranges)
    with pytest.raises(
        InputError, match=rf"another model, whose .* hash {model.model_hash}; those of this one have ab"
    ):
        read_ranges(tmp_path / "int8", "ab")
    encode(model, corpus, tmp_path / "floats")
    with pytest.raises(InputError, match="expected the output directory of a job in int8 or uint8"):
        read_ranges(tmp_path / "floats")


def test_several_files_are_one_corpus(tmp_path: Path, model: Embedder, expected: np.ndarray) -> None:
    for folder, rows in (("b", ROWS[:25]), ("a", ROWS[25:40]), ("c", [])):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "part.jsonl", rows)
    (tmp_path / "rest.txt").write_text("".join(f"{text}\n" for text in TEXTS[40:]))
    files = [tmp_path / "b/part.jsonl", f"{tmp_path}/[abc]/*.jsonl", tmp_path / "*.txt"]
    summary = encode(model, files, tmp_path / "out", shard_size=16)
    ids, vectors = read(tmp_path / "out")
    assert ids == [*IDS[:40], *(f"rest.txt:{number}" for number in range(1, 21))]
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-6)
    assert (summary.texts, summary.manifest.texts, len(summary.manifest.shards)) == (60, 60, 4)
    tokens = sum(map(len, model.tokenizer(TEXTS, "document")))
    assert summary.tokens == tokens
    # One name in two folders cannot stand for both.
    plain = [{"text": row["text"]} for row in ROWS]
    same = [write_jsonl(tmp_path / folder / "part.jsonl", plain[:2]) for folder in "ab"]
    encode(model, same, tmp_path / "same")
    assert read(tmp_path / "same")[0] == [f"{path}:{line}" for path in same for line in (1, 2)]


def test_columns_by_name(tmp_path: Path, model: Embedder) -> None:
    rows = [{"key": number, "body": row["text"], "head": row["title"], "title": "x"} for number, row in enumerate(ROWS)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    encode(model, path, tmp_path / "out", fields=Fields("key", "body", "head"))
    ids, vectors = read(tmp_path / "out")
    assert ids == [str(number) for number in range(60)]
    np.testing.assert_array_equal(vectors, model.encode_document(TEXTS))
    encode(model, path, tmp_path / "untitled", fields=Fields("key", "body", ""))
    np.testing.assert_array_equal(read(tmp_path / "untitled")[1], model.encode_document([row["body"] for row in rows]))
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"qid": "q", "query": "how"}])
    encode(model, queries, tmp_path / "queries", role="query")
    assert read(tmp_path / "queries")[0] == ["q"]
    for fields, message in (
        (Fields(id="name"), r"rows.jsonl:1: expected the keys 'name' and 'text'.*found 'key', 'body', 'head', 'title'"),
        (Fields(text="words"), r"rows.jsonl:1: expected the keys 'words', found"),
        (Fields("key", "body", "heading"), r"rows.jsonl:1: no column 'heading' of titles, found 'key'"),
    ):
        with pytest.raises(InputError, match=message):
            encode(model, path, tmp_path / "wrong", fields=fields)


def test_columns_of_tables_without_header(tmp_path: Path, model: Embedder) -> None:
    titled, named = tmp_path / "titled.tsv", tmp_path / "named.tsv"
    titled.write_text("".join(f"{row['_id']}\t{row['title']}\t{row['text']}\n" for row in ROWS[:4]))
    encode(model, titled, tmp_path / "out", fields=Fields(title=""))
    np.testing.assert_array_equal(read(tmp_path / "out")[1], model.encode_document([row["text"] for row in ROWS[:4]]))
    named.write_text("docno\tbody\nd1\thello\n")
    for path, fields, message in (
        (named, Fields("docid", "body"), "named.tsv:1: no column 'docid', so the file is taken for one without header"),
        (named, Fields(text="bdy"), "named.tsv:1: no column '_id' or .* or 'bdy', so the file is taken"),
        (titled, Fields(title="head"), "titled.tsv:1: no column .*--title-field name need a header"),
    ):
        with pytest.raises(InputError, match=message):
            encode(model, path, tmp_path / "wrong", fields=fields)
    encode(model, named, tmp_path / "named", fields=Fields("docno", "body"))
    assert read(tmp_path / "named")[0] == ["d1"]


def test_one_file_by_several_names(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["corpus.jsonl", str(corpus), "./corpus.jsonl", f"{tmp_path}/../{tmp_path.name}/*.jsonl"]
    assert [file.path for file in find_files(names)] == ["corpus.jsonl"]
    assert [file.path for file in find_files(names[1:])] == [str(corpus)]


def test_a_whole_job_is_only_read(tmp_path: Path, model: Embedder, corpus: Path) -> None:
    out = tmp_path / "out"
    encode(model, corpus, out)
    live = out / ".manifest.json.0a.tmp"  # of another process
    live.touch()
    before = out.stat().st_mtime_ns, (out / "manifest.json").stat().st_ino
    assert encode(model, corpus, out).texts == 0
    assert (out.stat().st_mtime_ns, (out / "manifest.json").stat().st_ino) == before
    assert live.exists()


def test_another_process_s_unfinished_files_stay(
    tmp_path: Path, model: Embedder, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".embeddings.0a.tmp").touch()
    embed = model.encode

    def meanwhile(texts: list[str], **options: Any) -> Any:
        if texts:  # else nothing has begun
            (out / ".embeddings.0b.tmp").touch()
        return embed(texts, **options)

    monkeypatch.setattr(model, "encode", meanwhile)
    encode(model, corpus, out)
    assert sorted(path.name for path in out.glob(".*")) == [".embeddings.0b.tmp"]


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_what_is_left_to_do_is_done(tmp_path: Path, model: Embedder, corpus: Path, format: Any) -> None:
    encode(model, corpus, tmp_path / "whole", shard_size=7, format=format)
    whole = files_of(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    manifest = json.loads(whole["manifest.json"])
    assert manifest["complete"]
    (tmp_path / "killed/manifest.json").write_text(json.dumps(manifest | {"complete": False}, indent=1) + "\n")
    for shard in (1, 2, 5, 8):
        (tmp_path / "killed" / manifest["shards"][shard]).unlink()
    (tmp_path / "killed" / f".{manifest['shards'][5]}.0a.tmp").write_bytes(b"half of it")
    kept = (tmp_path / "killed" / manifest["shards"][0]).stat().st_mtime_ns
    summary = encode(model, corpus, tmp_path / "killed", shard_size=7, format=format)
    assert summary.texts == 3 * 7 + 4
    assert files_of(tmp_path / "killed") == whole
    assert (tmp_path / "killed" / manifest["shards"][0]).stat().st_mtime_ns == kept
    again = encode(model, corpus, tmp_path / "killed", shard_size=7, format=format)
    assert again.texts == 0
    assert str(again) == "60 texts in 9 shards; all were there already"
    assert files_of(tmp_path / "killed") == whole


def test_ids_that_are_lost_are_written_again(tmp_path: Path, model: Embedder, corpus: Path) -> None:
    out = tmp_path / "out"
    encode(model, corpus, out, shard_size=16, format="npy")
    whole = files_of(out)
    (out / "embeddings-00002-of-00004.ids.json").unlink()
    assert encode(model, corpus, out, shard_size=16, format="npy").texts == 16
    assert files_of(out) == whole


def test_rows_that_cannot_be_read(tmp_path: Path, model: Embedder) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in ROWS[:20]]
    lines[3], lines[11] = "{", '{"_id": "x", "text": null}'
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"rows\.jsonl:4: not JSON.*--bad-rows skip"):
        encode(model, path, tmp_path / "out", shard_size=4)
    assert not list((tmp_path / "out").iterdir())
    summary = encode(model, path, tmp_path / "out", shard_size=4, bad_rows="skip")
    assert (summary.texts, summary.manifest.skipped) == (18, 2)
    assert "2 rows skipped" in str(summary)
    assert read(tmp_path / "out")[0] == [one for number, one in enumerate(IDS[:20]) if number not in (3, 11)]
    path.write_text("{\n{\n")
    with pytest.raises(InputError, match=r"no text in .*: 2 rows, none of which can be read"):
        encode(model, path, tmp_path / "none", bad_rows="skip")


def test_a_shard_may_be_empty(tmp_path: Path, model: Embedder) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n" * 4 + "".join(f"{json.dumps(row)}\n" for row in ROWS[:3]))
    for format in ("parquet", "npy"):
        encode(model, path, tmp_path / format, shard_size=4, bad_rows="skip", format=format)
        assert [len(each) for each in read(tmp_path / format)] == [3, 3]


def test_another_job_is_refused(tmp_path: Path, model: Embedder, corpus: Path) -> None:
    out = tmp_path / "out"
    encode(model, corpus, out)
    before = files_of(out)

    def refused(files: Any = corpus, by: Embedder = model, **options: Any) -> str:
        with pytest.raises(InputError, match="holds embeddings of another job") as error:
            encode(by, files, out, **options)
        return str(error.value)

    assert 'precision was "float32", is now "int8"' in refused(precision="int8")
    assert "another job: shard size was 32768, is now 7. Choose another directory" in refused(shard_size=7)
    assert 'id field was null, is now "_id"' in refused(fields=Fields("_id"))
    changed = dataclasses.replace(model.text_format, max_length=100)
    other = Embedder(model.decoder, model.tokenizer.with_format(changed))
    assert "tokenizer and text format was" in refused(by=other)
    second = write_jsonl(tmp_path / "second.jsonl", ROWS[:1])
    assert f"{second} is a new --input file" in refused([corpus, second])
    assert f"{corpus} is no longer among the --input files" in refused(second)
    text = corpus.read_text()
    corpus.write_text(text)
    assert f"{corpus} was written again" in refused()
    corpus.write_text(text + "\n")
    assert "has now" in refused()
    assert files_of(out) == before


@pytest.mark.parametrize("when", ["survey", "write_parquet"])
def test_another_job_that_begins_meanwhile(
    tmp_path: Path, model: Embedder, corpus: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    encode(model, corpus, tmp_path / "other", precision="ubinary")
    manifest = tmp_path / "other/manifest.json"
    called = job.survey if when == "survey" else job.WRITERS["parquet"]

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        shutil.copy(manifest, tmp_path / "out")
        return called(*arguments, **options)

    if when == "survey":
        monkeypatch.setattr(job, "survey", meanwhile)
    else:
        monkeypatch.setattr(job, "WRITERS", {"parquet": meanwhile})
    with pytest.raises(InputError, match='another job: precision was "ubinary", is now "float32"'):
        encode(model, corpus, tmp_path / "out")
    assert (tmp_path / "out/manifest.json").read_bytes() == manifest.read_bytes()


def test_hosts_with_other_input(tmp_path: Path, model: Embedder, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = corpus.stat().st_size

    def gather(name: str, value: str) -> list[str]:
        return [value, value.replace(f"{size:,} bytes", "7 bytes") if name == "the input" else value]

    monkeypatch.setattr(hosts, "gather", gather)
    with pytest.raises(
        InputError, match=f"the input differs between hosts: process 1 has {corpus} 7 bytes, .* {size:,}"
    ):
        encode(model, corpus, tmp_path / "out")


def test_a_host_that_does_not_see_the_manifest_yet(
    tmp_path: Path, model: Embedder, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(model, corpus, tmp_path / "whole", shard_size=16, precision="int8")
    expected = files_of(tmp_path / "whole")
    text = expected.pop("manifest.json").decode()
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(hosts, "is_main", lambda: False)
    monkeypatch.setattr(hosts, "check_shared", lambda *_: None)
    monkeypatch.setattr(hosts, "broadcast", lambda name, value: text if name == "the manifest" else value)
    assert encode(model, corpus, tmp_path / "out", shard_size=16, precision="int8").texts == 60
    assert files_of(tmp_path / "out") == expected


def test_what_is_wrong_is_said_before_the_model_is_loaded(tmp_path: Path, corpus: Path) -> None:
    def refused(files: Any = corpus, output: Any = tmp_path / "out", **options: Any) -> str:
        def load() -> Embedder:
            raise AssertionError

        with pytest.raises(InputError) as error:
            encode_corpus(Options([str(files)], str(output), **options), load, progress=False)
        return str(error.value)

    assert "no such file" in refused(tmp_path / "nowhere.jsonl")
    assert "matches no file" in refused(tmp_path / "*.parquet")
    assert "is a folder; expected files" in refused(tmp_path)
    latin = Path(os.fsdecode(os.fsencode(tmp_path / "caf") + b"\xe9.jsonl"))
    latin.write_bytes(corpus.read_bytes())
    assert "caf\\udce9.jsonl': the name is not UTF-8" in refused(tmp_path / "caf*")
    assert "--prompt: 'caf\\udce9' is not UTF-8" in refused(prompt="caf\udce9")
    assert "--text-field: '\\udce9' is not UTF-8" in refused(fields=Fields(text="\udce9"))
    latin.unlink()
    assert "--shard-size" in refused(shard_size=0)
    assert "--output: expected a directory, found an empty name" in refused(output="")
    assert "is a file; expected a directory" in refused(output=corpus)
    assert "holds corpus.jsonl, but no manifest.json" in refused(output=tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/manifest.json").write_text("{}")
    assert "manifest.json: cannot be read" in refused(output=tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_said_before_the_work(
    tmp_path: Path, model: Embedder, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for options, message in (
        ({"truncate_dim": 17}, "truncate_dim: expected a whole number from 1 to 16"),
        ({"batch_size": 0}, "batch_size"),
        ({"precision": "int8", "ranges": np.zeros((2, 3), np.float32)}, r"ranges: expected shape \(2, 16\)"),
    ):
        with pytest.raises(InputError, match=message):
            encode(model, corpus, out, **options)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"no text in .*empty\.jsonl: no row"):
        encode(model, tmp_path / "empty.jsonl", out)
    with pytest.raises(InputError, match="cannot be taken from a single embedding"):
        encode(model, write_jsonl(tmp_path / "one.jsonl", ROWS[:1]), out, precision="int8")
    usage = namedtuple("usage", "free")(60 * 64 - 1)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(InputError, match="60 embeddings of 64 bytes take"):
            encode(model, corpus, out)
        encode(model, corpus, tmp_path / "small", precision="ubinary")  # 2 bytes each
    assert not list(out.iterdir())


def test_a_full_disk_leaves_whole_shards_only(
    tmp_path: Path, model: Embedder, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = np.save, []

    def full(file: Any, vectors: np.ndarray) -> None:
        if len(saved) == 2:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(save(file, vectors))

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError, match="No space left"):
            encode(model, corpus, tmp_path / "out", format="npy", shard_size=16)
    arrays = sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix in (".npy", ".tmp"))
    assert arrays == [f"embeddings-0000{shard}-of-00004.npy" for shard in (0, 1)]
    encode(model, corpus, tmp_path / "out", format="npy", shard_size=16)
    encode(model, corpus, tmp_path / "whole", format="npy", shard_size=16)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_an_embedding_that_is_not_finite(tmp_path: Path, model: Embedder, corpus: Path) -> None:
    broken = copy.copy(model)
    broken.replace_state(jax.tree.map(lambda leaf: leaf * np.nan, nnx.state(model.model)))
    with pytest.raises(InputError, match="the embedding of the text 'd0' is not finite"):
        encode(broken, corpus, tmp_path / "out")


def test_a_file_that_changes_meanwhile(tmp_path: Path, model: Embedder, corpus: Path) -> None:
    def load() -> Embedder:
        return model

    options = Options([str(corpus)], str(tmp_path / "out"), shard_size=16)
    encode_corpus(options, load, progress=False)
    found = read_manifest(epath.Path(tmp_path / "out"))
    assert found is not None
    (tmp_path / "out" / found.shards[3]).unlink()
    time = corpus.stat().st_mtime_ns
    text = corpus.read_text()
    corpus.write_text("\n" * len(text.encode()))
    os.utime(corpus, ns=(time, time))
    with pytest.raises(InputError, match="fewer rows than when the job began"):
        encode_corpus(options, load, progress=False)


def test_a_file_that_is_written_anew_meanwhile(
    tmp_path: Path, model: Embedder, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_begun(directory: epath.Path, manifest: Manifest) -> None:
        write_manifest(directory, manifest)
        write_jsonl(corpus, [{"_id": f"new{number}", "text": "new"} for number in range(70)])

    with monkeypatch.context() as patch:
        patch.setattr("jaxembed.encoding.job.write_manifest", write_begun)
        with pytest.raises(InputError, match=f"--input {corpus}: was changed while the job ran"):
            encode(model, corpus, tmp_path / "out", shard_size=16)
    assert not json.loads((tmp_path / "out/manifest.json").read_text())["complete"]
    with pytest.raises(InputError, match="another job"):
        encode(model, corpus, tmp_path / "out", shard_size=16)


def test_a_bucket(bucket: Bucket, tmp_path: Path, model: Embedder, corpus: Path) -> None:
    epath.Path("gs://bucket/in").mkdir(parents=True)
    epath.Path("gs://bucket/in/corpus.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    for format in ("parquet", "npy"):
        out = f"gs://bucket/out-{format}"
        encode(model, "gs://bucket/in/*.jsonl.gz", out, shard_size=16, format=format)
        encode(model, corpus, tmp_path / format, shard_size=16, format=format)
        shards = json.loads((tmp_path / format / "manifest.json").read_text())["shards"]
        for name in shards:
            assert (epath.Path(out) / name).read_bytes() == (tmp_path / format / name).read_bytes()
        (epath.Path(out) / shards[2]).unlink()
        assert encode(model, "gs://bucket/in/*.jsonl.gz", out, shard_size=16, format=format).texts == 16
        ids, vectors = read(out)
        assert ids == IDS
        np.testing.assert_array_equal(vectors, read(tmp_path / format)[1])
