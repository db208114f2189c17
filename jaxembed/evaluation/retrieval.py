"""Ranking metrics of retrieval: MRR, nDCG and recall, from embeddings or from ranked documents."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxembed.errors import InputError

DEPTH = 100
"""How far down the ranks the metrics look."""

Relevant = Sequence[Collection[int]] | Int[np.ndarray, " queries"]
"""For each query the indices of the documents that answer it; an array where each query has exactly one."""


def retrieval_metrics(
    query_embeddings: Float[np.ndarray, "queries dim"],
    document_embeddings: Float[np.ndarray, "documents dim"],
    relevant: Relevant,
    block: int = 1024,
) -> dict[str, float]:
    """Metrics of `metrics_from_ranks` when documents are ranked by their dot product with each query.

    Raises:
      InputError: an embedding is not finite, or a query has no relevant document or one that does not exist.
    """
    ranks = top_documents(query_embeddings, document_embeddings, DEPTH, block)
    return metrics_from_ranks(ranks, relevant, len(document_embeddings))


def metrics_from_ranks(
    ranks: Int[np.ndarray, "queries depth"], relevant: Relevant, documents: int | None = None
) -> dict[str, float]:
    """mrr@10, ndcg@10, recall@1, recall@10 and recall@100, each a mean over the queries.

    With hits h_r ∈ {0, 1} at rank r = 1, 2, … and n relevant documents of a query:

    - MRR@k: 1 / (smallest r ≤ k with h_r = 1), 0 where there is none (Voorhees, TREC-8, 1999).
    - nDCG@k: Σ_{r ≤ k} h_r / log2(r + 1), divided by its largest value Σ_{r ≤ min(n, k)} 1 / log2(r + 1)
      (Järvelin and Kekäläinen, TOIS 2002, with binary gains; as trec_eval and MTEB have it).
    - recall@k: Σ_{r ≤ k} h_r / n.

    Args:
      ranks: document indices, best first; −1 where nothing was retrieved.
      relevant: the documents that answer each query.
      documents: how many there are, to check `relevant` against.

    Raises:
      InputError: a query has no relevant document or one that does not exist, or the counts of queries differ.
    """
    sets = _relevant_sets(relevant, len(ranks), documents)
    ranks = ranks[:, :DEPTH]
    hits = np.zeros((len(ranks), DEPTH))
    for row, (ranked, wanted) in enumerate(zip(ranks, sets)):
        hits[row, : len(ranked)] = np.isin(ranked, list(wanted))
    counts = np.array([len(wanted) for wanted in sets], np.float64)

    first = np.where(hits[:, :10].any(axis=1), hits[:, :10].argmax(axis=1) + 1.0, np.inf)
    discounts = 1.0 / np.log2(np.arange(2, 12))
    ideal = np.cumsum(discounts)[np.minimum(counts, 10).astype(int) - 1]
    metrics = {"mrr@10": 1.0 / first, "ndcg@10": hits[:, :10] @ discounts / ideal}
    for k in (1, 10, 100):
        metrics[f"recall@{k}"] = hits[:, :k].sum(axis=1) / counts
    return {name: float(values.mean()) for name, values in metrics.items()}


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


def _relevant_sets(relevant: Relevant, queries: int, documents: int | None) -> list[set[int]]:
    sets = [{int(item)} if isinstance(item, int | np.integer) else {int(index) for index in item} for item in relevant]
    if len(sets) != queries or not sets:
        raise InputError(f"expected relevant documents for each query, found {len(sets)} for {queries} queries")
    for query, wanted in enumerate(sets):
        if not wanted:
            raise InputError(f"query {query} has no relevant document; leave such queries out")
        if min(wanted) < 0 or (documents is not None and max(wanted) >= documents):
            last = "the last" if documents is None else documents - 1
            raise InputError(f"query {query}: expected relevant documents from 0 to {last}, found {sorted(wanted)}")
    return sets
