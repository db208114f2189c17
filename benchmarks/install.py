"""The base install in a fresh virtual environment: seconds, MB, the largest packages, and what is not among them."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, table

REPOSITORY = Path(__file__).parents[1]
ABSENT = ("torch", "tensorflow")
ABOUT = """
import importlib.metadata, importlib.util, json
sizes = {}
for distribution in importlib.metadata.distributions():
    files = [file.locate() for file in distribution.files or ()]
    sizes[f"{distribution.name} {distribution.version}"] = sum(file.stat().st_size for file in files if file.is_file())
print(json.dumps({"sizes": sizes, "found": [name for name in %r if importlib.util.find_spec(name)]}))
"""


def size(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--what", default=str(REPOSITORY), help="what pip installs: a directory, wheel or requirement")
    options.add_argument("--cached", action="store_true", help="let pip take packages from its cache")
    options.add_argument("--largest", type=int, default=10, help="packages listed")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        environment = Path(temporary) / "venv"
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        python, empty = environment / "bin" / "python", size(environment)
        cache = [] if arguments.cached else ["--no-cache-dir"]
        start = time.perf_counter()
        subprocess.run([python, "-m", "pip", "install", "-q", *cache, arguments.what], check=True)
        seconds = time.perf_counter() - start
        total = size(environment) - empty
        done = subprocess.run([python, "-c", ABOUT % (ABSENT,)], check=True, capture_output=True, text=True, cwd="/")
        start = time.perf_counter()
        subprocess.run([python, "-c", "import jaxembed.embedder"], check=True, cwd="/")
        importing = time.perf_counter() - start
    about = json.loads(done.stdout)
    if about["found"]:
        sys.exit(f"error: the base install brings {', '.join(about['found'])}")
    sizes = {name: count for name, count in about["sizes"].items() if name.split()[0] not in ("pip", "setuptools")}
    source = "with pip's cache" if arguments.cached else "without pip's cache"
    largest = sorted(sizes, key=lambda name: -sizes[name])[: arguments.largest]
    rest = sum(sizes.values()) - sum(sizes[name] for name in largest)
    rows = [{"package": name, "MB": f"{sizes[name] / 1e6:,.0f}"} for name in largest]
    rows.append({"package": f"{len(sizes) - len(largest)} others", "MB": f"{rest / 1e6:,.0f}"})
    print(f"{machine()}\n`{' '.join(['python benchmarks/install.py', *sys.argv[1:]])}`\n")
    print(
        f"{len(sizes)} packages, {total / 1e6:,.0f} MB with compiled bytecode, in {seconds:.0f} s ({source}); "
        f"neither {' nor '.join(ABSENT)}. `import jaxembed.embedder` takes {importing:.1f} s the first time.\n"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
