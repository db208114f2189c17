"""A plan as one page, and as JSON."""

import dataclasses
from typing import Any

from jaxembed.planning.chips import GIB
from jaxembed.planning.compiled import Compiled
from jaxembed.planning.plan import Change, Plan

CORRECTIONS = (
    "FLOPs are counted in the traced program, for the compiler's cost_analysis() counts the body of a loop once",
    "attention in Pallas kernels, which neither counts, is added by formula",
    "memory is the sum of all kinds: the compiler's own peak leaves out what is not alive at the same moment",
    "a bound is what peaks allow: real steps take longer, by how much only a TPU can tell",
)


def page(plan: Plan, price: float | None = None) -> str:
    """The page that `python -m jaxembed.plan` prints.

    Args:
        price: of a chip-hour.
    """
    lines = [_title(plan), "", *_memory(plan)]
    if plan.changes:
        lines += ["", *_changes(plan)]
    lines += ["", *_work(plan)]
    if plan.compiled.fits:
        lines += ["", *_moved(plan), "", *_bounds(plan, price)]
    return "\n".join([*lines, "", *(f"note: {text}" for text in CORRECTIONS)])


def as_dict(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """The plan for machines. Bytes are of each device, FLOPs of all of them, seconds of one step."""
    compiled, load, bounds = plan.compiled, plan.load, plan.bounds
    hours = plan.chip_hours_of_epoch if compiled.fits else None
    return {
        "config": plan.inputs.path,
        "overrides": list(plan.inputs.overrides),
        "work": plan.work,
        "topology": {
            "name": plan.topology.name,
            "layout": f"{plan.topology.generation}:{plan.topology.layout}",
            "chips": plan.topology.chips,
            "devices": plan.topology.devices,
        },
        "mesh": plan.mesh,
        "model": {
            "layers": plan.shape.layers,
            "dim": plan.shape.dim,
            "heads": plan.shape.heads,
            "vocab_size": plan.shape.vocab_size,
            "trainable": plan.trainable,
            "trained": plan.trained,
            "frozen": plan.frozen,
            "attention_kernel": plan.kernel,
            "compute_dtype": plan.dtype,
        },
        "batch": {**dataclasses.asdict(load), "density": load.density},
        "memory": {
            "limit": _limit(plan),
            "fits": compiled.fits,
            "formula": {**dataclasses.asdict(plan.memory), "total": plan.memory.total},
            "compiled": {
                "arguments": compiled.arguments,
                "results": compiled.results,
                "temporary": compiled.temporary,
                "code": compiled.code,
                "total": compiled.total,
            }
            if compiled.fits
            else None,
            "needed_gib": compiled.needed,
            "refused": compiled.refused,
        },
        "compile_seconds": compiled.seconds,
        "changes": [
            {
                "overrides": list(change.overrides),
                "formula_total": change.estimate,
                "fits": None if change.compiled is None else change.compiled.fits,
                "total": change.compiled.total if change.compiled is not None and change.compiled.fits else None,
            }
            for change in plan.changes
        ],
        "flops": {
            "traced": plan.flops.total,
            "products": plan.flops.products,
            "kernels": plan.flops.kernels,
            "useful": plan.useful.total,
        },
        "collectives": [dataclasses.asdict(moved) for moved in compiled.moved],
        "bounds": {**dataclasses.asdict(bounds), "step": bounds.largest, "limit": bounds.limit}
        if compiled.fits
        else None,
        "texts_per_second": plan.texts_a_second if compiled.fits else None,
        "chip_hours_per_epoch": hours,
        "price_per_epoch": None if hours is None or price is None else hours * price,
        "notes": list(CORRECTIONS),
    }


def _title(plan: Plan) -> str:
    shape = " × ".join(f"{name} {size}" for name, size in plan.mesh.items())
    what = (
        f"{plan.trained:,} parameters train, {plan.frozen:,} are frozen"
        if plan.work == "training"
        else (f"encoding, {plan.frozen:,} parameters")
    )
    return (
        f"{plan.inputs.path} on {plan.topology}\n"
        f"{plan.shape.layers} layers of {plan.shape.dim}: {what}; {plan.dtype}, attention {plan.kernel}; mesh {shape}"
    )


def _limit(plan: Plan) -> float:
    return plan.compiled.limit or plan.chip.device_memory


def _memory(plan: Plan) -> list[str]:
    compiled, memory, limit = plan.compiled, plan.memory, _limit(plan)
    each = "device (half a chip)" if plan.topology.devices_of_chip > 1 else "chip"
    rows = [
        ("parameters that train", memory.trained),
        ("frozen parameters", memory.frozen),
        ("optimiser", memory.optimizer),
        ("batch", memory.batch),
        ("gradients, by formula", memory.gradients),
        ("activations, by formula", memory.activations),
    ]
    if compiled.fits:
        rows[-1] = ("activations and all else that is temporary", max(0, compiled.temporary - memory.gradients))
        rows += [("code", compiled.code), ("compiled, in all", compiled.total)]
    rows.append(("formula, in all", memory.total))
    lines = [f"memory of each {each}, GiB; the compiler allows {limit:.2f}"]
    lines += [f"  {name:44}{size / GIB:9.3f}" for name, size in rows if size]
    if compiled.fits:
        lines.append(f"fits: {compiled.total / GIB:.2f} of {limit:.2f} GiB; compiled in {compiled.seconds:.0f} s")
    else:
        said = " ".join(compiled.refused.split())[:200]  # of another memory, such as that inside of a core
        if compiled.needed is not None:
            said = f"the compiler needs {compiled.needed:.2f} of {limit:.2f} GiB"
        lines.append(f"does not fit: {said}")
    return lines


def _changes(plan: Plan) -> list[str]:
    def said(change: Change) -> str:
        found: Compiled | None = change.compiled
        if found is None:
            return f"{change.estimate / GIB:.2f} GiB by the formula, not compiled"
        if found.fits:
            return f"fits: {found.total / GIB:.2f} GiB compiled"
        return f"{change.estimate / GIB:.2f} GiB by the formula, but the compiler refuses it"

    return ["the smallest changes that make it fit", *(f"  {' '.join(c.overrides)}: {said(c)}" for c in plan.changes)]


def _work(plan: Plan) -> list[str]:
    load, chips, flops = plan.load, plan.topology.chips, plan.flops
    useful = plan.useful.total
    each = "step" if plan.work == "training" else "call"
    inside = f", {flops.kernels / flops.total:.0%} in attention kernels, by formula" if flops.kernels else ""
    return [
        f"a {each}: {load.texts:,.0f} texts, {load.tokens:,.0f} tokens in {load.rows}: density {load.density:.2f}",
        f"  compiled shapes: {load.shapes}; lengths of texts: {load.source}",
        f"  FLOPs by the program {flops.total / 1e12:,.2f} T, {flops.total / chips / 1e12:,.2f} T a chip{inside}",
        f"  FLOPs of the tokens by formula {useful / 1e12:,.2f} T, {useful / flops.total:.0%} of those",
        "  (the rest is padding, computing again, and masked parts of attention)",
    ]


def _moved(plan: Plan) -> list[str]:
    rows = sorted(plan.compiled.moved, key=lambda moved: -moved.wire_bytes)
    if not rows:
        return ["nothing moves between devices"]
    lines = ["moves between devices, MB that each sends in a step (results in brackets)"]
    for moved in rows:
        if moved.wire_bytes < 1e3:
            continue
        where = "in loops" if moved.in_loop else "outside of loops"
        axes = " × ".join(moved.axes) or "-"
        lines.append(
            f"  {moved.kind:20} {moved.dtype:5} {axes:14} {moved.wire_bytes / 1e6:12,.2f} ({moved.bytes / 1e6:,.2f}), "
            f"{moved.times} times, {where}"
        )
    return lines


def _bounds(plan: Plan, price: float | None) -> list[str]:
    bounds, load = plan.bounds, plan.load
    each = "step" if plan.work == "training" else "call"
    peak = plan.chip.flops * plan.topology.chips
    parts = ", ".join(f"{name} {getattr(bounds, name) * 1e3:,.2f}" for name in ("compute", "memory", "links"))
    utilisation = plan.useful.total / (bounds.largest * load.usual_share * peak)
    lines = [
        f"a {each} takes at least {bounds.largest * 1e3:,.2f} ms, by {bounds.limit} ({parts} ms)",
        f"  at that bound {plan.texts_a_second:,.0f} texts/s, {utilisation:.0%} of the peak on real tokens",
    ]
    hours = plan.chip_hours_of_epoch
    if hours is not None:
        cost = "; --price P gives its cost" if price is None else f", at {price:g} a chip-hour {hours * price:,.2f}"
        lines.append(f"  an epoch of {load.steps_of_epoch:,.0f} {each}s: at least {hours:,.2f} chip-hours{cost}")
    else:
        lines.append("  --examples N gives the chip-hours of an epoch")
    return lines
