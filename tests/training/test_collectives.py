"""What a compiled training step moves between chips, for CPU and for TPU, and what its trace computes again."""

import dataclasses
import functools
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from jaxembed.config import OptimizerConfig
from jaxembed.data.loader import RowLayout, TextTable, pack_batch
from jaxembed.models.bloom import BloomConfig
from jaxembed.planning.hlo import Collective, read_collectives
from jaxembed.sharding import Alone, make_mesh, named_shardings, partition_specs
from jaxembed.training.batch import BATCH_SPECS, Batch
from jaxembed.training.filters import TRAINABLE
from jaxembed.training.gradient import global_value_and_grad, local_loss
from jaxembed.training.objective import LossOptions
from jaxembed.training.step import TrainState, make_optimizer, make_step, state_shardings

from blooms import QUICK, abstract_bloom

CONFIG = BloomConfig(vocab_size=6007, dim=256, layers=3, heads=8)
"""The table is larger than all else, and no activation has as many numbers as a weight."""
WIDE = BloomConfig(vocab_size=12_007, dim=1024, layers=3, heads=16)
"""For TPUs, whose compiler reduces narrow matrices whole: as wide as bloom-560m."""
QUERIES, NEGATIVES, ROW, SLOTS, CHUNKS, CHUNK_ROWS = 128, 1, 48, 4, 3, 11
TEXTS = QUERIES * (2 + NEGATIVES)
LIMIT = 1.25
"""Embeddings gathered, or their gradients reduced, over all texts."""
SCALARS = 64
"""Bytes that losses, their counts and the gradient's norm may take."""


def batch_fields(chips: int) -> dict[str, np.ndarray]:
    """A batch as the loader packs it."""
    random = np.random.default_rng(0)
    lengths = random.integers(3, 25, TEXTS)
    texts: Any = [np.zeros(length, np.int32) for length in lengths]
    table = TextTable((texts,), np.zeros(1, int), lengths, np.arange(TEXTS, dtype=np.uint64))
    rows = -(-int(lengths.sum() * 1.15) // ROW)
    layout = RowLayout(ROW, SLOTS, -(-rows // (chips * CHUNKS)), chips, (CHUNKS,), density=1.0)
    return pack_batch(table, np.arange(TEXTS).reshape(2 + NEGATIVES, QUERIES).T, np.zeros(QUERIES, int), layout)


def placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings)


@dataclasses.dataclass(frozen=True)
class Compiled:
    config: BloomConfig
    mesh: Mesh
    moves: list[Collective]
    trainable: list[tuple[tuple[int, ...], tuple[str, ...]]]
    """Part on a chip, and the batch axes over which it is the same, of every leaf."""
    kernels: list[tuple[int, ...]]
    """Whole shapes of the matrices of a layer."""
    tokens: int
    """Of a chip and chunk."""
    item: int
    """Bytes of an activation's number."""

    @property
    def trainable_bytes(self) -> int:
        """On a chip, in float32."""
        return sum(4 * math.prod(part) for part, _ in self.trainable)

    @property
    def lookup_bytes(self) -> int:
        return self.tokens * self.config.dim * self.item

    def over(self, *axes: str) -> list[Collective]:
        return [move for move in self.moves if set(move.axes(self.mesh)) & set(axes)]


def compiled(device: str, trainable: str, sizes: tuple[int, int, int]) -> Compiled:
    """The whole step from shapes alone: `cpu`, or the name of a TPU topology, with the slices after a comma."""
    config = CONFIG if device == "cpu" else WIDE
    if device == "cpu":
        mesh = make_mesh(*sizes)
    else:
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
        from jax.experimental import topologies

        name, _, slices = device.partition(",")
        options = {"num_slices": int(slices)} if slices else {}
        mesh = make_mesh(*sizes, devices=list(topologies.get_topology_desc(name, "tpu", **options).devices))
    chips = mesh.shape["data"] * mesh.shape["fsdp"]
    dtype = jnp.float32 if device == "cpu" else jnp.bfloat16
    graph, train, frozen = nnx.split(abstract_bloom(config), TRAINABLE[trainable], ...)
    optimizer = make_optimizer(OptimizerConfig(), 10)
    step: Any = make_step(graph, train, frozen, optimizer, LossOptions(dtype=dtype), QUERIES, mesh)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(train, jax.eval_shape(optimizer.init, train), count)
    fields = batch_fields(chips)
    assert len(fields["tokens"]) == CHUNKS
    batch = Batch(**{field.name: jnp.asarray(fields[field.name]) for field in dataclasses.fields(Batch)})
    arguments = (
        placed(state, state_shardings(optimizer, train, mesh)),
        placed(frozen, named_shardings(partition_specs(frozen), mesh)),
        placed(batch, named_shardings(BATCH_SPECS, mesh)),
    )
    text = step.lower(*arguments).compile(QUICK if device == "cpu" else None).as_text()
    leaves = jax.tree.leaves(arguments[0].trainable)
    return Compiled(
        config=config,
        mesh=mesh,
        moves=read_collectives(text),
        trainable=[(leaf.sharding.shard_shape(leaf.shape), unsplit(leaf)) for leaf in leaves],
        kernels=kernel_shapes(config),
        tokens=fields["tokens"][0].size // chips,
        item=jnp.dtype(dtype).itemsize,
    )


@functools.cache
def kernel_shapes(config: BloomConfig) -> list[tuple[int, ...]]:
    """Of the matrices of a layer."""
    state = nnx.state(abstract_bloom(config))
    return [tuple(leaf.shape) for path, leaf in nnx.to_flat_state(state) if path[::2] == ("last_layer", "kernel")]


def unsplit(leaf: Any) -> tuple[str, ...]:
    """Axes of the mesh that have several chips and do not split the leaf, of those that split the batch."""
    named = [name for name in leaf.sharding.spec if name]
    return tuple(axis for axis in ("data", "fsdp") if axis not in named and leaf.sharding.mesh.shape[axis] > 1)


compiled_once = functools.cache(compiled)
CPU = [
    pytest.param("cpu", "full", (2, 4, 1)),
    pytest.param("cpu", "full", (8, 1, 1), marks=pytest.mark.slow),
    pytest.param("cpu", "full", (1, 8, 1), marks=pytest.mark.slow),
    pytest.param("cpu", "bitfit", (2, 4, 1), marks=pytest.mark.slow),
]
TPU = [
    pytest.param("v5e:2x4", trainable, sizes, marks=pytest.mark.tpu)
    for trainable, sizes in (("full", (2, 4, 1)), ("bitfit", (2, 4, 1)), ("full", (1, 8, 1)))
]
every_step = pytest.mark.parametrize(("device", "trainable", "sizes"), [*CPU, *TPU])
every_tpu_step = pytest.mark.parametrize(("device", "trainable", "sizes"), TPU)


@every_step
def test_gradients_cross_the_data_axis_once(device: str, trainable: str, sizes: Any) -> None:
    """Outside of the loops over chunks and layers, in float32, and nothing else of their size does."""
    step = compiled_once(device, trainable, sizes)
    over_data = step.over("data")
    assert not [move for move in over_data if move.in_loop]
    reduced = Counter(
        (move.shape, move.axes(step.mesh)) for move in over_data if move.kind == "all-reduce" and move.dtype == "f32"
    )
    gradients = Counter((part, axes) for part, axes in step.trainable if "data" in axes)
    assert not gradients - reduced
    more = reduced - gradients
    assert sum(4 * math.prod(shape) * count for (shape, _), count in more.items()) <= SCALARS
    kinds = {move.kind for move in over_data if move.bytes > SCALARS} - {"all-reduce"}
    assert kinds <= {"all-gather", "reduce-scatter", "collective-permute"}, "those of the embeddings"
    assert (sizes[0] > 1) == bool(gradients)


@every_step
def test_token_states_cross_for_the_look_up_alone(device: str, trainable: str, sizes: Any) -> None:
    """Everything that moves in the loops: weights, their gradients, token ids, and the rows of the table."""
    step = compiled_once(device, trainable, sizes)
    fsdp = sizes[1]
    whole = {math.prod(kernel) for kernel in step.kernels}
    parts = {size // fsdp for size in whole}
    lookups = 0
    for move in (move for move in step.moves if move.in_loop):
        assert move.axes(step.mesh) == ("fsdp",)
        numbers = math.prod(move.shape)
        if move.kind == "all-to-all":
            assert move.bytes == step.lookup_bytes
            lookups += move.times
        elif move.dtype == "s32":
            assert move.bytes == 4 * step.tokens * fsdp, "the token ids of a group"
        elif move.kind == "all-gather":
            assert numbers in whole
        elif move.kind == "reduce-scatter":
            assert any(part <= numbers <= 1.1 * part for part in parts), "padded, perhaps, on a TPU"
        else:
            assert move.kind == "collective-permute", "where what was padded is put right"
            assert numbers <= 0.2 * max(parts)
    rounds = 2 if trainable == "bitfit" else 3  # forward, forward again, and backward where the table trains
    assert lookups == (rounds * CHUNKS if fsdp > 1 else 0)


@every_step
def test_the_table_is_never_gathered(device: str, trainable: str, sizes: Any) -> None:
    """Nothing with a row for every token moves but its gradient across `data`, of which each chip has its columns."""
    step = compiled_once(device, trainable, sizes)
    large = [move for move in step.moves if step.config.vocab_size in move.shape]
    assert all(move.kind == "all-reduce" and move.axes(step.mesh) == ("data",) for move in large)
    assert [move.shape[1] for move in large] == [step.config.dim // sizes[1]] * (trainable == "full" and sizes[0] > 1)
    largest = max(math.prod(move.shape) for move in step.moves if move not in large)
    assert largest < step.config.vocab_size * step.config.dim / 2


@every_step
def test_embeddings_are_gathered_for_the_texts_alone(device: str, trainable: str, sizes: Any) -> None:
    step = compiled_once(device, trainable, sizes)
    everywhere = tuple(axis for axis in ("data", "fsdp") if step.mesh.shape[axis] > 1)
    found = [
        move
        for move in step.moves
        if not move.in_loop and move.dtype == "f32" and move.axes(step.mesh) == everywhere and move.bytes > SCALARS
    ]
    gathered = [move.bytes for move in found if move.kind == "all-gather" and step.config.dim in move.shape]
    # On one axis alone the gradients of the last layer, reduced behind the loop, have the same one.
    rows = [move for move in found if move.kind == "reduce-scatter" and move.shape[-1] == step.config.dim]
    returned = [move.bytes * move.group_size for move in rows if move.shape[0] <= LIMIT * TEXTS / move.group_size]
    least = TEXTS * step.config.dim * 4
    assert len(gathered) == len(returned) == 1
    assert least <= gathered[0] <= LIMIT * least
    assert least <= returned[0] <= LIMIT * least


@every_tpu_step
def test_bitfit_reduces_no_more_than_what_trains(device: str, trainable: str, sizes: Any) -> None:
    """Over `data` no step reduces more than its trainable part; BitFit reduces nothing else at all, on any axis."""
    step = compiled_once(device, trainable, sizes)
    reduced = [move for move in step.moves if move.kind in ("all-reduce", "reduce-scatter")]
    across = sum(move.total_bytes for move in reduced if "data" in move.axes(step.mesh) and move.kind == "all-reduce")
    assert across <= step.trainable_bytes + SCALARS
    if trainable == "bitfit":
        embeddings = [move for move in reduced if move.kind == "reduce-scatter"]
        assert len(embeddings) == 1
        assert sum(move.total_bytes for move in reduced if move not in embeddings) <= step.trainable_bytes + SCALARS


@every_tpu_step
def test_gradients_are_scattered_over_fsdp(device: str, trainable: str, sizes: Any) -> None:
    """No gradient of a matrix is reduced whole; of each chunk, or behind the loop, a chip gets its part."""
    step = compiled_once(device, trainable, sizes)
    over_fsdp = [move for move in step.moves if move.axes(step.mesh) == ("fsdp",)]
    smallest = min(map(math.prod, step.kernels))
    assert not [move for move in over_fsdp if move.kind == "all-reduce" and math.prod(move.shape) >= smallest]
    scattered = [move for move in over_fsdp if move.kind == "reduce-scatter" and move.in_loop]
    if trainable == "bitfit":
        assert not scattered
        return
    for kernel in step.kernels:  # of the stacked layers; those of the last one may be reduced behind the loop
        part = math.prod(kernel) / sizes[1]
        times = sum(move.times for move in scattered if part <= math.prod(move.shape) <= 1.1 * part)
        assert times >= CHUNKS * (step.config.layers - 1), kernel


@pytest.mark.tpu
def test_between_slices_only_sums_and_embeddings_are_sent() -> None:
    """Two slices: nothing in the loops, and no more than gradients and embeddings, each way."""
    step = compiled("v5e:2x4,2", "full", (4, 4, 1))
    slices = np.vectorize(lambda device: device.slice_index)(step.mesh.devices)
    assert (slices[:2] == 0).all()
    assert (slices[2:] == 1).all()
    sent = [move for move in step.moves if move.kind == "send"]
    assert sent
    assert not [move for move in sent if move.in_loop]
    assert all(move.axes(step.mesh) == ("data",) for move in sent)
    embeddings = 2 * LIMIT * TEXTS * step.config.dim * 4
    assert sum(move.total_bytes for move in sent) <= step.trainable_bytes + embeddings
    assert not [move for move in step.over("data") if move.in_loop]


@pytest.mark.slow
def test_over_tensor_only_sums_of_activations_move() -> None:
    """No matrix is gathered over `tensor`, and over `fsdp` a chip gathers its heads and its part of the MLP alone."""
    step = compiled("cpu", "full", (2, 2, 2))
    inside = [move for move in step.moves if move.in_loop]
    over_tensor = [move for move in inside if "tensor" in move.axes(step.mesh)]
    assert over_tensor
    assert {move.kind for move in over_tensor} == {"all-reduce"}
    assert all(move.axes(step.mesh) == ("tensor",) for move in over_tensor)
    rows = step.tokens // ROW
    assert {move.shape for move in over_tensor} == {(rows, ROW, step.config.dim), (rows, SLOTS, step.config.dim)}
    gathered = [move for move in inside if move.kind == "all-gather" and move.dtype == "f32"]
    assert {math.prod(move.shape) for move in gathered} == {math.prod(kernel) // 2 for kernel in step.kernels}


# ---- what is computed again


def equations(jaxpr: Any, times: int = 1, path: tuple[str, ...] = ()) -> Iterator[tuple[Any, int, tuple[str, ...]]]:
    """Every operation of a trace, how often it runs, and the loops and calls around it."""
    for equation in jaxpr.eqns:
        yield equation, times, path
        name = equation.primitive.name
        length = equation.params["length"] if name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner, times * length, (*path, name))


def products(jaxpr: Any) -> int:
    """FLOPs of products with weights: those of attention have batch dimensions."""
    total = 0
    for equation, times, _ in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            if not batched:
                shape = equation.invars[0].aval.shape
                depth = math.prod(shape[axis] for axis in contracted)
                total += 2 * times * depth * math.prod(equation.outvars[0].aval.shape)
    return total


def traced(trainable: str, options: LossOptions, sizes: Sequence[int], layers: int) -> tuple[Any, Any]:
    """The gradient's trace on a mesh, and that of the loss on one chip."""
    config = dataclasses.replace(CONFIG, layers=layers)
    graph, train, frozen = nnx.split(abstract_bloom(config), TRAINABLE[trainable], ...)
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    fields = batch_fields(math.prod(sizes))
    batch = Batch(**{field.name: jnp.asarray(fields[field.name]) for field in dataclasses.fields(Batch)})
    gradient = global_value_and_grad(graph, train, frozen, options, QUERIES, mesh)
    both = jax.make_jaxpr(gradient)(train, frozen, batch)
    forward = jax.make_jaxpr(local_loss(graph, options, QUERIES, Alone()))(train, frozen, batch)
    return both.jaxpr, forward.jaxpr


@pytest.mark.parametrize(
    ("trainable", "chunk", "layer", "least", "most"),
    [
        ("full", "full", "none", 2, 2),  # the default: what GradCache needs
        ("bitfit", "full", "none", 2, 2),
        ("full", "none", "none", 1, 1),
        ("full", "full", "full", 2.5, 3),  # less what the end of a layer does not need again
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("full", "full", "dots", 2, 2),
                ("full", "none", "dots", 1, 1),
                ("full", "none", "full", 1.5, 2),
                ("full", "dots", "none", 1, 1),
                ("bitfit", "full", "dots", 2, 2),
                ("bitfit", "full", "full", 2.5, 3),
                ("bitfit", "none", "none", 1, 1),
                ("bitfit", "dots", "none", 1, 1),
            ]
        ),
    ],
)
def test_forward_passes(trainable: str, chunk: str, layer: str, least: float, most: float) -> None:
    """Of the products with weights, as multiples of one forward pass; gradients are one of inputs, one of weights."""
    options = LossOptions(chunk_checkpoint=chunk, layer_checkpoint=layer)
    both, forward = traced(trainable, options, (1, 1, 1), layers=6)
    backward = 2 if trainable == "full" else 1
    passes = products(both) / products(forward) - backward
    assert least - 0.05 <= passes <= most + 0.05


@pytest.mark.parametrize(
    ("trainable", "layer", "sizes"),
    [
        ("full", "none", (2, 4, 1)),
        ("full", "none", (2, 2, 2)),
        pytest.param("full", "dots", (2, 4, 1), marks=pytest.mark.slow),
        pytest.param("bitfit", "none", (2, 4, 1), marks=pytest.mark.slow),
        pytest.param("bitfit", "none", (2, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_gathered_weights_are_not_kept(trainable: str, layer: str, sizes: Any) -> None:
    """Neither before the loop over chunks, nor for the backward pass: else each chip had the whole model."""
    jaxpr, _ = traced(trainable, LossOptions(layer_checkpoint=layer), sizes, layers=5)
    tensor = sizes[2]
    whole = {math.prod(kernel) // tensor for kernel in kernel_shapes(CONFIG)}
    gathers = 0
    for equation, times, path in equations(jaxpr):
        if "shard_map" not in path:
            continue
        shapes = [tuple(variable.aval.shape) for variable in equation.outvars]
        if equation.primitive.name == "all_gather" and math.prod(shapes[0]) in whole:
            gathers += times
            assert "scan" in path, "a gather outside of the loop over chunks"
        assert not [shape for shape in shapes if shape[:1] == (4,) and shape[1:] in kernel_shapes(CONFIG)]
    # Forward, forward again and backward; what the last layer gathered serves its backward pass, where that follows.
    assert gathers == CHUNKS * 4 * (5 + 5 + (4 if layer == "none" else 5))
