"""Small BLOOMs for tests: transformers' and ours with the same random weights, far from initialisation."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import BloomConfig as TorchConfig
from transformers import BloomModel

from jaxembed.models.bloom import Bloom, BloomConfig, weight_map
from jaxembed.models.weights import assignments

torch.set_num_threads(1)

QUICK = {"xla_backend_optimization_level": 0}
"""Compiler options for programs that run once: the same program, in half the time to compile."""


def random_bloom(config: BloomConfig, seed: int = 0, scale: float = 0.2) -> BloomModel:
    """transformers' model, float32, every weight, bias and norm moved by normal noise of that scale."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = BloomModel(TorchConfig(**config.to_huggingface())).eval()
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape))
    return model


def in_jax(config: BloomConfig, tensors: Mapping[str, torch.Tensor]) -> dict[tuple[str, ...], np.ndarray]:
    """Tensors under transformers' names (weights, or their gradients) as our parameters, by path."""
    _, state = nnx.split(abstract_bloom(config))
    arrays: dict[Any, np.ndarray] = {
        path: np.zeros(variable.shape, np.float32) for path, variable in nnx.to_flat_state(state)
    }
    for each in assignments(weight_map(config), config.layers):
        values = each.rule.relayout.to_jax(tensors[each.source].detach().float().numpy())
        arrays[each.path][... if each.index is None else each.index] = values
    return arrays


def abstract_bloom(config: BloomConfig) -> Bloom:
    """Shapes in place of arrays."""
    return jax.eval_shape(lambda key: Bloom(key, config), jax.random.key(0))


def from_torch(config: BloomConfig, model: BloomModel) -> Bloom:
    """Our model with the weights of that one."""
    graph, state = nnx.split(abstract_bloom(config))
    arrays = in_jax(config, model.state_dict())
    return nnx.merge(graph, nnx.map_state(lambda path, v: v.replace(jnp.asarray(arrays[path])), state))
