"""Weight maps: relayouts are inverses, every tensor and every parameter is accounted for."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxembed.errors import InputError
from jaxembed.models.weights import (
    IDENTITY,
    TRANSPOSE,
    Relayout,
    WeightRule,
    assignments,
    locate,
    resolve,
)

RULES = (
    WeightRule("embed.weight", ("embedding",)),
    WeightRule("h.{layer}.up.weight", ("layers", "up", "kernel"), TRANSPOSE),
    WeightRule("h.{layer}.up.bias", ("layers", "up", "bias")),
    WeightRule("norm.weight", ("norm", "scale")),
)
NAMES = [assignment.source for assignment in assignments(RULES, 3)]


def assert_inverse(relayout: Relayout, array: np.ndarray, shape: tuple[int, ...]) -> None:
    there = relayout.to_jax(array)
    assert there.shape == shape
    assert relayout.huggingface_shape(shape) == array.shape
    np.testing.assert_array_equal(relayout.to_huggingface(there), array, strict=True)


@given(st.integers(1, 5), st.integers(1, 5))
def test_plain_relayouts_are_inverses(a: int, b: int):
    array = np.arange(a * b, dtype=np.float32).reshape(a, b)
    assert_inverse(IDENTITY, array, (a, b))
    assert_inverse(TRANSPOSE, array, (b, a))


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 7))
def test_blooms_attention_relayouts_are_inverses(heads: int, head_dim: int, dim: int):
    fused = 3 * heads * head_dim
    kernel = np.arange(fused * dim).reshape(fused, dim)
    relayout = Relayout("qkv kernel", (fused, -1), (heads, 3, head_dim, -1), (3, 1, 0, 2))
    assert_inverse(relayout, kernel, (dim, 3, heads, head_dim))
    head, part, unit, row = heads - 1, 2, head_dim - 1, dim - 1
    assert relayout.to_jax(kernel)[row, part, head, unit] == kernel[(head * 3 + part) * head_dim + unit, row]
    bias = Relayout("qkv bias", (fused,), (heads, 3, head_dim), (1, 0, 2))
    assert_inverse(bias, np.arange(fused), (3, heads, head_dim))
    out = Relayout("out kernel", (-1, heads * head_dim), (-1, heads, head_dim), (1, 2, 0))
    kernel = np.arange(dim * heads * head_dim).reshape(dim, -1)
    assert_inverse(out, kernel, (heads, head_dim, dim))
    assert out.to_jax(kernel)[head, unit, row] == kernel[row, head * head_dim + unit]


@given(st.data())
def test_any_split_and_permutation_is_inverted(data: st.DataObject):
    split = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    cut = data.draw(st.integers(1, len(split)))
    axes = data.draw(st.permutations(range(len(split))))
    shape = (math.prod(split[:cut]), math.prod(split[cut:]))
    array = np.arange(math.prod(split)).reshape(shape)
    assert_inverse(Relayout("any", tuple(shape), tuple(split), tuple(axes)), array, tuple(split[axis] for axis in axes))


def test_the_shape_of_a_huge_parameter_takes_no_memory():
    relayout = Relayout("qkv kernel", (3 << 26, -1), (64, 3, 1 << 20, -1), (3, 1, 0, 2))
    assert relayout.huggingface_shape((1 << 20, 3, 64, 1 << 20)) == (3 << 26, 1 << 20)


@pytest.mark.parametrize(
    ("layer", "layers", "place"),
    [
        (0, 3, (("layers", "up", "kernel"), 0)),
        (1, 3, (("layers", "up", "kernel"), 1)),
        (2, 3, (("last_layer", "up", "kernel"), None)),
        (0, 1, (("last_layer", "up", "kernel"), None)),
        (None, 3, (("layers", "up", "kernel"), None)),
    ],
)
def test_the_last_layer_stands_alone(layer, layers, place):
    assert locate(RULES[1], layer, layers) == place


def test_canonical_order():
    layers = [f"h.{layer}.up.{kind}" for layer in range(3) for kind in ("weight", "bias")]
    assert ["embed.weight", *layers, "norm.weight"] == NAMES


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_every_tensor_is_assigned_once(prefix: str):
    sources = [*(prefix + name for name in reversed(NAMES)), "lm_head.weight", f"{prefix}h.12.buffer"]
    plan = resolve(sources, RULES, 3, prefixes=("transformer.",), ignored=("lm_head.weight", "h.{layer}.buffer"))
    assert plan.prefix == prefix
    assert plan.ignored == tuple(sorted(sources[-2:]))
    assert [assignment.source for assignment in plan.assignments] == [prefix + name for name in NAMES]
    assert len({(assignment.path, assignment.index) for assignment in plan.assignments}) == len(NAMES)


def test_all_that_does_not_fit_is_listed_at_once():
    sources = [*NAMES[2:], "extra.weight", "h.3.up.bias", "h.x.up.bias", "h.0.up.biases"]
    with pytest.raises(InputError) as error:
        resolve(sources, RULES, 3, ignored=("lm_head.weight",), where="some/dir")
    message = str(error.value)
    assert message.startswith("some/dir: ")
    assert "(4): extra.weight, h.0.up.biases, h.3.up.bias (the config has 3 layers), h.x.up.bias;" in message
    assert message.endswith("(2): embed.weight → embedding, h.0.up.weight → layers/up/kernel[0]")


def test_long_lists_are_cut():
    with pytest.raises(InputError, match=r"missing \(42\): .*, and 32 more$"):
        resolve([], RULES, 20)


def test_a_mix_of_prefixes_is_refused():
    with pytest.raises(InputError, match=r"several prefixes, such as 'norm.weight' and 'transformer.embed.weight'"):
        resolve([*("transformer." + name for name in NAMES[:-1]), NAMES[-1]], RULES, 3, prefixes=("transformer.",))


def test_a_dot_in_a_pattern_is_a_dot():
    with pytest.raises(InputError, match="lm_headXweight"):
        resolve([*NAMES, "lm_headXweight"], RULES, 3, ignored=("lm_head.weight",))
