"""`jaxembed plan`: what it refuses before it compiles, and a tiny config compiled for a TPU from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxembed import plan
from jaxembed.__main__ import run_command

ROOT = Path(__file__).parents[1]

TINY = """
model: {scratch: {layers: 2, dim: 128, heads: 2, vocab_size: 1024}}
tokenizer: {train_vocab_size: 1024}
data: {train: [{kind: jsonl, name: a, path: nothing.jsonl}]}
training: {batch_size: 256, epochs: 1}
text_format: {max_length: 128}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology", "v5e-9"], "--topology: no TPU slice is called 'v5e-9'; there are v4-8"),
        (["--topology", "v5e-8", "--lengths", "60"], "--lengths: expected MEAN,MAX"),
        (["--topology", "v5e-8", "--examples", "10"], "--examples: expected a number of at least 1, with --lengths"),
        (["--topology", "v5e-8", "--price", "-1"], "--price: expected a price"),
        (["--topology", "v5e-8", "--price", "nan"], "--price: expected a price"),
        (["--topology", "v5e-8", "--price", "inf"], "--price: expected a price"),
    ],
)
def test_arguments_that_are_wrong(
    tiny: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(plan.main, [str(tiny), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_without_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan.main(["--topology", "v5e-8"])
    assert "the first argument has to be a config file" in capsys.readouterr().err


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jaxembed.plan", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env=os.environ,
    )  # fmt: skip


@pytest.mark.tpu
def test_a_tiny_config_from_end_to_end(tiny: Path) -> None:
    """Compiled once, then read from the cache; its memory is that of its parts."""
    options = (tiny, "--topology", "v5e-8", "--lengths", "100,128", "--examples", 10_000, "--mesh.fsdp", 4, "--json")
    first = run(*options, "--price", 1)
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout)
    assert found["memory"]["fits"]
    assert found["model"]["attention_kernel"] == "splash"
    assert found["memory"]["limit"] == 15.75
    formula = found["memory"]["formula"]
    arguments = sum(formula[part] for part in ("trained", "frozen", "optimizer", "batch"))
    assert arguments == pytest.approx(found["memory"]["compiled"]["arguments"], rel=0.3)  # small ones fill no tile
    kinds = {(moved["kind"], tuple(moved["axes"])) for moved in found["collectives"]}
    assert ("all-gather", ("fsdp",)) in kinds
    assert ("all-reduce", ("data",)) in kinds
    assert found["chip_hours_per_epoch"] > 0
    page = run(*options[:-1])
    assert page.returncode == 0, page.stderr
    assert "fits: " in page.stdout
    assert "compiling for" not in page.stderr


@pytest.mark.tpu
def test_a_tiny_encoder(tiny: Path) -> None:
    done = run(tiny, "--topology", "v5e-8", "--lengths", "30,128", "--encode", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["work"], found["memory"]["fits"], found["model"]["trained"]) == ("encoding", True, 0)
    assert found["texts_per_second"] > 0
