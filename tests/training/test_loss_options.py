"""From the config to the losses of a run: what each source gets, what does not go together, a run with all of it."""

import math
import shutil
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxembed import convert
from jaxembed.__main__ import run_command
from jaxembed.config import load_config
from jaxembed.data.sources import Examples
from jaxembed.errors import InputError
from jaxembed.text.format import DEFAULT_TEXT_FORMAT
from jaxembed.training import loop
from jaxembed.training.objective import LossOptions, SetLoss
from jaxembed.training.prepare import loss_options

from checkpoints import stored_bytes
from runs import Workshop, make_rows, rows_of, write_jsonl

pytestmark = pytest.mark.usefixtures("quick_compilation")

DIM = 16


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop"))


def examples_of(name: str, kind: str = "pairs", count: int = 24) -> Examples:
    """`pairs`, `graded` ones, `negatives`, or negatives with `scores`."""
    rows, random = make_rows(count, seed=len(name)), np.random.default_rng(0)
    negatives = [(row["hard"],) for row in rows] if kind in ("negatives", "scores") else []
    columns = {"graded": 1, "scores": 2}.get(kind)
    return Examples(
        name,
        [row["anchor"] for row in rows],
        [row["positive"] for row in rows],
        negatives,
        [f"{name}:{number}" for number in range(count)],
        {},
        name,
        scores=None if columns is None else random.random((count, columns)).round(1),
    )


@pytest.fixture
def options(workshop):
    """The options of sources, each as (kind of examples, keys of its config), with a section `loss`."""

    def of(*sources: tuple[str, dict[str, Any]], **loss: Any) -> LossOptions:
        given = [{"kind": "jsonl", "name": f"s{n}", "path": "x", **more} for n, (_, more) in enumerate(sources)]
        data = {**workshop.values["data"], "train": given}
        config = load_config(workshop.write_config("options", data=data, loss=loss))
        examples = [examples_of(f"s{number}", kind) for number, (kind, _) in enumerate(sources)]
        return loss_options(config, examples, DEFAULT_TEXT_FORMAT, DIM)

    return of


def test_defaults_are_infonce_alone(options):
    found = options(("pairs", {}), ("negatives", {}))
    assert found.sets == (SetLoss(), SetLoss())
    assert found.data_sets == 2
    same = LossOptions(sets=found.sets, data_sets=2, dtype=found.dtype)
    assert found == same


def test_a_source_has_what_it_says_and_else_the_run_s(options):
    found = options(
        ("pairs", {"loss": {"temperature": 0.1, "query_query": False, "weight": 2.0}}),
        ("graded", {}),
        ("graded", {"loss": {"kind": "info_nce"}}),
        ("scores", {"loss": {"kind": "kl", "teacher_temperature": 3.0, "info_nce_weight": 0.5}, "in_batch": False}),
        temperature=0.02,
        query_query=True,
        document_query="joint",
        mask_margin=0.1,
        focal_gamma=0.5,
    )
    terms: dict[str, Any] = {"query_query": True, "document_query": "joint", "margin": 0.1, "focal": 0.5}
    assert found.temperature == 0.02
    assert found.sets == (
        SetLoss(temperature=0.1, weight=2.0, **{**terms, "query_query": False}),
        SetLoss("cosent", **terms),
        SetLoss(**terms),
        SetLoss("kl", teacher_temperature=3.0, info_nce_weight=0.5, in_batch=False, **terms),
    )


def test_matryoshka(options, caplog):
    assert options(("pairs", {}), matryoshka_dims=[16, 8]).matryoshka == ((16, 1.0), (8, 1.0))
    assert not caplog.records
    found = options(("pairs", {}), matryoshka_dims=[8, 4], matryoshka_weights=[1.0, 0.5])
    assert found.matryoshka == ((8, 1.0), (4, 0.5))
    assert "lacks 16" in caplog.text


@pytest.mark.parametrize(
    ("kind", "source", "loss", "message"),
    [
        ("pairs", {"loss": {"kind": "cosent"}}, {}, r"data.train.0.loss.kind: cosent needs scores"),
        ("negatives", {"loss": {"kind": "kl"}}, {}, r"data.train.0.loss.kind: kl needs scores"),
        ("graded", {"loss": {"kind": "margin_mse"}}, {}, r"margin_mse needs hard negatives with scores"),
        ("pairs", {"in_batch": False}, {}, r"data.train.0.in_batch: false leaves a query its hard negatives"),
        ("pairs", {}, {"matryoshka_dims": [16, 32]}, r"loss.matryoshka_dims: 32, but embeddings have 16"),
        ("graded", {}, {"learn_temperature": True}, r"loss.learn_temperature: no source"),
        ("pairs", {}, {"matryoshka_dims": [8, 8]}, r"matryoshka_dims has a number twice"),
        ("pairs", {}, {"matryoshka_dims": [8], "matryoshka_weights": [1.0, 1.0]}, r"for each of the 1 dims, found 2"),
        ("pairs", {}, {"learn_temperature": True, "least_temperature": 0.1}, r"least_temperature 0.1 is above"),
        ("pairs", {}, {"mask_margin": -0.1}, r"mask_margin"),
        ("pairs", {"loss": {"kind": "kl", "focal_gamma": 1.0}}, {}, r"focal_gamma: for InfoNCE only"),
        ("pairs", {"loss": {"teacher_temperature": 2.0}}, {}, r"teacher_temperature is for kind: kl"),
        ("pairs", {"loss": {"kind": "margin_mse", "temperature": 2.0}}, {}, r"margin_mse has no temperature"),
        ("pairs", {"loss": {"info_nce_weight": 2.0}}, {}, r"info_nce_weight goes beside another kind"),
        ("negatives", {"in_batch": False, "loss": {"query_query": True}}, {}, r"leaves loss.query_query no candidates"),
        (
            "negatives",
            {"in_batch": False, "loss": {"document_query": "joint"}},
            {},
            r"leaves loss.document_query no candidates",
        ),
    ],
)
def test_what_does_not_go_together(options, kind, source, loss, message):
    with pytest.raises(InputError, match=message):
        options((kind, source), **loss)


@pytest.mark.slow
def test_a_run_with_all_of_it(workshop, tmp_path, monkeypatch):
    """Graded, scored and plain sources, a learned temperature: metrics, resumption to the same weights, conversion."""
    sources = {"plain": "pairs", "graded": "graded", "taught": "scores"}
    found = [examples_of(name, kind) for name, kind in sources.items()]
    monkeypatch.setattr(loop, "read_sources", lambda given, _: found if given else [])
    path = str(write_jsonl(tmp_path / "x.jsonl", []))
    losses: dict[str, Any] = {"taught": {"loss": {"kind": "kl", "temperature": 0.5, "info_nce_weight": 1.0}}}
    train = [{"kind": "jsonl", "name": name, "path": path, **losses.get(name, {})} for name in sources]
    config = workshop.write_config(
        "all",
        data={**workshop.values["data"], "train": train},
        training={"batch_size": 8, "steps": 6},
        loss={
            "learn_temperature": True, "query_query": True, "document_query": "symmetric", "mask_margin": 0.1,
            "focal_gamma": 0.5, "spread_out": 0.1, "matryoshka_dims": [16, 8],
        },
        checkpoint={"every_steps": 3, "keep": 3},
    )  # fmt: skip
    assert workshop.train("all", config=config) == 0
    run = workshop.folder / "all"
    rows = [row for row in rows_of(run) if "train/loss" in row]
    for name in ("loss", "loss/plain", "loss/graded", "loss/taught", "temperature"):
        values = [row[f"train/{name}"] for row in rows if f"train/{name}" in row]
        assert values
        assert all(map(math.isfinite, values))
    temperatures = [row["train/temperature"] for row in rows]
    assert temperatures[0] == pytest.approx(0.05, rel=0.01)
    assert len(set(temperatures)) == len(temperatures)

    exported = run / "model" / "model.safetensors"
    weights = exported.read_bytes()
    assert not any("temperature" in name for name in load_file(exported))
    arguments = [str(run), str(tmp_path / "converted")]
    assert run_command(convert.main, arguments) == 0
    assert stored_bytes(tmp_path / "converted") == stored_bytes(run / "model")

    shutil.rmtree(run / "checkpoints" / "6")
    assert workshop.resume("all") == 0
    assert exported.read_bytes() == weights
    again = [row["train/temperature"] for row in rows_of(run) if "train/temperature" in row]
    assert again == temperatures
