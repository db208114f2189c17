"""Whether the data keeps up: readers, tokenisation and loader on their own, beside what eight TPU v5e chips would take.

Everything runs in one process, cold files aside: each reader is timed at its second pass over its file.
"""

import argparse
import csv
import gzip
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, parser, read_rows, table

V5E_FLOPS = 197e12
"""Peak of a chip in bfloat16, operations a second (facts of the maker, as in `jaxembed.planning.chips`)."""
BLOOM_560M = {"layers": 24, "dim": 1024}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--set", default="medquad", help="training set, a folder in train/ of --data")
    options.add_argument(
        "--rows", type=int, default=20_000, help="rows read, the set's own repeated as often as needed"
    )
    options.add_argument("--batch-size", type=int, default=1024, help="pairs of a batch")
    options.add_argument("--steps", type=int, default=20, help="batches that the loader makes")
    options.add_argument("--max-length", type=int, default=256, help="tokens at which texts are cut")
    options.add_argument("--devices", type=int, default=8, help="chips that the rows are dealt to")
    arguments = options.parse_args()
    rows = distinct_rows(read_rows(arguments.data / "train" / arguments.set / "train.jsonl.gz"), arguments.rows)
    with tempfile.TemporaryDirectory() as directory:
        found = [*reader_rows(rows, Path(directory)), *loader_rows(rows, arguments, Path(directory))]
    found.append(demand(found))
    given = f"--set {arguments.set} --rows {arguments.rows} --batch-size {arguments.batch_size}"
    given += f" --max-length {arguments.max_length}"
    print(f"{machine()}, {os.cpu_count()} cores\n`python benchmarks/loader.py {given}`\n\n{table(found)}")


def distinct_rows(rows: Sequence[dict[str, Any]], count: int) -> list[tuple[str, str]]:
    """So many pairs, none twice: those that come again have their turn in front."""
    pairs = [tuple(str(value) for value in list(row.values())[:2]) for row in rows]
    return [
        (f"{turn} {pair[0]}" if turn else pair[0], f"{turn} {pair[1]}" if turn else pair[1])
        for turn, pair in ((number // len(pairs), pairs[number % len(pairs)]) for number in range(count))
    ]


def line(what: str, seconds: float, *, rows: int | None = None, tokens: int | None = None) -> dict[str, object]:
    return {
        "stage": what,
        "seconds": seconds,
        "rows/s": "" if rows is None else f"{rows / seconds:,.0f}",
        "tokens/s": "" if tokens is None else f"{tokens / seconds:,.0f}",
    }


# ---- readers


def write_formats(pairs: Sequence[tuple[str, str]], directory: Path) -> dict[str, Callable[[], Any]]:
    """The pairs in every format, each with a function that reads it; a negative is the next row's positive."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from jaxembed.data.beir import read_beir
    from jaxembed.data.sources import read_rows as read

    negatives = [pairs[(number + 1) % len(pairs)][1] for number in range(len(pairs))]
    triples = list(zip(*zip(*pairs), negatives))

    def passage(text: str) -> dict[str, str]:
        return {"docid": "1", "title": "", "text": text}

    def message(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    formats: dict[str, Callable[[str, str, str], dict[str, Any]]] = {
        "sentence-transformers": lambda q, p, n: {"anchor": q, "positive": p, "negative": n},
        "graded": lambda q, p, n: {"s1": q, "s2": p, "score": 0.5},
        "tevatron": lambda q, p, n: {
            "query_id": "1", "query": q, "positive_passages": [passage(p)], "negative_passages": [passage(n)],
        },
        "flagembedding": lambda q, p, n: {"query": q, "pos": [p], "neg": [n]},
        "gritlm": lambda q, p, n: {"query": ["", q], "pos": [["", p]], "neg": [["", n]]},
        "ms-swift": lambda q, p, n: {
            "messages": message(q), "positive_messages": [message(p)], "negative_messages": [message(n)],
        },
        "labelled": lambda q, p, n: {"text": p, "label": str(len(p) % 50)},
    }  # fmt: skip
    readers: dict[str, Callable[[], Any]] = {}
    for name, row in formats.items():
        path = directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row(*triple)) + "\n" for triple in triples))
        readers[name] = lambda path=path: read(path, name="rows", cache_dir=directory / "cache")
    nli = directory / "nli.jsonl"  # each premise with an entailment and a contradiction
    with nli.open("w") as file:
        for query, positive, negative in triples:
            file.write(json.dumps({"premise": query, "hypothesis": positive, "label": 0}) + "\n")
            file.write(json.dumps({"premise": query, "hypothesis": negative, "label": 2}) + "\n")
    readers["nli"] = lambda: read(nli, name="rows")

    columns = ("anchor", "positive", "negative")
    with gzip.open(directory / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(dict(zip(columns, triple))) + "\n" for triple in triples)
    with (directory / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *triples])
    with (directory / "rows.tsv").open("w") as file:
        for cells in (columns, *triples):
            file.write("\t".join(" ".join(cell.split()) for cell in cells) + "\n")
    pq.write_table(pa.table(dict(zip(columns, map(list, zip(*triples))))), directory / "rows.parquet")
    for kind in ("jsonl.gz", "csv", "tsv", "parquet"):
        path = directory / f"rows.{kind}"
        readers[f"sentence-transformers, .{kind}"] = lambda path=path: read(path, name="rows")

    folder = directory / "beir"
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("queries", [pair[0] for pair in pairs]), ("corpus", [pair[1] for pair in pairs])):
        lines = (json.dumps({"_id": str(number), "text": text}) + "\n" for number, text in enumerate(texts))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    judged = "".join(f"{number}\t{number}\t1\n" for number in range(len(pairs)))
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    readers["beir, store there already"] = lambda: read_beir(folder, name="beir", cache_dir=directory / "cache")
    by_id = directory / "ids.jsonl"
    by_id.write_text(
        "".join(
            json.dumps(
                {
                    "query_text": pair[0],
                    "positive_document_ids": [str(n)],
                    "negative_document_ids": [str(max(n - 1, 0))],
                }
            )
            + "\n"
            for n, pair in enumerate(pairs)
        )
    )
    readers["tevatron-ids, store there already"] = lambda: read(
        by_id, name="ids", corpus=folder / "corpus.jsonl", cache_dir=directory / "cache"
    )
    return readers


def reader_rows(pairs: Sequence[tuple[str, str]], directory: Path) -> list[dict[str, object]]:
    found = []
    for name, read in write_formats(pairs, directory).items():
        read()
        start = time.perf_counter()
        read()
        count = 2 * len(pairs) if name == "nli" else len(pairs)
        found.append(line(f"read {name}", time.perf_counter() - start, rows=count))
    return found


# ---- tokens and batches


def loader_rows(
    pairs: Sequence[tuple[str, str]], arguments: argparse.Namespace, directory: Path
) -> list[dict[str, object]]:
    from jaxembed.data.loader import (
        CHUNK_TOKENS,
        Batches,
        TextSource,
        choose_layout,
        iterate,
        sample_lengths,
        tokenize_examples,
    )
    from jaxembed.data.plan import run_plan
    from jaxembed.data.sources import read_rows as read
    from jaxembed.text.format import TextFormat
    from jaxembed.text.tokenizer import TextTokenizer, load_tokenizer, with_end_token

    raw = with_end_token(load_tokenizer(arguments.data / "tokenizers" / "gpt2.tokenizer.json"), "<|endoftext|>")
    tokenizer = TextTokenizer(raw, TextFormat(max_length=arguments.max_length))
    examples = read(directory / "sentence-transformers.jsonl", name="rows")

    def tokenize() -> Any:
        return tokenize_examples([TextSource(examples, tokenizer, negatives=1)], directory / "tokens")

    start = time.perf_counter()
    tokens = sum(len(cache.tokens) for cache in tokenize()[0].caches)
    found = [line("tokenise, into the cache", time.perf_counter() - start, rows=len(pairs), tokens=tokens)]
    start = time.perf_counter()
    text_table, data_sets = tokenize()
    found.append(line("open the cache", time.perf_counter() - start, rows=len(pairs), tokens=tokens))

    start = time.perf_counter()
    schedule = run_plan(data_sets, text_table.hashes, arguments.batch_size, 0, steps=arguments.steps)
    assert schedule.hash
    found.append(line("epoch plan", time.perf_counter() - start, rows=len(pairs)))
    texts = data_sets[0].texts
    layout = choose_layout(
        sample_lengths(schedule, text_table, texts),
        chips=arguments.devices, dim=BLOOM_560M["dim"], chunk_tokens=CHUNK_TOKENS["tpu"],
    )  # fmt: skip
    batches = Batches(schedule, text_table, texts, np.zeros(len(texts), int), layout, tokenizer.pad_id)
    assert batches.known is not None
    for name, source in (
        ("loader, one thread: pack and fill", (batches[step] for step in range(len(batches)))),
        ("loader, `iterate`: two threads", iterate(batches, 0)),
    ):
        start = time.perf_counter()
        used = sum(batch["tokens_used"] for batch in source)
        seconds = time.perf_counter() - start
        found.append(line(name, seconds, rows=arguments.batch_size * len(batches), tokens=used))
    return found


def demand(found: Sequence[dict[str, object]]) -> dict[str, object]:
    """Tokens a second that eight v5e chips take at half their peak in full training of bloom-560m.

    8 · 197e12 · 0.5 / (6 · parameters that multiply): 12 · layers · dim² of them, 302 million, without the table, whose
    rows are looked up; attention, of a tenth of that at 256 tokens, and the forward pass that GradCache runs again come
    on top and make the real demand smaller.
    """
    parameters = 12 * BLOOM_560M["layers"] * BLOOM_560M["dim"] ** 2
    tokens = 8 * V5E_FLOPS * 0.5 / (6 * parameters)
    rates = [(str(row["rows/s"]), str(row["tokens/s"])) for row in found if str(row["stage"]).startswith("loader")]
    rows, seen = (float(cell.replace(",", "")) for cell in rates[-1])
    needed = f"{tokens * rows / seen:,.0f}"
    return {"stage": "needed: v5e-8 at 50 %, bloom-560m", "seconds": "", "rows/s": needed, "tokens/s": f"{tokens:,.0f}"}


if __name__ == "__main__":
    main()
