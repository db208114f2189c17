"""`train --check`: what is wrong is found without training, and what is right is shown as the model will see it."""

import os

import pytest

from jaxembed import train
from jaxembed.__main__ import run_command

from checkpoints import listing
from runs import Workshop, make_rows, write_jsonl


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop"))


def check(workshop, *overrides):
    return run_command(train.main, ["--check", str(workshop.config), *map(str, overrides)])


def test_it_shows_the_data_and_trains_nothing(workshop, capsys):
    write_jsonl(workshop.folder / "more.jsonl", make_rows(30, seed=5))
    workshop.config = workshop.write_config(
        data={
            "train": [
                {"kind": "jsonl", "name": "a", "path": str(workshop.data), "query_instruction": "look up: "},
                {
                    "kind": "jsonl",
                    "name": "more",
                    "path": str(workshop.folder / "more.jsonl"),
                    "anchor": "anchor",
                    "positive": "positive",
                    "negatives": ["hard"],
                    "symmetric": True,
                },
            ],
            "cache_dir": str(workshop.folder / "cache"),
        },
        text_format={"query": {"prefix": "[Q]", "suffix": "[E]"}, "document": {"prefix": "[D]", "suffix": "[F]"}},
    )
    before = listing(workshop.folder)
    assert check(workshop, "--training.negatives", 0, "--model.path", workshop.base) == 2
    assert "spare rows" in capsys.readouterr().err
    assert check(workshop, "--model.scratch.layers", 1, "--tokenizer.train_vocab_size", 300) == 0
    output = capsys.readouterr().out
    assert "anchor, as query: [Q]look up: " in output
    assert "positive, as document: [D]" in output
    assert "positive, as query: [Q]" in output
    assert "negative, as query: [Q]" in output
    assert "[E]" in output
    assert "[F]" in output
    assert "6 steps of 8 pairs, 9 an epoch, 1 of them warm-up; nothing was trained, nothing written" in output
    assert set(listing(workshop.folder)) - set(before) <= {"config.yaml"}
    assert not os.path.exists("runs/config")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"anchor": "a", "positive": 3}', r"positive"),
        ('{"anchor": "a"}', r"positive"),
        ("not json", r"JSON"),
    ],
)
def test_a_broken_row_is_found(tmp_path, capsys, line, message):
    workshop = Workshop(tmp_path)
    workshop.data.write_text(workshop.data.read_text() + line + "\n")
    assert check(workshop) == 2
    error = capsys.readouterr().err
    assert "a.jsonl:49: " in error
    assert message in error


def test_too_few_pairs_for_a_batch(tmp_path, capsys):
    assert check(Workshop(tmp_path), "--training.batch_size", 100) == 2
    assert "training.batch_size is 100 pairs and the data has 48" in capsys.readouterr().err
