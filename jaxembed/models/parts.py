"""Parameters of their own for what trains in part: low-rank adapters, rows of the vocabulary table, the upper layers.

A decoder is given them before training (`with_adapters`, `with_token_rows`, `with_upper_layers`), so that its state
splits into what trains and what is frozen. `jaxembed.checkpoint.parts` takes them back into the decoder's own
parameters.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxembed.sharding import Hooks


class Adapter(nnx.Module):
    """What LoRA (arXiv 2106.09685) adds to a product with a kernel: scaling · (x · a) · b.

    `a` takes the axes of the kernel that are contracted, `b` the others in their order. As in the paper and in PEFT
    `b` begins at zero, so that the decoder begins as it was, and `a` is uniform in ±1/√inputs.
    """

    def __init__(
        self,
        key: Array,
        kernel: nnx.Param,
        inputs: tuple[int, ...],
        rank: int,
        scaling: float,
    ) -> None:
        """
        Args:
            kernel: of one layer, or of a stack of layers; real or abstract, only shape and axes are read.
            inputs: its contracted dimensions, counted without the stack's.
        """
        stack = 1 if kernel.axes[0] == "layer" else 0
        taken = [dimension + stack for dimension in inputs]
        left = [dimension for dimension in range(stack, len(kernel.shape)) if dimension not in taken]

        def select(values: Sequence[Any], dimensions: Sequence[int]) -> tuple[Any, ...]:
            return tuple(values[dimension] for dimension in dimensions)

        layers = (kernel.shape[:stack], kernel.axes[:stack])
        width = select(kernel.shape, taken)
        bound = 1 / math.sqrt(math.prod(width))
        a = jax.random.uniform(key, (*layers[0], *width, rank), jnp.float32, -bound, bound)
        self.a = nnx.Param(a, axes=(*layers[1], *select(kernel.axes, taken), "rank"))
        b = jnp.zeros((*layers[0], rank, *select(kernel.shape, left)), jnp.float32)
        self.b = nnx.Param(b, axes=(*layers[1], "rank", *select(kernel.axes, left)))
        self.contracted = len(inputs)
        self.scaling = scaling

    def lower(self, x: Float[Array, "..."], hooks: Hooks) -> Float[Array, "... rank"]:
        """x · a."""
        return jnp.tensordot(x, hooks.weight(self.a, x.dtype), axes=self.contracted)

    def upper(self, low: Float[Array, "... rank"], hooks: Hooks, part: int | None = None) -> Float[Array, "..."]:
        """scaling · low · b, or · b's `part` along the dimension after the rank."""
        b = hooks.weight(self.b, low.dtype)
        return self.scaling * jnp.tensordot(low, b if part is None else b[:, part], axes=1)

    def __call__(self, x: Float[Array, "..."], hooks: Hooks) -> Float[Array, "..."]:
        return self.upper(self.lower(x, hooks), hooks)


class TokenRows(nnx.Module):
    """Rows that stand in place of the vocabulary table's."""

    def __init__(self, values: Float[Array, "rows dim"], ids: Sequence[int]) -> None:
        """
        Args:
            ids: the rows' token ids, ascending.
        """
        self.table = nnx.Param(values.astype(jnp.float32), axes=("rows", "embed"))
        self.ids = tuple(ids)

    def __call__(
        self, x: Float[Array, "rows length dim"], tokens: Int[Array, "rows length"], hooks: Hooks
    ) -> Float[Array, "rows length dim"]:
        """The looked-up `x`, with these rows where their tokens are."""
        ids = jnp.asarray(self.ids, tokens.dtype)
        places = jnp.minimum((ids < tokens[..., None]).sum(-1), len(self.ids) - 1)
        # Looked up in float32: a marker is in every text, and its gradient is the sum over them.
        rows = hooks.weight(self.table, jnp.float32).at[places].get(mode="clip").astype(x.dtype)
        return jnp.where((ids[places] == tokens)[..., None], rows, x)


def with_adapters(model: Any, key: Array, targets: Sequence[str], rank: int, alpha: float) -> Any:
    """The decoder with an `Adapter` at these matrices of every layer; float32, scaled by alpha / rank.

    Args:
        targets: names of a layer's modules that have a `kernel`, and say by `inputs` what of it is contracted.
    """
    model = _same(model)
    for stack in ("layers", "last_layer"):
        layer = getattr(model, stack, None)
        for target in targets if layer is not None else ():
            key, own = jax.random.split(key)
            module = getattr(layer, target)
            module.lora = Adapter(own, module.kernel, module.inputs, rank, alpha / rank)
    return model


def with_token_rows(model: Any, ids: Sequence[int]) -> Any:
    """The decoder with the table's rows of these tokens as parameters of their own, float32."""
    model, ids = _same(model), sorted(set(ids))
    model.token_rows = TokenRows(model.table[jnp.asarray(ids)], ids)
    return model


def with_upper_layers(model: Any, count: int) -> Any:
    """The decoder with the upper `count` layers of its stack in a stack of their own; all of them leave it as it is."""
    model = _same(model)
    graph, stack = nnx.split(model.layers)
    below = jax.tree.leaves(stack)[0].shape[0] - count
    if below:
        model.layers = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[:below], stack))
        model.upper_layers = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[below:], stack))
    return model


def _same(model: Any) -> Any:
    """Another module object with the same parameters."""
    return nnx.merge(*nnx.split(model))
