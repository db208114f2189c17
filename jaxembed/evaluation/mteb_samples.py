"""What a report shows of the texts: labelled ones on a map, and cosines of pairs that belong together or do not."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from mteb.abstasks import (
    AbsTask,
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
)
from mteb.types import PromptType

from jaxembed.evaluation.report import Samples

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata

    from jaxembed.evaluation.mteb_model import MTEBModel

TEXTS = 1000  # on the map
PAIRS = 500  # of each sort
_LARGEST = 1_000_000  # documents of a corpus in which single ones are looked for


_PAIRED = "labelled 1, and those labelled 0"
_JUDGED = "of a query with a relevant document, and with one drawn from the others"
_TRANSLATED = "of a text with its translation, and with that of another"


@dataclasses.dataclass(frozen=True)
class SampleTexts:
    """Of one task: labelled texts, or pairs, of which `positives` belong together and `negatives` do not."""

    task: str
    texts: list[str] = dataclasses.field(default_factory=list)
    labels: list[str] = dataclasses.field(default_factory=list)
    positives: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    negatives: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    roles: bool = False
    """Whether a pair is a query and a document."""
    pairs: str = ""
    """What the positives are, and the negatives."""


def sample_texts(task: AbsTask) -> SampleTexts | None:
    """Of a task whose data are loaded, always the same ones; None: there is nothing to show."""
    if not task.dataset or task.is_aggregate:
        return None
    data: Any = next((task.dataset[subset] for subset in task.hf_subsets if subset in task.dataset), task.dataset)
    found = None
    for kind, draw in _DRAWN:
        if isinstance(task, kind):
            found = draw(task, data[task.eval_splits[0]], random.Random(0))
    return found if found is None or found.texts or (found.positives and found.negatives) else None


def embed_samples(model: MTEBModel, samples: Sequence[SampleTexts], metadata: Mapping[str, TaskMetadata]) -> Samples:
    """The map of the first task with labels, the cosines of the first with pairs."""
    labelled = next((sample for sample in samples if len(sample.texts) > 2), None)
    paired = next((sample for sample in samples if sample.positives), None)
    embeddings = positives = negatives = None
    if labelled is not None:
        embeddings = model.embed(labelled.texts, metadata[labelled.task])
    if paired is not None:

        def cosines(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
            parts = (PromptType.query, PromptType.document) if paired.roles else (None, None)
            sides = [model.embed(texts, metadata[paired.task], part) for texts, part in zip(zip(*pairs), parts)]
            first, second = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
            return (first * second).sum(1)

        positives, negatives = cosines(paired.positives), cosines(paired.negatives)
    labels = None if labelled is None else labelled.labels
    return Samples(
        embeddings=embeddings,
        labels=labels,
        labelled=None if labelled is None else labelled.task,
        positives=positives,
        negatives=negatives,
        paired=None if paired is None else paired.task,
        pairs="" if paired is None else paired.pairs,
    )


def _labelled(task: Any, data: Any, draw: random.Random) -> SampleTexts | None:
    texts, labels = data[task.input_column_name], data[task.label_column_name]
    if len(texts) and isinstance(texts[0], list):  # sets of texts, each clustered alone
        texts, labels = texts[0], labels[0]
    names = getattr(data.features[task.label_column_name], "names", None)
    labels = list(labels)
    labelled = [row for row, label in enumerate(labels) if label != []]  # a text may have several labels, or none
    rows = sorted(draw.sample(labelled, min(TEXTS, len(labelled))))
    labels = [labels[row][0] if isinstance(labels[row], list) else labels[row] for row in rows]
    return SampleTexts(
        task.metadata.name,
        texts=[texts[row] for row in rows],
        labels=[str(label if names is None else names[label]) for label in labels],
    )


def _judged(task: AbsTaskRetrieval, data: Any, draw: random.Random) -> SampleTexts | None:
    queries, corpus, relevant = data["queries"], data["corpus"], data["relevant_docs"]
    if len(corpus) > _LARGEST or not isinstance(queries[0]["text"], str):
        return None
    ids = list(corpus["id"])
    place = {document: row for row, document in enumerate(ids)}

    def text(document: str) -> str:
        row = corpus[place[document]]
        return f"{row.get('title') or ''} {row['text']}".strip()

    positives, negatives = [], []
    for row in draw.sample(range(len(queries)), min(PAIRS, len(queries))):
        query = queries[row]
        grades = relevant.get(query["id"], {})
        right = [document for document, grade in grades.items() if grade > 0 and document in place]
        candidates = ids if data["top_ranked"] is None else data["top_ranked"].get(query["id"], [])
        none = {*right, query["id"]} if task.ignore_identical_ids else {*right}
        wrong = [document for document in draw.sample(candidates, min(10, len(candidates))) if document not in none]
        if right and wrong:
            positives.append((query["text"], text(draw.choice(right))))
            negatives.append((query["text"], text(wrong[0])))
    return SampleTexts(task.metadata.name, positives=positives, negatives=negatives, roles=True, pairs=_JUDGED)


def _pairs(task: AbsTaskPairClassification, data: Any, draw: random.Random) -> SampleTexts:
    rows = data[0] if len(data) == 1 else data  # an older form has all in one row
    columns = [task.input1_column_name, task.input2_column_name, task.label_column_name]
    sides: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for first, second, label in zip(*(rows[column] for column in columns)):
        sides[bool(label)].append((first, second))
    positives, negatives = (draw.sample(pairs, min(PAIRS, len(pairs))) for pairs in sides.values())
    return SampleTexts(task.metadata.name, positives=positives, negatives=negatives, pairs=_PAIRED)


def _translations(task: AbsTaskBitextMining, data: Any, draw: random.Random) -> SampleTexts | None:
    if not {"sentence1", "sentence2"} <= set(data.column_names) or "gold" in data.column_names:
        return None
    rows = draw.sample(range(len(data)), min(PAIRS, len(data)))
    firsts, seconds = data[rows]["sentence1"], data[rows]["sentence2"]
    negatives = list(zip(firsts, seconds[1:] + seconds[:1])) if len(rows) > 1 else []
    positives = list(zip(firsts, seconds))
    return SampleTexts(task.metadata.name, positives=positives, negatives=negatives, pairs=_TRANSLATED)


_DRAWN: tuple[tuple[type[AbsTask], Callable[..., SampleTexts | None]], ...] = (
    (AbsTaskClassification, _labelled),
    (AbsTaskClustering, _labelled),
    (AbsTaskRetrieval, _judged),
    (AbsTaskPairClassification, _pairs),
    (AbsTaskBitextMining, _translations),
)
