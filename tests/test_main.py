import errno
import io
import re
import subprocess
import sys
import types
from pathlib import Path

import gcsfs.retry
import pytest
from etils import epath

from jaxembed import __main__ as script
from jaxembed.errors import InputError, OperationError


@pytest.fixture
def echo(monkeypatch):
    """A command `echo` that returns the number of its arguments, and fails as asked."""

    def main(argv):
        if argv == ["bad"]:
            raise InputError("config.yaml:3: loss.temperature: expected a number greater than 0, found -1")
        if argv == ["bug"]:
            raise RuntimeError("a bug")
        if argv == ["refused"]:
            raise PermissionError(errno.EACCES, "Permission denied", "corpus/x.jsonl")
        if argv == ["nobody"]:
            Path("~nobody-of-this-name/corpus").expanduser()
        if argv == ["elsewhere"]:
            epath.Path("s3://bucket/corpus").exists()
        if argv == ["denied"]:
            raise gcsfs.retry.HttpError({"code": 403, "message": "no access"})
        if argv == ["failed"]:
            raise OperationError("step 7: the loss is nan")
        if argv == ["greek"]:
            print("\u03bb")
        if argv == ["bucket"]:
            raise ImportError("Please install gcsfs to access Google Storage")
        return len(argv)

    module = types.ModuleType("jaxembed.echo")
    module.__dict__["main"] = main
    monkeypatch.setitem(sys.modules, "jaxembed.echo", module)
    monkeypatch.setitem(script.COMMANDS, "echo", "counts")


@pytest.mark.parametrize("arguments", [[], ["a"], ["--x.y", "3", "--help"]])
def test_the_rest_of_the_arguments_goes_to_the_command(echo, arguments):
    assert script.main(["echo", *arguments]) == len(arguments)


def test_an_input_error_is_its_message_and_status_2(echo, capsys):
    assert script.main(["echo", "bad"]) == 2
    assert capsys.readouterr().err == (
        "error: config.yaml:3: loss.temperature: expected a number greater than 0, found -1\n"
    )


def test_a_bucket_without_gcsfs_says_what_to_install(echo, capsys):
    assert script.main(["echo", "bucket"]) == 2
    assert capsys.readouterr().err == "error: gs:// needs gcsfs: pip install 'jaxembed[gcs]'\n"


def test_a_file_that_is_not_to_be_had_is_its_message_and_status_2(echo, capsys):
    assert script.main(["echo", "refused"]) == 2
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: 'corpus/x.jsonl'\n"


def test_the_home_of_nobody_is_a_message(echo, capsys):
    assert script.main(["echo", "nobody"]) == 2
    assert capsys.readouterr().err == "error: a path begins with ~NAME, where NAME is no user of this machine\n"


def test_a_bucket_that_refuses_is_a_message(echo, capsys):
    assert script.main(["echo", "denied"]) == 1
    assert capsys.readouterr().err.startswith("error: gs:// cannot be reached, or refuses: no access, 403; see")


def test_another_file_system_is_a_message(echo, capsys):
    assert script.main(["echo", "elsewhere"]) == 2
    assert "gs:// is known to work" in capsys.readouterr().err


def test_an_operation_that_failed_is_its_message_and_status_1(echo, capsys):
    assert script.main(["echo", "failed"]) == 1
    assert capsys.readouterr().err == "error: step 7: the loss is nan\n"


def test_what_the_terminal_cannot_show_is_escaped(echo, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    assert script.main(["echo", "greek"]) == 1
    assert shown.getvalue() == b"\\u03bb\n"


def test_any_other_error_keeps_its_traceback(echo):
    with pytest.raises(RuntimeError, match="a bug"):
        script.main(["echo", "bug"])


def test_unknown_command_names_the_closest(capsys):
    assert script.main(["trian", "config.yaml"]) == 2
    assert capsys.readouterr().err == "error: trian: no such command; did you mean train?\n"


def test_no_command_is_an_error_with_help(capsys):
    assert script.main([]) == 2
    assert "usage: jaxembed COMMAND" in capsys.readouterr().out


def test_help_lists_the_commands_and_version_the_version():
    run = [sys.executable, "-m", "jaxembed"]
    text = subprocess.run([*run, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(
        re.search(rf"^  {name} +{re.escape(line)}$", text, re.MULTILINE) for name, line in script.COMMANDS.items()
    )
    version = subprocess.run([*run, "--version"], capture_output=True, text=True, check=True).stdout
    assert version.startswith("jaxembed ")
