"""What moves between devices in a compiled program, read from its text (`compiled.as_text()`), CPU, GPU or TPU.

Each compiler has spellings of its own. Loops: CPU and GPU write the number of trips beside them, a TPU's is a constant
in the loop's condition. Overlapped collectives: GPUs write `…-start` and `…-done`, TPUs repeat one `all-gather` inside
several fusions. A reduce-scatter may be an `all-reduce` in a fusion that ends in a `dynamic-slice`. Between TPU slices
data is sent by the host (`send` with `_xla_megascale_…` attributes).
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np
from jax.sharding import Mesh

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "bf16": 16}
"""Of types whose name is no letters before the number of their bits."""
_PASSES_ON = ("bitcast", "copy", "reshape", "transpose", "convert")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that devices exchange. Where the compiler moves several at once, each is one of these."""

    kind: str
    """One of `KINDS`, or `send` between TPU slices."""
    groups: tuple[tuple[int, ...], ...]
    """Who takes part together, by place in the program's device assignment: that of `mesh.devices.flat`.

    For a permutation, who sends to whom; nothing for `send`."""
    dtype: str
    """As HLO calls it: `f32`, `bf16`, `s32`."""
    shape: tuple[int, ...]
    """Of the result on one device."""
    bytes: int
    """Of the result on one device, once."""
    times: int
    """In one run of the program: lengths of the loops around it."""
    in_loop: bool
    fused: bool
    """Whether it stands inside a fusion."""
    origin: str
    """Path of the operation in the traced program, such as `jit(step)/shard_map/…/all_gather`; empty where unknown."""

    @property
    def group_size(self) -> int:
        """Devices in a group; 2 for `send`."""
        return max((len(group) for group in self.groups), default=2)

    @property
    def total_bytes(self) -> int:
        """Of all results on one device."""
        return self.bytes * self.times

    @property
    def wire_bytes(self) -> float:
        """What each device sends in total, on a ring: the least that the operation needs on a network of any shape."""
        others = self.group_size - 1
        share = {
            "all-gather": others / self.group_size,
            "all-reduce": 2 * others / self.group_size,
            "reduce-scatter": others,
            "all-to-all": others / self.group_size,
            "ragged-all-to-all": others / self.group_size,
        }
        return self.total_bytes * share.get(self.kind, 1.0)

    def axes(self, mesh: Mesh) -> tuple[str, ...]:
        """The axes of the mesh along which the members of a group differ; the outermost for `send`."""
        if not self.groups:
            return (mesh.axis_names[0],)
        coordinates = np.stack(np.unravel_index(np.arange(mesh.devices.size), mesh.devices.shape), axis=1)
        crossed = np.zeros(mesh.devices.ndim, bool)
        for group in self.groups:
            members = coordinates[list(group)]
            crossed |= (members != members[0]).any(0)
        return tuple(axis for axis, is_crossed in zip(mesh.axis_names, crossed) if is_crossed)


def read_collectives(text: str) -> list[Collective]:
    """Everything that the devices exchange in one run of a compiled program, in the order in which it stands there.

    Groups of one device move nothing and are left out. Of a conditional both branches count.

    Raises:
        ValueError: the text is no HLO module, or has groups in an unknown spelling.
    """
    return list(_Program(text).collectives())


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    operation: str
    arguments: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def attribute(self, pattern: str) -> str:
        """What the pattern's group finds among the attributes; nothing where it does not match."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""


_Computation = Mapping[str, _Instruction]
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_START = re.compile(r"  (ROOT )?%?([\w.\-]+) = ")
_OPERATION = re.compile(r"\s*([\w\-]+)\(")


class _Program:
    """The computations of a module, and the walk through them."""

    def __init__(self, text: str) -> None:
        head = text.partition("\n")[0]
        counts = (re.search(rf"{name}=(\d+)", head) for name in ("num_partitions", "replica_count"))
        self._devices = math.prod(int(count[1]) for count in counts if count)
        self._lines: dict[str, list[str]] = {}
        self._parsed: dict[str, _Computation] = {}
        self._entry = ""
        lines: list[str] = []
        for line in text.splitlines():
            if not line.startswith(" ") and (found := _HEAD.match(line)):
                lines = self._lines[found[2]] = []
                self._entry = found[2] if found[1] else self._entry
            elif line.startswith("  "):
                lines.append(line)
        if not self._entry:
            raise ValueError("expected the text of a compiled program, with an ENTRY computation")

    def _computation(self, name: str) -> _Computation:
        if name not in self._parsed:
            found = (_instruction(line) for line in self._lines[name])
            self._parsed[name] = {each.name: each for each in found if each is not None}
        return self._parsed[name]

    def collectives(self) -> Iterator[Collective]:
        yield from self._walk(self._entry, times=1, in_loop=False, fused=False, met=set())

    def _walk(self, name: str, times: int, in_loop: bool, fused: bool, met: set[object]) -> Iterator[Collective]:
        """Of a computation and all that it calls.

        Args:
            met: of the fusions of one computation, the overlapped collectives that were counted already.
        """
        computation = self._computation(name)
        for each in computation.values():
            if each.operation == "while":
                yield from self._walk(_body(each), times * self._trips(each, computation), True, False, set())
            elif (kind := each.operation.removesuffix("-start")) in KINDS:
                yield from self._collective(kind, each, computation, times, in_loop, fused, met)
            elif each.operation == "send" and "megascale" in each.attributes:
                yield from _arrays("send", (), each, _elements(each.type)[:1], times, in_loop, fused)
            else:
                inside = each.operation == "fusion"
                for called in _called(each):
                    yield from self._walk(called, times, in_loop, fused or inside, met if inside else set())

    def _collective(
        self,
        kind: str,
        each: _Instruction,
        computation: _Computation,
        times: int,
        in_loop: bool,
        fused: bool,
        met: set[object],
    ) -> Iterator[Collective]:
        groups = _groups(each.attributes, self._devices)
        if all(len(group) < 2 for group in groups):
            return
        results = _elements(each.type)
        if each.operation.endswith("-start") and kind != "all-reduce":
            results = _elements(results[1])  # of (what is sent, what arrives, …)
        if fused:
            chain = each.attribute(r'chain_id="(\d+)"') or each.attribute(r"channel_id=(\d+)")
            key = kind, chain, tuple(map(_dtype_and_shape, results))
            if key in met:
                return
            met.add(key)
            if kind == "all-reduce" and (part := _slice_of(each, computation)) is not None:
                kind, results = "reduce-scatter", [part.type]
        if kind == "all-to-all" and len(results) > 1:  # one array, in pieces
            results = [results[0].replace("[", f"[{len(results)},", 1)]
        yield from _arrays(kind, groups, each, results, times, in_loop, fused)

    def _trips(self, loop: _Instruction, around: _Computation) -> int:
        """How often a loop runs: as it says itself, or by the bound, the start and the step of its counter."""
        if known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition = self._computation(loop.attribute(r"condition=%?([\w.\-]+)"))
        root = next(each for each in condition.values() if each.is_root)
        bounds = [_constant(name, condition) for name in root.operands] + [
            _constant(name, condition) for name in condition
        ]
        bound = next((value for value in bounds if value is not None), None)
        if bound is None:
            raise ValueError(f"the loop {loop.name} has no constant in its condition")
        indices = [
            int(condition[name].attribute(r"index=(\d+)"))
            for name in root.operands
            if name in condition and condition[name].operation == "get-tuple-element"
        ]
        counter = indices[0] if indices else 0
        start = _constant(_element(around.get(loop.operands[0]), counter), around) or 0
        body = self._computation(_body(loop))
        last = next((each for each in body.values() if each.is_root), None)
        return max(0, -((start - bound) // _step(_element(last, counter), body)))


def _body(loop: _Instruction) -> str:
    return loop.attribute(r"body=%?([\w.\-]+)")


def _instruction(line: str) -> _Instruction | None:
    start = _START.match(line)
    if start is None:
        return None
    begin = start.end()
    end = _closed(line, begin) if line[begin] == "(" else line.index(" ", begin)
    operation = _OPERATION.match(line, end)
    if operation is None:
        return None
    close = _closed(line, operation.end() - 1)
    arguments = line[operation.end() : close - 1]
    return _Instruction(start[2], line[begin:end], operation[1], arguments, line[close:], bool(start[1]))


def _closed(text: str, start: int) -> int:
    """Place after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return start + found.end()
    raise ValueError(f"a parenthesis is not closed: {text[:200]}")


def _elements(type_: str) -> list[str]:
    """The types in a tuple, which may be tuples themselves; of an array its own."""
    if not type_.startswith("("):
        return [type_]
    elements, depth = [""], 0
    for character in re.sub(r"/\*.*?\*/", "", type_[1:-1]):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and not depth:
            elements.append("")
        else:
            elements[-1] += character
    return [element.strip() for element in elements]


def _dtype_and_shape(type_: str) -> tuple[str, tuple[int, ...]]:
    found = re.match(r"(\w+)\[([\d,<=]*)\]", type_)
    if found is None:
        raise ValueError(f"expected the type of an array, found {type_[:200]}")
    return found[1], tuple(int(size.lstrip("<=")) for size in found[2].split(",") if size)


def _bits(dtype: str) -> int:
    found = re.match(r"[a-z]+(\d+)", dtype)
    return _BITS[dtype] if dtype in _BITS else int(found[1]) if found else 0


def _arrays(
    kind: str,
    groups: tuple[tuple[int, ...], ...],
    each: _Instruction,
    results: list[str],
    times: int,
    in_loop: bool,
    fused: bool,
) -> Iterator[Collective]:
    origin = each.attribute(r'op_name="([^"]*)"')
    for result in results:
        dtype, shape = _dtype_and_shape(result)
        size = math.prod(shape) * _bits(dtype) // 8
        yield Collective(kind, groups, dtype, shape, size, times, in_loop, fused, origin)


def _called(each: _Instruction) -> list[str]:
    """Computations that an instruction runs once, those of reducers and comparators apart."""
    names = re.findall(r"(?:calls|true_computation|false_computation)=%?([\w.\-]+)", each.attributes)
    if each.operation in ("call", "call-start"):
        names += re.findall(r"to_apply=%?([\w.\-]+)", each.attributes)
    for listed in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", each.attributes):
        names += re.findall(r"%?([\w.\-]+)", listed)
    return names


def _slice_of(reduced: _Instruction, computation: _Computation) -> _Instruction | None:
    """The `dynamic-slice` that a fusion takes of what it has reduced."""
    for each in computation.values():
        if each.operation == "dynamic-slice":
            source = computation.get(each.operands[0])
            while source is not None and source.operation in _PASSES_ON:
                source = computation.get(source.operands[0])
            if source is reduced:
                return each
    return None


def _element(tuple_: _Instruction | None, index: int) -> str:
    """Name of a tuple's element; nothing where it is not known."""
    if tuple_ is None or tuple_.operation != "tuple" or index >= len(tuple_.operands):
        return ""
    return tuple_.operands[index]


def _constant(name: str, computation: _Computation) -> int | None:
    """The whole number that an instruction is, perhaps a copy of it."""
    each = computation.get(name)
    while each is not None and each.operation in _PASSES_ON:
        each = computation.get(each.operands[0])
    if each is None or each.operation != "constant" or re.fullmatch(r"-?\d+", each.arguments) is None:
        return None
    return int(each.arguments)


def _step(name: str, body: _Computation) -> int:
    """What a loop adds to its counter; 1 where it is not known."""
    each = body.get(name)
    if each is None or each.operation != "add":
        return 1
    values = [value for operand in each.operands if (value := _constant(operand, body)) is not None]
    return values[0] if values and values[0] > 0 else 1


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Who takes part together, in each spelling of HLO; those that number the devices do so row by row."""
    if mesh := re.search(r"replica_groups=mesh\[([^]]*)\](?:, device_ids=\(\[(\S+)\))? \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        together = re.findall(r"'(\w+)'", mesh[3])
        numbers = _numbered(f"[{mesh[2]}" if mesh[2] else f"[{math.prod(sizes.values())}]").reshape(*sizes.values())
        places = [list(sizes).index(name) for name in together]
        last = np.moveaxis(numbers, places, range(-len(together), 0))
        return _rows(last.reshape(-1, math.prod(sizes[name] for name in together)))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[\S+[\])])", attributes):
        return _rows(_numbered(iota[2]).reshape([int(size) for size in iota[1].split(",")]))
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", attributes):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    if "replica_groups={}" in attributes:
        return (tuple(range(devices)),)
    raise ValueError(f"groups in an unknown spelling: {attributes[:300]}")


def _numbered(text: str) -> np.ndarray:
    """Device numbers of `[2,4]`, or of `[2,4]T(1,0)`, transposed."""
    sizes, _, order = text.replace("[", "").replace(")", "").replace("]", "").partition("T(")
    numbers = np.arange(math.prod(map(int, sizes.split(",")))).reshape([int(size) for size in sizes.split(",")])
    return numbers.transpose([int(axis) for axis in order.split(",")]) if order else numbers


def _rows(devices: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, devices.tolist()))
