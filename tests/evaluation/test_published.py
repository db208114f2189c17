"""The published scores agree with each other and with mteb's names, and are found for what is the same."""

import dataclasses
from collections.abc import Iterable

import pytest

from jaxembed.evaluation.published import Row, published
from jaxembed.evaluation.scores import TaskScore, by_task

METRICS = {
    "Classification": "accuracy",
    "Clustering": "v_measure",
    "PairClassification": "max_ap",
    "Reranking": "map_at_1000",
    "Retrieval": "ndcg_at_10",
    "STS": "cosine_spearman",
    "Summarization": "cosine_spearman",
}


def score(task: str, kind: str, subset: str = "default", split: str = "test", metric: str | None = None) -> TaskScore:
    return TaskScore(task, kind, subset, split, metric or METRICS[kind], 0.5, {}, 1.0)


def benchmark(*types: str) -> list[TaskScore]:
    """The 56 sets of MTEB(eng, v1), or those of some types."""
    return [
        score(task, average["type"], subset, "dev" if task == "MSMARCO" else "test")
        for average in published().averages
        for task, subset in average["tasks"]
        if not types or average["type"] in types
    ]


def percents(row: Row | None) -> list[float | None]:
    assert row is not None
    return [None if value is None else round(100 * value, 2) for value in row.values]


@pytest.mark.parametrize("kind", ["Retrieval", "STS"])
def test_where_all_tasks_are_there_their_mean_is_the_average_of_the_paper(kind: str) -> None:
    row = published().of_type(kind, by_task(benchmark(kind))[kind])
    assert row is not None
    assert not row.averaged
    [average] = (entry["scores"] for entry in published().averages if entry["type"] == kind)
    assert percents(row) == pytest.approx(average, abs=0.011)  # both are rounded


def test_the_mean_of_all_sets_is_that_of_the_averages() -> None:
    tasks = [len(entry["tasks"]) for entry in published().averages]
    assert sum(tasks) == 56
    for model, mean in enumerate(published().mean):
        weighted = sum(count * entry["scores"][model] for count, entry in zip(tasks, published().averages))
        assert weighted / 56 == pytest.approx(mean, abs=0.011)


def test_a_task_alone() -> None:
    assert percents(published().of_score(score("SciFact", "Retrieval"))) == [61.74, 65.42, 69.43, 69.29]
    assert percents(published().of_score(score("AmazonReviewsClassification", "Classification", "de"))) == [
        26.85, 30.45, None, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{"task": "SciFact.v2"}, {"split": "train"}, {"metric": "mrr_at_10"}, {"subset": "de"}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_not_the_same_has_no_row(changes: dict[str, str]) -> None:
    other = dataclasses.replace(score("SciFact", "Retrieval"), **changes)
    assert published().of_score(other) is None
    assert published().of_task([other]) is None
    assert published().of_type("Retrieval", by_task([score("NFCorpus", "Retrieval"), other])["Retrieval"]) is None


def test_means_over_the_same_subsets() -> None:
    languages = ("en", "de", "es", "fr", "ja", "zh")
    scores = [score("AmazonReviewsClassification", "Classification", language) for language in languages]
    first = sum((38.97, 26.85, 38.97, 38.39, 28.31, 35.70)) / 6
    assert percents(published().of_task(scores)) == [
        pytest.approx(first, abs=0.005),
        pytest.approx(37.20, abs=0.01),
        None,
        None,
    ]
    # Of 51 languages only the mean was published, and English.
    massive = [score("MassiveIntentClassification", "Classification", str(number)) for number in range(51)]
    assert percents(published().of_task(massive)) == [45.88, 48.68, None, None]
    assert published().of_task(massive[:50]) is None
    english = [score("MassiveIntentClassification", "Classification", "en")]
    assert percents(published().of_task(english)) == [66.09, 67.93, 70.39, 72.04]


def test_averages_of_the_paper_for_its_own_sets_only() -> None:
    clustering = benchmark("Clustering")
    row = published().of_type("Clustering", by_task(clustering)["Clustering"])
    assert row is not None
    assert row.averaged
    assert percents(row) == [36.89, 39.11, 40.74, 40.81]
    assert published().of_type("Clustering", by_task(clustering[:-1])["Clustering"]) is None

    whole = published().of_run(by_task(benchmark()))
    assert whole is not None
    assert whole.averaged
    assert percents(whole) == [55.80, 58.28, 59.86, 60.63]
    assert published().of_run(by_task(benchmark()[:-1])) is None
    assert published().of_run({}) is None
    some = published().of_run(by_task([score("SciFact", "Retrieval"), score("STSBenchmark", "STS")]))
    assert some is not None
    assert not some.averaged
    assert percents(some)[0] == pytest.approx((61.74 + 83.63) / 2, abs=0.005)


def test_every_entry_names_its_source_and_is_there_once() -> None:
    entries = published().tasks
    assert {entry["source"] for entry in entries} <= published().sources.keys()
    keys = [(*(entry[name] for name in ("task", "subset", "split", "metric")),) for entry in entries]
    assert len(set(keys)) == len(keys)
    assert all(len(entry["scores"]) == len(published().models) for entry in entries)
    assert all(0 < value < 100 for entry in entries for value in entry["scores"] if value is not None)


@pytest.mark.slow
def test_names_are_those_of_mteb() -> None:
    import mteb

    def described(tasks: Iterable) -> set[tuple[str, str, str, str]]:
        return {
            (task.metadata.name, task.metadata.type, split, subset)
            for task in tasks
            for split in task.eval_splits
            for subset in task.hf_subsets
        }

    assert {(s.task, s.type, s.split, s.subset) for s in benchmark()} == described(
        mteb.get_benchmark("MTEB(eng, v1)").tasks
    )
    for entry in published().tasks:
        if entry["source"] == "cards":  # of protocols that mteb does not have
            continue
        task = mteb.get_task(entry["task"])
        assert task.metadata.type == entry["type"]
        assert entry["split"] in task.eval_splits
        assert entry["metric"] in (task.metadata.main_score, "mrr_at_10")
        if "subsets" in entry:
            assert len(task.hf_subsets) == entry["subsets"]
        else:
            assert entry["subset"] in task.hf_subsets
