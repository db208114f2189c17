"""Attention kernels compiled ahead of time for chips that are not here: in a training step for TPU, alone for GPU."""

import contextlib
import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxembed.config import OptimizerConfig
from jaxembed.data.loader import RowLayout, TextTable, pack_batch
from jaxembed.models.bloom import BloomConfig
from jaxembed.ops.attention import attention, choose_kernel
from jaxembed.planning.program import abstract_batch, on_mesh, placed
from jaxembed.sharding import make_mesh
from jaxembed.training.filters import TRAINABLE
from jaxembed.training.objective import LossOptions
from jaxembed.training.step import TrainState, make_optimizer, make_step, state_shardings

from blooms import abstract_bloom

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # else the plugin refuses to load without CUDA itself

QUERIES, ROW, CHUNKS = 64, 256, 2

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800  clock_rate_ghz: 1.98  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What openxla/xla says of it in xla/backends/gpu/target_config/specs/h100_sxm.txtpb, as far as it is needed."""


def tpu_devices() -> list[Any]:
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    return list(topologies.get_topology_desc("v5e:2x4", "tpu").devices)


def gradient_text(devices: list[Any], kernel: str, head_dim: int, length: int, causal: bool, dtype: Any) -> str:
    """The compiled gradient of attention on one device."""
    mesh = Mesh(np.array(devices[:1]), ("data",))
    shape = partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))

    def loss(q: Any, k: Any, v: Any, segments: Any, slopes: Any) -> jax.Array:
        return attention(q, k, v, segments, slopes, causal=causal, kernel=kernel).astype(jnp.float32).sum()

    gradient: Any = jax.grad(loss, argnums=(0, 1, 2))
    gradient = jax.shard_map(gradient, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    tile = shape((2, length, 2, head_dim), dtype)
    arguments = (tile, tile, tile, shape((2, length), jnp.int32), shape((2,), jnp.float32))
    # From jax 0.11 on a Triton kernel is lowered for the device of the mesh in the context.
    older = jax.__version_info__ < (0, 11)
    with contextlib.nullcontext() if older else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(gradient).trace(*arguments).lower()
    return lowered.compile().as_text()


@pytest.mark.tpu
@pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 2, 2)])
def test_a_training_step_with_splash_compiles_for_tpu(sizes: tuple[int, int, int]) -> None:
    config = BloomConfig(vocab_size=512, dim=128, layers=2, heads=2)
    mesh = make_mesh(*sizes, devices=tpu_devices())
    chips = mesh.shape["data"] * mesh.shape["fsdp"]
    texts: Any = [np.zeros(length, np.int32) for length in np.random.default_rng(0).integers(20, 200, 2 * QUERIES)]
    lengths = np.array([len(text) for text in texts])
    table = TextTable((texts,), np.zeros(1, int), lengths, np.arange(len(texts), dtype=np.uint64))
    rows = -(-int(lengths.sum() * 1.3) // (ROW * chips * CHUNKS))
    layout = RowLayout(ROW, ROW // 8, rows, chips, (CHUNKS,), density=1.0)
    numbers = np.arange(2 * QUERIES).reshape(2, QUERIES).T
    batch = abstract_batch(pack_batch(table, numbers, np.zeros(QUERIES, int), layout), mesh)

    kernel = choose_kernel("auto", list(mesh.devices.flat), head_dim=config.head_dim, dtype=jnp.bfloat16)
    options = LossOptions(dtype=jnp.bfloat16, attention_kernel=kernel)
    graph, train, frozen = nnx.split(abstract_bloom(config), TRAINABLE["full"], ...)
    optimizer = make_optimizer(OptimizerConfig(), 10)
    step: Any = make_step(graph, train, frozen, optimizer, options, QUERIES, mesh)
    shardings = state_shardings(optimizer, train, mesh)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = placed(TrainState(train, jax.eval_shape(optimizer.init, train), count), shardings)
    text = step.lower(state, on_mesh(frozen, mesh), batch).compile().as_text()
    assert kernel == "splash"
    assert text.count("tpu_custom_call") >= 3  # forward, dq, dk and dv


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("head_dim", "length", "causal"), [(64, 200, False), (80, 640, True), (96, 520, True), (128, 1024, True)]
)
def test_splash_compiles_for_tpu(head_dim: int, length: int, causal: bool) -> None:
    text = gradient_text(tpu_devices(), "splash", head_dim, length, causal, jnp.bfloat16)
    assert text.count("tpu_custom_call") >= 3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("head_dim", "length"), [(64, 200), (80, 256), (96, 200), (128, 256), (256, 128)])
def test_flash_compiles_for_gpu(head_dim: int, length: int, dtype: Any) -> None:
    """Where JAX's CUDA plugin is installed: it needs no GPU for that."""
    pytest.importorskip("jax_cuda12_plugin")
    topology = topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=H100)
    text = gradient_text(list(topology.devices), "flash", head_dim, length, True, dtype)
    for name in ("attention_forward", "attention_query_gradient", "attention_key_gradient"):
        assert name in text
