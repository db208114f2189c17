"""How processes find each other and speak: here each is a thread, with a line of its own."""

import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxembed import host_line
from jaxembed.errors import InputError
from jaxembed.host_line import Line, Place, connect

from runs import free_port


@pytest.fixture
def left(monkeypatch):
    """The exit statuses of those that left; for each its connections are closed, as the end of a process does."""
    statuses = []

    def end_process(line, text, status, origin):
        with pytest.raises(SystemExit):
            original(line, text, status, origin)
        line.hang_up()
        statuses.append(status)

    original = Line._end_process
    monkeypatch.setattr(Line, "_end_process", end_process)
    monkeypatch.setattr(host_line, "exit_now", sys.exit)
    return statuses


def in_threads(*calls):
    """Results, or what was raised."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.exception() or future.result() for future in futures]


def connected(count):
    port = free_port()
    places = [Place(f"localhost:{port}", count, number) for number in range(count)]
    return in_threads(*(lambda place=place: connect(place, 20) for place in places))


def close(lines):
    assert in_threads(*(line.close for line in lines)) == [None] * len(lines)


def test_all_hear_what_each_says():
    lines = connected(3)
    assert [line.process for line in lines] == [0, 1, 2]
    host = socket.gethostname()
    assert lines[2].names == [f"process {number} (host {host})" for number in range(3)]

    def talk(line):
        if line.process == 1:
            time.sleep(0.05)
        return line.gather("first", f"I am {line.process}"), line.gather("second", "ä" * 100_000)[2][:2]

    heard = in_threads(*(lambda line=line: talk(line) for line in lines))
    assert heard == [(["I am 0", "I am 1", "I am 2"], "ää")] * 3
    close(lines)


def test_all_stop_after_the_same_step():
    lines = connected(3)
    steps = {}
    pace = threading.Barrier(3)  # as collectives do it: nobody is a step ahead for long

    def train(line):
        for step in range(1, 100):
            time.sleep(0.001 * line.process)
            if line.stop_after(step, line.process == 1 and step >= 10):
                steps[line.process] = step
                return
            if step % 3 == 0:
                pace.wait(10)

    assert in_threads(*(lambda line=line: train(line) for line in lines)) == [None] * 3
    assert len(set(steps.values())) == 1
    assert 10 < steps[0] < 99
    close(lines)


def test_a_wish_to_stop_at_the_last_step_stops_nobody():
    lines = connected(2)

    def train(line):
        return [line.stop_after(step, line.process == 1 and step == 5) for step in range(1, 6)]

    first, second = in_threads(*(lambda line=line: train(line) for line in lines))
    assert first[:4] == second[:4] == [False] * 4
    close(lines)


def test_who_did_not_come_is_named_to_all():
    port = free_port()
    places = [Place(f"localhost:{port}", 4, number) for number in (0, 2)]
    found = in_threads(*(lambda place=place: connect(place, 1) for place in places))
    assert [type(error) for error in found] == [InputError] * 2
    message = f"processes 1, 3 of 4 did not turn up at localhost:{port} within 1 s (distributed.timeout)"
    assert [str(error) for error in found] == [message] * 2


def test_process_0_did_not_come():
    port = free_port()
    with pytest.raises(InputError, match=rf"process 0 of 2 did not turn up at localhost:{port} within 1 s"):
        connect(Place(f"localhost:{port}", 2, 1), 1)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (Place("", 3, 1), "num_processes: process 1 (host {host}) was started as one of 3 processes, process 0"),
        (Place("", 2, 0), "cannot listen at"),
        (Place("", 2, 5), "process_id: process 5 (host {host}) came beside 2 processes, which count from 0"),
    ],
)
def test_processes_that_do_not_fit(second, message):
    address = f"localhost:{free_port()}"
    calls = [Place(address, 2, 0), Place(address, second.processes, second.process)]
    errors = in_threads(*(lambda place=place: connect(place, 2) for place in calls))
    assert any(message.format(host=socket.gethostname()) in str(error) for error in errors), errors


def test_strangers_are_no_processes():
    port = free_port()

    def knock():
        for said in (b"GET / HTTP/1.1\r\n\r\n", b'{"jaxembed": 3}\n', b"\n", b""):
            while True:
                try:
                    connection = socket.create_connection(("localhost", port))
                    break
                except OSError:
                    time.sleep(0.01)
            with connection:
                connection.sendall(said)
        return connect(Place(f"localhost:{port}", 2, 1), 10)

    lines = in_threads(lambda: connect(Place(f"localhost:{port}", 2, 0), 20), knock)
    assert [line.process for line in lines] == [0, 1]
    close(lines)


def test_silent_strangers_do_not_prolong_the_roll_call():
    port = free_port()

    def knock():
        time.sleep(0.3)
        with socket.create_connection(("localhost", port)), socket.create_connection(("localhost", port)):
            time.sleep(1.5)

    start = time.monotonic()
    error, _ = in_threads(lambda: connect(Place(f"localhost:{port}", 2, 0), 1), knock)
    assert "process 1 of 2 did not turn up" in str(error)
    assert time.monotonic() - start < 4


def test_a_coordinator_that_is_no_name():
    with pytest.raises(InputError, match=r"distributed\.coordinator: a\.\.b:8476 names no host"):
        connect(Place("a..b:8476", 2, 1), 20)


def test_another_program_is_at_the_port():
    with socket.create_server(("localhost", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")

        place = Place(f"localhost:{server.getsockname()[1]}", 2, 1)
        error, _ = in_threads(lambda: connect(place, 5), answer)
    assert "no process 0 answers at" in str(error)


def test_one_that_is_gone_ends_the_others(left, capfd):
    lines = connected(3)
    lines[1].hang_up()
    wait_until(lambda: len(left) == 2)
    assert left == [1, 1]
    told = capfd.readouterr().err
    assert told.count(f"error: process 1 (host {socket.gethostname()}) is gone: it was killed, or") == 2


def test_one_that_fails_tells_why(left, capfd):
    lines = connected(2)
    lines[1].end("process 1: no such file", 2)
    lines[1].hang_up()
    wait_until(lambda: left)
    assert left == [2]
    assert capfd.readouterr().err == "error: process 1: no such file\n"


def test_processes_that_are_lost_end(left, capfd):
    lines = connected(2)
    for line, name in zip(lines, ("checkpoint", "export")):
        threading.Thread(target=line.gather, args=(name, ""), daemon=True).start()
    wait_until(lambda: len(left) == 2)
    assert "error: the processes are at different places of the run: checkpoint, export" in capfd.readouterr().err


def wait_until(reached):
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_messages_are_lines_of_json():
    first, second = socket.socketpair()
    with first, second:
        host_line._send(first, {"a": "ü\n"})
        first.sendall(b"[1]\n")
        assert host_line._receive(second) == {"a": "ü\n"}
        assert host_line._receive(second) == {}
