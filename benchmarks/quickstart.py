"""The quickstart as a user runs it: seconds and memory, pairs, and retrieval before, after, and by BM25."""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, table

REPOSITORY = Path(__file__).parents[1]


def pair_counts(overrides: list[str]) -> list[dict[str, object]]:
    """What the sources of the config give on this interpreter."""
    from jaxembed.config import load_config
    from jaxembed.data.sources import describe_dropped
    from jaxembed.training.texts import read_sources

    config = load_config(REPOSITORY / "configs" / "quickstart.yaml", overrides)
    return [
        {
            "part": part,
            "data": found.name,
            "pairs": f"{len(found):,}",
            "dropped": describe_dropped(found.dropped) or "none",
        }
        for part, sources in (("train", config.data.train), ("dev", config.data.dev))
        for found in read_sources(sources, config.data)
    ]


def results(run: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Data set → before, BM25, after → metric → value, from the files of the run."""
    dev = json.loads((run / "dev_before.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name, columns in dev.items():
        last = next(row for row in reversed(rows) if f"dev/{name}/mrr@10" in row)
        columns["after"] = {metric: last[f"dev/{name}/{metric}"] for metric in columns["before"]}
    return dev


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, epilog="further options go to the command: --seed 1")
    overrides = options.parse_known_args()[1]
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        # The token cache of an earlier run would save seconds that a user's first run needs.
        fresh = ["--run_dir", str(run), "--data.cache_dir", str(Path(temporary) / "tokens")]
        command = [sys.executable, "-m", "jaxembed.train", "configs/quickstart.yaml", *overrides, *fresh]
        start = time.perf_counter()
        subprocess.run(command, check=True, cwd=REPOSITORY)
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        dev = results(run)
        steps = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    print(f"\n{machine()}\n`{' '.join(['python benchmarks/quickstart.py', *overrides])}`\n")
    print(f"{seconds:.0f} s from start to exit, {steps} steps, {memory / 2**20:,.0f} MiB at most.\n")
    print(table(pair_counts(overrides)), end="\n\n")
    for name, columns in dev.items():
        metrics = [metric for metric in columns["after"] if metric != "loss"]  # BM25 has none
        order = [column for column in columns if column != "after"] + ["after"]
        cells = [{metric: f"{columns[column][metric]:.4f}" for metric in metrics} for column in order]
        print(table([{name: column, **values} for column, values in zip(order, cells)]))


if __name__ == "__main__":
    main()
