"""Training runs as the source of a conversion: what comes out is what the run itself exported."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxembed import convert
from jaxembed.__main__ import run_command
from jaxembed.checkpoint.stores import store_contents
from jaxembed.embedder import Embedder
from jaxembed.text.tokenizer import TextTokenizer

from blooms import random_bloom
from checkpoints import listing, small_files, stored_bytes
from runs import SHAPE, Workshop, write_base

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]
"""Ten runs take minutes."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    workshop = Workshop(tmp_path_factory.mktemp("workshop"))
    bfloat16 = ("--model.param_dtype", "bfloat16")
    assert workshop.train("full", "--checkpoint.every_steps", 3) == 0
    assert workshop.train("bitfit", "--training.trainable", "bitfit", "--checkpoint.every_steps", 3) == 0
    assert workshop.train("bfloat16", "--training.trainable", "bitfit", *bfloat16) == 0
    scratch = {"layers": 4, "dim": 16, "heads": 2}
    scratch_config = workshop.write_config("scratch", model={"scratch": scratch}, tokenizer={"train_vocab_size": 300})
    assert workshop.train("scratch", "--training.trainable", "bitfit", config=scratch_config) == 0
    rows = ("--training.train_tokens", '["e", "a"]', "--optimizer.learning_rate", 0.1)
    lora = ("--training.trainable", "lora", *rows, "--checkpoint.every_steps", 3, *bfloat16)
    groups = {"learning_rate": 0.1, "groups": [{"match": "lora/b", "learning_rate": 0.2, "weight_decay": 0.0}]}
    assert workshop.train("lora", *lora, config=workshop.write_config("lora", optimizer=groups)) == 0
    assert workshop.train("rows", "--training.trainable", "rows", *rows) == 0
    deep = shutil.copytree(workshop.base, workshop.folder / "deep")
    random_bloom(dataclasses.replace(SHAPE, layers=4)).save_pretrained(deep)
    for name, layers in (("last layers", 3), ("all layers", 4)):
        last = ("--training.trainable", "last_layers", "--training.last_layers", layers, "--model.path", deep)
        assert workshop.train(name, *last, *bfloat16) == 0
    return workshop


def run(*arguments: object) -> int:
    return run_command(convert.main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ["full", "bitfit", "bfloat16", "scratch", "lora", "rows", "last layers", "all layers"])
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


def test_frozen_tensors_are_those_of_the_base(workshop: Workshop) -> None:
    """Of every kind but those that train, byte by byte; of the table all rows but those that train."""
    before = load_file(workshop.base / "model.safetensors")
    matrices = {name for name in before if name.startswith("h.") and before[name].ndim == 2}
    biases = {name for name in before if name.endswith("bias")}
    table = "word_embeddings.weight"
    for run, trained in (("bitfit", biases), ("lora", {*matrices, table}), ("rows", {table})):
        after = load_file(workshop.folder / run / "model" / "model.safetensors")
        held = before
        if run == "lora":  # its base is held in bfloat16
            held = {name: array.astype(jnp.bfloat16).astype(np.float32) for name, array in before.items()}
        changed = {name for name, array in held.items() if np.any(array != after[name].astype("f4"))}
        assert changed == trained
        if table in trained:
            rows = np.flatnonzero((held[table] != after[table]).any(1))
            tokenizer = TextTokenizer.from_directory(workshop.base).tokenizer
            assert set(rows) == {tokenizer.token_to_id(token) for token in "ae"}


def test_a_checkpoint_holds_what_trains_and_nothing_else(workshop: Workshop) -> None:
    leaves = store_contents(workshop.folder / "last layers" / "checkpoints" / "6")
    assert not any(".table." in name or ".layers." in name for name in leaves)
    stacked = {leaf.shape[0] for name, leaf in leaves.items() if ".upper_layers." in name}
    assert stacked == {2}, "moments and parameters of the layers that train alone"
    leaves = store_contents(workshop.folder / "lora" / "checkpoints" / "6")
    parts = {name.split(".")[-4:-1][-2] for name, leaf in leaves.items() if leaf.shape}
    assert parts == {"lora", "token_rows"}


def test_resuming_with_parts_and_groups_ends_with_the_same_bytes(workshop: Workshop, tmp_path: Path) -> None:
    source = Path(shutil.copytree(workshop.folder / "lora", tmp_path / "run"))
    for name in ("model", "adapter", "checkpoints/6"):
        shutil.rmtree(source / name)
    assert workshop.resume(source) == 0
    assert stored_bytes(source / "model") == stored_bytes(workshop.folder / "lora" / "model")
    ours, theirs = (run / "adapter" / "adapter_model.safetensors" for run in (source, workshop.folder / "lora"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_group_that_takes_nothing_is_said_before_the_first_step(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = workshop.write_config("nothing", optimizer={"groups": [{"match": "lora", "learning_rate": 0.1}]})
    assert workshop.train(tmp_path / "run", "--training.trainable", "bitfit", config=config) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: optimizer.groups.0.match: 'lora' takes no parameter")
    assert "layers/qkv/bias" in line
    assert workshop.train(tmp_path / "run", "--training.trainable", "rows", "--training.train_tokens", "[Q, nono]") == 2
    assert "training.train_tokens.1: 'nono' is no token of the tokenizer" in capsys.readouterr().err
