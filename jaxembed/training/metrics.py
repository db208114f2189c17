"""A run's numbers, from the devices to `metrics.jsonl` and TensorBoard events beside it."""

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxembed import hosts
from jaxembed.training.step import StepMetrics

_COUNTED = "texts_used", "tokens_used", "positions"
"""Of the fields of a batch."""


class MetricsWriter:
    """Appends rows of numbers by step; a context manager. Other processes than the main one write nothing.

    A resumed run repeats the steps after its checkpoint: their rows are taken out first.
    """

    def __init__(self, directory: str | os.PathLike[str], *, tensorboard: bool, after_step: int = 0) -> None:
        self._file: Any = None
        self._events: Any = None
        self._main = hosts.is_main()
        if not self._main:
            return
        directory = epath.Path(directory)
        self._path = directory / "metrics.jsonl"
        kept = []
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step(line) <= after_step]
        self._path.write_text("".join(f"{line}\n" for line in kept))
        local = os.path.exists(self._path)  # a bucket cannot append
        self._kept = {_names(line) for line in kept}
        self._file = open(self._path, "a", buffering=1) if local else None  # noqa: SIM115 (closed on leaving)
        self._rows = kept
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(os.fspath(directory / "tensorboard"), purge_step=after_step + 1)

    def write(self, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        """One row; names become `prefix/name`. A row that is there already, of before a resumption, stays as it is."""
        if not self._main:
            return
        named = {f"{prefix}/{name}" if prefix else name: value for name, value in values.items()}
        line = json.dumps({"step": step, **named})
        if _names(line) in self._kept:
            return
        if self._file is not None:
            self._file.write(line + "\n")
        else:
            self._rows.append(line)
            self._path.write_text("".join(f"{row}\n" for row in self._rows))
        if self._events is not None:
            for name, value in named.items():
                self._events.add_scalar(name.replace("@", "_at_"), value, step)  # TensorBoard refuses @

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def _names(line: str) -> tuple[Any, ...]:
    row = json.loads(line)
    return row["step"], *row.keys()


class StepLog:
    """Step metrics on their way from the devices to files: fetched one step late, so that nothing waits for them."""

    def __init__(self, metrics: MetricsWriter, names: list[str], schedule: Any) -> None:
        self._writer, self._names, self._schedule = metrics, names, schedule
        self.last: tuple[int, StepMetrics] | None = None
        self.before_last: tuple[int, StepMetrics] | None = None
        self._since: list[StepMetrics] = []
        self._counts: Counter[str] = Counter()
        self._time = time.perf_counter()

    def add(self, done: int, fields: dict[str, Any], measured: StepMetrics) -> None:
        self.before_last, self.last = self.last, (done, measured)
        self._since.append(measured)
        self._counts.update({name: fields[name] for name in _COUNTED})  # not the batch, which is large

    def write(self, done: int) -> str:
        """One row of means since the last; its short form for the progress bar."""
        fetched = jax.device_get(self._since)
        seconds = time.perf_counter() - self._time
        texts, tokens, positions = (self._counts[name] for name in _COUNTED)
        values = {
            "loss": float(np.mean([m.loss for m in fetched])),
            "gradient_norm": float(np.mean([m.gradient_norm for m in fetched])),
            "learning_rate": float(self._schedule(done - 1)),
            "texts_per_second": texts / seconds,
            "tokens_per_second": tokens / seconds,
            "density": tokens / positions,
        }
        if fetched[-1].temperature is not None:
            values["temperature"] = float(fetched[-1].temperature)
        sums = np.sum([m.by_data_set for m in fetched], axis=0)
        if len(self._names) > 1:
            values |= {f"loss/{name}": float(a / n) for name, a, n in zip(self._names, *sums) if n}
        self._writer.write(done, values, "train")
        self._since, self._counts, self._time = [], Counter(), time.perf_counter()
        return f"loss {values['loss']:.4f}, {values['texts_per_second']:,.0f} texts/s"

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training."""
        begun = time.perf_counter()
        yield
        self._time += time.perf_counter() - begun


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the last line of a killed run may be cut
        return float("inf")
