"""`jaxembed encode` from files to shards: killed and gone on with, on several processes, and its messages."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxembed import encode
from jaxembed.__main__ import run_command
from jaxembed.embedder import Embedder

from runs import ENVIRONMENT, free_port, make_rows, write_base, write_jsonl

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"_id": f"d{number}", "text": f"{row['positive']} {number}"} for number, row in enumerate(make_rows(2000))]
    return write_jsonl(tmp_path_factory.mktemp("data") / "corpus.jsonl", rows)


def run(*arguments: object) -> int:
    return run_command(encode.main, [str(argument) for argument in arguments])


def start(arguments: Sequence[object]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jaxembed.encode", *map(str, arguments)]
    environment = os.environ | ENVIRONMENT | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    """What each has printed."""
    said = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return [out for out, _ in said]


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_all_devices_of_this_process(
    tmp_path: Path, model: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = corpus.read_text().splitlines()[:40]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    assert run("--model", model, "--input", tmp_path / "*.jsonl", "--output", out, "--fsdp", 2) == 0
    table = pq.read_table(out / "embeddings-00000-of-00001.parquet")
    rows = list(map(json.loads, lines))
    assert table.column("id").to_pylist() == [row["_id"] for row in rows]
    found = np.array(table.column("embedding").to_pylist())
    expected = Embedder.from_pretrained(model).encode_document([row["text"] for row in rows])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert json.loads((out / "manifest.json").read_text())["machine"].startswith(
        "cpu, data 4, fsdp 2, plain attention, jax"
    )
    assert f"{out}: 40 texts in 1 shards; 40 of them now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "nowhere.jsonl"], "error: --input nowhere.jsonl: no such file"),
        (["--model", "./nowhere"], "./nowhere: expected the directory of a model"),
        (["--fsdp", "3"], "fsdp: expected a number that divides the 8 devices of this host, found 3"),
        (["--coordinator", "here"], "--coordinator: Value error, expected HOST:PORT"),
        (["--coordinator", "host:99999"], "--coordinator: Value error, expected a port from 1 to 65535, found 99999"),
        (["--coordinator", "a..b:8476"], '--coordinator: Value error, "a..b" is no name of a host'),
        (["--model", "~nobody-of-that-name/x"], "~nobody-of-that-name/x: expected the directory of a model"),
        (["--num-processes", "0"], "--num-processes: Input should be greater than or equal to 1"),
        (["--ranges", "nowhere"], "--ranges nowhere: expected the output directory of a job in int8 or uint8"),
        (["--dtype", "float8"], "dtype: expected auto, float32 or bfloat16"),
    ],
)
def test_errors(
    tmp_path: Path, model: Path, corpus: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = ["--model", model, "--input", corpus, "--output", tmp_path / "out", *arguments]
    assert run(*given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ranges_of_another_model(tmp_path: Path, model: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = tmp_path / "some.txt"
    some.write_text("one\nanother\nthe last\n")
    given = ["--input", some, "--precision", "int8", "--fsdp", 8]
    assert run("--model", model, "--output", tmp_path / "documents", *given) == 0
    other = write_base(tmp_path / "other", scale=0.3)
    given += ["--ranges", tmp_path / "documents", "--output", tmp_path / "queries"]
    assert run("--model", model, *given) == 0
    capsys.readouterr()
    assert run("--model", other, *given[:-1], tmp_path / "more") == 2
    assert f"--ranges {tmp_path / 'documents'}: its embeddings are of another model" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


@pytest.mark.slow
@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_a_killed_job_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, model: Path, corpus: Path, format: str
) -> None:
    arguments = ["--model", model, "--input", corpus, "--format", format, "--shard-size", 20, "--precision", "int8"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start([*arguments, "--output", whole]))
    shards = json.loads((whole / "manifest.json").read_text())["shards"]
    assert len(shards) == 100
    chance = random.Random(format)
    for target in sorted(chance.sample(range(5, 95), 3)):
        process = start([*arguments, "--output", killed])
        deadline = time.monotonic() + 300
        while sum((killed / name).exists() for name in shards) < target and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(chance.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (killed / "manifest.json").exists():  # else it was killed before the first shard
            assert not json.loads((killed / "manifest.json").read_text())["complete"]
    finish(start([*arguments, "--output", killed]))
    assert files_of(killed) == files_of(whole)


@pytest.mark.slow
def test_several_processes_write_what_one_writes(tmp_path: Path, model: Path, corpus: Path) -> None:
    arguments = ["--model", model, "--input", corpus, "--shard-size", 150, "--precision", "uint8"]
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    finish(start([*arguments, "--output", whole]))
    several = [*arguments, "--num-processes", 2, "--output", shared]

    def both() -> list[str]:
        together = [*several, "--coordinator", f"localhost:{free_port()}"]
        return finish(*(start([*together, "--process-id", number]) for number in (0, 1)))

    printed = both()
    assert files_of(shared) == files_of(whole)
    assert f"{shared}: 2,000 texts in 14 shards" in printed[0]
    assert "texts in" not in printed[1]
    # Half of it lost; one process alone, and then two, do the rest.
    for end in ("0-of-00014.parquet", "3-of-00014.parquet"):
        for path in shared.glob(f"*{end}"):
            path.unlink()
    finish(start([*arguments, "--output", shared]))
    assert files_of(shared) == files_of(whole)
    (shared / "embeddings-00001-of-00014.parquet").unlink()
    both()
    assert files_of(shared) == files_of(whole)
