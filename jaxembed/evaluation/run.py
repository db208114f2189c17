"""An evaluation from tasks to report: mteb scores each task; what is done is kept, so that a stopped run goes on."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import difflib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import random
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import jax
import mteb
import numpy as np
from mteb.abstasks import AbsTask
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.types import PromptType
from pydantic import TypeAdapter, ValidationError
from scipy.stats import ConstantInputWarning
from sklearn.exceptions import ConvergenceWarning, UndefinedMetricWarning
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from jaxembed.data.files import new_file
from jaxembed.embedder import Embedder
from jaxembed.errors import InputError
from jaxembed.evaluation.items import whole
from jaxembed.evaluation.mteb_model import MTEBModel
from jaxembed.evaluation.mteb_samples import SampleTexts, embed_samples, sample_texts
from jaxembed.evaluation.mteb_tasks import Items, data_hash, local_metadata, to_mteb
from jaxembed.evaluation.report import write_report
from jaxembed.evaluation.scores import Run, TaskScore
from jaxembed.evaluation.tasks import LocalTask

logger = logging.getLogger(__name__)

FINISHED = "tasks"
"""The folder, in that of a run, of the tasks that are done."""

_PACKAGES = ("jaxembed", "mteb", "jax", "flax", "numpy", "scikit-learn", "torch")
_FORMAT = 2  # of the files of tasks that are done
_ROUNDED = 2e-5  # mteb rounds to five digits


def evaluate(
    model: Any,
    tasks: Iterable[LocalTask | AbsTask],
    folder: str | os.PathLike[str] | None = None,
    *,
    progress: bool = True,
) -> Run:
    """Scores a model on local tasks and on mteb's.

    Args:
        model: an `MTEBModel`, or what else `mteb.evaluate` takes, such as a `SentenceTransformer`.
        folder: gets the report at the end and, of an `MTEBModel`, each task that is done, so that the same call after
            a stop goes on there.
        progress: whether a bar is shown.

    Returns:
        The scores. Tasks whose data could not be loaded, or that mteb cannot score, are left out, and named in its
        notes.

    Raises:
        InputError: no tasks, or none that could be scored; embeddings that are not finite; two tasks of one name; one
            that is not of texts; an instruction that belongs to none of them; a folder that cannot be written.
    """
    metadata = check_tasks(tasks := list(tasks))
    ours = model if isinstance(model, MTEBModel) else None
    if ours is not None:
        _check_names(ours, metadata.values())
    if folder is not None:
        _check_writable(Path(folder))
    kept = None if folder is None or ours is None else Kept(Path(folder) / FINISHED, ours.revision)
    done: list[Done] = []
    notes: list[str] = []
    started, texts, tokens = time.monotonic(), 0, 0
    bar = tqdm(total=len(tasks), desc="evaluate", unit="task", miniters=0, disable=not progress)

    def embedded(more_texts: int, more_tokens: int) -> None:
        nonlocal texts, tokens
        texts, tokens = texts + more_texts, tokens + more_tokens
        bar.set_postfix_str(f"{name}, {texts:,} texts", refresh=False)
        bar.update(0)

    with bar, _quiet(), logging_redirect_tqdm(), _told(ours, embedded):
        for name, task in zip(metadata, tasks):
            bar.set_postfix_str(name)
            notes += [f"{name}: {note}" for note in getattr(task, "notes", ())]
            found = None if kept is None else kept.load(task, metadata[name])
            if found is None:
                try:
                    loaded = _loaded(task)
                    found = Done(_scores(model, loaded, _data_of(task, metadata[name])), sample_texts(loaded))
                except InputError:  # of the model, so the next task would not do better
                    raise
                except Exception as error:  # of one task: those after it are scored all the same
                    what = "its data cannot be loaded" if isinstance(error, _NoData) else "it cannot be scored"
                    notes.append(f"{name}: left out, {what}: {_in_a_line(error)}")
                    logger.warning("%s", notes[-1], exc_info=None if isinstance(error, _NoData) else error)
                    bar.update()
                    continue
                if kept is not None:
                    kept.save(task, metadata[name], found)
            done.append(found)
            for score in found.scores:
                logger.info("%s: %s %.2f", score.label, score.metric, 100 * score.value)
                if math.isnan(score.value):
                    notes.append(f"{score.label}: no {score.metric}, as where all embeddings are equal")
            bar.update()
    if not done:
        raise InputError("nothing could be evaluated\n" + "\n".join(notes))
    if texts:
        seconds = time.monotonic() - started
        notes.append(f"{texts:,} texts with {tokens:,} tokens in {seconds:,.0f} s, their scoring included.")
    run = _run(model, [score for each in done for score in each.scores], notes)
    if folder is not None:
        samples = [each.sample for each in done if each.sample is not None]
        write_report(run, folder, samples=None if ours is None else embed_samples(ours, samples, metadata))
    return run


def named_tasks(names: Sequence[str]) -> list[AbsTask]:
    """mteb's tasks by their names.

    Raises:
        InputError: mteb has no task of a name.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that have changed
        try:
            return [mteb.get_task(name) for name in names]
        except KeyError as error:
            raise InputError(f"mteb: {_said(error)}") from None


def benchmark_tasks(name: str) -> list[AbsTask]:
    """The tasks of one of mteb's benchmarks.

    Raises:
        InputError: mteb has no benchmark of that name.
    """
    try:
        return list(mteb.get_benchmark(name).tasks)
    except KeyError as error:
        raise InputError(f"mteb: benchmark {_said(error)}") from None


def check_tasks(tasks: Sequence[LocalTask | AbsTask]) -> dict[str, TaskMetadata]:
    """What mteb knows of each task, by its name.

    Raises:
        InputError: no tasks, two of one name, or one that is not of texts.
    """
    found: dict[str, TaskMetadata] = {}
    for task in tasks:
        metadata = task.metadata if isinstance(task, AbsTask) else local_metadata(task)
        if metadata.name in found:
            raise InputError(f"two tasks have the name {metadata.name}; give one of them another, or leave it out")
        if others := sorted({*metadata.modalities} - {"text"}):
            raise InputError(f"{metadata.name}: a task of {', '.join(others)}; expected one of texts alone")
        found[metadata.name] = metadata
    if not found:
        raise InputError("there is nothing to evaluate on: give local tasks, tasks of mteb's by name, or a benchmark")
    return found


@dataclasses.dataclass(frozen=True)
class Done:
    """What is kept of a task that is done."""

    scores: list[TaskScore]
    sample: SampleTexts | None = None


class Kept:
    """The tasks that are done, a file each: by model, by what the task holds, and by the version of mteb."""

    def __init__(self, folder: Path, revision: str) -> None:
        self._folder, self._revision = folder, revision

    def load(self, task: LocalTask | AbsTask, metadata: TaskMetadata) -> Done | None:
        """None: it is not done, or its file is damaged."""
        try:
            return TypeAdapter(Done).validate_json(self._file(task, metadata).read_bytes())
        except (OSError, ValidationError):
            return None

    def save(self, task: LocalTask | AbsTask, metadata: TaskMetadata, done: Done) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with new_file(self._file(task, metadata)) as file:
            file.write(json.dumps(dataclasses.asdict(done), ensure_ascii=False).encode())

    def _file(self, task: LocalTask | AbsTask, metadata: TaskMetadata) -> Path:
        parts = [list(task.hf_subsets), list(task.eval_splits)] if isinstance(task, AbsTask) else []
        key = [_FORMAT, mteb.__version__, self._revision, metadata.name, metadata.dataset, parts]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self._folder / f"{re.sub(r'[^0-9A-Za-z.-]', '_', metadata.name)}-{digest[:16]}.json"


class _NoData(Exception):
    pass


def _loaded(task: LocalTask | AbsTask) -> AbsTask:
    """A task of mteb's of our own, with its data."""
    if not isinstance(task, AbsTask):
        return to_mteb(task)
    made = copy.copy(task)
    # What was drawn in an earlier evaluation would change the draws of this one.
    made.rng_state, made.np_rng = random.Random(made.seed), np.random.default_rng(made.seed)
    if not made.is_aggregate:
        try:
            made.load_data()
        except Exception as error:  # of the network, of the hub, of a data set's own code
            raise _NoData(_in_a_line(error)) from error
    return made


def _in_a_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _data_of(task: LocalTask | AbsTask, metadata: TaskMetadata) -> str | None:
    """What tells the texts of a task from others of the same name."""
    return metadata.dataset.get("revision") if isinstance(task, AbsTask) else data_hash(task)


def _scores(model: Any, task: AbsTask, data: str | None) -> list[TaskScore]:
    items = Items(task)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The task .* is superseded")
        warnings.filterwarnings("ignore", "To copy construct from a tensor")  # mteb, of tensors of its own
        # The protocol ends early; labels that are never predicted; equal cosines, which a note is about.
        for category in (ConvergenceWarning, UndefinedMetricWarning, ConstantInputWarning):
            warnings.simplefilter("ignore", category)
        results = mteb.evaluate(
            model,
            task,
            co2_tracker=False,
            cache=None,
            encode_kwargs={"batch_size": 32, "show_progress_bar": False},
            prediction_folder=Path(),  # nothing is written: `items` takes the predictions
            show_progress_bar=False,
        )
    result = results.task_results[0]
    found = [(split, values) for split, subsets in result.scores.items() for values in subsets]
    return [
        _score(task, split, values, items, float(result.evaluation_time or 0) / len(found), data)
        for split, values in found
    ]


def _score(
    task: AbsTask, split: str, values: Mapping[str, Any], items: Items, seconds: float, data: str | None
) -> TaskScore:
    subset, value = values["hf_subset"], float(values["main_score"])
    of_each = items.found.get((subset, split))
    if of_each is None and task.metadata.main_score == "v_measure" and isinstance(values.get("v_measures"), list):
        of_each = {"value": [float(found) for found in values["v_measures"]]}  # of each set of texts
    of_items = None if of_each is None else whole(of_each)
    if of_items is not None and not abs(of_items - value) < _ROUNDED:
        of_each = None  # a task that makes its score in a way of its own
    return TaskScore(
        task=task.metadata.name,
        type=task.metadata.type,
        subset=subset,
        split=split,
        metric=task.metadata.main_score,
        value=value,
        metrics={
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float | np.number) and name != "main_score"
        },
        seconds=seconds,
        items=of_each,
        data=data,
    )


def _run(model: Any, scores: list[TaskScore], notes: list[str]) -> Run:
    # mteb makes the metadata of those that have none, too, but keeps them to itself.
    meta = getattr(model, "mteb_model_meta", None) or ModelMeta.from_sentence_transformer_model(model)
    return Run(
        model=meta.name or type(model).__name__,
        revision=meta.revision or "unknown",
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        device=_devices(model.embedder) if isinstance(model, MTEBModel) else str(getattr(model, "device", "unknown")),
        versions={"python": platform.python_version(), **dict(_versions())},
        scores=scores,
        notes=notes,
    )


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield package, importlib.metadata.version(package)


def _devices(embedder: Embedder) -> str:
    devices = jax.devices()[:1] if embedder.mesh is None else list(embedder.mesh.devices.flat)
    return f"{len(devices)} × {devices[0].device_kind}"


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--output {folder}: cannot be written: {error}") from None


def _check_names(model: MTEBModel, tasks: Iterable[TaskMetadata]) -> None:
    """Refuses an instruction, or a name in `symmetric`, that no task goes by."""
    names = {name for task in tasks for name in (task.name, task.type)}
    parts = [part.value for part in PromptType]
    keys = {*names, *parts, *(f"{name}-{part}" for name in names for part in parts)}
    for option, given, known in (("instructions", model.instructions, keys), ("symmetric", model.symmetric, names)):
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise InputError(f"{option}: none of the tasks has the name or type {name!r}{hint}")


def _said(error: KeyError) -> str:
    return str(error.args[0]).removeprefix("KeyError: ")


@contextlib.contextmanager
def _told(model: MTEBModel | None, progress: Callable[[int, int], object]) -> Iterator[None]:
    """With a model that tells of its progress."""
    if model is None:
        yield
        return
    before, model.progress = model.progress, progress
    try:
        yield
    finally:
        model.progress = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars of `datasets`, one for every few rows that mteb hands it."""
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
