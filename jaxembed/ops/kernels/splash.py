"""Attention on TPU through JAX's splash kernel, which knows segments but neither ALiBi nor any bias.

ALiBi enters as six more features of queries and keys. Softmax drops what is the same for all keys of a query, so that
slope · (key − query) may be slope · place, the key's place in its text. A float32 slope is the sum of three bfloat16
numbers, a place below 65,536 that of two, 256 · high + low; their six products are exact in float32, in which the
kernel sums them with those of the head. Places from the begin of the text, not of the row, keep that sum small, and so
its rounding: a score near 1,000 has no digits left after the fourth.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from jaxembed.errors import InputError
from jaxembed.ops.kept import KEPT
from jaxembed.ops.kernels.ranges import visible_ranges

LANES = 128
"""The kernel takes blocks of keys in multiples of the width of a vector register."""
LARGEST_BLOCK = 512
LONGEST_ROW = 65_536
"""Places beyond have no exact sum of two bfloat16 numbers."""


def splash_attention(
    q: Float[Array, "rows length heads head_dim"],
    k: Float[Array, "rows length heads head_dim"],
    v: Float[Array, "rows length heads head_dim"],
    segments: Int[Array, "rows length"],
    slopes: Float[Array, " heads"] | None = None,
    *,
    causal: bool = True,
    interpret: bool = False,
) -> Float[Array, "rows length heads head_dim"]:
    """`ops.attention.attention` on TPU, of lengths up to `LONGEST_ROW`; inside a `shard_map`, not checked for `vma`.

    Args:
        segments: the text of each token, 0 for padding, which nobody reads. A text is one run of its row.
        slopes: ALiBi's, not differentiated.
        interpret: runs the kernels as JAX operations, on any device.

    Raises:
        InputError: longer rows.
    """
    if segments.shape[1] > LONGEST_ROW:
        raise InputError(
            f"model.attention_kernel: splash takes rows of up to {LONGEST_ROW:,} tokens, found {segments.shape[1]:,}; "
            "choose plain"
        )
    length, heads = segments.shape[1], q.shape[2]
    blocks = math.ceil(length / LARGEST_BLOCK)
    block = LANES * math.ceil(length / blocks / LANES)
    q = q / math.sqrt(q.shape[-1])
    if slopes is not None:
        q, k = _with_alibi(q, k, segments, slopes)

    missing = blocks * block - length
    q, k, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q, k, v))
    segments = jnp.pad(segments, ((0, 0), (0, missing)), constant_values=-1)
    shape = (blocks * block, blocks * block)
    mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    out: Any = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))
    return out.swapaxes(1, 2)[:, :length].astype(v.dtype)


def _with_alibi(
    q: Float[Array, "rows length heads head_dim"],
    k: Float[Array, "rows length heads head_dim"],
    segments: Int[Array, "rows length"],
    slopes: Float[Array, " heads"],
) -> tuple[Float[Array, "rows length heads features"], Float[Array, "rows length heads features"]]:
    """Both with six features more, whose product is slope · place of the key in its text."""
    (begin, _), _ = visible_ranges(segments, causal=True)
    place = jnp.arange(segments.shape[1]) - begin
    high, low = place // 256 * 256, place % 256
    parts = bfloat16_parts(jnp.asarray(slopes, jnp.float32), 3)
    of_queries = jnp.stack([*parts, *parts], axis=-1)[None, None]
    of_keys = jnp.stack([high, high, high, low, low, low], axis=-1)[:, :, None]
    return tuple(
        jnp.concatenate([x, jnp.broadcast_to(more, (*x.shape[:3], 6)).astype(x.dtype)], axis=-1)
        for x, more in ((q, of_queries), (k, of_keys))
    )  # pyright: ignore[reportReturnType]


def bfloat16_parts(values: Float[Array, "..."], parts: int) -> list[Float[Array, "..."]]:
    """Float32 numbers that are bfloat16 ones and sum to `values`, the largest first; three take all 24 bits."""
    found = []
    for _ in range(parts):
        found.append(jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7))
        values = values - found[-1]
    return found
