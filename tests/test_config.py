import json
import os
from typing import get_args

import pytest
from pydantic import ValidationError

from jaxembed.config import (
    DistributedConfig,
    JsonlSource,
    PythonSource,
    TrainConfig,
    dump_config,
    json_schema,
    load_config,
    options_help,
)
from jaxembed.data.formats import RowFormat
from jaxembed.errors import InputError

QUICKSTART = """
model:
  scratch: {layers: 2, dim: 128, heads: 4}
tokenizer:
  train_vocab_size: 4096
data:
  train:
    - {kind: python, name: code, packages: [numpy]}
    - {kind: jsonl, name: rows, path: data/rows.jsonl.gz, negatives: [wrong], weight: 2}
  dev:
    - {kind: python, name: code, part: held_out}
training:
  epochs: 3
profile:
  steps: 10:13
export:
  verify: off
"""


@pytest.fixture
def load(tmp_path):
    def run(*overrides: str, text: str = QUICKSTART) -> TrainConfig:
        file = tmp_path / "quickstart.yaml"
        file.write_text(text)
        return load_config(file, overrides)

    return run


def message(load, *overrides, text=QUICKSTART) -> str:
    with pytest.raises(InputError) as caught:
        load(*overrides, text=text)
    return str(caught.value)


def test_a_recipe(load):
    config = load()
    assert config.run_dir == "runs/quickstart"
    assert config.model.scratch is not None
    assert (config.model.scratch.layers, config.model.scratch.dim) == (2, 128)
    code, rows = config.data.train
    assert isinstance(code, PythonSource)
    assert (code.path, code.packages, code.part) == ("stdlib", ["numpy"], "train")
    assert isinstance(rows, JsonlSource)
    assert (rows.anchor, rows.negatives, rows.weight) == (None, ["wrong"], 2.0)
    assert config.training.epochs == 3.0
    assert config.profile.window == (10, 13)
    assert config.export.verify == "off"


def test_defaults(load):
    config = load()
    optimizer = config.optimizer
    assert config.loss.temperature == 0.05
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (1e-4, 0.9, 0.999, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.warmup_ratio) == (0.01, 1.0, 0.1)
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) == (-1, 1, 1)
    assert (config.checkpoint.keep, config.logging.every_steps) == (2, 10)
    assert config.text_format is None


def test_a_section_with_nothing_in_it_has_its_defaults(load):
    assert load(text=QUICKSTART + "optimizer:\nlogging:\n") == load()


def test_overrides_reach_into_lists(load):
    config = load("--data.train.0.path", "~/my-repo", "--data.train.1.weight=0.5", "--text_format.max_length", "64")
    assert config.data.train[0].path == os.path.expanduser("~/my-repo")
    assert config.data.train[1].weight == 0.5
    assert config.text_format is not None
    assert (config.text_format.max_length, config.text_format.query.prefix) == (64, "query: ")


def test_a_base_model_replaces_the_decoder_from_scratch_and_its_tokenizer(load):
    config = load("--model.path", "bigscience/bloom-560m")
    assert config.model.scratch is None
    assert config.model.path == "bigscience/bloom-560m"
    assert config.tokenizer.train_vocab_size is None


def test_steps_replace_epochs(load):
    training = load("--training.steps", "5").training
    assert (training.steps, training.epochs) == (5, None)


def test_what_is_dumped_is_read_back(load, tmp_path):
    config = load("--training.steps", "5", "--text_format.query.instruction", "\\${x} 'y'")
    assert config.text_format is not None
    assert config.text_format.query.instruction == "${x} 'y'"
    file = tmp_path / "elsewhere" / "config.yaml"
    file.parent.mkdir()
    file.write_text(dump_config(config))
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["--model.scratch", "null"],
            "model: give exactly one of model.path (weights to start from) and",
        ),
        (["--model.path", "x", "--model.scratch.dim", "8"], "and model.scratch (a new decoder), found both"),
        (["--model.path", "x", "--tokenizer.path", "y"], "x brings its own tokenizer"),
        (["--model.scratch.heads", "3"], "model.scratch: heads has to divide dim, found 3 heads and dim 128"),
        (["--tokenizer.train_vocab_size", "null"], "model.scratch needs a tokenizer; give tokenizer.train_vocab_size"),
        (["--tokenizer.train_vocab_size", "100"], "expected a number greater than or equal to 260, found 100"),
        (["--tokenizer", "{path: a, train_vocab_size: 300}"], "give one of tokenizer.train_vocab_size and tokenizer.p"),
        (["--training.epochs", "null"], "give exactly one of training.epochs and training.steps, found neither"),
        (["--training.epochs", "1", "--training.steps", "1"], "training.epochs and training.steps, found both"),
        (
            ["--training.batch_size", "0"],
            "--training.batch_size: expected a number greater than or equal to 1",
        ),
        (
            ["--training.trainable", "head"],
            "--training.trainable: expected 'full', 'bitfit', 'lora', 'last_layers' or 'rows', found \"head\"",
        ),
        (["--training.negatives", "-1"], "--training.negatives: expected a number greater than or equal to 0"),
        (["--loss.temperature", "0"], "--loss.temperature: expected a number greater than 0, found 0"),
        (["--loss.temperature", ".nan"], "--loss.temperature: expected a finite number, found NaN"),
        (["--optimizer.beta2", "1"], "--optimizer.beta2: expected a number less than 1, found 1"),
        (["--optimizer.learning_rate", "fast"], '--optimizer.learning_rate: expected a number, found "fast"'),
        (["--optimizer.warmup_ratio", "2"], "--optimizer.warmup_ratio: expected a number less than or equal to 1"),
        (["--mesh.data", "0"], "--mesh.data: expected -1 (all that are left) or a number from 1 on, found 0"),
        (["--mesh.fsdp", "-2"], "--mesh.fsdp: expected -1 (all that are left) or a number from 1 on, found -2"),
        (
            ["--mesh.data", "-1", "--mesh.fsdp", "-1"],
            "expected -1 (all that are left) for one axis at most, found it for data and fsdp",
        ),
        (["--profile.steps", "13:10"], '--profile.steps: expected FIRST:LAST such as 10:13, found "13:10"'),
        (["--seed", "-1"], "--seed: expected a number greater than or equal to 0, found -1"),
        (["--data.train", "[]"], "--data.train: expected at least one entry, found []"),
        (["--data.train.1.name", "code"], "every source of data.train needs its own name, found code twice"),
        (
            ["--data.train.1.name", "a/b"],
            'name: expected letters, digits, "." "_" "-" only, found "a/b"',
        ),
        (["--data.train.1.path", ""], '--data.train.1.path: expected text that is not empty, found ""'),
        (["--data.train.0.held_out", "1"], "--data.train.0.held_out: expected a number less than 1, found 1"),
        (["--data.dev.0.held_out", "0"], "part: held_out is empty with held_out: 0"),
        (["--data.dev.0.path", "null"], "data.dev.0: give path (a folder, or stdlib) or packages, found neither"),
        (["--data.train.2.path", "x"], "--data.train.2.path: data.train has 2 entries in "),
        (["--learning_rate", "1"], "--learning_rate: no such option; did you mean optimizer.learning_rate?"),
        (["--run_dir", "${oc.env:HOME}"], "environment variables and functions are not read"),
    ],
)
def test_what_does_not_fit_is_refused(load, overrides, expected):
    assert expected in message(load, *overrides)


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        ((), (-1, 1, 1)),
        (("--mesh.fsdp", "-1"), (1, -1, 1)),
        (("--mesh.tensor", "-1", "--mesh.fsdp", "2"), (1, 2, -1)),
        (("--mesh.data", "2", "--mesh.fsdp", "-1"), (2, -1, 1)),
    ],
)
def test_any_axis_may_take_the_rest(load, overrides, sizes):
    mesh = load(*overrides).mesh
    assert (mesh.data, mesh.fsdp, mesh.tensor) == sizes


def test_what_is_missing_is_named(load):
    errors = message(load, text="seed: 3\n").splitlines()
    assert len(errors) == 3
    assert any("model: give exactly one of" in error for error in errors)
    assert any("data.train: required, but missing" in error for error in errors)
    assert any("training: give exactly one of" in error for error in errors)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: there is no such config file"):
        load_config(tmp_path / "none.yaml")


def test_help_names_every_option(load):
    text = options_help()

    def keys(value, prefix):
        for key, item in value.items():
            if isinstance(item, dict) and item:
                yield from keys(item, f"{prefix}{key}.")
            elif isinstance(item, list) and item and isinstance(item[0], dict):
                for element in item:
                    yield from keys(element, f"{prefix}{key}.N.".replace("data.dev", "data.train"))
            else:
                yield prefix + key

    config = load("--text_format.max_length", "64")
    listed = {line.split()[0].removeprefix("--") for line in text.splitlines() if line.startswith("  --")}
    assert set(keys(config.model_dump(), "")) <= listed
    assert '  --text_format.document.prefix TEXT  (default: "document: ")\n' in text
    lines = text.splitlines()
    assert all(lines[i + 1].strip() for i, line in enumerate(lines) if line.startswith("  --"))


def test_the_schema_for_editors_describes_the_same():
    schema = json.loads(json.dumps(json_schema()))
    assert schema["properties"].keys() == TrainConfig.model_fields.keys()
    assert set(schema["required"]) == {"model", "data", "training"}
    loss = schema["$defs"]["LossConfig"]
    assert loss["additionalProperties"] is False
    temperature = loss["properties"]["temperature"]
    assert (temperature["type"], temperature["exclusiveMinimum"], temperature["default"]) == ("number", 0, 0.05)
    assert temperature["description"]


ROWS = QUICKSTART.replace("data:\n  train:\n", "data:\n  train:\n    - {kind: jsonl, name: faq, path: r.tsv}\n", 1)


def test_rows_have_a_format_or_named_columns(load):
    assert "name: faq" in ROWS
    rows = load(text=ROWS).data.train[0]
    assert not rows.named_columns
    for key in ("anchor", "positive", "score"):
        assert load(f"--data.train.0.{key}", "x", text=ROWS).data.train[0].named_columns
    assert load("--data.train.0.format", "nli", text=ROWS).data.train[0].format == "nli"
    both = message(load, "--data.train.0.format", "nli", "--data.train.0.anchor", "x", text=ROWS)
    assert "data.train.0: format does not go with anchor, positive, negatives or score" in both
    unknown = message(load, "--data.train.0.format", "beir", text=ROWS)
    assert "--data.train.0.format: expected 'sentence-transformers', 'graded'" in unknown


def test_the_formats_are_those_that_can_be_read():
    options = JsonlSource.model_fields["format"].annotation
    assert set(get_args(get_args(options)[0])) == set(get_args(RowFormat))


def test_the_coordinator_is_an_address():
    for address in ("10.0.0.1:8476", "[::1]:1", "node-7.cluster:65535"):
        assert DistributedConfig(coordinator=address).coordinator == address
    for address, said in (
        ("node", "expected HOST:PORT"),
        ("node:0", "expected a port from 1 to 65535, found 0"),
        ("node:99999", "expected a port from 1 to 65535, found 99999"),
        ("a..b:8476", '"a..b" is no name of a host'),
    ):
        with pytest.raises(ValidationError, match=said):
            DistributedConfig(coordinator=address)
