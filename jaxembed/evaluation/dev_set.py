"""A dev set of pairs: retrieval of each query's document among all, the loss, BM25 on the same, example searches."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxembed.data.sources import Examples
from jaxembed.embedder import Embedder
from jaxembed.evaluation.bm25 import bm25_metrics
from jaxembed.evaluation.retrieval import retrieval_metrics, top_documents


@dataclasses.dataclass(frozen=True)
class DevSet:
    """Queries, distinct documents, and which document answers which query.

    A query that occurs with several documents is one query with several answers.
    """

    name: str
    queries: list[str]
    documents: list[str]
    ids: list[str]
    """Where each document comes from."""
    relevant: list[set[int]]

    @classmethod
    def of(cls, examples: Examples) -> "DevSet":
        documents = list(dict.fromkeys(examples.positives))
        number = {text: index for index, text in enumerate(documents)}
        sources = dict(zip(reversed(examples.positives), reversed(examples.ids)))
        relevant: dict[str, set[int]] = {}
        for anchor, positive in zip(examples.anchors, examples.positives):
            relevant.setdefault(anchor, set()).add(number[positive])
        ids = [sources[text] for text in documents]
        return cls(examples.name, list(relevant), documents, ids, list(relevant.values()))

    def evaluate(self, embedder: Embedder, *, temperature: float, batch_size: int) -> dict[str, float]:
        """mrr@10, ndcg@10, recall@1/10/100, and the loss: InfoNCE within batches of `batch_size` pairs.

        All by cosine, the model's similarity, whether its text format normalises or not.
        """
        queries = embedder.encode_query(self.queries, normalize_embeddings=True, show_progress_bar=False)
        documents = embedder.encode_document(self.documents, normalize_embeddings=True, show_progress_bar=False)
        metrics = retrieval_metrics(queries, documents, self.relevant)
        pairs = [(query, document) for query, found in enumerate(self.relevant) for document in sorted(found)]
        metrics["loss"] = _loss(queries, documents, np.array(pairs), temperature, batch_size)
        return metrics

    def bm25(self) -> dict[str, dict[str, float]]:
        """The same metrics of BM25, on plain words and on split identifiers."""
        return {
            name: bm25_metrics(self.queries, self.documents, self.relevant, split_identifiers=split)
            for name, split in (("BM25, plain words", False), ("BM25, split identifiers", True))
        }

    def search(self, embedder: Embedder, queries: list[str], hits: int = 3) -> list[list[tuple[float, str, str]]]:
        """For each query its best documents by cosine: (cosine, where from, text)."""
        found = embedder.encode_query(queries, normalize_embeddings=True, show_progress_bar=False)
        documents = embedder.encode_document(self.documents, normalize_embeddings=True, show_progress_bar=False)
        scores = found @ documents.T
        best = top_documents(found, documents, min(hits, len(documents)))

        def hit(row: np.ndarray, document: int) -> tuple[float, str, str]:
            return float(row[document]), self.ids[document], self.documents[document]

        return [[hit(row, document) for document in which] for row, which in zip(scores, best.tolist())]


def _loss(
    queries: np.ndarray, documents: np.ndarray, pairs: Int[np.ndarray, "pairs 2"], temperature: float, batch: int
) -> float:
    total = 0.0
    for start in range(0, len(pairs), batch):
        block = pairs[start : start + batch]
        logits = jnp.asarray(queries[block[:, 0]] @ documents[block[:, 1]].T, jnp.float32) / temperature
        highest = logits.max(1)
        log_sum = highest + jnp.log(jnp.exp(logits - highest[:, None]).sum(1))
        total += float((log_sum - jnp.diagonal(logits)).sum())
    return total / len(pairs)
