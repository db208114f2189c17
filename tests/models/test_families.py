"""The table of families."""

import jax
import pytest
from flax import nnx

from jaxembed.errors import InputError
from jaxembed.models import FAMILIES, family_of
from jaxembed.models.weights import assignments


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layers", [1, 3])
def test_the_weight_map_is_the_model(name: str, layers: int) -> None:
    """Each parameter, and each layer of a stack, has one tensor, in a shape that becomes the parameter's."""
    family = FAMILIES[name]
    values = {"vocab_size": 50, "hidden_size": 24, "n_layer": layers, "n_head": 6}
    config = family.config.from_huggingface(values)
    model = jax.eval_shape(lambda key: family.model(key, config), jax.random.key(0))
    shapes = {path: variable.shape for path, variable in nnx.to_flat_state(nnx.state(model))}
    wanted = {
        (path, index)
        for path, shape in shapes.items()
        for index in (range(shape[0]) if path[0] == "layers" else [None])
    }
    filled = [(each.path, each.index) for each in assignments(family.weight_map(config), layers)]
    assert len(filled) == len(set(filled))
    assert set(filled) == wanted
    for each in assignments(family.weight_map(config), layers):
        shape = shapes[each.path] if each.index is None else shapes[each.path][1:]
        assert len(each.rule.relayout.huggingface_shape(shape)) in (1, 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_found_by_the_name_in_its_own_config(name: str) -> None:
    family = FAMILIES[name]
    config = family.config.from_huggingface({"vocab_size": 50, "hidden_size": 24, "n_layer": 2, "n_head": 6})
    assert family_of(config.to_huggingface()) is family


@pytest.mark.parametrize("config", [{}, {"model_type": "bert"}, {"model_type": None}])
def test_an_unknown_architecture_is_an_error_that_lists_the_known(config: dict) -> None:
    with pytest.raises(InputError, match=r"unknown architecture: model_type is .*'bloom'"):
        family_of(config)
