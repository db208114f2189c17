"""What preparing the paper's data costs, on synthetic files of any size in the original formats.

The real sizes are `--passages 8841823 --entries 160000000 --nli-rows 942000`; each stage runs in a process of its own.
"""

import argparse
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import machine, table

SYSTEMS = [f"system-{number}" for number in range(13)]
MINED = 50
SCORED = 200
"""Scored passages of a query: 160 million entries for about 800,000 queries."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--passages", type=int, default=200_000, help="rows of collection.tsv (default: 200000)")
    options.add_argument("--entries", type=int, default=2_000_000, help="scores in the pickle (default: 2000000)")
    options.add_argument("--nli-rows", type=int, default=20_000, help="rows of AllNLI.tsv.gz (default: 20000)")
    options.add_argument("--directory", type=Path, help="where files are written (default: a temporary one)")
    options.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.stage:
        print(json.dumps(measure(STAGES[arguments.stage], arguments.directory)))
        return
    directory = arguments.directory or Path(tempfile.mkdtemp())
    try:
        rows = run(arguments, directory)
    finally:
        if arguments.directory is None:
            shutil.rmtree(directory)
    command = f"--passages {arguments.passages} --entries {arguments.entries} --nli-rows {arguments.nli_rows}"
    print(f"{machine()}\n`python benchmarks/prepare.py {command}`\n\n{table(rows)}")


def run(arguments: argparse.Namespace, directory: Path) -> list[dict[str, object]]:
    start = time.perf_counter()
    write_originals(directory / "originals", arguments.passages, arguments.entries, arguments.nli_rows)
    size = sum(path.stat().st_size for path in (directory / "originals").iterdir())
    rows: list[dict[str, object]] = [
        {
            "stage": "(writing the synthetic originals)",
            "rows": "",
            "seconds": time.perf_counter() - start,
            "CPU seconds": "",
            "rows/s": "",
            "peak memory, MB": "",
            "on disk, MB": f"{size / 1e6:,.0f}",
        }
    ]
    for stage in STAGES:
        command = [sys.executable, __file__, "--stage", stage, "--directory", str(directory)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append(
            {
                "stage": stage,
                "rows": f"{found['rows']:,}",
                "seconds": found["seconds"],
                "CPU seconds": found["cpu"],
                "rows/s": f"{found['rows'] / found['seconds']:,.0f}",
                "peak memory, MB": f"{found['memory'] / 1e6:,.0f}",
                "on disk, MB": f"{found['disk'] / 1e6:,.0f}" if found["disk"] else "",
            }
        )
    return rows


def write_originals(folder: Path, passages: int, entries: int, nli_rows: int) -> None:
    """Passages of 335 characters on average, as MS MARCO's are; 13 systems of 50 passages among a query's 200."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    words = np.array(["".join(random.choice(list("etaoinshrdlu"), random.integers(2, 9))) for _ in range(5000)])
    with open(folder / "collection.tsv", "w") as file:
        for start in range(0, passages, 10_000):
            count = min(10_000, passages - start)
            drawn, ends = words[random.integers(0, len(words), (count, 90))], random.integers(20, 90, count)
            file.writelines(f"{start + i}\t{' '.join(drawn[i, : ends[i]])}\n" for i in range(count))
    queries = max(1, entries // SCORED)
    with open(folder / "queries.train.tsv", "w") as file:
        file.writelines(f"{query}\t{' '.join(words[random.integers(0, len(words), 6)])}\n" for query in range(queries))
    with (
        gzip.open(folder / "msmarco-hard-negatives.jsonl.gz", "wt", compresslevel=1) as rows,
        gzip.open(folder / "cross-encoder-ms-marco-MiniLM-L-6-v2-scores.pkl.gz", "wb", compresslevel=1) as pickled,
    ):
        pickled.write(b"\x80\x04}\x94")
        for start in range(0, queries, 1000):
            pickled.write(b"(")
            for query in range(start, min(start + 1000, queries)):
                scored = np.unique(random.integers(0, passages, SCORED))
                random.shuffle(scored)
                scores = random.normal(0, 4, len(scored)).astype(np.float32)
                scores[0] = 8
                pickled.write(pickled_entries(query, scored, scores))
                mined = scored[1 + random.integers(0, len(scored) - 1, (len(SYSTEMS), MINED))].tolist()
                row = {"qid": query, "pos": [int(scored[0])], "neg": dict(zip(SYSTEMS, mined))}
                rows.write(json.dumps(row) + "\n")
            pickled.write(b"u")
        pickled.write(b".")
    labels = ("entailment", "neutral", "contradiction")
    with gzip.open(folder / "AllNLI.tsv.gz", "wt", compresslevel=1) as file:
        file.write("split\tdataset\tfilename\tsentence1\tsentence2\tlabel\n")
        for row in range(nli_rows):
            premise = f"premise {row // 3} {' '.join(words[(row // 3 + np.arange(10)) % len(words)])}"
            hypothesis = f"hypothesis {row} {' '.join(words[(row + np.arange(5)) % len(words)])}"
            file.write(f"train\tSNLI\tx\t{premise}\t{hypothesis}\t{labels[row % 3]}\n")


def pickled_entries(query: int, passages: np.ndarray, scores: np.ndarray) -> bytes:
    """The opcodes of `query: {passage: score, …}`."""
    records = np.empty(len(passages), [("int", "S1"), ("passage", "<i4"), ("float", "S1"), ("score", ">f8")])
    records["int"], records["passage"], records["float"], records["score"] = b"J", passages, b"G", scores
    return b"J" + query.to_bytes(4, "little") + b"}\x94(" + records.tobytes() + b"u"


def read_the_pickle(directory: Path) -> tuple[int, Path | None]:
    from etils import epath

    from jaxembed.datasets.ms_marco import SCORES
    from jaxembed.datasets.scores import store_scores

    target = directory / "scores"
    target.mkdir(exist_ok=True)
    return len(store_scores(SCORES.find(epath.Path(directory) / "originals"), SCORES, target).values), target


def build(dataset: str, config: int) -> Callable[[Path], tuple[int, Path | None]]:
    def stage(directory: Path) -> tuple[int, Path | None]:
        from jaxembed.datasets.prepared import prepare_dataset

        builder = prepare_dataset(dataset, data_dir=directory / "tfds", manual_dir=directory / "originals")[config]
        return builder.info.splits["train"].num_examples, Path(builder.data_path)

    return stage


def build_passages(directory: Path) -> tuple[int, Path | None]:
    import tensorflow_datasets as tfds

    from jaxembed.datasets.prepared import open_builders

    builder = open_builders("ms_marco", directory / "tfds")[0]
    config = tfds.download.DownloadConfig(manual_dir=directory / "originals", try_download_gcs=False)
    builder.download_and_prepare(download_config=config)
    return builder.info.splits["train"].num_examples, Path(builder.data_path)


def read_examples(directory: Path) -> tuple[int, Path | None]:
    from jaxembed.datasets.prepared import read_prepared

    return len(read_prepared("ms_marco", name="ms_marco", data_dir=directory / "tfds")), None


def read_passages(directory: Path, most: int = 100_000) -> tuple[int, Path | None]:
    from jaxembed.datasets.prepared import read_prepared

    examples = read_prepared("ms_marco", name="ms_marco", data_dir=directory / "tfds", split="train[:100]")
    store = examples.positives.store
    rows = np.random.default_rng(0).integers(0, len(store), most)
    for start in range(0, most, 4096):
        store.texts(rows[start : start + 4096])
    return most, None


STAGES: dict[str, Callable[[Path], tuple[int, Path | None]]] = {
    "scores: pickle to arrays (entries)": read_the_pickle,
    "ms_marco/passages": build_passages,
    "ms_marco/hard_negatives (queries; the pickle again)": build("ms_marco", 1),
    "read all examples of ms_marco": read_examples,
    "read passages at random, 4,096 at once": read_passages,
    "all_nli (triples)": build("all_nli", 0),
}


def measure(stage: Callable[[Path], tuple[int, Path | None]], directory: Path) -> dict[str, float]:
    """Seconds, those of the processor, peak of the memory that is not a file's, size of what is left on the disk."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, cpu = time.perf_counter(), time.process_time()
    rows, target = stage(directory)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    done.set()
    watcher.join()
    files = [] if target is None else [path for path in target.rglob("*") if path.is_file()]
    size = sum(os.stat(path).st_size for path in files)
    return {"rows": rows, "seconds": seconds, "cpu": cpu, "memory": max(peak, anonymous_bytes()), "disk": size}


def anonymous_bytes() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
    except (OSError, StopIteration):  # not Linux: the peak of all memory
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
