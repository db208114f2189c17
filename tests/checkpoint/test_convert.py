"""`jaxembed convert` on every container: nothing lost on any way, nothing left behind by what fails."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from etils import epath

from jaxembed import convert
from jaxembed.__main__ import run_command
from jaxembed.checkpoint import buffers, stores
from jaxembed.checkpoint import convert as conversions
from jaxembed.embedder import Embedder
from jaxembed.text.format import TEXT_FORMAT_FILE

from buckets import Bucket
from checkpoints import (
    SHAPE,
    Container,
    bytes_of,
    listing,
    random_bits,
    random_weights,
    small_files,
    stored_bytes,
    write_checkpoint,
    write_tensors,
)

NAMES = [("", False), ("transformer.", False), ("transformer.", True)]


def run(*arguments: object) -> int:
    """The exit status of the command."""
    return run_command(convert.main, [str(argument) for argument in arguments])


def weights_of(output: str) -> str:
    """The hash in a summary."""
    return output.split("weights ")[1].split()[0]


@pytest.mark.parametrize(
    ("dtype", "container"),
    [
        *((dtype, "safetensors") for dtype in ("float32", "float16", "bfloat16")),
        *((dtype, "safetensors shards") for dtype in ("float32", "float16", "bfloat16")),
        *(("bfloat16", container) for container in ("bin", "bin shards")),
    ],
)
def test_round_trips_are_byte_identical(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str, container: Container
) -> None:
    hashes = set()
    for prefix, head in NAMES:
        tensors = random_bits(dtype, prefix, head=head)
        work = tmp_path / f"{prefix}{head}"
        source = write_checkpoint(work / "source", tensors, container)
        size = "20KB" if "shards" in container else "5GB"
        assert run(source, work / "direct", "--to", "hf", "--max-shard-size", size) == 0
        assert run(source, work / "orbax") == 0
        assert run(work / "orbax", work / "back", "--max-shard-size", size) == 0
        hashes |= {weights_of(part) for part in capsys.readouterr().out.strip().split("\n")}
        for target in ("direct", "back"):
            assert stored_bytes(work / target) == bytes_of(tensors)
            assert (work / target / "model.safetensors").exists() == ("shards" not in container)
            assert small_files(work / target) == small_files(source)
        assert listing(work / "direct") == listing(work / "back")
        assert not any(name.startswith(".") for name in os.listdir(work))
    assert len(hashes) == 1  # whatever the container, the prefix and the head


def test_memory_is_used_again_without_mixing_tensors_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = random_bits("bfloat16", "transformer.", head=True)
    source = write_checkpoint(tmp_path / "source", tensors, "safetensors shards")
    for kept, group in ((0, 1), (1000, 3000), (1 << 30, 3000), (1 << 30, 1 << 20)):
        monkeypatch.setattr(buffers, "_LARGEST_KEPT", kept)
        monkeypatch.setattr(stores, "_GROUP_BYTES", group)
        assert run(source, tmp_path / "orbax", "--overwrite") == 0
        assert run(tmp_path / "orbax", tmp_path / "back", "--overwrite") == 0
        assert stored_bytes(tmp_path / "back") == bytes_of(tensors)


def test_each_tensor_keeps_its_own_dtype(tmp_path: Path) -> None:
    tensors = random_bits("bfloat16")
    tensors |= {name: tensor for name, tensor in random_bits("float32").items() if "norm" in name}
    tensors["ln_f.bias"] = random_bits("float16")["ln_f.bias"]
    source = write_checkpoint(tmp_path / "source", tensors)
    assert run(source, tmp_path / "orbax") == 0
    assert run(tmp_path / "orbax", tmp_path / "back") == 0
    assert stored_bytes(tmp_path / "back") == bytes_of(tensors)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    tensors = random_weights("bfloat16") | {"ln_f.bias": random_weights("float32")["ln_f.bias"]}
    source = write_checkpoint(tmp_path / "source", tensors)
    expected = bytes_of({name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()})
    assert run(source, tmp_path / "direct", "--to", "hf", "--dtype", dtype) == 0
    assert run(source, tmp_path / "orbax") == 0
    assert run(source, tmp_path / "narrow", "--dtype", dtype) == 0
    assert run(tmp_path / "orbax", tmp_path / "on the way back", "--dtype", dtype) == 0
    assert run(tmp_path / "narrow", tmp_path / "before") == 0
    lines = capsys.readouterr().out.splitlines()
    for target in ("direct", "on the way back", "before"):
        assert stored_bytes(tmp_path / target) == expected
        config = json.loads((tmp_path / target / "config.json").read_text())
        assert config["torch_dtype"] == dtype
        assert small_files(tmp_path / target, without=["config.json"]) == small_files(source, without=["config.json"])
    whole, *cast = sorted({weights_of(line) for line in lines}, key=lambda found: found != weights_of(lines[1]))
    assert len(cast) == 1
    assert whole == weights_of(lines[1])


@pytest.mark.slow
def test_the_hash_is_what_embedder_and_card_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "source", random_weights("float32", "transformer."))
    assert run(source, tmp_path / "orbax") == 0
    assert run(tmp_path / "orbax", tmp_path / "export", "--to", "sentence-transformers") == 0
    orbax_line, export_line = capsys.readouterr().out.splitlines()
    shown = weights_of(orbax_line)
    assert weights_of(export_line) == shown
    assert shown in (tmp_path / "export" / "README.md").read_text()
    embedders = [Embedder.from_pretrained(tmp_path / name) for name in ("source", "orbax", "export")]
    assert {embedder.model_hash for embedder in embedders} == {shown}
    texts = ["a few words", "", "and more"]
    first, *others = (embedder.encode(texts, show_progress_bar=False) for embedder in embedders)
    for other in others:
        np.testing.assert_array_equal(other, first)
    embedders[1].save_pretrained(tmp_path / "saved")
    assert shown in (tmp_path / "saved" / "README.md").read_text()


def test_an_export_drops_the_head_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = random_weights("float32", "transformer.")
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"] + 1
    source = write_checkpoint(tmp_path / "source", tensors)
    for name in ("source", "orbax"):
        assert run(tmp_path / name, tmp_path / f"of {name}", "--to", "sentence-transformers") == 0
        assert "dropped, as an embedder has no use for it: lm_head.weight" in capsys.readouterr().out
        assert run(source, tmp_path / "orbax", "--overwrite") == 0
        assert "dropped" not in capsys.readouterr().out
        assert stored_bytes(tmp_path / f"of {name}") == bytes_of(random_weights("float32"))


def test_an_export_needs_a_text_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "source", random_weights())
    (source / TEXT_FORMAT_FILE).unlink()
    target = tmp_path / "export"
    assert run(source, target, "--to", "sentence-transformers") == 2
    assert "text format" in capsys.readouterr().err
    (tmp_path / "format.yaml").write_text("query: {prefix: 'q: '}\ndocument: {prefix: 'd: '}\nmax_length: 32\n")
    assert (
        run(source, target, "--to", "sentence-transformers", "--text-format", tmp_path / "format.yaml", "--verify") == 0
    )
    found = Embedder.from_pretrained(target).tokenizer.text_format
    assert (found.query.prefix, found.document.prefix, found.max_length) == ("q: ", "d: ", 32)
    (tmp_path / "format.yaml").write_text("queries: {prefix: 'q: '}\n")
    assert run(source, tmp_path / "other", "--to", "sentence-transformers", "--text-format", tmp_path / "format.yaml")
    assert "format.yaml" in (error := capsys.readouterr().err)
    assert "queries" in error


def test_dry_run_names_every_tensor_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = random_weights("bfloat16", "transformer.")
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"] + 1
    source = write_checkpoint(tmp_path / "source", tensors)
    before = listing(tmp_path)
    assert run(source, tmp_path / "target", "--dry-run", "--dtype", "float32") == 0
    assert listing(tmp_path) == before
    output = capsys.readouterr().out
    rows = {line.split()[0]: line for line in output.splitlines() if line}
    for name, tensor in tensors.items():
        assert str(list(tensor.shape)) in rows[name]
        assert "BF16 → F32" in rows[name]
    assert "layers/0/qkv/kernel" in rows["transformer.h.0.self_attention.query_key_value.weight"]
    assert "carried beside the model" in rows["lm_head.weight"]
    assert f"{len(tensors) - 1} tensors fill all parameters, 1 carried beside the model, 0 dropped" in output
    assert run(source, tmp_path / "target", "--dry-run", "--to", "sentence-transformers") == 0
    assert "dropped" in capsys.readouterr().out.split("lm_head.weight")[1].splitlines()[0]


def test_the_reader_of_a_table_may_stop(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", random_weights())
    command = f"{sys.executable} -m jaxembed.convert '{source}' '{tmp_path / 'target'}' --dry-run | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("source tensor")
    assert done.stderr == ""


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source", random_weights("float32", "transformer."))
    for arguments in (
        ("source", "orbax"),
        ("source", "direct", "--to", "hf", "--dtype", "bfloat16"),
        ("orbax", "back"),
        ("orbax", "export", "--to", "sentence-transformers"),
        ("orbax", "copy", "--to", "orbax"),
    ):
        assert run(tmp_path / arguments[0], tmp_path / arguments[1], *arguments[2:], "--verify") == 0
        output = capsys.readouterr().out
        assert "transformers" in output
        assert "layer" in output
        assert not any(name.startswith(".") for name in os.listdir(tmp_path))

    write = conversions.write_safetensors

    def perturbed(directory: Path, specs: object, tensors: Iterator[tuple[str, np.ndarray]], **options: object) -> None:
        changed = "transformer.h.1.mlp.dense_4h_to_h.bias"
        write(directory, specs, ((name, array * 1.01 if name == changed else array) for name, array in tensors))

    monkeypatch.setattr(conversions, "write_safetensors", perturbed)
    before = listing(tmp_path)
    assert run(source, tmp_path / "wrong", "--to", "hf", "--verify") == 1
    assert "other hidden states" in capsys.readouterr().err
    assert listing(tmp_path) == before


SHARDS = "safetensors shards"
SHARD = "model-00002-of-00003.safetensors"
SHARD_OF = r"model-0000[123]-of-00003\.safetensors: tensor '"
INDEX = "model.safetensors.index.json"


def with_tensors(**changes: torch.Tensor | None) -> Callable[[Path], object]:
    """In the place of those names; None takes one out. Dots are written as double underscores."""

    def hurt(source: Path) -> None:
        for file in source.glob("model*"):
            file.unlink()
        tensors = random_weights() | {name.replace("__", "."): tensor for name, tensor in changes.items()}
        write_tensors(source, {name: tensor for name, tensor in tensors.items() if tensor is not None}, SHARDS)

    return hurt


def with_index(change: Callable[[dict[str, str]], dict[str, str]]) -> Callable[[Path], object]:
    def hurt(source: Path) -> None:
        index = json.loads((source / INDEX).read_text())
        (source / INDEX).write_text(json.dumps({**index, "weight_map": change(index["weight_map"])}))

    return hurt


def duplicate(source: Path) -> None:
    tensors = safetensors.torch.load_file(source / SHARD)
    other = next(iter(safetensors.torch.load_file(source / "model-00001-of-00003.safetensors")))
    safetensors.torch.save_file(tensors | {other: random_weights()[other]}, source / SHARD)


def linked_out(source: Path) -> None:
    elsewhere = source.parent / "elsewhere"
    elsewhere.mkdir()
    shutil.move(source / SHARD, elsewhere / SHARD)
    (source / SHARD).symlink_to(elsewhere / SHARD)


def announced(nbytes: int) -> Callable[[Path], object]:
    return lambda source: (source / SHARD).write_bytes(nbytes.to_bytes(8, "little") + b"{}")


class Payload:
    """Would leave a file behind, were it unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def pickled_code(source: Path) -> None:
    for file in source.glob("model*"):
        file.unlink()
    torch.save({**random_weights(), "ln_f.bias": Payload(source.parent / "executed")}, source / "pytorch_model.bin")


DAMAGES = {
    "a tensor missing": (with_tensors(ln_f__bias=None), r"missing \(1\): ln_f\.bias"),
    "one too many": (with_tensors(h__1__norm__bias=torch.ones(2)), r"belong nowhere \(1\): h\.1\.norm\.bias"),
    "a wrong shape": (
        with_tensors(ln_f__bias=torch.ones(3)),
        rf"{SHARD_OF}ln_f\.bias' has shape \[3\], expected \[24\]",
    ),
    "another dtype": (with_tensors(ln_f__bias=torch.ones(24).double()), rf"{SHARD_OF}ln_f\.bias' is F64"),
    "whole numbers": (with_tensors(ln_f__bias=torch.ones(24, dtype=torch.int8)), rf"{SHARD_OF}ln_f\.bias' is I8"),
    "a head of whole numbers": (with_tensors(lm_head__weight=torch.ones(264, 24).int()), "lm_head.weight' is I32"),
    "a duplicate": (duplicate, rf"{SHARD}.*'.*'"),
    "a file that is not there": (with_index(lambda m: {**m, "ln_f.bias": "model-9.safetensors"}), r"model-9\.safeten"),
    "a file outside": (with_index(lambda m: {**m, "ln_f.bias": "../model.safetensors"}), r"\.\./model\.safetensors"),
    "a header of absurd length": (announced(1 << 60), rf"{SHARD}: .*1,152,921,504,606,846,976 bytes"),
    "a truncated file": (
        lambda source: os.truncate(source / SHARD, (source / SHARD).stat().st_size - 100),
        rf"{SHARD}: tensor '.*' .*truncated",
    ),
    "a link out": (linked_out, rf"{SHARD}"),
    "code in a pickle": (pickled_code, r"pytorch_model\.bin.*Path\.touch|pytorch_model\.bin.*getattr"),
    "no config": (lambda source: (source / "config.json").unlink(), r"'config\.json' is missing"),
    "another architecture": (
        lambda source: (source / "config.json").write_text('{"model_type": "bert"}'),
        "model_type is 'bert', supported are 'bloom'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_what_is_wrong_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, to: str
) -> None:
    source = write_checkpoint(tmp_path / "source", random_weights(), SHARDS)
    hurt, message = DAMAGES[damage]
    hurt(source)
    before = listing(tmp_path)
    for options in ((), ("--dry-run",), ("--verify",)):
        assert run(source, tmp_path / "target", "--to", to, *options) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert len(error.splitlines()) == 1
        assert str(source) in error
        assert re.search(message, error), error
        assert listing(tmp_path) == before


def test_a_snapshot_of_the_hub_is_followed_into_its_own_blobs(tmp_path: Path) -> None:
    tensors = random_weights()
    source = write_checkpoint(tmp_path / "models--a--b" / "snapshots" / "1", tensors, SHARDS)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.move(file, blobs / str(number))
        file.symlink_to(Path("../../blobs") / str(number))
    assert run(source, tmp_path / "target", "--to", "hf") == 0
    assert stored_bytes(tmp_path / "target") == bytes_of(tensors)
    assert small_files(tmp_path / "target") == small_files(source)
    assert not any(path.is_symlink() for path in (tmp_path / "target").iterdir())


def hurt_record(**changes: object) -> Callable[[Path], object]:
    def hurt(source: Path) -> None:
        file = source / "jaxembed_orbax.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return hurt


def hurt_config(**changes: object) -> Callable[[Path], object]:
    def hurt(source: Path) -> None:
        file = source / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return hurt


def truncate_data(source: Path) -> None:
    for file in (source / "weights").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(source: Path) -> None:
    largest = max((file for file in (source / "weights").rglob("*") if file.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


DAMAGED_STORES = {
    "no record": (lambda source: (source / "jaxembed_orbax.json").unlink(), "no weights|looked for"),
    "a record that is no JSON": (lambda source: (source / "jaxembed_orbax.json").write_text("{"), "jaxembed_orbax"),
    "a record without hash": (lambda s: (s / "jaxembed_orbax.json").write_text('{"jaxembed": "1"}'), "jaxembed_orbax"),
    "a record of later": (hurt_record(format=2), "format 2 is of a later jaxembed"),
    "another hash": (hurt_record(weights_hash="0" * 64), "damaged: the weights have the hash .* recorded is 000"),
    "another prefix": (hurt_record(prefix="transformer.", weights_hash="1" * 64), "damaged: the weights have the hash"),
    "no weights": (lambda source: shutil.rmtree(source / "weights"), r"weights: not a readable Orbax checkpoint"),
    "another number of layers": (hurt_config(n_layer=4), r"weights: these are not the weights of this model; missing"),
    "fewer layers": (hurt_config(n_layer=2), r"weights: these are not the weights of this model.*layers/2"),
    "another size": (hurt_config(hidden_size=48), r"weights"),
    "another vocabulary": (hurt_config(vocab_size=300), r"word_embeddings"),
    "truncated data": (truncate_data, r"weights: .*(cannot be read|not a readable)"),
    "a bit": (flip_a_bit, r"weights: .*cannot be read|damaged: the weights have the hash"),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    write_checkpoint(folder / "source", random_weights())
    assert run(folder / "source", folder / "orbax") == 0
    return folder / "orbax"


@pytest.mark.parametrize("damage", DAMAGED_STORES)
def test_a_damaged_orbax_directory_is_refused(
    tmp_path: Path, stored: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    source = Path(shutil.copytree(stored, tmp_path / "source"))
    hurt, message = DAMAGED_STORES[damage]
    hurt(source)
    before = listing(tmp_path)
    for to in ("hf", "orbax"):
        assert run(source, tmp_path / "target", "--to", to) == 2
        error = capsys.readouterr().err.split("error: ")[1]  # a bar may stand before
        assert len(error.splitlines()) == 1
        assert str(source) in error
        assert re.search(message, error), error
        assert listing(tmp_path) == before


def test_targets(tmp_path: Path, stored: Path, bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(target: Path | str, *options: str) -> str:
        before = listing(tmp_path)
        assert run(stored, target, *options) == 2
        assert listing(tmp_path) == before
        return capsys.readouterr().err

    target = tmp_path / "target"
    target.mkdir()
    assert run(stored, target) == 0  # an empty directory is free
    assert "not empty; choose another directory, or allow it with --overwrite" in refused(target)
    (target / "old").touch()
    assert run(stored, target, "--overwrite") == 0
    assert not (target / "old").exists()
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.txt").touch()
    assert "is no model directory, so it is not overwritten" in refused(notes, "--overwrite")
    assert "is a file" in refused(notes / "thesis.txt", "--overwrite")
    assert run(stored, "gs://bucket/model") == 0
    assert epath.Path("gs://bucket/model/config.json").exists()
    assert "gs://bucket/model: is not empty; choose another" in refused("gs://bucket/model")
    assert "is, or holds, the source" in refused(stored, "--overwrite")
    assert "is, or holds, the source" in refused(stored.parent, "--overwrite")
    (tmp_path / "link").symlink_to(stored)
    assert "is, or holds, the source" in refused(tmp_path / "link", "--overwrite")
    assert (stored / "jaxembed_orbax.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere: "),
        (("source", "--max-shard-size", "5 parsecs"), "--max-shard-size: expected a size such as 5GB"),
        (("source", "--max-shard-size", "0"), "--max-shard-size"),
        (("source", "--text-format", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_arguments(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_checkpoint(tmp_path / "source", random_weights())
    assert run(arguments[0], "target", *arguments[1:]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def large_checkpoint(directory: Path) -> Path:
    """Of 100 MB: it can be killed in the midst of it."""
    write_checkpoint(directory, random_weights())
    config = json.loads((directory / "config.json").read_text()) | {"vocab_size": 1_000_000}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").unlink()
    table = torch.zeros(1_000_000, SHAPE.dim)
    write_tensors(directory, random_weights() | {"word_embeddings.weight": table})
    return directory


def start(*arguments: object, prelude: str = "") -> subprocess.Popen[str]:
    code = f"import sys\n{prelude}\nfrom jaxembed.__main__ import run_command\nfrom jaxembed import convert\n"
    code += "sys.exit(run_command(convert.main, sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("to", ["orbax", "hf"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_what_was_killed_leaves_nothing_that_looks_complete(tmp_path: Path, to: str, how: signal.Signals) -> None:
    source = large_checkpoint(tmp_path / "source")
    target, partial = tmp_path / "target", tmp_path / ".target.incomplete"
    process = start(source, target, "--to", to)
    while not partial.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert not target.exists()
    assert not (partial / "jaxembed_orbax.json").exists()
    assert "Traceback" not in errors
    if how == signal.SIGINT:
        assert listing(tmp_path) == [name for name in listing(tmp_path) if name.startswith("source")]
    assert run(source, target, "--to", to) == 0  # what was left is in nobody's way
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_full_disk(tmp_path: Path, to: str) -> None:
    source = large_checkpoint(tmp_path / "source")
    full = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    full += "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))"
    process = start(source, tmp_path / "target", "--to", to, prelude=full)
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (1, 2)
    assert "Traceback" not in errors
    assert "too large" in errors.split("error: ")[1]
    assert os.listdir(tmp_path) == ["source"]
