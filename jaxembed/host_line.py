"""Connections of process 0 with all other processes of a run: who is there, who is gone, and what they tell each other.

Before JAX begins, the others call process 0 at the coordinator's port, which JAX's own service takes afterwards. The
connections stay open as long as the processes live. Messages are JSON objects, one a line.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from jaxembed.errors import InputError

_HELLO = "jaxembed"
_FAREWELL = 10  # seconds that process 0 gives the others to end before it does


@dataclasses.dataclass(frozen=True)
class Place:
    """Which of the processes this is."""

    coordinator: str
    """HOST:PORT of process 0."""
    processes: int
    process: int

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def connect(place: Place, timeout: int) -> "Line":
    """Waits until all processes are there.

    Args:
        timeout: in seconds.

    Raises:
        InputError: one did not turn up, or was started as another one, or there is no listening at that port; on every
            process that did turn up, with the same words.
    """
    return _call_roll(place, timeout) if place.process == 0 else _answer_roll(place, timeout)


class Line:
    """The open connections: of process 0 with all others, of each other one with process 0.

    A thread listens to each. Where a connection ends before `close`, or a message says so, the process ends, whatever
    its main thread waits for.
    """

    def __init__(self, process: int, names: list[str], peers: dict[int, socket.socket]) -> None:
        self.process, self.names = process, names
        self.ended = False
        """Whether this process has told the others to end."""
        self._peers, self._open = peers, len(peers)
        self._state, self._sending = threading.Condition(), threading.Lock()
        self._closing = self._leaving = False
        self._asked = 0
        self._said: dict[int, dict[int, tuple[str, str]]] = {}
        self._answers: dict[int, list[str]] = {}
        self._wanted = self._stopping = False
        self._passed = 0
        self._passed_by: dict[int, int] = {}
        self._last_step: int | None = None
        for peer, connection in peers.items():
            threading.Thread(target=self._listen, args=(peer, connection), daemon=True).start()

    def gather(self, name: str, value: str) -> list[str]:
        """The value of every process, when all have called; every process makes the same calls in the same order."""
        with self._state:
            number, self._asked = self._asked, self._asked + 1
        self._tell_main({"say": [number, name, value]})
        with self._state:
            self._state.wait_for(lambda: number in self._answers)
            return self._answers.pop(number)

    def stop_after(self, step: int, wanted: bool) -> bool:
        """See `jaxembed.hosts.stop_after`."""
        if wanted and not self._wanted:
            self._wanted = True
            self._tell_main({"stop": True})
        with self._state:
            if self._stopping:
                self._state.wait_for(lambda: self._last_step is not None)
            if self._last_step is None or step < self._last_step:
                self._passed = step
                return False
            return True

    def claim_end(self) -> bool:
        """Whether this process may say why it ends; not where it is being ended, which says so itself."""
        with self._state:
            self._closing = True
            return not self._leaving

    def end(self, text: str, status: int) -> None:
        """Has all others print the text and exit; process 0 returns when they have, or had the time."""
        with self._state:
            self.ended = self._closing = True
        self._tell_all({"end": [text, status]})
        self._wait_for_others()

    def close(self) -> None:
        """Returns when all are here; from then on nobody's going means anything."""
        self.gather(_LAST, "")
        self.hang_up()

    def hang_up(self) -> None:
        """Closes the connections, as the end of the process does."""
        with self._state:
            self._closing = True
        for connection in self._peers.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _tell_main(self, message: dict[str, Any]) -> None:
        if self.process == 0:
            self._hear(0, message)
        else:
            self._tell_all(message)

    def _tell_all(self, message: dict[str, Any], but: int | None = None) -> None:
        with self._sending:
            for peer, connection in self._peers.items():
                if peer != but:
                    _send(connection, message)

    def _listen(self, peer: int, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), connection.makefile("rb") as lines:
            for line in lines:
                self._hear(peer, json.loads(line))
        with self._state:
            self._open -= 1
            self._state.notify_all()
            if self._closing:
                return
        self._leave(f"{self.names[peer]} is gone: it was killed, or its machine is down", 1, peer)

    def _hear(self, peer: int, message: dict[str, Any]) -> None:
        match message:
            case {"say": [number, name, value]}:
                self._collect(peer, number, name, value)
            case {"all": [number, values, last]}:
                self._answer(number, values, last)
            case {"stop": _}:
                self._prepare_stop()
            case {"passed": step}:
                self._choose_last_step(peer, step)
            case {"last": step}:
                with self._state:
                    self._last_step = step
                    self._state.notify_all()
            case {"end": [text, status]}:
                self._leave(text, status, peer)

    def _collect(self, peer: int, number: int, name: str, value: str) -> None:
        with self._state:
            said = self._said.setdefault(number, {})
            said[peer] = name, value
            places = {name for name, _ in said.values()}
            if len(places) == 1 and len(said) < len(self.names):
                return
            self._said.pop(number)
        if len(places) > 1:
            self._leave(f"the processes are at different places of the run: {', '.join(sorted(places))}", 1, None)
            return
        values = [said[process][1] for process in range(len(self.names))]
        with self._state:
            self._closing = self._closing or name == _LAST  # before anybody can know, and go
        self._tell_all({"all": [number, values, name == _LAST]})
        self._answer(number, values, name == _LAST)

    def _answer(self, number: int, values: list[str], last: bool) -> None:
        with self._state:
            self._answers[number] = values
            self._closing = self._closing or last
            self._state.notify_all()

    def _prepare_stop(self) -> None:
        """Process 0 passes the wish on; each process tells how far it has been asked, and is asked no further."""
        with self._state:
            if self._stopping:
                return
            self._stopping = True
            passed = self._passed
        if self.process == 0:
            self._tell_all({"stop": True})
        self._tell_main({"passed": passed})

    def _choose_last_step(self, peer: int, step: int) -> None:
        with self._state:
            self._passed_by[peer] = step
            if len(self._passed_by) < len(self.names):
                return
            self._last_step = last = max(self._passed_by.values()) + 1
            self._state.notify_all()
        self._tell_all({"last": last})

    def _leave(self, text: str, status: int, origin: int | None) -> None:
        """Ends this process, whatever it is at, by a thread of its own: the others go on listening."""
        with self._state:
            if self._closing:
                return
            self._closing = self._leaving = True
        threading.Thread(target=self._end_process, args=(text, status, origin), daemon=True).start()

    def _end_process(self, text: str, status: int, origin: int | None) -> None:
        """Process 0 has all but the one from which it knows end first; its main thread may go on until then."""
        if self.process == 0:
            self._tell_all({"end": [text, status]}, but=origin)
        self._wait_for_others()
        print(f"{'error: ' if status else ''}{text}", file=sys.stderr, flush=True)
        exit_now(status)

    def _wait_for_others(self) -> None:
        """On process 0: JAX's service ends with it, and its clients would abort."""
        if self.process == 0:
            with self._state:
                self._state.wait_for(lambda: not self._open, _FAREWELL)


_LAST = "the end"


def exit_now(status: int) -> NoReturn:
    """Without JAX's own shutdown, which waits for all processes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _call_roll(place: Place, timeout: int) -> Line:
    names = [_name(0, socket.gethostname()), *[""] * (place.processes - 1)]
    peers: dict[int, socket.socket] = {}
    deadline = time.monotonic() + timeout

    def refuse(text: str, *more: socket.socket) -> NoReturn:
        for connection in (*peers.values(), *more):
            _send(connection, {"end": [text, 2]})
            connection.close()
        raise InputError(text)

    try:
        server = _listen_at(place.address[1])
    except OSError as error:
        raise InputError(f"distributed.coordinator: cannot listen at {place.coordinator}: {error}") from error
    with server:
        while len(peers) < place.processes - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                absent = ", ".join(str(number) for number in range(1, place.processes) if number not in peers)
                refuse(_did_not_come(f"process{'es' if ',' in absent else ''} {absent}", place, timeout))
            hello = _hello(connection, min(5, max(0.01, deadline - time.monotonic())))
            if hello is None:  # a stranger
                connection.close()
                continue
            number, total, host = hello
            name = _name(number, host)
            if total != place.processes:
                found = f"{name} was started as one of {total} processes, {names[0]} as one of {place.processes}"
                refuse(f"distributed.num_processes: {found}", connection)
            if number in peers or not 0 < number < total:
                other = names[number] if 0 <= number < total else f"{total} processes, which count from 0"
                refuse(f"distributed.process_id: {name} came beside {other}", connection)
            names[number], peers[number] = name, connection
    for connection in peers.values():
        _send(connection, {"names": names})
    return Line(0, names, peers)


def _answer_roll(place: Place, timeout: int) -> Line:
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection = socket.create_connection(place.address, max(1, deadline - time.monotonic()))
            break
        except UnicodeError as error:
            raise InputError(f"distributed.coordinator: {place.coordinator} names no host: {error}") from error
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(f"{_did_not_come('process 0', place, timeout)}: {error}") from error
        time.sleep(0.2)
    _keep_alive(connection)
    _send(connection, {_HELLO: [place.process, place.processes, socket.gethostname()]})
    connection.settimeout(max(0, deadline - time.monotonic()) + _FAREWELL)  # process 0 says who is missing
    answer = _receive(connection)
    if "names" in answer:
        connection.settimeout(None)
        return Line(place.process, answer["names"], {0: connection})
    connection.close()
    if "end" in answer:
        raise InputError(answer["end"][0])
    raise InputError(
        f"distributed.coordinator: no process 0 answers at {place.coordinator}: another program is there, perhaps an "
        "earlier run that has not ended"
    )


def _did_not_come(who: str, place: Place, timeout: int) -> str:
    return f"{who} of {place.processes} did not turn up at {place.coordinator} within {timeout} s (distributed.timeout)"


def _listen_at(port: int) -> socket.socket:
    """On all addresses, as JAX's service will."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1024)


def _hello(connection: socket.socket, timeout: float) -> tuple[int, int, str] | None:
    """Process, number of processes, host."""
    connection.settimeout(timeout)
    match _receive(connection).get(_HELLO):
        case [int(process), int(total), str(host)]:
            connection.settimeout(None)
            _keep_alive(connection)
            return process, total, host
    return None


def _keep_alive(connection: socket.socket) -> None:
    """Has the system notice within a minute that a machine is down."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _receive(connection: socket.socket) -> dict[str, Any]:
    """One message; nothing where none comes, or it is no message."""
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < 1 << 20:
            byte = connection.recv(1)  # what follows is for `Line`
            if not byte:
                break
            line += byte
        message = json.loads(line)
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # its listener notices
        connection.sendall(json.dumps(message).encode() + b"\n")


def _name(process: int, host: str) -> str:
    return f"process {process} (host {host})"
