"""`jaxembed encode` killed three times at random: the same bytes as undisturbed; and its memory as the corpus grows.

A tiny random model on short texts, so that it is the job that is measured, not the model. Every run is a process of its
own; memory is the largest that the system saw of it.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, parser, table

WORDS = 5_000
TEXT_WORDS = (2, 8)
SHARD_ROWS = 4096


def write_model(directory: Path, texts: list[str]) -> None:
    """Two layers of 32 numbers, a tokenizer trained on the texts."""
    from jaxembed.checkpoint.pretrained import random_decoder
    from jaxembed.embedder import Embedder
    from jaxembed.models import FAMILIES
    from jaxembed.text.format import TextFormat
    from jaxembed.text.tokenizer import TextTokenizer, train_byte_level_bpe

    family = FAMILIES["bloom"]
    tokenizer = TextTokenizer(train_byte_level_bpe(texts, 2048), TextFormat(max_length=64))
    config = family.config(vocab_size=tokenizer.vocab_size, dim=32, layers=2, heads=2)
    Embedder(random_decoder(family, config, seed=0), tokenizer).save_pretrained(directory, verify=False)


def write_corpus(path: Path, count: int) -> list[str]:
    """Rows of an id and a few words out of `WORDS`; the first thousand texts."""
    chance = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(WORDS)]
    first = []
    with open(path, "w") as file:
        for number in range(count):
            text = " ".join(chance.choices(words, k=chance.randint(*TEXT_WORDS)))
            file.write(json.dumps({"_id": str(number), "text": text}) + "\n")
            if number < 1000:
                first.append(text)
    return first


def start(model: Path, corpus: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jaxembed.encode", "--model", str(model), "--input", str(corpus)]
    command += ["--output", str(output), "--shard-size", str(SHARD_ROWS)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def measured(model: Path, corpus: Path, output: Path) -> tuple[float, float]:
    """Seconds and peak MB of a whole run."""
    begin = time.perf_counter()
    process = start(model, corpus, output)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"jaxembed encode ended with {process.returncode}")
    return time.perf_counter() - begin, usage.ru_maxrss * 1024 / 1e6


def shards(directory: Path) -> int:
    return len(list(directory.glob("embeddings-*")))


def killed(model: Path, corpus: Path, output: Path, total: int, chance: random.Random) -> list[int]:
    """Kills three runs, each somewhere in what is left to do; how many shards there were at each kill."""
    found = []
    for target in sorted(chance.sample(range(1, total), 3)):
        process = start(model, corpus, output)
        while shards(output) < target and process.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.2)  # somewhere inside a shard, or while it is written
        process.send_signal(signal.SIGKILL)
        process.wait()
        found.append(shards(output))
    return found


def same_bytes(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--texts", type=int, default=100_000, help="of the run that is killed")
    arguments.add_argument("--large", type=int, default=1_000_000, help="texts, for the memory")
    arguments.add_argument("--seed", type=int, default=0, help="of the kills")
    given = arguments.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, whole, broken = (folder / name for name in ("model", "whole", "killed"))
        write_model(model, write_corpus(folder / "small.jsonl", given.texts))
        peaks = []

        def add(run: str, texts: int, seconds: float, peak: float) -> None:
            peaks.append(peak)
            rows.append({"run": run, "texts": f"{texts:,}", "seconds": seconds, "peak MB": f"{peak:,.0f}"})

        add("undisturbed", given.texts, *measured(model, folder / "small.jsonl", whole))
        at = killed(model, folder / "small.jsonl", broken, shards(whole), random.Random(given.seed))
        add("after three kills", given.texts, *measured(model, folder / "small.jsonl", broken))
        equal = same_bytes(whole, broken)
        count = shards(whole)
        write_corpus(folder / "large.jsonl", given.large)
        add("undisturbed", given.large, *measured(model, folder / "large.jsonl", folder / "large"))
    print(f"{machine()}\n`python benchmarks/encode_corpus.py --texts {given.texts} --large {given.large}`\n")
    print(table(rows))
    print(
        f"\nKilled when {', '.join(map(str, at))} of {count} shards were there; all files byte-identical: "
        f"{'yes' if equal else 'NO'}. Peak of the large corpus: {peaks[2] / peaks[0]:.3f} of the small one's."
    )


if __name__ == "__main__":
    main()
