import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxembed.data import rows as files
from jaxembed.data.sources import Examples, read_jsonl, read_rows, summary
from jaxembed.errors import InputError

GOOD = b'{"anchor": "a question", "positive": "its answer"}\n'

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
pairs = st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=12)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def jsonl(tmp_path):
    return lambda data, name="rows.jsonl": write(tmp_path / name, data)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=pairs, compressed=st.booleans(), ascii_only=st.booleans(), newline=st.sampled_from(["\n", "\r\n", "\n \n"]))
def test_what_is_written_is_read_back(tmp_path, rows, compressed, ascii_only, newline):
    lines = [json.dumps({"q": q, "x": 1, "d": d, "n": n}, ensure_ascii=ascii_only) for q, d, n in rows]
    path = write(tmp_path / ("rows.jsonl" + ".gz" * compressed), newline.join(lines).encode())

    expected, counts, seen = [], {}, set()
    for i, (q, d, n) in enumerate(rows):
        reason = None
        if "" in (q.strip(), d.strip(), n.strip()):
            reason = "empty text"
        elif q == d:
            reason = "anchor equal to its positive"
        elif (q, d) in seen:
            reason = "duplicate"
        if reason:
            counts[reason] = counts.get(reason, 0) + 1
        else:
            seen.add((q, d))
            line = 2 * i + 1 if newline == "\n \n" else i + 1
            expected.append((q, d, (n,), f"{path.name}:{line}"))

    def read():
        return read_jsonl(path, name="rows", anchor="q", positive="d", negatives=["n"])

    if not expected:
        with pytest.raises(InputError, match="no pair left"):
            read()
        return
    found = read()
    assert list(zip(found.anchors, found.positives, found.negatives, found.ids, strict=True)) == expected
    assert found.dropped == counts
    assert len(found) == len(expected)


BAD_ROWS = {
    b'{"anchor": "a", \n': [":3:", "not JSON", "Expecting property name"],
    b'{"anchor": "a"} {"b": 1}\n': [":3:", "not JSON", "Extra data", "character 17"],
    b'{"anchor": "caf\xe9", "positive": "b"}\n': [":3:", "not UTF-8", "0xe9", "position 16"],
    b'["a", "b"]\n': [":3:", "expected a JSON object", "found a list"],
    b"null\n": [":3:", "expected a JSON object", "found null"],
    b'{"anchor": "a", "answer": "b"}\n': [":3:", "no column 'positive'", "'anchor', 'answer'"],
    b"{}\n": [":3:", "no column 'anchor'", "none"],
    b'{"anchor": "a", "positive": null}\n': [":3:", "'positive'", "expected a string", "found null"],
    b'{"anchor": 7, "positive": "b"}\n': [":3:", "'anchor'", "expected a string", "found a number"],
    b'{"anchor": true, "positive": "b"}\n': [":3:", "'anchor'", "found a boolean"],
    b'{"anchor": "a", "positive": ["b"]}\n': [":3:", "'positive'", "found a list"],
    b'{"anchor": "\\ud800", "positive": "b"}\n': [":3:", "'anchor'", "surrogate"],
    b"[" * 100_000 + b"\n": [":3:", "not JSON"],
    b'{"anchor": ' + b"9" * 5000 + b"}\n": [":3:", "not JSON"],
}


@pytest.mark.parametrize(("row", "words"), BAD_ROWS.items(), ids=lambda value: repr(value)[:40])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_bad_row_is_named_or_counted(jsonl, row, words, name):
    path = jsonl(GOOD + b"\n" + row + GOOD.replace(b"its", b"another"), name)
    with pytest.raises(InputError) as caught:
        read_jsonl(path, name="rows")
    for word in [str(path), *words, "bad_rows: skip"]:
        assert word in str(caught.value)

    skipped = read_jsonl(path, name="rows", bad_rows="skip")
    assert skipped.positives == ["its answer", "another answer"]
    assert skipped.ids == [f"{name}:1", f"{name}:4"]
    assert skipped.dropped == {"bad row": 1}


def test_a_missing_negative_column_is_named(jsonl):
    with pytest.raises(InputError, match="no column 'negative'; columns of this row: 'anchor', 'positive'"):
        read_jsonl(jsonl(GOOD), name="rows", negatives=["negative"])


def test_an_empty_text_is_dropped_and_counted(jsonl):
    found = read_jsonl(jsonl(GOOD + b'{"anchor": " \\n", "positive": "b"}\n' + GOOD), name="medquad")
    assert found.anchors == ["a question"]
    assert found.dropped == {"empty text": 1, "duplicate": 1}
    assert summary(found) == "medquad: 1 pair kept, 2 dropped (1 empty text, 1 duplicate)"


def test_summary_counts_with_thousands():
    examples = Examples("medquad", ["a"] * 12471, [], [], [], {"empty text": 1, "duplicate": 2}, "")
    assert summary(examples) == "medquad: 12,471 pairs kept, 3 dropped (2 duplicate, 1 empty text)"
    assert summary(Examples("x", ["a"] * 2, [], [], [], {}, "")) == "x: 2 pairs kept, 0 dropped"


def test_a_byte_order_mark_is_no_text(jsonl):
    assert read_jsonl(jsonl(b"\xef\xbb\xbf" + GOOD), name="rows").anchors == ["a question"]


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "not gzip"])
def test_a_damaged_gzip_file_is_an_error(tmp_path, damage, bad_rows):
    rows = b"".join(b'{"anchor": "%s", "positive": "b"}\n' % os.urandom(20).hex().encode() for _ in range(2000))
    whole = bytearray(gzip.compress(rows))
    if damage == "flipped":
        whole[-6] ^= 0xFF  # in the checksum
    data = {"truncated": bytes(whole[: len(whole) // 2]), "flipped": bytes(whole), "not gzip": GOOD}[damage]
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(data)
    with pytest.raises(InputError, match="truncated or corrupt after line") as caught:
        read_jsonl(path, name="rows", bad_rows=bad_rows)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\n\n", b'{"anchor": "same", "positive": "same"}\n'])
def test_a_file_that_gives_no_pair_is_an_error(jsonl, data):
    path = jsonl(data)
    with pytest.raises(InputError, match=r"no pair left of [01] rows") as caught:
        read_jsonl(path, name="rows")
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.jsonl: no such file"):
        read_jsonl(tmp_path / "nowhere.jsonl", name="rows")
    with pytest.raises(InputError, match="cannot be read"):
        read_jsonl(tmp_path, name="rows")


def test_paths_may_be_strings_paths_and_epaths(jsonl, monkeypatch):
    path = jsonl(GOOD)
    monkeypatch.setenv("HOME", str(path.parent))
    read = [read_jsonl(p, name="rows") for p in (path, str(path), epath.Path(path), "~/rows.jsonl")]
    assert all(examples == read[0] for examples in read)


def test_the_fingerprint_follows_the_content_not_the_place(jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MEBIBYTE", 64)
    path = jsonl(GOOD + b'{"anchor": "second", "positive": "its answer"}\n')

    def fingerprint(file, **columns):
        return read_jsonl(file, name="rows", **columns).fingerprint

    before = fingerprint(path)
    copied = shutil.copy2(path, tmp_path / "moved.jsonl")
    assert fingerprint(copied) == before
    assert fingerprint(path, anchor="positive", positive="anchor") != before

    time = path.stat().st_mtime_ns
    for changed in (
        path.read_bytes().replace(b"second", b"sec0nd"),
        path.read_bytes().replace(b"question", b"quest1on"),
    ):
        Path(copied).write_bytes(changed)
        os.utime(copied, ns=(time, time))
        assert fingerprint(copied) != before
    os.utime(path, ns=(time + 1, time + 1))
    assert fingerprint(path) != before


def test_a_large_file_shows_its_progress(jsonl, monkeypatch, capsys):
    monkeypatch.setattr(files, "_PROGRESS_FROM_BYTES", 0)
    lines = b"".join(b'{"anchor": "%d", "positive": "b"}\n' % i for i in range(3000))
    assert len(read_jsonl(jsonl(lines, "rows.jsonl.gz"), name="bulk")) == 3000
    assert "bulk" in capsys.readouterr().err


def test_named_columns_with_a_grade_keep_equal_texts(jsonl):
    lines = [{"a": "x", "b": "x", "g": 5}, {"a": "x", "b": "y", "g": "0.5"}, {"a": "x", "b": "y", "g": 1}]
    path = jsonl("".join(json.dumps(row) + "\n" for row in lines).encode())
    found = read_jsonl(path, name="rows", anchor="a", positive="b", score="g")
    assert (found.anchors, found.positives, found.dropped) == (["x", "x"], ["x", "y"], {"duplicate": 1})
    assert found.scores is not None
    assert found.scores.tolist() == [[5.0], [0.5]]
    assert found.graded
    with pytest.raises(InputError, match=r"rows\.jsonl:1: no column 'h'"):
        read_jsonl(path, name="rows", anchor="a", positive="b", score="h")


def test_a_split_is_taken_by_its_column(jsonl):
    path = jsonl(
        b"".join(
            b'{"anchor": "%d", "positive": "b", "split": "%s"}\n' % (i, s) for i, s in enumerate([b"dev", b"train"])
        )
    )
    for read in (read_jsonl, read_rows):
        found = read(path, name="rows", split="train")
        assert (found.anchors, found.dropped) == (["1"], {"other split": 1})
        with pytest.raises(InputError, match="no pair left of 2 rows, 2 dropped"):
            read(path, name="rows", split="test")
    assert read_jsonl(path, name="rows", split="train").fingerprint != read_jsonl(path, name="rows").fingerprint


def test_named_columns_of_a_table(tmp_path):
    (tmp_path / "faq.csv").write_text("Id,Title,Body\n1,how?,so\n2,why?,\n")
    found = read_jsonl(tmp_path / "faq.csv", name="faq", anchor="Title", positive="Body")
    assert (found.anchors, found.positives, found.dropped) == (["how?"], ["so"], {"empty text": 1})


def test_summary_names_what_was_recognised():
    examples = Examples("x", ["a"] * 3, [], [("n",), (), ("n", "m")], [], {}, "", "tevatron")
    assert summary(examples) == "x: tevatron (0 to 2 negatives a query), 3 pairs kept, 0 dropped"
    scored = Examples("x", ["a"], [], [("n",)], [], {}, "", "FlagEmbedding", np.zeros((1, 2)))
    assert summary(scored) == "x: FlagEmbedding (1 negative a query, with scores), 1 pair kept, 0 dropped"
    assert Examples("x", ["a"] * 3, [], [], [], {}, "").negative_counts.tolist() == [0, 0, 0]
