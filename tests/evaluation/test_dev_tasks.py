"""Local tasks as dev sets: their metrics are mteb's, computed without it."""

import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction

from jaxembed.errors import InputError
from jaxembed.evaluation import task_reader
from jaxembed.evaluation.dev_set import ChunkedSet, ClassificationSet, DevSet, GradedSet, dev_task
from jaxembed.evaluation.mteb_tasks import to_mteb
from jaxembed.evaluation.task_reader import read_task
from jaxembed.evaluation.tasks import ClusteringTask, LocalTask, PairTask, RetrievalTask, StsTask
from jaxembed.text.format import DEFAULT_TEXT_FORMAT

pytestmark = [
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),  # mteb, of its own tensors
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning"),
]

Vectors = Callable[[str], np.ndarray]


def anywhere(text: str) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(text.encode())).normal(size=8)


def on_an_axis(text: str) -> np.ndarray:
    """Cosines are 0 or 1: nearly all are equal to others."""
    return np.eye(8)[zlib.crc32(text.encode()) % 8]


def by_first_word(text: str) -> np.ndarray:
    """Near the other texts with this first word."""
    return anywhere(text.split()[0]) + 0.9 * anywhere(text)


class Stub:
    """Stands for an embedder; keeps the prompts that it is given."""

    text_format = DEFAULT_TEXT_FORMAT

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self.prompts: list[tuple[str, str | None]] = []

    def encode(self, texts: Sequence[str], role: str, normalize: bool | None, prompt: str | None) -> np.ndarray:
        self.prompts.append((role, prompt))
        found = np.stack([self.vectors(text) for text in texts])
        if normalize:
            found = found / np.linalg.norm(found, axis=1, keepdims=True)
        return found.astype(np.float32)

    def encode_query(
        self, texts: Sequence[str], normalize_embeddings: bool | None, prompt: str | None = None, **_: Any
    ):
        return self.encode(texts, "query", normalize_embeddings, prompt)

    def encode_document(
        self, texts: Sequence[str], normalize_embeddings: bool | None, prompt: str | None = None, **_: Any
    ):
        return self.encode(texts, "document", normalize_embeddings, prompt)


class Encoder(AbsEncoder):
    """The same for mteb."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={"name": "a/stub", "revision": "1", "similarity_fn_name": ScoringFunction.COSINE}
        )

    def encode(self, inputs: Any, **_: Any) -> np.ndarray:
        return np.stack([self.vectors(text) for batch in inputs for text in batch["text"]]).astype(np.float32)


def mteb_scores(task: LocalTask, vectors: Vectors) -> dict[str, float]:
    """As mteb has them, but not rounded."""
    made = to_mteb(task)
    exact: dict[str, float] = {}
    if isinstance(task, RetrievalTask):
        specific = made.task_specific_scores

        def listen(scores: Mapping[str, Mapping[str, float]], *more: Any, **named: Any) -> dict[str, float]:
            for name in ("ndcg_cut_10", "recall_1", "recall_10", "recall_100"):
                if all(name in values for values in scores.values()):
                    exact[name] = float(np.mean([values[name] for values in scores.values()]))
            return specific(scores, *more, **named)

        made.task_specific_scores = listen
    scores = made.evaluate(Encoder(vectors), "test", encode_kwargs={"show_progress_bar": False})["default"]
    return {**scores, **exact}


def evaluate(task: LocalTask, vectors: Vectors) -> dict[str, float]:
    dev = dev_task(task)
    found = dev.evaluate(Stub(vectors), temperature=0.05, batch_size=16)
    assert tuple(found) == dev.metrics
    return found


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("vectors", [anywhere, on_an_axis])
@pytest.mark.parametrize("grades", [[1], [0, 1, 2, 3]])
def test_retrieval_as_mteb_has_it(tmp_path: Path, vectors: Vectors, grades: list[int]) -> None:
    random = np.random.default_rng(0)
    corpus = [{"_id": f"d{n}", "title": "T" * (n % 2), "text": f" text {n}"} for n in range(150)]
    jsonl(tmp_path / "corpus.jsonl", corpus)
    jsonl(tmp_path / "queries.jsonl", [{"_id": f"q{n}", "text": f"query {n}"} for n in range(40)])
    judged = [(f"q{n}", f"d{m}") for n in range(30) for m in random.choice(150, 1 + n, replace=False)]
    qrels = [{"query-id": q, "corpus-id": d, "score": int(random.choice(grades))} for q, d in judged]
    jsonl(tmp_path / "qrels" / "test.jsonl", qrels)
    task = read_task(tmp_path)
    found, expected = evaluate(task, vectors), mteb_scores(task, vectors)
    names = {"mrr@10": "mrr_at_10", "ndcg@10": "ndcg_cut_10", **{f"recall@{k}": f"recall_{k}" for k in (1, 10, 100)}}
    for ours, theirs in names.items():
        assert found[ours] == pytest.approx(expected[theirs], abs=1e-6), ours
    assert round(found["ndcg@10"], 5) == expected["main_score"]


def test_code_search_as_mteb_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_reader, "CHUNK", 20)
    path = jsonl(tmp_path / "pairs.jsonl", [{"query": f"{n} find", "code": f"{n} def"} for n in range(70)])
    task = read_task(path, "code_search")
    assert isinstance(dev_task(task), ChunkedSet)
    found, expected = evaluate(task, by_first_word), mteb_scores(task, by_first_word)
    assert found["mrr"] == pytest.approx(expected["main_score"], abs=1e-6)
    assert 0.3 < found["mrr"] < 1
    equal = jsonl(tmp_path / "equal.jsonl", [{"query": f"{n} find", "code": "0 def"} for n in range(70)])
    task = read_task(equal, "code_search")
    assert evaluate(task, by_first_word)["mrr"] == pytest.approx(1 / 20)
    assert mteb_scores(task, by_first_word)["main_score"] == pytest.approx(1 / 20)


@pytest.mark.parametrize("vectors", [anywhere, by_first_word])
def test_sts_as_mteb_has_it(tmp_path: Path, vectors: Vectors) -> None:
    random = np.random.default_rng(0)
    rows = [{"s1": f"{n} one", "s2": f"{n} two", "score": float(random.integers(0, 26)) / 5} for n in range(200)]
    task = read_task(jsonl(tmp_path / "sts.jsonl", rows))
    assert isinstance(dev_task(task), GradedSet)
    found, expected = evaluate(task, vectors), mteb_scores(task, vectors)
    assert found["spearman"] == pytest.approx(expected["cosine_spearman"], abs=1e-6)


@pytest.mark.parametrize("labels", ["ab", "abcd"])
def test_classification_as_mteb_has_it(tmp_path: Path, labels: str) -> None:
    def rows(count: int, of: str) -> list[dict[str, str]]:
        return [{"text": f"{of[n % len(of)]} {n}", "label": of[n % len(of)]} for n in range(count)]

    # Of the last label there are fewer texts than are drawn, and one is unknown in training.
    train = jsonl(tmp_path / "train.jsonl", [*rows(200, labels[:-1] * 2), *rows(5, labels[-1])])
    test = jsonl(tmp_path / "test.jsonl", [*rows(90, labels), {"text": "never seen", "label": "z"}])
    task = read_task(tmp_path)
    assert task == read_task(test, train=train, name=task.name)
    assert isinstance(dev_task(task), ClassificationSet)
    found, expected = evaluate(task, by_first_word), mteb_scores(task, by_first_word)
    for name in ("accuracy", "f1"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6)
    assert 0.5 < found["accuracy"] < 0.99


def test_instructions_go_before_the_texts_they_are_for() -> None:
    retrieval = RetrievalTask("r", {"q": "a"}, {"d": "b"}, {"q": {"d": 1}}, instruction="own ")
    sts = StsTask("s", ["a", "b"], ["c", "d"], [0.0, 1.0])
    for task, given, expected in (
        (retrieval, (), [("query", "query: own "), ("document", None)]),
        (retrieval, ("find ", "in "), [("query", "query: find "), ("document", "document: in ")]),
        (sts, (), [("query", None), ("query", None)]),
        (sts, ("like ",), [("query", "query: like "), ("query", "query: like ")]),
    ):
        stub = Stub(anywhere)
        dev_task(task, *given).evaluate(stub, temperature=1.0, batch_size=2)
        assert stub.prompts == expected


@pytest.mark.parametrize("task", [ClusteringTask("c", ["a"], ["b"]), PairTask("c", ["a"], ["b"], [1])])
def test_other_kinds_are_refused(task: LocalTask) -> None:
    with pytest.raises(InputError, match=rf"data\.dev: c is a task of mteb's type {task.type}; retrieval .*, STS and"):
        dev_task(task)


def test_documents_of_a_task_are_known_by_their_ids() -> None:
    dev = dev_task(RetrievalTask("r", {"q": "a"}, {"d1": "b", "d2": "c"}, {"q": {"d1": 3}}))
    assert isinstance(dev, DevSet)
    assert dict(zip(dev.ids, dev.documents)) == {"d1": "b", "d2": "c"}
    assert dev.described == "1 queries, 2 documents"


def test_queries_that_are_documents_as_mteb_has_them(tmp_path: Path) -> None:
    """As of ArguAna: the nearest document of each is itself, and is none of its results."""
    texts = [{"_id": f"x{n}", "text": f"{n % 20} claim {n}"} for n in range(130)]
    jsonl(tmp_path / "corpus.jsonl", texts)
    jsonl(tmp_path / "queries.jsonl", [*texts[:40], {"_id": "no document", "text": "3 asked"}])
    qrels = [{"query-id": f"x{n}", "corpus-id": f"x{n + 20}", "score": 1} for n in range(40)]
    jsonl(tmp_path / "qrels" / "test.jsonl", [*qrels, {"query-id": "no document", "corpus-id": "x3", "score": 1}])
    task = read_task(tmp_path)
    found, expected = evaluate(task, by_first_word), mteb_scores(task, by_first_word)
    for ours, theirs in {"mrr@10": "mrr_at_10", "ndcg@10": "ndcg_cut_10", "recall@100": "recall_100"}.items():
        assert found[ours] == pytest.approx(expected[theirs], abs=1e-6), ours
    kept = evaluate(dataclasses.replace(task, ignore_identical_ids=False), by_first_word)
    assert kept["mrr@10"] < found["mrr@10"]
    assert kept["recall@1"] == 0 < found["recall@1"]

    dev = dev_task(task)
    assert isinstance(dev, DevSet)
    words = {one["_id"]: set(one["text"].split()) for one in texts}
    best = dev.bm25()["BM25, plain words"]
    # A query shares two words with five others, which score as each other, and three with itself.
    assert best["recall@10"] > 0.9
    assert all(len(words["x0"] & words[f"x{n}"]) == 2 for n in (20, 40, 60))


def test_a_test_set_with_two_of_more_labels(tmp_path: Path) -> None:
    """mteb has their average precision, for which they have to be 0 and 1."""
    rows = [{"text": f"{'abcd'[n % 4]} {n}", "label": "abcd"[n % 4]} for n in range(80)]
    jsonl(tmp_path / "train.jsonl", rows)
    jsonl(tmp_path / "test.jsonl", [row for row in rows if row["label"] in "bd"])
    task = read_task(tmp_path)
    found, expected = evaluate(task, by_first_word), mteb_scores(task, by_first_word)
    assert found == {name: pytest.approx(expected[name], abs=1e-6) for name in found}
