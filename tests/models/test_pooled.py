"""Poolings of packed rows against sentence-transformers' Pooling on transformers' hidden states."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.modules import Pooling as TheirPooling

from jaxembed.errors import InputError
from jaxembed.models.bloom import Bloom, BloomConfig
from jaxembed.models.pooled import check_pooling, pooled_states
from jaxembed.text.format import SENTENCE_TRANSFORMERS_POOLING, Pooling
from jaxembed.text.packing import Rows, RowShape, best_fit_rows, fill_rows

from blooms import QUICK, from_torch, in_jax, random_bloom

CAUSAL = BloomConfig(vocab_size=97, dim=32, layers=2, heads=4)
CONFIGS = {True: CAUSAL, False: dataclasses.replace(CAUSAL, causal=False)}
POOLINGS: tuple[Pooling, ...] = ("last", "mean", "weighted_mean", "first")
LONGEST, ROWS, LENGTH, SLOTS = 20, 7, 40, 5
LENGTHS = (1, 4, 20, 13, 7, 20, 2, 5, 9)
SKIPPED = (0, 3, 3, 3, 6, 3, 1, 0, 3)
Texts = list[np.ndarray]

pooled = jax.jit(pooled_states, static_argnames="pooling", compiler_options=QUICK)


def random_texts(lengths, seed: int = 0) -> Texts:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, CAUSAL.vocab_size, length).astype(np.int32) for length in lengths]


@functools.cache
def model_of(causal: bool) -> Bloom:
    return from_torch(CONFIGS[causal], random_bloom(CONFIGS[causal]))


def vectors(model: Bloom, rows: Rows, pooling: Pooling) -> np.ndarray:
    """In the order of the texts."""
    found = np.asarray(pooled(model, rows.tokens, rows.segments, rows.first, rows.last, pooling=pooling))
    used = rows.texts >= 0
    return found[used][np.argsort(rows.texts[used])]


def in_one_row_each(texts: Texts, skipped, left: bool) -> Rows:
    """As sentence-transformers pads them."""
    tokens, segments = np.full((len(texts), LONGEST), 3, np.int32), np.zeros((len(texts), LONGEST), np.int32)
    starts = np.array([LONGEST - len(text) if left else 0 for text in texts])
    lengths = np.array([len(text) for text in texts])
    for row, (start, text) in enumerate(zip(starts, texts)):
        tokens[row, start : start + len(text)], segments[row, start : start + len(text)] = text, 1
    first, last = starts + np.asarray(skipped), starts + lengths - 1
    return Rows(tokens, segments, *(x[:, None].astype(np.int32) for x in (first, last, np.arange(len(texts)))))


def packed(texts: Texts, skipped, seed: int = 0) -> Rows:
    members = best_fit_rows(np.array([len(text) for text in texts]), LENGTH, SLOTS)
    np.random.default_rng(seed).shuffle(members)
    return fill_rows(texts, members, RowShape(LENGTH, ROWS, SLOTS), 3, skipped)


def theirs(model, texts: Texts, skipped, pooling: Pooling, left: bool = True) -> torch.Tensor:
    """A text at a time where they skip different numbers of tokens: sentence-transformers has one for a batch."""
    module = TheirPooling(CAUSAL.dim, SENTENCE_TRANSFORMERS_POOLING[pooling][0], include_prompt=False)
    found = []
    for number in sorted(set(skipped)):
        which = [index for index, each in enumerate(skipped) if each == number]
        rows = in_one_row_each([texts[index] for index in which], [0] * len(which), left)
        ids, mask = torch.tensor(rows.tokens), torch.tensor(rows.segments)
        states = model(ids, attention_mask=mask).last_hidden_state
        features = {"token_embeddings": states, "attention_mask": mask, "prompt_length": number}
        found += zip(which, module(features)["sentence_embedding"])
    return torch.stack([vector for _, vector in sorted(found, key=lambda pair: pair[0])])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("skipped", [(0,) * len(LENGTHS), SKIPPED], ids=["all", "without prompts"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_are_those_of_sentence_transformers(pooling: Pooling, skipped: tuple[int, ...], causal: bool) -> None:
    texts = random_texts(LENGTHS)
    with torch.no_grad():
        reference = random_bloom(CONFIGS[causal])
        expected = theirs(reference, texts, skipped, pooling).numpy()
        right = theirs(reference, texts, skipped, pooling, left=False).numpy()
    np.testing.assert_allclose(right, expected, atol=1e-4 * expected.std())
    layouts = [packed(texts, skipped), *(in_one_row_each(texts, skipped, left) for left in (True, False))]
    for rows in layouts:
        found = vectors(model_of(causal), rows, pooling)
        np.testing.assert_allclose(found, expected, atol=1e-4 * expected.std())


@given(
    lengths=st.lists(st.integers(1, LONGEST), min_size=8, max_size=8),
    skip=st.integers(0, 6),
    causal=st.booleans(),
    pooling=st.sampled_from(POOLINGS),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_packed_is_unpacked(lengths: list[int], skip: int, causal: bool, pooling: Pooling, seed: int) -> None:
    texts, skipped = random_texts(lengths, seed), [min(skip, length - 1) for length in lengths]
    model = model_of(causal)
    alone = vectors(model, in_one_row_each([*texts, texts[0]], [*skipped, skipped[0]], left=False), pooling)[:-1]
    together = vectors(model, packed(texts, skipped, seed), pooling)
    np.testing.assert_allclose(together, alone, atol=1e-5 * np.abs(alone).max())


def test_an_empty_slot_of_a_mean_is_zero() -> None:
    rows = packed(random_texts(LENGTHS), SKIPPED)
    for pooling in ("mean", "weighted_mean"):
        found = np.asarray(pooled(model_of(True), rows.tokens, rows.segments, rows.first, rows.last, pooling=pooling))
        np.testing.assert_array_equal(found[rows.texts < 0], 0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "first"])
def test_gradients_are_those_of_torch(pooling: Pooling, causal: bool) -> None:
    """Of every parameter, through pooling and attention, in a loss that no text leaves out."""
    texts = random_texts(LENGTHS)
    weights = np.random.default_rng(1).normal(size=(len(texts), CAUSAL.dim)).astype(np.float32)
    reference = random_bloom(CONFIGS[causal]).double()
    # Padded on the right: in float64 their left padding, which attends to nothing, is NaN.
    (theirs(reference, texts, SKIPPED, pooling, left=False) * torch.tensor(weights)).pow(3).sum().backward()
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(reference.parameters()))
    expected = in_jax(CAUSAL, gradients)
    rows = packed(texts, SKIPPED)
    used = rows.texts >= 0
    places = np.argwhere(used)[np.argsort(rows.texts[used])].T

    def loss(model: Bloom) -> jax.Array:
        found = pooled_states(model, *map(jnp.asarray, (rows.tokens, rows.segments, rows.first, rows.last)), pooling)
        return ((found[places[0], places[1]] * weights) ** 3).sum()

    found = jax.jit(jax.grad(loss), compiler_options=QUICK)(model_of(causal))
    for path, variable in nnx.to_flat_state(nnx.state(found)):
        difference = np.abs(np.asarray(variable[...]) - expected[path]).max()
        assert difference <= 1e-5 * np.abs(expected[path]).max(), path


def test_the_first_token_of_a_causal_decoder_is_refused() -> None:
    for pooling in POOLINGS:
        check_pooling(pooling, causal=False)
        if pooling != "first":
            check_pooling(pooling, causal=True)
    with pytest.raises(InputError, match=r"text_format\.pooling: .*one embedding.*model\.attention"):
        check_pooling("first", causal=True)
