"""What a run says of itself, from made-up parts: the line, the files, the model card, the table."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from etils import epath
from flax import nnx

from jaxembed.config import load_config
from jaxembed.data.loader import RowLayout
from jaxembed.data.sources import Examples
from jaxembed.evaluation.dev_set import DevSet
from jaxembed.sharding import make_mesh
from jaxembed.text.format import DEFAULT_TEXT_FORMAT
from jaxembed.training import report
from jaxembed.training.gradient import LossOptions

DEV = {
    "held-out": {
        "before": {"mrr@10": 0.12345, "loss": 2.5},
        "BM25, plain words": {"mrr@10": 0.34},
        "after": {"mrr@10": 0.56789, "loss": 1.25},
    }
}


class Batches:
    """Of a run of nine steps."""

    layout = RowLayout(64, 8, chunk_rows=4, chips=2, chunks=(2, 5), density=0.876)
    schedule = SimpleNamespace(batch_size=32, hash="0123abcd")

    def __len__(self) -> int:
        return 9


class StubEmbedder:
    """Embeds "q…" and "d…" of the same rest alike, and keeps what it is told to save."""

    text_format = DEFAULT_TEXT_FORMAT
    dim = 4
    model_hash = "89abcdef"
    decoder = SimpleNamespace(config=SimpleNamespace(causal=True))

    def __init__(self, verification: str | None = None) -> None:
        self.verification = verification
        self.saved: dict[str, Any] = {}

    def encode_query(self, texts: list[str], **_: Any) -> np.ndarray:
        vectors = np.stack([np.random.default_rng(list(text[1:].encode())).normal(size=self.dim) for text in texts])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    encode_document = encode_query

    def save_pretrained(self, path: Path, **options: Any) -> str | None:
        self.saved = {"path": path, **options}
        return self.verification


def config_of(tmp_path: Path, *overrides: str) -> Any:
    values = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": "org/base"},
        "data": {"train": [{"kind": "jsonl", "name": "a", "path": "a.jsonl"}]},
        "training": {"steps": 9},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_config(path, overrides)


def state_of(*sizes: int) -> nnx.State:
    return nnx.State({str(number): nnx.Param(np.zeros(size)) for number, size in enumerate(sizes)})


@pytest.mark.parametrize(("start", "end"), [(0, "steps 1 to 9"), (4, "steps 5 to 9"), (9, "all 9 steps are done")])
def test_the_start_line_has_the_numbers_of_the_run(start: int, end: str) -> None:
    decoder = SimpleNamespace(huggingface_config={"model_type": "bloom"}, config=SimpleNamespace(layers=24, dim=1024))
    mesh = make_mesh(2, 1, 1, jax.devices()[:2])
    options = LossOptions(attention_kernel="flash")
    parts: Any = (decoder, state_of(1000, 234), state_of(5_000_000), mesh, Batches(), options, start)
    line = report.start_line(*parts)
    assert "\n" not in line
    for said in (
        "bloom, 24 layers of 1024",
        "1,234 parameters train, 5,000,000 are frozen",
        "computes, attention flash;",
        "(data 2 × fsdp 1 × tensor 1)",
        "32 pairs a step in 16/40 rows of 64, 4 rows a chunk",
        "expected density 0.88",
        "2 compiled step(s)",
    ):
        assert said in line
    assert line.endswith(end)


def test_the_run_files_say_what_repeats_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, "--seed", "7")
    monkeypatch.setattr(sys, "argv", ["train", "config.yaml", "--seed", "7"])
    batches: Any = Batches()
    report.write_run_files(epath.Path(tmp_path), config, batches)
    about = json.loads((tmp_path / report.RUN_FILE).read_text())
    assert about["command"] == ["train", "config.yaml", "--seed", "7"]
    assert about["plan"] == "0123abcd"
    assert about["versions"]["numpy"] == metadata.version("numpy")
    assert len(about["devices"]) == jax.device_count()
    assert load_config(tmp_path / report.CONFIG_FILE) == config


def test_without_git_there_is_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, batches = config_of(tmp_path), Batches()
    for error in (FileNotFoundError("git"), subprocess.CalledProcessError(128, "git")):

        def fails(*_: Any, error: Exception = error, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(subprocess, "run", fails)
        report.write_run_files(epath.Path(tmp_path), config, batches)
        assert json.loads((tmp_path / report.RUN_FILE).read_text())["git"] is None


def test_where_the_export_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert report.export_path(config_of(tmp_path)) == tmp_path / "run" / "model"
    assert report.export_path(config_of(tmp_path, "--export.path", "~/models/mine")) == Path(
        "/home/someone/models/mine"
    )


@pytest.mark.parametrize(
    ("verify", "verification", "told"),
    [
        ("auto", "agrees", "agrees"),
        ("auto", None, "the export was not read back: sentence-transformers is not installed here"),
        ("off", None, None),
    ],
)
def test_the_model_is_saved_with_a_card_of_the_run(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    verify: str,
    verification: str | None,
    told: str | None,
) -> None:
    caplog.set_level("INFO")
    config = config_of(tmp_path, "--export.path", str(tmp_path / "mine"), "--export.verify", verify)
    examples = [
        Examples("a", ["q"] * 1500, ["d"] * 1500, [], ["1"] * 1500, {"duplicate": 2, "empty text": 1}, ""),
        Examples("b", ["q"], ["d"], [], ["1"], {}, ""),
    ]
    embedder: Any = StubEmbedder(verification)
    assert report.write_model(config, embedder, examples, DEV) == tmp_path / "mine"
    assert caplog.messages == ([told] if told else [])
    saved = embedder.saved
    assert (saved["path"], saved["overwrite"], saved["verify"]) == (tmp_path / "mine", True, verify == "auto")
    lines = saved["card"].splitlines()
    for line in (
        "# mine",
        'base_model: "org/base"',
        "| a | 1,500 | 3 dropped (2 duplicate, 1 empty text) |",
        "| b | 1 | 0 dropped |",
        "| data | metric | before | BM25, plain words | after |",
        "| held-out | mrr@10 | 0.1235 | 0.3400 | 0.5679 |",
        "| held-out | loss | 2.5000 |  | 1.2500 |",
        f"| jax | {jax.__version__} |",
    ):
        assert line in lines
    written = saved["card"].partition("```yaml\n")[2].partition("\n```")[0]
    assert yaml.safe_load(written) == config.model_dump(mode="json")
    assert f"`{embedder.model_hash}`" in saved["card"]


def test_the_last_table_and_searches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path, "--evaluation.searches", '["q one"]')
    dev_set = DevSet("held-out", ["q one", "q two"], ["d one", "d\n  two"], ["a:1", "a:2"], [{0}, {1}])
    embedder: Any = StubEmbedder()
    report.print_results(config, DEV, [dev_set], embedder, tmp_path / "mine")
    lines = capsys.readouterr().out.splitlines()
    assert "held-out: 2 queries, 2 documents" in lines
    cells = [line.split() for line in lines]
    assert ["mrr@10", "loss"] in cells
    assert ["before", "0.1235", "2.5000"] in cells
    assert ["BM25,", "plain", "words", "0.3400"] in cells
    assert ["after", "0.5679", "1.2500"] in cells
    hits = lines[lines.index("  'q one'") + 1 :]
    assert hits[0].split() == ["1.000", "a:1", "d", "one"]
    assert hits[1].split()[1:] == ["a:2", "d", "two"]
    assert lines[-2:] == [f"model: {tmp_path / 'mine'}", f"run:   {config.run_dir}"]
