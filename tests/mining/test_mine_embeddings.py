"""Mining with every rule on, against brute force in numpy, a query at a time; memory bounded by the block."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jaxembed.errors import InputError
from jaxembed.mining import mine as mining
from jaxembed.mining.cross_scores import CrossScores
from jaxembed.mining.filters import Filters
from jaxembed.mining.mine import Options, mine, mine_embeddings
from jaxembed.mining.search import Blocks
from jaxembed.mining.task import Collection, Task, make_task

QUERIES, DOCUMENTS, DIM = 90, 2000, 24
EVERY = Filters(first=10, last=80, share=0.9, margin=0.02, largest=0.62, cross_margin=0.5)


def unit(rows: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, DIM)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def world() -> dict[str, Any]:
    """Queries with one to four positives near to them; some queries have a text in common, or that of a document."""
    random = np.random.default_rng(0)
    texts = [f"document {row}" for row in range(DOCUMENTS)]
    for row in random.choice(np.arange(100, DOCUMENTS), 200, replace=False):
        texts[row] = texts[random.integers(0, 100)]
    names = [f"query {row}" for row in range(QUERIES)]
    names[7] = names[3]
    names[11] = texts[5]
    counts = random.integers(1, 5, QUERIES)
    query_of = np.repeat(np.arange(QUERIES), counts)
    place_of = random.integers(0, DOCUMENTS, len(query_of))
    task = make_task(
        Collection(names, [f"q{row}" for row in range(QUERIES)]),
        Collection(texts, [f"p{row}" for row in range(DOCUMENTS)]),
        query_of,
        place_of,
        candidates=DOCUMENTS - 50,
    )
    documents = unit(len(task.documents), 1)
    queries = unit(QUERIES, 2)
    for query in range(QUERIES):
        queries[query] += 0.7 * documents[task.positives[query]].sum(axis=0)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    keys = np.arange(QUERIES * len(task.documents))
    keys = keys[random.random(len(keys)) < 0.9]
    cross = CrossScores(keys, random.standard_normal(len(keys)).astype(np.float32), len(task.documents))
    return {"task": task, "texts": texts, "names": names, "pairs": (query_of, place_of), "queries": queries,
            "documents": documents, "cross": cross}  # fmt: skip


def expected_negatives(world: dict[str, Any], filters: Filters, count: int) -> list[list[str]]:
    """Texts, from the raw pairs and texts, with nothing of the package but the embeddings' rows."""
    task, texts, names = world["task"], world["texts"], world["names"]
    row_of = {task.documents[row]: row for row in range(len(task.documents))}
    scores = (world["queries"].astype(float) @ world["documents"].astype(float).T).astype(np.float32).astype(float)
    cross = np.full(scores.size, np.nan)
    cross[world["cross"].keys] = world["cross"].scores
    cross = cross.reshape(scores.shape)
    result = []
    for query, name in enumerate(names):
        own = [texts[place] for asked, place in zip(*world["pairs"]) if asked == query]
        known = {texts[place] for asked, place in zip(*world["pairs"]) if names[asked] == name} | {name}
        candidates = [text for text in dict.fromkeys(texts[: DOCUMENTS - 50]) if text not in known]
        candidates.sort(key=lambda text: (-scores[query, row_of[text]], row_of[text]))
        positive = min(scores[query, row_of[text]] for text in own)
        cross_positive = min((cross[query, row_of[text]] for text in own), key=lambda x: -np.inf if np.isnan(x) else x)
        found = []
        for text in candidates[filters.first - 1 : filters.last]:
            s, c = scores[query, row_of[text]], cross[query, row_of[text]]
            if (
                (filters.share is None or s <= min(filters.share * positive, positive))
                and (filters.margin is None or s <= positive - filters.margin)
                and (filters.largest is None or s <= filters.largest)
                and (filters.cross_margin is None or c <= cross_positive - filters.cross_margin)  # False for NaN
            ):
                found.append(text)
        result.append(found[:count])
    return result


def mined_texts(mined: Any) -> list[list[str]]:
    return [[mined.task.documents[row] for row in rows if row >= 0] for rows in mined.negatives]


RULES = {
    "every rule": EVERY,
    "ranks alone": Filters(30, 100),
    "share": Filters(share=0.9),
    "margin": Filters(margin=0.1),
    "largest": Filters(largest=0.5),
    "cross-encoder": Filters(cross_margin=0.2),
}


@pytest.mark.parametrize("rule", RULES)
def test_equals_brute_force(world: dict[str, Any], rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mining, "QUERIES", 64)
    filters = RULES[rule]
    options = Options(count=6, filters=filters, blocks=Blocks(500, 32))
    cross = world["cross"] if filters.cross_margin is not None else None
    mined, report = mine_embeddings(
        world["task"], world["queries"], world["documents"], options, cross_scores=cross, progress=False
    )
    expected = expected_negatives(world, filters, 6)
    assert mined_texts(mined) == expected
    assert report.fewer == sum(len(found) < 6 for found in expected)
    assert report.none == sum(not found for found in expected)
    *_, chosen = report.funnel.candidates.values()
    assert chosen == sum(map(len, expected))
    everything = expected_negatives(world, filters, 10_000)
    assert list(report.funnel.candidates.values())[-2] == sum(map(len, everything))
    scores = (world["queries"].astype(float) @ world["documents"].astype(float).T).astype(np.float32)
    for query, rows in enumerate(mined.negatives):
        np.testing.assert_array_equal(mined.scores[query][rows >= 0], scores[query][rows[rows >= 0]])
        np.testing.assert_array_equal(mined.positive_scores[query], scores[query][world["task"].positives[query]])


def test_drawn_negatives_survive_the_rules_too(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    filters = replace(EVERY, largest=None, cross_margin=None)
    allowed = expected_negatives(world, filters, 10_000)
    results = []
    for queries in (64, 1000):
        monkeypatch.setattr(mining, "QUERIES", queries)
        options = Options(count=4, filters=filters, seed=3)
        mined, _ = mine_embeddings(world["task"], world["queries"], world["documents"], options, progress=False)
        results.append(mined_texts(mined))
    assert results[0] == results[1]
    assert results[0] != expected_negatives(world, filters, 4)
    for found, of in zip(results[0], allowed):
        assert len(found) == min(4, len(of))
        assert found == [text for text in of if text in set(found)]


def test_the_report_counts_what_is_left_out_before_ranking(world: dict[str, Any]) -> None:
    task: Task = world["task"]
    _, report = mine_embeddings(task, world["queries"], world["documents"], Options(), progress=False)
    first = world["texts"][: DOCUMENTS - 50]
    distinct = set(first)
    known = [
        {world["texts"][place] for asked, place in zip(*world["pairs"]) if world["names"][asked] == name} | {name}
        for name in world["names"]
    ]
    assert list(report.funnel.candidates.items())[:3] == [
        ("all documents", QUERIES * len(first)),
        ("repeated texts", QUERIES * len(distinct)),
        ("positives and own text", sum(len(distinct - texts) for texts in known)),
    ]
    lines = str(report).splitlines()
    assert lines[0].split() == ["left", "after", "candidates", "of", "the", "row", "above", "queries", "with", "any"]
    assert lines[-1].startswith(f"0 of {QUERIES} queries got fewer than the 5 negatives asked for, 0 of them none")


@pytest.mark.slow
def test_no_more_than_three_blocks_are_in_memory(world: dict[str, Any]) -> None:
    class Streamed:
        """Counts the rows that somebody still holds."""

        shape = (6_000, DIM)

        def __init__(self) -> None:
            self.alive = self.most = self.reads = 0

        def __getitem__(self, rows: slice) -> np.ndarray:
            gc.collect()
            values = unit(rows.stop - rows.start, rows.start)
            self.alive += len(values)
            self.reads += len(values)
            self.most = max(self.most, self.alive)
            weakref.finalize(values, self._free, len(values))
            return values

        def _free(self, rows: int) -> None:
            self.alive -= rows

    texts = [f"document {row}" for row in range(6_000)]
    task = make_task(
        Collection(["a", "b"], ["a", "b"]), Collection(texts, texts), np.array([0, 1]), np.array([4, 5_000])
    )
    documents = Streamed()
    mine_embeddings(task, unit(2, 5), documents, Options(blocks=Blocks(500, 8)), progress=False)
    assert documents.reads >= 6_000
    assert documents.most <= 3 * 500  # one on the devices, one that comes, one that goes


@pytest.mark.parametrize(("margin", "cross"), [(None, True), (1.0, False)])
def test_cross_scores_and_their_margin_go_together(world: dict[str, Any], margin: float | None, cross: bool) -> None:
    options = Options(filters=Filters(cross_margin=margin))
    with pytest.raises(InputError, match="given together"):
        mine(world["task"], None, None, options, cross_scores=world["cross"] if cross else None)


@pytest.mark.parametrize(("options", "message"), [({"count": 0}, "at least 1"), ({"recall": 1.0}, "between 0 and 1")])
def test_numbers_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Options(**options)
