"""A run that distils into a teacher's embeddings: what it is told to do, that it learns it, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxembed import train
from jaxembed.__main__ import run_command
from jaxembed.config import load_config
from jaxembed.embedder import Embedder
from jaxembed.errors import InputError

from runs import SHAPE, Workshop, rows_of

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """48 pairs, of which the file has one twice, and a teacher of 24 dimensions."""
    workshop = Workshop(tmp_path_factory.mktemp("workshop"))
    lines = workshop.data.read_text().splitlines()
    lines.insert(3, lines[0])
    workshop.data.write_text("".join(f"{line}\n" for line in lines))
    rng = np.random.default_rng(0)
    for name in ("anchor", "positive"):
        seen: dict[str, np.ndarray] = {}
        texts = [json.loads(line)[name] for line in lines]
        vectors = [seen.setdefault(text, rng.normal(size=24)) for text in texts]
        np.save(workshop.folder / f"{name}.npy", np.array(vectors, np.float32))
    return workshop


@pytest.fixture
def source(workshop):
    """The config's source with these files, and a loss."""

    def of(loss: dict[str, Any] | None = None, **teacher: Any) -> dict[str, Any]:
        files = {name: str(workshop.folder / value) for name, value in teacher.items() if name != "truncate_dim"}
        given = {"kind": "jsonl", "name": "a", "path": str(workshop.data)}
        given |= {} if loss is None else {"loss": loss}
        return given | {"teacher_embeddings": {**teacher, **files}} if teacher else given

    return of


def configured(workshop: Workshop, source: dict[str, Any], **sections: Any) -> Path:
    return workshop.write_config("taught", data={**workshop.values["data"], "train": [source]}, **sections)


@pytest.mark.slow
def test_a_run_moves_towards_its_teacher(workshop, source):
    """On eight devices; the export is nearer to it than the base."""
    given = source({"kind": "embedding_cosine"}, anchors="anchor.npy", positives="positive.npy", truncate_dim=16)
    config = configured(
        workshop, given,
        training={"batch_size": 16, "steps": 40},
        optimizer={"learning_rate": 1e-2, "warmup_ratio": 0.0},
    )  # fmt: skip
    assert workshop.train("taught", config=config) == 0
    losses = [row["train/loss"] for row in rows_of(workshop.folder / "taught") if "train/loss" in row]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])

    rows = [json.loads(line) for line in workshop.data.read_text().splitlines()]
    teacher = np.load(workshop.folder / "anchor.npy")[:, :16]
    teacher /= np.linalg.norm(teacher, axis=1, keepdims=True)
    cosines = [
        (Embedder.from_pretrained(path).encode_query([row["anchor"] for row in rows]) * teacher).sum(1).mean()
        for path in (workshop.base, workshop.folder / "taught" / "model")
    ]
    assert cosines[1] > cosines[0] + 0.2


def test_check_shows_it_and_finds_a_wrong_file(workshop, source, capsys):
    given = source({"kind": "embedding_mse"}, anchors="anchor.npy", truncate_dim=16)
    config = configured(workshop, given)

    def check(*overrides: str) -> int:
        return run_command(train.main, ["--check", str(config), *overrides])

    assert check() == 0
    output = capsys.readouterr().out
    assert "teacher embeddings of 49 anchors, the first 16 of 24 dimensions of float32" in output
    assert check("--data.train.0.teacher_embeddings.truncate_dim", "null") == 2
    error = capsys.readouterr().err
    assert "data.train.0.teacher_embeddings.anchors" in error
    assert f"the teacher has 24 dimensions, the model {SHAPE.dim}" in error
    assert check("--data.train.0.teacher_embeddings.negatives", str(workshop.folder / "anchor.npy")) == 2
    assert "49 rows, but a has 0 negatives" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("loss", "teacher", "message"),
    [
        ({"kind": "embedding_mse"}, {}, r"go together, found none"),
        ({"kind": "kl"}, {"anchors": "anchor.npy"}, r"go together, found kind: kl"),
        (None, {"anchors": "anchor.npy"}, r"go together, found kind: None"),
        ({"kind": "embedding_mse"}, {"truncate_dim": 3}, r"give one of anchors, positives, negatives and documents"),
        ({"kind": "embedding_mse"}, {"documents": "x", "negatives": "y"}, r"documents are positives and negatives"),
        ({"kind": "embedding_cosine", "temperature": 0.1}, {"anchors": "x"}, r"embedding_cosine has no temperature"),
        ({"kind": "embedding_cosine", "focal_gamma": 1.0}, {"anchors": "x"}, r"focal_gamma: for InfoNCE only"),
    ],
)
def test_what_does_not_go_together(workshop, source, loss, teacher, message):
    with pytest.raises(InputError, match=message):
        load_config(configured(workshop, source(loss, **teacher)))
