"""One training step: gradient, clip, AdamW. The state is what a checkpoint holds; the rest of the model is frozen."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxembed.config import OptimizerConfig
from jaxembed.sharding import named_shardings, partition_specs
from jaxembed.training.filters import decays
from jaxembed.training.gradient import BATCH_SPECS, Batch, LossOptions, global_value_and_grad


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes."""

    trainable: nnx.State
    optimizer: optax.OptState
    step: Int[Array, ""]
    """Steps done."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What a step reports, on every device the same."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    """Before clipping."""
    by_data_set: Float[Array, "2 data_sets"]
    """Sum of losses, and number of queries, of each data set."""
    weight_norm: Float[Array, ""]
    """Of the trainable part after the update; not finite where the update ruined it."""


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from zero, then constant, or linear or half a cosine down to zero at `steps`."""
    warmup = config.warmup_steps if config.warmup_steps is not None else round(config.warmup_ratio * steps)
    peak, rest = config.learning_rate, max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) after clipping by the global norm; decay on matrices only."""
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def state_shardings(optimizer: optax.GradientTransformation, trainable: nnx.State, mesh: Mesh) -> TrainState:
    """Where every array of the state lives: moments beside their parameters, counters everywhere."""
    specs = partition_specs(trainable)
    abstract = jax.eval_shape(optimizer.init, trainable)

    def like_trainable(x: Any) -> bool:
        return isinstance(x, nnx.State)

    optimizer_specs = jax.tree.map(
        lambda x: specs if like_trainable(x) else PartitionSpec(), abstract, is_leaf=like_trainable
    )
    everywhere: Any = PartitionSpec()
    return named_shardings(TrainState(specs, optimizer_specs, everywhere), mesh)


def initial_state(optimizer: optax.GradientTransformation, trainable: nnx.State, mesh: Mesh) -> TrainState:
    """The state before the first step, its moments made where they live."""
    shardings = state_shardings(optimizer, trainable, mesh)
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(trainable)
    return TrainState(trainable, moments, jax.device_put(jnp.zeros((), jnp.int32), shardings.step))


def make_step(
    graph: nnx.GraphDef,
    trainable: nnx.State,
    frozen: nnx.State,
    optimizer: optax.GradientTransformation,
    options: LossOptions,
    queries: int,
    mesh: Mesh,
    check_vma: bool = False,
) -> Callable[[TrainState, nnx.State, Batch], tuple[TrainState, StepMetrics]]:
    """The compiled step, (state, frozen, batch) → (state, metrics); it consumes the state that it is given."""
    gradient = global_value_and_grad(graph, trainable, frozen, options, queries, mesh, check_vma)

    def step(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, StepMetrics]:
        (loss, by_data_set), grads = gradient(state.trainable, frozen, batch)
        updates, moments = optimizer.update(grads, state.optimizer, state.trainable)
        updated: Any = optax.apply_updates(state.trainable, updates)
        metrics = StepMetrics(loss, optax.global_norm(grads), by_data_set, optax.global_norm(updated))
        return TrainState(updated, moments, state.step + 1), metrics

    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings(optimizer, trainable, mesh), everywhere))


def put_batch(fields: dict[str, Any], mesh: Mesh) -> Batch:
    """A numpy batch on the devices that need it."""
    names = [field.name for field in dataclasses.fields(Batch)]
    return jax.device_put(Batch(**{name: fields[name] for name in names}), named_shardings(BATCH_SPECS, mesh))
