"""The dev set against plain counting: who answers whom, metrics, loss, search."""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxembed.data.sources import Examples
from jaxembed.data.text_store import Picked, build_text_store
from jaxembed.errors import InputError
from jaxembed.evaluation.bm25 import bm25_metrics
from jaxembed.evaluation.dev_set import DevSet, GradedSet, Reading, dev_set
from jaxembed.text.format import Role, TextFormat

DIM = 6


class Stub:
    """Stands for an embedder: a random vector for each text and role, the same every time."""

    def __init__(self, normalize: bool = True) -> None:
        self.normalize = normalize

    def encode(self, texts: Sequence[str], role: str, normalize_embeddings: bool | None = None, **_: Any) -> np.ndarray:
        generators = [np.random.default_rng(zlib.crc32(f"{role}{text}".encode())) for text in texts]
        vectors = np.stack([g.normal(size=DIM) * g.uniform(1, 9) for g in generators])
        if self.normalize if normalize_embeddings is None else normalize_embeddings:
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors.astype(np.float32)

    def encode_query(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        return self.encode(texts, "query", **options)

    def encode_document(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        return self.encode(texts, "document", **options)


def examples_of(pairs: Sequence[tuple[str, str]]) -> Examples:
    anchors, positives = (list(column) for column in zip(*pairs))
    return Examples("dev", anchors, positives, [], [f"line {n}" for n in range(len(pairs))], {}, "")


def random_pairs(count: int) -> list[tuple[str, str]]:
    """Queries with several documents, and documents of several queries."""
    generator = np.random.default_rng(0)
    numbers = {(int(a), int(b)) for a, b in generator.integers(0, count // 2, (count, 2))}
    pairs = [(f"query {a}", f"document {b}") for a, b in sorted(numbers)]
    generator.shuffle(pairs)
    return [(a, b) for a, b in pairs]


def test_equal_queries_and_documents_are_one() -> None:
    dev = DevSet.of(examples_of([("q", "x"), ("r", "y"), ("q", "z"), ("s", "x")]))
    assert dev.queries == ["q", "r", "s"]
    assert dev.documents == ["x", "y", "z"]
    assert dev.ids == ["line 0", "line 1", "line 2"]  # where each stands first
    assert dev.relevant == [{0, 2}, {1}, {0}]


def test_a_corpus_is_searched_whole(tmp_path: Path) -> None:
    texts = {"d1": "x", "d2": "y", "d3": "y", "d4": "nobody's"}
    store = build_text_store(texts.items, fingerprint="f", directory=tmp_path, name="texts")
    pairs = Picked(store, np.array([1, 0, 2]))
    dev = DevSet.of(Examples("dev", ["q", "r", "q"], pairs, [], ["1", "2", "3"], {}, ""))
    assert dev.queries == ["q", "r"]
    assert dev.documents == list(texts.values())
    assert dev.ids == list(texts)
    assert dev.relevant == [{1, 2}, {0}]


@pytest.mark.parametrize("batch_size", [1, 7, 16, 1000])
@pytest.mark.parametrize(("temperature", "normalize"), [(1.0, True), (0.05, True), (0.05, False)])
def test_metrics_and_loss_one_by_one(batch_size: int, temperature: float, normalize: bool) -> None:
    """By cosine, whether the model's own embeddings are of unit length or not."""
    pairs = random_pairs(60)
    dev, stub = DevSet.of(examples_of(pairs)), Stub()
    found = dev.evaluate(Stub(normalize), temperature=temperature, batch_size=batch_size)
    wanted: dict[str, list[str]] = {}
    for anchor, positive in pairs:
        wanted.setdefault(anchor, []).append(positive)
    documents = list(dict.fromkeys(positive for _, positive in pairs))
    expected: dict[str, list[float]] = {
        name: [] for name in ("mrr@10", "recall@1", "recall@10", "recall@100", "ndcg@10")
    }
    for query, answers in wanted.items():
        scores = stub.encode_document(documents).astype(np.float64) @ stub.encode_query([query])[0].astype(np.float64)
        ranked = [documents[place] for place in np.argsort(-scores)]
        ranks = sorted(1 + ranked.index(answer) for answer in answers)
        expected["mrr@10"].append(1 / ranks[0] if ranks[0] <= 10 else 0)
        for k in (1, 10, 100):
            expected[f"recall@{k}"].append(sum(rank <= k for rank in ranks) / len(ranks))
        gain = sum(1 / math.log2(rank + 1) for rank in ranks if rank <= 10)
        expected["ndcg@10"].append(gain / sum(1 / math.log2(n + 2) for n in range(min(10, len(ranks)))))
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.mean(values), abs=1e-9), name

    # Pairs go through the batches query by query, in the order of the documents.
    ordered = [(query, text) for query, answers in wanted.items() for text in sorted(answers, key=documents.index)]
    losses = []
    for start in range(0, len(ordered), batch_size):
        queries, texts = zip(*ordered[start : start + batch_size])
        logits = stub.encode_query(queries).astype(np.float64) @ stub.encode_document(texts).astype(np.float64).T
        logits /= temperature
        losses += [math.log(np.exp(row - row.max()).sum()) + row.max() - row[n] for n, row in enumerate(logits)]
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_search_gives_the_best_by_cosine(normalize: bool) -> None:
    dev, stub = DevSet.of(examples_of(random_pairs(60))), Stub(normalize)
    queries = ["query 1", "never seen"]
    for query, hits in zip(queries, dev.search(stub, queries, hits=4), strict=True):
        a = stub.encode_query([query], normalize_embeddings=True)[0]
        cosines = stub.encode_document(dev.documents, normalize_embeddings=True) @ a
        best = np.argsort(-cosines)[:4]
        assert [text for _, _, text in hits] == [dev.documents[place] for place in best]
        assert [source for _, source, _ in hits] == [dev.ids[place] for place in best]
        np.testing.assert_allclose([score for score, _, _ in hits], cosines[best], atol=1e-6)
    few = DevSet.of(examples_of([("q", "x")]))
    assert [len(hits) for hits in few.search(stub, ["a", "b"], hits=3)] == [1, 1]
    assert few.search(stub, queries[:1])[0][0][1:] == ("line 0", "x")


def test_bm25_on_the_same_texts() -> None:
    pairs = [("read a file", "def read(file): ..."), ("sort names", "def sortNames(x): ..."), ("sort names", "sort")]
    dev = DevSet.of(examples_of(pairs))
    found = dev.bm25()
    assert list(found) == ["BM25, plain words", "BM25, split identifiers"]
    for split, metrics in enumerate(found.values()):
        assert metrics == bm25_metrics(dev.queries, dev.documents, dev.relevant, bool(split))
    assert found["BM25, split identifiers"]["recall@10"] == 1 > found["BM25, plain words"]["recall@10"]


def test_graded_pairs_give_spearman_s_correlation() -> None:
    grades = np.array([0.0, 5.0, 2.5, 2.5, 1.0])
    pairs = [(f"first {n}", f"second {n}") for n in range(5)]
    examples = dataclasses.replace(examples_of(pairs), scores=grades[:, None])
    found = dev_set(examples, Reading(symmetric=True))
    assert isinstance(found, GradedSet)
    stub = Stub(normalize=False)
    firsts, seconds = (stub.encode(list(column), "query", True) for column in zip(*pairs))
    cosines = [float(np.dot(a, b)) for a, b in zip(firsts, seconds)]
    ranks = [
        [sorted(column).index(x) + (column.count(x) - 1) / 2 for x in column] for column in (cosines, grades.tolist())
    ]
    expected = np.corrcoef(ranks)[0, 1]
    assert found.evaluate(stub, temperature=1.0, batch_size=2) == pytest.approx({"spearman": expected})
    assert found.bm25() == {}
    with pytest.raises(InputError, match=r"data\.dev: all pairs of dev have the grade 3"):
        dev_set(dataclasses.replace(examples, scores=np.full((5, 1), 3.0)))
    assert isinstance(dev_set(examples_of(pairs)), DevSet)


def test_graded_pairs_of_a_damaged_model() -> None:
    class Damaged(Stub):
        def encode(self, texts: Sequence[str], role: str, *arguments: Any, **options: Any) -> np.ndarray:
            return super().encode(texts, role, *arguments, **options) * np.nan

    dev = GradedSet("dev", ["a", "b"], ["c", "d"], np.array([0.0, 1.0]))
    with pytest.raises(InputError, match="expected finite embeddings, found NaN or infinity among those of graded"):
        dev.evaluate(Damaged(), temperature=1.0, batch_size=2)


@pytest.mark.parametrize("suffix", ["", "[E]"])
def test_instructions_of_a_dev_set_go_before_its_texts(suffix: str) -> None:
    calls: list[tuple[str, str | None]] = []

    class Listening(Stub):
        text_format = TextFormat(Role("q: ", suffix, "own "), Role("d: ", suffix))

        def encode(self, texts: Sequence[str], role: str, prompt: str | None = None, **options: Any) -> np.ndarray:
            calls.append((role, prompt))
            return super().encode(texts, role, **options)

    pairs = [("q", "x"), ("r", "y")]
    for reading, expected in (
        (Reading(), [("query", None), ("document", None)]),
        (Reading("find "), [("query", "q: find "), ("document", None)]),
        (Reading("find ", "", symmetric=True), [("query", "q: find "), ("query", "q: ")]),
    ):
        calls.clear()
        DevSet.of(examples_of(pairs), reading).evaluate(Listening(), temperature=1.0, batch_size=2)
        assert calls == expected
