"""Training against sentence-transformers: the same weights, batches and optimiser, the peer at its best loss."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Tokenized, interleaved, machine, matmul_rate, parser, random_bloom, read_rows, table

MAX_LENGTH = 256
MINI_BATCHES = (4, 16)
TEMPERATURE = 0.05


def workloads(data: Path, pairs: int) -> dict[str, list[tuple[str, str]]]:
    def read(name: str, anchor: str, positive: str, count: int) -> list[tuple[str, str]]:
        rows = read_rows(data / "train" / name / "train.jsonl.gz")
        return [(row[anchor], row[positive]) for row in rows[:: len(rows) // count] if row[anchor] and row[positive]][
            :count
        ]

    third = -(-pairs // 3)
    kinds = (
        ("arxiv_cs", "title", "abstract"),
        ("tldr_cli", "query", "code"),
        ("stackoverflow_title_code", "query", "code"),
    )
    mixed = [pair for three in zip(*(read(*kind, third) for kind in kinds)) for pair in three]
    return {
        "MedQuAD": read("medquad", "query", "answer", pairs),
        "arxiv_cs + tldr_cli + stackoverflow_title_code": mixed[:pairs],
    }


def our_step(
    path: Path, batches: list[list[tuple[str, str]]], chunk: str
) -> tuple[Callable[[], list[float]], dict[str, Any]]:
    """A function that trains on all batches once and returns the losses; what else is to be told."""
    import numpy as np
    from flax import nnx

    from jaxembed.checkpoint.pretrained import load_decoder
    from jaxembed.config import OptimizerConfig
    from jaxembed.data.loader import CHUNK_TOKENS, choose_layout, pack_batch
    from jaxembed.sharding import make_mesh
    from jaxembed.text.tokenizer import TextTokenizer
    from jaxembed.training.filters import TRAINABLE
    from jaxembed.training.gradient import LossOptions
    from jaxembed.training.step import initial_state, make_optimizer, make_step, put_batch

    tokenizer = TextTokenizer.from_directory(path)
    size, mesh = len(batches[0]), make_mesh()
    ids = []
    for batch in batches:
        ids += tokenizer([anchor for anchor, _ in batch], "query") + tokenizer([text for _, text in batch], "document")
    table = Tokenized(ids)
    texts = np.arange(len(ids)).reshape(len(batches), 2, size).transpose(0, 2, 1)
    layout = choose_layout(
        [table.lengths[batch.ravel()] for batch in texts], chips=1, dim=384, chunk_tokens=CHUNK_TOKENS["cpu"]
    )
    decoder = load_decoder(path, mesh=mesh, progress=False)
    graph, trainable, frozen = nnx.split(decoder.model, TRAINABLE["full"], ...)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=2e-5, schedule="constant", warmup_ratio=0), 10**6)
    step = make_step(graph, trainable, frozen, optimizer, LossOptions(TEMPERATURE, chunk_checkpoint=chunk), size, mesh)
    state = initial_state(optimizer, trainable, mesh)

    def run() -> list[float]:
        nonlocal state
        losses = []
        for batch in texts:
            fields = pack_batch(table, batch, np.zeros(size, int), layout)
            state, metrics = step(state, frozen, put_batch(fields, mesh))
            losses.append(metrics.loss)
        return [float(loss) for loss in losses]

    return run, {"tokens": int(table.lengths.sum()), "density": layout.density, "row_length": layout.row_length}


def their_step(path: Path, batches: list[list[tuple[str, str]]], mini_batch: int | None) -> Callable[[], list[float]]:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss

    model = SentenceTransformer(str(path), device="cpu")
    model.train()
    loss = (
        MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
        if mini_batch is None
        else CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=mini_batch)
    )
    decay = [p for name, p in model.named_parameters() if p.ndim > 1]
    others = [p for name, p in model.named_parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=2e-5, eps=1e-8
    )
    prompts = model.prompts
    tokenized = [
        [
            model.tokenize([prompts[role] + pair[column] for pair in batch])
            for column, role in ((0, "query"), (1, "document"))
        ]
        for batch in batches
    ]

    def run() -> list[float]:
        losses = []
        for features in tokenized:
            optimizer.zero_grad()
            value = loss([dict(column) for column in features], torch.zeros(0))
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(value.item())
        return losses

    return run


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--pairs", type=int, default=64, help="pairs a batch")
    options.add_argument("--batches", type=int, default=2, help="batches of one measurement")
    options.add_argument("--repeats", type=int, default=3, help="measurements of each, of which the median counts")
    arguments = options.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    limit, rows = matmul_rate(), []
    for name, pairs in workloads(arguments.data, arguments.pairs * arguments.batches).items():
        batches = [pairs[i : i + arguments.pairs] for i in range(0, len(pairs), arguments.pairs)]
        with tempfile.TemporaryDirectory() as temporary:
            path = random_bloom(
                Path(temporary) / "bloom", arguments.data, dim=384, layers=6, heads=12, max_length=MAX_LENGTH
            )
            runs, about = {}, {}
            for chunk in ("none", "full"):
                runs[f"jaxembed, {chunk}"], about = our_step(path, batches, chunk)
            runs["plain"] = their_step(path, batches, None)
            for mini_batch in MINI_BATCHES:
                runs[f"cached {mini_batch}"] = their_step(path, batches, mini_batch)
            losses = {run: step() for run, step in runs.items()}  # compiles, and shows that the work is the same
            seconds = interleaved(runs, arguments.repeats)
        tokens = about["tokens"]
        peers = [run for run in runs if not run.startswith("jaxembed")]
        best = min(peers, key=lambda run: seconds[run])
        reference = losses["plain"]
        rows.append(
            {
                "pairs": f"{name} ({tokens / len(pairs) / 2:.0f} tokens a text)",
                **{f"{run}, tok/s": f"{tokens / seconds[run]:,.0f}" for run in runs},
                "default (full) against its best": f"×{seconds[best] / seconds['jaxembed, full']:.2f} ({best})",
                "density": about["density"],
                "loss difference": f"{max(abs(a - b) / b for a, b in zip(losses['jaxembed, full'], reference)):.1e}",
            }
        )
    print(f"{machine()}\n`python benchmarks/train.py --pairs {arguments.pairs} --batches {arguments.batches}`\n")
    print(
        f"BLOOM, 6 layers of 384, 12 heads, float32, AdamW, all parameters; matrix product {limit / 1e9:,.0f} GFLOP/s."
    )
    print("`none` and `full`: what a chunk computes again in the backward pass (training.chunk_checkpoint).\n")
    print(table(rows))


if __name__ == "__main__":
    main()
