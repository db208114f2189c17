"""Files of rows of every kind give the same rows, and say where they are damaged."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from jaxembed.data.rows import numbered_rows, overlaps, within
from jaxembed.data.sources import read_rows
from jaxembed.errors import InputError

TABLE = [{"query": "a tab", "answer": "é 日本", "n": "1"}, {"query": 'some "quotes"', "answer": "b", "n": "2"}]


@pytest.mark.parametrize("kind", ["tsv", "tsv.gz", "csv", "csv.gz", "parquet"])
def test_tables_are_read_like_json_lines(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    rows = [dict(row) for row in TABLE]
    if kind.startswith("tsv"):
        lines = ["\t".join(TABLE[0]), *("\t".join(row.values()) for row in rows)]
        data = ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8-sig")
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    elif kind.startswith("csv"):
        rows[0]["answer"] = 'two\n\nlines, "quoted"'
        with (gzip.open if kind.endswith("gz") else open)(path, "wt", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, TABLE[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    found = read_rows(path, name="rows")
    assert found.anchors == [row["query"] for row in rows]
    assert found.positives == [row["answer"] for row in rows]
    first = {"tsv": 2, "csv": 2, "par": 1}[kind[:3]]
    last = first + (3 if kind.startswith("csv") else 1)
    assert found.ids == [f"rows.{kind}:{first}", f"rows.{kind}:{last}"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("r.tsv", b"query\tanswer\nq\ta\nonly one\n", [":3:", "expected 2 columns ('query', 'answer'), found 1"]),
        ("r.tsv", b"query\tanswer\nq\ta\ncaf\xe9\tb\n", [":3:", "not UTF-8", "0xe9"]),
        ("r.tsv", b"query\tquery\n", [":1:", "'query' more than once"]),
        ("r.tsv", b"caf\xe9\tquery\n", [":1:", "not UTF-8"]),
        ("r.csv", b"query,answer\nq,a\nq,b,c\n", [":3:", "found 3"]),
        ("r.csv", b"query,answer\nq,a\nq,caf\xe9\n", [":3:", "not UTF-8"]),
        ("r.csv", b"caf\xe9,answer\n", [":1:", "header is not UTF-8"]),
        ("r.parquet", b"PAR1 nothing of the kind", ["not a Parquet file"]),
    ],
)  # fmt: skip
def test_damaged_tables_are_named(tmp_path: Path, name: str, data: bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_rows(tmp_path / name, name="rows")
    for word in [str(tmp_path / name), *words]:
        assert word in str(caught.value)


@given(st.lists(st.integers(0, 12), max_size=4, unique=True).map(sorted))
def test_the_part_of_several_ranges(marks: list[int]) -> None:
    spans = [range(a, b) for a, b in zip(marks[::2], marks[1::2])]
    inside = range(3, 9)
    found = [place for span in overlaps(inside, spans) for place in span]
    assert found == [row - 3 for span in spans for row in span if row in inside]
    assert list(within(iter(range(10)), spans)) == [row for span in spans for row in span if row < 10]
    assert list(within(iter(range(10)), None)) == list(range(10))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "tsv", "csv", "parquet", "txt"])
def test_some_rows_of_a_file(tmp_path: Path, kind: str) -> None:
    path = epath.Path(tmp_path / f"rows.{kind}")
    rows = [{"text": f"text {number}"} for number in range(20)]
    lines = [json.dumps(row) if kind.startswith("jsonl") else row["text"] for row in rows]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=6)
    else:
        head = ["text"] if kind in ("tsv", "csv") else []
        data = "\n\n".join([*head, *lines]).encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    whole = list(numbered_rows(path, "rows"))
    assert [row for _, row in whole] == rows
    found = list(numbered_rows(path, "rows", spans=[range(1, 3), range(5, 8), range(19, 20)], progress=False))
    assert found == [whole[place] for place in (1, 2, 5, 6, 7, 19)]


def test_a_row_that_is_passed_over_is_not_read(tmp_path: Path) -> None:
    path = epath.Path(tmp_path / "rows.jsonl")
    path.write_text('{"text": "a"}\nnot JSON\n{"text": "b"}\n')
    assert [row for _, row in numbered_rows(path, "rows", spans=[range(2, 3)])] == [{"text": "b"}]
    (error,) = (row for _, row in numbered_rows(path, "rows", spans=[range(1, 2)]))
    assert "not JSON" in str(error)
    (tmp_path / "rows.txt").write_bytes(b"caf\xe9\n")
    ((number, error),) = numbered_rows(epath.Path(tmp_path / "rows.txt"), "rows")
    assert (number, "not UTF-8" in str(error)) == (1, True)
