"""`python -m jaxembed.mine --model M --data FILE|FOLDER --output FILE`: hard negatives for pairs."""

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxembed.__main__ import run_command
from jaxembed.errors import InputError

FORMATS = ("sentence-transformers", "flagembedding", "tevatron", "ms-swift", "gritlm", "beir")


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, mines, writes, prints the report; returns the exit status."""
    arguments = _parser().parse_args(argv)
    first, last = _ranks(arguments.ranks)
    output = Path(arguments.output).expanduser()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("absl", "jax", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

    from jaxembed.mining.cross_scores import read_cross_scores  # these take seconds to import
    from jaxembed.mining.filters import Filters
    from jaxembed.mining.inputs import read_task
    from jaxembed.mining.mine import Options, Side, mine
    from jaxembed.mining.search import Blocks
    from jaxembed.mining.writers import check_output, write_mined
    from jaxembed.text.format import read_text_format_file

    filters = Filters(first, last, arguments.share, arguments.margin, arguments.largest, arguments.cross_margin)
    options = Options(
        count=arguments.negatives,
        filters=filters,
        seed=arguments.seed if arguments.sample else None,
        queries=Side("query", arguments.query_prompt),
        documents=Side("query" if arguments.symmetric else "document", arguments.document_prompt),
        recall=arguments.approximate,
        blocks=Blocks(documents=arguments.block),
    )
    if (arguments.cross_scores is None) != (arguments.cross_margin is None):
        raise InputError("--cross-scores and --cross-margin have to be given together")
    check_output(output, arguments.format, scores=arguments.scores, overwrite=arguments.overwrite)
    work = output.with_name(f"{output.name}.work") if arguments.work is None else Path(arguments.work).expanduser()
    text_format = None if arguments.text_format is None else read_text_format_file(arguments.text_format)
    task = read_task(
        arguments.data,
        arguments.corpus,
        work,
        split=arguments.split,
        anchor=arguments.anchor,
        positive=arguments.positive,
    )
    if arguments.format == "beir" and not task.named:
        raise InputError(f"--format beir: writes ids only, and {arguments.data} has none; give a BEIR folder as --data")
    cross_scores = None if arguments.cross_scores is None else read_cross_scores(arguments.cross_scores, task)

    from jaxembed.embedder import Embedder
    from jaxembed.sharding import local_mesh

    model = Embedder.from_pretrained(
        arguments.model,
        text_format=text_format,
        dtype=arguments.dtype,
        mesh=local_mesh(),
        revision=arguments.revision,
    )
    mined, report = mine(task, model, work, options, cross_scores=cross_scores)
    rows = write_mined(output, mined, arguments.format, scores=arguments.scores, only_full=arguments.only_full)
    print(report)
    print(f"{output}: {rows:,} rows, {arguments.format}; embeddings are kept in {work} for a run with other rules")
    return 0


def _ranks(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)-(\d+)", text.strip())
    if match is None:
        raise InputError(f"--ranks: expected two ranks such as 30-100, found {text!r}")
    return int(match[1]), int(match[2])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxembed.mine",
        description="Mine hard negatives: of each query the documents that a model finds nearest and that do not "
        "answer it. The search is exact, on all devices; the corpus may be larger than memory.",
        allow_abbrev=False,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--model", required=True, help="a model directory or hub id")
    data.add_argument(
        "--data",
        required=True,
        metavar="FILE|FOLDER",
        help="pairs in any format that training reads, or a BEIR folder (queries, corpus, qrels)",
    )
    data.add_argument(
        "--corpus",
        metavar="FILE",
        help="rows with id and text (title too): where negatives come from (default: a BEIR folder's corpus, else the "
        "positives and negatives of the pairs)",
    )
    data.add_argument("--anchor", metavar="COLUMN", help="of the queries (default: recognised by the keys)")
    data.add_argument("--positive", metavar="COLUMN", help="of the documents that answer them (default: recognised)")
    data.add_argument("--split", default="train", help="qrels of a BEIR folder (default: train)")
    data.add_argument("--output", required=True, metavar="FILE", help=".jsonl or .jsonl.gz to write")
    data.add_argument(
        "--format",
        choices=FORMATS,
        default="sentence-transformers",
        help="of the output; beir writes ids only and needs data that has them (default: sentence-transformers)",
    )
    data.add_argument("--scores", action="store_true", help="write the model's scores too")
    data.add_argument(
        "--only-full", action="store_true", help="leave out queries that get fewer negatives than asked for"
    )
    data.add_argument("--overwrite", action="store_true", help="replace the file that is at --output")
    data.add_argument(
        "--work", metavar="DIR", help="where embeddings are kept, 4 bytes a number (default: OUTPUT.work)"
    )

    rules = parser.add_argument_group("which documents, in the order in which the rules apply")
    rules.add_argument(
        "--ranks",
        default="1-100",
        metavar="FIRST-LAST",
        help="ranks among the documents that are no positives of the query, nor its own text (default: 1-100)",
    )
    rules.add_argument("--share", type=float, help="a score of at most this share of the positive's, such as 0.95")
    rules.add_argument("--margin", type=float, help="a score of at most the positive's minus this, such as 0.05")
    rules.add_argument("--largest", type=float, help="a score of at most this")
    rules.add_argument(
        "--cross-scores",
        metavar="FILE",
        help="a cross-encoder's scores: rows with qid, pid and score, or with texts (query, document, score)",
    )
    rules.add_argument(
        "--cross-margin", type=float, help="a cross-encoder's score of at most the positive's minus this, such as 3.0"
    )
    rules.add_argument("--negatives", type=int, default=5, metavar="N", help="of a query, at most (default: 5)")
    rules.add_argument("--sample", action="store_true", help="draw them at random instead of taking the nearest")
    rules.add_argument("--seed", type=int, default=0, help="of --sample (default: 0)")

    model = parser.add_argument_group("model and search")
    model.add_argument("--query-prompt", metavar="TEXT", help="before each query, instead of the role's prompt")
    model.add_argument("--document-prompt", metavar="TEXT", help="before each document, instead of the role's prompt")
    model.add_argument("--symmetric", action="store_true", help="embed documents as queries")
    model.add_argument("--text-format", metavar="FILE", help="YAML or JSON, instead of the model's own")
    model.add_argument("--dtype", default="auto", help="of the computation: auto, float32 or bfloat16 (default: auto)")
    model.add_argument("--revision", help="branch, tag or commit of a hub id (default: the main branch)")
    model.add_argument(
        "--approximate",
        type=float,
        nargs="?",
        const=0.95,
        metavar="RECALL",
        help="let the search miss some of the nearest documents, quicker on TPU; without a value this much is expected "
        "to be found: 0.95",
    )
    model.add_argument(
        "--block", type=int, default=32_768, metavar="DOCUMENTS", help="on all devices at a time (default: 32768)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
