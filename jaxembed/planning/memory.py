"""Memory of a step on each device by kind, from the traced program: an estimate without a compiler.

What is there before the step (parameters, optimiser, batch) follows from shapes and shardings. What comes and goes is
read from the traced program: its values are counted from the operation that makes them to the last one that takes them,
a loop with all that it carries and stacks beside the most that one turn of it needs. Values that a compiler fuses into
the operation that takes them (casts, sums, products, broadcasts) are not counted, and arrays are padded to the tiles of
a TPU, 8 × 128 numbers of 4 bytes, in the order of dimensions that pads least or, where a kernel takes them, their own.

Four terms were seen in compiled steps instead: `_COPIES`; where nothing splits the weights, those of all layers in the
dtype of the computation, cast ahead of the loops; a table that does not lie row by row, once more in rows; and on tpu7x
weights in two bytes once more, in other tiles. The estimate ranks changes of the config; what fits is what the compiler
says.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxembed.planning.chips import CHIPS
from jaxembed.planning.flops import inner_jaxprs
from jaxembed.planning.program import Program

_TILE, _WORD_TILE = 128, 32  # numbers in the minor dimension; bytes in the one before it

_COPIES = 2
"""Of what trains, in float32, that compiled steps hold beside all that is read from the program, where a loop over
chunks carries the gradients; without one, half of that."""

_TALL_TILES = frozenset({CHIPS["tpu7x"].kind})
"""Devices for which the compiler lays numbers of two bytes in tiles of 16 × 128 inside of a program. Its arguments come
in tiles of 8 × 128, as on all others, so that what a loop takes of them is copied whole before it."""

_NAMES = """
    abs add add_any and broadcast_in_dim ceil clamp convert_element_type copy copy_p cos div eq erf exp exp2
    expand_dims floor ge gt integer_pow iota is_finite le log log1p logistic lt max min mul ne neg not
    optimization_barrier or pcast pvary pow reduce_precision rem reshape round rsqrt select_n sign sin slice split
    sqrt square squeeze stop_gradient sub symbolic_zeros tanh transpose xor zeros_like
"""
_FUSED = frozenset(_NAMES.split())
"""Operations whose result is computed where it is used, or is the same memory in other words."""

_VIEWS = frozenset(
    {"optimization_barrier", "pcast", "pvary", "reshape", "squeeze", "expand_dims", "copy", "stop_gradient"}
)
"""Those of them that hold on to what they were given."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device, by kind."""

    trained: int
    """Parameters that train, float32."""
    frozen: int
    optimizer: int
    batch: int
    gradients: int
    """Of what trains, float32, all at once."""
    activations: int
    """All else that a step makes: states of a chunk, gathered weights, embeddings, logits."""

    @property
    def arguments(self) -> int:
        """What is there before and after the step."""
        return self.trained + self.frozen + self.optimizer + self.batch

    @property
    def temporary(self) -> int:
        return self.gradients + self.activations

    @property
    def total(self) -> int:
        return self.arguments + self.temporary


def estimated_memory(program: Program, jaxpr: Any) -> Memory:
    """Of a traced program."""
    trained = stored_bytes(program.trainable)
    gradients = trained if program.optimizer is not None else 0
    # `tensor` is left to the compiler, which splits the inside of a layer over it.
    peak = peak_bytes(jaxpr)
    if program.mesh.devices.flat[0].device_kind in _TALL_TILES:
        peak += relaid_bytes(jaxpr)
    temporary = math.ceil(peak / program.mesh.shape["tensor"]) + _cast_ahead(program) + table_in_rows(program)
    if gradients:
        temporary += min(program.arguments[-1].tokens.shape[0], _COPIES) * gradients
    return Memory(
        trained=trained,
        frozen=stored_bytes(program.frozen),
        optimizer=0 if program.optimizer is None else stored_bytes(program.optimizer),
        batch=stored_bytes(program.arguments[-1]),
        gradients=gradients,
        activations=max(0, temporary - gradients),
    )


def stored_bytes(tree: Any) -> int:
    """Of an abstract tree of arrays with shardings, on each device."""
    return sum(array_bytes(_shard(leaf), leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))


def _shard(leaf: Any) -> tuple[int, ...]:
    return leaf.sharding.shard_shape(leaf.shape)


def table_in_rows(program: Program) -> int:
    """Bytes of the copy of an embedding table that is looked up, and by how much its gradient, which is made row by
    row, is more than the table as it is stored: where another order of dimensions pads less."""
    more = 0
    for state, trains in ((program.trainable, program.optimizer is not None), (program.frozen, False)):
        for path, leaf in nnx.to_flat_state(state):
            if path[-1] != "table":
                continue
            stored, in_rows = (array_bytes(_shard(leaf), leaf.dtype.itemsize, in_order) for in_order in (False, True))
            if in_rows > stored:
                more += in_rows + (in_rows - stored if trains else 0)
    return more


def _cast_ahead(program: Program) -> int:
    """Bytes of the layers' matrices, and of a frozen table, in the dtype of the computation, where they are whole and
    held in another."""
    if program.mesh.shape["fsdp"] > 1:
        return 0
    trained, frozen = nnx.to_flat_state(program.trainable), nnx.to_flat_state(program.frozen)
    matrices = [variable for path, variable in (*trained, *frozen) if path[-1] == "kernel"]
    matrices += [variable for path, variable in frozen if path[-1] == "table"]
    cast = sum(variable.size for variable in matrices if variable.dtype != program.options.dtype)
    return cast * jnp.dtype(program.options.dtype).itemsize


def peak_bytes(jaxpr: Any) -> int:
    """The most that the program holds at once on a device, beside its inputs, inside of its `shard_map`."""
    kernels = frozenset(_kernel_shapes(jaxpr))
    return max(_peak(each, kernels) for each in _sharded(jaxpr) or [jaxpr])


def relaid_bytes(jaxpr: Any) -> int:
    """Of the inputs in numbers of two bytes that a loop takes, on a device; copies for one loop end before the next."""
    return max(
        sum(_size(variable, frozenset()) for variable in _taken_by_loops(each) if _itemsize(variable) == 2)
        for each in _sharded(jaxpr) or [jaxpr]
    )


def _taken_by_loops(jaxpr: Any) -> set[Any]:
    """Those inputs of a program that one of its loops takes, as they are."""
    inputs: dict[Any, Any] = {variable: variable for variable in jaxpr.invars}
    taken: set[Any] = set()
    for equation in jaxpr.eqns:
        given = [inputs.get(v) if _is_variable(v) else None for v in equation.invars]
        if _is_loop(equation):
            taken.update(given)
        elif equation.primitive.name in _VIEWS:
            inputs.update({out: v for out, v in zip(equation.outvars, given) if v is not None})
        else:
            for inner in inner_jaxprs(equation):
                deeper = _taken_by_loops(inner)
                taken.update(v for v, own in zip(given, inner.invars) if own in deeper)
    return taken - {None}


def _sharded(jaxpr: Any) -> list[Any]:
    """What runs on each device."""
    sharded = [equation for equation in jaxpr.eqns if equation.primitive.name == "shard_map"]
    return [inner for equation in sharded for inner in inner_jaxprs(equation)]


def _is_loop(equation: Any) -> bool:
    """Whether it takes several turns; the compiler has no loop for one alone."""
    return equation.primitive.name == "scan" and equation.params["length"] > 1


def _kernel_shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The last three dimensions of all that Pallas kernels take and give, which lies in the order of its dimensions."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield from (v.aval.shape[-3:] for v in (*equation.invars, *equation.outvars) if v.aval.ndim >= 3)
        else:
            for inner in inner_jaxprs(equation):
                yield from _kernel_shapes(inner)


def array_bytes(shape: tuple[int, ...], itemsize: int, in_order: bool = False) -> int:
    """Of an array in tiles, under the order of dimensions that pads least, or under its own."""
    whole = math.prod(shape) * itemsize
    large = [size for size in shape if size > 1]
    if whole < 2**16 or not large:
        return whole
    second = max(1, _WORD_TILE // itemsize)

    def padded(size: int, tile: int) -> float:
        return -(-size // tile) * tile / size

    if len(large) == 1:
        return math.ceil(whole * padded(large[0], _TILE * second) if large[0] > _TILE else whole)
    pairs = [(shape[-1], shape[-2])] if in_order else itertools.permutations(large, 2)
    return math.ceil(whole * min(padded(a, _TILE) * padded(b, second) for a, b in pairs))


def _size(variable: Any, kernels: frozenset[tuple[int, ...]]) -> int:
    aval = variable.aval
    if not (itemsize := _itemsize(variable)):
        return 0
    return array_bytes(tuple(aval.shape), itemsize, aval.shape[-3:] in kernels)


def _itemsize(variable: Any) -> int:
    """Bytes of a number of it; 0: it is no array of numbers."""
    return getattr(getattr(variable.aval, "dtype", None), "itemsize", 0)


def _is_variable(atom: Any) -> bool:
    return not hasattr(atom, "val")


def _peak(jaxpr: Any, kernels: frozenset[tuple[int, ...]]) -> int:
    """The most bytes held at once by values made in this program, its results included, inputs not."""
    equations = list(jaxpr.eqns)
    inputs = {*jaxpr.invars, *jaxpr.constvars}
    # A fused value is no memory of its own: those who take it hold what it was made of.
    sources: dict[Any, frozenset[Any]] = {}
    kept: set[Any] = {v for v in jaxpr.outvars if _is_variable(v)}

    def holds(variable: Any) -> frozenset[Any]:
        return sources.get(variable, frozenset() if variable in inputs else frozenset({variable}))

    for equation in equations:
        name = equation.primitive.name
        if name not in _FUSED:
            continue
        for out in equation.outvars:
            if out in kept and name not in _VIEWS:
                continue
            sources[out] = frozenset().union(*(holds(v) for v in equation.invars if _is_variable(v)))
    last: dict[Any, int] = {}
    for index, equation in enumerate(equations):
        for variable in filter(_is_variable, equation.invars):
            for held in holds(variable):
                last[held] = index
    for variable in kept:
        for held in holds(variable):
            last[held] = len(equations)
    ends: dict[int, list[Any]] = {}
    for variable, index in last.items():
        ends.setdefault(index, []).append(variable)
    live: dict[Any, int] = {}
    now = most = 0
    for index, equation in enumerate(equations):
        for out in equation.outvars:
            if out in last and out not in sources and out not in live:
                live[out] = _size(out, kernels)
                now += live[out]
        most = max(most, now + _inside(equation, kernels))
        for variable in ends.get(index, ()):
            now -= live.pop(variable, 0)
    return max(most, now)


def _inside(equation: Any, kernels: frozenset[tuple[int, ...]]) -> int:
    """What an equation needs while it runs, beside its operands and results."""
    name = equation.primitive.name
    if name == "pallas_call":
        return 0
    inner = list(inner_jaxprs(equation))
    if not inner:
        return 0
    peak = max(_peak(each, kernels) for each in inner)
    if _is_loop(equation):
        # The slices that a turn stacks are results of the loop already; what it carries is there twice.
        body = equation.params["jaxpr"].jaxpr
        stacked = sum(_size(v, kernels) for v in body.outvars[equation.params["num_carry"] :])
        return max(0, peak - stacked)
    # The results of an equation that only wraps are counted outside already.
    return max(0, peak - sum(_size(v, kernels) for v in equation.outvars))
