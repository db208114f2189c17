"""The processes of a run, usually one a host: how they begin, compare what they have, and end together.

The engine is `jax.distributed`. Where a process does not turn up, or is gone, it ends the others after a time-out by an
abort in C++; so they are connected by a line of their own too (`jaxembed.host_line`). What costs the devices nothing
goes over that line: strings that are compared, the step after which all stop, and why a run ends. On one process
everything here is trivial.
"""

import contextlib
import json
import logging
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import fsspec.config
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from jaxembed.config import DistributedConfig
from jaxembed.errors import InputError, explanation
from jaxembed.host_line import Line, Place, connect, exit_now

logger = logging.getLogger(__name__)

# gcsfs would go by what a folder held when it last looked, whatever other processes, and TensorStore, wrote since then.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)

_SILENCE = 100  # seconds after which JAX takes a process that is there, but sends nothing, for dead
_GATHERED_BYTES = 256 << 20  # of an array, on every device at once
_SHOWN = 200  # characters of a value in a message

_line: Line | None = None


class _SharedError(InputError):
    """One that every process raises, with the same words."""


def count() -> int:
    """How many processes there are."""
    return 1 if _line is None else len(_line.names)


def is_main() -> bool:
    """Whether this is process 0, which alone writes logs, and files that all share."""
    return _line is None or _line.process == 0


@contextlib.contextmanager
def together(section: DistributedConfig) -> Iterator[None]:
    """The run of all processes that the section, or the cluster, names: they begin by `initialize`, and end together.

    Where there are several and one fails, by an exception or by being killed, each prints why and ends at once, with
    exit status 2 for an `InputError`, else 1 (130 for Ctrl-C): JAX would wait for those that are gone.

    Raises:
        InputError: as `initialize`.
    """
    initialize(section)
    try:
        yield
    except BaseException as error:
        if _line is None:
            raise
        _fail(error)
    _finish()


def initialize(section: DistributedConfig) -> None:
    """Starts `jax.distributed` where there are several processes; before anything asks JAX for its devices.

    What the section leaves out is taken from the cluster that JAX recognises: Cloud TPU, GKE, SLURM, Open MPI. Without
    one there is one process.

    Raises:
        InputError: a process did not turn up in time, or processes were started with different numbers; names them.
    """
    global _line
    if _line is not None:
        return
    found = _place(section)
    if found is None:
        return
    if jax.distributed.is_initialized():
        raise InputError("distributed: jax.distributed has been initialised already; leave that to jaxembed")
    place, local_devices = found
    _line = connect(place, section.timeout)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        local_device_ids=local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=section.timeout,
        heartbeat_timeout_seconds=min(section.timeout, _SILENCE),
        shutdown_timeout_seconds=section.timeout,
    )


def barrier(name: str) -> None:
    """Returns when all processes are here. A process may be waited for as long as it lives."""
    gather(name, "")


def gather(name: str, value: str) -> list[str]:
    """The value of every process, by its number; a barrier too."""
    return [value] if _line is None else _line.gather(name, value)


def broadcast(name: str, value: str) -> str:
    """Process 0's value."""
    return gather(name, value if is_main() else "")[0]


def anyone(name: str, value: bool) -> bool:
    """Whether it is true of any process."""
    return "1" in gather(name, "1" if value else "")


def agree(name: str, values: str | Mapping[str, str]) -> None:
    """Compares a value, or several by their keys, across processes.

    Raises:
        InputError: on every process, where they differ; names the process that does, its host, and both values.
    """
    given = {"": values} if isinstance(values, str) else dict(values)
    everyone = [json.loads(found) for found in gather(name, json.dumps(given))]
    differences = []
    for key in dict.fromkeys(key for found in everyone for key in found):
        held = [found.get(key) for found in everyone]
        common = Counter(held).most_common(1)[0][0]  # of equally many, that of the lowest process
        odd = [number for number, one in enumerate(held) if one != common]
        if odd:
            who, others = ", ".join(map(process_name, odd)), "process 0" if count() == 2 else "the others"
            of = f"{key} " if key else ""
            differences.append(f"{who} has {of}{_shown(held[odd[0]])}, {others} {_shown(common)}")
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise _SharedError(f"{name} differs between hosts: {'; '.join(differences[:3])}{more}")


def process_name(process: int) -> str:
    """A process and its host, for messages."""
    return f"process {process}" if _line is None else _line.names[process]


def check_shared(directory: epath.Path, key: str) -> None:
    """Makes a directory, and refuses one that cannot be written, or that other processes do not see as process 0 does.

    Args:
        key: of the config, for the message.

    Raises:
        InputError: on every process; names the hosts.
    """
    name = broadcast("probe", uuid.uuid4().hex)
    probe, failure = directory / f".probe-{name}", ""
    if is_main():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            probe.write_text(name)
        except OSError as error:
            failure = f"{key}: cannot make the directory {directory}, or not write there: {error}"
    if failure := broadcast("probe written", failure):
        raise _SharedError(failure)
    seen = gather("probe seen", "1" if probe.exists() else "")
    if is_main():
        probe.unlink(missing_ok=True)
    if blind := [process_name(process) for process, found in enumerate(seen) if not found]:
        raise _SharedError(
            f"{key}: {directory} has to be one place for all processes, in a bucket or on a shared disk, for all of "
            f"them write there; what {process_name(0)} wrote there is not seen by {', '.join(blind)}"
        )


def stop_after(step: int, wanted: bool) -> bool:
    """Whether all processes end after this step, because one of them wanted it here or at an earlier step.

    To be asked by each after every step. When a process wants it, each tells up to which step it has been asked, and
    all end after the one that follows the highest. Nothing is sent before, and no device is waited for.
    """
    return wanted if _line is None else _line.stop_after(step, wanted)


def end_all(text: str) -> None:
    """Has the other processes print the text and exit with 0, whatever they are at; this one has to end next."""
    if _line is not None:
        _line.end(text, 0)


def compiled_together(function: Any) -> Any:
    """A jitted function that begins, with arguments of new shapes, when every process has compiled it.

    Collectives between CPUs give up after 30 s, which is less than the processes of one machine may differ by.
    """
    if count() == 1:
        return function
    known = set()

    def call(*arguments: Any) -> Any:
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments))
        if shapes not in known:
            function.lower(*arguments).compile()
            barrier("compiled")
            known.add(shapes)
        return function(*arguments)

    return call


def put(value: Any, sharding: Any) -> jax.Array:
    """A global array from one that every process holds whole, or that is global already."""
    if sharding.is_fully_addressable or (isinstance(value, jax.Array) and not value.is_fully_addressable):
        return jax.device_put(value, sharding)
    held = np.asarray(value)
    return jax.make_array_from_callback(held.shape, sharding, lambda index: held[index])


def put_tree(tree: Any, shardings: Any) -> Any:
    """`put` of every array of a tree."""
    return jax.device_put(tree, shardings) if count() == 1 else jax.tree.map(put, tree, shardings)


def to_host(array: Any) -> np.ndarray:
    """The whole of an array in this process's memory; every process has to ask for it.

    Parts that lie on other hosts come by way of the devices, at most 256 MiB at once on each.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    sharding: Any = array.sharding
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    split = [*sharding.spec, *[None] * (array.ndim - len(sharding.spec))]
    axis = next((axis for axis, names in enumerate(split) if names is None), None)
    if array.nbytes <= _GATHERED_BYTES or axis is None:
        return np.asarray(jax.jit(lambda x: x, out_shardings=everywhere)(array))
    size = array.shape[axis]
    step = max(1, size * _GATHERED_BYTES // array.nbytes)
    cut = jax.jit(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, step, axis), out_shardings=everywhere)
    whole = np.empty(array.shape, array.dtype)
    for start in range(0, size, step):
        start = min(start, size - step)
        whole[(slice(None),) * axis + (slice(start, start + step),)] = cut(array, jnp.int32(start))
    return whole


def _place(section: DistributedConfig) -> tuple[Place, Any] | None:
    """Which process this is, and the devices it may use (None: all), from section and cluster; None for one process."""
    given = section.coordinator, section.num_processes, section.process_id
    if section.num_processes == 1:
        return None
    found = (*given, None)
    if None in given:
        # JAX has no public way to ask for the cluster, other than to start, which aborts where it fails.
        from jax._src.clusters import ClusterEnv

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Kubernetes, without the package that asks it
                found = ClusterEnv.auto_detect_unset_distributed_params(*given, None, None, section.timeout)
        except Exception as error:
            if given != (None, None, None):
                raise InputError(f"distributed: the cluster does not say what is left out: {error}") from error
            logger.warning("a cluster is here, but does not say which processes; this one is alone: %s", error)
            return None
    coordinator, processes, process, devices = found
    if processes == 1 or (coordinator, processes, process) == (None, None, None):
        return None
    named = {"coordinator": coordinator, "num_processes": processes, "process_id": process}
    missing = [f"distributed.{name}" for name, value in named.items() if value is None]
    if coordinator is None or processes is None or process is None:
        raise InputError(f"{', '.join(missing)}: not given, and no cluster is recognised that would say it")
    if process >= processes:
        raise InputError(f"distributed.process_id: {process}, but {processes} processes count from 0")
    return Place(coordinator, processes, process), devices


def _fail(error: BaseException) -> NoReturn:
    """Prints why this process failed, has the others end, and ends."""
    assert _line is not None
    explained = ("interrupted", 130) if isinstance(error, KeyboardInterrupt) else explanation(error)
    if explained is None:
        time.sleep(2)  # where it failed because another process is gone, the line ends this one, with a better message
        traceback.print_exception(error)
        explained = f"{type(error).__name__}: {error}", 1
    text, status = explained
    if not _line.claim_end():
        threading.Event().wait()  # for the end
    print(f"error: {text}", file=sys.stderr)
    _line.end(text if isinstance(error, _SharedError) else f"{process_name(_line.process)}: {text}", status)
    exit_now(status)


def _finish() -> None:
    global _line
    if _line is None:
        return
    if _line.ended:
        exit_now(0)
    _line.close()
    jax.distributed.shutdown()
    _line = None


def _shown(value: str | None) -> str:
    if value is None:
        return "none"
    return value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…"
