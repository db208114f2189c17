"""Local tasks as mteb's, so that mteb computes their scores, and what mteb's scores say of each text or query."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from mteb.abstasks import (
    AbsTask,
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata

from jaxembed.evaluation.items import MEASURES
from jaxembed.evaluation.mteb_model import LOCAL
from jaxembed.evaluation.tasks import (
    BitextTask,
    ClassificationTask,
    ClusteringTask,
    LocalTask,
    PairTask,
    RerankingTask,
    RetrievalTask,
    StsTask,
)

_SPLIT = "test"


def to_mteb(task: LocalTask) -> AbsTask:
    """A task of mteb's with the same texts; a new one each time, for mteb's hold the state of a random generator."""
    match task:
        case RetrievalTask():
            return _retrieval(task)
        case RerankingTask():
            return _reranking(task)
        case StsTask():
            columns = {"sentence1": task.first, "sentence2": task.second, "score": task.grades}
            scale = {"min_score": min(task.grades), "max_score": max(task.grades)}
            return _made(task, AbsTaskSTS, _data(test=columns), **scale)
        case PairTask():
            columns = {"sentence1": task.first, "sentence2": task.second, "labels": task.labels}
            return _made(task, AbsTaskPairClassification, _data(test=columns))
        case BitextTask():
            return _made(task, AbsTaskBitextMining, _data(test={"sentence1": task.first, "sentence2": task.second}))
        case ClassificationTask():
            tested = set(task.test_labels)
            # As numbers: mteb's average precision of two classes takes no other labels.
            # Those of the test stand first: where they are two, mteb wants them as 0 and 1.
            names = sorted({*task.train_labels, *task.test_labels}, key=lambda name: (name not in tested, name))
            data = _data(
                Features({"text": Value("string"), "label": ClassLabel(names=names)}),
                train={"text": task.train_texts, "label": task.train_labels},
                test={"text": task.test_texts, "label": task.test_labels},
            )
            return _made(task, AbsTaskClassification, data)
        case ClusteringTask():
            return _made(
                task,
                AbsTaskClustering,
                _data(test={"sentences": task.texts, "labels": task.labels}),
                max_fraction_of_documents_to_embed=None,  # all
                max_documents_per_cluster=min(AbsTaskClustering.max_documents_per_cluster, len(task.texts)),
            )


def local_metadata(task: LocalTask) -> TaskMetadata:
    """What mteb knows of a local task."""
    return TaskMetadata(
        name=task.name,
        description="a task from local files",
        type=cast(Any, task.type),  # one of its literals
        category="t2t",
        eval_langs=[task.language],
        eval_splits=[_SPLIT],
        main_score=task.metric,
        prompt=task.instruction,
        dataset={"path": LOCAL, "revision": _content_hash(task)},
    )


def _content_hash(task: LocalTask) -> str:
    return _hash([task.type, dataclasses.asdict(task)])


def data_hash(task: LocalTask) -> str:
    """Of the texts and what is known of them, whatever the task is called and with what instruction they are read."""
    values = dataclasses.asdict(task)
    return _hash(
        [task.type, {key: values[key] for key in values.keys() - {"name", "language", "instruction", "notes"}}]
    )


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


class Items:
    """Listens to an mteb task and keeps what a paired bootstrap needs, in an order that depends on the task alone.

    That is the value of each query of retrieval and reranking, cosine and grade of each pair of STS, in how many of
    mteb's draws each text of classification was labelled rightly, label and ranks of each pair, what each sentence was
    taken for, and the cluster that each document had in each of mteb's draws; where the main score is made of these.
    """

    def __init__(self, task: AbsTask) -> None:
        self.found: dict[tuple[str, str], dict[str, list[float]]] = {}
        """By subset and split."""
        self._task, self._main = task, task.metadata.main_score
        if isinstance(task, AbsTaskRetrieval):
            self._specific = task.task_specific_scores
            setattr(task, "task_specific_scores", self._retrieved)  # noqa: B010 (an instance's, in place of its class's)
        if isinstance(task, AbsTaskClustering):
            self._draws = _Draws()
            self._draws.setstate(task.rng_state.getstate())
            task.rng_state = self._draws
        # mteb calls this with all predictions where a folder for them is given; here nothing is written.
        setattr(task, "_save_task_predictions", self._predicted)  # noqa: B010 (as above)

    def _retrieved(
        self, scores: dict[str, dict[str, float]], qrels: Any, results: Any, hf_split: str, hf_subset: str
    ) -> dict[str, float]:
        measure, _, depth = self._main.partition("_at_")
        name = f"{_TREC_EVAL.get(measure)}_{depth}"
        queries = sorted(scores)
        if measure == "mrr":
            values = [
                _reciprocal(qrels[query], results[query], int(depth)) if depth else _among(qrels[query], results[query])
                for query in queries
            ]
            self.found[hf_subset, hf_split] = {"value": values}
        elif all(name in values for values in scores.values()):
            self.found[hf_subset, hf_split] = {"value": [scores[query][name] for query in queries]}
        return self._specific(scores, qrels, results, hf_split, hf_subset)

    def _predicted(
        self, predictions: Any, model: object, prediction_folder: object, hf_split: str, hf_subset: str
    ) -> None:
        data: Any = self._task.dataset
        data = data.get(hf_subset, data)
        if isinstance(self._task, AbsTaskSTS):
            items = {"cosine": list(predictions["cosine_scores"]), "grade": list(map(float, data[hf_split]["score"]))}
        elif self._task.metadata.type == "Classification" and self._main == "accuracy":
            labels = np.array(data[hf_split][cast(Any, self._task).label_column_name])
            right = [np.array(found) == labels for found in predictions]
            items = {"value": np.mean(right, axis=0).tolist()}
        elif isinstance(self._task, AbsTaskPairClassification) and self._main.endswith("_ap"):
            labels = data[hf_split][self._task.label_column_name]
            labels = labels[0] if len(labels) == 1 else labels  # of mteb 1: all pairs in one row
            items = {"label": list(map(int, labels)), **_ranks(predictions, self._main.removesuffix("_ap"))}
        elif isinstance(self._task, AbsTaskBitextMining) and self._main == "f1":
            parallel = self._task.parallel_subsets  # whose names are those of the columns
            split = data[hf_split]
            gold = [pair[1] for pair in split["gold"]] if "gold" in split else range(len(split))
            for name, found in predictions.items():
                items: dict[str, Any] = {"gold": list(map(int, gold[: len(found)]))}
                items["predicted"] = [int(each["corpus_id"]) for each in found]
                self.found[name if parallel else hf_subset, hf_split] = items
            return
        elif isinstance(self._task, AbsTaskClustering) and self._main == "v_measure":
            labels = data[hf_split][self._task.label_column_name]
            items = _clusterings(labels, predictions, self._draws.take())
        else:
            return
        self.found[hf_subset, hf_split] = items


class _Draws(random.Random):
    """Keeps what it has drawn."""

    def __init__(self) -> None:
        super().__init__()
        self._sample: list[int] | None = None
        self._choices: list[list[int]] = []

    def sample(self, *arguments: Any, **options: Any) -> list[Any]:
        self._sample = super().sample(*arguments, **options)
        return self._sample

    def choices(self, *arguments: Any, **options: Any) -> list[Any]:
        self._choices.append(super().choices(*arguments, **options))
        return self._choices[-1]

    def take(self) -> tuple[list[int] | None, list[list[int]]]:
        """The documents that were sampled, None: all, and those of each clustering, as numbers among these."""
        found = self._sample, self._choices
        self._sample, self._choices = None, []
        return found


def _clusterings(
    labels: Sequence[Any], assignments: Mapping[str, list[list[int]]], draws: tuple[list[int] | None, list[list[int]]]
) -> dict[str, list[float]]:
    """Set, document, label, cluster, and how many times the set had the document; a set is a draw of a level."""
    sampled, choices = draws
    documents = np.arange(len(labels)) if sampled is None else np.array(sampled)
    levels = [label if isinstance(label, list) else [label] for label in (labels[int(n)] for n in documents)]
    rows: list[np.ndarray] = []
    for level, clusterings in enumerate(assignments.values()):
        names = np.array([label[level] if len(label) > level else -1 for label in levels])
        there = np.array([name != -1 for name in names])  # as mteb has it, in whose arrays of texts -1 is a label
        numbers = np.unique(names[there], return_inverse=True)[1]
        for clusters in clusterings:
            drawn = choices[len(rows)]
            number = np.full(len(drawn), len(rows))
            rows.append(np.array([number, documents[there][drawn], numbers[drawn], clusters]))
    found, times = np.unique(np.concatenate(rows, axis=1), axis=1, return_counts=True)
    return dict(zip(("set", "document", "label", "cluster", "times"), [*found.tolist(), times.tolist()]))


def _ranks(predictions: Mapping[str, Sequence[float]], measure: str) -> dict[str, list[float]]:
    """Ranks of the pairs by a measure, or by all of mteb's for "max", the highest the most alike."""
    found = {}
    for name in MEASURES if measure == "max" else (measure,):
        distance = f"{name}_distances" in predictions
        values = np.asarray(predictions[f"{name}_{'distances' if distance else 'scores'}"])
        found[name] = np.unique(-values if distance else values, return_inverse=True)[1].tolist()
    return found


_TREC_EVAL = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}
"""Its names of mteb's measures."""


def _data(features: Features | None = None, **splits: dict[str, Any]) -> DatasetDict:
    return DatasetDict([(split, Dataset.from_dict(columns, features)) for split, columns in splits.items()])


def _made(task: LocalTask, base: type[AbsTask], data: Any, **attributes: Any) -> AbsTask:
    # A class of its own: metadata are an attribute of the class.
    made = type(task.name, (base,), {"metadata": local_metadata(task), **attributes})()
    made.dataset = data
    made.data_loaded = True
    return made


def _retrieval(task: RetrievalTask) -> AbsTask:
    if not task.groups:
        data = _retrieval_data(task.queries, task.corpus, task.relevant, None)
        return _made(task, AbsTaskRetrieval, data, ignore_identical_ids=task.ignore_identical_ids)
    queries = {query: task.queries[query] for group in task.groups for query in group}
    relevant = {query: task.relevant[query] for query in queries}
    candidates = {
        query: [document for other in group for document in relevant[other]] for group in task.groups for query in group
    }
    corpus = {
        document: task.corpus[document] for group in task.groups for query in group for document in relevant[query]
    }
    data = _retrieval_data(queries, corpus, relevant, candidates)

    def task_specific_scores(
        self: AbsTask, scores: Any, qrels: Mapping[str, Mapping[str, int]], results: Any, *_: Any, **__: Any
    ) -> dict[str, float]:
        """CodeSearchNet's number: the mean over chunks of the mean reciprocal rank among a chunk's documents."""
        chunks = [[_among(qrels[query], results[query]) for query in group] for group in task.groups]
        return {"mrr": float(np.mean([np.mean(chunk) for chunk in chunks]))}

    depth = max(map(len, task.groups))
    depths = (*(k for k in AbsTaskRetrieval.k_values if k < depth), depth)
    return _made(
        task,
        AbsTaskRetrieval,
        data,
        task_specific_scores=task_specific_scores,
        groups=task.groups,
        k_values=depths,
    )


def _reranking(task: RerankingTask) -> AbsTask:
    queries, corpus, relevant, candidates = {}, {}, {}, {}
    for number, (query, texts, labels) in enumerate(zip(task.queries, task.candidates, task.labels)):
        ids = [f"{number}-{place}" for place in range(len(texts))]
        queries[str(number)] = query
        corpus.update(zip(ids, texts))
        candidates[str(number)] = ids
        relevant[str(number)] = {document: int(label) for document, label in zip(ids, labels)}
    return _made(task, AbsTaskRetrieval, _retrieval_data(queries, corpus, relevant, candidates))


def _retrieval_data(
    queries: Mapping[str, str],
    corpus: Mapping[str, str],
    relevant: Mapping[str, Mapping[str, int]],
    candidates: Mapping[str, Sequence[str]] | None,
) -> dict[str, Any]:
    def rows(texts: Mapping[str, str]) -> Dataset:
        return Dataset.from_dict({"id": list(texts), "text": list(texts.values())})

    split = {
        "queries": rows(queries),
        "corpus": rows(corpus),
        "relevant_docs": {query: dict(found) for query, found in relevant.items()},
        "top_ranked": None if candidates is None else {query: list(ids) for query, ids in candidates.items()},
    }
    return {"default": {_SPLIT: split}}


def _reciprocal(relevant: Mapping[str, int], scores: Mapping[str, float], depth: int) -> float:
    """1 / rank of the best relevant document, 0 beyond `depth`; of equal scores mteb ranks the greater id higher."""
    found = [(scores[document], document) for document, grade in relevant.items() if grade > 0 and document in scores]
    if not found:
        return 0.0
    rank = sum((score, document) >= max(found) for document, score in scores.items())
    return 1 / rank if rank <= depth else 0.0


def _among(relevant: Mapping[str, int], scores: Mapping[str, float]) -> float:
    """1 / rank of the one relevant document, behind all that score as it does, as in `retrieval.chunked_mrr`."""
    [right] = relevant
    return 1 / sum(score >= scores[right] for score in scores.values())
