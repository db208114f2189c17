"""A plan: what a run, or encoding, would need and cost on a TPU slice, found without one."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxembed.checkpoint.pretrained import abstract_decoder
from jaxembed.config import TrainConfig, load_config
from jaxembed.embedder import CALL_TOKENS, embedding_function
from jaxembed.errors import InputError
from jaxembed.models import Family
from jaxembed.ops.attention import choose_kernel
from jaxembed.planning.chips import CHIPS, GIB, Chip
from jaxembed.planning.compiled import CACHE, Compiled, compile_program
from jaxembed.planning.flops import Flops, Useful, traced_flops, useful_flops
from jaxembed.planning.memory import Memory, estimated_memory
from jaxembed.planning.program import Program, on_mesh, planned_options, training_program, unseen_examples
from jaxembed.planning.shapes import decoder_shape
from jaxembed.planning.topologies import Topology, topology_devices
from jaxembed.planning.workload import Lengths, Workload, configured_negatives, data_workload, drawn_workload, read_data
from jaxembed.sharding import BATCH_AXES, check_divisible, compute_dtype, make_mesh
from jaxembed.text.format import DEFAULT_TEXT_FORMAT, TextFormat
from jaxembed.text.packing import call_shapes, plan_calls
from jaxembed.text.tokenizer import TextTokenizer
from jaxembed.training.filters import count
from jaxembed.training.objective import LossOptions
from jaxembed.training.prepare import scratch_decoder
from jaxembed.training.texts import configured_format, prepare_texts, train_token_ids

COMPILED_CHANGES = 2
"""Changes of a config that does not fit that are compiled."""

_ENCODED_TEXTS = 8192  # packed together when texts are encoded
_ROOM = 0.95  # of the memory that a change is let fill by the estimate


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is planned."""

    path: str
    """Of the config."""
    overrides: tuple[str, ...]
    topology: Topology
    lengths: Lengths | None = None
    """None: from the data."""
    examples: int | None = None
    """Of an epoch, where the lengths are given."""
    cache: str | None = CACHE

    def config(self) -> TrainConfig:
        return load_config(self.path, self.overrides)


@dataclasses.dataclass(frozen=True)
class Load:
    """What a step (or, of encoding, the largest call) works on."""

    texts: float
    tokens: float
    positions: int
    """Token positions that are computed."""
    usual_share: float
    """Positions of a usual step, as a share of those of the largest shape, which is the one compiled."""
    rows: str
    shapes: int
    """That are compiled in all."""
    source: str
    """Where the lengths are from."""
    steps_of_epoch: float | None
    """None where the number of examples is not known."""

    @property
    def density(self) -> float:
        return self.tokens / self.positions


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The least seconds that a step can take, by what limits it."""

    compute: float
    memory: float
    links: float

    @property
    def largest(self) -> float:
        return max(self.compute, self.memory, self.links)

    @property
    def limit(self) -> str:
        return max(("compute", "memory", "links"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of the config that would make it fit."""

    overrides: tuple[str, ...]
    estimate: int
    """Bytes on each device, by the formula."""
    compiled: Compiled | None
    """None: not compiled."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that the page says."""

    inputs: Inputs
    work: str
    """ "training" or "encoding"."""
    mesh: dict[str, int]
    shape: Any
    """The family's config."""
    trainable: str
    trained: int
    """Parameters."""
    frozen: int
    kernel: str
    dtype: str
    load: Load
    memory: Memory
    compiled: Compiled
    flops: Flops
    """Of the compiled shape, on all devices."""
    useful: Useful
    bounds: Bounds
    changes: tuple[Change, ...] = ()

    @property
    def topology(self) -> Topology:
        return self.inputs.topology

    @property
    def chip(self) -> Chip:
        return CHIPS[self.topology.generation]

    @property
    def texts_a_second(self) -> float:
        """At the lower bound of the step time."""
        return self.load.texts / (self.bounds.largest * self.load.usual_share)

    @property
    def chip_hours_of_epoch(self) -> float | None:
        """At the lower bound of the step time."""
        steps = self.load.steps_of_epoch
        if steps is None:
            return None
        return steps * self.bounds.largest * self.load.usual_share * self.topology.chips / 3600


def plan_training(inputs: Inputs, *, compile_changes: int = COMPILED_CHANGES) -> Plan:
    """Compiles the step that the config would run on the slice, and looks for a change where it does not fit.

    Args:
        compile_changes: how many of the changes are compiled.

    Raises:
        InputError: no libtpu, an unknown model, data that is not here, or a mesh or batch that does not fit the slice.
    """
    found = TracedTraining.of(inputs)
    compiled = compile_program(found.traced, inputs.topology, found.program.mesh, inputs.cache)
    changes = () if compiled.fits else tuple(_changes(inputs, found, compiled, compile_changes))
    program, workload, training = found.program, found.workload, inputs.config().training
    layout = workload.layout
    return Plan(
        inputs=inputs,
        work="training",
        mesh=dict(program.mesh.shape),
        shape=found.shape,
        trainable=training.trainable,
        trained=count(program.trainable),
        frozen=count(program.frozen),
        kernel=program.options.attention_kernel,
        dtype=str(jnp.dtype(program.options.dtype)),
        load=Load(
            texts=workload.texts,
            tokens=workload.tokens,
            positions=workload.positions,
            usual_share=workload.usual_share,
            rows=f"{layout.chunks[-1]} chunk(s) of {layout.chunk_rows} rows of {layout.row_length} a device",
            shapes=len(layout.chunks),
            source=workload.source,
            steps_of_epoch=workload.steps_of_epoch,
        ),
        memory=found.memory,
        compiled=compiled,
        flops=found.flops,
        useful=useful_flops(
            found.shape, workload.tokens, workload.squares, workload.texts, training.trainable,
            program.options.pooling, queries=workload.queries, upper_layers=training.last_layers or 0,
        ),
        bounds=_bounds(inputs.topology, found.flops, _training_traffic(found), compiled),
        changes=changes,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TracedTraining:
    """A step as far as it is known without compiling it."""

    program: Program
    shape: Any
    workload: Workload
    traced: Any
    flops: Flops
    memory: Memory

    @staticmethod
    def of(inputs: Inputs, origin: "_Origin | None" = None) -> "TracedTraining":
        """
        Args:
            origin: of the same config, or of one that differs in mesh, chunks, policies or what trains; None: found.
        """
        config, topology = inputs.config(), inputs.topology
        mesh = _mesh(config, topology)
        origin = origin or _Origin.of(inputs, config)
        shape, lengths = origin.shape, inputs.lengths
        if lengths is not None:
            chips = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
            workload = drawn_workload(config, lengths, inputs.examples, chips=chips, dim=shape.dim)
            examples = unseen_examples(config, configured_negatives(config))
            tokens: Sequence[int] = range(len(config.training.train_tokens))
        else:
            assert origin.tokenizer is not None
            examples = origin.examples
            workload = data_workload(config, examples, origin.tokenizer, mesh=mesh, dim=shape.dim)
            tokens = train_token_ids(config.training, origin.tokenizer)
        options = planned_options(config, examples, origin.text_format, shape, list(mesh.devices.flat))
        steps = config.training.steps
        if steps is None and workload.steps_of_epoch is not None and config.training.epochs is not None:
            steps = max(1, round(config.training.epochs * workload.steps_of_epoch))
        program = training_program(
            config, origin.family, shape, options, workload.fields, mesh, tokens=tokens, steps=steps
        )
        traced = program.trace()
        jaxpr = traced.jaxpr.jaxpr
        memory = estimated_memory(program, jaxpr)
        return TracedTraining(program, shape, workload, traced, traced_flops(jaxpr, shape.causal), memory)


def plan_encoding(inputs: Inputs) -> Plan:
    """Compiles the encoder's largest call for the slice; the shapes of its other calls are traced."""
    config, topology = inputs.config(), inputs.topology
    mesh, origin = _mesh(config, topology), _Origin.of(inputs, config)
    text_format = origin.text_format
    dtype = compute_dtype(config.model.compute_dtype, list(mesh.devices.flat))
    graph, state = abstract_decoder(origin.family, origin.shape)
    check_divisible(state, mesh)
    state = on_mesh(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), state), mesh)
    kernel = choose_kernel("auto", list(mesh.devices.flat), head_dim=origin.shape.head_dim, dtype=dtype)
    embed = embedding_function(graph, state, text_format.pooling, dtype, mesh, kernel)
    chips = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    shapes = call_shapes(text_format.max_length, CALL_TOKENS["tpu"], chips)
    lengths = _encoded_lengths(inputs, config, origin)
    calls = plan_calls(lengths, shapes)
    split = NamedSharding(mesh, PartitionSpec(BATCH_AXES))

    def program(shape: Any) -> Program:
        sizes = (shape.length, shape.length, shape.slots, shape.slots)
        arrays = [jax.ShapeDtypeStruct((shape.rows, size), jnp.int32, sharding=split) for size in sizes]
        options = LossOptions(dtype=dtype, pooling=text_format.pooling)
        return Program(embed, (state, *arrays), nnx.State({}), state, None, options, mesh)

    largest = max({shape for shape, _ in calls}, key=lambda shape: (shape.tokens, shape.length))
    traced = program(largest).trace()
    flops = traced_flops(traced.jaxpr.jaxpr, origin.shape.causal)
    memory = estimated_memory(program(largest), traced.jaxpr.jaxpr)
    compiled = compile_program(traced, topology, mesh, inputs.cache)
    # Calls of all shapes are about as large: the texts of one are those that so many positions hold on average.
    share = largest.tokens / sum(shape.tokens for shape, _ in calls)
    texts, tokens = len(lengths) * share, float(lengths.sum()) * share
    squares = float((lengths.astype(np.float64) ** 2).sum()) * share
    weights = 2.0 * count(state) * jnp.dtype(dtype).itemsize / max(1, mesh.shape["tensor"])
    return Plan(
        inputs=inputs,
        work="encoding",
        mesh=dict(mesh.shape),
        shape=origin.shape,
        trainable="none",
        trained=0,
        frozen=count(state),
        kernel=kernel,
        dtype=str(jnp.dtype(dtype)),
        load=Load(
            texts=texts,
            tokens=tokens,
            positions=largest.tokens,
            usual_share=1.0,
            rows=f"{largest.rows // chips} rows of {largest.length} a device",
            shapes=len(shapes),
            source="the token cache" if inputs.lengths is None else str(inputs.lengths),
            steps_of_epoch=None if inputs.examples is None else inputs.examples / texts,
        ),
        memory=memory,
        compiled=compiled,
        flops=flops,
        useful=useful_flops(origin.shape, tokens, squares, texts, "none", text_format.pooling),
        bounds=_bounds(topology, flops, weights, compiled),
    )


@dataclasses.dataclass(frozen=True)
class _Origin:
    """What a plan takes from the model's directory and from the data, where they are here."""

    family: Family
    shape: Any
    text_format: TextFormat
    examples: list[Any]
    tokenizer: TextTokenizer | None

    @staticmethod
    def of(inputs: Inputs, config: TrainConfig) -> "_Origin":
        examples, tokenizer = ([], None) if inputs.lengths is not None else read_data(config)
        if config.model.path is not None:
            family, shape = decoder_shape(config.model)
        else:
            tokens = _scratch_tokens(config) if tokenizer is None else tokenizer.vocab_size
            family, shape = scratch_decoder(config, tokens)
        given = configured_format(config) or DEFAULT_TEXT_FORMAT
        text_format = given if tokenizer is None else tokenizer.text_format
        lengths = inputs.lengths
        if lengths is not None and lengths.longest > text_format.max_length:
            raise InputError(
                f"--lengths: texts of {lengths.longest} tokens, but text_format.max_length cuts them at "
                f"{text_format.max_length}"
            )
        return _Origin(family, shape, text_format, examples, tokenizer)


def _scratch_tokens(config: TrainConfig) -> int:
    """Of a tokenizer that is not read, or not trained yet."""
    scratch = config.model.scratch
    assert scratch is not None
    tokens = scratch.vocab_size or config.tokenizer.train_vocab_size
    if tokens is None:
        raise InputError("model.scratch.vocab_size: with --lengths the tokenizer is not read; say how many ids it has")
    return tokens


def _mesh(config: TrainConfig, topology: Topology) -> Mesh:
    return make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, topology_devices(topology))


def _encoded_lengths(inputs: Inputs, config: TrainConfig, origin: _Origin) -> np.ndarray:
    if inputs.lengths is not None:
        return inputs.lengths.draw(_ENCODED_TEXTS, 0)
    assert origin.tokenizer is not None
    lengths = prepare_texts(config, origin.examples, origin.tokenizer)[0].lengths
    chosen = np.random.default_rng(0).permutation(len(lengths))[:_ENCODED_TEXTS]
    return np.asarray(lengths)[chosen].astype(np.int64)


def _bounds(topology: Topology, flops: Flops, traffic: float, compiled: Compiled) -> Bounds:
    """From the peaks of the chips, as if each part ran alone and at its best."""
    chip, devices = CHIPS[topology.generation], topology.devices
    each = topology.devices_of_chip
    return Bounds(
        compute=flops.total / topology.chips / chip.flops,
        memory=traffic / (chip.memory_bandwidth / each),
        # A device can send half of what all links carry both ways.
        links=sum(moved.wire_bytes for moved in compiled.moved) / (chip.link_bandwidth / 2) if devices > 1 else 0.0,
    )


def _training_traffic(found: TracedTraining) -> float:
    """Bytes that a step reads and writes in a device's memory at least.

    The weights of all layers, in the dtype of the computation, once for every pass over a chunk: forward, again where
    the chunk and where the layer is computed again, and backward. What trains, with its moments and gradient, is read
    and written once.
    """
    program, options, layout = found.program, found.program.options, found.workload.layout
    matrices = 12 * found.shape.dim**2 * found.shape.layers * jnp.dtype(options.dtype).itemsize
    chunks = layout.chunks[-1]
    passes = 2 + (options.chunk_checkpoint != "none" and chunks > 1) + (options.layer_checkpoint == "full")
    memory = found.memory
    return (
        matrices / program.mesh.shape["tensor"] * passes * chunks
        + 2 * (memory.trained + memory.optimizer + memory.gradients)
    )  # fmt: skip


def _changes(inputs: Inputs, found: TracedTraining, compiled: Compiled, most: int) -> Iterator[Change]:
    """The smallest changes that make it fit by the formula, of which `most` are compiled, up to the first that fits."""
    origin = _Origin.of(inputs, inputs.config())
    limit = (compiled.limit or CHIPS[inputs.topology.generation].device_memory) * GIB
    # The estimate errs alike for programs that differ little: it is scaled to what the compiler said.
    scale = max(1.0, compiled.needed * GIB / found.memory.total) if compiled.needed else 1.0
    tried = 0
    for overrides in _candidates(inputs.config(), found):
        changed = dataclasses.replace(inputs, overrides=(*inputs.overrides, *overrides))
        try:
            step = TracedTraining.of(changed, origin)
        except InputError:  # a mesh that does not divide this model or batch
            continue
        estimate = int(step.memory.total * scale)
        if estimate > _ROOM * limit:
            continue
        if tried == most:
            yield Change(overrides, estimate, None)
            return
        tried += 1
        result = compile_program(step.traced, inputs.topology, step.program.mesh, inputs.cache)
        yield Change(overrides, estimate, result)
        if result.fits:
            return


def _candidates(config: TrainConfig, found: TracedTraining) -> Iterator[tuple[str, ...]]:
    """Overrides from the one that changes least: first those that leave results and work, then those that cost work,
    then those that train something else."""
    rows = found.workload.layout.chunk_rows
    chunks = [("--training.chunk_rows", str(rows >> shift)) for shift in range(1, rows.bit_length())]
    sizes = found.program.mesh.shape
    chips = sizes["data"] * sizes["fsdp"]
    shards = [size for size in (sizes["fsdp"] << shift for shift in range(1, 11)) if chips % size == 0]
    split = [("--mesh.data", "-1", "--mesh.fsdp", str(size)) for size in shards]
    again = ("--model.layer_checkpoint", "full") if config.model.layer_checkpoint != "full" else ()
    yield from chunks
    yield from split
    widest = split[-1] if split else ()
    if widest:
        yield from ((*chunk, *widest) for chunk in chunks)
    if again:
        yield again
        yield from ((*again, *chunk) for chunk in chunks[::2])
        yield from ((*again, *widest, *chunk) for chunk in chunks[::2] if widest)
    smallest = (*widest, *again, *(chunks[-1] if chunks else ()))
    if config.training.trainable != "full" and config.model.param_dtype != "bfloat16":
        yield (*smallest, "--model.param_dtype", "bfloat16")
    if config.training.trainable == "full":
        for trainable in ("lora", "bitfit"):
            yield (*widest, "--training.trainable", trainable, "--model.param_dtype", "bfloat16")
            yield (*smallest, "--training.trainable", trainable, "--model.param_dtype", "bfloat16")
