"""Directories that are whole or not there, and what must not be written over."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxembed.checkpoint.directories import new_directory, refuse_target
from jaxembed.errors import InputError


def model(directory: Path, **files: str) -> Path:
    directory.mkdir(parents=True)
    for name, text in {"config": "{}", **files}.items():
        (directory / f"{name}.json").write_text(text)
    return directory


def test_the_name_comes_last(tmp_path: Path) -> None:
    target = tmp_path / "a" / "target"
    with new_directory(target) as partial:
        (partial / "weights").touch()
        assert not target.exists()
        assert partial.parent == target.parent  # so that a rename is all that is left to do
    assert os.listdir(target) == ["weights"]
    assert os.listdir(tmp_path / "a") == ["target"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("there", [True, False])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: type[BaseException], there: bool) -> None:
    target = tmp_path / "target"
    if there:
        model(target)

    def fail(partial: Path) -> None:
        (partial / "weights").touch()
        raise error

    with pytest.raises(error), new_directory(target) as partial:
        fail(partial)
    assert os.listdir(tmp_path) == ["target"] * there
    assert not there or os.listdir(target) == ["config.json"]


def test_what_is_there_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = model(tmp_path / "target", old="1")
    with new_directory(target) as partial:
        (partial / "new").touch()
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["target"]


def test_leftovers_of_a_kill_are_in_nobody_s_way(tmp_path: Path) -> None:
    (tmp_path / ".target.incomplete").mkdir()
    (tmp_path / ".target.incomplete" / "half").touch()
    (tmp_path / ".target.old").mkdir()
    target = model(tmp_path / "target")
    with new_directory(target) as partial:
        assert not os.listdir(partial)
    assert os.listdir(tmp_path) == ["target"]


def test_a_rename_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = model(tmp_path / "target")
    rename = Path.rename

    def fails(self: Path, new: Path) -> Path:
        if self.name.endswith(".incomplete"):
            raise OSError("no")
        return rename(self, new)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no"), new_directory(target):
        pass
    assert os.listdir(target) == ["config.json"]
    assert os.listdir(tmp_path) == ["target"]


def test_what_must_not_be_written_over(tmp_path: Path) -> None:
    source = model(tmp_path / "models" / "source")
    other, git = model(tmp_path / "other"), model(tmp_path / "git")
    (git / ".git").mkdir()
    (tmp_path / "link").symlink_to(source)
    for free in (tmp_path / "new", tmp_path / "no" / "parents"):
        refuse_target(free, source, overwrite=False)
    refuse_target(other, source, overwrite=True)
    for target, overwrite, message in (
        (other, False, "--overwrite"),
        (source, True, "is, or holds, the source"),
        (tmp_path / "models", True, "is, or holds, the source"),
        (tmp_path / "link", True, "is, or holds, the source"),
        (git, True, "no model directory"),
        (tmp_path, True, "is, or holds, the source"),
        (source / "config.json", True, "is a file"),
        (Path("gs://bucket/model"), True, "local directory"),
    ):
        with pytest.raises(InputError, match=message):
            refuse_target(target, source, overwrite)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with new_directory(target) as partial:
        (partial / "first").touch()
        for _ in range(2):
            with pytest.raises(InputError, match="target: another process is writing it"), new_directory(target):
                pass
        (partial / "second").touch()
        with new_directory(tmp_path / "other") as other:
            (other / "third").touch()
    assert sorted(os.listdir(target)) == ["first", "second"]
    with new_directory(target):
        pass
    assert sorted(os.listdir(tmp_path)) == ["other", "target"]
    assert not os.listdir(target)


def test_the_directory_behind_a_link_is_replaced(tmp_path: Path) -> None:
    real = model(tmp_path / "disk" / "model")
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "dangling").symlink_to(tmp_path / "disk" / "coming")
    for name in ("link", "dangling"):
        with new_directory(tmp_path / name) as partial:
            (partial / "new").touch()
        assert (tmp_path / name).is_symlink()
        assert os.listdir(tmp_path / name) == ["new"]
    assert sorted(os.listdir(tmp_path / "disk")) == ["coming", "model"]


def test_where_no_directory_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a/target: cannot be written: "), new_directory(tmp_path / "file/a/target"):
        pass
    (tmp_path / "mount").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "mount")
    with pytest.raises(InputError, match="mount: is a mount point"), new_directory(tmp_path / "mount"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["file", "mount"]


def test_a_kill_between_two_renames(tmp_path: Path) -> None:
    model(tmp_path / ".target.old", kept="1")
    target = tmp_path / "target"

    def fail() -> None:
        assert sorted(os.listdir(target)) == ["config.json", "kept.json"]
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), new_directory(target):
        fail()
    assert os.listdir(tmp_path) == ["target"]


def test_the_lock_ends_with_its_holder(tmp_path: Path) -> None:
    target = tmp_path / "target"
    code = (
        "import os, pathlib, sys\n"
        "from jaxembed.checkpoint.directories import new_directory\n"
        "with new_directory(pathlib.Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half').mkdir()\n"
        "    (partial / 'half' / 'weights').touch()\n"
        "    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(target)]).returncode == 9
    assert os.listdir(tmp_path) == [".target.incomplete"]
    with new_directory(target) as partial:
        assert not os.listdir(partial)
    assert os.listdir(tmp_path) == ["target"]
