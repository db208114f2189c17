"""Training curves against sentence-transformers: the same weights, texts and AdamW give the same losses."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from transformers import get_cosine_schedule_with_warmup

from jaxembed.config import OptimizerConfig
from jaxembed.data.loader import Batches, TextSource, choose_layout, sample_lengths, tokenize_examples
from jaxembed.data.plan import run_plan
from jaxembed.data.sources import Examples
from jaxembed.embedder import Embedder
from jaxembed.models.bloom import BloomConfig
from jaxembed.sharding import make_mesh, named_shardings, partition_specs
from jaxembed.text.format import DEFAULT_TEXT_FORMAT
from jaxembed.text.tokenizer import TextTokenizer, train_byte_level_bpe
from jaxembed.training.filters import TRAINABLE
from jaxembed.training.gradient import LossOptions
from jaxembed.training.step import initial_state, make_optimizer, make_step, put_batch

from blooms import random_bloom

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS, WARMUP, BATCH = 50, 5, 16
TOLERANCE = 1e-3  # relative, at every step
RATES = {"full": 1e-3, "bitfit": 3e-2}


def make_examples(count=120):
    """Queries that share some words with their document; more pairs than a tiny decoder learns in 50 steps."""
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(random.choice(letters, random.integers(2, 6))) for _ in range(150)]

    def text(low, high):
        return random.choice(words, random.integers(low, high)).tolist()

    documents = [text(4, 14) for _ in range(count)]
    queries = [[*random.choice(document, 3), *text(1, 4)] for document in documents]

    def join(rows):
        return [" ".join(row) for row in rows]

    negatives = [(negative,) for negative in join(text(4, 12) for _ in range(count))]
    return Examples("words", join(queries), join(documents), negatives, [str(i) for i in range(count)], {}, "words")


EXAMPLES = make_examples()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory with random weights as transformers writes them, and a tokenizer."""
    directory = tmp_path_factory.mktemp("base")
    tokenizer = train_byte_level_bpe([*EXAMPLES.anchors, *EXAMPLES.positives], 400)
    TextTokenizer(tokenizer, DEFAULT_TEXT_FORMAT).save(directory)
    config = BloomConfig(vocab_size=400, dim=32, layers=2, heads=4, epsilon=1e-5)
    random_bloom(config, scale=0.1).save_pretrained(directory)
    return directory


def our_losses(base, directory, trainable, negatives, chunk_rows):
    """Losses of every step, and the texts of each batch; writes the initial weights as an export to `directory`."""
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    embedder = Embedder.from_pretrained(base, dtype="float32")
    embedder.save_pretrained(directory, verify=False)
    table, data_sets = tokenize_examples(
        [TextSource(EXAMPLES, embedder.tokenizer, negatives=negatives)], base / "tokens"
    )
    schedule = run_plan(data_sets, table.hashes, BATCH, seed=0, steps=STEPS)
    texts = data_sets[0].texts
    lengths = sample_lengths(schedule, table, texts)
    layout = choose_layout(lengths, chips=1, dim=32, chunk_tokens=4096, chunk_rows=chunk_rows)
    batches = Batches(schedule, table, texts, np.zeros(len(texts), int), layout, embedder.tokenizer.pad_id)
    config = OptimizerConfig(
        learning_rate=RATES[trainable], weight_decay=0.1, clip_norm=1.0, schedule="cosine", warmup_steps=WARMUP
    )
    optimizer = make_optimizer(config, STEPS)
    graph, weights = nnx.split(embedder.model)
    model = nnx.merge(graph, jax.device_put(weights, named_shardings(partition_specs(weights), mesh)))
    graph, moving, frozen = nnx.split(model, TRAINABLE[trainable], ...)
    step = make_step(graph, moving, frozen, optimizer, LossOptions(temperature=0.05), BATCH, mesh)
    state = initial_state(optimizer, moving, mesh)
    losses, norms, chunks = [], [], set()
    for fields in map(batches.__getitem__, range(STEPS)):
        chunks.add(len(fields["tokens"]))
        state, metrics = step(state, frozen, put_batch(fields, mesh))
        losses.append(float(metrics.loss))
        norms.append(float(metrics.gradient_norm))
    assert (min(chunks) > 1) == (chunk_rows is not None)
    assert min(norms) < 1.0 < max(norms), "clipping should be met, and not at every step"
    return np.array(losses), [schedule.batch(number) for number in range(STEPS)]


def their_losses(directory, trainable, negatives, cached, batches):
    torch.manual_seed(0)
    model = SentenceTransformer(str(directory), device="cpu", model_kwargs={"dtype": torch.float32})
    model.train()
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        parameter.requires_grad_(trainable == "full" or name.endswith("bias"))
    matrices = [p for p in named.values() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in named.values() if p.requires_grad and p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=RATES[trainable], eps=1e-8)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    if cached:
        loss = CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=4)
    else:
        loss = MultipleNegativesRankingLoss(model, scale=20.0)
    columns = [("query", EXAMPLES.anchors), ("document", EXAMPLES.positives)]
    columns += [("document", [row[number] for row in EXAMPLES.negatives]) for number in range(negatives)]
    losses = []
    for batch in batches:
        features = [
            model.preprocess([column[number] for number in batch], prompt=model.prompts[role])
            for role, column in columns
        ]
        value = loss(features, None)
        value.backward()
        torch.nn.utils.clip_grad_norm_([p for p in named.values() if p.requires_grad], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return np.array(losses)


@pytest.mark.parametrize(
    ("trainable", "cached", "negatives", "chunk_rows"),
    [
        ("full", True, 1, 3),
        ("bitfit", False, 1, 3),
        pytest.param("full", False, 0, None, marks=pytest.mark.slow),
        pytest.param("bitfit", True, 0, 2, marks=pytest.mark.slow),
    ],
)
def test_losses_are_those_of_sentence_transformers(base, tmp_path, trainable, cached, negatives, chunk_rows):
    ours, batches = our_losses(base, tmp_path / "model", trainable, negatives, chunk_rows)
    theirs = their_losses(tmp_path / "model", trainable, negatives, cached, batches)
    difference = np.abs(ours - theirs) / theirs
    print(f"{trainable}: loss {ours[0]:.3f} to {ours[-1]:.3f}, largest relative difference {difference.max():.1e}")
    assert difference.max() <= TOLERANCE
    assert ours[-5:].mean() < 0.9 * ours[:5].mean(), "nothing was learnt, so nothing was compared"
    assert ours.min() > 0.3, "a saturated loss says nothing"
