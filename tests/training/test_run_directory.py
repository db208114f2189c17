"""Training runs as the source of a conversion: what comes out is what the run itself exported."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxembed import convert
from jaxembed.__main__ import run_command
from jaxembed.embedder import Embedder

from checkpoints import listing, small_files, stored_bytes
from runs import Workshop, quick_compilation, write_base  # noqa: F401


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    workshop = Workshop(tmp_path_factory.mktemp("workshop"))
    bfloat16 = ("--model.param_dtype", "bfloat16")
    assert workshop.train("full", "--checkpoint.every_steps", 3) == 0
    assert workshop.train("bitfit", "--training.trainable", "bitfit", "--checkpoint.every_steps", 3) == 0
    assert workshop.train("bfloat16", "--training.trainable", "bitfit", *bfloat16) == 0
    scratch = {"layers": 2, "dim": 16, "heads": 2}
    scratch_config = workshop.write_config("scratch", model={"scratch": scratch}, tokenizer={"train_vocab_size": 300})
    assert workshop.train("scratch", "--training.trainable", "bitfit", config=scratch_config) == 0
    return workshop


def run(*arguments: object) -> int:
    return run_command(convert.main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ["full", "bitfit", "bfloat16", "scratch"])
def test_the_run_s_own_export(workshop: Workshop, tmp_path: Path, name: str) -> None:
    source = workshop.folder / name
    exported = source / "model"
    assert run(source, tmp_path / "export") == 0
    assert stored_bytes(tmp_path / "export") == stored_bytes(exported)
    cards = ("README.md",)
    assert small_files(tmp_path / "export", without=cards) == small_files(exported, without=cards)
    texts = ["a few words", ""]
    ours, theirs = (Embedder.from_pretrained(path) for path in (tmp_path / "export", exported))
    assert ours.model_hash == theirs.model_hash
    np.testing.assert_array_equal(ours.encode_query(texts), theirs.encode_query(texts))
    card = (tmp_path / "export" / "README.md").read_text()
    assert "after step 6" in card
    assert ours.model_hash in card


def test_other_containers(workshop: Workshop, tmp_path: Path) -> None:
    exported = stored_bytes(workshop.folder / "full" / "model")
    assert run(workshop.folder / "full", tmp_path / "hf", "--to", "hf", "--verify") == 0
    assert run(workshop.folder / "full", tmp_path / "orbax", "--to", "orbax", "--verify") == 0
    assert run(tmp_path / "orbax", tmp_path / "back") == 0
    assert stored_bytes(tmp_path / "hf") == exported
    assert stored_bytes(tmp_path / "back") == exported
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "bloom"


def test_the_newest_checkpoint_that_can_be_read(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(workshop.folder / "full", tmp_path / "run"))
    for file in (source / "checkpoints" / "6" / "state").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    assert run(source, tmp_path / "target") == 0
    assert "after step 3" in (tmp_path / "target" / "README.md").read_text()
    assert stored_bytes(tmp_path / "target") != stored_bytes(source / "model")
    shutil.rmtree(source / "checkpoints")
    (source / "checkpoints").mkdir()
    before = listing(tmp_path)
    assert run(source, tmp_path / "other") == 2
    assert "no checkpoint that can be read" in capsys.readouterr().err
    assert listing(tmp_path) == before


def test_another_base_than_then_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workshop = Workshop(tmp_path)
    assert workshop.train("run", "--training.trainable", "bitfit") == 0
    shutil.rmtree(workshop.base)
    write_base(workshop.base, scale=0.3)
    assert run(tmp_path / "run", tmp_path / "target") == 2
    assert "is not the one that the run began with" in capsys.readouterr().err
    shutil.rmtree(workshop.base)
    assert run(tmp_path / "run", tmp_path / "target") == 2
    assert str(workshop.base) in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_a_config_changed_by_hand_is_refused(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(workshop.folder / "bitfit", tmp_path / "run"))
    config = source / "config.yaml"
    config.write_text(config.read_text().replace("trainable: bitfit", "trainable: full"))
    assert run(source, tmp_path / "target") == 2
    assert "does not hold the trainable part of the run's config" in capsys.readouterr().err
