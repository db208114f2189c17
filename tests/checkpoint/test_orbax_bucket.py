"""Checkpoints and a whole run in a bucket: TensorStore writes to a local stand-in for its HTTP interface."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from jaxembed import train
from jaxembed.__main__ import run_command
from jaxembed.checkpoint.directories import download
from jaxembed.checkpoint.orbax import COMMIT_MARKER, TrainingCheckpoints
from jaxembed.sharding import make_mesh

from buckets import Bucket, served
from runs import Workshop

RUN = epath.Path("gs://bucket/runs/one")


@pytest.fixture
def requests(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    with served(monkeypatch) as found:
        yield found


def state_of(step: int) -> dict[str, jax.Array]:
    split = jax.NamedSharding(make_mesh(1, 8, 1), jax.P(None, "fsdp"))
    return {"kernel": jax.device_put(jnp.arange(64.0).reshape(4, 16) * step, split), "step": jnp.int32(step)}


def test_checkpoints(requests: list[str]) -> None:
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state_of(1))
    with TrainingCheckpoints(RUN / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, state_of(step), {"plan": step})
    assert any(request.startswith("POST") for request in requests)
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
    data = [path for path, file in Bucket.store.items() if "/5/state/" in path and "manifest" in path]
    for path in data:
        Bucket.store[path].truncate(10)
    with TrainingCheckpoints(RUN / "checkpoints", keep=2) as checkpoints:
        found = checkpoints.restore_latest(like)
        assert found is not None
        assert found[0] == 3


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_run_is_what_it_is_on_a_disk_also_when_it_is_resumed(requests: list[str], tmp_path: Path) -> None:
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
