"""Poolings and attention in training: the gradient against torch on one device and eight, and whole runs."""

import dataclasses
import functools
import json
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import Mesh
from sentence_transformers.sentence_transformer.modules import Pooling as TheirPooling

from jaxembed import convert
from jaxembed.__main__ import run_command
from jaxembed.data.loader import RowLayout, TextTable, pack_batch
from jaxembed.embedder import Embedder
from jaxembed.models.bloom import BloomConfig
from jaxembed.sharding import make_mesh, named_shardings, partition_specs
from jaxembed.text.format import SENTENCE_TRANSFORMERS_POOLING, Pooling
from jaxembed.training.gradient import global_value_and_grad
from jaxembed.training.objective import LossOptions
from jaxembed.training.step import put_batch

from blooms import QUICK, from_torch, in_jax, random_bloom
from checkpoints import stored_bytes
from runs import Workshop, make_rows, write_jsonl

pytestmark = pytest.mark.usefixtures("quick_compilation")

CAUSAL = BloomConfig(vocab_size=100, dim=32, layers=2, heads=4)
QUERIES, LONGEST, ROW = 8, 20, 32
TEMPERATURE = 0.1
PROMPTS = (2, 4)
"""Tokens of the prompts of both roles."""
CASES: list[tuple[Pooling, bool]] = [("mean", True), ("weighted_mean", True), ("mean", False), ("first", False)]
EXAMPLES = np.arange(3 * QUERIES).reshape(QUERIES, 3)


@functools.cache
def texts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(4, CAUSAL.vocab_size, length).astype(np.int32) for length in rng.integers(5, 21, 3 * QUERIES)]


def shape_of(causal: bool) -> BloomConfig:
    return dataclasses.replace(CAUSAL, causal=causal)


@functools.cache
def reference(pooling: Pooling, causal: bool) -> tuple[float, dict[tuple[str, ...], np.ndarray]]:
    """Loss and gradient in torch and float64: a text a row, sentence-transformers' Pooling without prompts."""
    model = random_bloom(shape_of(causal)).double()
    module = TheirPooling(CAUSAL.dim, SENTENCE_TRANSFORMERS_POOLING[pooling][0], include_prompt=False)

    def embed(which: np.ndarray, prompt: int) -> torch.Tensor:
        ids, mask = np.full((len(which), LONGEST), 3), np.zeros((len(which), LONGEST), int)
        for row, number in enumerate(which):
            text = texts()[number]
            ids[row, : len(text)], mask[row, : len(text)] = text, 1
        states = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
        features = {"token_embeddings": states, "attention_mask": torch.tensor(mask), "prompt_length": prompt}
        return torch.nn.functional.normalize(module(features)["sentence_embedding"], dim=-1)

    queries, documents = embed(EXAMPLES[:, 0], PROMPTS[0]), embed(EXAMPLES[:, 1:].T.ravel(), PROMPTS[1])
    loss = torch.nn.functional.cross_entropy(queries @ documents.T / TEMPERATURE, torch.arange(QUERIES))
    loss.backward()
    return loss.item(), in_jax(CAUSAL, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def value_and_gradient(pooling: Pooling, causal: bool, mesh: Mesh) -> tuple[float, nnx.State]:
    shape = shape_of(causal)
    graph, train, frozen = nnx.split(from_torch(shape, random_bloom(shape)), lambda path, _: True, ...)
    train, frozen = (jax.device_put(state, named_shardings(partition_specs(state), mesh)) for state in (train, frozen))
    layout = RowLayout(ROW, slots=4, chunk_rows=1, chips=mesh.size, chunks=(), density=1.0)
    skipped = np.broadcast_to(np.array([PROMPTS[0], PROMPTS[1], PROMPTS[1]]), EXAMPLES.shape)
    ids: Any = texts()
    lengths = np.array([len(text) for text in ids])
    table = TextTable((ids,), np.zeros(1, int), lengths, np.arange(len(ids), dtype=np.uint64))
    batch = put_batch(pack_batch(table, EXAMPLES, np.zeros(QUERIES, int), layout, 0, skipped), mesh)
    options = LossOptions(temperature=TEMPERATURE, pooling=pooling)
    function = global_value_and_grad(graph, train, frozen, options, QUERIES, mesh, check_vma=True)
    (loss, _), gradient = jax.jit(function, compiler_options=QUICK)(train, frozen, batch)
    return float(loss), gradient


@pytest.mark.parametrize("mesh", [make_mesh(1, 1, 1, devices=jax.devices()[:1]), make_mesh(2, 4, 1)], ids=["1", "2×4"])
@pytest.mark.parametrize(("pooling", "causal"), CASES)
def test_the_gradient_is_that_of_torch_on_any_mesh(pooling: Pooling, causal: bool, mesh: Mesh, record_property) -> None:
    expected, expected_gradient = reference(pooling, causal)
    assert 0.5 < expected < 6  # it does not saturate
    loss, gradient = value_and_gradient(pooling, causal, mesh)
    record_property("loss", abs(loss / expected - 1))
    assert loss == pytest.approx(expected, rel=1e-5)
    for path, variable in nnx.to_flat_state(gradient):
        difference = np.abs(np.asarray(variable[...]) - expected_gradient[path]).max()
        assert difference <= 1e-5 * np.abs(expected_gradient[path]).max(), path


# ---- runs


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


ROLES = {"query": {"prefix": "query: "}, "document": {"prefix": "document: "}, "max_length": 64}


@pytest.mark.parametrize(
    ("pooling", "include_prompt", "attention"),
    [
        ("mean", False, "bidirectional"),
        pytest.param("weighted_mean", True, None, marks=pytest.mark.slow),
        pytest.param("first", True, "bidirectional", marks=pytest.mark.slow),
    ],
)
def test_a_run_trains_evaluates_and_exports_alike(
    workshop: Workshop, pooling: str, include_prompt: bool, attention: str | None
) -> None:
    """The export is verified in sentence-transformers; a conversion of the run gives the same one."""
    dev = write_jsonl(workshop.folder / "dev.jsonl", make_rows(16, seed=2))
    config = workshop.write_config(
        pooling,
        model={"path": str(workshop.base), "attention": attention},
        text_format={**ROLES, "pooling": pooling, "include_prompt": include_prompt},
        data={**workshop.values["data"], "dev": [{"kind": "jsonl", "name": "held-out", "path": str(dev)}]},
        export={"verify": "auto"},
        evaluation={"bm25": False},
    )
    assert workshop.train(pooling, config=config) == 0
    run = workshop.folder / pooling
    model = Embedder.from_pretrained(run / "model")
    assert model.decoder.config.causal == (attention is None)
    assert (model.text_format.pooling, model.text_format.include_prompt) == (pooling, include_prompt)
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [row["dev/held-out/loss"] for row in losses if "dev/held-out/loss" in row]
    rows = make_rows(16, seed=2)
    queries = model.encode_query([row["anchor"] for row in rows], normalize_embeddings=True)
    documents = model.encode_document([row["positive"] for row in rows], normalize_embeddings=True)
    logits = torch.tensor(queries @ documents.T) / 0.05
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(16)).item()
    assert found[-1] == pytest.approx(expected, rel=1e-4)
    assert run_command(convert.main, [str(run), str(workshop.folder / f"{pooling}-export"), "--verify"]) == 0
    converted = workshop.folder / f"{pooling}-export"
    assert stored_bytes(converted) == stored_bytes(run / "model")
    for name in ("config.json", "1_Pooling/config.json", "tokenizer_config.json", "config_sentence_transformers.json"):
        assert (converted / name).read_text() == (run / "model" / name).read_text()


def test_from_scratch_both_ways(workshop: Workshop) -> None:
    config = workshop.write_config(
        "scratch",
        model={"scratch": {"layers": 2, "dim": 16, "heads": 2}, "attention": "bidirectional"},
        tokenizer={"train_vocab_size": 300},
        text_format={**ROLES, "pooling": "mean", "include_prompt": False},
        export={"verify": "auto"},
    )
    assert workshop.train("scratch", config=config) == 0
    config = json.loads((workshop.folder / "scratch" / "model" / "config.json").read_text())
    assert config["is_causal"] is False


def test_the_first_token_of_a_causal_decoder_is_refused(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    config = workshop.write_config("refused", text_format={**ROLES, "pooling": "first"})
    assert workshop.train("refused", config=config) == 2
    assert 'text_format.pooling: "first" with causal attention' in capsys.readouterr().err


def test_an_export_of_it_is_refused_before_it_is_there(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    text_format, target = workshop.folder / "exported.json", workshop.folder / "exported"
    text_format.write_text(json.dumps({**ROLES, "pooling": "first"}))
    arguments = [workshop.base, target, "--to", "sentence-transformers", "--text-format", text_format]
    assert run_command(convert.main, [str(argument) for argument in arguments]) == 2
    assert '"first" with causal attention' in capsys.readouterr().err
    assert not target.exists()
