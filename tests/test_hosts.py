"""Which processes there are, by config and cluster; and that on one process nothing is in the way."""

import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from pydantic import ValidationError

from jaxembed import hosts
from jaxembed.config import DistributedConfig
from jaxembed.errors import InputError
from jaxembed.host_line import Place
from jaxembed.sharding import chips_of_process, make_mesh

from runs import on_two_processes

HOST = socket.gethostname()
CLUSTERS = ("SLURM", "OMPI", "JAX", "TPU", "KUBERNETES", "MEGASCALE")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    import os

    for name in os.environ:
        if name.startswith(CLUSTERS) and name != "JAX_PLATFORMS":
            monkeypatch.delenv(name)


def test_nothing_given_is_one_process():
    assert hosts._place(DistributedConfig()) is None
    hosts.initialize(DistributedConfig())
    assert not jax.distributed.is_initialized()
    assert (hosts.count(), hosts.is_main()) == (1, True)
    assert hosts._place(DistributedConfig(num_processes=1, coordinator="a:1", process_id=0)) is None


def test_all_given():
    section = DistributedConfig(coordinator="10.0.0.1:8476", num_processes=4, process_id=3)
    assert hosts._place(section) == (Place("10.0.0.1:8476", 4, 3), None)
    assert Place("10.0.0.1:8476", 4, 3).address == ("10.0.0.1", 8476)
    assert Place("[::1]:8476", 4, 3).address == ("::1", 8476)


def test_slurm_says_the_rest(monkeypatch):
    found = {"JOB_ID": "5000", "STEP_NODELIST": "node[07-10],other", "NTASKS": "4", "PROCID": "2", "LOCALID": "1"}
    for name, value in found.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    place, devices = hosts._place(DistributedConfig())
    assert (place.processes, place.process, devices) == (4, 2, [1])
    assert place.coordinator.startswith("node07:")
    place, _ = hosts._place(DistributedConfig(coordinator="node07:9000"))
    assert place == Place("node07:9000", 4, 2)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert hosts._place(DistributedConfig()) is None


def test_a_cluster_that_does_not_say_is_no_cluster(monkeypatch, caplog):
    for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID"):
        monkeypatch.setenv(f"SLURM_{name}", "nonsense")
    assert hosts._place(DistributedConfig()) is None
    assert "a cluster is here, but does not say which processes" in caplog.text
    with pytest.raises(InputError, match="the cluster does not say what is left out"):
        hosts._place(DistributedConfig(coordinator="a:1"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "a:1"}, "distributed.num_processes, distributed.process_id: not given"),
        ({"num_processes": 2, "process_id": 0}, "distributed.coordinator: not given"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id: 2, but 2 processes count from 0"),
    ],
)
def test_what_is_missing_is_named(given, message):
    with pytest.raises(InputError, match=message):
        hosts._place(DistributedConfig(**given))


@pytest.mark.parametrize("coordinator", ["node07", "node07:", ":80", "a b:1"])
def test_addresses_have_a_port(coordinator):
    with pytest.raises(ValidationError, match="HOST:PORT"):
        DistributedConfig(coordinator=coordinator)


class Told:
    """A line whose other process has said something."""

    process = 0
    names = ("process 0 (host a)", "process 1 (host b)", "process 2 (host c)")

    def __init__(self, *others):
        self.others = others

    def gather(self, name, value):
        return [value, *(value if other is None else other for other in self.others)]


def test_agreement_names_who_differs(monkeypatch):
    monkeypatch.setattr(hosts, "_line", Told(None, None))
    hosts.agree("the plan", "abc")
    monkeypatch.setattr(hosts, "_line", Told(None, '{"": "abd"}'))
    with pytest.raises(InputError) as error:
        hosts.agree("the plan", "abc")
    assert str(error.value) == ("the plan differs between hosts: process 2 (host c) has abd, the others abc")
    monkeypatch.setattr(hosts, "_line", Told('{"jax": "2", "flax": "1"}', '{"jax": "2"}'))
    with pytest.raises(InputError) as error:
        hosts.agree("the software", {"jax": "1", "flax": "1"})
    assert str(error.value) == (
        "the software differs between hosts: process 0 (host a) has jax 1, the others 2; "
        "process 2 (host c) has flax none, the others 1"
    )


FAILING = """
import sys, time
from jaxembed import hosts
from jaxembed.config import DistributedConfig

what, late, number, port = sys.argv[1], *map(int, sys.argv[2:])
if number == late:
    fail = hosts._fail
    hosts._fail = lambda error: (time.sleep(2), fail(error))
with hosts.together(DistributedConfig(coordinator=f"localhost:{port}", num_processes=2, process_id=number)):
    if what == "plan":
        hosts.agree("the plan", str(number))
    if number == 1:
        raise PermissionError(13, "Permission denied", "a.jsonl")
    hosts.barrier("the end")
"""


@pytest.mark.parametrize("late", [0, 1])
def test_an_error_of_all_is_said_once_whoever_is_first(late):
    for said in on_two_processes(FAILING, "plan", late, status=2):
        assert said.splitlines() == [
            f"error: the plan differs between hosts: process 1 (host {HOST}) has 1, process 0 0"
        ]


def test_a_file_that_one_process_may_not_read():
    reason = "[Errno 13] Permission denied: 'a.jsonl'"
    told, own = on_two_processes(FAILING, "file", -1, status=2)
    assert told.splitlines() == [f"error: process 1 (host {HOST}): {reason}"]
    assert own.splitlines() == [f"error: {reason}"]


def test_one_process_agrees_with_itself(tmp_path, monkeypatch):
    assert hosts.gather("a", "b") == ["b"]
    assert hosts.broadcast("a", "b") == "b"
    assert [hosts.anyone("a", value) for value in (False, True)] == [False, True]
    assert [hosts.stop_after(1, value) for value in (False, True)] == [False, True]
    hosts.agree("a", {"b": "c"})
    hosts.barrier("a")
    hosts.end_all("a")
    assert hosts.compiled_together(len) is len
    with hosts.together(DistributedConfig()):
        pass
    with pytest.raises(KeyError), hosts.together(DistributedConfig()):
        raise KeyError
    hosts.check_shared(epath.Path(tmp_path / "run"), "run_dir")
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]
    assert not list((tmp_path / "run").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="run_dir: cannot make the directory"):
        hosts.check_shared(epath.Path(tmp_path / "file" / "run"), "run_dir")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_text", refuse)
    with pytest.raises(InputError, match=r"run_dir: cannot .* not write there: .*Permission denied"):
        hosts.check_shared(epath.Path(tmp_path / "run"), "run_dir")


def test_arrays_go_to_the_devices_and_back():
    mesh = make_mesh(2, 4)
    held = np.arange(24, dtype=np.float32).reshape(8, 3)
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    for value in (held, jnp.asarray(held), hosts.put(held, split)):
        array = hosts.put(value, split)
        assert array.sharding == split
        np.testing.assert_array_equal(hosts.to_host(array), held)
    tree = hosts.put_tree({"a": held}, {"a": split})
    assert tree["a"].sharding == split
    np.testing.assert_array_equal(hosts.to_host(held), held)
    assert chips_of_process(mesh) == tuple(range(8))
    assert chips_of_process(make_mesh(2, 2, 2)) == tuple(range(4))
