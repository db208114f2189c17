"""Attention inside packed segments: the plain implementation, which all kernels are measured against, and their choice.

`splash` runs on TPU, `flash` on GPU from compute capability 8.0 on; both are in `ops/kernels`.
"""

import importlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxembed.errors import InputError
from jaxembed.ops.kept import kept_flat

KERNELS = ("plain", "splash", "flash")
KEY = "model.attention_kernel"
LEAST_CAPABILITY = 8.0
"""Of NVIDIA's compute capabilities: the first with bfloat16 and asynchronous copies (Ampere)."""
LARGEST_HEAD_DIM = 256
"""The widest tile of flash's tables, which only a GPU needs to import."""
SHORTEST_ROW = 128
"""Rows that are shorter are plain: splash would fill them up to that length."""

BLOCK = 64
"""Queries that are scored at once. Causal, keys after a block's last query are never touched: half of the work."""


def attention(
    q: Float[Array, "rows queries heads head_dim"],
    k: Float[Array, "rows length heads head_dim"],
    v: Float[Array, "rows length heads head_dim"],
    segments: Int[Array, "rows length"],
    slopes: Float[Array, " heads"] | None = None,
    positions: Int[Array, "rows queries"] | None = None,
    *,
    causal: bool = True,
    kernel: str = "plain",
) -> Float[Array, "rows queries heads head_dim"]:
    """softmax(q kᵀ / √head_dim + slope · (key − query)) v over the keys of a query's own segment.

    Args:
        segments: the text that each key belongs to; padding (0) attends to padding, which nobody reads.
        slopes: ALiBi's, or None for none. Positions are those in the row: softmax takes differences only.
        positions: where in the row each query stands; −1, an empty slot, reads as 0. None: query i stands at i.
        causal: over the keys up to the query itself; False: over those after it too, whose ALiBi term is positive, as
            in transformers, where it depends on the key alone (`build_alibi_tensor` of modeling_bloom.py).
        kernel: one of `KERNELS`, for queries at all positions; at `positions` it is always plain. For kernels a text is
            one run of its row. With `:interpret` after the name it runs on any device, slowly: for tests.

    The softmax is in float32, the result in the dtype of `v`.
    """
    rows, length = segments.shape
    if positions is not None:
        positions = jnp.maximum(positions, 0)
        own = jnp.take_along_axis(segments, positions, axis=1, mode="clip")
        return kept_flat(_attend(q, k, v, segments, own, positions, slopes, causal))
    name, _, interpret = kernel.partition(":")
    if name == "flash" or (name == "splash" and length >= SHORTEST_ROW):
        return _by_kernel(name, q, k, v, segments, slopes, causal, bool(interpret))
    blocks = [slice(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]
    place = jnp.broadcast_to(jnp.arange(length), (rows, length))
    outputs = []
    for block in blocks:
        keys = slice(block.stop if causal else length)
        outputs.append(
            _attend(
                q[:, block], k[:, keys], v[:, keys], segments[:, keys], segments[:, block], place[:, block], slopes,
                causal,
            )
        )  # fmt: skip
    return kept_flat(jnp.concatenate(outputs, axis=1) if len(outputs) > 1 else outputs[0])


def _by_kernel(
    name: str,
    q: Float[Array, "rows length heads head_dim"],
    k: Float[Array, "rows length heads head_dim"],
    v: Float[Array, "rows length heads head_dim"],
    segments: Int[Array, "rows length"],
    slopes: Float[Array, " heads"] | None,
    causal: bool,
    interpret: bool,
) -> Float[Array, "rows length heads head_dim"]:
    """The kernel on this chip's rows and heads.

    The compiler cannot split it over an axis that is left to it, and Mosaic refuses to see one, be it of size 1.
    """
    function = getattr(importlib.import_module(f"jaxembed.ops.kernels.{name}"), f"{name}_attention")

    def run(q: Array, k: Array, v: Array, segments: Array, slopes: Array | None) -> Array:
        return function(q, k, v, segments, slopes, causal=causal, interpret=interpret)

    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if types.get("tensor") != AxisType.Auto:
        return run(q, k, v, segments, slopes)
    heads = PartitionSpec(None, None, "tensor")
    specs = (heads, heads, heads, PartitionSpec(), None if slopes is None else PartitionSpec("tensor"))
    return jax.shard_map(run, in_specs=specs, out_specs=heads, axis_names={"tensor"}, check_vma=False)(
        q, k, v, segments, slopes
    )


def choose_kernel(name: str, devices: Sequence[Any] | None = None, *, dtype: Any, head_dim: int = 1) -> str:
    """The kernel of a config's `auto`, or the one that it names.

    `auto` is splash on TPU, flash on GPUs of compute capability 8.0 and above, for activations of two bytes; plain
    elsewhere and in float32, which is left to the compiler's own products.

    Args:
        devices: that compute; None: all that are here.
        head_dim: of the model; left out where it is not known yet.

    Raises:
        InputError: the named one does not run on these devices, or not with these heads.
    """
    device = (jax.devices() if devices is None else devices)[0]
    capability = _capability(device)
    fits = {
        "plain": True,
        "splash": device.platform == "tpu",
        "flash": capability >= LEAST_CAPABILITY and head_dim <= LARGEST_HEAD_DIM,
    }
    if name == "auto":
        half = jnp.dtype(dtype).itemsize == 2
        return next((kernel for kernel in ("splash", "flash") if half and fits[kernel]), "plain")
    if name not in fits:
        raise InputError(f"{KEY}: expected auto, {', '.join(KERNELS[:-1])} or {KERNELS[-1]}, found {name!r}")
    if fits[name]:
        return name
    here = f"this is {device.device_kind}" + (f", capability {capability}" if capability else f" ({device.platform})")
    if name == "splash":
        raise InputError(f"{KEY}: splash runs on TPU, and {here}; choose auto")
    if capability >= LEAST_CAPABILITY:
        raise InputError(f"{KEY}: flash takes heads of up to {LARGEST_HEAD_DIM}, the model has {head_dim}; choose auto")
    raise InputError(
        f"{KEY}: flash runs on NVIDIA GPUs of compute capability {LEAST_CAPABILITY} and above, and {here}; choose auto"
    )


def _capability(device: Any) -> float:
    """NVIDIA's compute capability; 0 for all other devices (AMD's have names such as gfx90a)."""
    try:
        return float(getattr(device, "compute_capability", 0) or 0)
    except ValueError:
        return 0.0


def _attend(
    q: Float[Array, "rows queries heads head_dim"],
    k: Float[Array, "rows keys heads head_dim"],
    v: Float[Array, "rows keys heads head_dim"],
    key_segments: Int[Array, "rows keys"],
    query_segments: Int[Array, "rows queries"],
    positions: Int[Array, "rows queries"],
    slopes: Float[Array, " heads"] | None,
    causal: bool,
) -> Float[Array, "rows queries heads head_dim"]:
    distance = jnp.arange(k.shape[1]) - positions[:, :, None]
    visible = key_segments[:, None, :] == query_segments[:, :, None]
    if causal:
        visible = (distance <= 0) & visible
    scores = jnp.einsum("rqhd,rkhd->rhqk", q / math.sqrt(q.shape[-1]), k, preferred_element_type=jnp.float32)
    if slopes is not None:
        scores = scores + slopes[:, None, None] * distance[:, None].astype(jnp.float32)
    scores = jnp.where(visible[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("rhqk,rkhd->rqhd", weights, v)
