"""Attention kernels on one GPU: are they right, how fast are they, and which tilings are best.

Needs JAX with CUDA and this repository on PYTHONPATH, nothing else. Rows are packed with texts of 20 to 400 tokens
(log-normal, fixed seed). Beside ours: the plain implementation; JAX's own Pallas kernel, which has segments and no
ALiBi; cuDNN through `jax.nn.dot_product_attention`, causal, without segments or ALiBi, so that its work is another.
Times are medians of calls chained on the device; a case that fails is a line that says so. XLA's own search for the
fastest products is off: with it the plain implementation alone compiles for minutes.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"

import jax
import jax.numpy as jnp
import numpy as np

from jaxembed.ops.alibi import alibi_slopes
from jaxembed.ops.attention import attention
from jaxembed.ops.kernels import flash
from jaxembed.ops.kernels.flash import Tiling, Tilings

HEADS = {64: 16, 80: 32, 96: 16, 128: 32}
"""By head_dim: those of bloom-560m, 3b, 1b1 and 7b1."""
SHAPES = ((8, 512), (32, 1024), (16, 2048))
CALLS = 10
"""Calls chained in one timed program."""

FORWARD = [
    Tiling(*each) for each in (
        (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (128, 32, 4, 2),
        (128, 32, 8, 3), (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2),
    )
]  # fmt: skip
QUERY_GRADIENT = [
    Tiling(*each) for each in (
        (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 8, 2), (128, 32, 8, 2),
        (128, 64, 8, 2),
    )
]  # fmt: skip
KEY_GRADIENT = [
    Tiling(*each) for each in (
        (32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 8, 2), (32, 128, 8, 2),
        (64, 128, 8, 2),
    )
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    q: jax.Array
    k: jax.Array
    v: jax.Array
    d_out: jax.Array
    segments: jax.Array
    slopes: jax.Array

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        return self.q, self.k, self.v


def say(*words: object) -> None:
    print(*words, flush=True)


def packed_segments(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Texts one after another, each row filled until the next text does not fit."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, length), np.int32)
    for row in segments:
        start, number = 0, 1
        while start + (size := int(np.clip(rng.lognormal(np.log(120), 0.8), 20, 400))) <= length:
            row[start : start + size] = number
            start, number = start + size, number + 1
    return segments


def make(rows: int, length: int, head_dim: int, dtype: Any, heads: int | None = None) -> Case:
    heads = heads or HEADS[head_dim]
    segments = packed_segments(rows, length)
    draw = jax.random.normal(jax.random.key(0), (4, rows, length, heads, head_dim), jnp.float32).astype(dtype)
    d_out = draw[3] * (jnp.asarray(segments) > 0)[:, :, None, None].astype(dtype)
    return Case(*draw[:3], d_out, jnp.asarray(segments), jnp.asarray(alibi_slopes(heads)))


def with_gradients(function: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    def both(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(d_out.astype(out.dtype))

    return both


def check(head_dim: int, dtype: Any, length: int, causal: bool, alibi: bool) -> str:
    """Errors of output and gradients against the plain implementation in float32, ‖Δ‖ / ‖reference‖."""
    case = make(4, length, head_dim, dtype, heads=4)
    slopes = case.slopes if alibi else None
    real = (case.segments > 0)[:, :, None, None]

    def run(function: Callable[..., jax.Array], arrays: Iterable[jax.Array], times: int = 1) -> list[list[np.ndarray]]:
        def masked(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.where(real, function(q, k, v, case.segments, slopes, causal=causal), 0)

        compiled = jax.jit(with_gradients(masked))
        return [[np.asarray(x.astype(jnp.float32)) for x in compiled(*arrays)] for _ in range(times)]

    given = (*case.arrays, case.d_out)
    with jax.default_matmul_precision("highest"):
        (reference,) = run(attention, [x.astype(jnp.float32) for x in given])
        (plain,) = run(attention, given)
    ours, again = run(flash.flash_attention, given, times=2)
    same = all(np.array_equal(a, b) for a, b in zip(ours, again, strict=True))

    def errors(found: list[np.ndarray]) -> str:
        pairs = zip(found, reference, strict=True)
        return " ".join(f"{np.linalg.norm(a - b) / np.linalg.norm(b):.1e}" for a, b in pairs)

    return f"{errors(ours)} | plain {errors(plain)} | {'same bits twice' if same else 'BITS DIFFER'}"


def timed(function: Callable[..., Any], arrays: tuple[jax.Array, ...], others: tuple[Any, ...] = ()) -> Any:
    """Compiles a chain of `CALLS` calls; `seconds` of it is the time of one call."""

    def step(_: int, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        arrays, others, _ = carry
        return jax.lax.optimization_barrier((arrays, others, function(*arrays, *others)))

    def chain(arrays: Any, others: Any) -> Any:
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *arrays, *others))
        return jax.lax.fori_loop(0, CALLS, step, (arrays, others, empty))[2]

    return jax.jit(chain).lower(arrays, others).compile()


def seconds(compiled: Any, arrays: Any, others: Any = (), repeats: int = 5) -> float:
    jax.block_until_ready(compiled(arrays, others))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(arrays, others))
        times.append((time.perf_counter() - start) / CALLS)
    return statistics.median(times)


def message(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:160]!r}"


def contestants(case: Case, best: Tilings | None) -> dict[str, Callable[..., jax.Array]]:
    from jax.experimental.pallas.ops.gpu import attention as pallas_attention

    sizes = pallas_attention.BlockSizes(64, 64, 64, 64, 64, 64)
    scale = case.q.shape[-1] ** -0.5
    found: dict[str, Callable[..., jax.Array]] = {
        "plain": lambda q, k, v: attention(q, k, v, case.segments, case.slopes),
        "jax pallas mha, no ALiBi": lambda q, k, v: pallas_attention.mha(
            q, k, v, case.segments, scale, True, sizes
        ),
        "cuDNN, causal only": lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn"
        ),
        "ours": lambda q, k, v: flash.flash_attention(q, k, v, case.segments, case.slopes),
        "ours, no ALiBi": lambda q, k, v: flash.flash_attention(q, k, v, case.segments),
    }  # fmt: skip
    if best is not None:
        found["ours, tuned"] = lambda q, k, v: flash.flash_attention(
            q, k, v, case.segments, case.slopes, tilings=best
        )  # fmt: skip
    return found


def compiled_all(builds: dict[Any, Callable[[], Any]]) -> dict[Any, Any]:
    """Compiles in threads: name → program, or the error."""
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        futures = {name: pool.submit(build) for name, build in builds.items()}
    return {name: future.exception() or future.result() for name, future in futures.items()}


def compare(rows: int, length: int, head_dim: int, best: Tilings | None) -> None:
    case = make(rows, length, head_dim, jnp.bfloat16)
    builds = {}
    for name, function in contestants(case, best).items():
        builds[name, "forward"] = partial(timed, function, case.arrays)
        builds[name, "both"] = partial(timed, with_gradients(function), (*case.arrays, case.d_out))
    programs = compiled_all(builds)
    for name in dict.fromkeys(name for name, _ in builds):
        cells = []
        for kind, arrays in (("forward", case.arrays), ("both", (*case.arrays, case.d_out))):
            program = programs[name, kind]
            try:
                if isinstance(program, BaseException):
                    raise program
                cells.append(f"{1e6 * seconds(program, arrays):8.0f}")
            except Exception as error:
                cells.append(message(error))
        say(f"| {rows} × {length} | {HEADS[head_dim]} × {head_dim} | {name:26} | {' | '.join(cells)} |")


def tune(rows: int, length: int, head_dim: int) -> Tilings | None:
    """Times each kernel by itself with each tiling."""
    case = make(rows, length, head_dim, jnp.bfloat16)
    seen, seen_from = (flash.fill(ranges, 128) for ranges in flash.visible_ranges(case.segments, causal=True))
    out, log_sums = jax.jit(partial(flash.attention_forward, tiling=Tiling(64, 64, 4, 2)))(
        *case.arrays, seen, case.slopes
    )
    products = jnp.einsum("rlhd,rlhd->rhl", case.d_out, out, preferred_element_type=jnp.float32)
    given = (*case.arrays, case.d_out, log_sums, jnp.pad(products, ((0, 0), (0, 0), (0, -length % 128))))
    jobs: dict[str, tuple[Callable[..., Any], list[Tiling], tuple[Any, ...], Any]] = {
        "forward": (flash.attention_forward, FORWARD, case.arrays, seen),
        "queries": (flash.query_gradient, QUERY_GRADIENT, given, seen),
        "keys": (flash.key_gradient, KEY_GRADIENT, given, seen_from),
    }
    builds = {
        (name, tiling): partial(timed, partial(function, tiling=tiling), arrays, (ranges, case.slopes))
        for name, (function, tilings, arrays, ranges) in jobs.items()
        for tiling in tilings
    }
    programs = compiled_all(builds)
    best: dict[str, tuple[float, Tiling]] = {}
    for name, (_, tilings, arrays, ranges) in jobs.items():
        cells = []
        for tiling in tilings:
            label = f"{tiling.queries},{tiling.keys},{tiling.warps},{tiling.stages}"
            program = programs[name, tiling]
            try:
                if isinstance(program, BaseException):
                    raise program
                found = seconds(program, arrays, (ranges, case.slopes), repeats=3)
                best[name] = min(best.get(name, (float("inf"), tiling)), (found, tiling), key=lambda x: x[0])
                cells.append(f"{label} {1e6 * found:.0f}")
            except Exception as error:
                cells.append(f"{label} {message(error)[:70]}")
        say(f"  {head_dim} {name}: {'; '.join(cells)}")
    if len(best) < 3:
        return None
    for name, (found, tiling) in best.items():
        say(f"  best {head_dim} {name}: {tiling} {1e6 * found:.0f} µs")
    return Tilings(**{name: tiling for name, (_, tiling) in best.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=140, help="no new case begins after that many (default 140)")
    limit = time.monotonic() + parser.parse_args().seconds
    warnings.simplefilter("ignore", DeprecationWarning)
    device: Any = jax.devices()[0]
    say(
        f"{device.device_kind}, compute capability {getattr(device, 'compute_capability', None)}, jax {jax.__version__}"
    )

    say("\nerrors of output, dq, dk, dv against the plain implementation in float32:")
    cases: list[tuple[int, Any, int, bool, bool]] = []
    for head_dim in HEADS:
        cases += [(head_dim, dtype, 256, True, True) for dtype in (jnp.bfloat16, jnp.float32)]
    cases += [(64, dtype, 264, False, True) for dtype in (jnp.bfloat16, jnp.float32)]
    cases += [(128, jnp.bfloat16, 200, True, False), (80, jnp.float32, 200, False, False)]
    for case, found in compiled_all({case: partial(check, *case) for case in cases}).items():
        head_dim, dtype, length, causal, alibi = case
        kind = f"{'causal' if causal else 'both ways'}{', ALiBi' if alibi else ''}"
        result = message(found) if isinstance(found, BaseException) else found
        say(f"  {head_dim:3} {dtype.__name__:8} {length} {kind}: {result}")

    best: dict[int, Tilings | None] = {}
    say("\nmicroseconds of each kernel, 32 rows of 1024, by queries,keys,warps,stages:")
    for head_dim in HEADS:
        if time.monotonic() > limit - 40:
            break
        try:
            best[head_dim] = tune(32, 1024, head_dim)
        except Exception as error:
            say(f"  {head_dim}: {message(error)}")

    say("\n| rows | heads | attention | forward, µs | forward and backward, µs |\n|---|---|---|---|---|")
    for head_dim, shape in [*((h, (32, 1024)) for h in HEADS), (64, (8, 512)), (64, (16, 2048)), (128, (16, 2048))]:
        if time.monotonic() > limit:
            say("out of time")
            break
        try:
            compare(*shape, head_dim, best.get(head_dim))
        except Exception as error:
            say(f"  {head_dim} {shape}: {message(error)}")


if __name__ == "__main__":
    main()
