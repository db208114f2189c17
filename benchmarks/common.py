"""What the benchmarks share: data sets by name, a random BLOOM with a real tokenizer, interleaved timing, one table."""

import argparse
import gzip
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[2] / "shared" / "data"


def parser(description: str) -> argparse.ArgumentParser:
    """With the option that every benchmark has."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    found.add_argument("--data", type=Path, default=DATA, help="directory laid out as benchmarks/README.md says")
    return found


def read_rows(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def random_bloom(
    directory: Path, data: Path, *, dim: int, layers: int, heads: int, max_length: int, rows: int = 50_264
) -> Path:
    """An export of random weights that both sides load: one BLOOM, the tokenizer of GPT-2, the default text format."""
    from jaxembed.checkpoint.pretrained import random_decoder
    from jaxembed.embedder import Embedder
    from jaxembed.models import FAMILIES
    from jaxembed.text.format import TextFormat
    from jaxembed.text.tokenizer import TextTokenizer, load_tokenizer, with_end_token

    tokenizer = with_end_token(load_tokenizer(data / "tokenizers" / "gpt2.tokenizer.json"), "<|endoftext|>")
    family = FAMILIES["bloom"]
    config = family.config(vocab_size=rows, dim=dim, layers=layers, heads=heads)
    special = {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    embedder = Embedder(
        random_decoder(family, config, seed=0), TextTokenizer(tokenizer, TextFormat(max_length=max_length), special)
    )
    embedder.save_pretrained(directory, verify=False)
    return directory


class Tokenized:
    """Token ids in memory, as the packer reads them."""

    def __init__(self, ids: Sequence[Any]) -> None:
        import numpy as np

        self._ids = ids
        self.lengths = np.array([len(x) for x in ids])

    def __getitem__(self, text: int) -> Any:
        return self._ids[text]


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, measured in turns, so that a slow minute of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def matmul_rate(rows: int = 768, dim: int = 384) -> float:
    """Float32 operations a second of one jitted matrix product of the model's shape: what this machine can do."""
    import jax
    import numpy as np

    random = np.random.default_rng(0)
    a, b = (jax.numpy.asarray(random.random(shape), "float32") for shape in ((rows, dim), (dim, 4 * dim)))
    product = jax.jit(lambda a, b: a @ b)
    seconds = interleaved({"product": lambda: product(a, b).block_until_ready()}, 50)["product"]
    return 2 * rows * dim * 4 * dim / seconds


def machine() -> str:
    """A line that says where and with what a table was measured."""
    cpu = "unknown processor"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    names = ("jax", "flax", "torch", "sentence-transformers", "transformers")
    versions = ", ".join(f"{name} {_version(name)}" for name in names)
    return f"{time.strftime('%Y-%m-%d')}, {cpu}, Python {platform.python_version()}, {versions}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "-"


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as a Markdown table; the first row's keys are its columns."""
    head = list(rows[0])
    cells = [[f"{row[name]:,.2f}" if isinstance(row[name], float) else str(row[name]) for name in head] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
