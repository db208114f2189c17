"""The search against brute force in numpy: the same documents, in the same order, with the same scores."""

from collections.abc import Sequence

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.errors import InputError
from jaxembed.mining import search
from jaxembed.mining.search import Blocks, nearest, pair_scores, product_error


def unit(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def brute_force(
    queries: np.ndarray, documents: np.ndarray, k: int, excluded: Sequence[np.ndarray] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """One product in float64, one stable sort."""
    scores = (queries.astype(np.float64) @ documents.astype(np.float64).T).astype(np.float32)
    for row, some in enumerate(excluded):
        scores[row, some] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(scores, order, 1)
    rows = np.where(np.isfinite(found), order, -1)
    fill = ((0, 0), (0, k - rows.shape[1]))
    return np.pad(rows, fill, constant_values=-1), np.pad(found, fill, constant_values=-np.inf)


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 90),
    queries=st.integers(1, 12),
    k=st.sampled_from([1, 9, 30]),
    repeats=st.integers(1, 40),
    devices=st.sampled_from([1, 3, 8]),
    block=st.sampled_from([5, 32, 1000]),
    seed=st.integers(0, 99),
)
def test_equals_brute_force(
    count: int, queries: int, k: int, repeats: int, devices: int, block: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    documents = unit(-(-count // repeats), 7, seed)[random.integers(0, -(-count // repeats), count)]  # many are equal
    asked = unit(queries, 7, seed + 1)
    excluded = [random.choice(count, random.integers(0, min(count, 9) + 1), replace=False) for _ in range(queries)]
    found = nearest(asked, documents, k, excluded=excluded, blocks=Blocks(block, 4), devices=jax.devices()[:devices])
    expected = brute_force(asked, documents, k, excluded)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_one_device_and_eight_and_any_block_find_the_same() -> None:
    asked, documents = unit(70, 48), unit(5000, 48, 1)
    expected = brute_force(asked, documents, 100)
    for devices in (1, 8):
        for blocks in (Blocks(), Blocks(700, 32)):
            found = nearest(asked, documents, 100, blocks=blocks, devices=jax.devices()[:devices])
            np.testing.assert_array_equal(found[0], expected[0])
            np.testing.assert_array_equal(found[1], expected[1])


def test_only_candidates_are_found() -> None:
    asked, documents = unit(5, 16), unit(300, 16, 1)
    found = nearest(asked, documents, 20, candidates=130, blocks=Blocks(64, 8))
    np.testing.assert_array_equal(found[0], brute_force(asked, documents[:130], 20)[0])


def test_ties_wider_than_the_first_list_are_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = np.repeat(unit(3, 8), [1, 400, 9], axis=0)
    asked = documents[[1, 405, 0]]
    calls = []
    propose = search._propose
    monkeypatch.setattr(search, "_propose", lambda *arguments: calls.append(arguments[3]) or propose(*arguments))
    found = nearest(asked, documents, 10, blocks=Blocks(64, 8))
    np.testing.assert_array_equal(found[0], brute_force(asked, documents, 10)[0])
    assert calls[0] == 26
    assert calls[-1] == 410
    assert found[0][0].tolist() == list(range(1, 11))


def test_a_document_that_float32_puts_last_is_not_lost() -> None:
    """Documents whose scores differ by less than a float32 product can tell, more of them than the list is long."""
    random = np.random.default_rng(3)
    base = unit(1, 256)[0]
    documents = np.repeat(base[None], 500, axis=0)
    documents += 1e-8 * random.standard_normal(documents.shape).astype(np.float32)
    asked = unit(1, 256)
    found = nearest(asked, documents, 5, blocks=Blocks(100, 8))
    expected = brute_force(asked, documents, 5)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("dim", [3, 128, 1024])
def test_the_bound_holds(dim: int) -> None:
    asked, documents = unit(64, dim), unit(512, dim, 1)
    computed = np.asarray(jax.numpy.matmul(asked, documents.T, precision="highest"))
    true = asked.astype(np.float64) @ documents.astype(np.float64).T
    assert np.abs(computed - true).max() <= product_error(dim)


def test_pair_scores_reads_each_block_once() -> None:
    class Reads:
        shape = (100, 16)

        def __init__(self) -> None:
            self.values, self.slices = unit(100, 16), []

        def __getitem__(self, rows: slice) -> np.ndarray:
            self.slices.append((rows.start, rows.stop))
            return self.values[rows]

    documents, asked = Reads(), unit(4, 16, 1)
    query_of, row_of = np.array([3, 0, 1, 2, 3]), np.array([99, 3, 3, 12, 0])
    found = pair_scores(asked, documents, query_of, row_of, block=10)
    true = np.einsum("pd,pd->p", asked[query_of].astype(float), documents.values[row_of].astype(float))
    np.testing.assert_array_equal(found, true.astype(np.float32))
    assert documents.slices == [(0, 4), (12, 13), (99, 100)]


def test_an_approximate_search_gives_exact_scores_in_order() -> None:
    asked, documents = unit(20, 32), unit(2000, 32, 1)
    rows, scores = nearest(asked, documents, 50, recall=0.9)
    exact = brute_force(asked, documents, 50)[0]
    found = np.mean([len(np.intersect1d(a, b)) / 50 for a, b in zip(rows, exact)])
    assert found >= 0.9
    true = np.einsum("qd,qkd->qk", asked.astype(float), documents[rows].astype(float)).astype(np.float32)
    np.testing.assert_array_equal(scores, true)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_nothing_to_search_and_too_much() -> None:
    rows, scores = nearest(unit(2, 4), unit(3, 4), 2, candidates=0)
    assert (rows == -1).all()
    assert np.isneginf(scores).all()

    class Huge:
        shape = (2**31, 4)

        def __getitem__(self, rows: slice) -> np.ndarray:
            raise AssertionError

    with pytest.raises(InputError, match="expected fewer than"):
        nearest(unit(2, 4), Huge(), 2)
