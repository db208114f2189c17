"""What the four udever sizes need on TPU slices, from `jaxembed.plan`: writes the tables of docs/scaling.md.

Each entry compiles one training step for one slice, which takes a minute or two on an idle machine of two cores and
much longer on a busy one. What is found is kept in benchmarks/results/scaling.json entry by entry, so that the table
can be filled in pieces and a stopped run goes on; the docs page shows the entries that are there.
"""

import argparse
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from common import table

os.environ.setdefault("JAX_PLATFORMS", "cpu")

ROOT = Path(__file__).parents[1]
DOCS, RESULTS = ROOT / "docs" / "scaling.md", Path(__file__).parent / "results" / "scaling.json"

SIZES = ("560m", "1b1", "3b", "7b1")
TOPOLOGIES = ("v5e-8", "v5e-64", "v5p-8", "v5p-64", "v6e-8", "tpu7x:2x2x1")
WORK = ("full", "bitfit")
FIRST = (
    ("560m", "v5e-8", "full"),
    ("560m", "v5e-8", "bitfit"),
    ("7b1", "v5e-8", "bitfit"),
    ("7b1", "v5p-64", "full"),
    ("1b1", "v5e-8", "full"),
    ("3b", "v5e-8", "full"),
)
"""The entries that tell most."""

LENGTHS = "60,300"
"""Tokens of a text on average and at most: passages of MS MARCO and sentences of AllNLI, cut at 300."""

_ROOM = 0.88  # of the memory that the estimate may fill
_DENSITY = 0.85  # share of computed positions that hold a token, at least


def entries() -> list[tuple[str, str, str]]:
    everything = [(size, topology, work) for size in SIZES for topology in TOPOLOGIES for work in WORK]
    return [*FIRST, *(entry for entry in everything if entry not in FIRST)]


def chosen_overrides(size: str, topology: Any, work: str) -> tuple[str, ...]:
    """`fsdp` so that what a step keeps fills at most a third of the memory, and the most rows a chunk that then fit and
    that the texts fill.

    Both by the memory formula, from traced steps: nothing is compiled.
    """
    from jaxembed.planning.chips import CHIPS, GIB

    limit = CHIPS[topology.generation].device_memory * GIB
    parameters = {"560m": 0.56e9, "1b1": 1.07e9, "3b": 3.0e9, "7b1": 7.07e9}[size]
    kept = parameters * (16 if work == "full" else 4 if size in ("560m", "1b1") else 2)
    fsdp = 1
    while fsdp < topology.devices and kept / fsdp > limit / 3:
        fsdp *= 2
    given = ("--training.trainable", work, "--mesh.data", "-1", "--mesh.fsdp", str(fsdp))

    def estimated(rows: int) -> Any:
        overrides = (*given, "--training.chunk_rows", str(rows))
        return traced(size, topology, overrides)

    rows = 8
    found = estimated(rows).memory
    room = max(0.0, _ROOM * limit - found.arguments - found.gradients)
    while rows > 1 and found.activations * rows / 8 > room:
        rows //= 2
    while rows < 64 and found.activations * rows * 2 / 8 < room:
        rows *= 2
    while rows > 1 and ((step := estimated(rows)).memory.total > _ROOM * limit or step.workload.density < _DENSITY):
        rows //= 2
    return (*given, "--training.chunk_rows", str(rows))


def inputs(size: str, topology: Any, overrides: tuple[str, ...]) -> Any:
    from jaxembed.planning.plan import Inputs
    from jaxembed.planning.workload import parse_lengths

    path = ROOT / "configs" / f"udever-bloom-{size}.yaml"
    return Inputs(str(path.relative_to(ROOT)), overrides, topology, parse_lengths(LENGTHS))


def traced(size: str, topology: Any, overrides: tuple[str, ...]) -> Any:
    from jaxembed.planning.plan import TracedTraining

    return TracedTraining.of(inputs(size, topology, overrides))


def compile_entry(size: str, name: str, work: str) -> dict[str, Any]:
    from jaxembed.planning.plan import plan_training
    from jaxembed.planning.report import as_dict
    from jaxembed.planning.topologies import find_topology

    topology = find_topology(name)
    overrides = chosen_overrides(size, topology, work)
    while True:
        print(f"{size} {name} {work}: {' '.join(overrides)}", flush=True)
        plan = plan_training(inputs(size, topology, overrides), compile_changes=0)
        rows = int(overrides[-1])
        if plan.compiled.fits or rows == 1:
            found = as_dict(plan)
            del found["notes"]
            return {"size": size, "slice": name, "work": work, "date": time.strftime("%Y-%m-%d"), "plan": found}
        overrides = (*overrides[:-1], str(rows // 2))


def scaling(chips: tuple[int, ...]) -> list[dict[str, Any]]:
    """One step of 560m, BitFit, of 16,384 pairs (49,152 texts), on more and more v5e chips: traced, not compiled."""
    from jaxembed.planning.chips import GIB
    from jaxembed.planning.topologies import find_topology

    rows = []
    for count in chips:
        overrides = ("--training.batch_size", "16384", "--training.chunk_rows", "8", "--mesh.fsdp", str(min(count, 8)))
        found = traced("560m", find_topology(f"v5e-{count}"), overrides)
        rows.append(
            {
                "chips": count,
                "TFLOP a chip": found.flops.total / count / 1e12,
                "density": f"{found.workload.density:.3f}",
                "TFLOP a chip × density × chips": found.flops.total * found.workload.density / 1e12,
                "memory a chip by formula, GiB": found.memory.total / GIB,
            }
        )
        print(rows[-1], flush=True)
    return rows


def plan_row(entry: dict[str, Any]) -> dict[str, object]:
    from jaxembed.planning.chips import GIB

    plan = entry["plan"]
    mesh, memory = plan["mesh"], plan["memory"]
    options = dict(zip(plan["overrides"][::2], plan["overrides"][1::2]))
    fits, bounds = memory["fits"], plan["bounds"]
    taken = memory["compiled"]["total"] / GIB if fits else memory["needed_gib"] or float("nan")
    return {
        "model": f"bloom-{entry['size']}",
        "trains": entry["work"],
        "slice": entry["slice"],
        "chips": plan["topology"]["chips"],
        "mesh data × fsdp": f"{mesh['data']} × {mesh['fsdp']}",
        "rows a chunk": options["--training.chunk_rows"],
        "fits": "yes" if fits else "no",
        "GiB a device, of allowed": f"{taken:.2f} of {memory['limit']:.2f}",
        "GiB by formula": f"{memory['formula']['total'] / GIB:.2f}",
        "density": f"{plan['batch']['density']:.2f}",
        "TFLOP a chip": f"{plan['flops']['traced'] / plan['topology']['chips'] / 1e12:.1f}",
        "ms a step, at least": f"{bounds['step'] * 1e3:.0f} ({bounds['limit']})" if fits else "–",
        "texts/s, at most": f"{plan['texts_per_second']:,.0f}" if fits else "–",
        "compiled in": f"{plan['compile_seconds']:.0f} s",
    }


def replace_between(text: str, name: str, content: str) -> str:
    """The text with what stands between the markers of this name replaced."""
    begin, end = f"<!-- {name}: benchmarks/scaling.py -->", f"<!-- end {name} -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    if not rest or end not in rest:
        raise SystemExit(f"{DOCS}: expected {begin} … {end}")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def found_so_far() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"plans": {}, "chips": []}


def write_docs(known: dict[str, Any]) -> None:
    text = DOCS.read_text()
    order = [" ".join(entry) for entry in entries()]
    found = [known["plans"][key] for key in sorted(known["plans"], key=order.index)]
    missing = len(order) - len(found)
    plans = table([plan_row(entry) for entry in found]) if found else "(none yet)"
    if missing:
        plans += f"\n\n{missing} of {len(order)} entries have not been compiled yet."
    text = replace_between(text, "plans", plans)
    text = replace_between(text, "chips", table(known["chips"]) if known["chips"] else "(none yet)")
    DOCS.write_text(text)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--only", nargs="*", default=[], metavar="WORD", help="entries with all of these: 560m v5e-8 full"
    )
    options.add_argument("--most", type=int, help="entries to compile (default: all that are missing)")
    options.add_argument("--again", action="store_true", help="compile entries that are there too")
    options.add_argument(
        "--chips", action="store_true", help="write the figures over the number of chips, nothing else"
    )
    arguments = options.parse_args()
    logging.basicConfig(level=logging.WARNING)
    os.chdir(ROOT)
    known = found_so_far()

    def keep(key: str, value: Any) -> None:
        """Beside what another run of this script may have found meanwhile."""
        known.update(found_so_far())
        known[key] = {**known[key], **value} if isinstance(value, dict) else value
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        write_docs(known)

    if arguments.chips:
        keep("chips", scaling((1, 8, 16, 32, 64, 128, 256)))
        return
    wanted = [entry for entry in entries() if all(word in entry for word in arguments.only)]
    wanted = [entry for entry in wanted if arguments.again or " ".join(entry) not in known["plans"]]
    for entry in wanted[: arguments.most]:
        keep("plans", {" ".join(entry): compile_entry(*entry)})
    keep("plans", {})


if __name__ == "__main__":
    main()
