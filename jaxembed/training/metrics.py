"""Where a run writes its numbers: `metrics.jsonl`, and TensorBoard events beside it."""

import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath


class MetricsWriter:
    """Appends rows of numbers by step; a context manager.

    A resumed run repeats the steps after its checkpoint: their rows are taken out first.
    """

    def __init__(self, directory: str | os.PathLike[str], *, tensorboard: bool, after_step: int = 0) -> None:
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
        self._events: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(os.fspath(directory / "tensorboard"), purge_step=after_step + 1)

    def write(self, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        """One row; names become `prefix/name`. A row that is there already, of before a resumption, stays as it is."""
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


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the last line of a killed run may be cut
        return float("inf")
