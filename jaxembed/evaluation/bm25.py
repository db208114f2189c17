"""BM25 on the texts that an embedder is evaluated on: the bar that it has to clear."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxembed.evaluation.retrieval import DEPTH, Relevant, metrics_from_ranks, top_columns, without_own

_WORD = re.compile(r"\w+")
_INSIDE = re.compile(r"_+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def bm25_metrics(
    queries: Sequence[str],
    documents: Sequence[str],
    relevant: Relevant,
    split_identifiers: bool,
    own: Int[np.ndarray, " queries"] | None = None,
) -> dict[str, float]:
    """The metrics of `retrieval.metrics_from_ranks` for BM25 over `words`.

    Scoring is bm25s's default: Lucene's variant, k1 = 1.5, b = 0.75, no stemming, no stop words (Lù, arXiv
    2407.03618). A document that shares no word with the query is not retrieved; of equal scores the lower index comes
    first.

    Args:
      own: as of `retrieval.retrieval_metrics`.

    Raises:
      InputError: a query has no relevant document or one that does not exist, or the counts of queries differ.
    """
    # Not at the top: importing bm25s runs a first computation in JAX, before a program could set JAX up.
    import bm25s

    corpus = [words(text, split_identifiers) for text in documents]
    ranks = np.full((len(queries), DEPTH + 1), -1, np.int64)
    if any(corpus):
        index = bm25s.BM25()
        index.index(corpus, show_progress=False)
        for row, query in enumerate(queries):
            known = index.get_tokens_ids(words(query, split_identifiers))
            scores = index.get_scores_from_ids(known)
            best = top_columns(scores[None], DEPTH + 1)[0]
            found = best[scores[best] > 0]
            ranks[row, : len(found)] = found
    if own is not None:
        ranks = without_own(ranks, own)
    return metrics_from_ranks(ranks, relevant, len(documents))


def words(text: str, split_identifiers: bool) -> list[str]:
    """Lower-cased runs of letters, digits and underscores, in order.

    With `split_identifiers` the parts of `snake_case` and `camelCase` follow the identifier that they stand in:

    >>> words("def readHTTPHeader(max_size)", True)
    ['def', 'readhttpheader', 'read', 'http', 'header', 'max_size', 'max', 'size']
    """
    found = []
    for word in _WORD.findall(text):
        found.append(word.lower())
        if split_identifiers:
            parts = [part.lower() for part in _INSIDE.split(word) if part]
            if parts != [word.lower()]:
                found.extend(parts)
    return found
