"""Local tasks as dev sets of a run, and the state that did best by one of them: kept, exported, found again."""

import json
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from safetensors.numpy import load_file

from jaxembed import convert
from jaxembed.__main__ import run_command
from jaxembed.training import loop, run_directory
from jaxembed.training.dev import BestCheckpoint

from runs import Workshop, make_rows, rows_of, write_jsonl

pytestmark = pytest.mark.usefixtures("quick_compilation")

VALUES = {0: 0.5, 2: 0.75, 4: 0.75, 6: 0.5}
"""Of the metric, by step: the first of the best ones counts."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = Workshop(tmp_path_factory.mktemp("best"))
    rows = make_rows(24, seed=3)
    pairs = write_jsonl(made.folder / "pairs.jsonl", [{"query": r["anchor"], "code": r["positive"]} for r in rows])
    graded: list[Any] = [{"s1": r["anchor"], "s2": r["positive"], "score": n % 6} for n, r in enumerate(rows)]
    labelled: list[Any] = [{"text": r["positive"], "label": n % 2} for n, r in enumerate(rows)]
    classes = made.folder / "classes"
    classes.mkdir()
    write_jsonl(classes / "train.jsonl", labelled[:16])
    write_jsonl(classes / "test.jsonl", labelled[16:])
    clusters = {"kind": "task", "name": "clusters", "path": str(classes / "test.jsonl"), "task": "clustering"}
    made.write_config("clusters", data={**made.values["data"], "dev": [clusters]})
    made.values["data"]["dev"] = [
        {"kind": "task", "name": "all", "path": str(pairs)},
        {"kind": "task", "name": "chunks", "path": str(pairs), "task": "code_search"},
        {"kind": "task", "name": "sts", "path": str(write_jsonl(made.folder / "sts.jsonl", graded))},
        {"kind": "task", "name": "classes", "path": str(classes), "query_instruction": "label: "},
    ]
    made.values["training"] = {"batch_size": 8, "steps": 6, "trainable": "bitfit"}
    made.values["checkpoint"] = {"every_steps": 2, "keep": 1}
    made.values["evaluation"] = {"every_steps": 2, "bm25": False, "best_metric": "all/ndcg@10"}
    made.config = made.write_config()
    made.write_config("one", data={**made.values["data"], "dev": made.values["data"]["dev"][:1]})
    return made


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Evaluations find `VALUES`."""
    original = loop._evaluate

    def evaluate(*arguments: Any) -> dict[str, dict[str, float]]:
        found, done = original(*arguments), arguments[5]
        found["all"]["ndcg@10"] = VALUES[done]
        return found

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_evaluate", evaluate)
        yield


def weights(model: Path) -> dict[str, np.ndarray]:
    return load_file(model / "model.safetensors")


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.usefixtures("scored")
@pytest.mark.slow
def test_the_best_state_is_kept_exported_and_found_again(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    last = workshop.folder / "last"
    assert workshop.train(last, "--export.checkpoint", "last", "--checkpoint.keep", 9) == 0
    printed = capsys.readouterr().out
    assert f"model: {last}/model (the last state; all/ndcg@10 was best after step 2: 0.7500)" in printed
    names = {"all": "mrr@10", "chunks": "mrr", "sts": "spearman", "classes": "accuracy"}
    for name, metric in names.items():
        assert [row["step"] for row in rows_of(last) if f"dev/{name}/{metric}" in row] == sorted(VALUES)
    assert "chunks: 24 pairs in chunks of 24" in printed
    assert "classes: 16 texts to learn from, 8 texts to be tested on" in printed

    # The run as it was after step 2.
    two = shutil.copytree(last, workshop.folder / "two")
    assert convert_run(two, workshop.folder / "of last") == 0
    assert_same(weights(workshop.folder / "of last"), weights(last / "model"))
    for step in (4, 6):
        shutil.rmtree(two / "checkpoints" / str(step))
    shutil.rmtree(two / "best")
    assert convert_run(two, workshop.folder / "of two") == 0
    expected = weights(workshop.folder / "of two")

    run = workshop.folder / "best run"
    original = loop._evaluate

    def interrupted(*arguments: Any) -> dict[str, dict[str, float]]:
        if arguments[5] == 4:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_evaluate", interrupted)
        assert workshop.train(run) == 0
    assert not (run / "model").exists()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["4"]
    capsys.readouterr()
    assert workshop.resume(run) == 0
    printed = capsys.readouterr().out
    assert f"model: {run}/model (after step 2, where all/ndcg@10 was best: 0.7500)" in printed
    assert "best, step 2" in printed
    assert "best, step 2" in (run / "model" / "README.md").read_text()
    assert_same(weights(run / "model"), expected)
    assert any(not np.array_equal(value, expected[name]) for name, value in weights(last / "model").items())
    best = json.loads((run / "best.json").read_text())
    assert (best["step"], best["metric"], best["value"]) == (2, "all/ndcg@10", 0.75)
    assert set(best["dev"]) == set(names)
    assert len(list((run / "best").iterdir())) == 1


def convert_run(*arguments: object) -> int:
    return run_command(convert.main, [str(argument) for argument in arguments])


@pytest.mark.slow
@pytest.mark.usefixtures("scored")
@pytest.mark.parametrize("trainable", ["bitfit", "full", "lora"])
def test_any_state_of_a_run_becomes_a_model(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], trainable: str
) -> None:
    run, target, one = tmp_path / "run", tmp_path / "target", workshop.folder / "one.yaml"
    rows = ("--training.train_tokens", '["e", "a"]') if trainable == "lora" else ()
    keep = ("--checkpoint.keep", 9)
    assert workshop.train(run, "--training.trainable", trainable, *rows, *keep, config=one) == 0
    capsys.readouterr()

    def converted(*options: object) -> tuple[str, dict[str, np.ndarray]]:
        """The state that is named, and the weights."""
        assert convert_run(run, target, "--overwrite", *options) == 0
        state = capsys.readouterr().out.removeprefix(f"{target} (").split("): ")[0]
        step, comma, rest = state.removeprefix("after step ").partition(",")
        assert f"The model after step {step} of its training{comma}{rest}." in (target / "README.md").read_text()
        return state, weights(target)

    best = "after step 2, where all/ndcg@10 was best: 0.7500"
    exported = weights(run / "model")
    states = {}
    for step in (2, 4):
        named, states[step] = converted("--checkpoint", step)
        assert named == f"after step {step}"
    assert_same(states[2], exported)
    assert any(not np.array_equal(value, exported[name]) for name, value in states[4].items())
    shutil.rmtree(run / "checkpoints" / "2")  # the state is in best/ as well
    for options in ([], ["--checkpoint", "best"], ["--checkpoint", 2]):
        named, found = converted(*options)
        assert named == best
        assert_same(found, exported)
    shutil.rmtree(run / "checkpoints" / "6")
    named, found = converted("--checkpoint", "newest")
    assert named == "after step 4"
    assert_same(found, states[4])
    assert convert_run(run, target, "--overwrite", "--dry-run") == 0
    assert f"(training run {best}) to sentence-transformers" in capsys.readouterr().out


@pytest.mark.usefixtures("scored")
def test_states_that_are_not_there(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    one = workshop.folder / "one.yaml"
    assert workshop.train(run, config=one) == 0

    def refused(source: Path, checkpoint: object) -> str:
        capsys.readouterr()
        assert convert_run(source, tmp_path / "target", "--checkpoint", checkpoint) == 2
        assert not (tmp_path / "target").exists()
        return capsys.readouterr().err

    assert "run/checkpoints: no checkpoint of step 4; the steps that are kept: 6; the best one: 2" in refused(run, 4)
    assert "expected newest, best or the number of a step, found 'last'" in refused(run, "last")
    assert "--checkpoint 6: " in (error := refused(run / "model", 6))
    assert "model is no training run" in error

    # Frozen weights have to be those of then also where no other checkpoint tells what they were.
    shutil.rmtree(run / "checkpoints" / "6")
    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "_read_base", changed_base(run_directory._read_base))
        assert "is not the one that the run began with" in refused(run, "best")

    for file in (run / "best").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    assert "run/best: no checkpoint that can be read" in refused(run, "best")

    plain = tmp_path / "plain"
    assert workshop.train(plain, "--evaluation.best_metric", "null", "--checkpoint.keep", 2, config=one) == 0
    error = refused(plain, "best")
    assert "none of its states is known as the best: the run has no evaluation.best_metric" in error
    assert "the steps that are kept: 4, 6" in error
    assert "no checkpoint of step 2; the steps that are kept: 4, 6\n" in refused(plain, 2)


def test_a_run_whose_best_state_is_not_known_yet(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(*arguments: Any) -> dict[str, dict[str, float]]:
        if arguments[5] == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    original = loop._evaluate
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_evaluate", evaluate)
        assert workshop.train(tmp_path / "run", config=workshop.folder / "one.yaml") == 0
    capsys.readouterr()
    assert convert_run(tmp_path / "run", tmp_path / "target", "--checkpoint", "best") == 2
    assert "no value of all/ndcg@10 is known yet; the steps that are kept: 2\n" in capsys.readouterr().err
    assert convert_run(tmp_path / "run", tmp_path / "target") == 0
    assert "(after step 2; no value of all/ndcg@10 is known yet): " in capsys.readouterr().out


def changed_base(read: Any) -> Any:
    """A reader of the base that finds other values in it."""

    def changed(*arguments: Any) -> Iterator[tuple[str, np.ndarray]]:
        return ((name, array + 1) for name, array in read(*arguments))

    return changed


def considered(folder: Path, metric: str, values: Sequence[float]) -> dict[str, Any] | None:
    """What is known of the best one after these values, of steps 1, 2, …"""
    name, _, key = metric.rpartition("/")
    with BestCheckpoint(epath.Path(folder), metric, {}) as best:
        for step, value in enumerate(values, start=1):
            best.consider(step, nnx.State({"x": nnx.Param(jnp.float32(step))}), {name: {key: value}})
    with BestCheckpoint(epath.Path(folder), metric, {}) as again:
        assert again.info == best.info
        if best.info is not None:
            restored: Any = again.restore(nnx.State({"x": nnx.Param(jnp.float32(0))}))
            assert float(restored["x"][...]) == best.info["step"]
        return again.info


@pytest.mark.parametrize(
    ("metric", "values", "step"),
    [
        ("a/b/mrr@10", [0.1, 0.3, 0.2, 0.3], 2),
        ("a/loss", [3.0, 1.0, 2.0], 2),
        ("a/spearman", [float("nan"), -0.5, float("nan")], 2),
        ("a/spearman", [float("nan")], None),
    ],
)
def test_which_is_best(tmp_path: Path, metric: str, values: Sequence[float], step: int | None) -> None:
    found = considered(tmp_path, metric, values)
    assert (found and found["step"]) == step


def test_another_metric_begins_anew(tmp_path: Path) -> None:
    assert considered(tmp_path, "a/mrr@10", [0.9, 0.1]) == considered(tmp_path, "a/mrr@10", [0.5])
    found = considered(tmp_path, "b/mrr@10", [0.2])
    assert found is not None
    assert (found["metric"], found["value"]) == ("b/mrr@10", 0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--evaluation.best_metric", "sts/accuracy"], "sts has no metric 'accuracy'; it has spearman"),
        (["--evaluation.best_metric", "a/mrr@10"], "expected NAME/METRIC with the name of a source in data.dev (all, "),
        (["--evaluation.best_metric", "mrr@10"], 'found "mrr@10"'),
        (["--evaluation.every_steps", "null"], "best_metric needs every_steps"),
        (
            ["--evaluation.best_metric", "null", "--export.checkpoint", "best"],
            "export.checkpoint: best needs evaluation.best_metric",
        ),
        (["--data.dev.2.path", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder (task 'sts')"),
        (["--data.dev.2.anchor", "s1"], "anchor and positive go together"),
    ],
)
def test_what_cannot_be_is_said_before_training(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], options: Sequence[str], message: str
) -> None:
    assert workshop.train("refused", *options) == 2
    assert message in capsys.readouterr().err
    assert not (workshop.folder / "refused" / "config.yaml").exists()


def test_kinds_that_training_cannot_evaluate(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert workshop.train("refused", config=workshop.folder / "clusters.yaml") == 2
    assert "data.dev: clusters is a task of mteb's type Clustering" in capsys.readouterr().err
