"""The gradient of the contrastive loss over any global batch, on any mesh, at the memory of one chunk.

GradCache (arXiv 2101.06983) is three calls in JAX: a `lax.map` over chunks of rows, each under `jax.checkpoint`, then
the loss on all embeddings. The whole is one `shard_map`, in which each chip computes *its share* of the loss: no `psum`
inside the differentiated function, one per gradient leaf after it, in float32, over the axes the leaf is not split by.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from jaxembed.models.bloom import LAYER_CHECKPOINTS
from jaxembed.models.pooled import pooled_states
from jaxembed.ops.norms import unit_norm
from jaxembed.sharding import BATCH_AXES, Chips, Hooks, manual, partition_specs
from jaxembed.training.batch import BATCH_SPECS, Batch
from jaxembed.training.objective import LossOptions, batch_losses

LOG_TEMPERATURE = "log_temperature"
"""Name, beside the decoder's parameters, of a temperature that is learned."""


def with_temperature(trainable: nnx.State, temperature: float) -> nnx.State:
    """The trainable part with the logarithm of a learned temperature as one more scalar."""
    scalar = nnx.Param(jnp.log(jnp.float32(temperature)), axes=())
    return nnx.merge_state(trainable, nnx.State({LOG_TEMPERATURE: scalar}))


def without_temperature(trainable: nnx.State) -> tuple[nnx.State, Float[Array, ""] | None]:
    """The decoder's trainable part, and the logarithm of the temperature where it is learned."""
    if LOG_TEMPERATURE not in trainable:
        return trainable, None
    scalar, rest = nnx.split_state(trainable, lambda path, _: path == (LOG_TEMPERATURE,), ...)
    variable: Any = scalar[LOG_TEMPERATURE]
    return rest, variable[...]


def embed_rows(
    model: Any, tokens: Array, segments: Array, first: Array, last: Array, options: LossOptions, hooks: Hooks
) -> Float[Array, "rows slots dim"]:
    """Embeddings of every slot of packed rows, float32, of unit length: the loss compares by cosine."""
    vectors = pooled_states(
        model, tokens, segments, first, last, options.pooling,
        dtype=options.dtype, hooks=hooks, layer_checkpoint=options.layer_checkpoint,
        attention_kernel=options.attention_kernel,
    )  # fmt: skip
    return unit_norm(vectors)


def local_loss(
    graph: nnx.GraphDef, options: LossOptions, queries: int, hooks: Hooks
) -> Callable[[nnx.State, nnx.State, Batch], tuple[Float[Array, ""], Float[Array, "2 data_sets"]]]:
    """A function of (trainable, frozen, this chip's part of a batch): its share of the mean loss over all `queries`.

    The second result is this chip's sum of losses, and number of queries, of each data set.
    """

    def loss(trainable: nnx.State, frozen: nnx.State, batch: Batch) -> tuple[Array, Array]:
        trainable, log_temperature = without_temperature(trainable)
        chunks = batch.tokens.shape[0]
        recomputed = options.chunk_checkpoint != "none" and chunks > 1

        def embed(chunk: tuple[Array, Array, Array, Array]) -> Array:
            here = trainable, frozen
            if recomputed:
                # Bound to the chunk; JAX would gather the weights of all layers before the loop, and keep them. Each
                # part by itself: together both would be differentiated.
                here = tuple(jax.lax.optimization_barrier((part, chunk))[0] for part in here)
            return embed_rows(nnx.merge(graph, *here), *chunk, options, hooks)

        if recomputed:
            embed = jax.checkpoint(embed, policy=LAYER_CHECKPOINTS[options.chunk_checkpoint], prevent_cse=False)
        fields = batch.tokens, batch.segments, batch.first, batch.last
        if chunks == 1:  # a loop of one turn would hold weights and activations as its results
            embedded = embed(jax.tree.map(lambda x: x[0], fields))[None]
        else:
            embedded = jax.lax.map(embed, fields)
        everyone = hooks.everyone(embedded.reshape(-1, embedded.shape[-1])[batch.pick])
        losses = batch_losses(everyone, batch, options, log_temperature)
        members = batch.data_set == jnp.arange(options.data_sets)[:, None]
        by_data_set = jnp.stack([jnp.where(members, losses, 0.0).sum(1), members.sum(1).astype(jnp.float32)])
        return losses.sum() / queries, by_data_set

    return loss


def missing_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """The batch axes over which an array of this spec is the same on every chip."""
    return tuple(axis for axis in BATCH_AXES if axis not in jax.tree.leaves(tuple(spec)))


def global_value_and_grad(
    graph: nnx.GraphDef,
    trainable: nnx.State,
    frozen: nnx.State,
    options: LossOptions,
    queries: int,
    mesh: Mesh,
    check_vma: bool = False,
) -> Callable[[nnx.State, nnx.State, Batch], tuple[tuple[Array, Array], nnx.State]]:
    """((mean loss, loss sums and counts by data set), gradient of the trainable part) of a global batch.

    Args:
        trainable, frozen: the split state, real or abstract; only its axes are read.
        check_vma: False where a Pallas kernel runs inside; True in the tests on CPU of this same code.
    """
    trainable_specs, frozen_specs = manual(partition_specs(trainable)), manual(partition_specs(frozen))
    chip_loss = local_loss(graph, options, queries, Chips())
    # Beside an automatic axis XLA cannot compile a sum over axes that have one chip each. Only types need it.
    summed = {axis for axis in BATCH_AXES if check_vma or mesh.shape[axis] > 1}

    def each(function: Callable[..., Array], tree: Any, specs: Any) -> Any:
        def apply(x: Array, spec: PartitionSpec) -> Array:
            return function(x, missing_axes(spec)) if missing_axes(spec) else x

        return jax.tree.map(apply, tree, specs)

    def total(x: Any, axes: tuple[str, ...]) -> Any:
        axes = tuple(axis for axis in axes if axis in summed)
        return jax.lax.psum(x, axes) if axes else x

    def per_chip(trainable: nnx.State, frozen: nnx.State, batch: Batch) -> Any:
        vary = partial(jax.lax.pcast, to="varying")  # changes types alone: nothing may be summed inside a loop
        trainable, frozen = each(vary, trainable, trainable_specs), each(vary, frozen, frozen_specs)
        batch = each(vary, batch, BATCH_SPECS)
        (loss, by_data_set), gradient = jax.value_and_grad(chip_loss, has_aux=True)(trainable, frozen, batch)
        gradient = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
        return total((loss, by_data_set), BATCH_AXES), each(total, gradient, trainable_specs)

    return jax.shard_map(
        per_chip,
        mesh=mesh,
        in_specs=(trainable_specs, frozen_specs, BATCH_SPECS),
        out_specs=((PartitionSpec(), PartitionSpec()), trainable_specs),
        axis_names=set(BATCH_AXES),
        check_vma=check_vma,
    )
