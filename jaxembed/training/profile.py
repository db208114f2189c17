"""The trace of some steps of a run, for TensorBoard's profiler."""

import os

import jax

from jaxembed import hosts
from jaxembed.config import TrainConfig
from jaxembed.training.step import TrainState


class Profile:
    """The trace of the steps that the config names, of as many as this run takes, by process 0; a context manager."""

    def __init__(self, config: TrainConfig) -> None:
        self._window = config.profile.window if hosts.is_main() else None
        self._directory = os.path.join(config.run_dir, "profile")
        self._tracing = False

    def before(self, done: int) -> None:
        if self._window and self._window[0] <= done <= self._window[1] and not self._tracing:
            jax.profiler.start_trace(self._directory)
            self._tracing = True

    def after(self, done: int, state: TrainState) -> None:
        if self._tracing and self._window and done == self._window[1]:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._tracing = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracing:
            self._stop()
