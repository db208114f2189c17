"""Runs from config to export: what they write, what stops them, and how a stopped one goes on to the same end."""

import contextlib
import io
import itertools
import json
import logging
import math
import re
import resource
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tensorboardX.proto.event_pb2 import Event

from jaxembed.checkpoint.orbax import TrainingCheckpoints
from jaxembed.config import load_config
from jaxembed.training import loop

from runs import SHAPE, Workshop, make_rows, rows_of, write_jsonl

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 40
BIASES = 2 * SHAPE.dim + SHAPE.layers * 11 * SHAPE.dim
"""The norms of table and output; a layer's two norms (2), qkv (3), out (1), up (4), down (1)."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop"))


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def saved_leaves(run, step):
    """Sizes of the arrays in a checkpoint."""
    import orbax.checkpoint.experimental.v1 as ocp

    metadata = ocp.metadata(run / "checkpoints" / str(step)).metadata
    return {name.removesuffix(".value"): math.prod(leaf.shape) for name, leaf in metadata.items()}


class Records(logging.Handler):
    def __init__(self):
        super().__init__(logging.INFO)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def whole(workshop):
    """A BitFit run with all that a run can have: (its directory, what it logged, what it printed)."""
    rows = make_rows(30, seed=1)
    rows[3]["positive"] = "  "
    second, dev = workshop.folder / "b.jsonl", workshop.folder / "dev.jsonl"
    write_jsonl(second, rows)
    write_jsonl(dev, make_rows(20, seed=2))
    first = workshop.values["data"]["train"][0]
    config = workshop.write_config(
        "whole",
        data={
            **workshop.values["data"],
            "train": [
                {**first, "weight": 3},
                {"kind": "jsonl", "name": "b", "path": str(second), "negatives": ["hard"], "weight": 2},
            ],
            "dev": [{"kind": "jsonl", "name": "held-out", "path": str(dev)}],
        },
        training={"batch_size": 8, "epochs": 2.5, "trainable": "bitfit", "negatives": 1},
        optimizer={"learning_rate": 0.01, "schedule": "cosine", "warmup_steps": 3},
        checkpoint={"every_steps": 7},
        evaluation={"every_steps": 10, "searches": ["parse a date"]},
        logging={"every_steps": 1, "tensorboard": True},
        export={"verify": "auto"},
        profile={"steps": "4:6"},
    )
    run, log, out = workshop.folder / "whole", Records(), io.StringIO()
    logger = logging.getLogger("jaxembed")
    logger.addHandler(log)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(out):
            assert workshop.train(run, config=config) == 0
    finally:
        logger.removeHandler(log)
        logger.setLevel(level)
    return run, log.lines, out.getvalue()


def test_epochs_may_end_within_a_batch_or_an_epoch(whole):
    # 48 + 29 pairs: 9 batches an epoch, 22.5 of them in 2.5 epochs.
    run, _, _ = whole
    steps = [row["step"] for row in rows_of(run) if "train/loss" in row]
    assert steps == list(range(1, 23))


def test_metrics_have_all_fields(whole):
    run, _, _ = whole
    rows = [row for row in rows_of(run) if "train/loss" in row]
    names = ("loss", "loss/a", "loss/b", "gradient_norm", "learning_rate", "texts_per_second", "tokens_per_second")
    for row in rows:
        assert set(row) == {"step", "train/density", *(f"train/{name}" for name in names)}
        assert all(math.isfinite(value) for value in row.values())
        low, high = sorted((row["train/loss/a"], row["train/loss/b"]))
        assert low <= row["train/loss"] <= high
        assert 0 < row["train/density"] <= 1
        assert row["train/tokens_per_second"] > row["train/texts_per_second"] > 0
    rates = [row["train/learning_rate"] for row in rows]
    warm = 0.01 * np.arange(3) / 3
    cosine = 0.005 * (1 + np.cos(np.pi * np.arange(19) / 19))
    np.testing.assert_allclose(rates, [*warm, *cosine], rtol=1e-4, atol=1e-9)


def test_the_dev_set_is_evaluated_before_between_and_after(whole):
    run, log, out = whole
    rows = [row for row in rows_of(run) if "dev/held-out/loss" in row]
    assert [row["step"] for row in rows] == [0, 10, 20, 22]
    for name in ("mrr@10", "ndcg@10", "recall@1", "recall@10", "recall@100", "loss"):
        assert all(f"dev/held-out/{name}" in row for row in rows)
    for shown in ("before", "after", "BM25, plain words", "BM25, split identifiers", "'parse a date'", "mrr@10"):
        assert shown in out
    assert f"{rows[0]['dev/held-out/mrr@10']:.4f}" in out
    assert any(line.startswith("step 22, held-out: ") for line in log)


def test_dropped_rows_are_counted_in_log_and_model_card(whole):
    run, log, _ = whole
    assert any("48 pairs kept, 0 dropped" in line for line in log)
    assert "b: 29 pairs kept, 1 dropped (1 empty text)" in log
    assert "1 dropped (1 empty text)" in (run / "model" / "README.md").read_text()


def test_the_start_is_told_in_one_line(whole):
    _, log, _ = whole
    line = next(line for line in log if line.startswith("bloom, 2 layers of 16: "))
    total = sum(p.size for p in load_file(whole[0] / "model" / "model.safetensors").values())
    assert f"{BIASES:,} parameters train, {total - BIASES:,} are frozen" in line
    assert "8 × cpu (data 8 × fsdp 1 × tensor 1)" in line
    assert "steps 1 to 22" in line


def test_the_run_directory_says_all_that_repeats_it(whole, workshop):
    run, _, _ = whole
    given = load_config(workshop.folder / "whole.yaml", ["--run_dir", str(run)])
    assert load_config(run / "config.yaml") == given
    about = json.loads((run / "run.json").read_text())
    assert re.fullmatch("[0-9a-f]{64}", about["plan"])
    assert {"jax", "flax", "optax", "numpy"} <= set(about["versions"])
    assert about["versions"]["jax"] == jax.__version__
    assert {"command", "git", "python", "platform", "devices"} <= set(about)


def test_tensorboard_has_the_same_numbers(whole):
    run, _, _ = whole
    written = {}
    for path in (run / "tensorboard").iterdir():
        for event in read_events(path.read_bytes()):
            written.update({(event.step, value.tag): value.simple_value for value in event.summary.value})
    for row in rows_of(run):
        for name, value in row.items():
            if name != "step":
                assert written[row["step"], name.replace("@", "_at_")] == pytest.approx(value, rel=1e-6)


def read_events(records):
    """The events in a TFRecord file: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    while records:
        length = int.from_bytes(records[:8], "little")
        yield Event.FromString(records[12 : 12 + length])
        records = records[16 + length :]


def test_the_profile_is_there(whole):
    run, _, _ = whole
    assert list((run / "profile").rglob("*.xplane.pb"))


def test_bitfit_changes_and_saves_biases_only(whole, workshop):
    run, _, _ = whole
    before, after = load_file(workshop.base / "model.safetensors"), weights(run)
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("bias")}
    assert sum(before[name].size for name in changed) == BIASES
    leaves = saved_leaves(run, 22)
    biases = {name: size for name, size in leaves.items() if name.endswith("bias")}
    assert sum(size for name, size in biases.items() if name.startswith("trainable.")) == BIASES
    assert sum(size for name, size in biases.items() if name.startswith("optimizer.")) == 2 * BIASES
    assert all(leaves[name] == 1 for name in leaves.keys() - biases.keys()), "more than counters"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["21", "22"]


def test_resuming_a_finished_run_changes_nothing(whole, workshop, capsys):
    run, _, _ = whole
    before, rows = weights(run), (run / "metrics.jsonl").read_text()
    shutil.rmtree(run / "model")
    assert workshop.resume(run, "--export.verify", "off") == 0
    assert (run / "metrics.jsonl").read_text() == rows
    after = weights(run)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert "BM25, plain words" in capsys.readouterr().out


def test_a_resumption_may_have_other_dev_sets(whole, workshop, capsys, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    known = json.loads((run / "dev_before.json").read_text())
    (run / "dev_before.json").write_text(json.dumps(known | {"another": known["held-out"]}))
    other = write_jsonl(tmp_path / "other.jsonl", make_rows(12, seed=4))
    options = ("--export.verify", "off", "--evaluation.searches", "[]", "--evaluation.bm25", "false")
    assert workshop.resume(run, "--data.dev.0.path", other, *options) == 0
    assert "held-out: 12 queries" in capsys.readouterr().out
    found = json.loads((run / "dev_before.json").read_text())
    assert found.pop("another") == known["held-out"]
    assert found["held-out"].keys() == {"before"}
    assert found["held-out"]["before"] != known["held-out"]["before"]


def test_other_data_is_no_resumption(whole, workshop, capsys, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    other = write_jsonl(tmp_path / "other.jsonl", [*make_rows(47), make_rows(1, seed=9)[0]])
    assert workshop.resume(run, "--data.train.0.path", other) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {run / 'checkpoints'}: its checkpoints belong to another run: plan is")
    shutil.rmtree(run / "checkpoints")
    assert workshop.resume(run, "--data.train.0.path", other) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {run}: this run began with other data")


def test_another_base_is_no_resumption(whole, workshop, capsys, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    base = shutil.copytree(workshop.base, tmp_path / "base")
    assert workshop.resume(run, "--model.path", base) == 2
    assert "its checkpoints belong to another run: base is" in capsys.readouterr().err


def test_a_number_that_is_none_stops_the_run(workshop, capsys):
    run = workshop.folder / "nan"
    assert workshop.train(run, "--optimizer.learning_rate", 1e30, "--checkpoint.every_steps", 1) == 1
    err = capsys.readouterr().err
    line = err.splitlines()[-1]
    numbers = r"loss (\S+), gradient norm (\S+), weights' norm (\S+) after the update"
    found = re.fullmatch(rf"error: step (\d+): {numbers}; stopped, .* The batch: (.*)", line)
    assert found
    step = int(found[1])
    assert 1 < step < 6
    assert [math.isfinite(float(number)) for number in found.groups()[1:4]] == [True, True, False]
    names = found[5].split(", ")
    assert len(names) == 8
    assert all(re.fullmatch(r"a\.jsonl:\d+", name) for name in names)
    assert "Traceback" not in err
    assert not (run / "model").exists()
    # Loss and weights of every step that was saved were numbers: it goes on from there.
    with TrainingCheckpoints(run / "checkpoints", keep=9) as checkpoints:
        assert checkpoints.steps() == list(range(max(1, step - 2), step))
    assert all(math.isfinite(row["train/loss"]) for row in rows_of(run))
    assert workshop.resume(run, "--optimizer.learning_rate", 1e-3) == 0
    assert all(np.isfinite(value).all() for value in weights(run).values())


def test_weights_that_are_numbers_and_lead_to_none_are_no_checkpoint(workshop, capsys):
    run = workshop.folder / "lead to nan"
    assert workshop.train(run, "--optimizer.learning_rate", 1e12, "--checkpoint.every_steps", 1) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    found = re.search(r"error: step (\d+): loss nan, .*The checkpoint of step (\d+), which led there, is deleted", line)
    assert found, line
    assert int(found[2]) == int(found[1]) - 1
    with TrainingCheckpoints(run / "checkpoints", keep=9) as checkpoints:
        assert checkpoints.steps() == [int(found[1]) - 2]
    assert workshop.resume(run, "--optimizer.learning_rate", 1e-3) == 0


def test_the_only_checkpoint_is_left(workshop, capsys):
    run = workshop.folder / "only"
    options = ("--optimizer.learning_rate", 1e12, "--checkpoint.every_steps", 1, "--checkpoint.keep", 1)
    assert workshop.train(run, *options) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    found = re.match(r"error: step (\d+): loss nan, .*nothing of this step was saved. A lower", line)
    assert found, line
    with TrainingCheckpoints(run / "checkpoints", keep=9) as checkpoints:
        assert checkpoints.steps() == [int(found[1]) - 1]


def test_the_loss_is_of_cosines_whatever_the_text_format(workshop):
    losses = []
    for normalize in ("true", "false"):
        run = workshop.folder / f"normalize {normalize}"
        assert workshop.train(run, "--text_format.normalize", normalize, "--training.steps", 2) == 0
        losses.append([row["train/loss"] for row in rows_of(run)])
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_steps_beyond_the_profile_need_no_end_of_it(workshop):
    run = workshop.folder / "late"
    assert workshop.train(run, "--profile.steps", "5:9") == 0
    assert list((run / "profile").rglob("*.xplane.pb"))
    assert workshop.resume(run, "--training.steps", 10) == 0
    assert [row["step"] for row in rows_of(run)] == list(range(1, 11))


# SIGTERM outside of the steps.


@pytest.fixture(scope="module")
def judged(workshop):
    """A config with evaluations, and a run of it."""
    dev = write_jsonl(workshop.folder / "judged.jsonl", make_rows(12, seed=2))
    config = workshop.write_config(
        "judged",
        data={**workshop.values["data"], "dev": [{"kind": "jsonl", "name": "dev", "path": str(dev)}]},
        evaluation={"every_steps": 2, "bm25": False},
    )
    run = workshop.folder / "judged"
    assert workshop.train(run, config=config) == 0
    return config, run


@pytest.mark.parametrize(
    ("function", "call", "during", "after"),
    [
        ("prepare_decoder", 1, "the preparation", None),
        ("_evaluate", 1, "the first evaluation", 0),
        ("_evaluate", 3, "", 4),
        ("write_model", 1, "the export", 6),
    ],
)
def test_terminated_outside_of_the_steps(workshop, judged, monkeypatch, caplog, function, call, during, after):
    config, reference = judged
    run = workshop.folder / f"terminated {function} {call}"
    original, calls = getattr(loop, function), itertools.count(1)

    def interrupted(*arguments, **options):
        if next(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments, **options)

    previous = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(loop, function, interrupted)
        assert workshop.train(run, config=config) == 0
    assert signal.getsignal(signal.SIGTERM) == previous
    assert not (run / "model").exists()
    line = next(message for message in caplog.messages if message.startswith("stopped by SIGTERM "))
    assert f"during {during}, " in line if during else "during" not in line
    if after:
        assert f"after step {after} of 6, everything is saved" in line
        assert (run / "checkpoints" / str(after)).is_dir()
    else:
        assert "before the first step, so that there is nothing to save" in line
    if after is None:
        assert line.endswith("start again with the same command")
        assert workshop.train(run, config=config) == 0
    else:
        assert line.endswith(f"go on with: python -m jaxembed.train --resume {run}")
        assert workshop.resume(run) == 0
    assert_identical(run, reference)


# Runs of their own processes, all of the same config.


@pytest.fixture(scope="module")
def long_config(workshop):
    return workshop.write_config(
        "long", training={"batch_size": 8, "steps": STEPS}, checkpoint={"every_steps": 3, "keep": 2}
    )


@pytest.fixture(scope="module")
def uninterrupted(workshop, long_config):
    run = workshop.folder / "uninterrupted"
    process = workshop.start(long_config, "--run_dir", run)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return run


def wait_until(process, reached):
    while process.poll() is None:
        if reached():
            return
        time.sleep(0.002)
    raise AssertionError(f"ended with {process.returncode} too early: {process.communicate()[1]}")


def wait_for_step(process, run, step):
    """Returns once the run has logged that step."""
    metrics = run / "metrics.jsonl"
    wait_until(process, lambda: metrics.exists() and metrics.read_text().count("train/loss") >= step)


def assert_identical(run, reference):
    found, expected = weights(run), weights(reference)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name
    numbers = ("step", "train/loss", "train/gradient_norm", "train/learning_rate")
    first, second = ([row for row in rows_of(each) if "train/loss" in row] for each in (run, reference))
    assert [[row[name] for name in numbers] for row in first] == [[row[name] for name in numbers] for row in second]


def test_killed_twice_and_resumed(workshop, long_config, uninterrupted):
    random = np.random.default_rng(5)
    run = workshop.folder / "killed"
    arguments = (long_config, "--run_dir", run)
    for step in (int(random.integers(2, 15)), int(random.integers(18, 30))):
        process = workshop.start(*arguments)
        wait_for_step(process, run, step)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (run / "model").exists()
        arguments = ("--resume", run)
    process = workshop.start(*arguments)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert re.search(rf"steps \d+ to {STEPS}", err)
    assert_identical(run, uninterrupted)


@pytest.mark.slow
def test_terminated_and_resumed(workshop, long_config, uninterrupted):
    run = workshop.folder / "terminated"
    process = workshop.start(long_config, "--run_dir", run)
    wait_for_step(process, run, 7)
    process.terminate()
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    told = re.search(
        rf"stopped by SIGTERM after step (\d+) of {STEPS}, everything is saved; "
        rf"go on with: python -m jaxembed.train --resume {re.escape(str(run))}",
        err,
    )
    assert told
    step = int(told[1])
    assert rows_of(run)[-1]["step"] == step
    assert (run / "checkpoints" / told[1]).is_dir()
    process = workshop.start("--resume", run)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert f"steps {step + 1} to {STEPS}" in err
    assert_identical(run, uninterrupted)


@pytest.mark.slow
def test_a_full_disk_costs_no_earlier_checkpoint(workshop, long_config, uninterrupted):
    run = workshop.folder / "full"
    process = workshop.start(long_config, "--run_dir", run)
    first = run / "checkpoints" / "3" / "commit_success.txt"
    wait_until(process, first.exists)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    _, err = process.communicate(timeout=180)
    assert process.returncode == 1, err
    line = err.splitlines()[-1]
    told = re.match(r"error: could not save the checkpoint of step (\d+) in (\S+): .*too large", line)
    assert told, line
    assert told[2] == str(run / "checkpoints")
    assert "Traceback" not in err
    with TrainingCheckpoints(run / "checkpoints", keep=2) as checkpoints:
        kept = checkpoints.steps()
    assert 0 < len(kept) <= 2
    assert max(kept) < int(told[1])
    process = workshop.start("--resume", run)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert f"steps {max(kept) + 1} to {STEPS}" in err
    assert_identical(run, uninterrupted)
