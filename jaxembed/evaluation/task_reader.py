"""Local tasks from people's files: a folder or a file is recognised by what is in it, and read.

`task_files` reads rows and counts what is left out; here they become one of the tasks of `tasks`.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from etils import epath

from jaxembed.config import RowFormat, TaskKind
from jaxembed.data.beir import qrels_names, query_names
from jaxembed.data.formats import Group, Inference, Reader, number, recognise
from jaxembed.data.rows import Row, checked_text, text_at, value_at
from jaxembed.data.text_store import CORPUS_FILES, find_file
from jaxembed.errors import InputError
from jaxembed.evaluation.task_files import (
    KINDS,
    RELEVANT,
    SPLITS,
    TaskFiles,
    checked_labels,
    find_any,
    find_one,
    find_qrels,
    label_text,
)
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

logger = logging.getLogger(__name__)

CHUNK = 1000
"""Pairs among which code search looks for each query's code."""

TASK_KINDS: tuple[TaskKind, ...] = get_args(TaskKind)

_BITEXT = (("src", "tgt"), ("source", "target"), ("sentence1", "sentence2"), ("s1", "s2"))
_CANDIDATES = ("docs", "documents", "candidates")
_LABELS = ("labels", "relevance")
_TAKEN = {
    "a folder of retrieval": ("split", "corpus", "queries", "qrels"),
    "a folder whose queries name documents": ("split", "corpus", "queries", "only"),
    "queries that name documents": ("corpus", "only"),
    "a folder of labelled texts": ("train", "split", "text", "label", "only"),
    "classification": ("train", "text", "label", "only"),
    "clustering": ("text", "label", "only"),
    "lists of candidates": ("only",),
    "pairs of texts": ("anchor", "positive", "score", "format", "only"),
}
"""The options that say something of each, besides those that all take."""

_ARGUMENT = re.compile(r"(?:(?P<kind>\w+):(?!//))?(?P<path>.+)", re.DOTALL)

_LANGUAGE = re.compile(r"[a-z]{3}-[A-Z][a-z]{3}")  # ISO 639-3 and 15924


def parse_task(argument: str) -> LocalTask:
    """The task of a command line's "[KIND:]PATH[,option=value…]"; options are those of `read_task`.

    Raises:
        InputError: as `read_task`, or an option that there is not.
    """
    rest, *options = re.split(r",(?=\w+=)", argument)
    found = _ARGUMENT.fullmatch(rest)
    if found is None:
        raise InputError(f"--task {argument}: expected [KIND:]PATH[,option=value…]")
    kind, path = found["kind"], found["path"]
    if kind is not None and kind not in TASK_KINDS:
        if not epath.Path(rest).expanduser().exists():
            raise InputError(f"--task {argument}: no kind {kind!r}; there are {', '.join(TASK_KINDS)}")
        kind, path = None, rest
    known = [name for name in inspect.signature(read_task).parameters if name not in ("path", "kind")]
    values: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in known or key in values:
            problem = "twice" if key in values else f"is none; there are {', '.join(known)}"
            raise InputError(f"--task {argument}: the option {key!r} {problem}")
        values[key] = value
    return read_task(path, kind, **values)


def read_task(
    path: str | os.PathLike[str],
    kind: str | None = None,
    name: str | None = None,
    *,
    train: str | os.PathLike[str] | None = None,
    split: str | None = None,
    corpus: str | os.PathLike[str] | None = None,
    queries: str | os.PathLike[str] | None = None,
    qrels: str | os.PathLike[str] | None = None,
    anchor: str | None = None,
    positive: str | None = None,
    score: str | None = None,
    text: str | None = None,
    label: str | None = None,
    format: RowFormat | None = None,
    only: str | None = None,
    bad_rows: str = "error",
    language: str = "eng-Latn",
    instruction: str | None = None,
) -> LocalTask:
    """The task in a folder or a file; see docs/tasks.md for what is recognised, and by what.

    Args:
        path: a BEIR folder, a folder with train and test files of labelled texts, or a file of rows.
        kind: one of `TASK_KINDS`; None: as folder or keys say.
        name: of the task; None: made from the path.
        train: the file of labelled texts to learn from, where `path` is the file to be tested on.
        split: of the judgements, or the labelled texts, of a folder; None: the first of test, dev, validation, val.
        corpus: a retrieval task's documents, where they are not found beside the others.
        queries: the same of its queries.
        qrels: the same of its judgements.
        anchor: column of the first text of a pair, or of the query; None: by the keys.
        positive: column of the second text.
        score: column of a grade or label of pairs.
        text: column of labelled texts.
        label: column of their labels.
        format: of rows whose keys fit several of the formats of training data.
        only: "COLUMN=VALUE" of the rows that are read, "lang=da".
        bad_rows: what a row that cannot be used leads to, and a judgement of an unknown id: "error", or "skip", which
            leaves it out and counts it.
        language: mteb's code.
        instruction: of queries; None: the model's own.

    Raises:
        InputError: with file, line and key; an option that such a task does not take; or it cannot be scored.
    """
    place = epath.Path(path).expanduser()
    name = name or _name_of(place)
    if not place.exists():
        raise InputError(f"{place}: no such file or folder (task {name!r})")
    if kind is not None and kind not in TASK_KINDS:
        raise InputError(f"task {name!r}: no kind {kind!r}; there are {', '.join(TASK_KINDS)}")
    if bad_rows not in ("error", "skip"):
        raise InputError(f"task {name!r}: bad_rows: expected error or skip, found {bad_rows!r}")
    if format is not None and format not in get_args(RowFormat):
        raise InputError(f"task {name!r}: no format {format!r}; there are {', '.join(get_args(RowFormat))}")
    if only is not None and "=" not in only:
        raise InputError(f"task {name!r}: only: expected COLUMN=VALUE, found {only!r}")
    if not _LANGUAGE.fullmatch(language):
        raise InputError(f"task {name!r}: language: expected mteb's code, such as eng-Latn, found {language!r}")
    column, _, wanted = (only or "").partition("=")
    files = TaskFiles(name, "skip" if bad_rows == "skip" else "error", (column, wanted) if only else None)
    options = {"train": train, "split": split, "corpus": corpus, "queries": queries, "qrels": qrels, "only": only}
    options |= {"anchor": anchor, "positive": positive, "score": score, "text": text, "label": label, "format": format}
    asked = _Asked(
        place=place,
        options=[option for option, value in options.items() if value is not None],
        kind=kind,
        split=split,
        corpus=_file(corpus),
        queries=_file(queries),
        qrels=_file(qrels),
        train=_file(train),
        files=files,
        labelled=_Labelled(files, text, label),
        pairs=_Pairs(files, anchor, positive, score, format),
        common={"language": language, "instruction": instruction},
    )
    task = _of_folder(asked) if place.is_dir() else _of_file(asked)
    if task.notes:
        logger.warning("%s: %s", name, "; ".join(task.notes))
    return task


@dataclass(frozen=True)
class _Asked:
    """What `read_task` is asked for; see there."""

    place: epath.Path
    options: Sequence[str]
    """The names of those given."""
    kind: str | None
    split: str | None
    corpus: epath.Path | None
    queries: epath.Path | None
    qrels: epath.Path | None
    train: epath.Path | None
    files: TaskFiles
    labelled: _Labelled
    pairs: _Pairs
    common: dict[str, Any]

    def check_options(self, what: str) -> None:
        """Refuses options that say nothing of what the task is."""
        taken = _TAKEN[what]
        if others := [option for option in self.options if option not in taken]:
            raise InputError(
                f"{self.place}: {', '.join(others)}: no option of {what}; there are {', '.join(taken)} "
                f"(task {self.files.name!r})"
            )


def _file(path: str | os.PathLike[str] | None) -> epath.Path | None:
    return None if path is None else epath.Path(path).expanduser()


def _of_folder(asked: _Asked) -> LocalTask:
    folder, files = asked.place, asked.files
    corpus = asked.corpus or find_one(folder, "corpus", CORPUS_FILES)
    split = asked.split or next((split for split in SPLITS if find_any(folder, qrels_names(split))), None)
    queries = asked.queries or find_one(folder, "queries", query_names(split or SPLITS[0]))
    retrieval = corpus or queries or (folder / "qrels").exists()
    if asked.kind == "retrieval" or (asked.kind is None and retrieval):
        if corpus is None or queries is None:
            what = "corpus" if corpus is None else "queries"
            raise InputError(
                f"{folder}: no {what} there; looked for {what}.jsonl, .tsv, .csv, .parquet, each with or without .gz"
            )
        qrels = asked.qrels or find_any(folder, qrels_names(split or SPLITS[0]))
        if qrels is None and not (queries.exists() and RELEVANT in files.first_row(queries)):
            qrels = find_qrels(folder, split)
        asked.check_options("a folder of retrieval" if qrels is not None else "a folder whose queries name documents")
        return _judged(files, corpus, queries, qrels, asked.common)
    if asked.kind in (None, "classification"):
        asked.check_options("a folder of labelled texts")
        train = asked.train or find_file(folder, _names_of(["train"]), "corpus, and no texts to learn from")
        tested = find_file(folder, _names_of(SPLITS if split is None else [split]), "texts to be tested on")
        return _classification(files, asked.labelled, train, tested, asked.common)
    raise InputError(f"{folder}: a {asked.kind} task is a file, found a folder")


def _of_file(asked: _Asked) -> LocalTask:
    file, files = asked.place, asked.files
    row = files.first_row(file)
    kind = asked.kind or _recognised(row, asked)
    if kind == "retrieval" and {"text", RELEVANT} <= row.keys():
        asked.check_options("queries that name documents")
        return _judged(files, asked.corpus or _beside(file), file, None, asked.common)
    if kind == "classification":
        asked.check_options("classification")
        if asked.train is None:
            raise InputError(f"{file}: classification needs texts to learn from; give train=FILE")
        return _classification(files, asked.labelled, asked.train, file, asked.common)
    if kind == "clustering":
        asked.check_options("clustering")
        return _clustering(asked.labelled, file, asked.common)
    asked.check_options("lists of candidates" if kind == "reranking" and _has_lists(row) else "pairs of texts")
    return _OF_PAIRS[kind](files, asked.pairs, file, asked.common)


def _name_of(path: epath.Path) -> str:
    """ "dev/clinc150/test.jsonl.gz" → "clinc150-test"; a folder's own name."""
    path = epath.Path(os.path.abspath(path)) if "://" not in os.fspath(path) else path
    stem = path.name.removesuffix(".gz")
    for kind in KINDS:
        stem = stem.removesuffix(kind)
    name = path.name if path.is_dir() else f"{path.parent.name}-{stem}"
    return re.sub(r"[^\w.\-]", "_", name)


def _beside(queries: epath.Path) -> epath.Path:
    """de.queries.jsonl.gz → de.corpus.jsonl.gz."""
    corpus = queries.parent / queries.name.replace("queries", "corpus")
    if corpus == queries or not corpus.exists():
        raise InputError(f"{queries}: its queries name documents, but there is no {corpus.name} beside it; give corpus")
    return corpus


def _names_of(splits: Sequence[str]) -> list[str]:
    """Files in which a folder may have labelled texts."""
    return [f"{split}{kind}" for split in splits for kind in KINDS]


def _has_lists(row: Row) -> bool:
    return all(any(isinstance(row.get(key), list) for key in keys) for keys in (_CANDIDATES, _LABELS))


def _recognised(row: Row, asked: _Asked) -> str:
    """The kind of task that a file with this first row has."""
    if {"text", RELEVANT} <= row.keys():
        return "retrieval"
    if "query" in row and _has_lists(row):
        return "reranking"
    if asked.train is not None:
        return "classification"
    pairs = asked.pairs
    reader = None if asked.labelled.text or asked.labelled.label else pairs.reader(row)
    if reader is None or reader.kind == "labels":
        raise InputError(
            f"task {pairs.files.name!r}: labelled texts are a classification task (give train=FILE, the texts to learn "
            "from) or a clustering task (say so by its kind)"
        )
    if reader.kind == "graded":
        return "graded"
    if reader.kind == "inference":
        return "pairs"
    plain = {key.lower() for key in row}
    if pairs.anchor is None and any(plain >= set(keys) for keys in _BITEXT):
        return "bitext"
    group = reader.read(row)
    return "reranking" if isinstance(group, Group) and group.negatives else "retrieval"


# Retrieval by id.


def _judged(
    files: TaskFiles,
    corpus_file: epath.Path,
    queries_file: epath.Path,
    qrels_file: epath.Path | None,
    common: dict[str, Any],
) -> RetrievalTask:
    """Without judgements queries name their documents themselves."""
    for file in (corpus_file, queries_file, qrels_file):
        if file is not None and not file.exists():
            raise InputError(f"{file}: no such file (task {files.name!r})")
    corpus, queries = files.corpus(corpus_file), files.queries(queries_file)
    judged = files.named_in_queries(queries_file) if qrels_file is None else files.judged(qrels_file)
    relevant = files.relevant(qrels_file or queries_file, judged, queries, corpus)
    asked = {query: queries[query] for query in queries if query in relevant}
    themselves = files.are_documents(asked, corpus, relevant)
    return RetrievalTask(
        files.name, asked, corpus, relevant, ignore_identical_ids=themselves, notes=files.notes, **common
    )


# Labelled texts.


@dataclass(frozen=True)
class _Labelled:
    """Texts and labels by their columns."""

    files: TaskFiles
    text: str | None
    label: str | None

    def read(self, path: epath.Path) -> tuple[list[str], list[str]]:
        texts, labels = [], []
        text_key, label_key = self.text or "text", self.label or "label"
        for line, row in self.files.rows(path):
            try:
                text, label = text_at(row, text_key), label_text(value_at(row, label_key), f"column {label_key!r}")
            except InputError as error:
                self.files.bad(path, line, error)
                continue
            if self.files.none_empty(text):
                texts.append(text)
                labels.append(label)
        _check_some(self.files, path, texts)
        return texts, labels


def _check_some(files: TaskFiles, path: epath.Path, rows: Sequence[Any], least: int = 1) -> None:
    if len(rows) < least:
        noted = f"; {'; '.join(files.notes)}" if files.notes else ""
        of_which = "" if files.only is None else f" with {'='.join(files.only)}"
        raise InputError(
            f"{path}: expected {least} row{'s' * (least > 1)}{of_which} at least, found {len(rows)} "
            f"(task {files.name!r}){noted}"
        )


def _classification(
    files: TaskFiles, labelled: _Labelled, train: epath.Path, test: epath.Path, common: dict[str, Any]
) -> ClassificationTask:
    train_texts, train_labels = labelled.read(train)
    test_texts, test_labels = labelled.read(test)
    known = set(train_labels)
    if len(known) < 2:
        raise InputError(f"{train}: expected two labels at least, found {', '.join(map(repr, known))}")
    files.counts["texts to be tested on whose label no text to learn from has, kept"] += sum(
        label not in known for label in test_labels
    )
    learned = set(train_texts)
    files.counts["texts to be tested on that are among those to learn from, kept"] += sum(
        text in learned for text in test_texts
    )
    return ClassificationTask(
        files.name, train_texts, train_labels, test_texts, test_labels, notes=files.notes, **common
    )


def _clustering(labelled: _Labelled, path: epath.Path, common: dict[str, Any]) -> ClusteringTask:
    texts, labels = labelled.read(path)
    if len(set(labels)) < 2:
        raise InputError(f"{path}: expected two labels at least, found {labels[0]!r} alone")
    return ClusteringTask(labelled.files.name, texts, labels, notes=labelled.files.notes, **common)


# Pairs, and lists of candidates.


@dataclass(frozen=True)
class _Pairs:
    """Two texts a row, or a query and its documents, by named columns or in a format of training data."""

    files: TaskFiles
    anchor: str | None
    positive: str | None
    score: str | None
    format: RowFormat | None

    def reader(self, row: Row) -> Reader:
        if self.anchor is None and self.positive is None and self.score is None:
            return recognise(row, self.format)
        if self.anchor is None or self.positive is None or self.format is not None:
            raise InputError(
                f"task {self.files.name!r}: anchor and positive go together, score only with them, format without them"
            )
        anchor, positive, score = self.anchor, self.positive, self.score

        def read(row: Row) -> Group:
            grades = [] if score is None else [number(value_at(row, score), f"column {score!r}")]
            return Group(text_at(row, anchor), [text_at(row, positive)], (), grades)

        return Reader("graded", "named columns", "pairs" if score is None else "graded", read, ())

    def read(self, path: epath.Path, kinds: Sequence[str]) -> Iterator[tuple[int, Any]]:
        """What the rows say, which has to be of one of these kinds."""
        reader = self.reader(self.files.first_row(path))
        if reader.kind not in kinds:
            raise InputError(f"{path}: expected {' or '.join(kinds)}, found {reader.described} ({self.files.name!r})")
        for line, row in self.files.rows(path):
            try:
                yield line, reader.read(row)
            except InputError as error:
                self.files.bad(path, line, error)

    def graded(self, path: epath.Path) -> tuple[list[str], list[str], list[float]]:
        """Columns of graded pairs."""
        columns: tuple[list[str], list[str], list[float]] = ([], [], [])
        for _, group in self.read(path, ["graded"]):
            if self.files.none_empty(group.anchor, group.positives[0]):
                for column, value in zip(columns, (group.anchor, group.positives[0], group.scores[0])):
                    column.append(value)
        _check_some(self.files, path, columns[0], 2)
        return columns

    def plain(self, path: epath.Path) -> list[tuple[str, str]]:
        """Pairs of texts; of a row with several documents, one pair each."""
        found = []
        for _, group in self.read(path, ["pairs"]):
            found += [(group.anchor, text) for text in group.positives if self.files.none_empty(group.anchor, text)]
        _check_some(self.files, path, found)
        return found


def _sts(files: TaskFiles, pairs: _Pairs, path: epath.Path, common: dict[str, Any]) -> StsTask:
    first, second, grades = pairs.graded(path)
    if min(grades) == max(grades):
        raise InputError(f"{path}: all pairs have the grade {grades[0]:g}, so that nothing correlates")
    return StsTask(files.name, first, second, grades, notes=files.notes, **common)


def _graded(files: TaskFiles, pairs: _Pairs, path: epath.Path, common: dict[str, Any]) -> StsTask | PairTask:
    """Grades that are all 0 or 1 are labels."""
    found = _sts(files, pairs, path, common)
    if not set(found.grades) <= {0.0, 1.0}:
        return found
    return PairTask(
        files.name, found.first, found.second, [int(one) for one in found.grades], notes=files.notes, **common
    )


_ENTAILMENT = {"entailment": 1, "contradiction": 0}


def _labelled_pairs(files: TaskFiles, pairs: _Pairs, path: epath.Path, common: dict[str, Any]) -> PairTask:
    """Of NLI rows those that are entailed (1) or contradicted (0), as mteb has it."""
    first, second, labels = [], [], []
    for line, found in pairs.read(path, ["graded", "inference"]):
        if isinstance(found, Inference):
            one, other, label = found.premise, found.hypothesis, _ENTAILMENT.get(found.label or "")
            if label is None:
                files.counts["neutral pairs, and those without a label, left out"] += 1
                continue
        else:
            one, other, label = found.anchor, found.positives[0], found.scores[0]
            if label not in (0, 1):
                files.bad(path, line, f"expected a label of 0 or 1, found {label:g}")
                continue
        if files.none_empty(one, other):
            first.append(one)
            second.append(other)
            labels.append(int(label))
    _check_some(files, path, labels, 2)
    if len(set(labels)) < 2:
        raise InputError(f"{path}: expected pairs of both labels, found {labels[0]} alone (task {files.name!r})")
    return PairTask(files.name, first, second, labels, notes=files.notes, **common)


def _bitext(files: TaskFiles, pairs: _Pairs, path: epath.Path, common: dict[str, Any]) -> BitextTask:
    first, second = zip(*pairs.plain(path))
    return BitextTask(files.name, list(first), list(second), notes=files.notes, **common)


def _all_candidates(files: TaskFiles, pairs: _Pairs, path: epath.Path, common: dict[str, Any]) -> RetrievalTask:
    """Equal queries are one, and equal documents."""
    found = [(query, document.strip()) for query, document in pairs.plain(path)]
    queries = {text: f"q{place}" for place, text in enumerate(dict.fromkeys(query for query, _ in found))}
    documents = {text: f"d{place}" for place, text in enumerate(dict.fromkeys(text for _, text in found))}
    relevant: dict[str, dict[str, int]] = {}
    for query, document in found:
        relevant.setdefault(queries[query], {})[documents[document]] = 1
    return RetrievalTask(
        files.name,
        {one: text for text, one in queries.items()},
        {one: text for text, one in documents.items()},
        relevant,
        notes=files.notes,
        **common,
    )


def _code_search(files: TaskFiles, pairs: _Pairs, path: epath.Path, common: dict[str, Any]) -> RetrievalTask:
    """One document and 999 distractors, as the CodeSearchNet repository (src/model_test.py) has it.

    Pairs are shuffled with seed 0 and dealt into chunks of 1,000; the last, short one is dropped. Fewer pairs than that
    are one chunk.
    """
    found = pairs.plain(path)
    order = np.arange(len(found))
    np.random.RandomState(0).shuffle(order)
    size = min(CHUNK, len(found))
    used = order[: len(found) // size * size]
    if size < CHUNK:
        files.counts[f"pairs, fewer than {CHUNK:,}, so that there are fewer distractors than 999"] += size
    files.counts["pairs of the last chunk, which is too short, left out"] += len(found) - len(used)
    texts = {str(place): found[place] for place in used.tolist()}
    ids = list(texts)
    return RetrievalTask(
        files.name,
        {one: query for one, (query, _) in texts.items()},
        {one: document.strip() for one, (_, document) in texts.items()},
        {one: {one: 1} for one in ids},
        "mrr",
        tuple(tuple(ids[start : start + size]) for start in range(0, len(ids), size)),
        notes=files.notes,
        **common,
    )


def _reranking(files: TaskFiles, pairs: _Pairs, path: epath.Path, common: dict[str, Any]) -> RerankingTask:
    """Lists of which all or none are relevant say nothing, and are left out, as mteb did."""
    queries, candidates, labels = [], [], []
    for query, documents, relevance in _lists(files, pairs, path):
        if not query.strip():
            files.counts["lists with an empty query, left out"] += 1
        elif not any(relevance) or all(relevance):
            files.counts["lists whose candidates are all relevant, or none of them, left out"] += 1
        else:
            queries.append(query)
            candidates.append(documents)
            labels.append(relevance)
    _check_some(files, path, queries)
    return RerankingTask(files.name, queries, candidates, labels, notes=files.notes, **common)


def _lists(files: TaskFiles, pairs: _Pairs, path: epath.Path) -> Iterator[tuple[str, list[str], list[int]]]:
    row = files.first_row(path)
    if not _has_lists(row):
        for _, group in pairs.read(path, ["pairs"]):
            relevance = [1] * len(group.positives) + [0] * len(group.negatives)
            yield group.anchor, [text.strip() for text in (*group.positives, *group.negatives)], relevance
        return
    texts_key = next(key for key in _CANDIDATES if key in row)
    labels_key = next(key for key in _LABELS if key in row)
    for line, row in files.rows(path):
        try:
            relevance = checked_labels(value_at(row, labels_key), f"column {labels_key!r}")
            found = value_at(row, texts_key)
            if not isinstance(found, list) or len(found) != len(relevance):
                raise InputError(f"column {texts_key!r}: expected a list of {len(relevance)} texts, one for each label")
            documents = [checked_text(one, f"column {texts_key!r}[{place}]") for place, one in enumerate(found)]
            yield text_at(row, "query"), [text.strip() for text in documents], relevance
        except InputError as error:
            files.bad(path, line, error)


_OF_PAIRS: dict[str, Callable[[TaskFiles, _Pairs, epath.Path, dict[str, Any]], LocalTask]] = {
    "sts": _sts,
    "graded": _graded,
    "pairs": _labelled_pairs,
    "bitext": _bitext,
    "retrieval": _all_candidates,
    "code_search": _code_search,
    "reranking": _reranking,
}
