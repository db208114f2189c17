"""One training step: gradient, clip, AdamW. The state is what a checkpoint holds; the rest of the model is frozen."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxembed import hosts
from jaxembed.config import OptimizerConfig
from jaxembed.data.loader import LOCAL_FIELDS
from jaxembed.errors import InputError
from jaxembed.sharding import named_shardings, partition_specs
from jaxembed.training.filters import decays, is_matrix
from jaxembed.training.gradient import (
    BATCH_SPECS,
    LOG_TEMPERATURE,
    Batch,
    LossOptions,
    global_value_and_grad,
    without_temperature,
)


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
    temperature: Float[Array, ""] | None = None
    """After the update, where it is learned."""


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
    """Of a run of `steps`."""
    return round(config.warmup_ratio * steps) if config.warmup_steps is None else config.warmup_steps


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from zero, then constant, or linear or half a cosine down to zero at `steps`."""
    warmup = warmup_steps(config, steps)
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
    """AdamW (arXiv 1711.05101) after clipping by the global norm; decay on matrices only, or as `config.groups` say.

    Raises, by its `init`:
        InputError: a group takes no parameter.
    """
    if config.groups:
        adamw = optax.chain(
            optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
            _at_rates(config),
            optax.scale_by_learning_rate(learning_rate(config, steps)),
        )
    else:
        adamw = optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decays,
        )
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def group_rates(config: OptimizerConfig, state: Any) -> dict[tuple[Any, ...], tuple[float, float]]:
    """For every parameter its learning rate, as a multiple of the common one, and its weight decay.

    Raises:
        InputError: a group takes no parameter.
    """
    rates, unused = {}, dict(enumerate(config.groups))
    names = {path: "/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}
    for path, name in names.items():
        rate, decay = 1.0, config.weight_decay if is_matrix(path) else 0.0
        for index, group in enumerate(config.groups):
            if re.search(group.match, name):
                unused.pop(index, None)
                rate = 1.0 if group.learning_rate is None else group.learning_rate / config.learning_rate
                decay = decay if group.weight_decay is None else group.weight_decay
                break
        rates[path] = rate, decay
    for index, group in unused.items():
        raise InputError(
            f"optimizer.groups.{index}.match: {group.match!r} takes no parameter (the first group that matches takes "
            f"it); those that train are {', '.join(sorted(names.values()))}"
        )
    return rates


def _at_rates(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adds each parameter's decay to its update, and scales that to the parameter's multiple of the learning rate."""

    def init(params: Any) -> optax.OptState:
        group_rates(config, params)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.OptState]:
        rates, parameters = group_rates(config, params), dict(nnx.to_flat_state(params))

        def scale(path: tuple[Any, ...], change: Any) -> Any:
            rate, decay = rates[path]
            return change.replace(rate * (change[...] + decay * parameters[path][...]))

        return nnx.map_state(scale, updates), state

    return optax.GradientTransformation(init, update)


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
    trainable = hosts.put_tree(trainable, shardings.trainable)  # where all but a learned temperature is already
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(trainable)
    return TrainState(trainable, moments, hosts.put(np.zeros((), np.int32), shardings.step))


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
        updated, temperature = _bounded(updated, options.least_temperature)
        metrics = StepMetrics(loss, optax.global_norm(grads), by_data_set, optax.global_norm(updated), temperature)
        return TrainState(updated, moments, state.step + 1), metrics

    everywhere = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(state_shardings(optimizer, trainable, mesh), everywhere))
    return hosts.compiled_together(jitted)


def _bounded(trainable: nnx.State, least: float) -> tuple[nnx.State, Float[Array, ""] | None]:
    """The trainable part with a learned temperature of at least that much, and what it is."""
    rest, log_temperature = without_temperature(trainable)
    if log_temperature is None:
        return trainable, None
    bounded = jnp.maximum(log_temperature, jnp.log(jnp.float32(least)))
    variable: Any = trainable[LOG_TEMPERATURE]
    return nnx.merge_state(rest, nnx.State({LOG_TEMPERATURE: variable.replace(bounded)})), jnp.exp(bounded)


def put_batch(fields: dict[str, Any], mesh: Mesh) -> Batch:
    """A numpy batch, as `pack_batch` makes it, on the devices that need it."""
    names = [field.name for field in dataclasses.fields(Batch)]
    shardings = named_shardings(BATCH_SPECS, mesh)
    if hosts.count() == 1:
        return jax.device_put(Batch(**{name: fields[name] for name in names}), shardings)
    chips = mesh.shape["data"] * mesh.shape["fsdp"]
    return Batch(
        **{name: _global_array(fields[name], fields["mine"], chips, getattr(shardings, name), LOCAL_FIELDS.get(name))
           for name in names}
    )  # fmt: skip


def _global_array(
    held: np.ndarray, mine: Sequence[int], chips: int, sharding: NamedSharding, axis: int | None
) -> jax.Array:
    """An array of all chips from what this process has of it: everything, or along `axis` the parts of its chips."""
    if axis is None:
        return hosts.put(held, sharding)
    size = held.shape[axis] // len(mine)
    part_of = {int(chip): number for number, chip in enumerate(mine)}
    lead = (slice(None),) * axis

    def part(index: Any) -> np.ndarray:
        number = part_of[(index[axis].start or 0) // size]
        return held[(*lead, slice(number * size, (number + 1) * size))]

    shape = (*held.shape[:axis], chips * size, *held.shape[axis + 1 :])
    return jax.make_array_from_callback(shape, sharding, part)
