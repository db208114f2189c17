import array
import collections
import gzip
import math
import os
import pickle
import pickletools
import re
import struct
import tracemalloc

import numpy as np
import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxembed.datasets import scores as module
from jaxembed.datasets.ms_marco import SCORES
from jaxembed.datasets.scores import read_scores, store_scores
from jaxembed.errors import InputError

from originals import write_scores

ids = st.one_of(st.integers(0, 300), st.integers(65_000, 66_000), st.integers(0, 2**31 - 1))
floats = st.floats(allow_nan=False, allow_infinity=False, width=32)
tables = st.dictionaries(ids, st.dictionaries(ids, floats, max_size=5), max_size=5)
per_function = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path):
    return {query: dict(zip(p.tolist(), s.tolist())) for query, p, s in read_scores(epath.Path(path), SCORES)}


def write(tmp_path, data: bytes):
    path = tmp_path / "scores.pkl"
    path.write_bytes(data)
    return path


@per_function
@given(table=tables, protocol=st.sampled_from([2, 3, 4, 5]), pure=st.booleans())
def test_what_pickle_wrote_is_read(tmp_path, table, protocol, pure):
    data = pickle._dumps(table, protocol) if pure else pickle.dumps(table, protocol)
    assert read(write(tmp_path, data)) == table == pickle.loads(data)
    assert read(write(tmp_path, gzip.compress(data))) == table


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_large_dictionaries_come_in_pieces(tmp_path, protocol, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 2048)
    random = np.random.default_rng(protocol)
    table = {
        int(query): {
            int(p): float(s) for p, s in zip(random.choice(10**7, size, replace=False), random.normal(size=size))
        }
        for query, size in zip(random.choice(2**31, 2003, replace=False), [2500, 1001, 1000, 1, 0] + [3] * 1998)
    }
    assert read(write(tmp_path, pickle.dumps(table, protocol))) == table


def test_whole_numbers_and_signs_are_scores_too(tmp_path):
    table = {1: {2: 3, 4: -0.5}, -7: {2**40: 1.0}}
    assert read(write(tmp_path, pickle.dumps(table))) == table


class Trap:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def traps(path):
    """Pickles with code, or with other things than numbers, and the opcode at which they must stop."""
    trap = Trap(path)
    command = f"mkdir {path}".encode()
    head = b"\x80\x02}(K\x01}"
    return {
        "reduce": (pickle.dumps(trap, 2), "GLOBAL"),
        "reduce in a value": (pickle.dumps({1: {2: trap}}, 2), "GLOBAL"),
        "reduce in a key": (pickle.dumps({1: {2: 0.5}, 3: trap}, 4), "(SHORT_)?BINUNICODE"),
        "behind a good entry": (pickle.dumps({1: {2: 0.5}}, 4)[:-1] + b"cos\nsystem\n(S'x'\ntR.", "GLOBAL"),
        "stack global": (
            b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(command)]) + command + b"\x85R.",
            "SHORT_",
        ),
        "inst": (b"\x80\x02(S'" + command + b"'\nios\nsystem\n.", "STRING"),
        "inst alone": (b"\x80\x02(ios\nsystem\n.", "INST"),
        "obj": (b"\x80\x02(cos\nsystem\no.", "GLOBAL"),
        "extension": (head + b"\x82\x01.", "EXT1"),
        "persistent id": (head + b"Pid\n.", "PERSID"),
        "persistent id on the stack": (head + b"K\x01Q.", "BINPERSID"),
        "reduce without a global": (head + b"K\x01)R.", "EMPTY_TUPLE"),
        "build": (head + b"K\x01b.", "BUILD"),
        "buffer": (b"\x80\x05\x97.", "NEXT_BUFFER"),
        "memo": (b"\x80\x02}q\x00h\x00.", "BINGET"),
        "string key": (pickle.dumps({"1": {2: 0.5}}, 4), "SHORT_BINUNICODE"),
        "list": (pickle.dumps({1: [0.5]}, 4), "EMPTY_LIST"),
        "nothing": (pickle.dumps({1: None}, 4), "NONE"),
        "truth": (pickle.dumps({1: {2: True}}, 4), "NEWTRUE"),
        "numpy": (pickle.dumps({1: {2: np.float32(0.5)}}, 4), "SHORT_BINUNICODE"),
        "ordered": (pickle.dumps(collections.OrderedDict({1: {2: 0.5}}), 2), "GLOBAL"),
        "long": (b"\x80\x02}(\x8b\x01\x00\x00\x00\x01", "LONG4"),
        "text float": (b"\x80\x02}(K\x01}K\x02F0.5\ns", "FLOAT"),
        "unknown": (b"\x80\x02}\xff", "0xff"),
        "huge string": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62), "BINUNICODE8"),
    }


@pytest.mark.parametrize("name", traps("unused"))
def test_code_is_never_executed_and_the_opcode_is_named(tmp_path, name):
    data, opcode = traps(tmp_path / "executed")[name]
    path = write(tmp_path, data)
    place = rf"{re.escape(str(path))}: byte [\d,]+ of the pickle: opcode ({opcode}).* is refused|{opcode}.* is refused"
    with pytest.raises(InputError, match=place):
        read(path)
    with pytest.raises(InputError, match=place):
        read(write(tmp_path, gzip.compress(data)))
    assert not (tmp_path / "executed").exists()


def test_the_offset_is_that_of_the_opcode(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 2048)
    good = {query: dict.fromkeys(range(100), 0.5) for query in range(50)}
    data = pickle.dumps({**good, 99: {1: "x"}}, 4)
    expected = next(place for opcode, _, place in pickletools.genops(data) if opcode.name == "SHORT_BINUNICODE")
    assert expected > 10_000
    with pytest.raises(InputError, match=f"byte {expected:,} of the pickle: opcode SHORT_BINUNICODE"):
        read(write(tmp_path, data))
    cut = data[:expected] + b"\x8d" + struct.pack("<Q", 2**40)  # genops fails before it gives this one
    with pytest.raises(InputError, match=f"byte {expected:,} of the pickle: opcode BINUNICODE8 is refused"):
        read(write(tmp_path, cut))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps({1: 0.5}), "a number as value at depth 1"),
        (pickle.dumps({1: {2: {3: 0.5}}}), "a dictionary as value at depth 2 or more"),
        (pickle.dumps({1: {2: 0.5, 3: {}}}), "a dictionary/number as value at depth 2 or more"),
        (pickle.dumps({0.5: {2: 0.5}}), "a key that is no whole number"),
        (pickle.dumps({1: {0.5: 2}}), "a key that is no whole number"),
        (pickle.dumps(0.5), "it ends without being one dictionary"),
        (pickle.dumps({1: {2**80: 0.5}}), "a number beyond 64 bits"),
        (pickle.dumps({1: {2: 0.5}}, 1), "protocol|without being"),
        (pickle.dumps({1: {2: 0.5}}, 0), "refused"),
        (b"\x80\x09}.", "protocol 9, expected 2 to 5"),
        (b"\x80\x02u.", "SETITEMS without a MARK"),
        (b"\x80\x02}K\x01s.", "SETITEM without a dictionary"),
        (b"\x80\x02s.", "SETITEM without a dictionary"),
        (b"\x80\x02}(K\x01u.", "SETITEMS without a dictionary and pairs"),
        (b"\x80\x02}(K\x01K\x02s.", "SETITEM without a dictionary and pairs"),
        (b"\x80\x02}(.", "it ends without being one dictionary"),
        (b"", "byte 0 of the pickle: the pickle is cut off"),
    ],
)
def test_what_is_no_table_of_scores_says_why(tmp_path, data, message):
    with pytest.raises(InputError, match=message):
        read(write(tmp_path, data))


def test_every_beginning_of_a_pickle_is_refused(tmp_path):
    data = pickle.dumps({300: {1: 0.5, 70_000: -1.5}, 2**33: {3: 0.25}}, 4)
    for length in range(len(data)):
        with pytest.raises(InputError, match="cut off"):
            read(write(tmp_path, data[:length]))
    packed = gzip.compress(data)
    for length in range(2, len(packed)):
        with pytest.raises(InputError, match=r"truncated or corrupt|cut off"):
            read(write(tmp_path, packed[:length]))


@per_function
@given(table=tables, place=st.integers(0, 400), byte=st.integers(0, 255), protocol=st.sampled_from([2, 4]))
def test_a_changed_byte_is_refused_or_read_as_pickle_reads_it(tmp_path, table, place, byte, protocol):
    data = bytearray(pickle.dumps(table, protocol))
    data[place % len(data)] = byte
    try:
        found = read(write(tmp_path, bytes(data)))
    except InputError:
        return
    try:
        expected = pickle.loads(bytes(data))  # what was accepted is harmless to pickle too
    except (pickle.UnpicklingError, EOFError, OverflowError):  # it counts the bytes of a frame
        return
    assert str(expected) == str(found), "as text, in which NaN equals itself and 0 is not 0.0"


@per_function
@given(table=tables, protocol=st.sampled_from([2, 4, 5]))
def test_stored_scores_are_found_again(tmp_path, table, protocol):
    path = epath.Path(write_scores(tmp_path, table, protocol))
    stored = store_scores(path, SCORES, tmp_path)
    assert {int(query): stored.of(int(query)) for query in stored.queries} == table
    assert stored.of(-5) == {}
    assert stored.of(2**31) == {}
    assert stored.values.dtype == np.float32


def twice() -> bytes:
    """{1: {2: 0.5}, 1: {3: 0.5}} as no dictionary can be."""
    entry = b"K\x01}K%cG" + struct.pack(">d", 0.5) + b"s"
    return b"\x80\x02}(" + entry % 2 + entry % 3 + b"u."


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps({1: {2: math.nan}}), "query 1: the score of passage 2 is not a finite number"),
        (pickle.dumps({1: {2: 1.0, 3: 1e39}}), "query 1: the score of passage 3 is not a finite number"),
        (pickle.dumps({1: {2**31: 0.5}}), "query 1: expected ids from 0 to 2,147,483,647"),
        (pickle.dumps({1: {-2: 0.5}}), "query 1: expected ids"),
        (pickle.dumps({2**31: {2: 0.5}}), "query 2147483648: expected ids"),
        (twice(), "query 1 comes twice"),
    ],
)
def test_numbers_that_are_no_ids_or_scores(tmp_path, data, message):
    with pytest.raises(InputError, match=message):
        store_scores(epath.Path(write(tmp_path, data)), SCORES, tmp_path)


def test_memory_does_not_grow_with_the_file(tmp_path):
    table = {query: dict.fromkeys(range(query, query + 200), 0.5) for query in range(0, 100_000, 100)}
    path = epath.Path(write(tmp_path, pickle.dumps(table)))
    del table
    tracemalloc.start()
    try:
        stored = store_scores(path, SCORES, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(stored.values) == 200_000
    assert peak < 12 << 20, "a block of the file, and the 1,000 dictionaries that pickle puts into one piece"


def test_numbers_without_a_dictionary_do_not_pile_up(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 2048)
    monkeypatch.setattr(module, "_MOST_STACKED", 5000)
    with pytest.raises(InputError, match="numbers that belong to no dictionary yet"):
        read(write(tmp_path, b"\x80\x02}(K\x01}(" + b"K\x01" * 10_000 + b"uu."))


def test_numbers_of_all_sizes(tmp_path):
    sizes = array.array("q", [0, 255, 256, 65_535, 65_536, 2**31 - 1])
    table = {int(size): {int(other): float(other) for other in sizes} for size in sizes}
    for protocol in (2, 3, 4, 5):
        assert read(write(tmp_path, pickle.dumps(table, protocol))) == table
