"""The conversion of a 14 GB checkpoint to Orbax and back, beside `cp` of the same files: seconds and peak memory.

The checkpoint has the shapes of bloom-7b1 in bfloat16, random values, in files of 5 GB. Before each run the file system
is synced and the files to read are dropped from its cache, free memory is touched once (where a virtual machine's host
has taken it back, getting it again costs more than a copy), and each run ends with a sync: for `cp` as for us. Needs 45
GB of disk.
"""

import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from common import machine, parser, table

REPEATS = 3


def write_random(directory: Path, *, layers: int) -> int:
    """A Hugging Face directory of random bfloat16 weights in bloom-7b1's shapes; its bytes."""
    import ml_dtypes
    import numpy as np

    from jaxembed.checkpoint.pretrained import abstract_decoder, flat_state
    from jaxembed.checkpoint.safetensors import TensorSpec, write_safetensors
    from jaxembed.models import FAMILIES
    from jaxembed.models.weights import assignments
    from jaxembed.text.format import write_json

    family = FAMILIES["bloom"]
    config = family.config(vocab_size=250_880, dim=4096, layers=layers, heads=32)
    abstract = flat_state(abstract_decoder(family, config)[1])
    specs = []
    for each in assignments(family.weight_map(config), layers):
        shape = abstract[each.path].shape
        shape = each.rule.relayout.huggingface_shape(shape if each.index is None else shape[1:])
        specs.append(TensorSpec(each.source, np.dtype(ml_dtypes.bfloat16), shape))
    generator = np.random.default_rng(0)

    def values(spec: TensorSpec) -> np.ndarray:
        # Any sixteen bits but those of infinities and NaN.
        bits = np.frombuffer(generator.bytes(spec.nbytes), np.uint16) & 0xBFFF
        return bits.view(spec.dtype).reshape(spec.shape)

    directory.mkdir(parents=True)
    write_safetensors(directory, specs, ((spec.name, values(spec)) for spec in specs))
    write_json(directory / "config.json", {**config.to_huggingface(), "dtype": "bfloat16"})
    return sum(spec.nbytes for spec in specs)


def touch_free_memory() -> None:
    """In a process of its own, which ends and leaves it free."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024 - (3 << 30)
    script = f"import mmap; m = mmap.mmap(-1, {free})\nfor i in range(0, {free}, 4096): m[i] = 1"
    subprocess.run([sys.executable, "-c", script], check=True)


def run_cold(command: Sequence[str], source: Path) -> tuple[float, float]:
    """Seconds with the final sync, and the process's largest resident set in GiB, its source not in the cache."""
    os.sync()
    for file in filter(Path.is_file, source.rglob("*")):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    touch_free_memory()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)}: {message.decode()}")
    return seconds, usage.ru_maxrss / 2**20


def identical(a: Path, b: Path) -> bool:
    from jaxembed.checkpoint.safetensors import open_tensors, raw_bytes

    ours, theirs = open_tensors(a), open_tensors(b)
    return ours.keys() == theirs.keys() and all(
        (ref.dtype, ref.shape) == (theirs[name].dtype, theirs[name].shape)
        and raw_bytes(ref.read()) == raw_bytes(theirs[name].read())
        for name, ref in ours.items()
    )


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--work", type=Path, required=True, help="a directory to make, on the disk to measure")
    options.add_argument("--layers", type=int, default=30, help="fewer than bloom-7b1's 30 for a quick look")
    options.add_argument("--repeats", type=int, default=REPEATS, help="median of so many, in turns")
    arguments = options.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True)
    source, orbax, back = work / "source", work / "orbax", work / "back"
    # In a process of their own: a child's peak memory begins with that of the process it was forked from.
    apart = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    nbytes = apart.submit(write_random, source, layers=arguments.layers).result()
    convert = [sys.executable, "-m", "jaxembed.convert", "--max-shard-size", "5GB"]
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(arguments.repeats):
        for path in (orbax, back):
            shutil.rmtree(path, ignore_errors=True)
        # One of the two copies of a pair exists at a time: the disk is not asked for more than it has.
        found.setdefault("cp of the Hugging Face files", []).append(
            run_cold(["cp", "-r", str(source), str(work / "copy")], source)
        )
        shutil.rmtree(work / "copy")
        found.setdefault("Hugging Face to Orbax", []).append(
            run_cold([*convert, str(source), str(orbax), "--to", "orbax"], source)
        )
        found.setdefault("cp of the Orbax files", []).append(
            run_cold(["cp", "-r", str(orbax), str(work / "copy")], orbax)
        )
        shutil.rmtree(work / "copy")
        found.setdefault("Orbax to Hugging Face", []).append(
            run_cold([*convert, str(orbax), str(back), "--to", "hf"], orbax)
        )
    same = apart.submit(identical, source, back).result()
    rows = []
    beside = 0.0
    for name, runs in found.items():
        seconds, peak = statistics.median(run[0] for run in runs), max(run[1] for run in runs)
        row = {"run": name, "seconds": f"{seconds:.1f}", "GB/s": f"{nbytes / seconds / 1e9:.2f}"}
        if name.startswith("cp"):
            beside, row = seconds, {**row, "peak memory, GiB": "", "of cp's speed": ""}
        else:
            row |= {"peak memory, GiB": f"{peak:.2f}", "of cp's speed": f"×{beside / seconds:.2f}"}
        rows.append({**row, "all seconds": ", ".join(f"{run[0]:.1f}" for run in runs)})
    print(machine())
    print(f"{nbytes / 1e9:.2f} GB; there and back identical in every tensor: {'yes' if same else 'NO'}\n")
    print(table(rows))
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
