"""What the TPU compiler says of a program: memory, what moves, whether it fits; kept by program."""

import dataclasses
import hashlib
import json
import logging
import os
import re
import time
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxembed.errors import InputError
from jaxembed.planning.chips import GIB
from jaxembed.planning.hlo import read_collectives
from jaxembed.planning.topologies import Topology

logger = logging.getLogger(__name__)

CACHE = "~/.cache/jaxembed/plans"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Moved:
    """What one kind of collective moves over some axes of the mesh in a step."""

    kind: str
    axes: tuple[str, ...]
    dtype: str
    in_loop: bool
    times: int
    bytes: int
    """Of results, on each device, in all."""
    wire_bytes: float
    """That each device sends at least, on a ring."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program, or why it was refused. Bytes are of each device."""

    fits: bool
    seconds: float
    """That compiling took, when it was done."""
    arguments: int = 0
    results: int = 0
    """Without those that take the place of arguments."""
    temporary: int = 0
    code: int = 0
    needed: float | None = None
    """GiB, where it does not fit and the compiler says how much it would take."""
    limit: float | None = None
    """GiB that it may take, where the compiler says so."""
    refused: str = ""
    moved: tuple[Moved, ...] = ()

    @property
    def total(self) -> int:
        """The sum of all kinds: the compiler's own peak leaves out what is not alive at the same moment."""
        return self.arguments + self.results + self.temporary + self.code


def compile_program(traced: Any, topology: Topology, mesh: Mesh, directory: str | None = CACHE) -> Compiled:
    """Compiles a traced program, or reads what was found the last time.

    Args:
        mesh: whose axes the collectives are named by.
        directory: of what was found earlier; None: always compiles.

    Raises:
        InputError: the compiler refuses it for another reason than memory.
    """
    lowered = traced.lower()
    folder = None if directory is None else Path(directory).expanduser()
    path = None if folder is None else folder / f"{program_hash(lowered, topology)}.json"
    if path is not None and (known := _read(path)) is not None:
        return known
    logger.info("compiling for %s: a minute or two on an idle machine", topology)
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except Exception as error:
        found = _refusal(str(error), time.perf_counter() - start)
    else:
        found = _found(compiled, mesh, time.perf_counter() - start)
    if path is not None:
        try:
            _write(path, found, topology)
        except OSError as error:
            logger.warning("%s: cannot be kept (%s)", path, error)
    return found


def program_hash(lowered: Any, topology: Topology) -> str:
    """Of a lowered program, the slice that it is for, and the versions of what compiles it."""
    versions = [f"{name} {_version(name)}" for name in ("jax", "jaxlib", "libtpu")]
    digest = hashlib.sha256(json.dumps([_FORMAT, topology.generation, topology.layout, *versions]).encode())
    digest.update(lowered.as_text().encode())
    return digest.hexdigest()[:32]


def _found(compiled: Any, mesh: Mesh, seconds: float) -> Compiled:
    memory = compiled.memory_analysis()
    moved: dict[tuple[Any, ...], list[Any]] = {}
    for each in read_collectives(compiled.as_text()):
        moved.setdefault((each.kind, each.axes(mesh), each.dtype, each.in_loop), []).append(each)
    return Compiled(
        fits=True,
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        moved=tuple(
            Moved(
                *key,
                times=sum(each.times for each in group),
                bytes=sum(each.total_bytes for each in group),
                wire_bytes=sum(each.wire_bytes for each in group),
            )
            for key, group in moved.items()
        ),
    )


def _refusal(text: str, seconds: float) -> Compiled:
    """What an error of the compiler says: too much memory, and how much, or something else.

    Raises:
        InputError: something else.
    """
    if "RESOURCE_EXHAUSTED" not in text:
        raise InputError(f"the TPU compiler refuses the program: {text[:2000]}")
    needed, limit = parse_exhausted(text)
    return Compiled(False, seconds, needed=needed, limit=limit, refused=text.split("\n\n")[0][:500])


def parse_exhausted(text: str) -> tuple[float | None, float | None]:
    """GiB needed and GiB there, from the text of RESOURCE_EXHAUSTED; None where it does not say.

    Wordings: "Used 48.01G of 15.75G hbm", "… required for HLO temporaries (48.00G) exceeds available HBM (15.75G)".
    """
    number = r"([\d.]+)([KMGT])"
    for pattern in (rf"Used {number} of {number}", rf"\({number}\) exceeds available \w+ \({number}\)"):
        if found := re.search(pattern, text):
            return _gib(found[1], found[2]), _gib(found[3], found[4])
    return None, None


def _gib(number: str, unit: str) -> float:
    return float(number) * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[unit] / GIB


def _write(path: Path, found: Compiled, topology: Topology) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(json.dumps({"topology": str(topology), **dataclasses.asdict(found)}, indent=1))
    os.replace(temporary, path)


def _read(path: Path) -> Compiled | None:
    """None where there is nothing, or nothing that can be read: then it is compiled again."""
    try:
        values = json.loads(path.read_text())
        del values["topology"]
        moved = tuple(Moved(**{**each, "axes": tuple(each["axes"])}) for each in values.pop("moved"))
        return Compiled(**values, moved=moved)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s: cannot be read (%s); compiling again", path, error)
        return None


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "-"
