"""`python -m jaxembed.convert SOURCE TARGET`: a model from one container to another, every tensor accounted for."""

import argparse
import functools
import logging
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxembed.__main__ import run_command
from jaxembed.errors import InputError

if TYPE_CHECKING:
    from jaxembed.checkpoint.convert import Conversion
    from jaxembed.training.run_directory import Which

CONTAINERS = ("orbax", "hf", "sentence-transformers")
DTYPES = ("float32", "float16", "bfloat16")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, converts, prints the summary; returns the exit status: 1 where `--verify` finds a difference."""
    arguments = _parser().parse_args(argv)
    max_shard_bytes = size_in_bytes(arguments.max_shard_size)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)

    import jax  # this and what follows take seconds to import

    jax.config.update("jax_platforms", "cpu")  # an accelerator may be in use, and is of no use here
    from jaxembed.checkpoint.convert import Container, convert, open_source, plan_conversion
    from jaxembed.checkpoint.directories import model_path, refuse_target
    from jaxembed.checkpoint.hub import find_directory
    from jaxembed.text.format import read_text_format_file
    from jaxembed.training.run_directory import is_run, open_run

    which = _which(arguments.checkpoint)
    text_format = None if arguments.text_format is None else read_text_format_file(arguments.text_format)
    path = find_directory(arguments.source, revision=arguments.revision)
    target = model_path(arguments.target)
    refuse_target(target, path, arguments.overwrite)
    if is_run(path):
        source = open_run(path, which)
    elif which is None:
        source = open_source(path)
    else:
        raise InputError(f"--checkpoint {which}: {path} is no training run")
    export: Container = "sentence-transformers"
    usual: dict[str, Container] = {"Hugging Face": "orbax", "Orbax": "hf", "training run": export, "adapter": export}
    to = arguments.to or usual[source.kind]
    conversion = plan_conversion(source, to, None if arguments.dtype is None else jax.numpy.dtype(arguments.dtype))
    if arguments.dry_run:
        print(_table(conversion))
        return 0
    summary = convert(
        conversion,
        target,
        text_format=text_format,
        max_shard_bytes=max_shard_bytes,
        overwrite=arguments.overwrite,
        verify=functools.partial(_verify, conversion) if arguments.verify else None,
    )
    print(summary)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxembed.convert",
        description="Convert a model between Hugging Face, sentence-transformers and Orbax directories; nothing of it "
        "is lost, and no more than a tensor or two is in memory at a time.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a Hugging Face, sentence-transformers or Orbax model directory, a hub id, an adapter that PEFT wrote "
        "(merged into its base), or the directory of a training run (its base with the trained part of a checkpoint)",
    )
    parser.add_argument("target", metavar="TARGET", help="the directory to write, local or gs://")
    parser.add_argument(
        "--to",
        choices=CONTAINERS,
        help="what to write: an Orbax model directory, a Hugging Face directory with the source's own names and small "
        "files, or an export for sentence-transformers, transformers and vLLM (default: orbax for a Hugging Face "
        "directory, hf for an Orbax one, sentence-transformers for a training run or an adapter)",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="newest|best|STEP",
        help="of a training run: the newest one, the one where evaluation.best_metric was best, or that of a step "
        "(default: what the run exports: the best one so far where it looks for that, unless its export.checkpoint is "
        "last; else the newest)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of all tensors (default: each keeps its own)")
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="of a safetensors file: bytes, or a number with KB, MB, GB, KiB, MiB, GiB (default: 5GB)",
    )
    parser.add_argument(
        "--text-format",
        metavar="FILE",
        help="YAML or JSON with the keys of a config's text_format, for an export of a model that has none",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id (default: the main branch)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model directory that is at TARGET")
    parser.add_argument("--dry-run", action="store_true", help="print what would become of every tensor, write nothing")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run texts through both sides and compare all layers before TARGET gets its name, with transformers where "
        "torch is installed; this takes the memory of a whole model in float32",
    )
    return parser


def _which(checkpoint: str | None) -> "Which | None":
    """Of `--checkpoint`."""
    if checkpoint is None or checkpoint == "newest" or checkpoint == "best":
        return checkpoint
    if re.fullmatch(r"[0-9]+", checkpoint):
        return int(checkpoint)
    raise InputError(f"--checkpoint: expected newest, best or the number of a step, found {checkpoint!r}")


def size_in_bytes(size: str) -> int:
    """Of `--max-shard-size`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", size.strip().upper())
    found = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if found < 1:
        raise InputError(f"--max-shard-size: expected a size such as 5GB or 500MiB, found {size!r}")
    return found


def _table(conversion: "Conversion") -> str:
    source = conversion.source
    rows = [("source tensor", "parameter", "shape", "dtype", "relayout"), *conversion.rows()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    beside = len(source.plan.ignored) - len(conversion.dropped)
    kind = f"{source.kind} {source.state}".rstrip()
    total = (
        f"{source.path} ({kind}) to {conversion.to}: {len(source.plan.assignments)} tensors fill all "
        f"parameters, {beside} carried beside the model, {len(conversion.dropped)} dropped, none left over; "
        f"{conversion.nbytes / 1e9:.3f} GB; nothing was written"
    )
    return "\n".join([*lines, "", total])


def _verify(conversion: "Conversion", directory: Path) -> None:
    """Compares hidden states layer by layer; with sentence-transformers also embeddings, for an export."""
    from jaxembed.checkpoint.convert import convert, plan_conversion
    from jaxembed.checkpoint.export import ExportError, verify_export
    from jaxembed.checkpoint.parity import verify_conversion
    from jaxembed.embedder import Embedder

    source = conversion.source
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".verify-") as temporary:
        converted = reference = directory
        if source.kind == "Hugging Face":
            reference = source.path
        elif conversion.to != "orbax":
            converted = source.path if source.kind == "Orbax" and conversion.dtype is None else directory
        else:
            reference = Path(temporary) / "reference"
            convert(plan_conversion(source, "hf"), reference, progress=False)
        rounded_to = None if reference == directory else conversion.dtype
        parity = verify_conversion(converted, reference, dtype=rounded_to)
    print(parity)
    if not parity.ok:
        raise ExportError(f"{directory}: gives other hidden states than {reference}; nothing was kept")
    if conversion.to == "sentence-transformers":
        embedder = Embedder.from_pretrained(directory, dtype="float32")
        print(verify_export(directory, embedder.encode, embedder.tokenizer) or "sentence-transformers is not installed")


if __name__ == "__main__":
    sys.exit(run_command(main))
