"""Parts that train apart: what a decoder with them computes, and that merging gives the same decoder without them."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxembed.checkpoint.pretrained import Decoder, flat_state, merged_decoder
from jaxembed.models import FAMILIES
from jaxembed.models.bloom import Bloom, BloomConfig
from jaxembed.models.parts import Adapter, with_adapters, with_token_rows, with_upper_layers
from jaxembed.sharding import check_divisible, make_mesh, partition_specs

from blooms import from_torch, random_bloom

CONFIG = BloomConfig(vocab_size=60, dim=16, layers=4, heads=2)
TARGETS = ("qkv", "out", "up", "down")
RANK, ALPHA = 3, 5.0
RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(0, CONFIG.vocab_size, (2, 9))
SEGMENTS = np.ones_like(TOKENS)


@functools.cache
def base() -> Bloom:
    return from_torch(CONFIG, random_bloom(CONFIG))


def shaken(model: Any) -> Any:
    """The model with adapters and rows far from where they begin."""
    graph, state = nnx.split(model)
    random = np.random.default_rng(1)

    def move(path: tuple[Any, ...], variable: Any) -> Any:
        if path[-2:-1] != ("lora",) and path[0] != "token_rows":
            return variable
        return variable.replace(variable[...] + 0.2 * random.normal(size=variable.shape).astype(np.float32))

    return nnx.merge(graph, nnx.map_state(move, state))


def states(model: Any) -> np.ndarray:
    return np.asarray(model.states(jnp.asarray(TOKENS), jnp.asarray(SEGMENTS)))


def merged(model: Any) -> Any:
    decoder = Decoder(model, FAMILIES["bloom"], CONFIG, CONFIG.to_huggingface())
    return merged_decoder(decoder).model


def torch_states(changes: dict[str, np.ndarray]) -> np.ndarray:
    """transformers' hidden states, with these added to its weights."""
    model = random_bloom(CONFIG)
    with torch.no_grad():
        for name, change in changes.items():
            model.get_parameter(name).add_(torch.tensor(change))
        return model(torch.tensor(TOKENS)).last_hidden_state.numpy()


def changes_by_formula(model: Any, targets: tuple[str, ...]) -> dict[str, np.ndarray]:
    """scaling · b · a of every layer in Hugging Face's layout, written down again for BLOOM."""
    shapes = {name: tuple(parameter.shape) for name, parameter in random_bloom(CONFIG).named_parameters()}
    formulas = {
        "qkv": ("self_attention.query_key_value", "dr,rqhk->hqkd"),
        "out": ("self_attention.dense", "hkr,rd->dhk"),
        "up": ("mlp.dense_h_to_4h", "dr,rm->md"),
        "down": ("mlp.dense_4h_to_h", "mr,rd->dm"),
    }
    changes = {}
    for layer, target in itertools.product(range(CONFIG.layers), targets):
        last = layer == CONFIG.layers - 1
        lora = getattr(model.last_layer if last else model.layers, target).lora
        a, b = (np.asarray(x[...] if last else x[layer], np.float64) for x in (lora.a, lora.b))
        name, formula = formulas[target]
        weight = f"h.{layer}.{name}.weight"
        changes[weight] = (ALPHA / RANK * np.einsum(formula, a, b)).reshape(shapes[weight]).astype(np.float32)
    return changes


@pytest.mark.parametrize("targets", [*((target,) for target in TARGETS), TARGETS], ids=str)
def test_adapters_are_those_of_the_paper(targets: tuple[str, ...], record_property) -> None:
    """Unmerged and merged, against transformers' model with W + α/r · B·A written into it."""
    model = shaken(with_adapters(base(), jax.random.key(0), targets, RANK, ALPHA))
    expected = torch_states(changes_by_formula(model, targets))
    assert np.abs(expected - torch_states({})).max() > 0.1, "nothing to compare"
    unmerged, whole = states(model), merged(model)
    np.testing.assert_allclose(unmerged, expected, atol=2e-5)
    np.testing.assert_allclose(states(whole), expected, atol=2e-5)
    difference = np.abs(states(whole) - unmerged).max() / np.linalg.norm(expected, axis=-1).max()
    record_property("merged", float(difference))
    assert difference <= 1e-5
    own = flat_state(nnx.state(base()))
    found = flat_state(nnx.state(whole))
    assert found.keys() == own.keys()
    for path, variable in own.items():
        same = np.array_equal(found[path][...], variable[...])
        assert same == (path[-1] != "kernel" or path[-2] not in targets), path


def test_a_decoder_with_new_adapters_is_the_same_one() -> None:
    np.testing.assert_array_equal(
        states(with_adapters(base(), jax.random.key(0), TARGETS, RANK, ALPHA)), states(base())
    )


def test_adapters_begin_as_peft_s_do() -> None:
    """a like `kaiming_uniform_(a=√5)` of torch, b zero."""
    model = with_adapters(base(), jax.random.key(0), TARGETS, 64, 64)
    for target, inputs in {"qkv": 16, "out": 16, "up": 16, "down": 64}.items():
        a = np.asarray(getattr(model.layers, target).lora.a[...])
        assert not np.any(np.asarray(getattr(model.layers, target).lora.b[...]))
        theirs = torch.empty(64, inputs)
        torch.nn.init.kaiming_uniform_(theirs, a=5**0.5)
        bound = 1 / inputs**0.5
        assert theirs.abs().max() <= bound
        assert 0.97 * bound < np.abs(a).max() <= bound
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not np.array_equal(a[0], a[1]), "layers differ"


def test_every_parameter_has_an_axis_for_each_dimension() -> None:
    model = with_token_rows(with_adapters(base(), jax.random.key(0), TARGETS, RANK, ALPHA), [3, 5])
    for variables in (nnx.state(model), nnx.state(with_upper_layers(base(), 2))):
        for path, variable in nnx.to_flat_state(variables):
            assert len(variable.axes) == variable.ndim, path
            assert ("layer" in variable.axes) == (path[0] in ("layers", "upper_layers")), path
    check_divisible(nnx.state(model), make_mesh(2, 2, 2))
    specs = flat_state(partition_specs(nnx.state(model)))
    places = {path: tuple(spec.get_value()) for path, spec in specs.items() if path[0] != "layers"}
    assert places["last_layer", "qkv", "lora", "a"] == ("fsdp", None)
    assert places["last_layer", "qkv", "lora", "b"] == (None, None, "tensor", None)
    assert places["last_layer", "out", "lora", "a"] == ("tensor", None, None)
    assert places["last_layer", "out", "lora", "b"] == (None, "fsdp")
    assert places["last_layer", "up", "lora", "b"] == (None, "tensor")
    assert places["token_rows", "table"] == (None, "fsdp")


@pytest.mark.parametrize("ids", [[7], [59, 0, 7, 7], list(range(60))])
def test_rows_stand_in_place_of_the_table_s(ids: list[int]) -> None:
    model = shaken(with_token_rows(base(), ids))
    rows = np.asarray(model.token_rows.table[...])
    assert len(rows) == len(set(ids))
    table = np.asarray(base().table[...]).copy()
    expected = table.copy()
    expected[sorted(set(ids))] = rows
    difference = {"word_embeddings.weight": expected - table}
    np.testing.assert_allclose(states(model), torch_states(difference), atol=2e-5)
    whole = merged(model)
    np.testing.assert_array_equal(whole.table[...], expected)
    np.testing.assert_array_equal(states(whole), states(model))


def test_new_rows_are_those_of_the_table() -> None:
    np.testing.assert_array_equal(states(with_token_rows(base(), [1, 2, int(TOKENS[0, 0])])), states(base()))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_upper_layers_change_nothing(count: int) -> None:
    model = with_upper_layers(base(), count)
    assert (model.upper_layers is None) == (count == 3)
    np.testing.assert_array_equal(states(model), states(base()))
    tokens, segments = jnp.asarray(TOKENS), jnp.asarray(SEGMENTS)
    np.testing.assert_array_equal(model.layer_states(tokens, segments), base().layer_states(tokens, segments))
    back = flat_state(nnx.state(merged(model)))
    for path, variable in flat_state(nnx.state(base())).items():
        np.testing.assert_array_equal(back[path][...], variable[...])


def test_the_decoder_that_is_given_stays_as_it_is() -> None:
    model = base()
    with_upper_layers(with_token_rows(with_adapters(model, jax.random.key(0), TARGETS, 1, 1), [1]), 1)
    assert flat_state(nnx.state(model)).keys() == flat_state(nnx.state(base())).keys()
    assert not any(isinstance(module, Adapter) for _, module in nnx.iter_modules(model))
    assert merged(model) is model
