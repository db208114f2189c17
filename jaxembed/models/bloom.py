"""BLOOM (arXiv 2211.05100) as a text encoder: the decoder without its head.

The input is packed rows. All layers but the last are stacked and scanned; the last one runs only for the positions that
are read, where these are given: every other query, projection, MLP and final norm of it would be thrown away. Formulas
follow transformers' modeling_bloom.py; dropouts, zero in every released model, do not exist here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxembed.errors import InputError
from jaxembed.models.parts import Adapter, TokenRows
from jaxembed.models.weights import IDENTITY, TRANSPOSE, Relayout, WeightRule
from jaxembed.ops.activations import gelu
from jaxembed.ops.alibi import alibi_slopes
from jaxembed.ops.attention import attention
from jaxembed.ops.kept import KEPT, kept, kept_flat
from jaxembed.ops.norms import layer_norm
from jaxembed.ops.pooling import take_positions
from jaxembed.sharding import Alone, Hooks

_named: Any = jax.checkpoint_policies.save_only_these_names(KEPT)


def _kept(primitive: Any, *operands: Any, **parameters: Any) -> bool:
    """What has the name; and kernels, which JAX would run again even where nobody takes what they give."""
    return primitive.name == "pallas_call" or _named(primitive, *operands, **parameters)


LAYER_CHECKPOINTS: Mapping[str, Any] = {
    "none": _kept,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What a layer keeps for its backward pass, by name: what spares it products and attention; results of products with
weights; its input.

By none of them weights that were cast or gathered: those of all layers are the whole model, on each chip.
"""


@dataclasses.dataclass(frozen=True)
class BloomConfig:
    """Shape of a BLOOM decoder, under Hugging Face's meaning of each number."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    epsilon: float = 1e-5
    residual_after_norm: bool = False
    initializer_range: float = 0.02
    """Standard deviation of random matrices."""
    causal: bool = True
    """Whether a token attends to those before it only; False: to its whole text (`is_causal` of transformers 5)."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], where: str = "config.json") -> "BloomConfig":
        """Reads a `config.json`, which `where` names in messages, under either spelling of its keys.

        Raises:
            InputError: a key is missing or not a number, heads do not divide the hidden size, or `is_causal` is
                neither true nor false.
        """

        def read(*names: str) -> int:
            for name in names:
                if isinstance(config.get(name), int):
                    return config[name]
            raise InputError(f"{where}: expected a whole number under {' or '.join(map(repr, names))}")

        causal = config.get("is_causal", True)
        if not isinstance(causal, bool):
            raise InputError(f"{where}: expected true or false under 'is_causal', found {causal!r}")
        result = cls(
            vocab_size=read("vocab_size"),
            dim=read("hidden_size", "n_embed"),
            layers=read("n_layer", "num_hidden_layers"),
            heads=read("n_head", "num_attention_heads"),
            epsilon=float(config.get("layer_norm_epsilon", 1e-5)),
            residual_after_norm=bool(config.get("apply_residual_connection_post_layernorm", False)),
            initializer_range=float(config.get("initializer_range", 0.02)),
            causal=causal,
        )
        if result.dim % result.heads:
            raise InputError(f"{where}: {result.heads} heads do not divide the hidden size {result.dim}")
        return result

    def to_huggingface(self) -> dict[str, Any]:
        """A `config.json` that transformers' `BloomModel` reads."""
        return {
            "architectures": ["BloomModel"],
            "model_type": "bloom",
            "vocab_size": self.vocab_size,
            "hidden_size": self.dim,
            "n_layer": self.layers,
            "n_head": self.heads,
            "layer_norm_epsilon": self.epsilon,
            "apply_residual_connection_post_layernorm": self.residual_after_norm,
            "initializer_range": self.initializer_range,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "use_cache": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 3,
            **({} if self.causal else {"is_causal": False}),
        }


def _normal(key: Array, shape: tuple[int, ...], axes: tuple[str, ...], deviation: float) -> nnx.Param:
    return nnx.Param(deviation * jax.random.normal(key, shape, jnp.float32), axes=axes)


def _constant(value: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


class LayerNorm(nnx.Module):
    def __init__(self, config: BloomConfig):
        self.scale = _constant(1.0, (config.dim,), ("features",))
        self.bias = _constant(0.0, (config.dim,), ("features",))
        self.epsilon = config.epsilon

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


class Linear(nnx.Module):
    """x · kernel + bias, over the kernel's leading `contracted` dimensions."""

    lora: Adapter | None = None

    def __init__(
        self, key: Array, shape: tuple[int, ...], axes: tuple[str, ...], deviation: float, contracted: int = 1
    ):
        self.kernel = _normal(key, shape, axes, deviation)
        bias_axes = tuple("features" if axis == "embed" else axis for axis in axes[contracted:])
        self.bias = _constant(0.0, shape[contracted:], bias_axes)
        self.contracted = contracted

    def __call__(self, x: Float[Array, "..."], hooks: Hooks) -> Float[Array, "..."]:
        kernel = hooks.weight(self.kernel, x.dtype)
        y = jnp.tensordot(x, kernel, axes=self.contracted) + self.bias[...].astype(x.dtype)
        return y if self.lora is None else y + self.lora(x, hooks)

    @property
    def inputs(self) -> tuple[int, ...]:
        """The dimensions of a layer's kernel that are contracted."""
        return tuple(range(self.contracted))


class Projections(nnx.Module):
    """Queries, keys and values: three matrices in one parameter, so that each can be applied to other positions."""

    inputs = (1,)
    """The dimension of a layer's kernel that is contracted."""
    lora: Adapter | None = None

    def __init__(self, key: Array, config: BloomConfig):
        shape = (3, config.dim, config.heads, config.head_dim)
        self.kernel = _normal(key, shape, ("qkv", "embed", "heads", "head_dim"), config.initializer_range)
        self.bias = _constant(0.0, (3, *shape[2:]), ("qkv", "heads", "head_dim"))

    def __call__(
        self, queried: Float[Array, "rows queries dim"], x: Float[Array, "rows length dim"], hooks: Hooks
    ) -> tuple[
        Float[Array, "rows queries heads head_dim"],
        Float[Array, "rows length heads head_dim"],
        Float[Array, "rows length heads head_dim"],
    ]:
        kernel, bias = hooks.weight(self.kernel, x.dtype), self.bias[...].astype(x.dtype)
        q, k, v = (jnp.tensordot(y, kernel[i], axes=1) + bias[i] for i, y in enumerate((queried, x, x)))
        if self.lora is not None:
            low = [self.lora.lower(y, hooks) for y in (queried, x)]
            q, k, v = (y + self.lora.upper(low[min(i, 1)], hooks, i) for i, y in enumerate((q, k, v)))
        return kept_flat(q), kept_flat(k), kept_flat(v)


class Layer(nnx.Module):
    """One decoder layer: attention, then MLP, each on its own normalised input, each added to the stream."""

    def __init__(self, key: Array, config: BloomConfig):
        keys = jax.random.split(key, 4)
        dim, heads, head_dim, deviation = config.dim, config.heads, config.head_dim, config.initializer_range
        self.attention_norm = LayerNorm(config)
        self.qkv = Projections(keys[0], config)
        self.out = Linear(keys[1], (heads, head_dim, dim), ("heads", "head_dim", "embed"), deviation, contracted=2)
        self.mlp_norm = LayerNorm(config)
        self.up = Linear(keys[2], (dim, 4 * dim), ("embed", "mlp"), deviation)
        self.down = Linear(keys[3], (4 * dim, dim), ("mlp", "embed"), deviation)
        self.residual_after_norm = config.residual_after_norm
        self.causal = config.causal

    def __call__(
        self,
        x: Float[Array, "rows length dim"],
        segments: Int[Array, "rows length"],
        slopes: Float[Array, " heads"],
        hooks: Hooks,
        positions: Int[Array, "rows slots"] | None = None,
        attention_kernel: str = "plain",
    ) -> Float[Array, "rows queries dim"]:
        """The stream after this layer: at every position, or at `positions` alone, to the same values."""
        a = self.attention_norm(x)
        queried = a
        if positions is not None:
            queried, x = take_positions(a, positions), take_positions(x, positions)
        context = attention(
            *self.qkv(queried, a, hooks), segments, slopes, positions, causal=self.causal, kernel=attention_kernel
        )
        x = kept((queried if self.residual_after_norm else x) + self.out(context, hooks))
        m = self.mlp_norm(x)
        hidden = gelu(kept(self.up(m, hooks)))
        return (m if self.residual_after_norm else x) + self.down(hidden, hooks)


class Bloom(nnx.Module):
    """The decoder. Layers 0 … layers − 2 are stacked in `layers` (absent for one layer), the last is `last_layer`."""

    upper_layers: Layer | None = None
    """The upper part of the stack, where it trains and the lower one does not."""
    token_rows: TokenRows | None = None

    def __init__(self, key: Array, config: BloomConfig):
        table_key, last_key, *layer_keys = jax.random.split(key, 1 + config.layers)
        self.table = _normal(table_key, (config.vocab_size, config.dim), ("vocab", "embed"), config.initializer_range)
        self.table_norm = LayerNorm(config)
        if layer_keys:
            stacked = jax.vmap(lambda k: Layer(k, config))(jnp.stack(layer_keys))
            graph, state = nnx.split(stacked)
            named = nnx.map_state(lambda _, v: v.replace(v[...], axes=("layer", *v.axes)), state)
            self.layers = nnx.merge(graph, named)
        self.last_layer = Layer(last_key, config)
        self.final_norm = LayerNorm(config)
        self.config = config

    def states(
        self,
        tokens: Int[Array, "rows length"],
        segments: Int[Array, "rows length"],
        positions: Int[Array, "rows slots"] | None = None,
        *,
        dtype: Any = jnp.float32,
        hooks: Hooks = Alone(),  # noqa: B008 (a frozen value)
        layer_checkpoint: str = "none",
        attention_kernel: str = "plain",
    ) -> Float[Array, "rows queries dim"]:
        """Final hidden states, float32: at every position of every row, or at `positions` of each (−1 = empty slot).

        Args:
            segments: 1, 2, … for the texts of a row, 0 for padding, on whichever side.
            dtype: of activations and of the weights in products.
            layer_checkpoint: a key of `LAYER_CHECKPOINTS`.
            attention_kernel: one of `ops.attention.KERNELS`.
        """
        slopes = jnp.asarray(alibi_slopes(self.config.heads))
        x = self._embedded(tokens, dtype, hooks)
        x, _ = self._stacked_layers(
            x, segments, slopes, hooks, layer_checkpoint=layer_checkpoint, attention_kernel=attention_kernel
        )

        def last(layer: Layer, x: Array) -> Array:
            return layer(x, segments, slopes, hooks, positions, attention_kernel)

        if layer_checkpoint != "none":  # its backward pass comes next, and would only gather its weights again
            last = jax.checkpoint(last, policy=LAYER_CHECKPOINTS[layer_checkpoint], prevent_cse=False)
        x = last(self.last_layer, x)
        return self.final_norm(x.astype(jnp.float32))

    def layer_states(
        self,
        tokens: Int[Array, "rows length"],
        segments: Int[Array, "rows length"],
        *,
        dtype: Any = jnp.float32,
        hooks: Hooks = Alone(),  # noqa: B008 (a frozen value)
    ) -> Float[Array, "{self.config.layers+1} rows length dim"]:
        """All hidden states, float32, as transformers' `BloomModel(output_hidden_states=True)` gives them.

        The embeddings after their norm, then what each layer puts out, the last one after the final norm. `tokens`,
        `segments` and `dtype` as in `states`. For comparisons: they are `layers + 1` times the memory of the last.
        """
        slopes = jnp.asarray(alibi_slopes(self.config.heads))
        embedded = self._embedded(tokens, dtype, hooks)
        x, between = self._stacked_layers(embedded, segments, slopes, hooks, keep=True)
        final = self.final_norm(self.last_layer(x, segments, slopes, hooks).astype(jnp.float32))
        before = [embedded[None]] if between is None else [embedded[None], between]
        return jnp.concatenate([*(states.astype(jnp.float32) for states in before), final[None]])

    def _embedded(self, tokens: Int[Array, "rows length"], dtype: Any, hooks: Hooks) -> Float[Array, "rows length dim"]:
        """The stream before the first layer."""
        x = hooks.lookup(self.table, tokens, dtype)
        x = x if self.token_rows is None else self.token_rows(x, tokens, hooks)
        # By itself it would keep several float32 arrays for its backward pass.
        return jax.checkpoint(LayerNorm.__call__, prevent_cse=False)(self.table_norm, x)

    def _stacked_layers(
        self,
        x: Float[Array, "rows length dim"],
        segments: Int[Array, "rows length"],
        slopes: Float[Array, " heads"],
        hooks: Hooks,
        *,
        layer_checkpoint: str = "none",
        attention_kernel: str = "plain",
        keep: bool = False,
    ) -> tuple[Float[Array, "rows length dim"], Float[Array, "stacked rows length dim"] | None]:
        """The stream after all layers but the last and, with `keep`, after each of them."""
        if self.config.layers == 1:
            return x, None

        def body(x: Array, layer: Layer) -> tuple[Array, Array | None]:
            x = layer(x, segments, slopes, hooks, attention_kernel=attention_kernel)
            return x, x if keep else None

        body = jax.checkpoint(body, policy=LAYER_CHECKPOINTS[layer_checkpoint], prevent_cse=False)
        x, between = jax.lax.scan(body, x, self.layers)
        if self.upper_layers is None:
            return x, between
        x, above = jax.lax.scan(body, x, self.upper_layers)
        return x, None if between is None or above is None else jnp.concatenate([between, above])


def weight_map(config: BloomConfig) -> tuple[WeightRule, ...]:
    """Hugging Face's names ↔ parameters of `Bloom`. Theirs are [out, in], with q, k, v of a head side by side."""
    heads, head_dim, dim = config.heads, config.head_dim, config.dim
    qkv_kernel = Relayout(
        "heads·3·head_dim, dim → 3, dim, heads, head_dim",
        shape=(heads * 3 * head_dim, dim),
        split=(heads, 3, head_dim, dim),
        axes=(1, 3, 0, 2),
    )
    qkv_bias = Relayout(
        "heads·3·head_dim → 3, heads, head_dim",
        shape=(heads * 3 * head_dim,),
        split=(heads, 3, head_dim),
        axes=(1, 0, 2),
    )
    out_kernel = Relayout(
        "dim, heads·head_dim → heads, head_dim, dim",
        shape=(dim, heads * head_dim),
        split=(dim, heads, head_dim),
        axes=(1, 2, 0),
    )

    def norm(name: str, *path: str) -> tuple[WeightRule, WeightRule]:
        return (
            WeightRule(f"{name}.weight", (*path, "scale"), IDENTITY),
            WeightRule(f"{name}.bias", (*path, "bias"), IDENTITY),
        )

    def linear(name: str, path: str, kernel: Relayout, bias: Relayout) -> tuple[WeightRule, WeightRule]:
        return (
            WeightRule(f"h.{{layer}}.{name}.weight", ("layers", path, "kernel"), kernel),
            WeightRule(f"h.{{layer}}.{name}.bias", ("layers", path, "bias"), bias),
        )

    return (
        WeightRule("word_embeddings.weight", ("table",), IDENTITY),
        *norm("word_embeddings_layernorm", "table_norm"),
        *norm("h.{layer}.input_layernorm", "layers", "attention_norm"),
        *linear("self_attention.query_key_value", "qkv", qkv_kernel, qkv_bias),
        *linear("self_attention.dense", "out", out_kernel, IDENTITY),
        *norm("h.{layer}.post_attention_layernorm", "layers", "mlp_norm"),
        *linear("mlp.dense_h_to_4h", "up", TRANSPOSE, IDENTITY),
        *linear("mlp.dense_4h_to_h", "down", TRANSPOSE, IDENTITY),
        *norm("ln_f", "final_norm"),
    )
