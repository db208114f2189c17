"""Mining at 50,000 documents and 2,000 queries with every rule on, against brute force in numpy; time and peak memory.

Embeddings are random unit vectors, each query near its positives; they lie on the disk, as mining leaves them. The
search runs in a process of its own, streamed in blocks, so that its peak memory is its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from common import machine, table

_TOGETHER = 50  # queries in one product of brute force


def unit(random: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    values = random.standard_normal((rows, dim), np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def make_data(folder: Path, documents: int, queries: int, dim: int) -> None:
    random = np.random.default_rng(0)
    corpus = unit(random, documents, dim)
    positives = random.integers(0, documents, (queries, 2))
    asked = corpus[positives].sum(axis=1) + unit(random, queries, dim) * 1.5
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    corpus.tofile(folder / "documents.f32")
    asked.astype(np.float32).tofile(folder / "queries.f32")
    np.save(folder / "positives.npy", positives)
    np.save(folder / "cross.npy", random.standard_normal((queries, documents), np.float32))


def options(blocks: tuple[int, int]):
    from jaxembed.mining.filters import Filters
    from jaxembed.mining.mine import Options
    from jaxembed.mining.search import Blocks

    filters = Filters(first=5, last=100, share=0.4, margin=0.29, largest=0.165, cross_margin=0.5)
    return Options(count=5, filters=filters, blocks=Blocks(*blocks))


def mine_once(folder: Path, documents: int, queries: int, dim: int, blocks: tuple[int, int], repeats: int) -> None:
    """In the process that is measured."""
    import jax

    from jaxembed.mining.cross_scores import CrossScores
    from jaxembed.mining.mine import mine_embeddings
    from jaxembed.mining.spool import Embeddings
    from jaxembed.mining.task import Collection, make_task

    texts, names = ([f"{kind} {row}" for row in range(count)] for kind, count in (("d", documents), ("q", queries)))
    positives = np.load(folder / "positives.npy")
    query_of, place_of = np.repeat(np.arange(queries), 2), positives.reshape(-1)
    task = make_task(Collection(names, names), Collection(texts, texts), query_of, place_of)
    asked = Embeddings(folder / "queries.f32", (queries, dim))
    corpus = Embeddings(folder / "documents.f32", (documents, dim))
    mapped = np.load(folder / "cross.npy", mmap_mode="r")

    class Looked(CrossScores):
        """Read from the file where they are asked for, so that they are not what is measured."""

        def of(self, query: np.ndarray, row: np.ndarray) -> np.ndarray:
            return np.where(row >= 0, mapped[query, row], np.nan).astype(np.float64)

    cross = Looked(np.zeros(0, np.int64), np.zeros(0, np.float32), documents)
    jax.devices()
    before, most, stop = memory(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            most[0] = max(most[0], memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    mine_embeddings(task, asked, corpus, options(blocks), cross_scores=cross, progress=False)  # compiles
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        mined, report = mine_embeddings(task, asked, corpus, options(blocks), cross_scores=cross, progress=False)
        times.append(time.perf_counter() - start)
    stop.set()
    watcher.join()
    np.savez(folder / "mined.npz", negatives=mined.negatives, scores=mined.scores)
    counts = list(report.funnel.candidates.items())
    print(json.dumps({"seconds": float(np.median(times)), "peak": most[0], "before": before, "funnel": counts}))


def memory() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def brute_force(folder: Path, documents: int, queries: int, dim: int) -> tuple[np.ndarray, np.ndarray, float]:
    """All scores in float64, one stable sort a query, the rules one by one."""
    rules = options((1, 1)).filters
    asked, corpus = (
        np.fromfile(folder / f"{name}.f32", np.float32).reshape(-1, dim) for name in ("queries", "documents")
    )
    positives, cross = np.load(folder / "positives.npy"), np.load(folder / "cross.npy", mmap_mode="r")
    start = time.perf_counter()
    negatives, found = np.full((queries, 5), -1, np.int64), np.full((queries, 5), -np.inf, np.float32)
    wide = corpus.astype(np.float64).T
    for query in range(queries):
        if query % _TOGETHER == 0:
            some = (asked[query : query + _TOGETHER].astype(np.float64) @ wide).astype(np.float32)
        scores = some[query % _TOGETHER]
        limit, cross_limit = float(scores[positives[query]].min()), float(cross[query, positives[query]].min())
        ranked = scores.copy()
        ranked[positives[query]] = -np.inf
        order = np.argsort(-ranked, kind="stable")[rules.first - 1 : rules.last]
        s = scores[order].astype(np.float64)
        kept = (s <= rules.share * limit) & (s <= limit - rules.margin) & (s <= rules.largest)
        order = order[kept & (cross[query, order] <= cross_limit - rules.cross_margin)][:5]
        negatives[query, : len(order)], found[query, : len(order)] = order, scores[order]
    return negatives, found, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--documents", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4096, 32_768], help="documents at a time")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each, of which the median counts")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = arguments.documents, arguments.queries, arguments.dim
    if arguments.measure:
        mine_once(Path(arguments.measure), *sizes, (arguments.blocks[0], 512), arguments.repeats)
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_data(folder, *sizes)
        negatives, scores, seconds = brute_force(folder, *sizes)
        corpus = arguments.documents * arguments.dim * 4
        rows.append({"search": "numpy, float64", "seconds": seconds, "peak above start, MB": "-", "equal": "-"})
        for block in arguments.blocks:
            command = [sys.executable, __file__, "--measure", temporary, "--blocks", str(block)]
            command += ["--repeats", str(arguments.repeats)]
            command += [f"--{name}={size}" for name, size in zip(("documents", "queries", "dim"), sizes)]
            found = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            mined = np.load(folder / "mined.npz")
            equal = np.array_equal(mined["negatives"], negatives) and np.array_equal(mined["scores"], scores)
            rows.append(
                {
                    "search": f"mined, blocks of {block:,}",
                    "seconds": found["seconds"],
                    "peak above start, MB": f"{(found['peak'] - found['before']) / 1e6:,.0f}",
                    "equal": "yes" if equal else "NO",
                }
            )
    print(f"{machine()}\n`python benchmarks/mine.py --repeats {arguments.repeats}`\n")
    print(
        f"{sizes[0]:,} documents, {sizes[1]:,} queries, {sizes[2]} numbers, two positives a query, every rule on; the "
        f"corpus is {corpus / 1e6:,.0f} MB, all scores would be {4 * sizes[0] * sizes[1] / 1e6:,.0f} MB.\n"
    )
    print(table(rows))
    print(f"\nLeft after each rule: {', '.join(f'{rule} {count:,}' for rule, count in found['funnel'])}.")


if __name__ == "__main__":
    main()
