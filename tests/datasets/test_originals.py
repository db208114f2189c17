import gzip
import re

import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxembed.datasets import originals
from jaxembed.datasets.originals import Original, count_lines, numbered_lines, text_of
from jaxembed.errors import InputError

from originals import tar_of

TABLE = Original(("table.tsv", "table.tar.gz"), "https://example.org/table.tar.gz", "1 GB", "table.tsv")

LINES = b"0\tone\n1\ttwo\r\n\n2\tthree"


def lines_of(path):
    return list(numbered_lines(epath.Path(path), TABLE, "reading"))


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.tsv"
    path.write_bytes(LINES)
    return path


EXPECTED = [(1, b"0\tone"), (2, b"1\ttwo"), (3, b""), (4, b"2\tthree")]


def test_lines_are_the_same_in_whatever_packing(table):
    assert lines_of(table) == EXPECTED
    assert count_lines(epath.Path(table), TABLE) == 4
    packed = table.with_name("anything")  # what tfds downloads has a name of its own
    packed.write_bytes(gzip.compress(LINES))
    assert lines_of(packed) == EXPECTED
    for inside in ("table.tsv", "./data/table.tsv"):
        table.write_bytes(LINES)
        archive = tar_of(table, inside)
        assert lines_of(archive) == EXPECTED
        assert count_lines(epath.Path(archive), TABLE) == 4


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60).map(lambda data: data.replace(b"\x1f", b"")))
def test_lines_are_counted_as_they_are_read(tmp_path, data):
    path = tmp_path / "lines"
    path.write_bytes(data)
    expected = [line.rstrip(b"\r") for line in data.split(b"\n")]
    expected = expected[:-1] if data.endswith(b"\n") or not data else expected
    found = lines_of(path)
    assert [line for _, line in found] == [line.rstrip(b"\r\n") for line in expected]
    assert count_lines(epath.Path(path), TABLE) == len(found)


@pytest.mark.parametrize("packing", ["gzip", "tar"])
def test_a_damaged_file_is_named_with_where_to_get_it(table, packing):
    table.write_bytes(b"".join(b"%d\t%x\n" % (i, i * 7919) for i in range(5000)))
    if packing == "tar":
        path = tar_of(table, "table.tsv")
    else:
        path = table.with_suffix(".gz")
        path.write_bytes(gzip.compress(table.read_bytes()))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for damaged in (whole[: len(whole) // 2], bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"{re.escape(str(path))}: truncated or corrupt .*1 GB.*example\.org"):
            lines_of(path)


def test_a_missing_file_is_named_with_size_and_address(tmp_path):
    with pytest.raises(
        InputError, match=r"no table\.tsv or table\.tar\.gz there; get it \(1 GB\) from https://example"
    ):
        TABLE.find(epath.Path(tmp_path))
    (tmp_path / "table.tar.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"table\.tar\.gz: empty file"):
        TABLE.find(epath.Path(tmp_path))
    (tmp_path / "table.tsv").write_bytes(b"0\ta\n")
    assert TABLE.find(epath.Path(tmp_path)).name == "table.tsv"


def test_an_archive_without_the_file_says_what_it_holds(table):
    archive = tar_of(table, "other.tsv")
    with pytest.raises(InputError, match=r"holds no table\.tsv; it holds README, other\.tsv"):
        lines_of(archive)


def test_text_that_is_not_utf8_is_named_by_line_and_byte():
    with pytest.raises(InputError, match=r"x\.tsv:7: not UTF-8: byte 0xff at position 3"):
        text_of(b"ab\xffc", epath.Path("x.tsv"), 7)


def test_a_large_file_shows_its_progress(table, monkeypatch, capsys):
    monkeypatch.setattr(originals, "PROGRESS_FROM_BYTES", 0)
    lines_of(table)
    assert "reading: table.tsv: 100%" in capsys.readouterr().err
