"""The real training step, and the real encoder, for devices that are not there: shapes in place of arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxembed.checkpoint.pretrained import abstract_decoder
from jaxembed.config import EMBEDDING_KINDS, TrainConfig
from jaxembed.data.sources import Examples
from jaxembed.errors import InputError
from jaxembed.models import Family
from jaxembed.models.pooled import check_pooling
from jaxembed.ops.attention import choose_kernel
from jaxembed.sharding import check_divisible, compute_dtype, named_shardings, partition_specs
from jaxembed.text.format import TextFormat
from jaxembed.training.batch import BATCH_SPECS, Batch
from jaxembed.training.filters import trains, with_parts
from jaxembed.training.gradient import with_temperature
from jaxembed.training.objective import LossOptions
from jaxembed.training.prepare import loss_options, parameter_dtype
from jaxembed.training.step import TrainState, make_optimizer, make_step, state_shardings

_ANY_STEPS = 1000  # of the schedule, where the length of the run is not known


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and the abstract arguments that it runs on."""

    function: Any
    arguments: tuple[Any, ...]
    trainable: nnx.State
    frozen: nnx.State
    optimizer: Any
    """The optimiser's abstract state; None: nothing trains."""
    options: LossOptions
    mesh: Mesh

    def trace(self) -> Any:
        """The traced program, from which its FLOPs are read and which lowers."""
        return self.function.trace(*self.arguments)


def training_program(
    config: TrainConfig,
    family: Family,
    shape: Any,
    options: LossOptions,
    fields: dict[str, np.ndarray],
    mesh: Mesh,
    *,
    tokens: Sequence[int] = (),
    steps: int | None = None,
) -> Program:
    """The step that a run of this config compiles.

    Args:
        shape: the family's config.
        fields: a batch in numpy, of which the shapes are read.
        tokens: ids of `training.train_tokens`.
        steps: of the run.

    Raises:
        InputError: the mesh does not divide the model.
    """
    graph, trainable, frozen = abstract_parameters(config, family, shape, mesh, tokens)
    optimizer = make_optimizer(config.optimizer, steps or _ANY_STEPS)
    step = make_step(graph, trainable, frozen, optimizer, options, len(fields["own"]), mesh)
    shardings = state_shardings(optimizer, trainable, mesh)
    moments = placed(jax.eval_shape(optimizer.init, trainable), shardings.optimizer)
    state = TrainState(trainable, moments, placed(jax.ShapeDtypeStruct((), jnp.int32), shardings.step))
    arguments = (state, frozen, abstract_batch(fields, mesh))
    return Program(step, arguments, trainable, frozen, moments, options, mesh)


def abstract_parameters(
    config: TrainConfig, family: Family, shape: Any, mesh: Mesh, tokens: Sequence[int]
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Structure, and what trains (float32) and what is frozen, without any memory, each with its sharding."""
    graph, state = abstract_decoder(family, shape)
    check_divisible(state, mesh)
    # Random weights are made in float32, loaded ones as the config says.
    base = parameter_dtype(config) if config.model.path is not None else jnp.float32
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, base), state)

    def make(state: nnx.State) -> Any:
        return with_parts(nnx.merge(graph, state), config.training, shape.layers, tokens, config.seed)

    graph, trainable, frozen = nnx.split(jax.eval_shape(make, state), trains(config.training, shape.layers), ...)
    trainable = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trainable)
    if config.loss.learn_temperature:
        trainable = jax.eval_shape(lambda state: with_temperature(state, config.loss.temperature), trainable)
    return graph, on_mesh(trainable, mesh), on_mesh(frozen, mesh)


def planned_options(
    config: TrainConfig,
    examples: Sequence[Examples],
    text_format: TextFormat,
    shape: Any,
    devices: Sequence[Any],
) -> LossOptions:
    """The loss as a run on these devices computes it.

    Raises:
        InputError: a loss that its data has not what it takes for, or a pooling that does not suit the attention.
    """
    check_pooling(text_format.pooling, shape.causal)
    options = loss_options(config, examples, text_format, shape.dim)
    dtype = compute_dtype(config.model.compute_dtype, list(devices))
    kernel = choose_kernel(config.model.attention_kernel, devices, head_dim=shape.head_dim, dtype=dtype)
    return dataclasses.replace(options, dtype=dtype, attention_kernel=kernel)


def unseen_examples(config: TrainConfig, negatives: int) -> list[Examples]:
    """Two examples in the place of each source that is not here: what they have beside texts, which the loss asks.

    Raises:
        InputError: a loss that needs a teacher's embeddings, of a width that is not known.
    """
    found = []
    for source in config.data.train:
        own = negatives if source.hard_negatives is None else source.hard_negatives
        kind = None if source.loss is None else source.loss.kind
        if kind in EMBEDDING_KINDS:
            raise InputError(
                f"--lengths: the loss {kind} of {source.name} needs a teacher's embeddings; plan with the data"
            )
        scores = None
        if kind == "cosent" or getattr(source, "score", None) is not None:
            scores, own = np.ones((2, 1), np.float32), 0
        elif kind in ("kl", "margin_mse"):
            scores = np.ones((2, 1 + own), np.float32)
        texts = ["", ""]
        hard = [texts[:1] * own] * 2 if own else []
        found.append(Examples(source.name, texts, texts, hard, texts, {}, "", scores=scores))
    return found


def abstract_batch(fields: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """The shapes of a packed batch, each where it will lie."""
    names = [field.name for field in dataclasses.fields(Batch)]
    shapes: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(fields[name].shape, jax.dtypes.canonicalize_dtype(fields[name].dtype))
        for name in names
    }
    return placed(Batch(**shapes), named_shardings(BATCH_SPECS, mesh))


def on_mesh(state: nnx.State, mesh: Mesh) -> nnx.State:
    """The abstract state with the shardings of the rules table."""
    return placed(state, named_shardings(partition_specs(state), mesh))


def placed(tree: Any, shardings: Any) -> Any:
    """The abstract arrays with these shardings, which `eval_shape` drops."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
