import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from jaxembed.errors import InputError
from jaxembed.evaluation.retrieval import metrics_from_ranks, retrieval_metrics, top_columns, top_documents

NAMES = {"mrr@10", "ndcg@10", "recall@1", "recall@10", "recall@100"}


def brute_force(scores: np.ndarray, relevant: list[set[int]]) -> dict[str, float]:
    """The metrics as their definitions read, one query at a time."""
    totals = dict.fromkeys(NAMES, 0.0)
    for row, wanted in zip(scores, relevant):
        order = sorted(range(len(row)), key=lambda document: (-row[document], document))
        ranks = [order.index(document) + 1 for document in wanted]
        totals["mrr@10"] += 1 / min(ranks) if min(ranks) <= 10 else 0
        gained = sum(1 / np.log2(rank + 1) for rank in ranks if rank <= 10)
        totals["ndcg@10"] += gained / sum(1 / np.log2(rank + 1) for rank in range(1, min(len(wanted), 10) + 1))
        for k in (1, 10, 100):
            totals[f"recall@{k}"] += sum(rank <= k for rank in ranks) / len(wanted)
    return {name: total / len(relevant) for name, total in totals.items()}


@st.composite
def tasks(draw):
    """Embeddings of small whole numbers, so that scores are exact in float32 and ties are many."""
    queries, documents = draw(st.integers(1, 7)), draw(st.integers(1, 150))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.integers(1, 5))
    q = rng.integers(-spread, spread + 1, (queries, 3)).astype(np.float32)
    d = rng.integers(-spread, spread + 1, (documents, 3)).astype(np.float32)
    relevant = [
        set(rng.choice(documents, rng.integers(1, min(documents, 20) + 1), False).tolist()) for _ in range(queries)
    ]
    return q, d, relevant


@settings(max_examples=150, deadline=None)
@given(tasks(), st.integers(1, 9))
def test_equals_the_definitions_whatever_the_block(task, block):
    queries, documents, relevant = task
    expected = brute_force(queries.astype(np.float64) @ documents.T.astype(np.float64), relevant)
    found = retrieval_metrics(queries, documents, relevant, block=block)
    assert found.keys() == NAMES
    assert found == pytest.approx(expected, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(tasks(), st.integers(1, 160), st.integers(1, 9))
def test_top_documents_are_a_stable_sort(task, k, block):
    queries, documents, _ = task
    order = np.argsort(-(queries @ documents.T), axis=1, kind="stable")[:, :k]
    found = top_documents(queries, documents, k, block)
    assert found.shape == (len(queries), k)
    np.testing.assert_array_equal(found[:, : order.shape[1]], order)
    assert (found[:, order.shape[1] :] == -1).all()


def test_ndcg_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    queries, documents = rng.standard_normal((40, 8), np.float32), rng.standard_normal((300, 8), np.float32)
    truth = rng.random((40, 300)) < 0.05
    truth[:, 0] |= ~truth.any(axis=1)
    found = retrieval_metrics(queries, documents, [set(np.flatnonzero(row).tolist()) for row in truth])
    assert found["ndcg@10"] == pytest.approx(ndcg_score(truth, queries @ documents.T, k=10), abs=1e-9)


def test_agrees_with_sentence_transformers():
    torch = pytest.importorskip("torch")
    evaluation = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
    rng = np.random.default_rng(1)
    queries, documents = rng.standard_normal((60, 16), np.float32), rng.standard_normal((500, 16), np.float32)
    queries, documents = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, documents))
    relevant = [{int(i) for i in rng.choice(500, rng.integers(1, 15), False)} for _ in range(60)]

    class Precomputed(evaluation.InformationRetrievalEvaluator):
        def embed_inputs(self, model, sentences, **kwargs):
            table = {"q": queries, "d": documents}
            return torch.from_numpy(np.stack([table[text[0]][int(text[1:])] for text in sentences]))

    evaluator = Precomputed(
        {str(i): f"q{i}" for i in range(60)},
        {str(i): f"d{i}" for i in range(500)},
        {str(i): {str(item) for item in wanted} for i, wanted in enumerate(relevant)},
        mrr_at_k=[10],
        ndcg_at_k=[10],
        precision_recall_at_k=[1, 10, 100],
        score_functions={"dot": lambda a, b: a @ b.T},
        show_progress_bar=False,
        write_csv=False,
    )
    theirs = evaluator.compute_metrices(model=None)["dot"]
    ours = retrieval_metrics(queries, documents, relevant)
    assert ours["mrr@10"] == pytest.approx(theirs["mrr@k"][10], abs=1e-9)
    assert ours["ndcg@10"] == pytest.approx(theirs["ndcg@k"][10], abs=1e-9)
    for k in (1, 10, 100):
        assert ours[f"recall@{k}"] == pytest.approx(theirs["recall@k"][k], abs=1e-9)


def test_one_relevant_document_each_may_be_an_array():
    rng = np.random.default_rng(2)
    queries, documents = rng.standard_normal((9, 4), np.float32), rng.standard_normal((30, 4), np.float32)
    answers = rng.integers(0, 30, 9)
    assert retrieval_metrics(queries, documents, answers) == retrieval_metrics(
        queries, documents, [{int(answer)} for answer in answers]
    )


def test_what_was_not_retrieved_is_not_a_hit():
    ranks = np.array([[2, -1, -1], [-1, -1, -1]])
    found = metrics_from_ranks(ranks, [{2}, {0, 1}])
    assert found == {"mrr@10": 0.5, "ndcg@10": 0.5, "recall@1": 0.5, "recall@10": 0.5, "recall@100": 0.5}


def test_equal_scores_go_to_the_left():
    scores = np.array([[1.0, 2.0, 1.0, 2.0, 1.0]])
    assert top_columns(scores, 3).tolist() == [[1, 3, 0]]
    assert top_columns(scores, 9).tolist() == [[1, 3, 0, 2, 4]]


@pytest.mark.parametrize(
    ("relevant", "message"),
    [
        ([{0}], "found 1 for 2 queries"),
        ([{0}, set()], "query 1 has no relevant document"),
        ([{0}, {5}], r"query 1: expected relevant documents from 0 to 4, found \[5\]"),
        ([{-1}, {1}], r"query 0: .* found \[-1\]"),
    ],
)
def test_relevant_documents_have_to_exist(relevant, message):
    with pytest.raises(InputError, match=message):
        retrieval_metrics(np.ones((2, 3), np.float32), np.ones((5, 3), np.float32), relevant)


def test_embeddings_have_to_be_finite():
    broken = np.ones((5, 3), np.float32)
    broken[3, 1] = np.nan
    with pytest.raises(InputError, match="1 of 5 document embeddings, first in number 3"):
        retrieval_metrics(np.ones((2, 3), np.float32), broken, [{0}, {1}])
