"""Ranking metrics of retrieval: MRR, nDCG and recall, from embeddings or from ranked documents."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxembed.errors import InputError

DEPTH = 100
"""How far down the ranks the metrics look."""

Relevant = Sequence[Collection[int]] | Int[np.ndarray, " queries"]
"""For each query the indices of the documents that answer it, or their grades by index; an array where each query has
exactly one."""


def retrieval_metrics(
    query_embeddings: Float[np.ndarray, "queries dim"],
    document_embeddings: Float[np.ndarray, "documents dim"],
    relevant: Relevant,
    block: int = 1024,
    own: Int[np.ndarray, " queries"] | None = None,
) -> dict[str, float]:
    """Metrics of `metrics_from_ranks` when documents are ranked by their dot product with each query.

    Args:
      own: the document that each query is itself, which is left out of its ranks; −1: none.

    Raises:
      InputError: an embedding is not finite, or a query has no relevant document or one that does not exist.
    """
    ranks = top_documents(query_embeddings, document_embeddings, DEPTH + 1, block)
    if own is not None:
        ranks = without_own(ranks, own)
    return metrics_from_ranks(ranks, relevant, len(document_embeddings))


def metrics_from_ranks(
    ranks: Int[np.ndarray, "queries depth"], relevant: Relevant, documents: int | None = None
) -> dict[str, float]:
    """mrr@10, ndcg@10, recall@1, recall@10 and recall@100, each a mean over the queries.

    With hits h_r ∈ {0, 1} at rank r = 1, 2, …, their grades g_r (1 where there are none, 0 where there is no hit) and n
    relevant documents of a query:

    - MRR@k: 1 / (smallest r ≤ k with h_r = 1), 0 where there is none (Voorhees, TREC-8, 1999).
    - nDCG@k: Σ_{r ≤ k} g_r / log2(r + 1), divided by its largest value, that of the n grades in descending order
      (Järvelin and Kekäläinen, TOIS 2002, with grades as gains; as trec_eval and MTEB have it).
    - recall@k: Σ_{r ≤ k} h_r / n.

    Args:
      ranks: document indices, best first; −1 where nothing was retrieved.
      relevant: the documents that answer each query.
      documents: how many there are, to check `relevant` against.

    Raises:
      InputError: a query has no relevant document, one that does not exist or one without a grade above 0, or the
        counts of queries differ.
    """
    grades = _grades(relevant, len(ranks), documents)
    ranks = ranks[:, :DEPTH]
    gains, best = np.zeros((len(ranks), DEPTH)), np.zeros((len(ranks), 10))
    for row, (ranked, wanted) in enumerate(zip(ranks.tolist(), grades)):
        gains[row, : len(ranked)] = [wanted.get(document, 0.0) for document in ranked]
        highest = sorted(wanted.values(), reverse=True)[:10]
        best[row, : len(highest)] = highest
    hits = gains > 0
    counts = np.array([len(wanted) for wanted in grades], np.float64)

    first = np.where(hits[:, :10].any(axis=1), hits[:, :10].argmax(axis=1) + 1.0, np.inf)
    discounts = 1.0 / np.log2(np.arange(2, 12))
    metrics = {"mrr@10": 1.0 / first, "ndcg@10": gains[:, :10] @ discounts / (best @ discounts)}
    for k in (1, 10, 100):
        metrics[f"recall@{k}"] = hits[:, :k].sum(axis=1) / counts
    return {name: float(values.mean()) for name, values in metrics.items()}


def without_own(
    ranks: Int[np.ndarray, "queries depth"], own: Int[np.ndarray, " queries"]
) -> Int[np.ndarray, "queries depth"]:
    """The ranks without the document that each query is itself (−1: none); what stood behind it moves up.

    >>> without_own(np.array([[4, 2, 7], [1, 3, 5]]), np.array([2, -1]))
    array([[ 4,  7, -1],
           [ 1,  3,  5]])
    """
    found = (ranks == own[:, None]) & (ranks >= 0)
    order = np.argsort(found, axis=1, kind="stable")
    return np.take_along_axis(np.where(found, -1, ranks), order, 1)


def chunked_mrr(
    query_embeddings: Float[np.ndarray, "pairs dim"], document_embeddings: Float[np.ndarray, "pairs dim"], size: int
) -> float:
    """Mean reciprocal rank of each query's own document among the `size` documents of its chunk.

    As the CodeSearchNet repository (arXiv 1909.09436, src/model_test.py) counts: documents that score as the right one
    does stand before it. The code of a query is ranked, as the paper says; the repository's script ranks the queries of
    the chunk for each code.

    Args:
      query_embeddings: chunk after chunk.
      document_embeddings: in the same order.
      size: pairs of a chunk.

    Raises:
      InputError: an embedding is not finite, or the pairs are not whole chunks.
    """
    queries, documents = _finite(query_embeddings, "query"), _finite(document_embeddings, "document")
    if not len(queries) or len(queries) % size:
        raise InputError(f"expected chunks of {size} pairs, found {len(queries)} pairs")
    reciprocals = []
    for start in range(0, len(queries), size):
        scores = queries[start : start + size] @ documents[start : start + size].T
        ranks = (scores >= np.diagonal(scores)[:, None]).sum(1)
        reciprocals.append(1.0 / ranks)
    return float(np.concatenate(reciprocals).mean())


def top_documents(
    query_embeddings: Float[np.ndarray, "queries dim"],
    document_embeddings: Float[np.ndarray, "documents dim"],
    k: int,
    block: int = 1024,
) -> Int[np.ndarray, "queries k"]:
    """Indices of the k documents with the largest dot products, best first; of equal scores the lower index first.

    Scores are float32 and exist for `block` queries and 16 · `block` documents at a time. With fewer than k documents
    the rest of a row is −1.

    Raises:
      InputError: an embedding is not finite.
    """
    queries, documents = _finite(query_embeddings, "query"), _finite(document_embeddings, "document")
    ranks = np.full((len(queries), k), -1, np.int64)
    for start in range(0, len(queries), block):
        part = queries[start : start + block]
        scores, ids = np.empty((len(part), 0), np.float32), np.empty((len(part), 0), np.int64)
        for first in range(0, len(documents), 16 * block):
            more = part @ documents[first : first + 16 * block].T
            columns = top_columns(more, k)
            # Those kept so far stand first: their indices are lower, so that equal scores stay in order.
            scores = np.concatenate([scores, np.take_along_axis(more, columns, 1)], axis=1)
            ids = np.concatenate([ids, first + columns], axis=1)
            best = top_columns(scores, k)
            scores, ids = np.take_along_axis(scores, best, 1), np.take_along_axis(ids, best, 1)
        ranks[start : start + len(part), : ids.shape[1]] = ids
    return ranks


def top_columns(scores: Float[np.ndarray, "rows columns"], k: int) -> Int[np.ndarray, "rows k"]:
    """The k columns (all, if fewer) of each row with the largest scores, best first, of equal scores the left first."""
    columns = scores.shape[1]
    if columns <= k:
        return np.argsort(-scores, axis=1, kind="stable")
    # The k-th largest score decides; of those equal to it only the leftmost that fit are taken.
    threshold = np.partition(scores, columns - k, axis=1)[:, columns - k, None]
    above, equal = scores > threshold, scores == threshold
    room = k - above.sum(axis=1, keepdims=True)
    taken = above | (equal & (np.cumsum(equal, axis=1) <= room))
    chosen = np.nonzero(taken)[1].reshape(len(scores), k)
    order = np.argsort(-np.take_along_axis(scores, chosen, 1), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, 1)


def _finite(embeddings: Float[np.ndarray, "texts dim"], role: str) -> Float[np.ndarray, "texts dim"]:
    embeddings = np.asarray(embeddings, np.float32)
    broken = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(broken):
        raise InputError(
            f"expected finite embeddings, found NaN or infinity in {len(broken)} of {len(embeddings)} {role} "
            f"embeddings, first in number {broken[0]}"
        )
    return embeddings


def _grades(relevant: Relevant, queries: int, documents: int | None) -> list[dict[int, float]]:
    grades = [_grades_of_query(item) for item in relevant]
    if len(grades) != queries or not grades:
        raise InputError(f"expected relevant documents for each query, found {len(grades)} for {queries} queries")
    for query, wanted in enumerate(grades):
        if not wanted:
            raise InputError(f"query {query} has no relevant document; leave such queries out")
        if min(wanted) < 0 or (documents is not None and max(wanted) >= documents):
            last = "the last" if documents is None else documents - 1
            raise InputError(f"query {query}: expected relevant documents from 0 to {last}, found {sorted(wanted)}")
        if not min(wanted.values()) > 0:
            raise InputError(f"query {query}: expected grades above 0, found {min(wanted.values()):g}")
    return grades


def _grades_of_query(item: int | np.integer | Collection[int]) -> dict[int, float]:
    if isinstance(item, int | np.integer):
        return {int(item): 1.0}
    if isinstance(item, Mapping):
        return {int(index): float(grade) for index, grade in item.items()}
    return {int(index): 1.0 for index in item}
