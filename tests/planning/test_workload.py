"""Batches of a plan: drawn lengths, the layout by the real packer, and what the config says without data."""

import time

import numpy as np
import pytest
import yaml

from jaxembed.config import TrainConfig
from jaxembed.errors import InputError
from jaxembed.planning.workload import Lengths, configured_negatives, drawn_workload, parse_lengths


def config_of(batch_size: int = 256, *, source: dict[str, object] | None = None, **training: object) -> TrainConfig:
    values = f"""
        model: {{path: bigscience/bloom-560m}}
        data: {{train: [{{kind: jsonl, name: a, path: a.jsonl}}]}}
        training: {{batch_size: {batch_size}, epochs: 1}}
    """
    found = yaml.safe_load(values)
    found["data"]["train"][0] |= source or {}
    found["training"] |= training
    return TrainConfig.model_validate(found)


@pytest.mark.parametrize(("mean", "longest"), [(60.0, 300), (10.0, 12), (250.0, 300), (1.5, 512)])
def test_drawn_lengths(mean: float, longest: int) -> None:
    lengths = Lengths(mean, longest).draw(20_000, 0)
    assert lengths.mean() == pytest.approx(mean, rel=0.02, abs=0.05)
    assert lengths.min() >= 1
    assert lengths.max() <= longest
    assert (lengths == Lengths(mean, longest).draw(20_000, 0)).all()
    assert "log-normal" in str(Lengths(mean, longest))


@pytest.mark.parametrize("text", ["60", "60,", "a,b", "300,60", "0,10", "60,300,1", "60,60"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="--lengths: expected"):
        parse_lengths(text)
    assert parse_lengths("60,300") == Lengths(60.0, 300)


def test_a_batch_is_packed_as_in_training() -> None:
    load = drawn_workload(config_of(negatives=1), Lengths(60, 300), 10_000, chips=8, dim=1024)
    layout = load.layout
    assert load.texts == 3 * 256
    assert load.fields["tokens"].shape == (
        layout.chunks[-1], 8 * layout.chunk_rows, layout.row_length
    )  # fmt: skip
    assert len(load.fields["own"]) == 256
    assert len(load.fields["candidates"]) == 512
    assert (load.fields["segments"] > 0).sum() == pytest.approx(load.tokens, rel=0.1)
    assert 0.8 < load.density <= load.layout.density <= 1
    assert 0.8 < load.usual_share <= 1
    assert load.steps_of_epoch == 39
    assert drawn_workload(config_of(), Lengths(60, 300), None, chips=8, dim=1024).steps_of_epoch is None


def test_negatives_as_far_as_the_config_says() -> None:
    assert configured_negatives(config_of()) == 0
    assert configured_negatives(config_of(negatives=3)) == 3
    assert configured_negatives(config_of(source={"hard_negatives": 2})) == 2
    assert configured_negatives(config_of(source={"anchor": "q", "positive": "d", "negatives": ["n", "m"]})) == 2


def test_batches_that_do_not_fit_the_chips() -> None:
    with pytest.raises(InputError, match=r"training.batch_size: 100 is not a multiple of the 8 devices"):
        drawn_workload(config_of(100), Lengths(60, 300), None, chips=8, dim=64)
    with pytest.raises(InputError, match=r"training.row_length: 128 is shorter than the longest text, 300 tokens"):
        drawn_workload(config_of(row_length=128), Lengths(60, 300), None, chips=8, dim=64)


@pytest.mark.slow
def test_a_batch_of_65536_is_planned_in_seconds() -> None:
    start = time.process_time()
    load = drawn_workload(config_of(65_536, negatives=1), Lengths(60, 300), None, chips=64, dim=1024)
    assert time.process_time() - start < 60
    assert load.texts == 3 * 65_536
    assert load.density > 0.9


def test_texts_that_are_cut_pile_up_at_the_end() -> None:
    lengths = Lengths(200, 256).draw(10_000, 1)
    assert np.mean(lengths == 256) > 0.1
