"""Training steps and encoding of the released shapes on one GPU, beside sentence-transformers in the same run.

Weights are random, of the true shape; texts are MedQuAD's, tokenised by GPT-2's tokenizer. Each case runs in a process
of its own, so that its memory is its own; a case that fails or takes too long is a row that says so.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import DATA, Tokenized, machine, read_rows, table

MAX_LENGTH = 256
TEMPERATURE = 0.05
PEAKS = {"H100": 989e12, "H200": 989e12}
"""bfloat16 operations a second without sparsity, NVIDIA's data sheets (SXM)."""


def peak(name: str) -> float:
    """Of a card by its name; not a number for one that is not in the table."""
    return next((rate for key, rate in PEAKS.items() if key in name), float("nan"))


def pairs_of(data: Path, count: int) -> list[tuple[str, str]]:
    rows = read_rows(data / "train" / "medquad" / "train.jsonl.gz")
    pairs = [(row["query"], row["answer"]) for row in rows if row["query"] and row["answer"]]
    return (pairs * -(-count // len(pairs)))[:count]


def tokenizer_of(data: Path) -> Any:
    from jaxembed.text.format import TextFormat
    from jaxembed.text.tokenizer import TextTokenizer, load_tokenizer, with_end_token

    found = with_end_token(load_tokenizer(data / "tokenizers" / "gpt2.tokenizer.json"), "<|endoftext|>")
    special = {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return TextTokenizer(found, TextFormat(max_length=MAX_LENGTH), special)


def decoder(size: str) -> Any:
    """The shape of bigscience/bloom-SIZE."""
    from jaxembed.config import ModelConfig
    from jaxembed.planning.shapes import decoder_shape

    return decoder_shape(ModelConfig(path=f"bigscience/bloom-{size}"))[1]


def useful_operations(arguments: argparse.Namespace, lengths: Any) -> float:
    """Of a step: what its tokens cost at least, with nothing computed twice and no padding."""
    from jaxembed.planning.flops import useful_flops

    return useful_flops(
        decoder(arguments.shape),
        float(lengths.sum()),
        float((lengths.astype(float) ** 2).sum()),
        len(lengths),
        arguments.trainable,
        "last",
        queries=arguments.pairs,
    ).total


def timed(step: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Seconds of the first call and the median of the others."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds[0], statistics.median(seconds[1:])


def train_ours(arguments: argparse.Namespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from jaxembed.checkpoint.pretrained import random_decoder
    from jaxembed.config import OptimizerConfig
    from jaxembed.data.loader import CHUNK_TOKENS, choose_layout, pack_batch
    from jaxembed.models import FAMILIES
    from jaxembed.ops.attention import choose_kernel
    from jaxembed.sharding import make_mesh
    from jaxembed.training.filters import TRAINABLE
    from jaxembed.training.gradient import LossOptions
    from jaxembed.training.step import initial_state, make_optimizer, make_step, put_batch

    shape = decoder(arguments.shape)
    tokenizer, mesh = tokenizer_of(arguments.data), make_mesh()
    pairs = pairs_of(arguments.data, arguments.pairs)
    ids = tokenizer([query for query, _ in pairs], "query") + tokenizer([text for _, text in pairs], "document")
    lengths = Tokenized(ids).lengths
    texts = np.arange(len(ids)).reshape(2, -1).T
    layout = choose_layout(
        [lengths],
        chips=1,
        dim=shape.dim,
        chunk_tokens=arguments.chunk_tokens or CHUNK_TOKENS["gpu"],
        row_length=arguments.row_length,
    )
    model = random_decoder(FAMILIES["bloom"], shape, 0, mesh).model
    graph, trainable, frozen = nnx.split(model, TRAINABLE[arguments.trainable], ...)
    if arguments.trainable != "full":
        frozen = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
    del model
    optimizer = make_optimizer(OptimizerConfig(learning_rate=2e-5, schedule="constant", warmup_ratio=0), 10**6)
    kernel = arguments.kernel or choose_kernel("auto", jax.devices(), head_dim=shape.head_dim, dtype=jnp.bfloat16)
    options = LossOptions(
        TEMPERATURE,
        dtype=jnp.bfloat16,
        chunk_checkpoint=arguments.chunk_checkpoint,
        layer_checkpoint=arguments.layer_checkpoint,
        attention_kernel=kernel,
    )
    step = make_step(graph, trainable, frozen, optimizer, options, arguments.pairs, mesh)
    state = initial_state(optimizer, trainable, mesh)
    del trainable
    batch = put_batch(pack_batch(Tokenized(ids), texts, np.zeros(len(pairs), int), layout), mesh)
    losses = []

    def run() -> None:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics.loss))

    first, seconds = timed(run, arguments.repeats)
    if arguments.trace:
        with jax.profiler.trace(arguments.trace):
            run()
    memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    useful = useful_operations(arguments, lengths)
    tokens = int(lengths.sum())
    return {
        "who": f"jaxembed, {kernel}, {arguments.chunk_checkpoint}/{arguments.layer_checkpoint}, "
        f"chunks of {layout.chunk_rows} × {layout.row_length}",
        "tokens": tokens,
        "density": layout.density,
        "first step, s": first,
        "step, s": seconds,
        "tokens/s": tokens / seconds,
        "useful TFLOP/s": useful / seconds / 1e12,
        "of the bf16 peak": useful / seconds / peak(jax.devices()[0].device_kind),
        "peak memory, GiB": memory / 2**30,
        "losses": [round(losses[0], 4), round(losses[-1], 4)],
    }


def train_theirs(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

    pairs = pairs_of(arguments.data, arguments.pairs)
    model = SentenceTransformer(str(arguments.model), device="cuda")
    model.train()
    if arguments.trainable == "bitfit":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
    loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=arguments.mini_batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-5, fused=True)
    features = [
        model.tokenize([model.prompts[role] + pair[column] for pair in pairs])
        for column, role in ((0, "query"), (1, "document"))
    ]
    # Beside tensors there may be the name of a modality.
    features = [{key: value.cuda() for key, value in column.items() if torch.is_tensor(value)} for column in features]
    lengths = torch.cat([column["attention_mask"].sum(1) for column in features]).cpu().numpy()
    losses = []

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            value = loss([dict(column) for column in features], torch.zeros(0))
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        torch.cuda.synchronize()
        losses.append(value.item())

    first, seconds = timed(run, arguments.repeats)
    useful = useful_operations(arguments, lengths)
    tokens = int(lengths.sum())
    return {
        "who": f"sentence-transformers, cached {arguments.mini_batch}, autocast bf16",
        "tokens": tokens,
        "density": "",
        "first step, s": first,
        "step, s": seconds,
        "tokens/s": tokens / seconds,
        "useful TFLOP/s": useful / seconds / 1e12,
        "of the bf16 peak": useful / seconds / peak(torch.cuda.get_device_name()),
        "peak memory, GiB": torch.cuda.max_memory_allocated() / 2**30,
        "losses": [round(losses[0], 4), round(losses[-1], 4)],
    }


def encode_ours(arguments: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from jaxembed.embedder import Embedder

    texts = [text for pair in pairs_of(arguments.data, arguments.pairs) for text in pair]
    texts = list(dict.fromkeys(texts))
    embedder = Embedder.from_pretrained(arguments.model)
    tokens = sum(map(len, embedder.tokenizer(texts, "document")))
    found = []

    def run() -> None:
        found.append(embedder.encode_document(texts, batch_size=arguments.mini_batch or None))

    first, seconds = timed(run, arguments.repeats)
    np.save(arguments.model / "ours.npy", found[-1])
    who = "jaxembed, bf16, " + (f"batch {arguments.mini_batch}" if arguments.mini_batch else "its own batch")
    return {"who": who, "texts": len(texts), "first, s": first, "s": seconds, "tokens/s": tokens / seconds}


def encode_theirs(arguments: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    import torch
    from sentence_transformers import SentenceTransformer

    texts = [text for pair in pairs_of(arguments.data, arguments.pairs) for text in pair]
    texts = list(dict.fromkeys(texts))
    model = SentenceTransformer(str(arguments.model), device="cuda", model_kwargs={"dtype": torch.bfloat16})
    ids = model.tokenizer([model.prompts["document"] + text for text in texts])["input_ids"]
    tokens = sum(min(len(x), MAX_LENGTH) for x in ids)
    found = []

    def run() -> None:
        found.append(model.encode_document(texts, batch_size=arguments.mini_batch))

    first, seconds = timed(run, arguments.repeats)
    mine = arguments.model / "ours.npy"
    cosine = float((np.load(mine) * found[-1]).sum(1).min()) if mine.exists() else float("nan")
    who = f"sentence-transformers, bf16, batch {arguments.mini_batch}"
    return {"who": who, "texts": len(texts), "first, s": first, "s": seconds, "tokens/s": tokens / seconds,
            "least cosine with ours": round(cosine, 5)}  # fmt: skip


WORK = {
    ("train", "ours"): train_ours,
    ("train", "theirs"): train_theirs,
    ("encode", "ours"): encode_ours,
    ("encode", "theirs"): encode_theirs,
}


def options() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    found.add_argument("--data", type=Path, default=DATA, help="directory laid out as benchmarks/README.md says")
    found.add_argument("--cases", type=Path, help="JSON list of cases, each the options of one below; null = all")
    found.add_argument("--json", type=Path, help="file that each case's row is added to")
    found.add_argument("--work", choices=("train", "encode"), help="run this one case in this process")
    found.add_argument("--who", choices=("ours", "theirs"), default="ours")
    found.add_argument("--shape", choices=("560m", "1b1", "3b", "7b1"), default="560m")
    found.add_argument("--trainable", choices=("full", "bitfit"), default="full")
    found.add_argument("--pairs", type=int, default=1024, help="pairs a step, or whose texts are encoded")
    found.add_argument("--model", type=Path, help="directory of the model that the peer reads, and ours in encoding")
    found.add_argument("--mini-batch", type=int, default=0, help="texts that the peer runs at once")
    found.add_argument("--chunk-tokens", type=int, default=0, help="tokens run at once; 0 = the default of the device")
    found.add_argument("--row-length", type=int, help="tokens a row; null = chosen")
    found.add_argument("--chunk-checkpoint", default="full")
    found.add_argument("--layer-checkpoint", default="none")
    found.add_argument("--kernel", help="attention kernel; null = that of the device")
    found.add_argument("--repeats", type=int, default=3)
    found.add_argument("--trace", help="directory of a profile of one more step")
    found.add_argument("--time-limit", type=float, default=240, help="seconds a case may take")
    return found


def make_model(shape: str, directory: Path, data: Path) -> subprocess.Popen[bytes]:
    """Begins to write random weights that both sides load; on the CPU, so that the card's memory stays free."""
    code = (
        "import sys; from pathlib import Path; from common import random_bloom; "
        "to, data, *sizes = sys.argv[1:]; dim, layers, heads, longest, rows = map(int, sizes); "
        "random_bloom(Path(to), Path(data), dim=dim, layers=layers, heads=heads, max_length=longest, rows=rows)"
    )
    found = decoder(shape)
    sizes = map(str, (found.dim, found.layers, found.heads, MAX_LENGTH, found.vocab_size))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(directory), str(data.resolve()), *sizes],
        cwd=Path(__file__).parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def default_cases() -> list[dict[str, Any]]:
    def train(shape: str, trainable: str, **more: Any) -> dict[str, Any]:
        return {"work": "train", "shape": shape, "trainable": trainable, **more}

    fast = {"chunk_checkpoint": "none", "layer_checkpoint": "full"}
    return [
        train("560m", "full", **fast),
        train("560m", "full"),
        *(train("560m", "full", who="theirs", mini_batch=size, repeats=1) for size in (64, 128)),
        train("560m", "bitfit", **fast),
        train("560m", "bitfit", who="theirs", mini_batch=128, repeats=1),
        {"work": "encode", "pairs": 8192},
        *({"work": "encode", "pairs": 8192, "who": "theirs", "mini_batch": size, "repeats": 1} for size in (64, 256)),
        train("1b1", "full", **fast),
        train("1b1", "bitfit", **fast),
        train("3b", "bitfit", **fast),
        train("3b", "full", chunk_tokens=16384, layer_checkpoint="full", repeats=1),
    ]


def command(case: dict[str, Any], data: Path) -> list[str]:
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in case.items()]
    return [sys.executable, __file__, "--data", str(data), *flags]


def main() -> None:
    arguments = options().parse_args()
    if arguments.work:
        print("ROW " + json.dumps(WORK[arguments.work, arguments.who](arguments)), flush=True)
        return
    cases = json.loads(arguments.cases.read_text()) if arguments.cases else default_cases()
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "encode": []}
    card = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    print(f"{machine()}\n{card}\n", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        read = [case.get("shape", "560m") for case in cases if case.get("who") == "theirs" or case["work"] == "encode"]
        making = {shape: make_model(shape, Path(temporary) / shape, arguments.data) for shape in dict.fromkeys(read)}
        for case in cases:
            shape = case.get("shape", "560m")
            if case.get("who") == "theirs" or case["work"] == "encode":
                model = Path(temporary) / shape
                if making[shape].wait():
                    raise SystemExit(f"no model {shape} for the peer")
                case = {**case, "model": model}
            what = f"{shape}, {case.get('trainable', 'full') if case['work'] == 'train' else case['pairs']}"
            start = time.perf_counter()
            try:
                done = subprocess.run(
                    command(case, arguments.data), capture_output=True, text=True, timeout=arguments.time_limit
                )
                lines = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
                if lines:
                    row = {"case": what, **json.loads(lines[-1][4:])}
                    rows[case["work"]].append(row)
                    if arguments.json:
                        with arguments.json.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                    print(f"{time.perf_counter() - start:.0f} s: {row}", flush=True)
                else:
                    print(f"{what}: failed with {done.returncode}: {done.stderr[-1500:]}", flush=True)
            except subprocess.TimeoutExpired:
                print(f"{what}: not done in {arguments.time_limit:.0f} s", flush=True)
    for found in rows.values():
        if found:
            print("\n" + table(found))


if __name__ == "__main__":
    main()
