"""The command: bad input ends in one line that names the place, before training starts."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from jaxembed import train
from jaxembed.__main__ import run_command
from jaxembed.text.format import DEFAULT_TEXT_FORMAT
from jaxembed.text.tokenizer import TextTokenizer, train_byte_level_bpe

from runs import Workshop, make_rows, write_base, write_jsonl


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def refused(workshop, capsys):
    """A function that runs the command with overrides, and gives the one line in which it must end."""

    def error_line(*overrides, config=None, run="refused"):
        assert workshop.train(run, *overrides, config=config) == 2
        *before, line = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert not any("Traceback" in other or other.startswith("error") for other in before)
        assert not (workshop.folder / run / "config.yaml").exists(), "training began"
        return line.removeprefix("error: ")

    return error_line


def test_unknown_key(refused, workshop):
    config = workshop.write_config("unknown", training={"batch_sise": 8, "steps": 6})
    line = refused(config=config)
    assert f"{config}:" in line
    assert "training.batch_sise" in line
    assert "batch_size" in line.replace("batch_sise", "")
    assert "--training.batchsize" in refused("--training.batchsize", 8)


def test_wrong_type(refused, workshop):
    config = workshop.write_config("wrong", training={"batch_size": "eight", "steps": 6})
    line = refused(config=config)
    assert f"{config}:" in line
    assert "training.batch_size" in line
    assert "eight" in line


def test_an_attention_kernel_of_another_device(refused, workshop):
    """Before anything is read."""
    workshop.data.rename(workshop.folder / "away")
    line = refused("--model.attention_kernel", "splash")
    (workshop.folder / "away").rename(workshop.data)
    assert line == "model.attention_kernel: splash runs on TPU, and this is cpu (cpu); choose auto"


def test_missing_config(refused, workshop):
    assert str(workshop.folder / "none.yaml") in refused(config=workshop.folder / "none.yaml")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"anchor": "a", "positive": "b"\n', "not JSON"),
        (b'{"anchor": "a"}\n', "no column 'positive'"),
        (b'{"anchor": "a", "positive": "\xff"}\n', "not UTF-8: byte 0xff"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(refused, workshop, line, message):
    path = workshop.folder / "bad.jsonl"
    path.write_bytes(write_jsonl(path, make_rows(20)).read_bytes() + line)
    found = refused("--data.train.0.path", path)
    assert found.startswith(f"{path}:21: {message}")


def test_missing_data(refused, workshop):
    path = workshop.folder / "none.jsonl"
    assert refused("--data.train.0.path", path) == f"{path}: no such file (data source 'a')"
    dev = json.dumps([{"kind": "jsonl", "name": "dev", "path": str(path)}])
    assert refused("--data.dev", dev) == f"{path}: no such file (data source 'dev')"


def damage_truncate(base):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return str(path)


def damage_shard(base):
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = list(tensors)
    shards = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, base / file)
    weight_map = {name: file for file, inside in shards.items() for name in inside}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "model-00002-of-00002.safetensors").unlink()
    return "model-00002-of-00002.safetensors"


def damage_shape(base):
    tensors = load_file(base / "model.safetensors")
    tensors["h.1.mlp.dense_h_to_4h.bias"] = tensors["h.1.mlp.dense_h_to_4h.bias"][:-1]
    save_file(tensors, base / "model.safetensors")
    return "h.1.mlp.dense_h_to_4h.bias"


def damage_architecture(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "rwkv"}))
    return "rwkv"


def damage_config(base):
    (base / "config.json").unlink()
    return "config.json"


def damage_tokenizer(base):
    (base / "tokenizer.json").write_text("{}")
    return "tokenizer.json"


@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_shard, damage_shape, damage_architecture, damage_config, damage_tokenizer]
)
def test_a_damaged_model_is_named_by_file_or_tensor(refused, workshop, tmp_path, damage):
    base = shutil.copytree(workshop.base, tmp_path / "base")
    named = damage(base)
    assert named in refused("--model.path", base)


def test_no_model_there(refused, tmp_path):
    assert str(tmp_path / "none") in refused("--model.path", tmp_path / "none")


def test_more_tokens_than_the_model_has_rows(refused, workshop, tmp_path):
    base = write_base(tmp_path / "base")
    texts = [text for row in make_rows(50) for text in row.values()]
    TextTokenizer(train_byte_level_bpe(texts, 300), DEFAULT_TEXT_FORMAT).save(base)
    line = refused("--model.path", base)
    assert "300" in line
    assert "264" in line
    scratch = {"scratch": {"dim": 16, "heads": 2, "vocab_size": 280}}
    config = workshop.write_config("scratch", model=scratch, tokenizer={"path": str(base)})
    assert refused(config=config).startswith("model.scratch.vocab_size: 280 rows are too few for 300 tokens")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--training.batch_size", 56), "training.batch_size is 56 pairs and the data has 48"),
        (("--training.batch_size", 12), "training.batch_size: 12 is not a multiple of the 8 devices"),
        (("--training.row_length", 8), "training.row_length: 8 is shorter than the longest text"),
        (("--mesh.data", 3), "mesh: data × fsdp × tensor = 3 × 1 × 1 does not make the 8 devices"),
        (("--mesh.tensor", 8), "mesh.tensor: 8 does not divide the 'heads' dimension 2 of parameter "),
        (("--text_format.max_length", 2), "text format: max_length: 2 tokens leave no room for a text"),
    ],
)
def test_sizes_that_do_not_fit(refused, overrides, message):
    assert refused(*overrides).startswith(message)


def test_places_that_cannot_be_written(refused, workshop, tmp_path):
    (tmp_path / "file").write_text("")
    inside = tmp_path / "file" / "run"
    assert str(inside) in refused(run=inside)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "thesis.tex").write_text("")
    line = refused("--export.path", tmp_path / "export")
    assert line.startswith(f"{tmp_path / 'export'}: holds 'thesis.tex'")


def test_a_directory_that_holds_a_run(workshop, capsys, tmp_path):
    (tmp_path / "config.yaml").write_text("")
    assert workshop.train(tmp_path) == 2
    line = capsys.readouterr().err
    assert line == (
        f"error: {tmp_path}: holds a run already; go on with it by --resume {tmp_path}, "
        "or give another directory by --run_dir\n"
    )


def test_nothing_to_resume(workshop, capsys, tmp_path):
    assert workshop.resume(tmp_path) == 2
    assert capsys.readouterr().err == f"error: --resume {tmp_path}: no config.yaml there, so no run\n"


@pytest.mark.parametrize("arguments", [[], ["--seed", "3", "config.yaml"], ["--resume"]])
def test_neither_config_nor_run(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        train.main(arguments)
    assert left.value.code == 2
    assert "--resume RUN_DIR" in capsys.readouterr().err


def test_config_and_run_are_too_much(workshop, capsys, tmp_path):
    shutil.copy(workshop.config, tmp_path / "config.yaml")
    assert run_command(train.main, [str(workshop.config), "--resume", str(tmp_path)]) == 2
    assert f"error: {workshop.config}: expected an override" in capsys.readouterr().err


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as left:
        train.main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "--training.batch_size INT" in text
    assert "--resume RUN_DIR" in text
