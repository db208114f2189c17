"""Dev sets: what a run is evaluated on, without torch.

Pairs (retrieval of each query's documents among all, BM25 on the same), graded pairs, and the local tasks of these
kinds, code search and classification.
"""

import dataclasses
import itertools
import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Float, Int

from jaxembed.data.sources import Examples
from jaxembed.data.text_store import Picked, TextStore
from jaxembed.embedder import Embedder
from jaxembed.errors import InputError
from jaxembed.evaluation.bm25 import bm25_metrics
from jaxembed.evaluation.classification import classification_metrics, require_scikit_learn, undersamples
from jaxembed.evaluation.retrieval import chunked_mrr, retrieval_metrics, top_documents
from jaxembed.evaluation.tasks import ClassificationTask, LocalTask, RetrievalTask, StsTask

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

    def labelled(self, embedder: Embedder, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
        """Vectors of texts in the part of queries, of unit length where the text format says so."""
        return self._encode(embedder, texts, "query", self.query_instruction, normalize=None)

    def documents(self, embedder: Embedder, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
        """Unit vectors of texts in the part of documents."""
        return self._encode(embedder, texts, "query" if self.symmetric else "document", self.document_instruction)

    def _encode(
        self,
        embedder: Embedder,
        texts: Sequence[str],
        role: str,
        instruction: str | None,
        normalize: bool | None = True,
    ) -> np.ndarray:
        options: dict[str, Any] = {}
        if instruction is not None:
            options["prompt"] = embedder.text_format.role(role).prefix + instruction
        encode = embedder.encode_query if role == "query" else embedder.encode_document
        return encode(texts, normalize_embeddings=normalize, show_progress_bar=False, **options)


AS_THE_FORMAT = Reading()


@dataclasses.dataclass(frozen=True)
class DevSet:
    """Queries, distinct documents, and which document answers which query.

    A query that occurs with several documents is one query with several answers. Where the documents lie in a corpus,
    all of it is searched. Of equal scores the document that stands first wins.
    """

    metrics: ClassVar[tuple[str, ...]] = ("mrr@10", "ndcg@10", "recall@1", "recall@10", "recall@100", "loss")

    name: str
    queries: list[str]
    documents: list[str]
    ids: list[str]
    """Where each document comes from."""
    relevant: Sequence[Collection[int]]
    """Of each query the places of its documents, or their grades by place."""
    reading: Reading = AS_THE_FORMAT
    own: Int[np.ndarray, " queries"] | None = None
    """Where queries are documents themselves: the place of each, which is none of its results; −1: it is none."""

    @property
    def described(self) -> str:
        """How large it is."""
        return f"{len(self.queries):,} queries, {len(self.documents):,} documents"

    @property
    def texts(self) -> Iterator[str]:
        """All that is embedded."""
        return itertools.chain(self.queries, self.documents)

    @classmethod
    def of_task(cls, task: RetrievalTask, reading: Reading = AS_THE_FORMAT) -> "DevSet":
        """Documents stand by descending id, so that equal scores rank as trec_eval, and mteb with it, ranks them."""
        ids = sorted(task.corpus, reverse=True)
        place = {one: index for index, one in enumerate(ids)}
        relevant = [{place[one]: grade for one, grade in task.relevant[query].items()} for query in task.queries]
        documents = [task.corpus[one] for one in ids]
        own = np.array([place.get(one, -1) for one in task.queries]) if task.ignore_identical_ids else None
        return cls(task.name, list(task.queries.values()), documents, ids, relevant, reading, own)

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
        metrics = retrieval_metrics(queries, documents, self.relevant, own=self.own)
        pairs = [(query, document) for query, found in enumerate(self.relevant) for document in sorted(found)]
        metrics["loss"] = _loss(queries, documents, np.array(pairs), temperature, batch_size)
        return metrics

    def bm25(self) -> dict[str, dict[str, float]]:
        """The same metrics of BM25, on plain words and on split identifiers."""
        return {
            name: bm25_metrics(self.queries, self.documents, self.relevant, split, self.own)
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

    metrics: ClassVar[tuple[str, ...]] = ("spearman",)

    name: str
    anchors: Sequence[str]
    others: Sequence[str]
    grades: Float[np.ndarray, " pairs"]
    reading: Reading = AS_THE_FORMAT

    @property
    def described(self) -> str:
        """How large it is."""
        return f"{len(self.grades):,} graded pairs"

    @property
    def texts(self) -> Iterator[str]:
        """All that is embedded."""
        return itertools.chain(self.anchors, self.others)

    def evaluate(self, embedder: Embedder, *, temperature: float, batch_size: int) -> dict[str, float]:
        """spearman; the arguments of `DevSet.evaluate` are of no use here."""
        cosines = (self.reading.queries(embedder, self.anchors) * self.reading.documents(embedder, self.others)).sum(1)
        if not np.isfinite(cosines).all():
            raise InputError("expected finite embeddings, found NaN or infinity among those of graded pairs")
        result: Any = scipy.stats.spearmanr(cosines, self.grades)
        return {"spearman": float(result.statistic)}

    def bm25(self) -> dict[str, dict[str, float]]:
        """Nothing: BM25 ranks documents."""
        return {}


@dataclasses.dataclass(frozen=True)
class ChunkedSet:
    """Code search among 1 + 999: pairs, chunk after chunk; each query's document is looked for in its chunk."""

    metrics: ClassVar[tuple[str, ...]] = ("mrr",)

    name: str
    queries: list[str]
    documents: list[str]
    size: int
    """Pairs of a chunk."""
    reading: Reading = AS_THE_FORMAT

    @property
    def described(self) -> str:
        """How large it is."""
        return f"{len(self.queries):,} pairs in chunks of {self.size:,}"

    @property
    def texts(self) -> Iterator[str]:
        """All that is embedded."""
        return itertools.chain(self.queries, self.documents)

    def evaluate(self, embedder: Embedder, *, temperature: float, batch_size: int) -> dict[str, float]:
        """mrr; the arguments of `DevSet.evaluate` are of no use here."""
        queries = self.reading.queries(embedder, self.queries)
        return {"mrr": chunked_mrr(queries, self.reading.documents(embedder, self.documents), self.size)}

    def bm25(self) -> dict[str, dict[str, float]]:
        """Nothing."""
        return {}


class ClassificationSet:
    """Labelled texts to learn from and to be tested on; of those to learn from, what the protocol draws."""

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1")

    def __init__(self, task: ClassificationTask, reading: Reading = AS_THE_FORMAT) -> None:
        """
        Raises:
            InputError: scikit-learn is not installed.
        """
        require_scikit_learn()
        self.name, self.reading = task.name, reading
        drawn = undersamples(task.train_labels)
        rows = np.unique(np.concatenate(drawn))
        self._samples = [np.searchsorted(rows, sample) for sample in drawn]
        self._train = [task.train_texts[row] for row in rows]
        self._train_labels = [task.train_labels[row] for row in rows]
        self._test, self._test_labels = task.test_texts, task.test_labels

    @property
    def described(self) -> str:
        """How large it is."""
        return f"{len(self._train):,} texts to learn from, {len(self._test):,} texts to be tested on"

    @property
    def texts(self) -> Iterator[str]:
        """All that is embedded, and the labels."""
        return itertools.chain(self._train, self._train_labels, self._test, self._test_labels)

    def evaluate(self, embedder: Embedder, *, temperature: float, batch_size: int) -> dict[str, float]:
        """accuracy, f1; the arguments of `DevSet.evaluate` are of no use here."""
        train, test = (self.reading.labelled(embedder, texts) for texts in (self._train, self._test))
        return classification_metrics(train, self._samples, self._train_labels, test, self._test_labels)

    def bm25(self) -> dict[str, dict[str, float]]:
        """Nothing."""
        return {}


AnyDevSet = DevSet | GradedSet | ChunkedSet | ClassificationSet


def dev_task(
    task: LocalTask, query_instruction: str | None = None, document_instruction: str | None = None
) -> AnyDevSet:
    """A local task as a dev set; its metrics are those of mteb on the same embeddings.

    Args:
        task: retrieval, code search, STS or classification.
        query_instruction: of queries, and of all texts where none is a document; None: the task's, else the format's.
        document_instruction: of documents; None: the format's.

    Raises:
        InputError: a task of another kind, or scikit-learn is needed and missing.
    """
    if query_instruction is None:
        query_instruction = task.instruction
    reading = Reading(query_instruction, document_instruction)
    if isinstance(task, StsTask):
        reading = Reading(query_instruction, query_instruction, symmetric=True)
        return GradedSet(task.name, task.first, task.second, np.array(task.grades), reading)
    if isinstance(task, ClassificationTask):
        return ClassificationSet(task, reading)
    if not isinstance(task, RetrievalTask):
        raise InputError(
            f"data.dev: {task.name} is a task of mteb's type {task.type}; retrieval (code search too), STS and "
            "classification can be evaluated in training, the others by python -m jaxembed.evaluate"
        )
    if task.groups:
        ids = [one for group in task.groups for one in group]
        texts = [task.queries[one] for one in ids], [task.corpus[one] for one in ids]
        return ChunkedSet(task.name, *texts, len(task.groups[0]), reading)
    return DevSet.of_task(task, reading)


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
