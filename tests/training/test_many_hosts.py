"""Runs of several processes over loopback: as one device, stopped, killed, resumed on others, and refused."""

import json
import shutil
import signal
import socket

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxembed import Embedder

from runs import SHAPE, Processes, Workshop, make_rows, rows_of, write_jsonl

pytestmark = pytest.mark.slow

STEPS, LONG = 20, 60
HOST = socket.gethostname()
PROBES = [text for row in make_rows(20, seed=3) for text in row.values()]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    workshop = Workshop(tmp_path_factory.mktemp("workshop"))
    source = {**workshop.values["data"]["train"][0], "negatives": ["hard"]}
    workshop.values["data"] = {**workshop.values["data"], "train": [source]}
    for name, steps in (("short", STEPS), ("long", LONG)):
        workshop.write_config(
            name,
            training={"batch_size": 8, "steps": steps},
            checkpoint={"every_steps": 4, "keep": 3},
            compile_cache=None,
        )
    return workshop


@pytest.fixture(scope="module")
def finished(workshop):
    """A function that runs a config to its end and gives the run's directory; once for each name."""
    done = {}

    def run(name, config, count, devices, *overrides):
        if name not in done:
            done[name] = workshop.folder / name
            arguments = (workshop.folder / f"{config}.yaml", "--run_dir", done[name], *overrides)
            end(Processes(count, devices, *arguments))
        return done[name]

    return run


def end(processes):
    assert processes.wait() == [0] * len(processes.processes), "\n".join(processes.errors)
    return processes.errors


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def losses(run):
    return [row["train/loss"] for row in rows_of(run) if "train/loss" in row]


def assert_equal(run, reference, base):
    """The design's rule for another mesh: losses, embeddings, and how far each weight moved."""
    np.testing.assert_allclose(losses(run), losses(reference), rtol=0, atol=1e-5)
    first, second = (
        Embedder.from_pretrained(each / "model", dtype="float32").encode(PROBES) for each in (run, reference)
    )
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5)
    before, found, expected = load_file(base / "model.safetensors"), weights(run), weights(reference)
    for name, value in expected.items():
        moved, difference = value - before[name], found[name] - value
        if name.endswith("query_key_value.bias"):  # the gradient of a key's bias is zero but for rounding
            moved, difference = (x.reshape(SHAPE.heads, 3, -1)[:, [0, 2]] for x in (moved, difference))
        assert np.linalg.norm(difference) <= 1e-4 * np.linalg.norm(moved), name
    moved = [name for name, value in expected.items() if not np.array_equal(value, before[name])]
    assert len(moved) > 5


def assert_identical(run, reference):
    found, expected = weights(run), weights(reference)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name
    assert losses(run) == losses(reference)


@pytest.mark.parametrize("trainable", ["full", "bitfit"])
@pytest.mark.parametrize("fsdp", [1, 4])
def test_two_processes_equal_one_device(workshop, finished, trainable, fsdp):
    option = ("--training.trainable", trainable)
    one = finished(f"one {trainable}", "short", 1, 1, *option)
    two = finished(f"two {trainable} {fsdp}", "short", 2, 4, *option, "--mesh.fsdp", fsdp)
    assert_equal(two, one, workshop.base)


def test_parts_evaluation_and_verified_export(workshop, finished):
    dev = write_jsonl(workshop.folder / "dev.jsonl", make_rows(20, seed=2))
    sections = {
        "training": {
            "batch_size": 8,
            "steps": STEPS,
            "trainable": "lora",
            "lora": {"rank": 2},
            "train_tokens": ["</s>"],
        },
        "data": {**workshop.values["data"], "dev": [{"kind": "jsonl", "name": "held-out", "path": str(dev)}]},
        "evaluation": {"every_steps": 8, "searches": ["parse a date"]},
        "export": {"verify": "auto"},
    }
    workshop.write_config("parts", **sections)
    one = finished("one lora", "parts", 1, 1)
    two = finished("two lora", "parts", 2, 4, "--mesh.fsdp", 8)
    np.testing.assert_allclose(losses(two), losses(one), rtol=0, atol=1e-5)
    evaluated = [[row for row in rows_of(run) if "dev/held-out/loss" in row] for run in (one, two)]
    assert [row["step"] for row in evaluated[1]] == [0, 8, 16, STEPS]
    for first, second in zip(*evaluated):
        assert second == pytest.approx(first, abs=1e-5)
    for name in ("model", "adapter"):
        first, second = (Embedder.from_pretrained(run / name, dtype="float32").encode(PROBES) for run in (one, two))
        np.testing.assert_allclose(first, second, rtol=0, atol=1e-5)


def test_stopped_killed_and_resumed_on_other_hosts(workshop, finished):
    undisturbed = finished("undisturbed", "long", 2, 4)
    run = workshop.folder / "disturbed"

    processes = Processes(2, 4, workshop.folder / "long.yaml", "--run_dir", run)
    processes.wait_for_step(run, 6)
    processes.processes[1].send_signal(signal.SIGTERM)
    errors = end(processes)
    stopped = max(int(path.name) for path in (run / "checkpoints").iterdir())
    assert all(f"stopped by SIGTERM after step {stopped} of {LONG}, everything is saved" in error for error in errors)
    assert rows_of(run)[-1]["step"] == stopped
    assert not (run / "model").exists()

    processes = Processes(2, 4, "--resume", run)
    processes.wait_for_step(run, stopped + 6)
    processes.processes[1].kill()
    assert processes.wait(60) == [1, -signal.SIGKILL]
    assert f"error: process 1 (host {HOST}) is gone: it was killed, or its machine is down" in processes.errors[0]

    processes = Processes(2, 4, "--resume", run)
    processes.wait_for_step(run, stopped + 16)
    for process in processes.processes:
        process.kill()
    assert processes.wait() == [-signal.SIGKILL] * 2
    assert not (run / "model").exists()

    elsewhere = shutil.copytree(run, workshop.folder / "elsewhere")
    end(Processes(2, 4, "--resume", run))
    assert_identical(run, undisturbed)

    alone = Processes(1, 1, "--resume", elsewhere)
    alone.wait_for_step(elsewhere, stopped + 20)
    alone.processes[0].send_signal(signal.SIGTERM)
    [error] = end(alone)
    assert "everything is saved" in error
    errors = end(Processes(4, 2, "--resume", elsewhere))
    assert "(data 8 × fsdp 1 × tensor 1, 4 processes)" in errors[0]
    assert_equal(elsewhere, undisturbed, workshop.base)


def test_process_0_is_killed(workshop):
    run = workshop.folder / "headless"
    processes = Processes(2, 1, workshop.folder / "long.yaml", "--run_dir", run)
    processes.wait_for_step(run, 2)
    processes.processes[0].kill()
    assert processes.wait(60) == [-signal.SIGKILL, 1]
    assert f"error: process 0 (host {HOST}) is gone" in processes.errors[1]


@pytest.fixture
def homes(workshop, tmp_path):
    """Working directories of two processes, which read `data.jsonl` there."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        shutil.copy(workshop.data, folder / "data.jsonl")
    return folders


def refused(workshop, homes, *overrides):
    data = ("--data.train.0.path", "data.jsonl")
    processes = Processes(2, 1, workshop.folder / "short.yaml", *data, *overrides, folders=homes)
    assert processes.wait() == [2, 2], processes.errors
    return [error.splitlines()[-1] for error in processes.errors]


def test_a_host_with_other_data_is_named(workshop, homes, tmp_path):
    rows = make_rows(48)
    rows[5]["hard"] = "another text"
    write_jsonl(homes[1] / "data.jsonl", rows)
    for error in refused(workshop, homes, "--run_dir", tmp_path / "run"):
        assert f"the training data differs between hosts: process 1 (host {HOST}) has token cache 1 " in error


def test_a_host_without_data_is_named(workshop, homes, tmp_path):
    (homes[1] / "data.jsonl").unlink()
    errors = refused(workshop, homes, "--run_dir", tmp_path / "run")
    assert errors[0] == f"error: process 1 (host {HOST}): data.jsonl: no such file (data source 'a')"
    assert errors[1] == "error: data.jsonl: no such file (data source 'a')"


def test_run_directories_that_are_not_shared(workshop, homes):
    for error in refused(workshop, homes, "--run_dir", "run"):
        assert error.startswith("error: run_dir: run has to be one place for all processes")
        assert error.endswith(f"is not seen by process 1 (host {HOST})")


def test_a_process_that_does_not_come(workshop, tmp_path):
    address = ("--distributed.coordinator", "localhost:1", "--distributed.num_processes", 2)
    alone = ("--distributed.process_id", 1, "--distributed.timeout", 1, "--run_dir", tmp_path / "run")
    processes = Processes(1, 1, workshop.folder / "short.yaml", *address, *alone)
    assert processes.wait(60) == [2]
    assert (
        "error: process 0 of 2 did not turn up at localhost:1 within 1 s (distributed.timeout)" in processes.errors[0]
    )


def test_the_run_says_how_many_processes_it_had(finished):
    run = finished("two full 1", "short", 2, 4, "--training.trainable", "full", "--mesh.fsdp", 1)
    assert json.loads((run / "run.json").read_text())["processes"] == 2
    assert "num_processes: null" in (run / "config.yaml").read_text()
