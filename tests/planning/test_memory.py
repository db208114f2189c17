"""The memory formula: small programs by hand, and what a training step keeps."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxembed.planning.memory import array_bytes, peak_bytes, relaid_bytes, stored_bytes, table_in_rows
from jaxembed.sharding import make_mesh

MEBI = 2**20
SHAPE = (256, 1024)  # a mebibyte in float32


def peak(function, *shapes: tuple[int, ...]) -> float:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return peak_bytes(jax.make_jaxpr(function)(*arguments).jaxpr) / MEBI


def product(x: jax.Array) -> jax.Array:
    return x @ jnp.ones((1024, 1024))


def test_arrays_are_padded_to_tiles() -> None:
    assert array_bytes((256, 1024), 4) == MEBI
    assert array_bytes((64, 64, 300, 64), 4) == 64 * 64 * 384 * 64 * 4  # 300 to 384 is less than 64 to 128 …
    assert array_bytes((1024, 16, 64), 2) == 1024 * 16 * 64 * 2  # … and here the first dimension goes last
    assert array_bytes((3,), 4) == 12


def test_what_is_stored_is_what_a_device_holds_of_it_padded() -> None:
    mesh = make_mesh(1, 8, 1)

    def stored(shape: tuple[int, ...], *axes: str | None) -> int:
        sharding = jax.NamedSharding(mesh, jax.P(*axes))
        return stored_bytes({"one": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)})

    assert stored((8 * 256, 1024), "fsdp", None) == MEBI
    assert stored((2048, 8 * 160), None, "fsdp") == 2048 * 160 * 4  # rows go last: 2,048 of them need no padding
    assert stored((3, 8 * 160, 32, 80), None, "fsdp", None, None) == 3 * 160 * 32 * 128 * 4


def test_a_table_is_copied_where_it_does_not_lie_in_rows() -> None:
    def copied(width: int, optimizer: Any = None, frozen: bool = False) -> int:
        sharding = jax.NamedSharding(make_mesh(1, 8, 1), jax.P(None, "fsdp"))
        table = nnx.State({"table": jax.ShapeDtypeStruct((2048, 8 * width), jnp.float32, sharding=sharding)})
        trainable, frozen_state = (nnx.State({}), table) if frozen else (table, nnx.State({}))
        program: Any = SimpleNamespace(trainable=trainable, frozen=frozen_state, optimizer=optimizer)
        return table_in_rows(program)

    assert copied(128, optimizer={}) == copied(256, frozen=True) == 0
    assert copied(160) == copied(160, frozen=True) == 2048 * 256 * 4
    assert copied(160, optimizer={}) == 2048 * (256 + 256 - 160) * 4  # and the gradient in place of the one counted


def test_what_is_fused_is_not_counted() -> None:
    assert peak(lambda x: jnp.tanh(x * 2 + 1).sum(), SHAPE) < 0.01


def test_a_value_lives_until_it_is_last_used() -> None:
    def chain(x):
        a = jnp.sort(x)
        b = jnp.sort(a)  # a ends here
        return jnp.sort(b).sum()

    assert peak(chain, SHAPE) == pytest.approx(2, abs=0.01)

    def kept(x):
        a = jnp.sort(x)
        return (jnp.sort(jnp.sort(a)) + a).sum()

    assert peak(kept, SHAPE) == pytest.approx(3, abs=0.01)


def test_a_loop_keeps_what_it_stacks_and_one_turn() -> None:
    def stacking(x):
        return jax.lax.scan(lambda c, _: (jnp.sort(c), jnp.sort(c)), x, length=7)[1]

    assert 7 <= peak(stacking, SHAPE) <= 10


def test_a_loop_of_one_turn_is_no_loop() -> None:
    def turn(x, y):
        return x + jnp.sort(y), None

    def looped(x, y):
        return jax.lax.scan(turn, x, y[None])[0]

    assert peak(looped, SHAPE, SHAPE) == pytest.approx(peak(lambda x, y: turn(x, y)[0], SHAPE, SHAPE), abs=0.01)


def test_checkpoint_trades_memory_for_work() -> None:
    def loss(x, policy):
        def layer(c, _):
            return jnp.sin(jnp.sort(jnp.sin(jnp.sort(c)))), None

        return jax.lax.scan(jax.checkpoint(layer, policy=policy), x, length=20)[0].sum()

    policies = jax.checkpoint_policies
    everything = peak(jax.grad(lambda x: loss(x, policies.everything_saveable)), SHAPE)
    nothing = peak(jax.grad(lambda x: loss(x, policies.nothing_saveable)), SHAPE)
    assert nothing < 0.6 * everything
    assert nothing > 20  # the input of every layer


def test_what_loops_take_in_two_bytes() -> None:
    """By name: what is copied where arguments of a program come in other tiles than it works in."""

    def program(stack, table, wide, alone, x):
        def layer(x, w):
            return x @ w, None

        def chunk(ids):
            held, ids = jax.lax.optimization_barrier((table, ids))
            return jax.lax.scan(layer, held[ids], stack)[0].sum() + wide.sum()

        return jax.lax.map(chunk, jnp.zeros((3, 8), jnp.int32)).sum() + (x @ alone).sum()

    def relaid(function) -> float:
        shapes = {"stack": (5, 128, 128), "table": (4096, 128), "wide": (512, 128), "alone": (128, 256), "x": (8, 128)}
        dtypes = {"wide": jnp.float32}
        arguments = [jax.ShapeDtypeStruct(shape, dtypes.get(n, jnp.bfloat16)) for n, shape in shapes.items()]
        return relaid_bytes(jax.make_jaxpr(function)(*arguments).jaxpr)

    both = 2 * (5 * 128 * 128 + 4096 * 128)
    assert relaid(program) == both
    assert relaid(jax.jit(program)) == both
    assert relaid(jax.checkpoint(program)) == both

    def one_chunk(stack, table, wide, alone, x):
        rows = table[jnp.zeros(8, jnp.int32)]
        return jax.lax.scan(lambda x, w: (x @ w, None), rows + x, stack)[0] @ alone

    assert relaid(one_chunk) == 2 * 5 * 128 * 128
