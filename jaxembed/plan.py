"""`python -m jaxembed.plan CONFIG --topology NAME`: will it fit, what does it move, how long must a step take."""

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Sequence

from jaxembed.__main__ import run_command
from jaxembed.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, plans, prints; returns the exit status: 1 where the config does not fit."""
    # Before JAX and the hub's client are imported: no accelerator is looked for, and nothing is downloaded.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from jaxembed.planning.topologies import find_topology, known_names

    parser = argparse.ArgumentParser(
        prog="python -m jaxembed.plan",
        usage="%(prog)s CONFIG --topology NAME [options] [--section.key value …]",
        description="Compile the training step of a config (or the encoder) for a TPU slice, on a machine without a "
        "TPU, and print on one page whether it fits, what it moves and how long a step must take at least.",
        epilog="All options of `python -m jaxembed.train` override the config file here too.",
        allow_abbrev=False,
    )
    parser.add_argument("--topology", metavar="NAME", required=True, help=f"the slice: {known_names()}")
    parser.add_argument("--encode", action="store_true", help="plan encoding with the config's model instead")
    parser.add_argument(
        "--lengths",
        metavar="MEAN,MAX",
        help="tokens of a text on average and at most, in place of the data (default: from the token cache)",
    )
    parser.add_argument(
        "--examples", type=int, metavar="N", help="pairs of an epoch, or texts to encode, in place of the data"
    )
    parser.add_argument("--price", type=float, metavar="P", help="of a chip-hour, in any currency")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--no-cache", action="store_true", help="compile again what was compiled before")
    arguments, rest = parser.parse_known_args(argv)
    if not rest or rest[0].startswith("-"):
        parser.error("the first argument has to be a config file, such as configs/udever-bloom-560m.yaml")
    if arguments.examples is not None and (arguments.examples < 1 or arguments.lengths is None):
        raise InputError("--examples: expected a number of at least 1, with --lengths: without it the data is counted")
    if arguments.price is not None and not 0 <= arguments.price < math.inf:
        raise InputError(f"--price: expected a price of a chip-hour, found {arguments.price}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("absl", "jax", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    topology = find_topology(arguments.topology)

    from jaxembed.planning.compiled import CACHE
    from jaxembed.planning.plan import Inputs, plan_encoding, plan_training
    from jaxembed.planning.report import as_dict, page
    from jaxembed.planning.workload import parse_lengths

    inputs = Inputs(
        path=rest[0],
        overrides=tuple(rest[1:]),
        topology=topology,
        lengths=None if arguments.lengths is None else parse_lengths(arguments.lengths),
        examples=arguments.examples,
        cache=None if arguments.no_cache else CACHE,
    )
    plan = (plan_encoding if arguments.encode else plan_training)(inputs)
    print(json.dumps(as_dict(plan, arguments.price), indent=1) if arguments.json else page(plan, arguments.price))
    return 0 if plan.compiled.fits else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
