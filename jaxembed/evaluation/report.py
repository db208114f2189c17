"""A run as a folder: its scores, the tables beside the paper's, and plots, also in one page that opens without network.

scores.json, items.json   as `scores.Run` writes them
report.md                 tables by type of task
scores_by_type.png        and, where there are samples, embedding_map.png and similarity_histogram.png
report.html               all of that in one file
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxembed.data.files import new_file
from jaxembed.evaluation import plots
from jaxembed.evaluation.html_page import page
from jaxembed.evaluation.published import Row, published
from jaxembed.evaluation.scores import Run, TaskScore, averages, by_task, task_value
from jaxembed.evaluation.tables import Table, markdown_text, percent, tasks_of

REPORT_FILE = "report.md"
PAGE_FILE = "report.html"

_PICTURES = ("scores_by_type", "embedding_map", "similarity_histogram")


@dataclass(frozen=True)
class Samples:
    """What is drawn of the texts themselves; what is None is left out.

    Attributes:
        embeddings: of some texts, for the map; a few thousand at most, for it takes long.
        labels: of these texts, for its colours.
        labelled: the task that they are of.
        positives, negatives: cosines of pairs that belong together, and of others.
        paired: the task that these are of.
        pairs: what the positives are, and the negatives.
    """

    embeddings: Float[np.ndarray, "texts dim"] | None = None
    labels: Sequence[str] | None = None
    labelled: str | None = None
    positives: Float[np.ndarray, " some"] | None = None
    negatives: Float[np.ndarray, " others"] | None = None
    paired: str | None = None
    pairs: str = ""


def write_report(run: Run, folder: str | os.PathLike[str], *, samples: Samples | None = None) -> None:
    """Writes the folder; what an earlier report left there is replaced.

    Scores are saved before anything is drawn.

    Raises:
        InputError: matplotlib or scikit-learn is not installed, or samples that cannot be drawn.
    """
    folder = Path(folder)
    run.save(folder)
    pictures = _pictures(run, samples or Samples())
    captions = _captions(samples or Samples())
    files = {f"{name}.png": content for name, content in pictures.items()}
    table = scores_table(run)
    notes = [*run.notes, *_remarks(run, table)]
    said = {name: captions[name] for name in pictures}
    files[REPORT_FILE] = _markdown(run, table, notes, said).encode()
    files[PAGE_FILE] = page(run.model, [table.html()], pictures, notes, _facts(run), said).encode()
    for name in _PICTURES:
        (folder / f"{name}.png").unlink(missing_ok=True)
    for name, content in files.items():
        with new_file(folder / name) as file:
            file.write(content)


def scores_table(run: Run) -> Table:
    """Types with the mean of their tasks, tasks, subsets; the four published models beside what they share."""
    rows: list[tuple[str, str, float, Row | None]] = []
    strong: set[int] = set()
    paper, means = published(), averages(run.scores)
    types = by_task(run.scores)
    for kind, tasks in types.items():
        strong.add(len(rows))
        metrics = list(dict.fromkeys(_metric(scores) for scores in tasks.values()))
        mixed = ", ".join(metrics) if len(metrics) > 1 else ""  # a mean over different metrics says so
        rows.append((f"{kind}, {tasks_of(len(tasks))}", mixed, means.types[kind], paper.of_type(kind, tasks)))
        for task, scores in tasks.items():
            rows.append((task, _metric(scores), task_value(scores), paper.of_task(scores)))
            if len(scores) > 1:
                splits = len({score.split for score in scores}) > 1
                for score in scores:
                    name = f"{score.subset}, {score.split}" if splits else score.subset
                    rows.append((f"– {name}", "", score.value, paper.of_score(score)))
    if len(types) > 1:
        strong |= {len(rows), len(rows) + 1}
        every = sum(map(len, types.values()))
        rows.append((f"all, {tasks_of(every)}", "", means.tasks, paper.of_run(types)))
        rows.append((f"all, mean of {len(types)} types", "", means.over_types, None))
    beside = any(row is not None for *_, row in rows)
    header = ["", "metric", run.model, *(_short(model) for model in paper.models if beside)]
    return Table(header, [_cells(*row, beside) for row in rows], frozenset(strong))


def _cells(name: str, metric: str, value: float, row: Row | None, beside: bool) -> list[str]:
    models = len(published().models) if beside else 0
    values = [None] * models if row is None else row.values
    mark = "†" if row is not None and row.averaged else ""
    return [name, metric, percent(value), *(f"{percent(each)}{mark if each is not None else ''}" for each in values)]


def _metric(scores: Sequence[TaskScore]) -> str:
    return ", ".join(dict.fromkeys(score.metric for score in scores))


def _short(model: str) -> str:
    return model.rpartition("/")[2]


def _remarks(run: Run, table: Table) -> list[str]:
    """What the columns of published models are."""
    if len(table.header) == 3:
        return []
    sources = {entry["source"] for entry in published().tasks for score in run.scores if entry["task"] == score.task}
    found = [published().sources[name] for name in published().sources if name in sources]
    remarks = [f"{', '.join(table.header[3:])}: as published ({'; '.join(found)})."] if found else []
    if any("†" in cell for row in table.rows for cell in row):
        remarks.append(
            f"†: the average of the paper's table ({published().sources['paper']}), not all of whose tasks were "
            "published one by one."
        )
    return remarks


def _facts(run: Run) -> dict[str, str]:
    return {
        "weights": run.revision,
        "date": run.date,
        "device": run.device,
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()),
        "seconds": f"{sum(score.seconds for score in run.scores):,.0f}",
        "scores": "main metrics, in percent",
    }


def _captions(samples: Samples) -> dict[str, str]:
    """What is seen on each picture."""
    texts = "" if samples.embeddings is None else f"{len(samples.embeddings):,} texts"
    sides = [0 if side is None else len(side) for side in (samples.positives, samples.negatives)]
    pairs = f": pairs {samples.pairs}" if samples.pairs else ""
    return {
        "scores_by_type": "Main metrics in percent: a bar is the mean of a type's tasks, a dot a task.",
        "embedding_map": f"{_of(samples.labelled)}{texts} drawn at random, coloured by their label.",
        "similarity_histogram": f"{_of(samples.paired)}cosines of {sides[0]:,} positive and {sides[1]:,} negative "
        f"pairs{pairs}.",
    }


def _of(task: str | None) -> str:
    return "" if task is None else f"{task}: "


def _markdown(run: Run, table: Table, notes: Sequence[str], pictures: Mapping[str, str]) -> str:
    parts = [
        f"# {markdown_text(run.model)}",
        "\n".join(f"- {name}: {markdown_text(value)}" for name, value in _facts(run).items()),
        table.markdown(),
        "\n".join(f"- {markdown_text(note)}" for note in notes),
        *(f"![{name}]({name}.png)\n\n{markdown_text(caption)}" for name, caption in pictures.items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _pictures(run: Run, samples: Samples) -> dict[str, bytes]:
    scores = plots.scores_by_type({run.model: run}) if run.scores else None
    texts = pairs = None
    if samples.embeddings is not None:
        texts = plots.embedding_map(samples.embeddings, samples.labels, task=samples.labelled)
    if samples.positives is not None and samples.negatives is not None:
        pairs = plots.similarity_histogram(samples.positives, samples.negatives, samples.paired)
    figures = zip(_PICTURES, (scores, texts, pairs))
    return {name: plots.png(figure) for name, figure in figures if figure is not None}
