"""SIGTERM during a run: it stops at the next place where nothing is lost."""

import contextlib
import signal
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self


class Stopped(BaseException):
    """SIGTERM has come; no `Exception`, so that nobody takes it for a failure of what it interrupts."""


class Termination:
    """What SIGTERM does while a run lasts, in place of killing it; a context manager.

    It raises `Stopped` at once, as in preparation, evaluation and export, which can be repeated. Within `noted` it only
    sets `came`. Outside of the main thread, as in some notebooks, signals stay as they are.
    """

    def __init__(self) -> None:
        self.came = False
        self.doing = "the preparation"
        """What it interrupts, for the message."""
        self._noting = False
        self._previous: Any = None

    def check(self) -> None:
        """Raises `Stopped` where SIGTERM has come.

        Needed at the boundaries of what can be interrupted: Python drops what a handler raises within a finaliser.
        """
        if self.came:
            self._noting = True
            raise Stopped

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
        """Within `noted`, a part that can be interrupted after all."""
        self._noting = False
        try:
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
