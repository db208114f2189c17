"""What was published of the four udever models, beside which a run's scores are put.

`published_udever.json` has the scores in percent, as they were printed, each with its source: single tasks (with
`subsets`: the mean over so many), and for the sets of MTEB(eng, v1) the averages by type of the paper's table.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jaxembed.evaluation.scores import TaskScore

_FILE = "published_udever.json"


@dataclass(frozen=True)
class Row:
    """A score of each of the four models, 0 to 1; None where nothing was published.

    Attributes:
        averaged: it is an average of the paper's table, some tasks of which were not published.
    """

    values: tuple[float | None, ...]
    averaged: bool = False


@dataclass(frozen=True)
class Published:
    """
    Attributes:
        models: hub ids, whose scores come in this order.
        sources: what the words in `scores` stand for.
        tasks: as in the file.
        averages: of the paper's table, as in the file.
        mean: of all its sets.
    """

    models: tuple[str, ...]
    sources: Mapping[str, str]
    benchmark: str
    tasks: Sequence[Mapping[str, Any]]
    averages: Sequence[Mapping[str, Any]]
    mean: Sequence[float]

    def of_score(self, score: TaskScore) -> Row | None:
        """Of the same subset, split and metric of the same task."""
        wanted = (*score.key, score.metric)
        return next((_row(e["scores"]) for e in self.tasks if _key(e) == wanted and "subsets" not in e), None)

    def of_task(self, scores: Sequence[TaskScore]) -> Row | None:
        """Of one task: a mean over the same subsets, or over as many as there are."""
        if row := _mean([self.of_score(score) for score in scores]):
            return row
        splits, metrics = {score.split for score in scores}, {score.metric for score in scores}
        for entry in self.tasks:
            same = entry["task"] == scores[0].task and {entry["split"]} == splits and {entry["metric"]} == metrics
            if same and entry.get("subsets") == len(scores):
                return _row(entry["scores"])
        return None

    def of_type(self, kind: str, tasks: Mapping[str, Sequence[TaskScore]]) -> Row | None:
        """Of a run's tasks of one type: the mean where all of them were published, or the paper's average.

        Args:
            tasks: task → its scores.
        """
        if row := _mean([self.of_task(scores) for scores in tasks.values()]):
            return row
        same = (e["scores"] for e in self.averages if e["type"] == kind and _subsets(e) == _found([tasks]))
        return next((_row(scores, averaged=True) for scores in same), None)

    def of_run(self, types: Mapping[str, Mapping[str, Sequence[TaskScore]]]) -> Row | None:
        """Of a whole run, as `of_type`.

        Args:
            types: type → task → its scores.
        """
        if row := _mean([self.of_task(scores) for tasks in types.values() for scores in tasks.values()]):
            return row
        if set().union(*map(_subsets, self.averages)) == _found(list(types.values())):
            return _row(self.mean, averaged=True)
        return None


@functools.cache
def published() -> Published:
    """All that the file has."""
    values = json.loads((resources.files("jaxembed.evaluation") / _FILE).read_text())
    return Published(**{**values, "models": tuple(values["models"])})


def _key(entry: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return entry["task"], entry["subset"], entry["split"], entry["metric"]


def _row(percents: Sequence[float | None], averaged: bool = False) -> Row:
    return Row(tuple(None if percent is None else percent / 100 for percent in percents), averaged)


def _mean(rows: Sequence[Row | None]) -> Row | None:
    """Of each model that all rows have; None where there is no such model."""
    found = [row.values for row in rows if row is not None]
    if not rows or len(found) < len(rows):
        return None
    means: list[float | None] = []
    for column in zip(*found):
        values = [value for value in column if value is not None]
        means.append(sum(values) / len(values) if len(values) == len(column) else None)
    return None if all(mean is None for mean in means) else Row(tuple(means))


def _subsets(average: Mapping[str, Any]) -> set[tuple[str, str]]:
    return {(task, subset) for task, subset in average["tasks"]}


def _found(types: Sequence[Mapping[str, Sequence[TaskScore]]]) -> set[tuple[str, str]]:
    """Task and subset of all scores."""
    return {(score.task, score.subset) for tasks in types for scores in tasks.values() for score in scores}
