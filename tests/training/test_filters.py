"""Which parameters train, and which of them decay."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxembed.models.bloom import Bloom, BloomConfig
from jaxembed.training.filters import TRAINABLE, count, decays

from blooms import abstract_bloom

CONFIG = BloomConfig(50, 16, 3, 4)


def trainable(name: str, model: Bloom) -> nnx.State:
    return nnx.split(model, TRAINABLE[name], ...)[1]


def test_full_is_everything() -> None:
    _, state, frozen = nnx.split(abstract_bloom(CONFIG), TRAINABLE["full"], ...)
    assert count(state) == count(nnx.state(abstract_bloom(CONFIG)))
    assert not nnx.to_flat_state(frozen)


def test_bitfit_is_the_biases_of_every_layer_and_norm() -> None:
    state = trainable("bitfit", abstract_bloom(CONFIG))
    layer = {(name, "bias") for name in ("attention_norm", "qkv", "out", "mlp_norm", "up", "down")}
    assert {path for path, _ in nnx.to_flat_state(state)} == {
        ("table_norm", "bias"),
        ("final_norm", "bias"),
        *(("layers", *path) for path in layer),
        *(("last_layer", *path) for path in layer),
    }
    assert count(state) == 16 * (2 + 3 * (2 + 3 + 1 + 4 + 1))


def test_bitfit_of_560m() -> None:
    assert count(trainable("bitfit", abstract_bloom(BloomConfig(250_880, 1024, 24, 16)))) == 272_384


def test_matrices_decay_and_nothing_else() -> None:
    """Seen through optax: with no gradient, what decays is what moves."""
    state = jax.tree.map(lambda x: jnp.ones(x.shape), trainable("full", abstract_bloom(CONFIG)))
    optimiser = optax.adamw(0.5, weight_decay=0.5, mask=decays)
    updates, _ = optimiser.update(jax.tree.map(jnp.zeros_like, state), optimiser.init(state), state)
    moved: Any = optax.apply_updates(state, updates)
    for path, variable in nnx.to_flat_state(moved):
        expected = 0.75 if path[-1] in ("kernel", "table") else 1.0
        np.testing.assert_array_equal(variable[...], expected, err_msg=str(path))


def test_nothing_of_bitfit_decays() -> None:
    state = trainable("bitfit", abstract_bloom(CONFIG))
    assert not any(jax.tree.leaves(decays(state)))
