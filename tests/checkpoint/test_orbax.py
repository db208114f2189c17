"""Training checkpoints: what comes back is what was saved, and nothing that goes wrong costs an earlier checkpoint."""

import logging
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxembed.checkpoint.orbax import (
    CheckpointError,
    TrainingCheckpoints,
    leaf_names,
    newest_checkpoint,
    write_store,
)
from jaxembed.errors import InputError

from checkpoints import truncate_files

INFO = {"plan": "ab12", "config": "cd34", "base": {"path": "models/x", "hash": None}, "step": 3}


def make_state(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "layers": {"qkv.bias": jax.random.normal(keys[0], (4, 24)), "w/o:[k]": jax.random.normal(keys[1], (3,))},
        "half": jax.random.normal(keys[2], (5, 2), jnp.bfloat16),
        "no layers": jnp.zeros((0, 7)),
    }
    adamw = optax.adamw(1e-3)
    _, optimizer = adamw.update(params, adamw.init(params), params)
    return {"params": params, "optimizer": optimizer, "step": jnp.int32(seed)}


def like(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def assert_identical(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for name, leaf in leaf_names(expected).items():
        other = leaf_names(found)[name]
        assert other.dtype == leaf.dtype
        assert other.shape == leaf.shape
        assert np.asarray(other).tobytes() == np.asarray(leaf).tobytes(), name


def in_subprocess(code, *arguments, **environment):
    """Runs code after the imports that it needs; its exit status and what it wrote."""
    prelude = """
        import os, resource, signal, sys, time
        import jax, jax.numpy as jnp, numpy as np
        from jaxembed.checkpoint.orbax import CheckpointError, TrainingCheckpoints
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        timeout=120,
    )


def test_restores_the_same_bits(tmp_path):
    state = make_state(3)
    with TrainingCheckpoints(tmp_path / "new" / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.restore_latest(like(state)) is None
        checkpoints.save(3, state, INFO)
    with TrainingCheckpoints(tmp_path / "new" / "checkpoints", keep=2) as checkpoints:
        restored = checkpoints.restore_latest(like(state))
    assert restored is not None
    step, found, info = restored
    assert (step, info) == (3, INFO)
    assert_identical(found, state)


def test_saves_what_the_state_was_though_its_buffers_are_donated(tmp_path):
    advance = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2 + 1, tree), donate_argnums=0)
    state = {"a": jnp.arange(3_000_000, dtype=jnp.float32), "b": jnp.ones((1000, 1000))}
    expected = jax.tree.map(np.array, state)
    with TrainingCheckpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(3):
            state = advance(state)
        restored = checkpoints.restore_latest(like(state))
    assert restored is not None
    assert_identical(restored[1], expected)


def test_keeps_the_newest(tmp_path):
    with TrainingCheckpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 10, 30):
            checkpoints.save(step, make_state(step), INFO)
            checkpoints.save(step, make_state(step), INFO)
        checkpoints.wait()
        assert checkpoints.steps() == [10, 30]
        with pytest.raises(InputError, match=r"step 20.*step 30"):
            checkpoints.save(20, make_state(20), INFO)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "30"]


def test_a_step_can_be_taken_back_unless_it_is_the_last_one_left(tmp_path):
    with TrainingCheckpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), INFO)
        assert not checkpoints.discard(3)
        assert checkpoints.discard(2)
        assert checkpoints.steps() == [1]
        assert not checkpoints.discard(1)
        restored = checkpoints.restore_latest(like(make_state()))
    assert restored is not None
    assert_identical(restored[1], make_state(1))
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_the_check_sees_the_record_and_its_error_comes_out(tmp_path):
    state = make_state()

    def refuse(info):
        raise InputError(f"plan {info['plan']} is not ef56")

    with TrainingCheckpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state, INFO)
        with pytest.raises(InputError, match="plan ab12 is not ef56"):
            checkpoints.restore_latest(like(state), refuse)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"more": jnp.zeros(3)}, "missing there .'more'"),
        (lambda state: {"params": state["params"], "step": state["step"]}, "not expected .'optimizer.0.count'"),
        (lambda state: state | {"step": jnp.zeros(3, jnp.int32)}, r"step as int32\[\], expected int32\[3\]"),
        (lambda state: state | {"step": jnp.float32(0)}, r"step as int32\[\], expected float32\[\]"),
    ],
)
def test_another_structure_is_an_error_that_names_the_leaf(tmp_path, change, message):
    state = make_state()
    with TrainingCheckpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state, INFO)
        with pytest.raises(InputError, match=message):
            checkpoints.restore_latest(like(change(state)))


def test_names_tell_every_path_apart():
    tree = {"a.b": 1, "a": {"b": 2}, "a%2Eb": 3, "c/d": (4, 5), "é [0]": 6}
    names = leaf_names(tree)
    assert sorted(names.values()) == [1, 2, 3, 4, 5, 6]
    assert all(set(name) <= set("abcdefABCDEF0123456789%.") for name in names)
    with pytest.raises(InputError, match=r"checkpoint\.keep"):
        TrainingCheckpoints("unused", keep=0)


def test_an_unreadable_newest_gives_way_to_the_one_before(tmp_path, caplog):
    with TrainingCheckpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), INFO)
    truncate_files(tmp_path / "2" / "state")
    with TrainingCheckpoints(tmp_path, keep=1) as checkpoints:
        with caplog.at_level(logging.WARNING):
            restored = checkpoints.restore_latest(like(make_state()))
        assert restored is not None
        assert restored[0] == 1
        assert_identical(restored[1], make_state(1))
        assert str(tmp_path) in caplog.text
        assert "step 2" in caplog.text
        # The unreadable one neither blocks its step nor counts among those that are kept.
        checkpoints.save(2, make_state(5), INFO)
        again = checkpoints.restore_latest(like(make_state()))
    assert again is not None
    assert_identical(again[1], make_state(5))


def test_an_unreadable_newest_does_not_crowd_out_readable_ones(tmp_path):
    with TrainingCheckpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 5):
            checkpoints.save(step, make_state(step), INFO)
    truncate_files(tmp_path / "5")
    with TrainingCheckpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.restore_latest(like(make_state()))
        checkpoints.save(2, make_state(2), INFO)
        restored = checkpoints.restore_latest(like(make_state()))
    assert restored is not None
    assert restored[0] == 2


def test_nothing_readable_is_an_error(tmp_path):
    with TrainingCheckpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(7, make_state(), INFO)
        checkpoints.wait()
        truncate_files(tmp_path / "7")
        with pytest.raises(CheckpointError, match=r"none .*step 7"):
            checkpoints.restore_latest(like(make_state()))


def test_killed_in_the_midst_of_a_save(tmp_path):
    done = in_subprocess(
        """
        from pathlib import Path
        import threading
        directory = Path(sys.argv[1])
        def kill_when_it_has_begun():
            while not any(path.is_file() for path in directory.glob("2.*/**/*")):
                time.sleep(0.0005)
            os.kill(os.getpid(), signal.SIGKILL)
        checkpoints = TrainingCheckpoints(directory, keep=1)
        checkpoints.save(1, {"w": jnp.arange(8.0)}, {"step": 1})
        checkpoints.wait()
        threading.Thread(target=kill_when_it_has_begun).start()
        noise = jnp.asarray(np.random.default_rng(0).standard_normal(20_000_000, np.float32))
        checkpoints.save(2, {"w": noise}, {"step": 2})
        checkpoints.wait()
        """,
        tmp_path,
    )
    assert done.returncode == -9, done.stderr
    assert any(path.name.startswith("2.") for path in tmp_path.iterdir())
    state = {"w": jnp.arange(8.0)}
    with TrainingCheckpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == [1]
        restored = checkpoints.restore_latest(like(state))
        assert restored is not None
        assert_identical(restored[1], state)
        checkpoints.save(2, state, {})
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_full_disk(tmp_path):
    done = in_subprocess(
        """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        checkpoints = TrainingCheckpoints(sys.argv[1], keep=1)
        checkpoints.save(1, {"w": jnp.arange(8.0)}, {"step": 1})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
        noise = jnp.asarray(np.random.default_rng(0).standard_normal(3_000_000, np.float32))
        for _ in range(2):
            try:
                checkpoints.save(2, {"w": noise}, {"step": 2})
                checkpoints.wait()
            except CheckpointError as error:
                print(error)
        like = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=noise.sharding)}
        print(checkpoints.restore_latest(like)[0], checkpoints.steps(), os.listdir(sys.argv[1]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with checkpoints:
            checkpoints.save(2, {"w": noise}, {"step": 2})
        print(checkpoints.steps())
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    first, second, restored, last = done.stdout.splitlines()
    for line in (first, second):
        assert f"step 2 in {tmp_path}" in line
        assert "too large" in line
        assert "steps [1]" in line
    assert restored == "1 [1] ['1']"
    assert last == "[2]"


def test_restores_onto_another_mesh(tmp_path):
    expected = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    with TrainingCheckpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"w": jnp.asarray(expected), "step": jnp.int32(1)}, {})
    code = """
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
        first, second = NamedSharding(mesh, P("fsdp", None)), NamedSharding(mesh, P("data", "fsdp"))
        whole = NamedSharding(mesh, P())
        def like(sharding):
            return {"w": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=sharding),
                    "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)}
        with TrainingCheckpoints(sys.argv[1], keep=1) as checkpoints:
            _, state, _ = checkpoints.restore_latest(like(first))
            assert state["w"].sharding.is_equivalent_to(first, 2)
            checkpoints.save(2, state, {})
            _, state, _ = checkpoints.restore_latest(like(second))
            assert state["w"].sharding.is_equivalent_to(second, 2)
        np.save(sys.argv[2], np.asarray(state["w"]))
    """
    found = tmp_path / "found.npy"
    done = in_subprocess(code, tmp_path, found, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(found), expected)
    with TrainingCheckpoints(tmp_path, keep=1) as checkpoints:
        restored = checkpoints.restore_latest(like({"w": jnp.asarray(expected), "step": jnp.int32(1)}))
    assert restored is not None
    np.testing.assert_array_equal(np.asarray(restored[1]["w"]), expected)


def test_a_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not write"):
        write_store(tmp_path / "file" / "store", [(("a",), jnp.ones(4))])


def test_the_newest_checkpoint_that_can_be_read(tmp_path, caplog):
    with pytest.raises(InputError, match=r"no checkpoint that can be read$"):
        newest_checkpoint(tmp_path)
    with TrainingCheckpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 10):
            checkpoints.save(step, {"w": jnp.full(4, float(step))}, {"step": step})
    path, info = newest_checkpoint(tmp_path)
    assert (path.name, info) == ("10", {"step": 10})
    truncate_files(tmp_path / "10")
    path, info = newest_checkpoint(tmp_path)
    assert (path.name, info) == ("2", {"step": 2})
    assert "unreadable" in caplog.text
    for step in (1, 2):
        truncate_files(tmp_path / str(step))
    with pytest.raises(InputError, match=r"no checkpoint that can be read; .*10.*2.*1"):
        newest_checkpoint(tmp_path)
