"""`python -m jaxembed.encode --model M --input 'corpus/*.jsonl.gz' --output DIR`: embeddings of a whole corpus."""

import argparse
import logging
import sys
from collections.abc import Sequence

from pydantic import ValidationError

from jaxembed.__main__ import run_command
from jaxembed.config import DistributedConfig
from jaxembed.errors import InputError

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, encodes, prints where the shards are; returns the exit status."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("absl", "jax", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

    from jaxembed import hosts  # these take seconds to import
    from jaxembed.embedder import Embedder
    from jaxembed.encoding.job import Options, encode_corpus
    from jaxembed.encoding.manifest import read_ranges
    from jaxembed.encoding.readers import Fields
    from jaxembed.sharding import local_mesh
    from jaxembed.text.format import read_text_format_file

    options = Options(
        inputs=arguments.input,
        output=arguments.output,
        fields=Fields(arguments.id_field, arguments.text_field, arguments.title_field),
        bad_rows=arguments.bad_rows,
        role=arguments.role,
        prompt=arguments.prompt,
        precision=arguments.precision,
        ranges=None if arguments.ranges is None else read_ranges(arguments.ranges),
        truncate_dim=arguments.truncate_dim,
        batch_size=arguments.batch_size,
        format=arguments.format,
        shard_size=arguments.shard_size,
    )
    text_format = None if arguments.text_format is None else read_text_format_file(arguments.text_format)

    def load() -> Embedder:
        model = Embedder.from_pretrained(
            arguments.model,
            text_format=text_format,
            dtype=arguments.dtype,
            mesh=local_mesh(arguments.fsdp),
            revision=arguments.revision,
        )
        if arguments.ranges is not None:
            read_ranges(arguments.ranges, model.model_hash)  # of dimensions that mean something else
        return model

    with hosts.together(_distributed(arguments)):
        if not hosts.is_main():
            logging.getLogger().setLevel(logging.WARNING)
        summary = encode_corpus(options, load, progress=hosts.is_main())
        if hosts.is_main():
            print(f"{arguments.output}: {summary}")
    return 0


def _distributed(arguments: argparse.Namespace) -> DistributedConfig:
    given = {name: getattr(arguments, name) for name in ("coordinator", "num_processes", "process_id")}
    try:
        return DistributedConfig(**given)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise InputError(f"--{option}: {first['msg']}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxembed.encode",
        description="Embed a corpus of any size on all devices of all hosts, into shards of Parquet or .npy. A job "
        "that was stopped or killed goes on when it is started again, and ends with the same bytes.",
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help="directory of a model, or hub id")
    data = parser.add_argument_group("what goes in")
    data.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="FILE",
        help="files, or patterns such as 'corpus/*.jsonl.gz', local or gs://: JSON lines, TSV, CSV, text (.txt, a "
        "text a line), all these also with .gz, and Parquet",
    )
    data.add_argument("--id-field", metavar="COLUMN", help="of the ids (default: _id, docid, …, id; else FILE:LINE)")
    data.add_argument("--text-field", metavar="COLUMN", help="of the texts (default: text, …; for queries: query, …)")
    data.add_argument(
        "--title-field",
        metavar="COLUMN",
        help="what is put before the text (default: title, in rows that have it; '' for none)",
    )
    data.add_argument(
        "--bad-rows",
        choices=("error", "skip"),
        default="error",
        help="what a row that cannot be read leads to (default: error, before anything is embedded)",
    )

    out = parser.add_argument_group("what comes out")
    out.add_argument("--output", required=True, metavar="DIR", help="local or gs://; with several hosts one for all")
    out.add_argument("--format", choices=("parquet", "npy"), default="parquet", help="of the shards (default: parquet)")
    out.add_argument("--shard-size", type=int, default=32_768, metavar="ROWS", help="in a shard (default: 32768)")
    out.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the numbers (default: float32)")
    out.add_argument(
        "--ranges",
        metavar="DIR",
        help="for int8 and uint8: the output of an earlier job whose ranges are taken, as queries need (default: those "
        "of 4096 texts drawn from the corpus)",
    )
    out.add_argument("--truncate-dim", type=int, metavar="DIM", help="keep this many dimensions (default: all)")

    model = parser.add_argument_group("model and devices")
    model.add_argument("--role", choices=("query", "document"), default="document", help="of texts (default: document)")
    model.add_argument("--prompt", metavar="TEXT", help="before each text, instead of the role's prompt")
    model.add_argument("--text-format", metavar="FILE", help="YAML or JSON, instead of the model's own")
    model.add_argument("--dtype", default="auto", help="of the computation: auto, float32 or bfloat16 (default: auto)")
    model.add_argument("--revision", help="branch, tag or commit of a hub id (default: the main branch)")
    model.add_argument(
        "--batch-size",
        type=int,
        metavar="ROWS",
        help="of the longest length at once, on all devices of a host (default: what suits them)",
    )
    model.add_argument(
        "--fsdp",
        type=int,
        default=1,
        metavar="DEVICES",
        help="of a host over which the weights are split, for a model too large for one (default: 1)",
    )

    several = parser.add_argument_group("several hosts, where the cluster does not say so itself")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    several.add_argument("--num-processes", type=int, metavar="N", help="usually one a host")
    several.add_argument("--process-id", type=int, metavar="N", help="number of this process, from 0")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
