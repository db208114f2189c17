"""`python -m jaxembed.prepare CONFIG`: builds what a config's sources need, so that training starts at once."""

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence

from etils import epath

from jaxembed.__main__ import run_command
from jaxembed.config import TfdsSource, TrainConfig, load_config, options_help


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, prepares, prints what is there now; returns the exit status: 1 for a disk that is full."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxembed.prepare",
        usage="%(prog)s CONFIG [--section.key value …]\n"
        "       %(prog)s --dataset NAME [--manual-dir DIR] [--data-dir DIR]",
        description="Build what a config's sources need before training: data sets from their original files, and the "
        "token cache. What is there already stays as it is.",
        epilog="options of the config file, each also on the command line:\n\n" + options_help(TrainConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--dataset", metavar="NAME", help="build this data set alone: ms_marco or all_nli")
    parser.add_argument(
        "--manual-dir",
        metavar="DIR",
        help="directory with the original files of --dataset; left out, they are downloaded",
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", help="where --dataset is put, local or gs:// (default: ~/tensorflow_datasets)"
    )
    arguments, overrides = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("absl", "jax", "httpx", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if arguments.dataset is not None:
        if overrides:
            parser.error(f"unrecognized arguments beside --dataset: {' '.join(overrides)}")
        _prepare_dataset(arguments)
        return 0
    if not overrides or overrides[0].startswith("-"):
        parser.error("the first argument has to be a config file, such as configs/quickstart.yaml, or --dataset NAME")
    if arguments.manual_dir is not None or arguments.data_dir is not None:
        parser.error("--manual-dir and --data-dir go with --dataset; a config has them as data.train.N.manual_dir, …")
    config = load_config(overrides[0], overrides[1:])
    _prepare_config(config)
    return 0


def _prepare_dataset(arguments: argparse.Namespace) -> None:
    from jaxembed.datasets import prepared  # tfds takes a second to import

    data_dir = arguments.data_dir or prepared.DEFAULT_DATA_DIR
    for builder in prepared.prepare_dataset(arguments.dataset, data_dir=data_dir, manual_dir=arguments.manual_dir):
        print(f"{builder.info.full_name}: {prepared.describe(builder)} in {builder.data_path}")


def _prepare_config(config: TrainConfig) -> None:
    import jax  # this and what follows take seconds to import

    jax.config.update("jax_platforms", "cpu")  # an accelerator may be in use, and is of no use here
    from jaxembed.training.dev import read_dev_sets
    from jaxembed.training.texts import prepare_texts, prepare_tokenizer, read_sources

    for source in (*config.data.train, *config.data.dev):
        if isinstance(source, TfdsSource):
            from jaxembed.datasets.prepared import prepare_dataset

            prepare_dataset(source.dataset, data_dir=source.data_dir, manual_dir=source.manual_dir)
    examples = read_sources(config.data.train, config.data)
    read_dev_sets(config)
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = prepare_tokenizer(config, examples, epath.Path(directory))
    table, _ = prepare_texts(config, examples, tokenizer)
    pairs, texts = sum(map(len, examples)), sum(len(cache.distinct_hashes) for cache in table.caches)
    tokens = sum(len(cache.tokens) for cache in table.caches)
    print(f"ready: {pairs:,} pairs, {texts:,} texts, {tokens:,} tokens in the token cache")


if __name__ == "__main__":
    sys.exit(run_command(main))
