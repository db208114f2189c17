"""Stores of arrays: what was written is read, on the host and onto devices, and damage is told by the array's name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from jaxembed.checkpoint import stores
from jaxembed.checkpoint.buffers import Buffers
from jaxembed.checkpoint.orbax import write_store
from jaxembed.checkpoint.stores import read_store, read_to_host, store_contents
from jaxembed.errors import InputError
from jaxembed.sharding import make_mesh

from checkpoints import truncate_files


def example_arrays():
    random = np.random.default_rng(0)
    return {
        ("table",): jnp.asarray(random.standard_normal((40, 8)), jnp.bfloat16),
        **{("layers", str(layer), "kernel"): jnp.asarray(random.standard_normal((8, 4))) for layer in range(11)},
        ("norm", "scale"): jnp.arange(5, dtype=jnp.float16),
        ("lm_head.weight",): jnp.ones((3, 3)),
    }


@pytest.mark.parametrize("group", [1, 300, 1 << 20])
def test_a_store_gives_back_what_was_written(tmp_path, monkeypatch, group):
    monkeypatch.setattr(stores, "_GROUP_BYTES", group)
    arrays, written = example_arrays(), []
    write_store(tmp_path / "store", iter(arrays.items()), written.append)
    assert written == list(arrays)
    contents = store_contents(tmp_path / "store")
    assert contents == {
        ".".join(path): jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in arrays.items()
    }
    some = dict(list(reversed(arrays.items()))[::2])
    device = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    wanted = {path: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device) for path, a in some.items()}
    on_device = list(read_store(tmp_path / "store", wanted))
    on_host = [(path, array.copy()) for path, array in read_to_host(tmp_path / "store", wanted, Buffers())]
    for found in (on_device, on_host):
        assert [path for path, _ in found] == list(some)
        for path, array in found:
            assert array.dtype == some[path].dtype
            assert np.asarray(array).tobytes() == np.asarray(some[path]).tobytes()
    assert all(array.devices() == {jax.devices()[3]} for _, array in on_device)


def test_each_device_reads_its_own_part_of_a_store(tmp_path):
    array = jnp.arange(64.0).reshape(16, 4)
    write_store(tmp_path / "store", [(("a", "b"), array)])
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("fsdp", None))
    [(_, found)] = read_store(
        tmp_path / "store", {("a", "b"): jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)}
    )
    assert found.sharding.is_equivalent_to(sharding, 2)
    assert {shard.data.shape for shard in found.addressable_shards} == {(2, 4)}
    np.testing.assert_array_equal(found, array)


def test_a_store_that_is_none(tmp_path):
    wanted = {("a",): jax.ShapeDtypeStruct((4,), jnp.float32)}
    with pytest.raises(InputError, match="nowhere: not a readable Orbax checkpoint"):
        store_contents(tmp_path / "nowhere")
    write_store(tmp_path / "store", [(("a",), jnp.ones(4))])
    with pytest.raises(InputError, match=r"store: b/c cannot be read"):
        list(read_to_host(tmp_path / "store", {("b", "c"): wanted["a",]}, Buffers()))
    truncate_files(tmp_path / "store")
    with pytest.raises(InputError, match="store"):
        store_contents(tmp_path / "store")
    with pytest.raises(InputError, match="a cannot be read"):
        list(read_to_host(tmp_path / "store", wanted, Buffers()))


def test_a_part_that_several_devices_hold(tmp_path):
    array = jnp.arange(64.0).reshape(4, 16)
    write_store(tmp_path / "store", [(("a",), array), (("step",), jnp.int32(7))])
    mesh = make_mesh(2, 4, 1)
    split, whole = jax.NamedSharding(mesh, jax.P(None, "fsdp")), jax.NamedSharding(mesh, jax.P())
    wanted = {
        ("a",): jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=split),
        ("step",): jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    }
    found = dict(read_store(tmp_path / "store", wanted))
    assert found["a",].sharding == split
    np.testing.assert_array_equal(found["a",], array)
    assert found["step",].sharding == whole
    assert found["step",] == 7


def test_a_part_that_is_missing_is_no_zeros(tmp_path):
    write_store(tmp_path / "store", [(("a",), jnp.ones(4)), (("b",), jnp.ones(4))])
    files = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/store/state/"}).result()
    for key in files.list().result():
        if key.startswith(b"b/c"):
            files.delete_range(tensorstore.KvStore.KeyRange(key, key + b"\0")).result()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {(name,): jax.ShapeDtypeStruct((4,), jnp.float32, sharding=device) for name in "ab"}
    assert set(store_contents(tmp_path / "store")) == {"a", "b"}
    for read in (read_store, lambda *given: read_to_host(*given, Buffers())):
        with pytest.raises(InputError, match="store: b cannot be read"):
            list(read(tmp_path / "store", wanted))
