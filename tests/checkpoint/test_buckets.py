"""Models written to a bucket: as on a disk, and never taken for whole before they are."""

import filecmp
import os
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from jaxembed import Embedder
from jaxembed.checkpoint import directories
from jaxembed.checkpoint.convert import convert, open_source, plan_conversion
from jaxembed.checkpoint.directories import INCOMPLETE, download, model_path, new_directory, refuse_target
from jaxembed.checkpoint.export import refuse_existing
from jaxembed.checkpoint.hub import find_directory
from jaxembed.errors import InputError

from buckets import Bucket
from checkpoints import listing
from runs import on_two_processes, write_base

pytestmark = pytest.mark.usefixtures("quick_compilation")
TARGET = epath.Path("gs://bucket/models/tiny")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def embedder(base: Path) -> Embedder:
    return Embedder.from_pretrained(base, dtype="float32")


def names(directory: epath.Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def assert_same_files(found: Path, expected: Path, *, but: str = "") -> None:
    assert listing(found) == listing(expected)
    files = [name for name in listing(expected) if (expected / name).is_file() and name != but]
    assert filecmp.cmpfiles(found, expected, files, shallow=False) == (files, [], [])


def test_a_model_is_read_from_a_bucket(bucket: Bucket, embedder: Embedder, tmp_path: Path) -> None:
    embedder.save_pretrained(os.fspath(TARGET), verify=False)
    found = Embedder.from_pretrained(os.fspath(TARGET), dtype="float32", cache_dir=tmp_path)
    assert found.model_hash == embedder.model_hash
    [copy] = tmp_path.glob("*/tiny")
    assert find_directory(os.fspath(TARGET), cache_dir=tmp_path) == copy  # nothing is copied again
    (TARGET / "README.md").write_text("another")
    second = find_directory(os.fspath(TARGET), cache_dir=tmp_path)
    assert second != copy
    assert (second / "README.md").read_text() == "another"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.parent.name for path in (copy, second))


def test_what_is_no_model_in_a_bucket(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gs://bucket/models/tiny: expected the directory of a model, found nothing"):
        find_directory(os.fspath(TARGET), cache_dir=tmp_path)
    (TARGET / "config.json").write_text("{}")
    (TARGET / INCOMPLETE).write_text("")
    with pytest.raises(InputError, match="gs://bucket/models/tiny: a model is being written there"):
        find_directory(os.fspath(TARGET), cache_dir=tmp_path)
    with pytest.raises(InputError, match="gs://bucket/models/tiny: is not on this machine"):
        find_directory(os.fspath(TARGET), cache_dir=tmp_path, local_files_only=True)
    assert not any(tmp_path.iterdir())


def test_paths() -> None:
    assert isinstance(model_path("gs://bucket/model"), epath.Path)
    assert os.fspath(model_path("gs://bucket/model")) == "gs://bucket/model"
    assert model_path("~/model") == Path.home() / "model"


def test_what_makes_it_a_model_comes_last(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    copy = directories._copy

    def noted(source: Any, target: Any) -> None:
        written.append(target.name)
        assert (TARGET / INCOMPLETE).exists()
        copy(source, target)

    monkeypatch.setattr(directories, "_copy", noted)
    with new_directory(TARGET) as partial:
        assert names(TARGET) == [INCOMPLETE]
        (partial / "1_Pooling").mkdir()
        for name in ("jaxembed_orbax.json", "config.json", "modules.json", "1_Pooling/pooling.json", "z"):
            (partial / name).write_text(name)
    assert written == ["pooling.json", "modules.json", "z", "config.json", "jaxembed_orbax.json"]
    assert names(TARGET) == ["1_Pooling", "config.json", "jaxembed_orbax.json", "modules.json", "z"]
    assert (TARGET / "1_Pooling" / "pooling.json").read_text() == "1_Pooling/pooling.json"


def test_an_error_and_a_kill_leave_no_model(bucket: Bucket, tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        (partial / "config.json").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), new_directory(TARGET) as partial:
        fail(partial)
    assert not TARGET.exists()
    for name in (INCOMPLETE, "model.safetensors"):  # of a process that was killed
        (TARGET / name).parent.mkdir(parents=True, exist_ok=True)
        (TARGET / name).write_text("half")
    refuse_target(TARGET, tmp_path, overwrite=False)
    refuse_existing(TARGET, overwrite=False)
    with new_directory(TARGET) as partial:
        (partial / "config.json").write_text("{}")
    assert names(TARGET) == ["config.json"]
    refuse_target(TARGET, tmp_path, overwrite=True)
    for refuse in (lambda: refuse_target(TARGET, tmp_path, overwrite=False), lambda: refuse_existing(TARGET, False)):
        with pytest.raises(InputError, match=r"gs://bucket/models/tiny: is not empty"):
            refuse()
    (TARGET / "config.json").unlink()
    (TARGET / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is no model directory"):
        refuse_target(TARGET, tmp_path, overwrite=True)
    with pytest.raises(InputError, match=r"holds 'notes\.txt', which is no part of a model"):
        refuse_existing(TARGET, overwrite=True)


def test_saved_as_on_a_disk_and_verified(bucket: Bucket, embedder: Embedder, tmp_path: Path) -> None:
    embedder.save_pretrained(tmp_path / "tiny", verify=False)
    found = embedder.save_pretrained("gs://bucket/models/tiny")
    assert found is not None
    assert found.difference < 1e-5
    download(TARGET, tmp_path / "back")
    assert_same_files(tmp_path / "back", tmp_path / "tiny")
    with pytest.raises(InputError, match=r"gs://bucket/models/tiny: is not empty"):
        embedder.save_pretrained(TARGET)
    embedder.save_pretrained(TARGET, card="new", overwrite=True, verify=False)
    assert (TARGET / "README.md").read_text() == "new"


def test_an_upload_that_fails_leaves_no_model(
    bucket: Bucket, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = directories._copy

    def fails(source: Any, target: Any) -> None:
        if target.name == "model.safetensors":
            raise OSError("no such bucket")
        copy(source, target)

    monkeypatch.setattr(directories, "_copy", fails)
    with pytest.raises(OSError, match="no such bucket"):
        embedder.save_pretrained(TARGET)
    assert not TARGET.exists()


@pytest.mark.parametrize("to", ["hf", "orbax", "sentence-transformers"])
def test_converted_as_on_a_disk(bucket: Bucket, base: Path, tmp_path: Path, to: Any) -> None:
    plan = plan_conversion(open_source(base), to)
    local = convert(plan, tmp_path / "tiny", max_shard_bytes=20_000, progress=False)
    there = convert(plan, TARGET, max_shard_bytes=20_000, progress=False)
    assert str(there).startswith("gs://bucket/models/tiny: ")
    assert there.weights_hash == local.weights_hash
    download(TARGET, tmp_path / "back")
    assert INCOMPLETE not in listing(tmp_path / "back")
    if to == "orbax":  # names of its data files are drawn
        assert convert(plan_conversion(open_source(tmp_path / "back"), "hf"), tmp_path / "hf", progress=False)
        assert_same_files(tmp_path / "hf", base)
    else:
        assert (tmp_path / "back" / "model.safetensors.index.json").exists()
        assert_same_files(tmp_path / "back", tmp_path / "tiny")


def test_verified_before_it_is_there(bucket: Bucket, base: Path) -> None:
    def verify(directory: Path) -> None:
        assert (directory / "model.safetensors").exists()
        assert names(TARGET) == [INCOMPLETE]
        raise InputError("differs")

    with pytest.raises(InputError, match="differs"):
        convert(plan_conversion(open_source(base), "hf"), TARGET, verify=verify, progress=False)
    assert not TARGET.exists()


_PROCESS = """
import sys
from pathlib import Path
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem

base, folder, process, port = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
written = []

class Disk(LocalFileSystem):
    "A bucket that several processes see."
    protocol = ("gs", "gcs")

    @classmethod
    def _strip_protocol(cls, path):
        return path.replace("gs://", folder + "/")

    def open(self, path, mode="rb", **options):
        if "w" in mode:
            written.append(path.rpartition("/")[2])
        return super().open(path, mode, **options)

backend.fsspec_backend.fs = lambda path: Disk()

from jaxembed import Embedder, embedder, hosts
from jaxembed.config import DistributedConfig
from jaxembed.sharding import make_mesh

hosts.initialize(DistributedConfig(coordinator=f"localhost:{port}", num_processes=2, process_id=process))
write = embedder.write_safetensors
embedder.write_safetensors = lambda *arguments, **options: write(*arguments, **options, max_shard_bytes=20_000)
model = Embedder.from_pretrained(base, dtype="float32", mesh=make_mesh(1, 8, 1))
model.save_pretrained("gs://bucket/tiny", verify=False)
hosts.barrier("saved")
print(",".join(written), file=sys.stderr)
"""


@pytest.mark.slow
def test_each_of_two_processes_writes_some_of_the_weights(base: Path, embedder: Embedder, tmp_path: Path) -> None:
    errors = on_two_processes(_PROCESS, base, tmp_path)
    first, second = (error.splitlines()[-1].split(",") for error in errors)
    found = tmp_path / "bucket" / "tiny"
    weights = sorted(path.name for path in found.glob("*.safetensors"))
    assert len(weights) > 2
    assert second == weights[1::2]
    assert [name for name in first if name.endswith(".safetensors")] == weights[::2]
    assert first[0] == INCOMPLETE
    assert first[-1] == "config.json"
    again = Embedder.from_pretrained(found, dtype="float32")
    assert again.model_hash == embedder.model_hash
    embedder.save_pretrained(tmp_path / "tiny", verify=False)
    small = [name for name in listing(tmp_path / "tiny") if "safetensors" not in name and "." in name]
    assert filecmp.cmpfiles(found, tmp_path / "tiny", small, shallow=False)[1:] == ([], [])
