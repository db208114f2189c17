"""Checkpoints and whole runs in a bucket, of one process and of two: gcsfs and TensorStore speak to a stand-in."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from jaxembed import Embedder, train
from jaxembed.__main__ import run_command
from jaxembed.checkpoint.directories import download
from jaxembed.checkpoint.orbax import TrainingCheckpoints
from jaxembed.checkpoint.stores import COMMIT_MARKER
from jaxembed.sharding import make_mesh

from buckets import Service, served
from runs import Processes, Workshop, on_two_processes, rows_of

RUN = epath.Path("gs://bucket/runs/one")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    with served(monkeypatch) as found:
        yield found


def state_of(step: int) -> dict[str, jax.Array]:
    split = jax.NamedSharding(make_mesh(1, 8, 1), jax.P(None, "fsdp"))
    return {"kernel": jax.device_put(jnp.arange(64.0).reshape(4, 16) * step, split), "step": jnp.int32(step)}


def test_what_others_write_is_seen_at_once(service: Service) -> None:
    folder = RUN / "checkpoints"
    with TrainingCheckpoints(folder, keep=2) as checkpoints:
        assert checkpoints.steps() == []
        (folder / "1" / "a").write_text("a")
        assert [path.name for path in folder.iterdir()] == ["1"]
        for name in ("1/b", f"2/{COMMIT_MARKER}"):
            service.put(f"bucket/runs/one/checkpoints/{name}", b"b")
        assert (folder / "1" / "b").exists()
        assert checkpoints.steps() == [2]


def test_checkpoints(service: Service) -> None:
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state_of(1))
    with TrainingCheckpoints(RUN / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, state_of(step), {"plan": step})
    assert any("uploadType=media" in request for request in service.requests)  # TensorStore's
    with TrainingCheckpoints(RUN / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.steps() == [3, 4]
        found = checkpoints.restore_latest(like)
        assert found is not None
        step, state, info = found
        assert (step, info) == (4, {"plan": 4})
        np.testing.assert_array_equal(state["kernel"], state_of(4)["kernel"])
        assert state["kernel"].sharding == like["kernel"].sharding
        # Of a save that was killed, and of a deletion.
        (RUN / "checkpoints" / "4" / COMMIT_MARKER).unlink()
        assert checkpoints.steps() == [3]
        checkpoints.save(5, state_of(5), {"plan": 5})
    assert sorted(path.name for path in (RUN / "checkpoints").iterdir()) == ["3", "5"]
    for path in service.under("bucket/runs/one/checkpoints/5/state/"):
        if "manifest" in path:
            service.put(path, service.objects[path][:10])
    with TrainingCheckpoints(RUN / "checkpoints", keep=2) as checkpoints:
        found = checkpoints.restore_latest(like)
        assert found is not None
        assert found[0] == 3


@pytest.mark.parametrize("damaged", ["manifest", "/d/"])
def test_of_a_damaged_checkpoint_there_is_one_line(
    service: Service, caplog: pytest.LogCaptureFixture, damaged: str
) -> None:
    sharding = jax.NamedSharding(make_mesh(1, 8, 1), jax.P("fsdp"))
    state = {f"kernel{number}": jax.device_put(jnp.ones((64, 1024)), sharding) for number in range(6)}
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    with TrainingCheckpoints(RUN, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {})
    for path in service.under("bucket/runs/one/2/state/"):
        if damaged in path:
            service.put(path, service.objects[path][: len(service.objects[path]) // 2])
    service.delay = 0.05
    for _ in range(3):
        with TrainingCheckpoints(RUN, keep=2) as checkpoints:
            found = checkpoints.restore_latest(like)
        assert found is not None
        assert found[0] == 1
    warnings = [record.getMessage() for record in caplog.records if not record.name.startswith(("gcsfs", "google"))]
    assert len(warnings) == 3
    assert all(
        line.startswith("skipped an unreadable checkpoint in gs://bucket/runs/one, step 2: ") for line in warnings
    )


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_run_is_what_it_is_on_a_disk_also_when_it_is_resumed(service: Service, tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    config = workshop.write_config(
        "lora",
        training={"batch_size": 8, "steps": 4, "trainable": "lora", "lora": {"rank": 2}},
        checkpoint={"every_steps": 2},
        compile_cache=None,
    )
    assert workshop.train("disk", config=config) == 0
    assert run_command(train.main, [str(config), "--run_dir", str(RUN)]) == 0

    def compare(name: str) -> None:
        download(RUN, tmp_path / name)
        for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
            expected = load_file(tmp_path / "disk" / file)
            for key, value in load_file(tmp_path / name / file).items():
                assert value.tobytes() == expected[key].tobytes(), key

    compare("first")
    (RUN / "model").rmtree()
    (RUN / "checkpoints" / "4").rmtree()
    assert run_command(train.main, ["--resume", str(RUN)]) == 0
    compare("second")


_PROCESS = """
import json, sys
import numpy as np
import jax, jax.numpy as jnp
from etils import epath

from jaxembed import hosts
from jaxembed.checkpoint.orbax import CheckpointError, TrainingCheckpoints
from jaxembed.checkpoint.stores import COMMIT_MARKER
from jaxembed.config import DistributedConfig
from jaxembed.sharding import make_mesh

process, port = int(sys.argv[1]), sys.argv[2]
hosts.initialize(DistributedConfig(coordinator=f"localhost:{port}", num_processes=2, process_id=process))
split = jax.NamedSharding(make_mesh(1, 8, 1), jax.P(None, "fsdp"))
directory = epath.Path("gs://bucket/runs/two/checkpoints")
found = []


def state_of(step):
    kernel = np.arange(65536, dtype=np.float32).reshape(64, 1024) * step
    whole = jax.NamedSharding(split.mesh, jax.P())
    return {"kernel": hosts.put(kernel, split), "step": hosts.put(np.int32(step), whole)}


def restored():
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state_of(1))
    with TrainingCheckpoints(directory, keep=2) as checkpoints:
        listed = checkpoints.steps()
        try:
            step, state, info = checkpoints.restore_latest(like)
        except CheckpointError as error:
            found.append((listed, str(error)))
            return
    expected = state_of(step)
    for name, array in state.items():
        for mine, other in zip(array.addressable_shards, expected[name].addressable_shards, strict=True):
            np.testing.assert_array_equal(mine.data, other.data)
    found.append((listed, step, info))


def on_first(change):
    hosts.barrier("before")
    if process == 0:
        change()
    hosts.barrier("after")


def cut(step, part):
    for path in (directory / str(step) / "state" / part).iterdir():
        data = path.read_bytes()
        if len(data) > 1000:
            path.write_bytes(data[: len(data) // 2])


with TrainingCheckpoints(directory, keep=2) as checkpoints:
    for step in (1, 2, 3, 4):
        checkpoints.save(step, state_of(step), {"plan": step})
restored()
on_first((directory / "4" / COMMIT_MARKER).unlink)  # of a save that was killed, and of a deletion
restored()
with TrainingCheckpoints(directory, keep=2) as checkpoints:
    checkpoints.save(5, state_of(5), {"plan": 5})
on_first(lambda: cut(5, "ocdbt.process_1/d"))
restored()
on_first(lambda: cut(3, "ocdbt.process_0/d"))
restored()
with TrainingCheckpoints(directory, keep=2) as checkpoints:
    for step in (6, 7):
        checkpoints.save(step, state_of(step), {"plan": step})
restored()
print(json.dumps(found), file=sys.stderr)
hosts.barrier("done")
"""


@pytest.mark.slow
def test_checkpoints_of_two_processes(service: Service) -> None:
    errors = on_two_processes(_PROCESS)
    for error in errors:
        whole, unmarked, cut, nothing, last = json.loads(error.splitlines()[-1])
        assert whole == [[3, 4], 4, {"plan": 4}]
        assert unmarked == [[3], 3, {"plan": 3}]
        assert cut == [[3, 5], 3, {"plan": 3}]
        assert nothing[0] == [3, 5]
        assert "none of the checkpoints in gs://bucket/runs/two/checkpoints can be read: step 5: " in nothing[1]
        assert last == [[6, 7], 7, {"plan": 7}]
    split = jax.NamedSharding(make_mesh(2, 2, 2), jax.P("tensor", "fsdp"))
    like = {
        "kernel": jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=split),
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.NamedSharding(split.mesh, jax.P())),
    }
    with TrainingCheckpoints("gs://bucket/runs/two/checkpoints", keep=2) as checkpoints:
        found = checkpoints.restore_latest(like)
    assert found is not None
    step, state, info = found
    assert (step, info) == (7, {"plan": 7})
    np.testing.assert_array_equal(state["kernel"], np.arange(65536.0).reshape(64, 1024) * 7)
    assert state["kernel"].sharding == split


@pytest.mark.slow
def test_a_run_of_two_processes_stopped_and_killed(service: Service, tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    config = workshop.write_config(
        training={"batch_size": 8, "steps": 40}, checkpoint={"every_steps": 4, "keep": 2}, compile_cache=None
    )
    options = ("--mesh.fsdp", 4)

    def wait_for(processes: Processes, step: int) -> None:
        marker = f"bucket/runs/two/checkpoints/{step}/{COMMIT_MARKER}"
        while marker not in service.objects:
            if any(process.poll() is not None for process in processes.processes):
                raise AssertionError(f"ended with {processes.wait()} too early: {processes.errors}")
            time.sleep(0.01)

    def end(processes: Processes) -> None:
        assert processes.wait() == [0, 0], "\n".join(processes.errors)

    undisturbed = tmp_path / "undisturbed"
    end(Processes(2, 4, config, "--run_dir", undisturbed, *options))

    run = "gs://bucket/runs/two"
    processes = Processes(2, 4, config, "--run_dir", run, *options)
    wait_for(processes, 4)
    processes.processes[1].send_signal(signal.SIGTERM)
    end(processes)
    stopped = max(int(path.split("/")[4]) for path in service.under("bucket/runs/two/checkpoints/"))
    assert 4 <= stopped < 40
    assert all(f"stopped by SIGTERM after step {stopped} of 40" in error for error in processes.errors)

    processes = Processes(2, 4, "--resume", run)
    wait_for(processes, 4 * (stopped // 4 + 2))
    for process in processes.processes:
        process.kill()
    assert processes.wait() == [-signal.SIGKILL] * 2
    assert not service.under("bucket/runs/two/model/")

    end(Processes(2, 4, "--resume", run))
    download(epath.Path(run), tmp_path / "back")
    weights, expected = (load_file(each / "model" / "model.safetensors") for each in (tmp_path / "back", undisturbed))
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert weights[name].tobytes() == value.tobytes(), name
    assert rows_of(tmp_path / "back")[-1]["step"] == 40
    texts = ["parse a date", "a dog"]
    first, second = (
        Embedder.from_pretrained(each / "model").encode(texts) for each in (tmp_path / "back", undisturbed)
    )
    np.testing.assert_array_equal(first, second)
