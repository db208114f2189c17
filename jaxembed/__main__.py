"""The console script: `jaxembed COMMAND …` is `python -m jaxembed.COMMAND …`.

A command is a module with `main(argv) -> int`; it is imported when it is called, so that help is quick.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence

from jaxembed.errors import explanation

COMMANDS = {
    "train": "train an embedder as a config file says",
    "convert": "convert a model between Hugging Face, sentence-transformers and Orbax directories",
    "prepare": "build the data sets and the token cache that a config needs",
    "encode": "embed a corpus of any size, into shards of Parquet or .npy",
    "search": "find the texts of a corpus that are nearest to a query",
    "evaluate": "score a model on mteb's tasks and on local files, with a report",
    "plan": "whether a run fits on a TPU slice, and what it costs at least, without a TPU",
    "mine": "mine hard negatives for pairs with a model",
    "merge": "merge models: weighted average, or slerp of two",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names with the rest of them; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"jaxembed {_version()}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(COMMANDS)}"
        print(f"error: {name}: no such command; {hint}", file=sys.stderr)
        return 2
    return run_command(lambda args: importlib.import_module(f"jaxembed.{name}").main(args), rest)


def run_command(command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Runs a command's `main`; an error that is meant for users becomes its message on stderr, and an exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # texts may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return command(argv)
    except KeyboardInterrupt:
        # What was interrupted in its making (a progress bar) may complain, with a traceback, when it is collected.
        sys.unraisablehook = lambda _: None
        print("\ninterrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `| head` has read enough; Python's own flush at exit would complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        explained = explanation(error)
        if explained is None:
            raise
        text, status = explained
        print(f"error: {text}", file=sys.stderr)
        return status


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {line}" for name, line in COMMANDS.items())
    return (
        "usage: jaxembed COMMAND [arguments]\n"
        f"\ncommands:\n{commands}\n"
        "\n`jaxembed COMMAND --help` lists a command's options; `jaxembed --version` prints the version."
    )


def _version() -> str:
    try:
        return importlib.metadata.version("jaxembed")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
