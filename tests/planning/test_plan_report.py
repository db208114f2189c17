"""Plans of a tiny config, its devices those of this process and its compiler replaced by one that answers at once."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxembed.errors import InputError
from jaxembed.planning import plan as module
from jaxembed.planning.chips import GIB
from jaxembed.planning.compiled import Compiled, Moved
from jaxembed.planning.plan import Inputs, Plan, plan_encoding, plan_training
from jaxembed.planning.report import as_dict, page
from jaxembed.planning.topologies import find_topology
from jaxembed.planning.workload import Lengths
from jaxembed.sharding import make_mesh

MOVED = (
    Moved("all-gather", ("fsdp",), "bf16", True, 12, 4_000_000, 3_000_000.0),
    Moved("all-reduce", ("data",), "f32", False, 1, 1_000_000, 1_000_000.0),
)
FITS = Compiled(True, 70.0, arguments=3 * GIB, results=0, temporary=5 * GIB, code=GIB // 10, moved=MOVED)
TOO_LARGE = Compiled(False, 60.0, needed=20.5, limit=15.75, refused="RESOURCE_EXHAUSTED")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "tiny.yaml"
    values = {
        "model": {"scratch": {"layers": 2, "dim": 16, "heads": 2, "vocab_size": 264}},
        "tokenizer": {"train_vocab_size": 260},
        "data": {"train": [{"kind": "jsonl", "name": "a", "path": "none.jsonl", "anchor": "q", "negatives": ["n"]}]},
        "training": {"batch_size": 64, "epochs": 1, "chunk_rows": 8},
        "text_format": {"max_length": 64},
    }
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def planned(config: Path) -> Iterator[Callable[..., Plan]]:
    def mesh(config: Any, topology: Any) -> Any:
        return make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)

    patch = pytest.MonkeyPatch()
    patch.setattr(module, "_mesh", mesh)

    def run(*overrides: str, answers: list[Compiled], encode: bool = False) -> Plan:
        waiting = list(answers)
        patch.setattr(module, "compile_program", lambda *_: waiting.pop(0))
        given = Inputs(str(config), overrides, find_topology("v5e-8"), Lengths(20, 64), 10_000)
        found = (plan_encoding if encode else plan_training)(given)
        assert not waiting
        return found

    yield run
    patch.undo()


@pytest.fixture(scope="module")
def fitting(planned: Callable[..., Plan]) -> Plan:
    return planned("--mesh.fsdp", "4", answers=[FITS])


def test_a_plan_that_fits(fitting: Plan) -> None:
    plan = fitting
    assert plan.mesh == {"data": 2, "fsdp": 4, "tensor": 1}
    assert (plan.frozen, plan.load.texts, plan.changes) == (0, 192, ())
    assert plan.flops.total > plan.useful.total > 0
    assert plan.bounds.links == pytest.approx(4e6 / 200e9)
    assert plan.bounds.limit == "links"
    assert plan.texts_a_second == pytest.approx(192 / plan.bounds.links / plan.load.usual_share)
    steps = 10_000 // 64
    assert plan.chip_hours_of_epoch == pytest.approx(steps * plan.bounds.links * plan.load.usual_share * 8 / 3600)
    text = page(plan, price=2.0)
    for said in ("8 chips", "fits: 8.10 of 15.75 GiB", "all-gather", "data 2 × fsdp 4", "log-normal", "a chip-hour"):
        assert said in text
    assert all(len(line) < 160 for line in text.splitlines())


def test_json_has_what_the_page_has(fitting: Plan) -> None:
    found = json.loads(json.dumps(as_dict(fitting, price=1.5)))
    assert found["topology"] == {"name": "v5e-8", "layout": "v5e:2x4", "chips": 8, "devices": 8}
    assert found["memory"]["compiled"]["total"] == FITS.total
    assert found["memory"]["fits"] is True
    assert found["bounds"]["step"] == max(found["bounds"][name] for name in ("compute", "memory", "links"))
    assert found["collectives"][0]["axes"] == ["fsdp"]
    assert found["price_per_epoch"] == pytest.approx(1.5 * found["chip_hours_per_epoch"])
    assert {"texts", "tokens", "positions", "density", "shapes", "source"} <= found["batch"].keys()
    unknown = dataclasses.replace(fitting, load=dataclasses.replace(fitting.load, steps_of_epoch=None))
    assert as_dict(unknown)["chip_hours_per_epoch"] is None
    assert "--examples N" in page(unknown)


@pytest.mark.slow
def test_changes_that_make_it_fit(planned: Callable[..., Plan]) -> None:
    """The formula is scaled to what the compiler said; of what fits by it two are compiled at most."""
    plan = planned("--mesh.fsdp", "2", answers=[TOO_LARGE, TOO_LARGE, FITS])
    assert len(plan.changes) == 2
    assert [change.compiled for change in plan.changes] == [TOO_LARGE, FITS]
    assert plan.changes[0].estimate < 15.75 * GIB
    text = page(plan)
    assert "does not fit: the compiler needs 20.50 of 15.75 GiB" in text
    assert "the smallest changes that make it fit" in text
    assert "takes at least" not in text
    assert as_dict(plan)["texts_per_second"] is None
    inside = Compiled(False, 60.0, refused="RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory")
    text = page(dataclasses.replace(plan, compiled=inside))
    assert "does not fit: RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: Ran out of memory\n" in text
    third = planned("--mesh.fsdp", "2", answers=[TOO_LARGE, TOO_LARGE, TOO_LARGE]).changes
    assert [change.compiled for change in third[:2]] == [TOO_LARGE, TOO_LARGE]
    assert third[2].compiled is None


def test_encoding(planned: Callable[..., Plan]) -> None:
    plan = planned(answers=[FITS], encode=True)
    assert (plan.trained, plan.trainable, plan.work) == (0, "none", "encoding")
    assert plan.memory.optimizer == plan.memory.gradients == 0
    assert 0.3 < plan.load.density <= 1
    assert plan.flops.total > plan.useful.total
    assert "texts/s" in page(plan)


def test_what_cannot_be_planned(config: Path, planned: Callable[..., Plan]) -> None:
    with pytest.raises(InputError, match=r"training.batch_size: 12 is not a multiple of the 8 devices"):
        planned("--training.batch_size", "12", answers=[])
    with pytest.raises(InputError, match=r"--lengths: texts of 64 tokens, but text_format.max_length cuts them at 32"):
        planned("--text_format.max_length", "32", answers=[])
    with pytest.raises(InputError, match="known by name are bigscience/bloom-560m"):
        planned("--model.path", "nobody/nothing-known", answers=[])
    with pytest.raises(InputError, match=r"none.jsonl: no such file.*\n.*--lengths MEAN,MAX"):
        plan_training(Inputs(str(config), (), find_topology("v5e-8")))


def test_data_that_is_here(config: Path, planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"q": f"question {i}", "positive": f"answer {i} " * (1 + i % 5), "n": f"other {i}"} for i in range(200)]
    data = config.parent / "data.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.setattr(module, "compile_program", lambda *_: FITS)
    options = ("--data.train.0.path", str(data), "--data.cache_dir", str(config.parent / "cache"))
    found = plan_training(Inputs(str(config), (*options, "--model.scratch.vocab_size", "null"), find_topology("v5e-8")))
    assert found.load.source == "the token cache"
    assert found.load.steps_of_epoch == 3
    assert found.load.texts == 192
