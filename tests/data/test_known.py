"""Known positives against counting by hand."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.data import known
from jaxembed.data.known import KnownPositives

pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(10, 20)), min_size=1, max_size=60)


@given(data=pairs, picks=st.lists(st.integers(0, 1000), min_size=1, max_size=12), others=st.sets(st.integers(10, 25)))
@settings(max_examples=200, deadline=None)
def test_a_batch_s_other_positives_are_those_of_all_its_pairs(data, picks, others):
    queries, positives = np.array(data, np.uint64).T
    index = KnownPositives.of(queries, positives)
    batch = [data[pick % len(data)] for pick in picks]
    texts = np.array(sorted({text for pair in batch for text in pair} | others), np.uint64)
    own, documents = np.array(batch, np.uint64).T
    found = index.codes(own, documents, texts)
    assert found.shape == (len(batch), index.width)
    for row, (query, positive) in zip(found, batch):
        everywhere = {document for asked, document in data if asked == query} - {positive}
        assert sorted(texts[row[row >= 0]].tolist()) == sorted(everywhere & set(texts.tolist()))


def test_no_more_than_the_width_that_is_compiled_for(monkeypatch):
    monkeypatch.setattr(known, "_MOST", 3)
    queries, positives = np.zeros(9, np.uint64), np.arange(1, 10, dtype=np.uint64)
    index = KnownPositives.of(queries, positives)
    found = index.codes(queries[:1], positives[:1], np.arange(10, dtype=np.uint64))
    np.testing.assert_array_equal(found, [[2, 3, 4]])


def test_queries_of_one_positive_need_no_room():
    index = KnownPositives.of(np.arange(5, dtype=np.uint64), np.arange(5, 10, dtype=np.uint64))
    assert index.width == 0
    assert index.codes(np.arange(2, dtype=np.uint64), np.arange(5, 7, dtype=np.uint64), np.arange(9)).shape == (2, 0)
