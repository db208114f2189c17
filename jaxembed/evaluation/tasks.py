"""Local tasks: what an embedder is evaluated on, as plain data; `task_reader` reads them from people's files.

Nothing here computes a score: `mteb_tasks` turns tasks into mteb's, `dev_set` evaluates some of them in training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class _Task:
    """What all tasks have.

    Attributes:
        name: of the task in tables.
        language: mteb's code of the texts' language.
        instruction: of queries (of all texts, where no text is a document); None: the model's own.
        notes: what was found wrong in the files and left out, with counts.
    """

    type: ClassVar[str]
    """mteb's name of the kind of task; `metric` is its name of the main metric."""

    name: str
    language: str = field(default="eng-Latn", kw_only=True)
    instruction: str | None = field(default=None, kw_only=True)
    notes: tuple[str, ...] = field(default=(), kw_only=True)


@dataclass(frozen=True)
class RetrievalTask(_Task):
    """Each query's documents among all.

    Attributes:
        queries: texts by id; each has a relevant document.
        corpus: texts by id; a title stands before its text.
        relevant: grades above 0 by query id and document id.
        metric: the main metric.
        groups: for code search among 1 + 999: the ids of the queries of each chunk. A query's id is that of its one
            document too, and only the documents of its chunk are searched.
        ignore_identical_ids: queries are documents too, and the document with a query's id is none of its results.
    """

    type: ClassVar[str] = "Retrieval"

    queries: dict[str, str]
    corpus: dict[str, str]
    relevant: dict[str, dict[str, int]]
    metric: str = "ndcg_at_10"
    groups: tuple[tuple[str, ...], ...] = ()
    ignore_identical_ids: bool = False


@dataclass(frozen=True)
class StsTask(_Task):
    """Pairs of texts and how alike they are."""

    type: ClassVar[str] = "STS"
    metric: ClassVar[str] = "cosine_spearman"

    first: list[str]
    second: list[str]
    grades: list[float]


@dataclass(frozen=True)
class PairTask(_Task):
    """Pairs of texts and whether they belong together: labels are 0 and 1."""

    type: ClassVar[str] = "PairClassification"
    metric: ClassVar[str] = "max_ap"

    first: list[str]
    second: list[str]
    labels: list[int]


@dataclass(frozen=True)
class ClassificationTask(_Task):
    """Texts and their labels, to learn from and to be tested on."""

    type: ClassVar[str] = "Classification"
    metric: ClassVar[str] = "accuracy"

    train_texts: list[str]
    train_labels: list[str]
    test_texts: list[str]
    test_labels: list[str]


@dataclass(frozen=True)
class ClusteringTask(_Task):
    """Texts and the labels that their clusters should agree with."""

    type: ClassVar[str] = "Clustering"
    metric: ClassVar[str] = "v_measure"

    texts: list[str]
    labels: list[str]


@dataclass(frozen=True)
class RerankingTask(_Task):
    """Queries, each with its own candidates; labels above 0 are relevant."""

    type: ClassVar[str] = "Reranking"
    metric: ClassVar[str] = "map_at_1000"

    queries: list[str]
    candidates: list[list[str]]
    labels: list[list[int]]


@dataclass(frozen=True)
class BitextTask(_Task):
    """Texts and their translations, in the same order."""

    type: ClassVar[str] = "BitextMining"
    metric: ClassVar[str] = "f1"

    first: list[str]
    second: list[str]


LocalTask = RetrievalTask | StsTask | PairTask | ClassificationTask | ClusteringTask | RerankingTask | BitextTask
