"""What a run is evaluated on, and the checkpoint that did best there."""

import json
import logging
import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import jax
from etils import epath
from flax import nnx

from jaxembed import hosts
from jaxembed.checkpoint.orbax import TrainingCheckpoints, newest_checkpoint
from jaxembed.config import TaskSource, TrainConfig
from jaxembed.errors import InputError
from jaxembed.evaluation.dev_set import AnyDevSet, Reading, dev_set, dev_task
from jaxembed.evaluation.task_reader import read_task
from jaxembed.training.texts import is_symmetric, read_sources

logger = logging.getLogger(__name__)

BEST_DIRECTORY = "best"
BEST_FILE = "best.json"

Found = Mapping[str, Mapping[str, float]]
"""Dev set → metric → value."""


def read_dev_sets(config: TrainConfig) -> list[AnyDevSet]:
    """The dev sets of `data.dev`, in order.

    Raises:
        InputError: one that cannot be read, or that training cannot evaluate; or `evaluation.best_metric` names a
            metric that its dev set has not.
    """
    found: list[AnyDevSet] = []
    for section in config.data.dev:
        if isinstance(section, TaskSource):
            task = read_task(section.path, bad_rows=config.data.bad_rows, **section.options())
            found.append(dev_task(task, section.query_instruction, section.document_instruction))
            logger.info("%s: %s task, %s", section.name, task.type, found[-1].described)
        else:
            [examples] = read_sources([section], config.data)
            symmetric = is_symmetric(section, examples)
            found.append(dev_set(examples, Reading(section.query_instruction, section.document_instruction, symmetric)))
    if config.evaluation.best_metric is not None:
        name, _, metric = config.evaluation.best_metric.rpartition("/")
        [dev] = [dev for dev in found if dev.name == name]
        if metric not in dev.metrics:
            raise InputError(
                f"evaluation.best_metric: {name} has no metric {metric!r}; it has {', '.join(dev.metrics)}"
            )
    return found


class BestCheckpoint:
    """What a run trained, as it was when the metric was best; a context manager.

    It lies in `best/` of the run's directory, as a checkpoint of the trained parameters alone, whatever
    `checkpoint.keep` says; `best.json` beside it says of which step it is. Numbers of checkpoints in `best/` count
    them: a resumed run comes to its steps again.

    Of several processes all make the same calls.
    """

    def __init__(self, directory: epath.Path, metric: str, identity: Mapping[str, Any]) -> None:
        """
        Args:
            directory: of the run.
            identity: what the records of its checkpoints say of its data and base model.
        """
        self.metric = metric
        self._directory, self._identity = directory, identity
        self._checkpoints = TrainingCheckpoints(directory / BEST_DIRECTORY, keep=1)
        self.info = self._known()
        """Of the best so far: "step", "metric", "value", "dev", all metrics then, and the identity; None before there
        is one."""

    def _known(self) -> dict[str, Any] | None:
        info = None
        if hosts.is_main() and self._checkpoints.steps():
            try:
                info = newest_checkpoint(self._checkpoints.directory)[1]
            except InputError as error:
                logger.warning("the best checkpoint of before is lost: %s", error)
        info = json.loads(hosts.broadcast("the best checkpoint", json.dumps(info)))
        if info is not None and info["metric"] != self.metric:
            logger.info("the best checkpoint of before was by %s; looking for one by %s", info["metric"], self.metric)
            return None
        return info

    def consider(self, step: int, trainable: nnx.State, found: Found) -> None:
        """Saves what was trained where the metric is better than ever. Returns when it is saved."""
        name, _, metric = self.metric.rpartition("/")
        # Sums may differ between processes in their last bits.
        value = float(hosts.broadcast("the best metric", repr(float(found[name][metric]))))
        sign = -1 if metric == "loss" else 1
        if not math.isfinite(value) or (self.info is not None and sign * value <= sign * self.info["value"]):
            return
        dev = {name: dict(values) for name, values in found.items()}
        self.info = {"step": step, "metric": self.metric, "value": value, "dev": dev, **self._identity}
        # A shared disk may show the newest one later to other processes.
        newest = hosts.broadcast("the newest of the best", str(max(self._checkpoints.steps(), default=0)))
        self._checkpoints.save(int(newest) + 1, {"trainable": trainable}, self.info)
        self._checkpoints.wait()
        if hosts.is_main():
            (self._directory / BEST_FILE).write_text(json.dumps(self.info, indent=2))
        logger.info("step %d is the best so far: %s %.4f", step, self.metric, value)

    def restore(self, like: nnx.State) -> nnx.State:
        """What was trained, as it was then, in the place of the present one.

        Raises:
            CheckpointError: it cannot be read.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        restored = self._checkpoints.restore_latest({"trainable": abstract})
        assert restored is not None
        return restored[1]["trainable"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._checkpoints.__exit__(kind, error, traceback)
