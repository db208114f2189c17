"""`python -m jaxembed.train CONFIG [--section.key value …]`: trains an embedder as a config file says."""

import argparse
import logging
import sys
from collections.abc import Sequence

from etils import epath

from jaxembed.__main__ import run_command
from jaxembed.config import TrainConfig, load_config, options_help
from jaxembed.errors import FULL_DISK, InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, runs, returns the exit status: 0 also after SIGTERM, 1 for a run that failed."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxembed.train",
        usage="%(prog)s [--check] CONFIG [--section.key value …]\n"
        "       %(prog)s --resume RUN_DIR [--section.key value …]",
        description="Train an embedder as a config file says.",
        epilog="options of the config file, each also on the command line:\n\n" + options_help(TrainConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with a run from its latest readable checkpoint")
    parser.add_argument(
        "--check",
        action="store_true",
        help="read all data, show a sample of each source as the model will see it, count steps, and stop",
    )
    arguments, overrides = parser.parse_known_args(argv)
    # CONFIG is no argument of the parser's: after --resume it would be the value of the first override.
    if arguments.resume is None and (not overrides or overrides[0].startswith("-")):
        parser.error("the first argument has to be a config file, such as configs/quickstart.yaml, or --resume RUN_DIR")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("absl", "jax", "httpx", "bm25s", "datasets", "orbax", "sentence_transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if arguments.resume is not None:
        path = epath.Path(arguments.resume) / "config.yaml"
        if not path.exists():
            raise InputError(f"--resume {arguments.resume}: no config.yaml there, so no run")
        config = load_config(path, [*overrides, "--run_dir", arguments.resume])
    else:
        config = load_config(overrides[0], overrides[1:])

    if arguments.check:
        from jaxembed.training.check import check

        print(check(config))
        return 0

    from jaxembed import hosts  # after the config is known to be good: JAX takes seconds
    from jaxembed.training.loop import run

    try:
        with hosts.together(config.distributed):
            if not hosts.is_main():
                logging.getLogger().setLevel(logging.WARNING)
            run(config, resume=arguments.resume is not None)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        print(f"error: could not write in {config.run_dir}: {error}; make room, then --resume it", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
