"""Operations of a step, counted twice: by the traced program, and by formula for the tokens that texts hold.

XLA's own count (`cost_analysis`) is no use here: it counts the body of every loop once, whatever its length, and Pallas
kernels not at all. The traced program knows the length of its loops, and what is computed again in the backward pass
stands in it as often as it is computed.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of all devices together, a multiply-add counted as two."""

    products: float
    """Matrix products."""
    kernels: float
    """Attention inside Pallas kernels, by formula."""

    @property
    def total(self) -> float:
        return self.products + self.kernels

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.products + other.products, self.kernels + other.kernels)

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.products * times, self.kernels * times)


def traced_flops(jaxpr: Any, causal: bool = True) -> Flops:
    """Of a traced program: loops with their length, a `shard_map` once for each of its devices, recomputing included.

    Of several branches the one with the most; a `while` whose length is not known counts once.

    Args:
        causal: whether attention is, of which kernels compute about half.
    """
    found = Flops(0.0, 0.0)
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            terms = math.prod(left[i] for i in contracted)
            found += Flops(2.0 * math.prod(equation.outvars[0].aval.shape) * terms, 0.0)
        elif name == "pallas_call":
            found += Flops(0.0, kernel_flops(equation, causal))
        elif name == "cond":
            branches = [traced_flops(branch.jaxpr, causal) for branch in equation.params["branches"]]
            found += max(branches, key=lambda flops: flops.total)
        else:
            for inner in inner_jaxprs(equation):
                found += traced_flops(inner, causal) * repetitions(equation)
    return found


def repetitions(equation: Any) -> int:
    """How often the inside of an equation runs, over all devices."""
    if equation.primitive.name == "scan":
        return equation.params["length"]
    if equation.primitive.name == "shard_map":
        mesh, axes = equation.params["mesh"], equation.params["newly_manual_axes"]
        return math.prod(mesh.shape[axis] for axis in axes)
    return 1


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """The programs inside an equation."""
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each


def kernel_flops(equation: Any, causal: bool = True) -> float:
    """Of a splash attention kernel: its products over the blocks that are not masked whole.

    Forward q·kᵀ and p·v; for dq q·kᵀ, do·vᵀ and ds·k; for dk and dv q·kᵀ, pᵀ·do, do·vᵀ and dsᵀ·q, and where it is fused
    with dq one more. Blocks of other segments are not skipped.
    """
    arrays = [v.aval for v in equation.invars if v.aval.ndim >= 3 and v.aval.dtype.kind not in "iu"]
    if len(arrays) < 3:
        return 0.0
    q, k, v = arrays[:3]
    wide, value = q.shape[-1], v.shape[-1]
    name = str(equation.params.get("name", ""))
    if "dkv" in name:
        of_q = [o for o in equation.outvars if o.aval.shape[-2:] == q.shape[-2:] and o.aval.ndim >= q.ndim]
        products = (3 if len(of_q) > 1 and wide != value else 2) * wide + 2 * value
    elif "dq" in name:
        products = 2 * wide + value
    else:
        products = wide + value
    grid = equation.params["grid_mapping"].grid
    blocks = _causal_share(int(grid[-3 if "dkv" in name else -2]), int(grid[-1])) if causal else 1.0
    return 2.0 * math.prod(q.shape[:-1]) * k.shape[-2] * products * blocks


def _causal_share(rows: int, columns: int) -> float:
    """Share of a grid of blocks that reaches to the diagonal or below it."""
    return sum(math.ceil((row + 1) * columns / rows) for row in range(rows)) / (rows * columns)


@dataclasses.dataclass(frozen=True)
class Useful:
    """What the tokens of the texts cost at least, with nothing computed twice and no padding."""

    layers: float
    attention: float
    loss: float

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.loss


def useful_flops(
    shape: Any,
    tokens: float,
    squares: float,
    texts: float,
    trainable: str,
    pooling: str,
    *,
    queries: int = 0,
    upper_layers: int = 0,
) -> Useful:
    """Of a step, or of encoding (`trainable` "none").

    A token costs 24 · dim² in each layer forward (queries, keys, values 6, output 2, MLP 16), its attention
    4 · dim · length / 2 (twice that if it is not causal); where one state of a text is read, the last layer costs its
    keys and values alone for the other tokens. Backward: as much for the gradient of activations, and again for that of
    weights where they train. The loss compares queries with documents, forward and twice backward. Adapters, norms and
    the optimiser are left out.

    Args:
        shape: the family's config.
        squares: Σ length² over the texts.
        upper_layers: layers that train, of "last_layers".
    """
    dim, above = shape.dim, shape.layers - 1
    share = 0.5 if shape.causal else 1.0
    single = pooling in ("last", "first")
    layers = 24 * dim**2 * tokens * above + 4 * dim**2 * tokens + 20 * dim**2 * (texts if single else tokens)
    attention = 4 * dim * share * squares * above + 4 * dim * (tokens if single else share * squares)
    backward = {"none": 0.0, "full": 2.0, "last_layers": 2.0 * upper_layers / shape.layers}.get(trainable, 1.0)
    differentiated = {"none": 0.0, "last_layers": upper_layers / shape.layers}.get(trainable, 1.0)
    return Useful(
        layers=layers * (1 + backward),
        attention=attention * (1 + 2 * differentiated),
        loss=6.0 * queries * (texts - queries) * dim,
    )
