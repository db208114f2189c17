"""Tiny training runs for tests: their data, base model and config, in this process or as a command of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from jaxembed import train
from jaxembed.__main__ import run_command
from jaxembed.models.bloom import BloomConfig
from jaxembed.text.format import DEFAULT_TEXT_FORMAT
from jaxembed.text.tokenizer import TextTokenizer, train_byte_level_bpe

from blooms import random_bloom

SHAPE = BloomConfig(vocab_size=264, dim=16, layers=2, heads=2, epsilon=1e-5)
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """For modules that import it: half of the time of a tiny run goes into XLA's optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows with anchor, positive and hard; an anchor shares words with its positive."""
    random = np.random.default_rng(seed)
    words = ["".join(random.choice(list("abcdefghijklmnopqrstuvwxyz"), random.integers(2, 7))) for _ in range(100)]
    rows = []
    for _ in range(count):
        document = random.choice(words, random.integers(3, 10)).tolist()
        texts = (random.choice(document, 3).tolist(), document, random.choice(words, 5).tolist())
        rows.append(dict(zip(("anchor", "positive", "hard"), map(" ".join, texts))))
    return rows


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_base(directory: Path, scale: float = 0.2) -> Path:
    """A tiny model as transformers writes it, with a tokenizer of 264 tokens."""
    random_bloom(SHAPE, scale=scale).save_pretrained(directory)
    texts = [text for row in make_rows(50) for text in row.values()]
    TextTokenizer(train_byte_level_bpe(texts, SHAPE.vocab_size), DEFAULT_TEXT_FORMAT).save(directory)
    return directory


class Workshop:
    """A folder with data (`a.jsonl`, 48 pairs), a base model (`base`) and a config for it (`config.yaml`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_jsonl(folder / "a.jsonl", make_rows(48))
        self.base = write_base(folder / "base")
        self.values = {
            "model": {"path": str(self.base)},
            "data": {
                "train": [{"kind": "jsonl", "name": "a", "path": str(self.data)}],
                "cache_dir": str(folder / "cache"),
            },
            "training": {"batch_size": 8, "steps": 6},
            "optimizer": {"learning_rate": 1e-3},
            "logging": {"every_steps": 1, "tensorboard": False},
            "export": {"verify": "off"},
        }
        self.config = self.write_config()

    def write_config(self, name: str = "config", **sections: object) -> Path:
        """The config with sections replaced; None leaves one out."""
        values = {key: value for key, value in {**self.values, **sections}.items() if value is not None}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def train(self, run: str | Path, *overrides: object, config: Path | None = None) -> int:
        """The exit status of a run in this process, in the directory `run` of the folder."""
        arguments = [config or self.config, "--run_dir", self.folder / run, *overrides]
        return run_command(train.main, [str(argument) for argument in arguments])

    def resume(self, run: str | Path, *overrides: object) -> int:
        """The exit status of a resumption in this process."""
        return run_command(train.main, ["--resume", str(self.folder / run), *map(str, overrides)])

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """The command, with these arguments, as a process that sees one device."""
        return subprocess.Popen(
            [sys.executable, "-m", "jaxembed.train", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT,
        )


def rows_of(run: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
