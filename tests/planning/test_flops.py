"""FLOPs of traced programs and of formulas, against counting by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask
from jax.sharding import PartitionSpec

from jaxembed.models.bloom import Bloom, BloomConfig
from jaxembed.ops.attention import BLOCK
from jaxembed.planning.flops import traced_flops, useful_flops
from jaxembed.sharding import make_mesh


def of(function, *shapes: tuple[int, ...]) -> float:
    return traced_flops(jax.jit(function).trace(*(jnp.zeros(shape) for shape in shapes)).jaxpr.jaxpr).total


def test_a_product_counts_twice_its_terms() -> None:
    assert of(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == 4 * 2 * 3 * 5 * 7


def test_loops_count_as_often_as_they_run() -> None:
    def twice_nested(a):
        return jax.lax.map(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=3)[0], a)

    assert of(twice_nested, (5, 4, 4)) == 5 * 3 * 2 * 4**3


def test_what_is_computed_again_counts_again() -> None:
    def loss(a, b, c):
        return jnp.tanh(jnp.tanh(a @ b) @ c).sum()

    plain = of(jax.grad(loss, argnums=(0, 1, 2)), (4, 4), (4, 4), (4, 4))
    again = of(jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2)), (4, 4), (4, 4), (4, 4))
    assert plain == 6 * 2 * 4**3
    assert again == 8 * 2 * 4**3


def test_a_shard_map_counts_once_a_device() -> None:
    mesh = make_mesh(data=4, fsdp=2)
    rows, whole = PartitionSpec(("data", "fsdp")), PartitionSpec()
    product = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    assert of(product, (16, 5), (5, 7)) == 2 * 16 * 5 * 7


@pytest.mark.parametrize("block", [128, 256])
def test_splash_attention_by_formula(block: int) -> None:
    """Over the blocks of a causal mask that are computed: forward two products, backward seven."""
    heads, length, wide, value, rows = 2, 512, 70, 64, 3
    sizes = kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip

    def loss(q, k, v, segments):
        run = kernel.make_splash_mha_single_device(
            mask.MultiHeadMask([mask.CausalMask((length, length))] * heads), block_sizes=sizes
        )
        return jax.vmap(run)(q, k, v, kernel.SegmentIds(segments, segments)).astype(jnp.float32).sum()

    def array(width: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, heads, length, width), jnp.bfloat16)

    segments = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    arguments = array(wide), array(wide), array(value), segments
    blocks = sum(column <= row for row in range(length // block) for column in range(length // block))
    pairs = rows * heads * blocks * block**2
    forward = 2 * pairs * (wide + value)
    backward = 2 * pairs * ((2 * wide + value) + (2 * wide + 2 * value))
    assert traced_flops(jax.jit(loss).trace(*arguments).jaxpr.jaxpr).kernels == forward
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    assert traced_flops(gradient.trace(*arguments).jaxpr.jaxpr).kernels == forward + backward


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_useful_is_what_one_full_text_a_row_costs(pooling: str) -> None:
    """Rows without padding, forward: the traced encoder computes what the formula says and masked halves of blocks."""
    shape = BloomConfig(vocab_size=64, dim=64, layers=3, heads=2)
    model = jax.eval_shape(lambda key: Bloom(key, shape), jax.random.key(0))
    rows, length = 4, 256
    tokens = jnp.zeros((rows, length), jnp.int32)
    last = jnp.full((rows, 1), length - 1) if pooling == "last" else None

    def encode(model):
        return model.states(tokens, tokens + 1, last)

    traced = traced_flops(jax.make_jaxpr(encode)(model).jaxpr).total
    found = useful_flops(shape, rows * length, rows * length**2, rows, "none", pooling)
    blocks = length // BLOCK
    assert traced == pytest.approx(found.layers + found.attention * (blocks + 1) / blocks, rel=0.01)


def test_useful_by_what_trains() -> None:
    shape = BloomConfig(vocab_size=64, dim=64, layers=4, heads=2)
    tokens, texts = 1000.0, 10.0
    squares = texts * 100.0**2

    def layers(trainable: str, **options: int) -> float:
        return useful_flops(shape, tokens, squares, texts, trainable, "last", **options).layers

    forward = layers("none")
    assert layers("full") == 3 * forward
    assert layers("bitfit") == layers("lora") == 2 * forward
    assert layers("last_layers", upper_layers=4) == 3 * forward
    assert layers("last_layers", upper_layers=1) == 1.5 * forward
    both_ways = dataclasses.replace(shape, causal=False)
    causal = useful_flops(shape, tokens, squares, texts, "none", "mean").attention
    assert useful_flops(both_ways, tokens, squares, texts, "none", "mean").attention == 2 * causal
    assert np.isclose(useful_flops(shape, tokens, squares, 30, "full", "last", queries=10).loss, 3 * 2 * 10 * 20 * 64)
