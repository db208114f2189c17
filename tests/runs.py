"""Tiny training runs for tests: their data, base model and config, in this process or as a command of its own."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from jaxembed import train
from jaxembed.__main__ import run_command
from jaxembed.models.bloom import BloomConfig
from jaxembed.text.format import DEFAULT_TEXT_FORMAT
from jaxembed.text.tokenizer import TextTokenizer, train_byte_level_bpe

from blooms import random_bloom

SHAPE = BloomConfig(vocab_size=264, dim=16, layers=2, heads=2, epsilon=1e-5)
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}


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


def on_two_processes(code: str, *arguments: object, status: int = 0) -> list[str]:
    """What two processes of four devices, which run the code, have said on stderr; both have to end with the status.

    Args:
        arguments: of the code; number of the process and port of the coordinator come after them.
    """
    environment = os.environ | ENVIRONMENT | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, (*arguments, number, port))],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [status] * 2, errors
    return errors


class Processes:
    """A run of several processes on this machine, each with some virtual devices; it has to be waited for.

    stdout is dropped: gloo, which carries collectives between CPUs, writes there.
    """

    def __init__(self, count: int, devices: int, *arguments: object, folders: Sequence[Path] | None = None) -> None:
        """
        Args:
            devices: of each process.
            arguments: of the command, the same for all.
            folders: working directory of each process.
        """
        self.errors: list[str] = []
        """What each process has said on stderr, once they are waited for."""
        self._logs = [tempfile.TemporaryFile("w+") for _ in range(count)]  # noqa: SIM115 (closed by `wait`)
        given = ["--distributed.coordinator", f"localhost:{free_port()}", "--distributed.num_processes", str(count)]
        environment = ENVIRONMENT | {
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "jaxembed.train", *map(str, arguments)),
                    *((*given, "--distributed.process_id", str(number)) if count > 1 else ()),
                ],
                stdout=subprocess.DEVNULL,
                stderr=log,
                text=True,
                cwd=folders[number] if folders else None,
                env=os.environ | environment,
            )
            for number, log in enumerate(self._logs)
        ]

    def wait(self, seconds: float = 600) -> list[int]:
        """The exit statuses of all; none is left behind."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        finally:
            for process, log in zip(self.processes, self._logs):
                process.kill()
                process.wait()
                log.seek(0)
                self.errors.append(log.read())
                log.close()

    def wait_for_step(self, run: Path, step: int) -> None:
        """Returns once the run has logged that step."""
        metrics = run / "metrics.jsonl"
        while all(process.poll() is None for process in self.processes):
            if metrics.exists() and any(row.get("step", 0) >= step for row in rows_of(run, cut=True)):
                return
            time.sleep(0.002)
        statuses = self.wait()
        raise AssertionError(f"ended with {statuses} too early: {self.errors}")


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def rows_of(run: Path, cut: bool = False) -> list[dict[str, float]]:
    """The rows of a run's metrics; `cut`: of one that may be writing the last."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n") or not cut]
