"""Our reader and writer against the safetensors package, and against files that are not as they should be."""

import contextlib
import json
import os
import resource
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxembed.checkpoint.safetensors import TensorSpec, open_tensors, raw_bytes, write_safetensors
from jaxembed.errors import InputError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def example() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "b.weight": random.normal(size=(5, 3)).astype(BFLOAT16),
        "a.weight": random.normal(size=(4, 2, 3)).astype(np.float32),
        "odd": random.normal(size=3).astype(np.float16),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 7), np.float32),
        "ε": random.normal(size=2).astype(np.float32),
    }


def write(directory: Path, tensors: dict[str, np.ndarray], **options) -> list[Path]:
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]
    return write_safetensors(directory, specs, iter(tensors.items()), **options)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert raw_bytes(found) == raw_bytes(expected)


def write_raw(file: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write_shards(directory: Path, shards: dict[str, list[str]], weight_map: dict[str, str]) -> None:
    for file, names in shards.items():
        safetensors.numpy.save_file({name: np.ones(2, np.float32) for name in names}, directory / file)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_reads_what_the_package_wrote(tmp_path: Path):
    tensors = example()
    tensors |= {"mask": np.array([True, False]), "ids": np.arange(4), "byte": np.arange(3, dtype=np.int8)}
    safetensors.numpy.save_file(tensors, tmp_path / SINGLE)
    refs = open_tensors(tmp_path)
    assert refs.keys() == tensors.keys()
    for name, array in tensors.items():
        assert_same(refs[name].read(), array)
        assert refs[name].nbytes == array.nbytes


def test_reads_what_torch_wrote(tmp_path: Path):
    tensors = {"a": torch.randn(3, 5).to(torch.bfloat16), "b": torch.randn(7).half(), "c": torch.randn(2, 2)}
    safetensors.torch.save_file(tensors, tmp_path / SINGLE)
    for name, ref in open_tensors(tmp_path).items():
        assert ref.dtype.name == str(tensors[name].dtype).removeprefix("torch.")
        np.testing.assert_array_equal(ref.read().astype(np.float32), tensors[name].float().numpy())


def test_what_is_read_cannot_be_written_to(tmp_path: Path):
    write(tmp_path, example())
    with pytest.raises(ValueError, match="read-only"):
        open_tensors(tmp_path)["a.weight"].read()[0] = 1


def test_writes_the_package_s_bytes(tmp_path: Path):
    tensors = example()
    assert write(tmp_path / "ours", tensors) == [tmp_path / "ours" / SINGLE]
    safetensors.numpy.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours" / SINGLE).read_bytes() == (tmp_path / "theirs").read_bytes()
    for name, tensor in safetensors.torch.load_file(tmp_path / "ours" / SINGLE).items():
        np.testing.assert_array_equal(tensor.float().numpy(), tensors[name].astype(np.float32))


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 40), max_size=8), limit=st.integers(1, 200))
def test_shards_round_trip(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int):
    directory = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": np.arange(size, dtype=np.float16) for i, size in enumerate(sizes)}
    files = write(directory, tensors, max_shard_bytes=limit)
    assert {file.name for file in files} == {file.name for file in directory.iterdir()}
    refs = open_tensors(directory)
    assert refs.keys() == tensors.keys()
    for name, array in tensors.items():
        assert_same(refs[name].read(), array)
    for shard in files:
        if shard.name != INDEX:
            stored = [array.nbytes for array in safetensors.numpy.load_file(shard).values()]
            assert sum(stored) <= limit or sum(size > 0 for size in stored) == 1


def test_one_tensor_at_a_time_and_names_appear_last(tmp_path: Path):
    seen = []

    def tensors():
        for name, array in example().items():
            seen.append(sorted(file.suffix for file in tmp_path.iterdir() if not file.name.endswith(".tmp")))
            yield name, array

    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in example().items()]
    write_safetensors(tmp_path, specs, tensors(), max_shard_bytes=50)
    assert seen == [[]] * len(specs)


def test_a_failed_write_leaves_the_old_weights(tmp_path: Path):
    write(tmp_path, example())
    before = (tmp_path / SINGLE).read_bytes()
    specs = [TensorSpec("a", np.dtype(np.float32), (2,)), TensorSpec("b", np.dtype(np.float32), (2,))]
    with pytest.raises(ValueError, match=r"expected .*'b'.* found 'nothing'"):
        write_safetensors(tmp_path, specs, iter([("a", np.ones(2, np.float32))]), max_shard_bytes=8)
    with pytest.raises(ValueError, match=r"expected .*'a'.* found 'a', float64"):
        write_safetensors(tmp_path, specs, iter([("a", np.ones(2))]))
    with pytest.raises(ValueError, match="more of them"):
        write_safetensors(tmp_path, specs[:1], iter([(name, np.ones(2, np.float32)) for name in "ab"]))
    assert [file.name for file in tmp_path.iterdir()] == [SINGLE]
    assert (tmp_path / SINGLE).read_bytes() == before


def test_new_weights_replace_all_old_ones(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    for limit in (1 << 20, 40, 1 << 20):
        write(tmp_path, example(), max_shard_bytes=limit)
        assert open_tensors(tmp_path).keys() == example().keys()
    assert {file.name for file in tmp_path.iterdir()} == {SINGLE, "config.json"}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file.*cannot be written"):
        write(tmp_path / "file", example())


def test_a_full_disk_leaves_the_old_weights(tmp_path: Path):
    write(tmp_path, example())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InputError, match=r"model-00002-of-00002.safetensors: cannot be written: File too large"):
            write(tmp_path, {"a": np.ones(4, np.float32), "b": np.ones(100_000, np.float32)}, max_shard_bytes=16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == [SINGLE]
    assert open_tensors(tmp_path).keys() == example().keys()


def test_no_weights(tmp_path: Path):
    with pytest.raises(InputError, match="nowhere: no such directory"):
        open_tensors(tmp_path / "nowhere")
    with pytest.raises(InputError, match=f"looked for {SINGLE} and {INDEX}, found neither"):
        open_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"found pytorch_model.bin; convert it once.*save_pretrained"):
        open_tensors(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a header of 0 bytes"),
        (b"abc", "truncated"),
        (struct.pack("<Q", 1 << 60), r"a header of 1,152,921,504,606,846,976 bytes announced in a file of 8"),
        (struct.pack("<Q", 200) + b"{}", "truncated"),
        (b"\x80\x04pickled....", "no safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (struct.pack("<Q", 2) + b"[]", "no JSON object"),
        (struct.pack("<Q", 2) + b"{,", "JSON expected"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "JSON expected"),
        (struct.pack("<Q", 60_000) + b"[" * 60_000, "JSON expected"),
    ],
)
def test_damaged_header(tmp_path: Path, content: bytes, message: str):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        open_tensors(tmp_path)
    assert str(tmp_path / SINGLE) in str(error.value)


def test_header_over_the_limit(tmp_path: Path):
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(1 << 30)
    with pytest.raises(InputError, match="a header of 100,000,001 bytes"):
        open_tensors(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"t": entry("F8_E4M3", [2], [0, 2])}, "dtype 'F8_E4M3'"),
        ({"t": entry(shape=[3])}, r"takes 12 bytes; the header gives it bytes 0 to 8"),
        ({"t": entry(offsets=[8, 0])}, "bytes 8 to 0"),
        ({"t": entry(offsets=[-8, 0])}, "bytes -8 to 0"),
        ({"t": entry(shape=[-1, -2])}, "expected dtype, shape and data_offsets"),
        ({"t": entry(shape=[2.0])}, "expected dtype, shape and data_offsets"),
        ({"t": entry(offsets=[0])}, "expected dtype, shape and data_offsets"),
        ({"t": 3}, "expected dtype, shape and data_offsets"),
        ({"t": entry(offsets=[4, 12])}, "leaves a gap before it"),
        ({"s": entry(), "t": entry(offsets=[4, 12])}, "overlaps the tensor before it"),
        ({"s": entry(), "t": entry(offsets=[8, 16])}, "ends at byte .* truncated"),
        ({"t": entry(shape=[1 << 40], offsets=[0, 1 << 42])}, "truncated"),
    ],
)
def test_damaged_entry(tmp_path: Path, header: dict[str, object], message: str):
    write_raw(tmp_path / SINGLE, header, bytes(12))
    with pytest.raises(InputError, match=message) as error:
        open_tensors(tmp_path)
    assert f"{tmp_path / SINGLE}: tensor 't'" in str(error.value)


def test_duplicate_key_and_trailing_bytes(tmp_path: Path):
    one = json.dumps(entry())
    write_raw(tmp_path / SINGLE, f'{{"t": {one}, "t": {one}}}'.encode(), bytes(8))
    with pytest.raises(InputError, match="'t' occurs twice"):
        open_tensors(tmp_path)
    write_raw(tmp_path / SINGLE, {"t": entry()}, bytes(9))
    with pytest.raises(InputError, match="1 bytes behind the last tensor"):
        open_tensors(tmp_path)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_an_input_error_or_readable(tmp_path: Path, data: st.DataObject):
    write(tmp_path, {"a": np.ones((2, 3), np.float32), "b": np.ones(4, BFLOAT16)})
    content = bytearray((tmp_path / SINGLE).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / SINGLE).write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(InputError):
        for ref in open_tensors(tmp_path).values():
            assert ref.read().nbytes == ref.nbytes


@pytest.mark.parametrize(
    ("shards", "weight_map", "message"),
    [
        ({"1": ["a"]}, {"a": "1", "b": "2"}, "'2' is missing"),
        ({"1": ["a"]}, {"a": "1", "b": "../2"}, "'../2' leads out of the model directory"),
        ({"1": ["a"]}, {"a": "1", "b": "/etc/passwd"}, "'/etc/passwd' leads out of the model directory"),
        ({"1": ["a"]}, {"a": "1", "b": "\0"}, "no file name"),
        ({"1": ["a"]}, {"a": "1", "b": "."}, "'.' is missing"),
        ({"1": ["a"], "2": ["a"]}, {"a": "1", "b": "2"}, "2: tensor 'a' is in .*1' too"),
        ({"1": ["a"], "2": ["b"]}, {"a": "1", "b": "2", "c": "2"}, "2: tensor 'c' is listed in .*, but not there"),
        ({"1": ["a", "c"], "2": ["b"]}, {"a": "1", "b": "2"}, "1: tensor 'c' is not listed"),
        ({"1": ["a", "b"], "2": ["c"]}, {"a": "1", "b": "2", "c": "2"}, "1: tensor 'b' is in '2' according to"),
    ],
)
def test_shards_against_the_index(tmp_path: Path, shards, weight_map, message: str):
    write_shards(tmp_path, shards, weight_map)
    with pytest.raises(InputError, match=message):
        open_tensors(tmp_path)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_damaged_index(tmp_path: Path, index: str):
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(InputError, match=INDEX):
        open_tensors(tmp_path)


def test_links_out_of_the_directory(tmp_path: Path):
    write(tmp_path / "elsewhere", example())
    model = tmp_path / "model"
    model.mkdir()
    os.symlink(tmp_path / "elsewhere" / SINGLE, model / SINGLE)
    with pytest.raises(InputError, match=r"'model.safetensors' leads out of the model directory, to .*elsewhere"):
        open_tensors(model)
    (model / SINGLE).unlink()
    os.symlink(SINGLE, model / SINGLE)
    with pytest.raises(InputError, match="is missing"):
        open_tensors(model)


@pytest.mark.parametrize("subfolder", ["", "0_Transformer"])
def test_a_hub_snapshot_links_to_its_own_blobs_only(tmp_path: Path, subfolder: str):
    model, other = tmp_path / "models--a--b", tmp_path / "models--a--other"
    snapshot = model / "snapshots" / "0123" / subfolder
    snapshot.mkdir(parents=True)
    for place in (model, other):
        [file] = write(place / "blobs", example())
        file.rename(place / "blobs" / "abc")
    up = "../" * len(snapshot.relative_to(model).parts)
    os.symlink(f"{up}blobs/abc", snapshot / SINGLE)
    os.symlink(model / "snapshots", tmp_path / "link")
    for directory in (snapshot, tmp_path / "link" / "0123" / subfolder):
        assert_same(open_tensors(directory)["a.weight"].read(), example()["a.weight"])
    (snapshot / SINGLE).unlink()
    os.symlink(f"{up}../models--a--other/blobs/abc", snapshot / SINGLE)
    with pytest.raises(InputError, match="leads out of the model directory"):
        open_tensors(snapshot)
