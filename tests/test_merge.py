"""`jaxembed merge`: from the command line to a directory."""

from pathlib import Path

import numpy as np
import pytest

from jaxembed import merge
from jaxembed.__main__ import run_command
from jaxembed.embedder import Embedder

from checkpoints import listing, random_weights, write_checkpoint
from runs import Workshop

pytestmark = pytest.mark.usefixtures("quick_compilation")


def run(*arguments: object) -> int:
    return run_command(merge.main, [str(argument) for argument in arguments])


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_checkpoint(tmp_path / name, random_weights(seed=seed)) for seed, name in enumerate("abc")]


def test_average_and_slerp(tmp_path: Path, models: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*models, "--output", tmp_path / "soup", "--weights", 2, 1, 1) == 0
    printed = capsys.readouterr().out
    assert f"0.5 of {models[0]}\n0.25 of {models[1]}\n0.25 of {models[2]}\n" in printed
    assert Embedder.from_pretrained(tmp_path / "soup").model_hash in printed
    assert run(*models[:2], "--output", tmp_path / "arc", "--method", "slerp", "--t", 0.5) == 0
    assert run(*models[:2], "--output", tmp_path / "parts", "--max-shard-size", "20KB") == 0
    shards = list((tmp_path / "parts").glob("model-0*.safetensors"))
    assert len(shards) > 1
    for name in ("soup", "arc", "parts"):
        vectors = Embedder.from_pretrained(tmp_path / name).encode(["a few words", "and more"])
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.slow
def test_a_run_and_its_base(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    assert workshop.train("run") == 0
    run_dir = tmp_path / "run"
    assert run(run_dir, workshop.base, "--output", tmp_path / "merged") == 0
    parts = [Embedder.from_pretrained(path) for path in (run_dir / "model", workshop.base, tmp_path / "merged")]
    trained, base, merged = (parameters(part) for part in parts)
    for name, value in merged.items():
        np.testing.assert_allclose(value, (trained[name] + base[name]) / 2, rtol=1e-5, atol=1e-7)


def parameters(embedder: Embedder) -> dict[str, np.ndarray]:
    return {"/".join(path): np.asarray(value, np.float64) for path, value in embedder._flat_state().items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected two models or more, found 1"),
        (["b", "--t", "0.5"], "--t belongs to --method slerp"),
        (["b", "--max-shard-size", "many"], "--max-shard-size: expected a size such as 5GB"),
        (["nowhere/at/all"], "expected the directory of a model"),
        (["b", "--output", "a"], "is not empty"),
        (["b", "--output", "a", "--overwrite"], "is, or holds, the source"),
    ],
)
def test_errors(
    tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path)
    assert run("a", *arguments, *([] if "--output" in arguments else ["--output", "merged"])) == 2
    assert message in capsys.readouterr().err
    assert listing(tmp_path) == before
