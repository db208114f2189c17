"""The decoder against transformers' `BloomModel`, and against itself under packing, pooling and checkpointing."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import print_saved_residuals
from transformers.models.bloom import modeling_bloom

from jaxembed.errors import InputError
from jaxembed.models.bloom import LAYER_CHECKPOINTS, Bloom, BloomConfig, Layer, weight_map
from jaxembed.models.weights import assignments
from jaxembed.ops.norms import unit_norm
from jaxembed.sharding import Alone
from jaxembed.text.packing import Rows, RowShape, best_fit_rows, fill_rows

from blooms import QUICK, abstract_bloom, from_torch, random_bloom

VOCAB = 211
LENGTHS = (1, 2, 16, 63, 64, 65, 127, 300)
SHAPE = RowShape(length=320, rows=len(LENGTHS), slots=4)
Texts = list[np.ndarray]

states = jax.jit(Bloom.states, static_argnames=("dtype", "layer_checkpoint"))
layer_states = jax.jit(Bloom.layer_states, static_argnames="dtype")


def config(heads: int = 4, layers: int = 3, **options) -> BloomConfig:
    return BloomConfig(VOCAB, 8 * heads, layers, heads, **options)


def random_texts(lengths, seed: int = 0) -> Texts:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, VOCAB, length).astype(np.int32) for length in lengths]


def padded(texts: Texts, length: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids and attention mask, a text a row."""
    ids, mask = np.full((len(texts), length), 3, np.int32), np.zeros((len(texts), length), np.int32)
    for row, text in enumerate(texts):
        place = slice(length - len(text), length) if left else slice(0, len(text))
        ids[row, place], mask[row, place] = text, 1
    return ids, mask


@dataclasses.dataclass(frozen=True)
class Layout:
    """Texts in rows, and where each of them lies there."""

    name: str
    tokens: np.ndarray
    segments: np.ndarray
    places: list[tuple[int, slice]]

    def of_each_text(self, states: np.ndarray) -> list[np.ndarray]:
        """`[…, rows, length, dim]` → for each text `[…, its length, dim]`."""
        return [states[..., row, place, :] for row, place in self.places]


def layouts(texts: Texts) -> list[Layout]:
    """The texts of `LENGTHS`: one a row, with padding on either side, and packed."""
    length = SHAPE.length
    right, left = [slice(0, len(text)) for text in texts], [slice(length - len(text), length) for text in texts]
    order = [7, 5, 1, 0, 4, 2, 6, 3]
    rows = fill_rows(texts, [order[:1], order[1:5], order[5:]], SHAPE)
    ends = {text: (row, rows.last[row, slot] + 1) for (row, slot), text in np.ndenumerate(rows.texts) if text >= 0}
    packed = [(row, slice(end - len(texts[i]), end)) for i, (row, end) in sorted(ends.items())]
    return [
        Layout("right-padded", *padded(texts, length, left=False), list(enumerate(right))),
        Layout("left-padded", *padded(texts, length, left=True), list(enumerate(left))),
        Layout("packed", rows.tokens, rows.segments, packed),
    ]


def inputs(rows: Rows) -> tuple[jax.Array, ...]:
    return jnp.asarray(rows.tokens), jnp.asarray(rows.segments), jnp.asarray(rows.last)


def torch_states(model, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()


def torch_layer_states(model, texts: Texts) -> list[np.ndarray]:
    """`[layers + 1, length, dim]` for each text, padded to the longest."""
    ids, mask = padded(texts, max(map(len, texts)), left=False)
    with torch.no_grad():
        found = model(torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True).hidden_states
    return [torch.stack(found)[:, row, : len(text)].numpy() for row, text in enumerate(texts)]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def assert_same(ours: list[np.ndarray], theirs: list[np.ndarray], record) -> None:
    """Two lists of the states of each text."""
    difference = max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
    relative = float(difference / np.concatenate(theirs).std())
    cosine = float(min(cosines(a[-1], b[-1]) for a, b in zip(ours, theirs)))
    record("difference", relative)
    record("1 - cosine", 1 - cosine)
    assert relative <= 1e-4
    assert cosine >= 0.999999


@pytest.mark.parametrize(
    "config",
    [
        config(4),
        config(6),
        config(16),
        config(20),
        config(4, residual_after_norm=True),
        config(6, layers=1),
        config(4, layers=2, epsilon=1e-3),
        config(4, causal=False),
        config(6, layers=1, causal=False),
        config(20, layers=2, causal=False),
    ],
    ids=lambda c: f"{c.heads}heads-{c.layers}layers{'-after_norm' * c.residual_after_norm}{'-both' * (not c.causal)}",
)
def test_hidden_states_are_those_of_transformers(config: BloomConfig, record_property) -> None:
    texts = random_texts(LENGTHS)
    reference = random_bloom(config)
    model = from_torch(config, reference)
    ids, mask = padded(texts, 300, left=False)
    theirs = [s[: len(text)] for s, text in zip(torch_states(reference, ids, mask), texts)]
    for layout in layouts(texts):
        ours = np.asarray(states(model, layout.tokens, layout.segments))
        assert_same(layout.of_each_text(ours), theirs, record_property)


@pytest.mark.parametrize("heads", [4, 6, 16, 20])
@pytest.mark.parametrize("layers", [1, 3])
def test_states_of_every_layer_are_those_of_transformers(heads: int, layers: int, record_property) -> None:
    texts = random_texts(LENGTHS)
    reference = random_bloom(config(heads, layers))
    model = from_torch(config(heads, layers), reference)
    theirs = torch_layer_states(reference, texts)
    for layout in layouts(texts):
        found = np.asarray(layer_states(model, layout.tokens, layout.segments))
        assert found.shape == (layers + 1, *layout.tokens.shape, 8 * heads)
        ours = layout.of_each_text(found)
        for layer in range(layers + 1):
            assert_same([text[layer] for text in ours], [text[layer] for text in theirs], record_property)


def test_the_last_of_all_states_are_the_final_ones() -> None:
    model = from_torch(config(), random_bloom(config()))
    tokens, segments = padded(random_texts((5, 20)), 32, left=False)
    for dtype in (jnp.float32, jnp.bfloat16):
        found = layer_states(model, tokens, segments, dtype=dtype)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found[-1], states(model, tokens, segments, dtype=dtype), atol=1e-5)


def test_left_padding_in_transformers_is_left_padding_here() -> None:
    """ALiBi there counts from the first real token, here from the row's beginning."""
    texts = random_texts((3, 40))
    reference = random_bloom(config())
    ids, mask = padded(texts, 40, left=True)
    theirs = torch_states(reference, ids, mask)
    ours = np.asarray(states(from_torch(config(), reference), ids, mask))
    np.testing.assert_allclose(ours[mask > 0], theirs[mask > 0], atol=1e-4 * theirs.std())


def test_bidirectional_is_a_mask_of_zeros_in_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """`is_causal: false` in their config is the same model with nothing masked, and ALiBi left as it is."""
    (text,) = random_texts((70,))
    causal = random_bloom(config())
    monkeypatch.setattr(modeling_bloom, "create_causal_mask", lambda **_: torch.zeros(1, 1, 70, 70))
    theirs = torch_states(causal, text[None], np.ones((1, 70), np.int64))
    both = config(causal=False)
    ours = np.asarray(states(from_torch(both, causal), text[None], np.ones((1, 70), np.int32)))
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * theirs.std())
    monkeypatch.undo()
    assert random_bloom(both).config.is_causal is False
    np.testing.assert_allclose(
        torch_states(random_bloom(both), text[None], np.ones((1, 70), np.int64)), theirs, atol=1e-5
    )
    alone = torch_states(causal, text[None], np.ones((1, 70), np.int64))
    assert np.abs(alone - theirs).max() > 0.1 * theirs.std()


@pytest.fixture(scope="module")
def model() -> Bloom:
    return from_torch(config(), random_bloom(config()))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_pooled_states_are_the_states_at_these_positions(layers: int, causal: bool) -> None:
    shape = config(layers=layers, causal=causal)
    model = from_torch(shape, random_bloom(shape))
    texts = random_texts((5, 9, 20, 30))
    rows = fill_rows(texts, [[0, 1], [2], [3]], RowShape(32, 3, 4))
    everywhere = np.asarray(states(model, rows.tokens, rows.segments))
    pooled = np.asarray(states(model, rows.tokens, rows.segments, rows.last))
    assert pooled.shape == (3, 4, 32)
    for row, slot in np.argwhere(rows.last >= 0):
        np.testing.assert_allclose(pooled[row, slot], everywhere[row, rows.last[row, slot]], atol=2e-6)
    np.testing.assert_allclose(pooled[rows.last < 0], everywhere[np.argwhere(rows.last < 0)[:, 0], 0], atol=2e-6)


ROWS, LENGTH, SLOTS, TEXTS, LONGEST = 6, 48, 6, 12, 24
embed = jax.jit(lambda model, *rows: unit_norm(model.states(*rows)))


def alone(model: Bloom, texts: Texts) -> np.ndarray:
    """Embeddings, each text in a row of its own."""
    ids, mask = padded(texts, LONGEST, left=False)
    return np.asarray(embed(model, ids, mask, mask.sum(1, keepdims=True) - 1))[:, 0]


@given(
    lengths=st.lists(st.integers(1, LONGEST), min_size=TEXTS, max_size=TEXTS),
    seed=st.integers(0, 1000),
    best_fit=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_packed_is_unpacked(lengths: list[int], seed: int, best_fit: bool) -> None:
    """Neighbours, the place in the row, the row and the number of texts leave an embedding as it is."""
    model = _packing_model()
    texts = random_texts(lengths, seed)
    rng = np.random.default_rng(seed)
    in_pairs = rng.permutation(TEXTS).reshape(ROWS, 2).tolist()
    members = best_fit_rows(np.array(lengths), LENGTH, SLOTS) if best_fit else in_pairs
    rng.shuffle(members)
    for inside in members:
        rng.shuffle(inside)
    expected = alone(model, texts)
    rows = fill_rows(texts, members, RowShape(LENGTH, ROWS, SLOTS), pad=3)
    found = np.asarray(embed(model, rows.tokens, rows.segments, rows.last))
    seen = set()
    for row, slot in np.argwhere(rows.last >= 0):
        text = int(rows.texts[row, slot])
        seen.add(text)
        np.testing.assert_allclose(found[row, slot], expected[text], atol=1e-5)
    assert seen == set(range(TEXTS))


@functools.cache
def _packing_model() -> Bloom:
    return from_torch(config(6), random_bloom(config(6)))


def test_no_gradient_crosses_to_a_neighbour(model: Bloom) -> None:
    """The embedding of one text, differentiated by the vocabulary: nothing for the tokens of its neighbours."""
    texts = [np.arange(10, 15), np.arange(20, 30), np.arange(40, 47)]
    rows = inputs(fill_rows(texts, [[0, 1, 2]], RowShape(32, 1, 4), pad=3))
    graph, table, rest = nnx.split(model, lambda path, _: path[0] == "table", ...)

    def second(table: nnx.State) -> jax.Array:
        states = nnx.merge(graph, table, rest).states(*rows)
        return (states[0, 1] ** 3).sum()

    gradient = np.asarray(jax.jit(jax.grad(second))(table)["table"][...])
    np.testing.assert_array_equal(np.flatnonzero(np.abs(gradient).sum(1)), texts[1])


@pytest.fixture(scope="module")
def checkpointed(model: Bloom) -> dict[str, jax.stages.Traced]:
    """Value and gradient of one loss, traced under each policy."""
    rows = inputs(fill_rows(random_texts((5, 9, 20)), [[0, 1], [2]], RowShape(32, 2, 4)))

    def loss(model: Bloom, policy: str) -> jax.Array:
        return (model.states(*rows, layer_checkpoint=policy) ** 3).sum()

    function = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    return {policy: function.trace(model, policy) for policy in LAYER_CHECKPOINTS}


def test_layer_checkpoints_change_nothing(model: Bloom, checkpointed) -> None:
    results = {policy: traced.lower().compile(QUICK)(model) for policy, traced in checkpointed.items()}
    expected, expected_gradient = results["none"]
    for value, gradient in results.values():
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("kernel", ["plain", "flash:interpret", "splash:interpret"])
def test_what_a_layer_keeps_for_its_backward_pass(kernel: str, capsys) -> None:
    """Beside its input q, k, v, their context, the stream between, and what goes into the activation; no weight."""
    shape = BloomConfig(VOCAB, dim=64, layers=1, heads=4)
    graph, state = nnx.split(Layer(jax.random.key(0), shape))

    def layer(state: nnx.State, x: jax.Array) -> jax.Array:
        segments, slopes = jnp.ones(x.shape[:2], jnp.int32), jnp.ones(4)
        return nnx.merge(graph, state)(x, segments, slopes, Alone(), attention_kernel=kernel)

    layer = jax.checkpoint(layer, policy=LAYER_CHECKPOINTS["none"])
    print_saved_residuals(layer, state, jnp.zeros((2, 128, 64), jnp.bfloat16))
    lines = capsys.readouterr().out.splitlines()
    kept = [line.split()[0] for line in lines if "from the argument" not in line and " from a constant" not in line]
    context = "bf16[2,4,128,16]" if kernel.startswith("splash") else "bf16[2,128,64]"
    statistics = [] if kernel == "plain" else ["f32[2,4,128]"]
    assert sorted(kept) == sorted([*["bf16[2,128,64]"] * 4, context, "bf16[2,128,256]", *statistics])


def test_a_checkpointed_layer_is_computed_again(checkpointed) -> None:
    """Else the policies above were the same program."""
    products = {policy: str(traced.jaxpr).count("dot_general") for policy, traced in checkpointed.items()}
    assert products["none"] < products["dots"] < products["full"]


def test_bfloat16_is_near_and_the_result_float32(model: Bloom) -> None:
    texts = random_texts((5, 9, 20))
    rows = fill_rows(texts, [[0, 1], [2]], RowShape(32, 2, 2))
    near = states(model, rows.tokens, rows.segments, rows.last, dtype=jnp.bfloat16)
    exact = states(model, rows.tokens, rows.segments, rows.last)
    assert near.dtype == jnp.float32
    used = rows.last >= 0
    assert cosines(np.asarray(near)[used], np.asarray(exact)[used]).min() > 0.999
    assert not np.allclose(near, exact, atol=1e-5)


def test_bfloat16_weights_compute_as_float32_ones(model: Bloom) -> None:
    """Frozen parameters may be kept in bfloat16: they are cast where they are used."""
    rows = fill_rows(random_texts((5, 9, 20)), [[0, 1], [2]], RowShape(32, 2, 2))
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), model)
    rounded = jax.tree.map(lambda w: w.astype(jnp.float32), half)
    np.testing.assert_allclose(
        states(half, rows.tokens, rows.segments, rows.last),
        states(rounded, rows.tokens, rows.segments, rows.last),
        atol=1e-5,
    )


def test_weights_return_to_transformers_as_they_came() -> None:
    reference = random_bloom(config(6))
    model = from_torch(config(6), reference)
    flat: dict[Any, nnx.Variable] = dict(nnx.to_flat_state(nnx.state(model)))
    theirs = reference.state_dict()
    ours = {}
    for each in assignments(weight_map(config(6)), 3):
        array = np.asarray(flat[each.path][...])
        ours[each.source] = each.rule.relayout.to_huggingface(array if each.index is None else array[each.index])
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor.numpy(), err_msg=name, strict=True)


def test_initialisation_is_bloom_and_no_two_layers_are_alike() -> None:
    model = Bloom(jax.random.key(1), config(4, layers=4))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        values = np.asarray(variable[...])
        kind: Any = path[-1]
        expected = {"bias": (0, 0), "scale": (1, 0), "kernel": (0, 0.02), "table": (0, 0.02)}[kind]
        np.testing.assert_allclose((values.mean(), values.std()), expected, atol=2e-3, err_msg=str(path))
    kernels = [*np.asarray(model.layers.up.kernel[...]), np.asarray(model.last_layer.up.kernel[...])]
    assert len({kernel.tobytes() for kernel in kernels}) == 4


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_every_parameter_names_each_of_its_dimensions(layers: int) -> None:
    variables = nnx.to_flat_state(nnx.state(abstract_bloom(config(layers=layers))))
    assert len(variables) == 1 + 2 + 12 * (2 if layers > 1 else 1) + 2
    for path, variable in variables:
        assert len(variable.axes) == len(variable.shape), path
        assert ("layer" in variable.axes) == (path[0] == "layers"), path
        for axis, size in zip(variable.axes, variable.shape):
            sizes = {"layer": layers - 1, "vocab": VOCAB, "qkv": 3, "heads": 4, "head_dim": 8, "mlp": 128}
            assert size == sizes.get(axis, size), (path, axis)


def test_shape_of_560m() -> None:
    """Parameter count of bigscience/bloom-560m, without its head."""
    model = abstract_bloom(BloomConfig(250_880, 1024, 24, 16))
    assert sum(v.size for _, v in nnx.to_flat_state(nnx.state(model))) == 559_214_592


def test_config_in_both_spellings() -> None:
    expected = BloomConfig(vocab_size=100, dim=24, layers=5, heads=6)
    assert BloomConfig.from_huggingface({"vocab_size": 100, "hidden_size": 24, "n_layer": 5, "n_head": 6}) == expected
    names = {"vocab_size": 100, "n_embed": 24, "num_hidden_layers": 5, "num_attention_heads": 6}
    assert BloomConfig.from_huggingface(names) == expected
    assert BloomConfig.from_huggingface(random_bloom(expected).config.to_dict()) == expected


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1e-5, 1e-6]), st.booleans(), st.booleans())
def test_config_survives_the_round_trip(layers: int, heads: int, epsilon: float, after: bool, causal: bool) -> None:
    value = BloomConfig(100, 8 * heads, layers, heads, epsilon, after, causal=causal)
    assert BloomConfig.from_huggingface(value.to_huggingface()) == value


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_layer": None}, "'n_layer' or 'num_hidden_layers'"),
        ({"vocab_size": "many"}, "'vocab_size'"),
        ({"n_head": 5}, "5 heads do not divide the hidden size 32"),
        ({"is_causal": "no"}, "true or false under 'is_causal', found 'no'"),
    ],
)
def test_a_wrong_config_is_an_error_that_names_the_key(changes: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        BloomConfig.from_huggingface(config().to_huggingface() | changes)
