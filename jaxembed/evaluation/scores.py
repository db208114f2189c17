"""What an evaluation found: scores by task in a run of one model, as `scores.json`; averages as MTEB makes them."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from jaxembed.data.files import new_file
from jaxembed.errors import InputError
from jaxembed.evaluation import items as forms

SCORES_FILE = "scores.json"
ITEMS_FILE = "items.json"
"""Beside it: what a paired bootstrap needs, which may be large."""

_FORMAT = 1
_AGREEMENT = 1e-3  # of a score with that of its items; mteb rounds some scores to five digits
_FIELDS: Any = {"extra": "forbid"}  # for pydantic, when a file is read

Items = Mapping[str, list[float]]
Key = tuple[str, str, str]
"""Task, subset and split."""


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """The score of a subset of a task.

    Attributes:
        task: mteb's name of it, or the local task's.
        type: mteb's: Retrieval, STS, Classification, Clustering, PairClassification, Reranking, BitextMining, …
        subset: "default", or mteb's `hf_subset`.
        metric: the main one, under mteb's name.
        value: of that metric, 1 at most.
        metrics: all that are numbers, under mteb's names.
        items: what a paired bootstrap needs, in an order that depends on the task alone and in one of the forms of
            `jaxembed.evaluation.items`; None: only the number is known.
        data: what texts it is of: the revision of a data set on the hub, or a hash of a local task's; None: not known.
    """

    __pydantic_config__ = _FIELDS

    task: str
    type: str
    subset: str
    split: str
    metric: str
    value: float
    metrics: dict[str, float]
    seconds: float
    items: dict[str, list[float]] | None = None
    data: str | None = None

    def __post_init__(self) -> None:
        if self.value > 1 + 1e-9:
            raise InputError(f"{self.label}: expected {self.metric} of 1 at most, found {self.value}; not in percent")
        if self.items is None:
            return
        if wrong := forms.problem(self.items):
            raise InputError(f"{self.label}: {wrong}")
        of_items = forms.whole(self.items)
        if of_items is not None and math.isfinite(self.value) and not abs(of_items - self.value) <= _AGREEMENT:
            what = "mean" if "value" in self.items else self.metric
            raise InputError(f"{self.label}: the {what} of the items is {of_items:.6f}, the score {self.value:.6f}")

    @property
    def key(self) -> Key:
        return self.task, self.subset, self.split

    @property
    def label(self) -> str:
        """Task, and subset where there are several."""
        return self.task if self.subset == "default" else f"{self.task} ({self.subset})"


@dataclasses.dataclass(frozen=True)
class Run:
    """An evaluation of one model.

    Attributes:
        revision: of the weights, as their hash.
        date: ISO 8601.
        versions: of the packages that the numbers depend on.
        notes: counted warnings, and what was left out.
    """

    __pydantic_config__ = _FIELDS

    model: str
    revision: str
    date: str
    device: str
    versions: dict[str, str]
    scores: list[TaskScore]
    notes: list[str]

    def __post_init__(self) -> None:
        keys = [score.key for score in self.scores]
        doubled = next((key for key in keys if keys.count(key) > 1), None)
        if doubled is not None:
            raise InputError(f"the run has {' / '.join(doubled)} more than once; name the tasks apart")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `scores.json` and, where there are items, `items.json`; the folder is made."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        values = dataclasses.asdict(self)
        items = [
            {"task": score.task, "subset": score.subset, "split": score.split, "items": score.items}
            for score in self.scores
            if score.items is not None
        ]
        for score in values["scores"]:
            del score["items"]
        (folder / ITEMS_FILE).unlink(missing_ok=True)  # of an earlier run
        if items:
            _write(folder / ITEMS_FILE, {"format": _FORMAT, "scores": items}, indent=None)
        _write(folder / SCORES_FILE, {"format": _FORMAT, **values}, indent=1)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Run":
        """
        Raises:
            InputError: there is no run, or a file of it is damaged.
        """
        folder = Path(folder)
        file = folder / SCORES_FILE
        if not file.is_file():
            raise InputError(f"{folder}: expected the folder of an evaluation, found no {SCORES_FILE}")
        values = _read(file)
        beside = folder / ITEMS_FILE
        try:
            if beside.is_file():
                found = {(e["task"], e["subset"], e["split"]): e["items"] for e in _read(beside)["scores"]}
                for score in values["scores"]:
                    score["items"] = found.pop((score["task"], score["subset"], score["split"]), None)
                if found:
                    raise InputError(f"{beside}: {next(iter(found))} is not in {SCORES_FILE}: files of different runs")
        except (KeyError, TypeError) as error:
            raise InputError(f"{beside}: damaged, or not of {SCORES_FILE} beside it: {error!r}") from None
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            reason = first["msg"].removeprefix("Value error, ")
            raise InputError(f"{file}: {f'{where}: ' if where else ''}{reason}") from None


@dataclasses.dataclass(frozen=True)
class Averages:
    """Means of scores.

    Attributes:
        types: of the tasks of each type, in the order of `TYPES`.
        tasks: of all tasks, MTEB's "Mean (Task)".
        over_types: of `types`, MTEB's "Mean (TaskType)".
    """

    types: Mapping[str, float]
    tasks: float
    over_types: float


TYPES = (
    "Classification",
    "Clustering",
    "PairClassification",
    "Reranking",
    "Retrieval",
    "STS",
    "Summarization",
    "BitextMining",
)
"""The order in which types are shown: the paper's."""


def by_task(scores: Iterable[TaskScore]) -> dict[str, dict[str, list[TaskScore]]]:
    """Type → task → its scores, types in the order of `TYPES`, others after them, tasks in the order given."""
    found: dict[str, dict[str, list[TaskScore]]] = {}
    for score in scores:
        found.setdefault(score.type, {}).setdefault(score.task, []).append(score)
    order = [*TYPES, *sorted(found.keys() - set(TYPES))]
    return {kind: found[kind] for kind in order if kind in found}


def task_value(scores: Sequence[TaskScore]) -> float:
    """Of one task: the mean over its subsets and splits, as mteb's `TaskResult.get_score`."""
    return float(np.mean([score.value for score in scores]))


def averages(scores: Iterable[TaskScore]) -> Averages:
    """A task counts once in the mean of its type and in that of all, whatever its number of subsets."""
    values = {kind: [task_value(found) for found in tasks.values()] for kind, tasks in by_task(scores).items()}
    if not values:
        return Averages({}, math.nan, math.nan)
    types = {kind: float(np.mean(found)) for kind, found in values.items()}
    every = [value for found in values.values() for value in found]
    return Averages(types, float(np.mean(every)), float(np.mean(list(types.values()))))


def _write(path: Path, values: Mapping[str, Any], indent: int | None) -> None:
    with new_file(path) as file:
        separators = (",", ":") if indent is None else None
        file.write(f"{json.dumps(values, indent=indent, separators=separators, ensure_ascii=False)}\n".encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}; evaluate again") from None
    if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
        raise InputError(f"{path}: expected the scores of this version of jaxembed (format {_FORMAT}); evaluate again")
    return values
