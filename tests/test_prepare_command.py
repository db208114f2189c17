"""The command `prepare`: data sets from original files, the token cache of a config, and one line for what is wrong."""

import logging

import pytest

from jaxembed import prepare
from jaxembed.__main__ import COMMANDS, run_command

from originals import write_all_nli, write_ms_marco
from runs import Workshop

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    found = Workshop(tmp_path_factory.mktemp("workshop"))
    write_ms_marco(found.folder / "originals")
    write_all_nli(found.folder / "originals")
    return found


def run(*arguments):
    return run_command(prepare.main, [str(argument) for argument in arguments])


def test_one_data_set_from_its_original_files(workshop, tmp_path, capsys):
    arguments = ("--dataset", "ms_marco", "--manual-dir", workshop.folder / "originals", "--data-dir", tmp_path)
    assert run(*arguments) == 0
    first = capsys.readouterr().out
    assert f"ms_marco/passages/1.0.0: 60 rows, 0.00 GB in {tmp_path}" in first
    assert "ms_marco/hard_negatives/1.0.0: " in first
    assert run(*arguments) == 0
    assert capsys.readouterr().out == first
    assert "prepare" in COMMANDS


def tfds_sources(workshop, data_dir, **keys):
    return [
        {
            "kind": "tfds",
            "name": dataset,
            "dataset": dataset,
            "data_dir": str(data_dir),
            "manual_dir": str(workshop.folder / "originals"),
            **keys,
        }
        for dataset in ("ms_marco", "all_nli")
    ]


def test_a_prepared_config_trains_without_tokenising(workshop, tmp_path, capsys, caplog):
    data = {"train": tfds_sources(workshop, tmp_path / "tfds"), "cache_dir": str(tmp_path / "cache")}
    training = {"batch_size": 8, "steps": 3, "negatives": 1}
    config = workshop.write_config("prepared", data=data, training=training)
    with caplog.at_level(logging.INFO):
        assert run(config) == 0
    out = capsys.readouterr().out
    assert out.startswith("ready: ")
    assert "texts" in out
    assert "token cache built" in caplog.text
    for source in data["train"]:
        del source["manual_dir"]  # what is prepared needs the originals no more
    config = workshop.write_config("trained", data=data, training=training)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert workshop.train(tmp_path / "run", config=config) == 0
    assert "token cache built" not in caplog.text
    assert "token cache hit" in caplog.text
    caplog.clear()
    capsys.readouterr()
    with caplog.at_level(logging.INFO):
        assert run(config) == 0
    assert "token cache built" not in caplog.text
    assert capsys.readouterr().out == out


def test_a_config_with_jsonl_alone(workshop, tmp_path, capsys):
    assert run(workshop.config, "--data.cache_dir", tmp_path) == 0
    assert capsys.readouterr().out.startswith("ready: 48 pairs, 96 texts, ")
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "msmarco"], "error: data set 'msmarco': there is none of that name"),
        (["--dataset", "all_nli", "--manual-dir", "{tmp}/none"], "error: {tmp}/none: no such directory"),
        (["{tmp}/none.yaml"], "error: {tmp}/none.yaml: there is no such config file"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    assert run(*filled, *(["--data-dir", tmp_path] if "--dataset" in arguments else [])) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(message.format(tmp=tmp_path))


def test_a_damaged_original_is_one_line(workshop, tmp_path, capsys):
    write_all_nli(tmp_path)
    path = tmp_path / "AllNLI.tsv.gz"
    path.write_bytes(path.read_bytes()[:-100])
    assert run("--dataset", "all_nli", "--manual-dir", tmp_path, "--data-dir", tmp_path / "tfds") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {path}: truncated or corrupt")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--seed", "3"],
        ["--dataset", "all_nli", "config.yaml"],
        ["config.yaml", "--manual-dir", "here"],
        ["config.yaml", "--data-dir", "here"],
    ],
)
def test_arguments_that_do_not_go_together(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        prepare.main(arguments)
    assert left.value.code == 2
    assert "--dataset" in capsys.readouterr().err


def test_help_lists_both_uses(capsys):
    with pytest.raises(SystemExit) as left:
        prepare.main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "--manual-dir DIR" in text
    assert "--data.train.N.data_dir TEXT" in text
