"""Attention kernels, run as JAX operations on CPU, against the plain one: values, gradients, a whole decoder."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxembed.errors import InputError
from jaxembed.models.bloom import BloomConfig
from jaxembed.ops.alibi import alibi_slopes
from jaxembed.ops.attention import LARGEST_HEAD_DIM, attention, choose_kernel
from jaxembed.ops.kernels.flash import HALF_TILINGS, SINGLE_TILINGS, Tiling, Tilings, flash_attention
from jaxembed.ops.kernels.ranges import visible_ranges
from jaxembed.ops.kernels.splash import bfloat16_parts, splash_attention
from jaxembed.sharding import make_mesh

from blooms import QUICK, abstract_bloom

ROWS, HEADS = 2, 2
UNEVEN = Tilings(Tiling(32, 16, 4, 1), Tiling(16, 32, 4, 1), Tiling(64, 16, 4, 1))
MIXED = Tilings(Tiling(16, 64, 4, 1), Tiling(64, 16, 4, 1), Tiling(16, 32, 4, 1))


def packed(length: int, rows: int = ROWS, longest: int = 50, seed: int = 0) -> np.ndarray:
    """Texts one after another, with padding on both sides; the first row's begins at once."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, length), np.int32)
    for number, row in enumerate(segments):
        start, text, end = 9 * number, 1, length - int(rng.integers(1, 15))
        while start < end:
            size = int(rng.integers(1, longest))
            row[start : min(start + size, end)] = text
            start, text = start + size, text + 1
    return segments


def inputs(length: int, head_dim: int, segments: np.ndarray, heads: int = HEADS, dtype: Any = np.float32) -> Any:
    """q, k, v, and a cotangent that is zero at padding, which nobody reads."""
    arrays = np.random.default_rng(1).normal(size=(4, len(segments), length, heads, head_dim)).astype(np.float32)
    arrays[3] *= (segments > 0)[:, :, None, None]
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def with_gradients(function: Callable[..., jax.Array], given: Any, segments: np.ndarray) -> list[np.ndarray]:
    """The output at texts, and dq, dk, dv, in float32."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> Any:
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(d_out.astype(out.dtype))

    out, *gradients = jax.jit(both).lower(*given).compile(QUICK)(*given)
    assert all(x.dtype == given[0].dtype and np.isfinite(x.astype(np.float32)).all() for x in (out, *gradients))
    out = np.where((segments > 0)[:, :, None, None], out, 0)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def assert_close(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("head_dim", "length", "causal", "alibi", "tilings"),
    [
        (80, 72, True, True, UNEVEN),
        (64, 136, False, True, MIXED),
        pytest.param(64, 200, True, False, None, marks=slow),
        pytest.param(96, 104, False, False, UNEVEN, marks=slow),
        pytest.param(128, 128, True, True, None, marks=slow),
        pytest.param(256, 40, True, True, None, marks=slow),
    ],
)
def test_flash_is_the_plain_one(head_dim: int, length: int, causal: bool, alibi: bool, tilings: Tilings | None) -> None:
    segments = packed(length)
    given, slopes = inputs(length, head_dim, segments), jnp.asarray(alibi_slopes(HEADS)) if alibi else None
    plain = partial(attention, segments=jnp.asarray(segments), slopes=slopes, causal=causal)
    ours = partial(
        flash_attention, segments=jnp.asarray(segments), slopes=slopes, causal=causal, tilings=tilings, interpret=True
    )
    assert_close(with_gradients(ours, given, segments), with_gradients(plain, given, segments), 1e-5)


@pytest.mark.parametrize(
    ("head_dim", "length", "causal", "alibi"),
    [
        (64, 136, True, True),
        pytest.param(80, 200, False, True, marks=slow),
        pytest.param(128, 520, True, False, marks=slow),
        pytest.param(96, 640, True, True, marks=slow),
    ],
)
def test_splash_is_the_plain_one(head_dim: int, length: int, causal: bool, alibi: bool) -> None:
    segments = packed(length, longest=length)
    given, slopes = inputs(length, head_dim, segments), jnp.asarray(alibi_slopes(HEADS)) if alibi else None
    plain = partial(attention, segments=jnp.asarray(segments), slopes=slopes, causal=causal)
    theirs = partial(
        splash_attention, segments=jnp.asarray(segments), slopes=slopes, causal=causal, interpret=True
    )  # fmt: skip
    # Scores of 500, as ALiBi's features give them here, have rounding errors of 3e-5.
    assert_close(with_gradients(theirs, given, segments), with_gradients(plain, given, segments), 1e-4)


@slow
@pytest.mark.parametrize("kernel", ["flash", "splash"])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_bfloat16_is_as_near_as_the_plain_one(kernel: str, head_dim: int) -> None:
    """To float32, from the same inputs."""
    segments = packed(256, longest=200)
    given = inputs(256, head_dim, segments, dtype=jnp.bfloat16)
    run = partial(attention, segments=jnp.asarray(segments), slopes=jnp.asarray(alibi_slopes(HEADS)))
    exact = with_gradients(run, [x.astype(jnp.float32) for x in given], segments)
    plain = with_gradients(run, given, segments)
    found = with_gradients(partial(run, kernel=f"{kernel}:interpret"), given, segments)
    for ours, theirs, true in zip(found, plain, exact, strict=True):
        assert np.linalg.norm(ours - true) <= 1.5 * np.linalg.norm(theirs - true)


def test_ranges_are_what_the_plain_mask_says() -> None:
    segments = packed(60)
    segments[0, -9:] = 7  # to the end of the row
    for causal in (True, False):
        same = segments[:, :, None] == segments[:, None, :]
        same &= (segments > 0)[:, :, None] | np.eye(60, dtype=bool)
        visible = same & np.tri(60, dtype=bool) if causal else same
        seen, seen_from = visible_ranges(jnp.asarray(segments), causal)
        for (begin, end), mask in ((seen, visible), (seen_from, visible.swapaxes(1, 2))):
            place = np.arange(60)
            inside = (place >= np.asarray(begin)[:, :, None]) & (place < np.asarray(end)[:, :, None])
            np.testing.assert_array_equal(inside, mask)


def test_three_parts_are_the_whole_number() -> None:
    slopes = alibi_slopes(112)
    parts = bfloat16_parts(jnp.asarray(slopes), 3)
    for part in parts:
        np.testing.assert_array_equal(part, part.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(sum(np.asarray(part, np.float64) for part in parts), slopes)


@pytest.mark.parametrize("kernel", ["flash", pytest.param("splash", marks=slow)])
def test_a_decoder_has_the_same_gradients(kernel: str) -> None:
    config = BloomConfig(vocab_size=50, dim=32, layers=3, heads=2, causal=kernel != "splash")
    graph, shapes = nnx.split(abstract_bloom(config))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes)
    segments = packed(128)
    tokens = np.random.default_rng(0).integers(0, 50, segments.shape)
    last = jnp.asarray([[5, 40, -1], [12, 60, 80]])

    def loss(state: nnx.State, kernel: str) -> jax.Array:
        model = nnx.merge(graph, state)
        states = model.states(jnp.asarray(tokens), jnp.asarray(segments), last, attention_kernel=kernel)
        return jnp.where((last >= 0)[:, :, None], jnp.sin(states), 0).sum()

    plain, found = (
        jax.jit(jax.value_and_grad(partial(loss, kernel=name))).lower(state).compile(QUICK)(state)
        for name in ("plain", f"{kernel}:interpret")
    )
    np.testing.assert_allclose(plain[0], found[0], rtol=1e-5)
    for (path, a), b in zip(jax.tree.leaves_with_path(plain[1]), jax.tree.leaves(found[1]), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max(), path


@slow
@pytest.mark.parametrize("kernel", ["flash", "splash"])
def test_heads_are_split_over_tensor(kernel: str) -> None:
    """Inside a `shard_map` over the other axes, where `tensor` is the compiler's, without a copy of other heads."""
    segments = packed(128, rows=4)
    q, k, v, d_out = inputs(128, 16, segments, heads=4)
    slopes = jnp.asarray(alibi_slopes(4))

    def gradients(name: str, q: Any, k: Any, v: Any, d_out: Any, segments: Any) -> Any:
        def loss(q: Any, k: Any, v: Any) -> jax.Array:
            return (attention(q, k, v, segments, slopes, kernel=name) * d_out).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    mesh = make_mesh(2, 2, 2)
    rows = PartitionSpec(("data", "fsdp"))
    split = jax.sharding.NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    whole = jax.sharding.NamedSharding(mesh, rows)
    arguments = [*(jax.device_put(x, split) for x in (q, k, v, d_out)), jax.device_put(segments, whole)]
    sharded = jax.shard_map(
        partial(gradients, f"{kernel}:interpret"), mesh=mesh, in_specs=(rows,) * 5, out_specs=rows,
        axis_names={"data", "fsdp"}, check_vma=False,
    )  # fmt: skip
    compiled = jax.jit(sharded).lower(*arguments).compile(QUICK)
    assert "all-gather" not in compiled.as_text()
    found = compiled(*arguments)
    expected = jax.jit(partial(gradients, "plain"))(q, k, v, d_out, jnp.asarray(segments))
    assert found[0].sharding.is_equivalent_to(split, 4)
    assert_close([np.asarray(x) for x in found], [np.asarray(x) for x in expected], 1e-5)


@dataclasses.dataclass(frozen=True)
class Device:
    platform: str
    device_kind: str = "a device"
    compute_capability: str | None = None


TPU, HOPPER, AMPERE = Device("tpu"), Device("gpu", "H100", "9.0"), Device("gpu", "A100", "8.0")
TURING, AMD, CPU = Device("gpu", "Tesla T4", "7.5"), Device("gpu", "gfx90a", "gfx90a"), Device("cpu", "cpu")


@pytest.mark.parametrize(
    ("device", "half", "single"),
    [(TPU, "splash", "plain"), (HOPPER, "flash", "plain"), (AMPERE, "flash", "plain"), (TURING, "plain", "plain"),
     (AMD, "plain", "plain"), (CPU, "plain", "plain")],
)  # fmt: skip
def test_auto_is_by_device(device: Any, half: str, single: str) -> None:
    assert choose_kernel("auto", [device], head_dim=64, dtype=jnp.bfloat16) == half
    assert choose_kernel("auto", [device], head_dim=64, dtype=jnp.float32) == single
    assert choose_kernel("plain", [device], head_dim=64, dtype=jnp.bfloat16) == "plain"


def test_heads_too_wide_for_flash_are_plain() -> None:
    assert choose_kernel("auto", [HOPPER], head_dim=320, dtype=jnp.bfloat16) == "plain"


@pytest.mark.parametrize(
    ("name", "device", "head_dim", "message"),
    [
        ("splash", HOPPER, 64, "splash runs on TPU, and this is H100, capability 9.0"),
        ("flash", TURING, 64, "compute capability 8.0 and above, and this is Tesla T4, capability 7.5"),
        ("flash", CPU, 64, r"and this is cpu \(cpu\); choose auto"),
        ("flash", TPU, 64, "flash runs on NVIDIA GPUs"),
        ("flash", HOPPER, 320, "heads of up to 256, the model has 320"),
        ("ring", CPU, 64, "expected auto, plain, splash or flash, found 'ring'"),
    ],
)
def test_a_kernel_that_does_not_run_here_is_refused(name: str, device: Any, head_dim: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_kernel(name, [device], head_dim=head_dim, dtype=jnp.bfloat16)


def test_the_widest_tile_is_known_where_kernels_are_chosen() -> None:
    assert max(HALF_TILINGS) == max(SINGLE_TILINGS) == LARGEST_HEAD_DIM


def test_splash_refuses_rows_whose_places_it_cannot_hold() -> None:
    q = jax.ShapeDtypeStruct((1, 65_537, 1, 16), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((1, 65_537), jnp.int32)
    with pytest.raises(InputError, match="rows of up to 65,536 tokens, found 65,537"):
        jax.eval_shape(splash_attention, q, q, q, segments)
