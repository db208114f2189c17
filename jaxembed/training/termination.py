"""SIGTERM during a run: it stops at the next place where nothing is lost, on all hosts at the same one."""

import contextlib
import signal
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from jaxembed import hosts


class Stopped(BaseException):
    """SIGTERM has come; no `Exception`, so that nobody takes it for a failure of what it interrupts."""


class Termination:
    """What SIGTERM does while a run lasts, in place of killing it; a context manager.

    It raises `Stopped` at once, as in preparation, evaluation and export, which can be repeated. Within `noted` it only
    sets `came`. Outside of the main thread, as in some notebooks, signals stay as they are.

    Where there are several processes each may be stopped alone. In what can be repeated the others end with it
    (`hosts.end_all`); steps, and evaluations between them, all leave at the same place, with everything saved.
    """

    def __init__(self) -> None:
        self.came = False
        self.doing = "the preparation"
        """What it interrupts, for the message."""
        self.agreed = False
        """Whether all processes stop here by themselves."""
        self._noting = False
        self._previous: Any = None

    def check(self) -> None:
        """Raises `Stopped` where SIGTERM has come.

        Needed at the boundaries of what can be interrupted: Python drops what a handler raises within a finaliser.
        """
        if self.came:
            self._noting = True
            raise Stopped

    def check_all(self) -> None:
        """Raises `Stopped` on every process where SIGTERM has come to one; to be called by all."""
        if hosts.anyone("SIGTERM", self.came):
            self._noting = self.agreed = True
            raise Stopped

    def stop_after(self, step: int) -> bool:
        """Whether the run ends after this step; to be asked after each, by all processes."""
        return hosts.stop_after(step, self.came)

    def now(self, doing: str) -> None:
        """Names what begins."""
        self.doing = doing
        self.check()

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """The steps: SIGTERM waits for whoever looks at `came`."""
        self._noting = True
        try:
            yield
        finally:
            self._noting = self.came  # once is enough: what cleans up is not interrupted again

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within `noted`, a part that can be interrupted after all; by several processes with `check_all` only."""
        self._noting = hosts.count() > 1
        try:
            if not self._noting:
                self.check()
            yield
        finally:
            self._noting = True

    def _handle(self, *_: object) -> None:
        self.came = True
        if not self._noting:
            self.check()

    def __enter__(self) -> Self:
        with contextlib.suppress(ValueError):  # not the main thread
            self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
