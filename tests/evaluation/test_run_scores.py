"""Scores on the disk, and averages as MTEB makes them."""

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxembed.errors import InputError
from jaxembed.evaluation.scores import Run, TaskScore, averages, by_task, task_value


def score(task: str, kind: str, value: float, subset: str = "default", **other: Any) -> TaskScore:
    given = {"split": "test", "metric": "accuracy", "metrics": {"accuracy": value}, "seconds": 0.5, **other}
    return TaskScore(task=task, type=kind, subset=subset, value=value, **given)


def run(*scores: TaskScore, model: str = "a/model") -> Run:
    return Run(model, "5e1f", "2026-11-26T19:00:00", "cpu", {"jaxembed": "0.1.0"}, list(scores), ["1 text was empty"])


@pytest.fixture
def full() -> Run:
    values = [random.Random(1).random() for _ in range(50)]
    return run(
        score("Ranks", "Retrieval", float(np.mean(values)), items={"value": values}),
        score("Alike", "STS", -0.25, items={"cosine": [0.1, 0.1 + 0.2, 1 / 3], "grade": [1.0, 2.0, 0.0]}),
        score("Same", "PairClassification", 1.0, items={"label": [0, 1, 1], "cosine": [0, 1, 2]}),
        score("Matched", "BitextMining", 1.0, items={"gold": [0, 1], "predicted": [0, 1]}),
        score("Groups", "Clustering", 1.0, items=CLUSTERS),
        score("Ähnlich", "Clustering", 0.5, subset="de", metrics={"v_measure": 0.5, "other": math.nan}),
    )


def test_what_is_saved_is_loaded(tmp_path: Path, full: Run) -> None:
    full.save(tmp_path / "new" / "folder")
    found = Run.load(tmp_path / "new" / "folder")
    assert math.isnan(found.scores[-1].metrics.pop("other"))
    assert math.isnan(full.scores[-1].metrics.pop("other"))
    assert found == full  # every float to the bit
    assert all(
        "items" not in entry for entry in json.loads((tmp_path / "new/folder/scores.json").read_text())["scores"]
    )


def test_a_run_without_items_leaves_none_of_an_earlier_one(tmp_path: Path, full: Run) -> None:
    full.save(tmp_path)
    plain = run(*(dataclasses.replace(each, items=None) for each in full.scores[:2]))
    plain.save(tmp_path)
    assert Run.load(tmp_path) == plain


def damage(values: dict[str, Any], change: str) -> Any:
    entry = values["scores"][0]
    match change:
        case "key is missing":
            del entry["metric"]
        case "unknown key":
            entry["colour"] = "red"
        case "wrong type":
            entry["value"] = "high"
        case "in percent":
            entry["value"] = 61.7
        case "other items":
            entry["value"] = 0.9
        case "twice":
            values["scores"].append(entry)
        case "format":
            values["format"] = 7
        case "a list":
            return []
    return values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("key is missing", r"scores.json: scores.0.metric: Field required"),
        ("unknown key", r"scores.json: scores.0.colour: "),
        ("wrong type", r"scores.json: scores.0.value: .*valid number"),
        ("in percent", r"scores.json: scores.0: Ranks: expected accuracy of 1 at most, found 61.7; not in percent"),
        ("other items", r"scores.json: scores.0: Ranks: the mean of the items is 0\.\d+, the score 0.900000"),
        ("twice", r"the run has Ranks / default / test more than once"),
        ("format", r"scores.json: expected the scores of this version"),
        ("a list", r"scores.json: expected the scores of this version"),
    ],
)
def test_damaged_values(tmp_path: Path, full: Run, change: str, message: str) -> None:
    full.save(tmp_path)
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(damage(json.loads(file.read_text()), change)))
    if change == "twice":
        (tmp_path / "items.json").unlink()
    with pytest.raises(InputError, match=message):
        Run.load(tmp_path)


@pytest.mark.parametrize("name", ["scores.json", "items.json"])
def test_a_file_that_was_cut(tmp_path: Path, full: Run, name: str) -> None:
    full.save(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"{name}: cannot be read: "):
        Run.load(tmp_path)


def test_files_of_different_runs(tmp_path: Path, full: Run) -> None:
    full.save(tmp_path)
    kept = (tmp_path / "items.json").read_bytes()
    run(score("Other", "STS", 0.5)).save(tmp_path)
    (tmp_path / "items.json").write_bytes(kept)
    with pytest.raises(InputError, match=r"items.json: .*Ranks.* is not in scores.json"):
        Run.load(tmp_path)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected the folder of an evaluation, found no scores.json"):
        Run.load(tmp_path)


@pytest.mark.parametrize(
    "items",
    [
        {},
        {"value": []},
        {"cosine": [0.1]},
        {"cosine": [0.1, 0.2], "grade": [1.0]},
        {"values": [0.5]},
        {"label": [1.0]},
        {"label": [1.0], "cosine": [1.0], "colour": [1.0]},
        {"gold": [1.0, 2.0], "predicted": [1.0]},
        {"set": [0.0], "document": [0.0], "label": [0.0], "cluster": [0.0]},
    ],
)
def test_items_that_no_bootstrap_can_use(items: dict[str, list[float]]) -> None:
    with pytest.raises(InputError, match=r"Task: expected items 'value', or as many 'cosine' as 'grade', .*found "):
        score("Task", "STS", 0.5, items=items)


CLUSTERS = {"set": [0, 0], "document": [0, 1], "label": [0, 1], "cluster": [0, 1], "times": [1, 2]}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"label": [0, 2], "dot": [1, 0]}, "expected 0 or 1 as 'label' of the items, found 2"),
        ({"label": [0, 0.5], "dot": [1, 0]}, "expected whole numbers as 'label'"),
        ({"gold": [0, 1], "predicted": [0, math.nan]}, "expected whole numbers as 'predicted'"),
        ({**CLUSTERS, "cluster": [0, -1]}, "expected whole numbers as 'cluster'"),
        ({"label": [0, 1], "dot": [1, 0]}, "the accuracy of the items is 0.500000, the score 0.900000"),
        (CLUSTERS, "the accuracy of the items is 1.000000, the score 0.900000"),
    ],
)
def test_damaged_items(items: dict[str, list[float]], message: str) -> None:
    with pytest.raises(InputError, match=f"Task: {message}"):
        score("Task", "Any", 0.9, items=items)


def test_averages_are_those_of_mteb() -> None:
    """A task counts once, whatever its subsets; the mean over types counts each type once."""
    scores = [
        score("One", "STS", 0.9),
        *(score("Many", "STS", value, subset=str(number)) for number, value in enumerate((0.1, 0.2, 0.6))),
        score("Topic", "Classification", 0.5),
        score("Own", "Mine", 0.2),
    ]
    found = averages(scores)
    assert list(found.types) == ["Classification", "STS", "Mine"]
    assert found.types == pytest.approx({"Classification": 0.5, "STS": (0.9 + 0.3) / 2, "Mine": 0.2})
    assert found.tasks == pytest.approx((0.9 + 0.3 + 0.5 + 0.2) / 4)
    assert found.over_types == pytest.approx((0.5 + 0.6 + 0.2) / 3)
    assert math.isnan(averages([]).tasks)


@pytest.mark.slow
def test_the_mean_of_a_task_is_that_of_mteb() -> None:
    from mteb.results import TaskResult

    values = {"en": 0.25, "de": 0.5, "fr": 0.9}
    entries = [
        {"hf_subset": subset, "languages": [f"{subset}g-Latn"], "main_score": value, "accuracy": value}
        for subset, value in values.items()
    ]
    theirs = TaskResult.from_validated(
        task_name="Task", dataset_revision="1", mteb_version="2", evaluation_time=1.0,
        scores={"test": entries, "validation": entries[:1]},
    )  # fmt: skip
    ours = [score("Task", "Classification", value, subset) for subset, value in values.items()]
    ours.append(score("Task", "Classification", values["en"], "en", split="validation"))
    [task] = by_task(ours)["Classification"].values()
    assert task_value(task) == pytest.approx(theirs.get_score(), abs=1e-12)
