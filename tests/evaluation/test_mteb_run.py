"""Evaluations: scores and items of local tasks, runs that go on where they were, tasks without data."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from datasets import Dataset
from sklearn.metrics import average_precision_score, f1_score, v_measure_score

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import mteb
from mteb.abstasks import AbsTask, AbsTaskClustering
from mteb.abstasks.clustering_legacy import AbsTaskClusteringLegacy

from jaxembed.embedder import Embedder
from jaxembed.errors import InputError
from jaxembed.evaluation import MTEBModel, benchmark_tasks, evaluate, named_tasks, to_mteb
from jaxembed.evaluation.comparison import compare
from jaxembed.evaluation.items import whole
from jaxembed.evaluation.mteb_samples import sample_texts
from jaxembed.evaluation.scores import Run
from jaxembed.evaluation.tasks import RetrievalTask

from local_tasks import CANDIDATES, CHUNK, COUNT, LOCAL_TASKS
from runs import write_base

pytestmark = pytest.mark.usefixtures("quick_compilation")

TASKS: dict[str, Any] = {task.name: task for task in LOCAL_TASKS}
OTHERS = [
    dataclasses.replace(TASKS["retrieval"], name=metric, metric=metric) for metric in ("mrr_at_10", "recall_at_5")
]
SOME = [TASKS["retrieval"], TASKS["code search"], TASKS["sts"], TASKS["reranking"]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MTEBModel:
    return MTEBModel(Embedder.from_pretrained(write_base(tmp_path_factory.mktemp("base") / "model")), name="tiny")


@pytest.fixture(scope="module")
def run(model: MTEBModel) -> Run:
    tasks = [*SOME, *(TASKS[name] for name in ("classes", "pairs", "clusters", "bitext")), *OTHERS]
    return evaluate(model, tasks, progress=False)


def test_a_run(run: Run, model: MTEBModel) -> None:
    assert (run.model, run.revision, run.device) == ("tiny", model.revision, "1 × cpu")
    assert run.versions["mteb"] == mteb.__version__
    assert [(score.task, score.type, score.metric) for score in run.scores] == [
        ("retrieval", "Retrieval", "ndcg_at_10"),
        ("code search", "Retrieval", "mrr"),
        ("sts", "STS", "cosine_spearman"),
        ("reranking", "Reranking", "map_at_1000"),
        ("classes", "Classification", "accuracy"),
        ("pairs", "PairClassification", "max_ap"),
        ("clusters", "Clustering", "v_measure"),
        ("bitext", "BitextMining", "f1"),
        ("mrr_at_10", "Retrieval", "mrr_at_10"),
        ("recall_at_5", "Retrieval", "recall_at_5"),
    ]
    texts = int(run.notes[-1].partition(" texts with ")[0].replace(",", ""))
    # Four of retrieval and one of STS, each query with its candidates, texts to learn from and to be tested on, pairs,
    # texts to cluster, translations.
    assert texts == 5 * 2 * COUNT + (1 + CANDIDATES) * COUNT + 2 * COUNT + 2 * COUNT + COUNT + 2 * COUNT


def test_items(run: Run) -> None:
    scores = {score.task: score for score in run.scores}
    for name in ("retrieval", "code search", "reranking", "classes", "mrr_at_10", "recall_at_5"):
        items = scores[name].items
        assert items is not None
        assert len(items["value"]) == COUNT
        assert np.mean(items["value"]) == pytest.approx(scores[name].value, abs=1e-5)  # mteb rounds to five digits
    items = scores["sts"].items
    assert items is not None
    assert items["grade"] == TASKS["sts"].grades
    assert scipy.stats.spearmanr(items["cosine"], items["grade"])[0] == pytest.approx(scores["sts"].value, abs=1e-9)
    items = scores["pairs"].items
    assert items is not None
    labels = items["label"]
    assert labels == TASKS["pairs"].labels
    measures = {name: average_precision_score(labels, ranks) for name, ranks in items.items() if name != "label"}
    assert measures == pytest.approx({name: scores["pairs"].metrics[f"{name}_ap"] for name in measures}, abs=1e-12)
    assert max(measures.values()) == pytest.approx(scores["pairs"].value, abs=1e-12)
    items = scores["bitext"].items
    assert items is not None
    assert items["gold"] == list(range(COUNT))
    zero: Any = 0  # not in its types
    f1 = f1_score(items["gold"], items["predicted"], average="weighted", zero_division=zero)
    assert f1 == pytest.approx(scores["bitext"].value, abs=1e-9)


def test_items_of_clusterings(run: Run) -> None:
    [score] = (score for score in run.scores if score.task == "clusters")
    assert score.items is not None
    rows = np.array([score.items[name] for name in ("set", "document", "label", "cluster", "times")], int)
    sets = [np.repeat(rows[:, rows[0] == number], rows[4, rows[0] == number], axis=1) for number in range(10)]
    assert np.mean([v_measure_score(each[2], each[3]) for each in sets]) == pytest.approx(score.value, abs=1e-9)
    task = to_mteb(TASKS["clusters"])
    labels = TASKS["clusters"].labels
    for each in sets:  # as mteb, seeded alike, draws them
        assert sorted(each[1]) == sorted(task.rng_state.choices(range(COUNT), k=COUNT))
        assert [labels[n] for n in each[1]] == [f"label {n}" for n in each[2]]


class Sampled(AbsTaskClustering):
    """Two levels of labels, of which some texts have one; half of the texts are taken."""

    metadata = to_mteb(TASKS["clusters"]).metadata.model_copy(update={"name": "Sampled"})
    max_fraction_of_documents_to_embed = 0.5
    max_documents_per_cluster = 40
    n_clusters = 3


class Sets(AbsTaskClusteringLegacy):
    """Sets of texts as mteb 1 has them; one set has one label."""

    metadata = to_mteb(TASKS["clusters"]).metadata.model_copy(update={"name": "Sets"})


def test_items_of_mteb_s_clusterings(model: MTEBModel) -> None:
    texts = TASKS["clusters"].texts
    levels = [[n % 4, n % 8] if n % 3 else [n % 4] for n in range(COUNT)]
    sampled: Any = Sampled()
    sets: Any = Sets()
    sampled.dataset = {"default": {"test": Dataset.from_dict({"sentences": texts, "labels": levels})}}
    groups = {"sentences": [texts[:20], texts[20:40], texts[40:]], "labels": [[0, 1] * 10, [0, 1, 2, 3] * 5, [0] * 20]}
    sets.dataset = {"default": {"test": Dataset.from_dict(groups)}}
    sampled.data_loaded = sets.data_loaded = True
    of_levels, of_sets = evaluate(model, [sampled, sets], progress=False).scores
    assert of_levels.items is not None
    rows = np.array(list(of_levels.items.values()), int)
    assert set(rows[0]) == set(range(6))
    assert len(set(rows[1])) <= COUNT // 2
    for number in range(6):
        _, documents, labels, _, times = rows[:, rows[0] == number]
        assert times.sum() == 40
        wanted = [levels[n][number // 3] for n in documents]
        assert v_measure_score(wanted, labels) == pytest.approx(1)
    assert whole(of_levels.items) == pytest.approx(of_levels.value, abs=1e-9)
    assert of_sets.items is not None
    assert len(of_sets.items["value"]) == 3
    assert of_sets.items["value"][2] == 1
    assert np.mean(of_sets.items["value"]) == pytest.approx(of_sets.value, abs=1e-9)


def test_every_kind_of_task_has_an_interval(run: Run) -> None:
    first = dataclasses.replace(run, model="first")
    for row in compare([first, dataclasses.replace(run, model="second")]).rows:
        assert [(each.low, each.high) for each in row.differences] == [(0.0, 0.0)], row.name


def test_code_search_ranks_within_chunks(run: Run, model: MTEBModel) -> None:
    task = TASKS["code search"]
    queries = model.embedder.encode_query(list(task.queries.values()))
    documents = model.embedder.encode_document(list(task.corpus.values()))
    reciprocal = []
    for start in range(0, COUNT, CHUNK):
        cosines = queries[start : start + CHUNK] @ documents[start : start + CHUNK].T
        reciprocal += [1 / np.sum(row >= row[place]) for place, row in enumerate(cosines)]
    score = run.scores[1]
    assert score.value == pytest.approx(np.mean(reciprocal), abs=1e-6)
    assert score.value == pytest.approx(score.metrics[f"mrr_at_{CHUNK}"], abs=1e-6)


def test_goes_on_after_a_stop(model: MTEBModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed, calls = model.embedder.encode, []

    def counted(texts: list[str], *arguments: Any, **options: Any) -> Any:
        calls.append(len(texts))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return embed(texts, *arguments, **options)

    monkeypatch.setattr(model.embedder, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, SOME[:2], tmp_path, progress=False)
    assert not (tmp_path / "scores.json").exists()
    found = evaluate(model, SOME[:2], tmp_path, progress=False)
    assert len(calls) == 4 + 2 + 4  # the second task, and samples for the report
    assert [score.task for score in found.scores] == ["retrieval", "code search"]
    assert {"scores.json", "report.md", "report.html"} <= {path.name for path in tmp_path.iterdir()}
    assert [score.items for score in Run.load(tmp_path).scores] == [score.items for score in found.scores]

    # Another text in a task, or a damaged file, and it is done again.
    changed = dataclasses.replace(SOME[0], queries={**SOME[0].queries, "q0": "something else"})
    file = next((tmp_path / "tasks").glob("code_search-*.json"))
    file.write_text(file.read_text()[:-5])
    before = len(calls)
    evaluate(model, [changed, SOME[1]], tmp_path, progress=False)
    assert len(calls) == before + 4 + 4
    assert len(list((tmp_path / "tasks").iterdir())) == 3


def test_a_task_of_mteb_s_is_as_new_each_time(model: MTEBModel) -> None:
    task = to_mteb(TASKS["clusters"])
    assert (
        evaluate(model, [task], progress=False).scores[0].value
        == evaluate(model, [task], progress=False).scores[0].value
    )


def test_data_that_cannot_be_loaded(model: MTEBModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_data(self: AbsTask, **_: Any) -> None:
        raise ConnectionError("no network\nat all")

    task = mteb.get_task("STSBenchmark")
    monkeypatch.setattr(type(task), "load_data", load_data)
    run = evaluate(model, [task, TASKS["sts"]], progress=False)
    assert [score.task for score in run.scores] == ["sts"]
    assert run.notes[0] == "STSBenchmark: left out, its data cannot be loaded: no network"
    with pytest.raises(InputError, match="nothing could be evaluated\nSTSBenchmark: left out"):
        evaluate(model, [task], progress=False)


def test_notes_of_a_task(model: MTEBModel) -> None:
    task = dataclasses.replace(TASKS["sts"], notes=("2 rows without a grade are left out",))
    assert evaluate(model, [task], progress=False).notes[0] == "sts: 2 rows without a grade are left out"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instructions": {"Retrieval-query": "x"}}, "instructions: none of the tasks has the name or type 'Retrieval"),
        ({"symmetric": ["sst"]}, r"symmetric: none of the tasks has the name or type 'sst'; did you mean sts\?"),
    ],
)
def test_names_of_no_task(options: dict[str, Any], message: str, model: MTEBModel) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(MTEBModel(model.embedder, **options), [TASKS["sts"]], progress=False)


def test_wrong_tasks(model: MTEBModel) -> None:
    with pytest.raises(InputError, match="there is nothing to evaluate on"):
        evaluate(model, [])
    with pytest.raises(InputError, match="two tasks have the name sts"):
        evaluate(model, [TASKS["sts"], TASKS["sts"]])
    with pytest.raises(InputError, match=r"mteb: 'SciFakt' not found\. Did you mean: 'SciFact'"):
        named_tasks(["SciFakt"])
    with pytest.raises(InputError, match=r"mteb: benchmark 'MTEB\(eng, v9\)' not found"):
        benchmark_tasks("MTEB(eng, v9)")
    with pytest.raises(InputError, match="CIFAR10: a task of image; expected one of texts alone"):
        evaluate(model, named_tasks(["CIFAR10"]))


def test_a_folder_that_cannot_be_written(model: MTEBModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.embedder, "encode", lambda *_, **__: pytest.fail("embedded before"))
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "evaluation", Path("/proc/evaluation")):
        with pytest.raises(InputError, match=f"--output {folder}: cannot be written: "):
            evaluate(model, [TASKS["sts"]], folder, progress=False)


def test_the_paper_s_benchmark() -> None:
    types = [task.metadata.type for task in benchmark_tasks("MTEB(eng, v1)")]
    assert {kind: types.count(kind) for kind in types} == {
        "Classification": 12,
        "Retrieval": 15,
        "Clustering": 11,
        "Reranking": 4,
        "STS": 10,
        "PairClassification": 3,
        "Summarization": 1,
    }


def test_a_task_that_mteb_cannot_score(
    model: MTEBModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those after it are scored, and it is tried again by the next call."""
    broken = to_mteb(dataclasses.replace(TASKS["pairs"], name="broken"))

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("pos_label=1 is not a valid label\nat all")

    with monkeypatch.context() as patch:
        patch.setattr(type(broken), "evaluate", fail)
        found = evaluate(model, [broken, TASKS["sts"]], tmp_path, progress=False)
    assert [score.task for score in found.scores] == ["sts"]
    assert found.notes[0] == "broken: left out, it cannot be scored: pos_label=1 is not a valid label"
    assert "Traceback" in caplog.text
    again = evaluate(model, [broken, TASKS["sts"]], tmp_path, progress=False)
    assert [score.task for score in again.scores] == ["broken", "sts"]


def test_a_score_that_is_no_number(model: MTEBModel, tmp_path: Path) -> None:
    task = dataclasses.replace(TASKS["sts"], first=["same"] * COUNT, second=["same"] * COUNT)
    found = evaluate(model, [task], tmp_path, progress=False)
    assert np.isnan(found.scores[0].value)
    assert found.notes[0] == "sts: no cosine_spearman, as where all embeddings are equal"
    assert "| sts | cosine_spearman | – |" in (tmp_path / "report.md").read_text()
    assert evaluate(model, [task], tmp_path, progress=False).notes[0] == found.notes[0]  # of the file, this time


def test_the_data_of_a_task_are_known_by_their_texts(model: MTEBModel) -> None:
    """Not by its name, its instruction or its notes."""
    task = TASKS["sts"]
    others = [
        dataclasses.replace(task, name="other", instruction="how alike: ", notes=("a note",)),
        dataclasses.replace(task, name="changed", first=["new", *task.first[1:]]),
    ]
    one, other, changed = (score.data for score in evaluate(model, [task, *others], progress=False).scores)
    assert one == other
    assert len({one, changed, None}) == 3


def test_samples_without_the_query_itself() -> None:
    """No negative pair of a task whose queries are documents is a text and itself."""
    texts = {f"x{n}": f"text {n}" for n in range(5)}
    task = RetrievalTask(
        "a", texts, texts, {f"x{n}": {f"x{(n + 1) % 5}": 1} for n in range(5)}, ignore_identical_ids=True
    )
    found = sample_texts(to_mteb(task))
    assert found is not None
    assert len(found.negatives) == 5
    assert all(first != second for first, second in found.negatives)
