"""What a host makes of a batch is its part of what one host would make, whichever hosts there are."""

import dataclasses

import numpy as np
import pytest

from jaxembed.data.loader import LOCAL_FIELDS, Batches, TextTable, choose_layout, pack_batch
from jaxembed.data.plan import DataSet, run_plan

CHIPS = 8


class Read(list):
    """Texts that know which of them were read."""

    def __init__(self, texts):
        super().__init__(texts)
        self.read = set()

    def __getitem__(self, number):
        self.read.add(number)
        return super().__getitem__(number)


@pytest.fixture
def batches():
    random = np.random.default_rng(0)
    lengths = random.integers(3, 40, 3 * 64)
    texts = Read([np.full(length, 10 + number, np.int32) for number, length in enumerate(lengths)])
    table = TextTable((texts,), np.array([0]), lengths, np.arange(len(lengths), dtype=np.uint64))
    columns = np.arange(3 * 64).reshape(64, 3)
    columns[::5, 2] = -1  # no hard negative
    layout = choose_layout([lengths], chips=CHIPS, dim=16, chunk_tokens=96, row_length=48)
    schedule = run_plan([DataSet("a", columns, None)], table.hashes, 32, 0, epochs=None, steps=2)
    return Batches(schedule, table, columns, np.zeros(64, np.int64), layout)


@pytest.mark.parametrize("mine", [(0, 1, 2, 3), (4, 5, 6, 7), (1, 6), (3,), tuple(range(CHIPS))])
def test_the_part_of_some_chips(batches, mine):
    whole = batches[1]
    texts = batches.table.caches[0]
    texts.read.clear()
    part = dataclasses.replace(batches, mine=mine)[1]
    assert part["mine"].tolist() == list(mine)
    for name, expected in whole.items():
        if name in LOCAL_FIELDS:
            axis = LOCAL_FIELDS[name]
            by_chip = np.split(expected, CHIPS, axis)
            expected = np.concatenate([by_chip[chip] for chip in mine], axis)
        if name != "mine":
            np.testing.assert_array_equal(part[name], expected, err_msg=name)
    assert len(texts.read) == (part["last"] >= 0).sum()
    assert len(texts.read) < whole["texts_used"] or len(mine) == CHIPS


def test_counts_are_those_of_the_whole_batch(batches):
    part = dataclasses.replace(batches, mine=(2, 3))[0]
    whole = batches[0]
    assert part["texts_used"] == (whole["last"] >= 0).sum()
    assert part["tokens_used"] == (whole["segments"] > 0).sum()
    assert part["positions"] == whole["tokens"].size


def test_embeddings_of_a_teacher_are_those_of_own_queries(batches):
    visited = batches._visit(0)
    teacher = np.random.default_rng(1).normal(size=(len(visited.texts), 3, 4)).astype(np.float32)
    own = teacher.reshape(CHIPS, -1, 3, 4)[[1, 6]].reshape(-1, 3, 4)
    fields = pack_batch(
        batches.table, visited.texts, visited.data_set, batches.layout, teacher=own, mine=(1, 6)
    )  # fmt: skip
    np.testing.assert_array_equal(fields["teacher"], own)
