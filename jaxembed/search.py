"""`python -m jaxembed.search --model M --corpus FILE "query"`: the best texts of a corpus, with their scores."""

import argparse
import dataclasses
import io
import json
import logging
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from jaxembed.__main__ import run_command
from jaxembed.errors import InputError

if TYPE_CHECKING:
    from jaxembed.evaluation.searching import Hit


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, embeds what is not embedded yet, prints the hits; returns the exit status: 1 if a typed query failed."""
    arguments = _parser().parse_args(argv)
    if arguments.top_k < 1:
        raise InputError(f"--top-k: expected a whole number of at least 1, found {arguments.top_k}")
    if not arguments.query and not arguments.interactive:
        raise InputError("no query; give one, in quotes, or --interactive")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("absl", "jax", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

    from etils import epath  # the rest takes seconds to import

    from jaxembed.embedder import Embedder
    from jaxembed.encoding.readers import Fields, is_unicode
    from jaxembed.evaluation.searching import AS_DOCUMENTS, find_corpus_files, open_corpus
    from jaxembed.sharding import local_mesh
    from jaxembed.text.format import read_text_format_file

    options = dataclasses.replace(
        AS_DOCUMENTS,
        fields=Fields(arguments.id_field, arguments.text_field, arguments.title_field),
        bad_rows=arguments.bad_rows,
        role="query" if arguments.symmetric else "document",
        prompt=arguments.document_prompt,
    )
    if epath.Path(arguments.corpus).expanduser().is_dir():
        _refuse_for_a_folder(arguments)
    else:
        find_corpus_files(arguments.corpus)  # said before the model is loaded
    model = Embedder.from_pretrained(
        arguments.model,
        text_format=None if arguments.text_format is None else read_text_format_file(arguments.text_format),
        dtype=arguments.dtype,
        mesh=local_mesh(),
        revision=arguments.revision,
    )
    corpus = open_corpus(arguments.corpus, model, options, arguments.index)

    def search(queries: Sequence[str]) -> list[list["Hit"]]:
        if not all(map(is_unicode, queries)):
            raise InputError("a query that is not UTF-8")
        vectors = model.encode_query(
            queries, prompt=arguments.query_prompt, truncate_dim=corpus.job["truncate dim"], show_progress_bar=False
        )
        return corpus.search(vectors, arguments.top_k)

    shown = _json_lines if arguments.json else _lines
    for query, hits in zip(arguments.query, search(arguments.query) if arguments.query else []):
        print(shown(query, hits), flush=True)
    status = 0
    for query in _typed() if arguments.interactive else ():
        try:
            [hits] = search([query])
        except InputError as error:
            print(f"error: {query!r:.60}: {error}", file=sys.stderr)
            status = 1
        else:
            print(shown(query, hits), flush=True)
    return status


def _typed() -> Iterator[str]:
    """Queries, line by line, until there are no more; blank lines are passed over."""
    asked = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # such a line is refused as a query, and the next one is read
    if asked:
        print("A query a line; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input("query> " if asked else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _lines(query: str, hits: Iterable["Hit"]) -> str:
    """The query, and a line a hit: rank, cosine, id, and as much of the text as fits."""
    width = max(60, shutil.get_terminal_size((160, 24)).columns)
    lines = [query]
    for rank, hit in enumerate(hits, start=1):
        text = "" if hit.text is None else f"  {' '.join(hit.text.split())}"
        line = f"{rank:4}  {hit.score:.4f}  {hit.id}{text}"
        lines.append(line if len(line) <= width else f"{line[: width - 1]}…")
    return "\n".join([*lines, ""])


def _json_lines(query: str, hits: Iterable["Hit"]) -> str:
    return json.dumps({"query": query, "hits": [dataclasses.asdict(hit) for hit in hits]}, ensure_ascii=False)


def _refuse_for_a_folder(arguments: argparse.Namespace) -> None:
    """What says how a file is embedded says nothing of embeddings that are there."""
    names = ("index", "id_field", "text_field", "title_field", "document_prompt")
    given = [name for name in names if getattr(arguments, name) is not None]
    given += [name for name in ("symmetric",) if arguments.symmetric]
    if given:
        option = given[0].replace("_", "-")
        raise InputError(f"--{option}: the folder {arguments.corpus} is embedded already; it is for files of texts")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxembed.search",
        description="Find the texts of a corpus that are nearest to a query. The corpus is embedded once; its "
        "embeddings are kept and used again as long as corpus and model stay as they are.",
    )
    parser.add_argument("query", nargs="*", metavar="QUERY", help="in quotes; several are searched together")
    parser.add_argument("--model", required=True, metavar="MODEL", help="directory of a model, or hub id")
    parser.add_argument(
        "--corpus",
        required=True,
        metavar="FILE",
        help="JSON lines, TSV, CSV, text (.txt, a text a line), all these also with .gz, or Parquet; a pattern in "
        "quotes for several; or a folder that `jaxembed encode` wrote",
    )
    parser.add_argument("--interactive", action="store_true", help="then ask for queries, one a line")
    parser.add_argument("--top-k", type=int, default=10, metavar="N", help="texts a query (default: 10)")
    parser.add_argument("--json", action="store_true", help="a line of JSON a query, with the whole texts")

    corpus = parser.add_argument_group("a corpus of texts")
    corpus.add_argument("--index", metavar="DIR", help="of its embeddings (default: FILE.index, beside it)")
    corpus.add_argument("--id-field", metavar="COLUMN", help="of the ids (default: _id, docid, …, id; else FILE:LINE)")
    corpus.add_argument("--text-field", metavar="COLUMN", help="of the texts (default: text, …)")
    corpus.add_argument(
        "--title-field",
        metavar="COLUMN",
        help="what is put before the text (default: title, in rows that have it; '' for none)",
    )
    corpus.add_argument(
        "--bad-rows",
        choices=("error", "skip"),
        default="error",
        help="what a row that cannot be read leads to (default: error)",
    )
    corpus.add_argument("--document-prompt", metavar="TEXT", help="before each text, instead of the role's prompt")
    corpus.add_argument("--symmetric", action="store_true", help="the texts are read as queries are")

    model = parser.add_argument_group("model")
    model.add_argument("--query-prompt", metavar="TEXT", help="before the query, instead of the role's prompt")
    model.add_argument("--text-format", metavar="FILE", help="YAML or JSON, instead of the model's own")
    model.add_argument("--dtype", default="auto", help="of the computation: auto, float32 or bfloat16 (default: auto)")
    model.add_argument("--revision", help="branch, tag or commit of a hub id (default: the main branch)")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
