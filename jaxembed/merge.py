"""`python -m jaxembed.merge A B [C …] --output DIR`: one model out of several, by weighted average or slerp."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxembed.__main__ import run_command
from jaxembed.convert import DTYPES, size_in_bytes


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, merges, prints the summary; returns the exit status."""
    arguments = _parser().parse_args(argv)
    target = Path(arguments.output).expanduser()
    max_shard_bytes = size_in_bytes(arguments.max_shard_size)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)

    import jax  # this and what follows take seconds to import

    jax.config.update("jax_platforms", "cpu")  # an accelerator may be in use, and is of no use here
    from jaxembed.checkpoint.convert import open_source
    from jaxembed.checkpoint.directories import refuse_target
    from jaxembed.checkpoint.hub import find_directory
    from jaxembed.checkpoint.merging import Merge, merge
    from jaxembed.training.run_directory import is_run, open_run

    paths = [find_directory(model) for model in arguments.models]
    for path in paths:
        refuse_target(target, path, arguments.overwrite)
    sources = [open_run(path) if is_run(path) else open_source(path) for path in paths]
    how = Merge(sources, arguments.method, arguments.weights, arguments.t)
    dtype = None if arguments.dtype is None else jax.numpy.dtype(arguments.dtype)
    summary = merge(how, target, dtype=dtype, max_shard_bytes=max_shard_bytes, overwrite=arguments.overwrite)
    for path, share in zip(paths, how.shares):
        print(f"{share:.6g} of {path}")
    print(summary)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxembed.merge",
        description="Merge models of one architecture, tokenizer and text format, tensor by tensor in float32; no more "
        "than a tensor or two of each is in memory.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="two or more Hugging Face, sentence-transformers or Orbax model directories, hub ids, or training runs; "
        "the result is a directory like the first one",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the directory to write")
    parser.add_argument(
        "--method",
        choices=("average", "slerp"),
        default="average",
        help="average: the weighted mean of all models; slerp: along the arc between two, tensor by tensor (default: "
        "average)",
    )
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        metavar="W",
        help="of an average, one a model, in their order; they are divided by their sum (default: all equal)",
    )
    parser.add_argument("--t", type=float, help="of slerp: from 0, the first model, to 1, the second")
    parser.add_argument("--dtype", choices=DTYPES, help="of all tensors (default: as in the first model)")
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="of a safetensors file: bytes, or a number with KB, MB, GB, KiB, MiB, GiB (default: 5GB)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the model directory that is at DIR")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
