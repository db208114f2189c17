"""Several runs side by side, with paired bootstrap intervals of their differences.

Runs of one task have seen the same queries or pairs, some of them hard for every model: resampling the items of both
runs together keeps that in, and gives far narrower intervals than two that are made apart (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993; for retrieval: Smucker, Allan and Carterette, CIKM 2007).
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Float

from jaxembed.data.files import new_file
from jaxembed.errors import InputError
from jaxembed.evaluation import plots
from jaxembed.evaluation.html_page import page
from jaxembed.evaluation.items import Resampler, resampler
from jaxembed.evaluation.scores import Items, Run, TaskScore, by_task
from jaxembed.evaluation.tables import Table, markdown_text, percent, tasks_of

RESAMPLES = 2000
LEVEL = 0.95
_NUMBERS = 1 << 22  # of resamples, in memory at once
_IN_CACHE = 1 << 17  # as many of those that are counted


@dataclass(frozen=True)
class Difference:
    """A score less that of the first run.

    Attributes:
        low, high: the interval's ends; None: only the scores are known, not their items.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        value = percent(self.value, sign=True)
        if self.low is None or self.high is None:
            return value
        return f"{value} [{percent(self.low, sign=True)}, {percent(self.high, sign=True)}]"


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        name: of a task, or what the mean is over.
        values: a score of each run.
        differences: of each run after the first.
        mean: it sums up other rows.
    """

    name: str
    values: tuple[float, ...]
    differences: tuple[Difference, ...]
    mean: bool = False


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        names: of the runs, the first one first.
        rows: of each type the mean, then its tasks; at the end the means of all tasks and of all types.
        notes: what was left out, and which rows have no intervals.
    """

    names: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def table(self) -> Table:
        first, *others = self.names
        rows = [[row.name, *map(percent, row.values), *map(str, row.differences)] for row in self.rows]
        strong = frozenset(number for number, row in enumerate(self.rows) if row.mean)
        return Table(["", *self.names, *(f"{name} − {first}" for name in others)], rows, strong)

    def markdown(self) -> str:
        notes = [f"- {markdown_text(note)}" for note in self.notes]
        return "\n".join([self.table.markdown(), "", *notes]) + "\n"


@dataclass(frozen=True)
class _Compared:
    """A score of all runs, and of each run after the first the resampled differences, where the items are known."""

    values: Float[np.ndarray, " runs"]
    resampled: Sequence[Float[np.ndarray, " resamples"] | None]


def compare(runs: Sequence[Run], names: Sequence[str] | None = None, seed: int = 0) -> Comparison:
    """Scores that all runs have, and what each later run has more than the first, in intervals of 95 %.

    Percentiles of `RESAMPLES` differences of resampled scores: means of the items drawn, Spearman's correlation of
    the pairs drawn (0 where all that was drawn is equal), average precision, F1 or V-measure of what was drawn. These
    three depend on repeated items (on few of them V-measure is higher), so their differences are moved to have the
    one that was found as their mean. In a mean over tasks the items of each task are drawn, the tasks stay: it speaks
    of these tasks, not of others.

    Args:
        names: of the runs; None: their models, with revisions, and dates, where those are the same.

    Raises:
        InputError: fewer than two runs, names that are the same, or no score that all have.
    """
    if len(runs) < 2:
        raise InputError(f"expected at least two runs to compare, found {len(runs)}")
    names = _names(runs) if names is None else list(names)
    if len(names) != len(runs) or len(set(names)) != len(names):
        raise InputError(f"expected a name of its own for each of {len(runs)} runs, found {', '.join(names)}")
    of_runs, shared = [_by_key(run) for run in runs], _shared(runs)
    if not shared:
        raise InputError(f"{', '.join(names)}: no score that all of them have, of the same data, so nothing to compare")
    compared = {
        key: _compare([scores[key] for scores in of_runs], np.random.default_rng([seed, number]))
        for number, key in enumerate(shared)
    }
    rows: list[Row] = []
    tasks: list[_Compared] = []
    means: list[_Compared] = []
    types = by_task(of_runs[0][key] for key in shared)
    for kind, found in types.items():
        own = [_mean([compared[*score.key, score.metric] for score in scores]) for scores in found.values()]
        tasks += own
        means.append(_mean(own))
        rows.append(_row(f"{kind}, {tasks_of(len(own))}", means[-1], mean=True))
        rows += [_row(task, one) for task, one in zip(found, own)]
    if len(types) > 1:
        rows.append(_row(f"all, {tasks_of(len(tasks))}", _mean(tasks), mean=True))
        rows.append(_row(f"all, mean of {len(types)} types", _mean(means), mean=True))
    notes = [f"Paired bootstrap intervals of {LEVEL:.0%}, by {RESAMPLES:,} resamples of each task's items."]
    bare = [row.name for row in rows if not row.mean and any(each.low is None for each in row.differences)]
    if bare:
        notes.append(
            f"Without an interval, because no items are known, only one is, or they differ: {', '.join(bare)}."
        )
    others = [
        [score for key, score in scores.items() if any(key not in each for each in of_runs)] for scores in of_runs
    ]
    if changed := [score.label for key, score in of_runs[0].items() if key not in compared and score not in others[0]]:
        notes.append(f"Left out, because the runs have other data under the same name: {', '.join(changed)}.")
    for name, scores in zip(names, others):
        if alone := [score.label for score in scores]:
            notes.append(f"Left out, because not every run has them: {', '.join(alone)} of {name}.")
    return Comparison(tuple(names), tuple(rows), tuple(notes))


def write_comparison(
    runs: Sequence[Run], folder: str | os.PathLike[str], names: Sequence[str] | None = None, seed: int = 0
) -> Comparison:
    """`compare` as `comparison.md`, `scores_by_type.png`, `differences.png` and one page, `comparison.html`.

    Raises:
        InputError: as `compare`, or matplotlib is not installed.
    """
    comparison = compare(runs, names, seed)
    shared = _shared(runs)
    # Bars of the same tasks, as in the table.
    both = [dataclasses.replace(run, scores=[_by_key(run)[key] for key in shared]) for run in runs]
    pictures = {
        "scores_by_type": plots.png(plots.scores_by_type(dict(zip(comparison.names, both)))),
        "differences": plots.png(plots.differences(comparison)),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    title = " against ".join(reversed(comparison.names)) if len(runs) == 2 else "Comparison"
    captions = {
        "scores_by_type": "Main metrics in percent: a bar is the mean of the tasks that all have, a dot a task.",
        "differences": f"Points more than {comparison.names[0]}, with paired bootstrap intervals of {LEVEL:.0%}.",
    }
    shown = [f"![{name}]({name}.png)\n\n{markdown_text(caption)}" for name, caption in captions.items()]
    texts = [f"# {markdown_text(title)}", comparison.markdown(), *shown]
    files: Mapping[str, bytes] = {
        **{f"{name}.png": content for name, content in pictures.items()},
        "comparison.md": "\n\n".join(texts).encode(),
        "comparison.html": page(
            title, [comparison.table.html()], pictures, comparison.notes, captions=captions
        ).encode(),
    }
    for name, content in files.items():
        with new_file(folder / name) as file:
            file.write(content)
    return comparison


def _by_key(run: Run) -> dict[tuple[str, ...], TaskScore]:
    return {(*score.key, score.metric): score for score in run.scores}


def _shared(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """The keys of the scores that all runs have, of the same data, in the order of the first."""
    of_runs = [_by_key(run) for run in runs]
    common = [key for key in of_runs[0] if all(key in scores for scores in of_runs)]
    return [key for key in common if len({scores[key].data for scores in of_runs} - {None}) < 2]


def _compare(scores: Sequence[TaskScore], rng: np.random.Generator) -> _Compared:
    first, *others = scores
    values = np.array([score.value for score in scores])
    return _Compared(values, [_resampled(first.items, other.items, rng) for other in others])


def _resampled(
    first: Items | None, other: Items | None, rng: np.random.Generator
) -> Float[np.ndarray, " resamples"] | None:
    """Differences of resampled scores; None where the items are not known, or are not those of the same task."""
    if first is None or other is None or first.keys() != other.keys():
        return None
    with_weights = resampler(first), resampler(other)
    if with_weights[0] is not None and with_weights[1] is not None:
        return _recomputed(with_weights[0], with_weights[1], rng)
    a, b = ({name: np.asarray(values, np.float64) for name, values in items.items()} for items in (first, other))
    if "value" in a:
        data, statistic = (a["value"], b["value"]), _mean_difference
    else:
        if not np.array_equal(a["grade"], b["grade"]):
            return None
        data, statistic = (a["cosine"], b["cosine"], a["grade"]), _spearman_difference
    if len(data[0]) < 2 or len({len(values) for values in data}) > 1:
        return None
    result: Any = scipy.stats.bootstrap(
        data,
        statistic,
        n_resamples=RESAMPLES,
        batch=max(1, _NUMBERS // len(data[0])),
        vectorized=True,
        paired=True,
        method="percentile",
        rng=rng,
    )
    return result.bootstrap_distribution


def _recomputed(first: Resampler, other: Resampler, rng: np.random.Generator) -> Float[np.ndarray, " resamples"] | None:
    """As `_resampled`, of scores that are computed anew from how often each item was drawn."""
    if first.units < 2 or not np.array_equal(first.given, other.given):
        return None
    batch = max(1, min(RESAMPLES, _IN_CACHE // first.units))
    found = []
    for start in range(0, RESAMPLES, batch):
        number = min(batch, RESAMPLES - start)
        drawn = rng.integers(0, first.units, (first.units, number)) * number + np.arange(number)
        counts = np.bincount(drawn.ravel(), minlength=first.units * number).reshape(first.units, number).astype(float)
        sets = rng.multinomial(first.sets, np.full(first.sets, 1 / first.sets), number).T / first.sets
        found.append(((other.scores(counts) - first.scores(counts)) * sets).sum(axis=0))
    differences = np.concatenate(found)
    return differences + (other.whole() - first.whole() - differences.mean())


def _mean_difference(
    first: Float[np.ndarray, "*resamples items"], other: Float[np.ndarray, "*resamples items"], axis: int = -1
) -> Float[np.ndarray, "*resamples"]:
    return (other - first).mean(axis=axis)


def _spearman_difference(
    first: Float[np.ndarray, "*resamples pairs"],
    other: Float[np.ndarray, "*resamples pairs"],
    grades: Float[np.ndarray, "*resamples pairs"],
    axis: int = -1,
) -> Float[np.ndarray, "*resamples"]:
    wanted = _ranks(grades, axis)
    return (_ranks(other, axis) * wanted).sum(axis=axis) - (_ranks(first, axis) * wanted).sum(axis=axis)


def _ranks(values: Float[np.ndarray, "*resamples pairs"], axis: int) -> Float[np.ndarray, "*resamples pairs"]:
    """Ranks, ties at their mean, moved to mean 0 and scaled to unit length: their products are correlations."""
    ranks = scipy.stats.rankdata(values, axis=axis)
    ranks -= ranks.mean(axis=axis, keepdims=True)
    return ranks / np.maximum(np.linalg.norm(ranks, axis=axis, keepdims=True), 1e-12)


def _mean(compared: Sequence[_Compared]) -> _Compared:
    values = np.mean([each.values for each in compared], axis=0)
    resampled: list[np.ndarray | None] = []
    for of_one_run in zip(*(each.resampled for each in compared)):
        known = [each for each in of_one_run if each is not None]
        resampled.append(np.mean(known, axis=0) if len(known) == len(of_one_run) else None)
    return _Compared(values, resampled)


def _row(name: str, compared: _Compared, mean: bool = False) -> Row:
    values = compared.values
    tail = (1 - LEVEL) / 2
    found = []
    for value, resampled in zip((values[1:] - values[0]).tolist(), compared.resampled):
        ends = () if resampled is None else np.quantile(resampled, [tail, 1 - tail]).tolist()
        found.append(Difference(value, *ends))
    return Row(name, tuple(values.tolist()), tuple(found), mean)


def _names(runs: Sequence[Run]) -> list[str]:
    forms = (
        [run.model for run in runs],
        [f"{run.model}@{run.revision[:8]}" for run in runs],
        [f"{run.model}@{run.revision}" for run in runs],  # one model, read in several ways
        [f"{run.model}@{run.revision[:8]} of {run.date}" for run in runs],
    )
    return [next((name for name, form in zip(each, forms) if form.count(name) == 1), each[-1]) for each in zip(*forms)]
