"""Files of `torch.save` against the tensors that went into them, and against files that are not as they should be."""

import contextlib
import io
import json
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import BloomConfig, BloomForCausalLM

from jaxembed.checkpoint import torch_files
from jaxembed.checkpoint.torch_files import open_torch_tensors
from jaxembed.errors import InputError

FILE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def example() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(12, 5, generator=generator)
    return {
        "float32": torch.randn(4, 2, 3, generator=generator),
        "bfloat16": torch.randn(5, 3, generator=generator).bfloat16(),
        "bfloat16 scalar": torch.tensor(1.5).bfloat16(),
        "float16": torch.randn(3, generator=generator).half(),
        "not contiguous": torch.randn(4, 6, generator=generator).T,
        "bfloat16 not contiguous": torch.randn(4, 6, generator=generator).bfloat16().T,
        "part of a larger one": torch.randn(10, 4, generator=generator)[3:7, 1:3],
        "table": table,
        "tied": table,
        "rows of the table": table[2:5],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "empty": torch.zeros(0, 7),
        "scalar": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(torch.randn(3, generator=generator)),
        "mask": torch.tril(torch.ones(4, 4, dtype=torch.bool)),
        "ids": torch.arange(4),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "ε": torch.randn(2, generator=generator),
    }


def write_shards(directory: Path, shards: dict[str, dict[str, torch.Tensor]], weight_map: dict[str, str]) -> None:
    for name, tensors in shards.items():
        torch.save(tensors, directory / name)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_same(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    found = open_torch_tensors(directory)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        array = found[name].read()
        assert found[name].name == name
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert array.shape == tuple(tensor.shape)
        assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert array.flags.c_contiguous
        assert not array.flags.writeable
        # torch's own bytes, element after element.
        values = tensor.detach().contiguous().flatten()
        expected = values.view(torch.uint8).numpy().tobytes() if values.numel() else b""
        assert array.tobytes() == expected, name


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_tensors_come_out_bit_for_bit(tmp_path: Path, zipped: bool) -> None:
    torch.save(example(), tmp_path / FILE, _use_new_zipfile_serialization=zipped)
    assert_same(tmp_path, example())


def test_a_state_dict_as_transformers_3_wrote_it(tmp_path: Path) -> None:
    """An OrderedDict with metadata, a tied head and buffers."""
    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2))
    state = model.state_dict()
    assert isinstance(state, OrderedDict)
    state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, tmp_path / FILE)
    assert_same(tmp_path, state)


def test_shards(tmp_path: Path) -> None:
    tensors = example()
    names = list(tensors)
    shards = {f"pytorch_model-{i}-of-3.bin": {name: tensors[name] for name in names[i::3]} for i in range(3)}
    write_shards(tmp_path, shards, {name: shard for shard, inside in shards.items() for name in inside})
    assert_same(tmp_path, {name: tensor for inside in shards.values() for name, tensor in inside.items()})


def test_bits_of_any_bfloat16(tmp_path: Path) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    torch.save({"all": torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)}, tmp_path / FILE)
    found = open_torch_tensors(tmp_path)["all"].read()
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.view(np.uint16), bits)


def test_only_one_tensor_is_in_memory(tmp_path: Path) -> None:
    """Anonymous memory and mapped pages alike: the resident set, while 16 tensors of 16 MiB are read in turn."""
    torch.save({str(i): torch.full((4 << 20,), float(i)) for i in range(16)}, tmp_path / FILE)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if sys.platform != "linux":
        pytest.skip("reads /proc")
    found = open_torch_tensors(tmp_path)
    before, most = resident(), 0
    for i, tensor in enumerate(found.values()):
        array = tensor.read()
        assert array.sum() == i * array.size
        most = max(most, resident() - before)
        del array
    assert most < 40 << 20


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("zip", "the pickle names '(posix|nt).mkdir', where only tensors are expected"),
        ("before torch 1.6", "the pickle names '(posix|nt).mkdir', where only tensors are expected"),
        ("plain pickle", "expected a pickle as torch.save writes it"),
        ("protocol 4", "expected a pickle as torch.save writes it"),
    ],
)
def test_code_in_a_pickle_is_refused_and_not_executed(tmp_path: Path, how: str, named: str) -> None:
    made, directory = tmp_path / "made", tmp_path / "model"
    directory.mkdir()
    value = {"a": torch.ones(2), "b": Malicious(made)}
    match how:
        case "plain pickle":
            (directory / FILE).write_bytes(pickle.dumps(Malicious(made)))
        case "protocol 4":
            torch.save(value, directory / FILE, pickle_protocol=4)
        case _:
            torch.save(value, directory / FILE, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(InputError, match=rf"{FILE}: refused, and nothing in it executed: {named}") as error:
        open_torch_tensors(directory)
    assert len(str(error.value).splitlines()) == 1
    assert not made.exists()
    # The file would have done it.
    if how == "plain pickle":
        pickle.loads((directory / FILE).read_bytes())
        assert made.exists()


def test_code_in_one_shard(tmp_path: Path) -> None:
    made = tmp_path / "made"
    write_shards(tmp_path, {"1.bin": {"a": torch.ones(2)}}, {"a": "1.bin", "b": "2.bin"})
    torch.save({"b": Malicious(made)}, tmp_path / "2.bin")
    with pytest.raises(InputError, match=r"2\.bin: refused"):
        open_torch_tensors(tmp_path)
    assert not made.exists()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ([torch.ones(2)], "expected a dict of tensors, found list"),
        (torch.ones(2), "expected a dict of tensors, found Tensor"),
        ({"model": {"a": torch.ones(2)}}, "'model': expected a tensor, found dict"),
        ({"a": torch.ones(2), "step": 3}, "'step': expected a tensor, found int"),
        ({1: torch.ones(2)}, "expected the names of tensors as keys, found 1"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is no plain dense one: Tensor, torch.sparse_coo"),
        ({"a": torch.ones(2, device="meta")}, "'a' has no values: it was saved from the meta device"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "'a': dtype complex64 cannot be read; weights are float32"),
        ({"a": torch.ones(2).to(torch.float8_e4m3fn)}, "'a': dtype float8_e4m3fn cannot be read"),
        ({"a": np.ones(2)}, "nothing in it executed: the pickle names 'numpy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_but_a_flat_dict_of_dense_tensors_is_refused(tmp_path: Path, value: object, named: str) -> None:
    torch.save(value, tmp_path / FILE)
    with pytest.raises(InputError, match=FILE + ": .*" + named):
        open_torch_tensors(tmp_path)


def zip_of(tensors: dict[str, torch.Tensor], compression: int) -> bytes:
    """What torch.save writes, packed again by an archiver."""
    stream, packed = io.BytesIO(), io.BytesIO()
    torch.save(tensors, stream)
    with zipfile.ZipFile(stream) as source, zipfile.ZipFile(packed, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "damaged, or not written by torch.save"),
        (b"not a pickle", "refused, .* expected a pickle as torch.save writes it"),
        (b"PK\x03\x04 nor a zip", "damaged, or not written by torch.save"),
        (pickle.dumps({"a": 1}), "refused, .* expected a pickle as torch.save writes it"),
        (pickle.dumps({"a": 1}, protocol=2), "damaged, or not written by torch.save"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "a git-lfs pointer"),
        (zip_of({"a": torch.ones(100)}, zipfile.ZIP_DEFLATED), "'archive/.*' in it is compressed"),
    ],
    ids=["empty", "text", "half a zip", "pickle 4", "pickle 2", "git-lfs", "compressed"],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(InputError, match=FILE + ": " + named) as error:
        open_torch_tensors(tmp_path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.filterwarnings("ignore")
def test_a_program_of_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / FILE)
    with pytest.raises(InputError, match="a TorchScript program"):
        open_torch_tensors(tmp_path)


def saved(zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.ones(40), "b": torch.zeros(3, 5)}, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


SAVED = {zipped: saved(zipped) for zipped in (True, False)}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_file_is_refused(tmp_path: Path, zipped: bool, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(SAVED[zipped]) - 1))
    (tmp_path / FILE).write_bytes(SAVED[zipped][:length])
    with pytest.raises(InputError, match=FILE):
        open_torch_tensors(tmp_path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_anywhere_is_an_error_or_other_values(tmp_path: Path, zipped: bool, data: st.DataObject) -> None:
    """Never another exception, a crash, or a read outside of the file."""
    content = bytearray(SAVED[zipped])
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    (tmp_path / FILE).write_bytes(content)
    with contextlib.suppress(InputError):
        for tensor in open_torch_tensors(tmp_path).values():
            tensor.read()


@pytest.mark.parametrize(
    ("shards", "weight_map", "named"),
    [
        ({"1.bin": "a"}, {"a": "1.bin", "b": "2.bin"}, "'2.bin' is missing"),
        ({"1.bin": "a"}, {"a": "1.bin", "b": "../outside.bin"}, "'../outside.bin' leads out of the model directory"),
        ({"1.bin": "a"}, {"a": "1.bin", "b": "/etc/passwd"}, "'/etc/passwd' leads out of the model directory"),
        ({"1.bin": "ab", "2.bin": "b"}, {"a": "1.bin", "b": "2.bin"}, "1.bin: tensor 'b' is in '2.bin' according to"),
        ({"1.bin": "a", "2.bin": "ab"}, {"a": "1.bin", "b": "2.bin"}, "2.bin: tensor 'a' is in '.*1.bin' too"),
        ({"1.bin": "ac"}, {"a": "1.bin"}, "1.bin: tensor 'c' is not listed in pytorch_model.bin.index.json"),
        ({"1.bin": "a"}, {"a": "1.bin", "c": "1.bin"}, "1.bin: tensor 'c' is listed in pytorch_model.bin.index.json"),
        ({"1.bin": "a"}, {"a": 1}, "pytorch_model.bin.index.json: expected"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    tmp_path: Path, shards: dict[str, str], weight_map: dict[str, str], named: str
) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    torch.save({"b": torch.ones(2)}, tmp_path / "outside.bin")
    write_shards(
        directory, {file: {name: torch.ones(2) for name in names} for file, names in shards.items()}, weight_map
    )
    with pytest.raises(InputError, match=named):
        open_torch_tensors(directory)


def test_links_out_of_the_directory_are_refused(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    torch.save({"a": torch.ones(2)}, tmp_path / "elsewhere.bin")
    (directory / FILE).symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(InputError, match="leads out of the model directory"):
        open_torch_tensors(directory)


def test_a_file_replaced_since_is_noticed(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / FILE)
    tensor = open_torch_tensors(tmp_path)["a"]
    torch.save({"a": torch.ones(3)}, tmp_path / FILE)
    with pytest.raises(InputError, match="tensor 'a' is another one now"):
        tensor.read()
    (tmp_path / FILE).unlink()
    with pytest.raises(InputError, match="cannot be read: No such file"):
        tensor.read()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"no PyTorch weights: looked for {FILE} and {INDEX}"):
        open_torch_tensors(tmp_path)


def test_without_torch_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / FILE)
    monkeypatch.setattr(torch_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"is not installed: `pip install torch`, or convert .* safetensors"):
        open_torch_tensors(tmp_path)


def test_a_torch_that_executes_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / FILE)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu124")
    with pytest.raises(InputError, match=r"torch 2.6 or newer expected, found 2.5.1\+cu124"):
        open_torch_tensors(tmp_path)
