"""The weight map: which Hugging Face tensor is which parameter, and how it is laid out, read in both directions.

A family's map is a tuple of rules. A rule whose pattern holds `{layer}` stands for one tensor a layer; its path begins
with `"layers"`. The decoder keeps all layers but the last stacked under `("layers", …)`, with a leading layer axis,
and the last one alone under `("last_layer", …)`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from jaxembed.errors import InputError

ParameterPath = tuple[str, ...]
LAYER = "{layer}"


@dataclass(frozen=True)
class Relayout:
    """How a Hugging Face tensor becomes a parameter: its axes are split, then put in another order.

    BLOOM's attention weight `[heads·3·head_dim, dim]`, here `[4·3·2, 8]`, becomes `[dim, 3, heads, head_dim]`:

    >>> qkv = Relayout("qkv kernel", shape=(24, -1), split=(4, 3, 2, -1), axes=(3, 1, 0, 2))
    >>> qkv.to_jax(np.zeros((24, 8))).shape, qkv.huggingface_shape((8, 3, 4, 2))
    ((8, 3, 4, 2), (24, 8))
    """

    name: str
    shape: tuple[int, ...] | None = None
    """Hugging Face's, for the way back; may hold one -1. None: axes are not split."""
    split: tuple[int, ...] | None = None
    """`shape` with axes split; may hold one -1."""
    axes: tuple[int, ...] | None = None
    """For `transpose`; None: their order stays."""

    def to_jax(self, array: np.ndarray) -> np.ndarray:
        """A view of a contiguous array."""
        array = array if self.split is None else array.reshape(self.split)
        return array if self.axes is None else array.transpose(self.axes)

    def to_huggingface(
        self, array: np.ndarray, in_order: Callable[[np.ndarray], np.ndarray] = np.ascontiguousarray
    ) -> np.ndarray:
        """The inverse; `in_order` copies a view whose axes are not in the order of memory."""
        array = array if self.axes is None else in_order(array.transpose(np.argsort(self.axes)))
        return array if self.shape is None else array.reshape(self.shape)

    def huggingface_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that a parameter of this shape has in Hugging Face's layout."""
        # No memory: all elements of the placeholder are one.
        return self.to_huggingface(np.broadcast_to(np.int8(0), tuple(shape)), lambda view: view).shape


IDENTITY = Relayout("as it is")
TRANSPOSE = Relayout("transposed", axes=(1, 0))


@dataclass(frozen=True)
class WeightRule:
    """One line of a weight map."""

    pattern: str  # Hugging Face's name without a prefix, `{layer}` in place of the layer's index
    path: ParameterPath  # in the model's state
    relayout: Relayout = IDENTITY


@dataclass(frozen=True)
class Assignment:
    """One source tensor and the place that it fills."""

    source: str
    rule: WeightRule
    layer: int | None
    path: ParameterPath
    index: int | None  # along the leading axis of a stacked parameter; None: the whole parameter

    @property
    def target(self) -> str:
        """The place, for people: `layers/attention/qkv/kernel[3]`."""
        return "/".join(self.path) + ("" if self.index is None else f"[{self.index}]")

    @property
    def stored(self) -> ParameterPath:
        """The place in an Orbax model directory, where layers are not stacked: `layers/3/attention/qkv/kernel`."""
        return self.rule.path if self.layer is None else (self.rule.path[0], str(self.layer), *self.rule.path[1:])


@dataclass(frozen=True)
class Plan:
    """What becomes of every tensor of a checkpoint, in the weight map's order."""

    assignments: tuple[Assignment, ...]
    prefix: str
    ignored: tuple[str, ...]


def locate(rule: WeightRule, layer: int | None, layers: int) -> tuple[ParameterPath, int | None]:
    """Where a rule's tensor of this layer lies: its path, and its index if the parameter there is stacked."""
    if layer is None:
        return rule.path, None
    if layer == layers - 1:
        return ("last_layer", *rule.path[1:]), None
    return rule.path, layer


def assignments(weight_map: Sequence[WeightRule], layers: int, prefix: str = "") -> Iterator[Assignment]:
    """Every tensor of a model in canonical order: the map's, with the rules of layers repeated layer by layer."""
    for layered, group in groupby(weight_map, key=lambda rule: LAYER in rule.pattern):
        rules = list(group)
        for layer in range(layers) if layered else [None]:
            for rule in rules:
                source = prefix + rule.pattern.replace(LAYER, str(layer))
                yield Assignment(source, rule, layer, *locate(rule, layer, layers))


def resolve(
    sources: Iterable[str],
    weight_map: Sequence[WeightRule],
    layers: int,
    *,
    prefixes: Sequence[str] = (),
    ignored: Sequence[str] = (),
    where: str = "checkpoint",
) -> Plan:
    """Assigns every source tensor.

    All names may carry one of `prefixes`. Names that match a pattern of `ignored` (with or without the prefix,
    `{layer}` as in rules) may be there and go nowhere: a tied head, buffers. `where` begins an error's message.

    Raises `InputError` listing the tensors that no rule takes and the parameters that no tensor fills, or where some
    names carry a prefix and others do not.
    """
    names = set(sources)
    found = {
        prefix: [a for a in assignments(weight_map, layers, prefix) if a.source in names] for prefix in ("", *prefixes)
    }
    examples = [hits[0].source for hits in found.values() if hits]
    if len(examples) > 1:
        raise InputError(f"{where}: tensors under several prefixes, such as {' and '.join(map(repr, examples))}")
    prefix = max(found, key=lambda prefix: len(found[prefix]))
    left = names - {assignment.source for assignment in found[prefix]}
    harmless = {name for name in left if any(_index(p, name, prefix) is not None for p in ignored)}
    wanted = [a for a in assignments(weight_map, layers, prefix) if a.source not in names]
    if wanted or left != harmless:
        message = f"{where}: these are not the weights of this model"
        if left != harmless:
            surplus = [_surplus(name, prefix, weight_map, layers) for name in sorted(left - harmless)]
            message += f"; tensors that belong nowhere ({len(surplus)}): {shorten(surplus)}"
        if wanted:
            targets = [f"{assignment.source} → {assignment.target}" for assignment in wanted]
            message += f"; tensors that are missing ({len(targets)}): {shorten(targets)}"
        raise InputError(message)
    return Plan(tuple(found[prefix]), prefix, tuple(sorted(harmless)))


def shorten(items: Sequence[str], limit: int = 10) -> str:
    """The items on one line, the rest of a long list as a count."""
    rest = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return ", ".join([*items[:limit], *rest])


def _surplus(name: str, prefix: str, weight_map: Sequence[WeightRule], layers: int) -> str:
    indices = (_index(rule.pattern, name, prefix) for rule in weight_map)
    layer = next((index for index in indices if index), None)
    return f"{name} (the config has {layers} layers)" if layer and int(layer) >= layers else name


def _index(pattern: str, name: str, prefix: str) -> str | None:
    """The layer's digits in a name that matches, empty if the pattern has no layer; None if it does not match."""
    expression = "([0-9]{1,9})".join(re.escape(part) for part in pattern.split(LAYER))
    match = re.fullmatch(f"(?:{re.escape(prefix)})?{expression}", name)
    return None if match is None else "".join(match.groups()[:1])
