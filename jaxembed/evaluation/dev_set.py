"""Dev sets: of pairs (retrieval of each query's document among all, BM25 on the same), and of graded pairs."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Float, Int

from jaxembed.data.sources import Examples
from jaxembed.data.text_store import Picked, TextStore
from jaxembed.embedder import Embedder
from jaxembed.errors import InputError
from jaxembed.evaluation.bm25 import bm25_metrics
from jaxembed.evaluation.retrieval import retrieval_metrics, top_documents

logger = logging.getLogger(__name__)

_LARGE = 200_000  # documents


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the texts of a dev set are read, where that is not as the model's text format says."""

    query_instruction: str | None = None
    document_instruction: str | None = None
    symmetric: bool = False
    """Documents are read as queries too."""

    def queries(self, embedder: Embedder, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
        """Unit vectors of texts in the part of queries."""
        return self._encode(embedder, texts, "query", self.query_instruction)

    def documents(self, embedder: Embedder, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
        """Unit vectors of texts in the part of documents."""
        return self._encode(embedder, texts, "query" if self.symmetric else "document", self.document_instruction)

    def _encode(self, embedder: Embedder, texts: Sequence[str], role: str, instruction: str | None) -> np.ndarray:
        options: dict[str, Any] = {}
        if instruction is not None:
            options["prompt"] = embedder.text_format.role(role).prefix + instruction
        encode = embedder.encode_query if role == "query" else embedder.encode_document
        return encode(texts, normalize_embeddings=True, show_progress_bar=False, **options)


AS_THE_FORMAT = Reading()


@dataclasses.dataclass(frozen=True)
class DevSet:
    """Queries, distinct documents, and which document answers which query.

    A query that occurs with several documents is one query with several answers. Where the documents lie in a corpus,
    all of it is searched.
    """

    name: str
    queries: list[str]
    documents: list[str]
    ids: list[str]
    """Where each document comes from."""
    relevant: list[set[int]]
    reading: Reading = AS_THE_FORMAT

    @classmethod
    def of(cls, examples: Examples, reading: Reading = AS_THE_FORMAT) -> "DevSet":
        if isinstance(examples.positives, Picked) and isinstance(examples.positives.store, TextStore):
            return cls._of_corpus(examples, examples.positives.store, examples.positives.rows, reading)
        documents = list(dict.fromkeys(examples.positives))
        number = {text: index for index, text in enumerate(documents)}
        sources = dict(zip(reversed(examples.positives), reversed(examples.ids)))
        relevant: dict[str, set[int]] = {}
        for anchor, positive in zip(examples.anchors, examples.positives):
            relevant.setdefault(anchor, set()).add(number[positive])
        ids = [sources[text] for text in documents]
        return cls(examples.name, list(relevant), documents, ids, list(relevant.values()), reading)

    @classmethod
    def _of_corpus(
        cls, examples: Examples, store: TextStore, rows: Int[np.ndarray, " pairs"], reading: Reading
    ) -> "DevSet":
        everything = np.arange(len(store))
        if len(store) > _LARGE:
            logger.warning("%s: every evaluation embeds all %s documents", examples.name, f"{len(store):,}")
        relevant: dict[str, set[int]] = {}
        for anchor, row in zip(examples.anchors, rows.tolist()):
            relevant.setdefault(anchor, set()).add(row)
        ids = [store.id_of(row) for row in everything.tolist()]
        documents = list(Picked(store, everything))
        return cls(examples.name, list(relevant), documents, ids, list(relevant.values()), reading)

    def evaluate(self, embedder: Embedder, *, temperature: float, batch_size: int) -> dict[str, float]:
        """mrr@10, ndcg@10, recall@1/10/100, and the loss: InfoNCE within batches of `batch_size` pairs.

        All by cosine, the model's similarity, whether its text format normalises or not.
        """
        queries = self.reading.queries(embedder, self.queries)
        documents = self.reading.documents(embedder, self.documents)
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
        found = self.reading.queries(embedder, queries)
        documents = self.reading.documents(embedder, self.documents)
        scores = found @ documents.T
        best = top_documents(found, documents, min(hits, len(documents)))

        def hit(row: np.ndarray, document: int) -> tuple[float, str, str]:
            return float(row[document]), self.ids[document], self.documents[document]

        return [[hit(row, document) for document in which] for row, which in zip(scores, best.tolist())]


@dataclasses.dataclass(frozen=True)
class GradedSet:
    """Pairs of texts and how alike they are: Spearman's correlation of the cosines with the grades."""

    name: str
    anchors: Sequence[str]
    others: Sequence[str]
    grades: Float[np.ndarray, " pairs"]
    reading: Reading = AS_THE_FORMAT

    def evaluate(self, embedder: Embedder, *, temperature: float, batch_size: int) -> dict[str, float]:
        """spearman; the arguments of `DevSet.evaluate` are of no use here."""
        cosines = (self.reading.queries(embedder, self.anchors) * self.reading.documents(embedder, self.others)).sum(1)
        result: Any = scipy.stats.spearmanr(cosines, self.grades)
        return {"spearman": float(result.statistic)}

    def bm25(self) -> dict[str, dict[str, float]]:
        """Nothing: BM25 ranks documents."""
        return {}


def dev_set(examples: Examples, reading: Reading = AS_THE_FORMAT) -> DevSet | GradedSet:
    """What examples can tell of an embedder: graded pairs a correlation, others retrieval.

    Raises:
        InputError: all grades are equal.
    """
    if not examples.graded:
        return DevSet.of(examples, reading)
    assert examples.scores is not None
    grades = examples.scores[:, 0]
    if np.ptp(grades) == 0:
        raise InputError(f"data.dev: all pairs of {examples.name} have the grade {grades[0]:g}, so nothing correlates")
    return GradedSet(examples.name, examples.anchors, examples.positives, grades, reading)


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
