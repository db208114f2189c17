import json
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxembed.training.metrics import MetricsWriter, StepLog
from jaxembed.training.step import StepMetrics


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_rows_carry_step_and_prefixed_names(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"mrr@10": 0.25}, "dev/held-out")
        writer.write(10, {"loss": 2.5, "loss/a": 2.0}, "train")
        writer.write(10, {"free": 1})
        assert len(rows(tmp_path)) == 3, "a row is in the file once it is written"
    assert rows(tmp_path) == [
        {"step": 0, "dev/held-out/mrr@10": 0.25},
        {"step": 10, "train/loss": 2.5, "train/loss/a": 2.0},
        {"step": 10, "free": 1},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_takes_out_what_it_will_repeat(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 8):
            writer.write(step, {"loss": step}, "train")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/lo')  # killed while it wrote
    with MetricsWriter(tmp_path, tensorboard=False, after_step=5) as writer:
        assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
        writer.write(6, {"loss": 60}, "train")
    assert [row["train/loss"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 60]


def test_a_row_of_before_the_resumption_is_not_repeated(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(5, {"loss": 1.0}, "train")
        writer.write(5, {"mrr@10": 0.5}, "dev/a")
    with MetricsWriter(tmp_path, tensorboard=False, after_step=5) as writer:
        writer.write(5, {"mrr@10": 0.5}, "dev/a")
        writer.write(5, {"mrr@10": 0.7}, "dev/b")
    assert rows(tmp_path) == [
        {"step": 5, "train/loss": 1.0},
        {"step": 5, "dev/a/mrr@10": 0.5},
        {"step": 5, "dev/b/mrr@10": 0.7},
    ]


def test_tensorboard_events(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write(3, {"loss": 2.5, "mrr@10": 0.25}, "x")
    (path,) = (tmp_path / "tensorboard").iterdir()
    records, found = path.read_bytes(), {}
    while records:  # length (8 bytes), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(records[:8], "little")
        event = Event.FromString(records[12 : 12 + length])
        found.update({(event.step, value.tag): value.simple_value for value in event.summary.value})
        records = records[16 + length :]
    assert found == {(3, "x/loss"): 2.5, (3, "x/mrr_at_10"): pytest.approx(0.25)}


def test_batches_are_not_held_until_they_are_logged(tmp_path):
    one = jnp.ones(())
    measured = StepMetrics(one, one, jnp.ones((2, 1)), one)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        log = StepLog(writer, ["a"], lambda step: 0.5)
        held = []
        for step in (1, 2):
            tokens = np.zeros(1000, np.int32)
            held.append(weakref.ref(tokens))
            log.add(step, {"tokens": tokens, "texts_used": 3, "tokens_used": 20, "positions": 40 * step}, measured)
            del tokens
        assert [array() for array in held] == [None, None]
        log.write(2)
        log.add(3, {"texts_used": 3, "tokens_used": 20, "positions": 20}, measured)
        log.write(3)
    first, second = rows(tmp_path)
    assert (first["train/density"], second["train/density"]) == (40 / 120, 1)
    assert first["train/tokens_per_second"] / first["train/texts_per_second"] == pytest.approx(20 / 3)
