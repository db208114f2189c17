"""Differences of runs and their intervals, against loops in float64 and formulas."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import average_precision_score, f1_score, ndcg_score, v_measure_score

from jaxembed.errors import InputError
from jaxembed.evaluation import plots
from jaxembed.evaluation.comparison import Comparison, Row, compare, write_comparison
from jaxembed.evaluation.items import resampler, whole
from jaxembed.evaluation.scores import Run, TaskScore


def score(task: str, kind: str, mean: float, subset: str = "default", **items: Any) -> TaskScore:
    found = {name: np.asarray(values).tolist() for name, values in items.items()} or None
    return TaskScore(task, kind, subset, "test", "main", float(mean), {}, 1.0, found)


def run(model: str, *scores: TaskScore, revision: str = "5e1f0000") -> Run:
    return Run(model, revision, "2026-11-26", "cpu", {}, list(scores), [])


def spearman(cosines: np.ndarray, grades: np.ndarray) -> float:
    result: Any = scipy.stats.spearmanr(cosines, grades)
    return float(result.statistic)


def row(comparison: Comparison, name: str) -> Row:
    [found] = (row for row in comparison.rows if row.name == name)
    return found


def ranked(seed: int, noise: float, queries: int = 200) -> np.ndarray:
    """nDCG@10 of each query over ten documents; queries are hard or easy for all models."""
    common, own = np.random.default_rng(0), np.random.default_rng(seed)
    truth = common.integers(0, 2, (queries, 10))
    truth[:, 0] = 1
    hardness = common.exponential(1.5, (queries, 1))
    return np.array(
        [ndcg_score([t], [s], k=10) for t, s in zip(truth, truth + noise * hardness * own.normal(size=truth.shape))]
    )


@pytest.fixture(scope="module")
def retrieval() -> tuple[np.ndarray, np.ndarray]:
    return ranked(1, 0.6), ranked(2, 0.5)


@pytest.fixture(scope="module")
def sts() -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    grades = random.integers(0, 6, 300).astype(float)  # with ties
    return {
        "grade": grades,
        "a": grades + random.normal(size=300) * 3,
        "b": (grades + random.normal(size=300) * 2).round(1),
    }


def test_means_of_items(retrieval: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = retrieval
    runs = [run(name, score("Ranks", "Retrieval", v.mean(), value=v)) for name, v in zip("ab", retrieval)]
    [difference] = row(compare(runs), "Ranks").differences
    random = np.random.default_rng(7)
    means = []
    for _ in range(20_000):
        drawn = random.integers(0, len(a), len(a))  # the same queries of both
        means.append(math.fsum(b[drawn]) / len(a) - math.fsum(a[drawn]) / len(a))
    assert difference.value == pytest.approx(b.mean() - a.mean(), abs=1e-12)
    assert difference.low is not None
    assert difference.high is not None
    width = difference.high - difference.low
    assert [difference.low, difference.high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.06 * width)
    # As the standard error of paired differences has it, and narrower than without pairing.
    assert width == pytest.approx(2 * 1.96 * (b - a).std() / math.sqrt(len(a)), rel=0.08)
    assert width < 0.9 * 2 * 1.96 * math.sqrt((a.var() + b.var()) / len(a))


def test_correlations_of_pairs(sts: dict[str, np.ndarray]) -> None:
    grades = sts["grade"]
    whole = {name: spearman(sts[name], grades) for name in "ab"}
    runs = [run(name, score("Alike", "STS", whole[name], cosine=sts[name], grade=grades)) for name in "ab"]
    [difference] = row(compare(runs), "Alike").differences
    random = np.random.default_rng(8)
    found = []
    for _ in range(800):
        drawn = random.integers(0, 300, 300)
        found.append(spearman(sts["b"][drawn], grades[drawn]) - spearman(sts["a"][drawn], grades[drawn]))
    assert difference.value == pytest.approx(whole["b"] - whole["a"], abs=1e-12)
    assert difference.low is not None
    assert difference.high is not None
    expected = np.quantile(found, [0.025, 0.975])
    assert [difference.low, difference.high] == pytest.approx(expected, abs=0.1 * np.ptp(expected))


RIGHT = (("a", 0.6), ("b", 0.8))


def resampled(
    draw: Callable[[np.random.Generator], np.ndarray], other: Callable[[np.ndarray], float], resamples: int = 150
) -> np.ndarray:
    """Quantiles of a statistic's resamples in a loop, moved to what all items give."""
    random = np.random.default_rng(9)
    found = np.array([other(draw(random)) for _ in range(resamples)])
    return np.quantile(found, [0.025, 0.975]) - found.mean()


def weighted(score: TaskScore, units: int, wanted: Callable[[np.ndarray], float]) -> float:
    """How far the score of counted items is, at most, from that of items drawn again and again."""
    drawn = np.random.default_rng(10).integers(0, units, (20, units))
    found = resampler(score.items or {})
    assert found is not None
    scores = found.scores(np.array([np.bincount(each, minlength=units) for each in drawn], float).T).mean(axis=0)
    return float(np.abs(scores - [wanted(each) for each in drawn]).max())


def check(scores: Sequence[TaskScore], moved: np.ndarray) -> None:
    a, b = scores
    [difference] = row(compare([run("a", a), run("b", b)]), a.task).differences
    assert difference.value == pytest.approx(b.value - a.value, abs=1e-12)
    assert difference.low is not None
    assert difference.high is not None
    expected = difference.value + moved
    assert [difference.low, difference.high] == pytest.approx(expected, abs=0.2 * np.ptp(expected))


def test_average_precision_of_pairs() -> None:
    random = np.random.default_rng(4)
    labels = (random.random(300) < 0.3).astype(int)
    common = random.normal(size=300)
    found: dict[str, dict[str, Any]] = {
        name: {
            measure: np.unique((labels + common + noise * random.normal(size=300)).round(1), return_inverse=True)[1]
            for measure in ("cosine", "manhattan")
        }
        for name, noise in (("a", 1.0), ("b", 0.5))
    }  # with ties

    def best(name: str, drawn: Any = slice(None)) -> float:
        return max(average_precision_score(labels[drawn], ranks[drawn]) for ranks in found[name].values())

    scores = [score("Same", "PairClassification", best(name), label=labels, **found[name]) for name in "ab"]
    assert weighted(scores[0], 300, lambda drawn: best("a", drawn)) < 1e-12
    check(scores, resampled(lambda r: r.integers(0, 300, 300), lambda drawn: best("b", drawn) - best("a", drawn)))


def test_f1_of_translations() -> None:
    random = np.random.default_rng(5)
    gold = np.arange(200) % 180
    found = {name: np.where(random.random(200) < right, gold, random.integers(0, 190, 200)) for name, right in RIGHT}

    zero: Any = 0  # not in its types

    def f1(name: str, drawn: Any = slice(None)) -> float:
        return f1_score(gold[drawn], found[name][drawn], average="weighted", zero_division=zero)

    scores = [score("Same", "BitextMining", f1(name), gold=gold, predicted=found[name]) for name in "ab"]
    assert weighted(scores[0], 200, lambda drawn: f1("a", drawn)) < 1e-12
    check(scores, resampled(lambda r: r.integers(0, 200, 200), lambda drawn: f1("b", drawn) - f1("a", drawn)))


def test_v_measures_of_clusterings() -> None:
    """Documents are drawn, the same of all sets, and sets."""
    random = np.random.default_rng(6)
    labels = random.integers(0, 5, 150)
    documents = [np.arange(100), np.arange(50, 150), *(random.integers(0, 150, 100) for _ in range(2))]
    found = {
        name: [np.where(random.random(100) < right, labels[each], random.integers(0, 5, 100)) for each in documents]
        for name, right in RIGHT
    }

    def v_measure(name: str, drawn: np.ndarray) -> float:
        counts = np.bincount(drawn[:150], minlength=150)
        values = []
        for number in drawn[150:]:
            times = counts[documents[number]]
            of_labels, of_clusters = labels[documents[number]], found[name][number]
            values.append(v_measure_score(np.repeat(of_labels, times), np.repeat(of_clusters, times)))
        return float(np.mean(values))

    everything = np.concatenate([np.arange(150), np.arange(4)])
    scores = []
    for name in "ab":
        rows = [np.array([np.full(100, n), each, labels[each], found[name][n]]) for n, each in enumerate(documents)]
        table, times = np.unique(np.concatenate(rows, axis=1), axis=1, return_counts=True)
        items: dict[str, Any] = dict(zip(("set", "document", "label", "cluster", "times"), [*table, times]))
        scores.append(score("Groups", "Clustering", v_measure(name, everything), **items))
        assert whole(items) == pytest.approx(v_measure(name, everything), abs=1e-12)
    of_all_sets = np.arange(4)
    assert weighted(scores[0], 150, lambda drawn: v_measure("a", np.concatenate([drawn, of_all_sets]))) < 1e-12
    check(
        scores,
        resampled(
            lambda r: np.concatenate([r.integers(0, 150, 150), r.integers(0, 4, 4)]),
            lambda drawn: v_measure("b", drawn) - v_measure("a", drawn),
        ),
    )


@pytest.mark.parametrize(
    ("labels", "clusters"), [([0, 0, 0], [0, 1, 1]), ([0, 1, 2], [0, 0, 0]), ([0, 0], [1, 1]), ([0, 1], [1, 0])]
)
def test_v_measures_where_an_entropy_is_nothing(labels: list[int], clusters: list[int]) -> None:
    n = len(labels)
    items = {"set": [0] * n, "document": range(n), "label": labels, "cluster": clusters, "times": [1] * n}
    assert whole(items) == pytest.approx(v_measure_score(labels, clusters), abs=1e-12)


def test_other_pairs_or_documents_are_not_compared() -> None:
    ranks = [3, 2, 1, 0]
    labels = [score("Same", "PairClassification", 1.0, label=[1] * n + [0] * (4 - n), dot=ranks) for n in (1, 2)]
    assert row(compare([run("a", labels[0]), run("b", labels[1])]), "Same").differences[0].low is None
    same: dict[str, Any] = {"set": [0] * 3, "label": [0, 1, 1], "cluster": [0, 1, 1], "times": [1] * 3}
    groups = [score("Groups", "Clustering", 1.0, document=documents, **same) for documents in ([0, 1, 2], [0, 1, 3])]
    assert row(compare([run("a", groups[0]), run("b", groups[1])]), "Groups").differences[0].low is None


def test_means_over_tasks(retrieval: tuple[np.ndarray, np.ndarray]) -> None:
    """A mean over two tasks: the standard errors of both, added as independent ones are, over two."""
    runs = [
        run(
            name,
            score("One", "Retrieval", v.mean(), value=v),
            score("Two", "Retrieval", v[:80].mean(), "x", value=v[:80]),
            score("Two", "Retrieval", v[80:].mean(), "y", value=v[80:]),
        )
        for name, v in zip("ab", retrieval)
    ]
    found = compare(runs)
    d = retrieval[1] - retrieval[0]
    squares = [(d.std() / math.sqrt(200)) ** 2]
    squares.append(sum((part.std() / math.sqrt(len(part)) / 2) ** 2 for part in (d[:80], d[80:])))
    [difference] = row(found, "Retrieval, mean of 2 tasks").differences
    assert difference.value == pytest.approx((d.mean() + (d[:80].mean() + d[80:].mean()) / 2) / 2, abs=1e-12)
    assert difference.low is not None
    assert difference.high is not None
    expected = 2 * 1.96 * math.sqrt(sum(squares)) / 2
    assert difference.high - difference.low == pytest.approx(expected, rel=0.08)


def test_the_same_seed_gives_the_same_intervals(retrieval: tuple[np.ndarray, np.ndarray]) -> None:
    runs = [run(name, score("Ranks", "Retrieval", v.mean(), value=v)) for name, v in zip("ab", retrieval)]
    assert compare(runs, seed=3) == compare(runs, seed=3)
    assert compare(runs, seed=3) != compare(runs, seed=4)


def test_equal_models_differ_by_nothing(retrieval: tuple[np.ndarray, np.ndarray], sts: dict[str, np.ndarray]) -> None:
    whole = spearman(sts["a"], sts["grade"])
    one = run(
        "a",
        score("Ranks", "Retrieval", retrieval[0].mean(), value=retrieval[0]),
        score("Alike", "STS", whole, cosine=sts["a"], grade=sts["grade"]),
        score("Flat", "STS", 0.0, cosine=[0.5, 0.5, 0.5], grade=[1.0, 2.0, 3.0]),
    )
    for each in compare([one, dataclasses.replace(one, model="b")]).rows:
        assert [dataclasses.astuple(found) for found in each.differences] == [(0.0, 0.0, 0.0)], each.name


def test_where_only_numbers_are_known(retrieval: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = retrieval
    pairs: dict[str, Any] = {"cosine": [0.1, 0.2, 0.3]}
    found = compare(
        [
            run(
                "a",
                score("Ranks", "Retrieval", a.mean(), value=a),
                score("Groups", "Clustering", 0.5),
                score("Other grades", "STS", 1.0, grade=[1, 2, 3], **pairs),
                score("Fewer", "Retrieval", 0.5, value=[0.5, 0.5]),
                score("One", "Retrieval", 0.5, value=[0.5]),
                score("Alone", "STS", 0.1),
            ),
            run(
                "b",
                score("Ranks", "Retrieval", b.mean(), value=b),
                score("Groups", "Clustering", 0.75),
                score("Other grades", "STS", 0.5, grade=[1, 3, 2], **pairs),
                score("Fewer", "Retrieval", 0.5, value=[0.5, 0.5, 0.5]),
                score("One", "Retrieval", 0.5, value=[0.5]),
            ),
            run("c", *(score(t, k, 0.25) for t, k in (("Ranks", "Retrieval"), ("Groups", "Clustering"))),
                score("Other grades", "STS", 0.0), score("Fewer", "Retrieval", 0.0), score("One", "Retrieval", 0.0)),
        ]
    )  # fmt: skip
    assert [each.name for each in found.rows if each.differences[0].low is not None] == ["Ranks"]
    assert all(each.differences[1].low is None for each in found.rows)
    assert row(found, "Groups").values == (0.5, 0.75, 0.25)
    assert [each.name for each in found.rows if each.mean] == [
        "Clustering, 1 task",
        "Retrieval, mean of 3 tasks",
        "STS, 1 task",
        "all, mean of 5 tasks",
        "all, mean of 3 types",
    ]
    text = found.markdown()
    assert "| Groups | 50.00 | 75.00 | 25.00 | +25.00 | -25.00 |" in text
    assert "no items are known, only one is, or they differ: Groups, Ranks, Fewer, One, Other grades" in text
    assert "not every run has them: Alone of a" in text


def test_averages_as_mteb_makes_them() -> None:
    """Of tasks, and of types; a task is the mean of its subsets."""
    of = [("A", "STS", 0.2, "en"), ("A", "STS", 0.4, "de"), ("B", "STS", 0.7, "x"), ("C", "Retrieval", 0.9, "x")]
    found = compare(
        [run(name, *(score(t, k, v + more, s) for t, k, v, s in of)) for name, more in (("a", 0), ("b", 0.1))]
    )
    assert row(found, "STS, mean of 2 tasks").values[0] == pytest.approx((0.3 + 0.7) / 2)
    assert row(found, "all, mean of 3 tasks").values[0] == pytest.approx((0.3 + 0.7 + 0.9) / 3)
    assert row(found, "all, mean of 2 types").values == pytest.approx((0.7, 0.8))


def test_other_data_under_the_same_name(tmp_path: Path) -> None:
    """Are not compared, nor drawn; where a run does not say of what data it is, the name has to do."""
    values: dict[str, Any] = {"value": [0.25, 0.75]}
    first = run(
        "a",
        dataclasses.replace(score("Changed", "Retrieval", 0.5, **values), data="1"),
        dataclasses.replace(score("Same", "Retrieval", 0.5, **values), data="3"),
        dataclasses.replace(score("Old", "Retrieval", 0.5, **values), data="4"),
        score("Alone", "STS", 0.5),
    )
    other = run(
        "b",
        dataclasses.replace(score("Changed", "Retrieval", 0.5, **values), data="2"),
        dataclasses.replace(score("Same", "Retrieval", 0.5, **values), data="3"),
        score("Old", "Retrieval", 0.5, **values),
    )
    found = compare([first, other])
    assert [each.name for each in found.rows] == ["Retrieval, mean of 2 tasks", "Same", "Old"]
    assert found.notes[1:] == (
        "Left out, because the runs have other data under the same name: Changed.",
        "Left out, because not every run has them: Alone of a.",
    )
    drawn: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        draw = plots.scores_by_type

        def listen(runs: dict[str, Run]) -> Any:
            drawn.extend([each.task for each in each_run.scores] for each_run in runs.values())
            return draw(runs)

        patch.setattr(plots, "scores_by_type", listen)
        write_comparison([first, other], tmp_path)
    assert drawn == [["Same", "Old"]] * 2
    with pytest.raises(InputError, match="a, b: no score that all of them have, of the same data"):
        compare([run("a", first.scores[0]), run("b", other.scores[0])])


def test_names() -> None:
    scores = score("Task", "STS", 0.5)
    named = [run("m", scores, revision="a" * 64), run("m", scores, revision="b" * 64), run("n", scores)]
    assert compare(named).names == ("m@aaaaaaaa", "m@bbbbbbbb", "n")
    assert compare(named, ["x", "y", "z"]).names == ("x", "y", "z")
    for wrong in (["x", "x", "y"], ["x", "y"]):
        with pytest.raises(InputError, match="expected a name of its own for each of 3 runs"):
            compare(named, wrong)
    with pytest.raises(InputError, match="at least two runs"):
        compare(named[:1])
    with pytest.raises(InputError, match="m, n: no score that all of them have"):
        compare([run("m", scores), run("n", score("Other", "STS", 0.5))])


def test_files(tmp_path: Path, retrieval: tuple[np.ndarray, np.ndarray]) -> None:
    runs = [
        run(name, score("Ranks $x$", "Retrieval", v.mean(), value=v), score("_Groups", "Clustering", 0.5))
        for name, v in zip(("<b>a</b>", "_b|$"), retrieval)
    ]
    found = write_comparison(runs, tmp_path)
    assert found == compare(runs)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) == {"comparison.md", "comparison.html", "scores_by_type.png", "differences.png"}
    assert all(content.startswith(b"\x89PNG") for name, content in files.items() if name.endswith(".png"))
    assert rb"| \<b\>a\</b\> | \_b\|$ |" in files["comparison.md"]
    assert b"&lt;b&gt;a&lt;/b&gt;" in files["comparison.html"]
    assert b"<b>" not in files["comparison.html"]
    write_comparison(runs, tmp_path)
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
