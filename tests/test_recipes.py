"""Every recipe in configs/ passes `train --check`, with small stand-ins for its model and its data."""

import dataclasses
from pathlib import Path

import pytest

from jaxembed import train
from jaxembed.__main__ import run_command
from jaxembed.config import load_config
from jaxembed.text.format import DEFAULT_TEXT_FORMAT
from jaxembed.text.tokenizer import TextTokenizer, train_byte_level_bpe

from blooms import random_bloom
from originals import write_all_nli, write_ms_marco
from runs import SHAPE, make_rows, write_jsonl

CONFIGS = Path(__file__).parents[1] / "configs"
PAPER = ("udever-bloom-560m", "udever-bloom-1b1", "udever-bloom-3b", "udever-bloom-7b1", "sgpt-bloom")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand-ins")
    spare = dataclasses.replace(SHAPE, vocab_size=SHAPE.vocab_size + 8)  # BLOOM has 200 rows without a token
    random_bloom(spare).save_pretrained(folder / "base")
    texts = [text for row in make_rows(50) for text in row.values()]
    tokenizer = TextTokenizer(train_byte_level_bpe(texts, SHAPE.vocab_size), DEFAULT_TEXT_FORMAT)
    tokenizer.tokenizer.save(str(folder / "base" / "tokenizer.json"))
    write_ms_marco(folder / "originals")
    write_all_nli(folder / "originals")
    write_jsonl(folder / "pairs.jsonl", make_rows(70))
    return folder


def check(name: str, *overrides: object) -> int:
    return run_command(train.main, ["--check", str(CONFIGS / f"{name}.yaml"), *map(str, overrides)])


def test_all_recipes_are_here() -> None:
    others = {"quickstart", "reproduce-udever", "your-code", "your-pairs"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*PAPER, *others}


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s(name: str, stand_ins: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    small = ["--model.path", stand_ins / "base", "--training.batch_size", 4]
    for place in range(len(config.data.train)):
        small += [f"--data.train.{place}.manual_dir", stand_ins / "originals"]
        small += [f"--data.train.{place}.data_dir", stand_ins / "prepared"]
    assert check(name, *small) == 0
    output = capsys.readouterr().out
    assert "msmarco: " in output
    if name.startswith("udever"):
        for place, role, begin, end in (
            ("anchor", "query", "[BOQ]", "[EOQ]"),
            ("positive", "document", "[BOD]", "[EOD]"),
        ):
            line = next(line for line in output.splitlines() if line.startswith(f"  {place}, as {role}: "))
            assert line.removeprefix(f"  {place}, as {role}: ").startswith(begin)
            assert line.endswith(end)
        assert output.count(", as query: [BOQ]") == 4  # the query of MS MARCO, and all three texts of AllNLI
    else:
        assert "anchor, as query: query: " in output
    assert "nothing was trained" in output


def test_your_code(tmp_path: Path, stand_ins: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for module in range(30):
        functions = [
            f'def function_{module}_{n}(x):\n    """Return the number {n} of module {module}, plus x."""\n'
            f"    y = x + {n}\n    return y + {module}\n"
            for n in range(4)
        ]
        (tmp_path / f"module_{module}.py").write_text("\n\n".join(functions))
    paths = ["--data.train.0.path", tmp_path, "--data.dev.0.path", tmp_path]
    assert check("your-code", "--model.path", stand_ins / "base", *paths) == 0
    assert "anchor, as query: query: Return the number" in capsys.readouterr().out
    scratch = ["--model.scratch.layers", 2, "--tokenizer.train_vocab_size", 300, "--training.trainable", "full"]
    assert check("your-code", *scratch, *paths) == 0


def test_your_pairs(stand_ins: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = ["--data.train.0.path", stand_ins / "pairs.jsonl"]
    assert check("your-pairs", "--model.path", stand_ins / "base", *pairs) == 0
    assert "1 steps of 64 pairs" in capsys.readouterr().out
    assert check("your-pairs", "--model.path", stand_ins / "base", "--data.train.0.path", "nowhere.jsonl") == 2
    assert "nowhere.jsonl: no such file" in capsys.readouterr().err


def test_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--data.train.0.packages", "[]", "--tokenizer.train_vocab_size", 300]
    assert check("quickstart", *few) == 0
    assert "anchor, as query: query:" in capsys.readouterr().out
