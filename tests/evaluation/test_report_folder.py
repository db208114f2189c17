"""The folder of a run: its table beside the paper's, its plots, and a page that needs nothing else."""

import base64
import dataclasses
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxembed.errors import InputError
from jaxembed.evaluation import plots
from jaxembed.evaluation.report import Samples, scores_table, write_report
from jaxembed.evaluation.scores import Run, TaskScore

NASTY = '<script>alert("x")</script> | `$a_b$` 検索'


def score(task: str, kind: str, value: float, metric: str, subset: str = "default", split: str = "test") -> TaskScore:
    return TaskScore(task, kind, subset, split, metric, value, {metric: value}, 2.0)


@pytest.fixture
def run() -> Run:
    scores = [
        score("SciFact", "Retrieval", 0.6, "ndcg_at_10"),
        score("MSMARCO", "Retrieval", 0.3, "ndcg_at_10", split="dev"),
        score("AmazonReviewsClassification", "Classification", 0.4, "accuracy", "en"),
        score("AmazonReviewsClassification", "Classification", 0.2, "accuracy", "de"),
        score("SprintDuplicateQuestions", "PairClassification", 0.9, "max_ap"),
        score("TwitterSemEval2015", "PairClassification", 0.6, "max_ap"),
        score("TwitterURLCorpus", "PairClassification", 0.8, "max_ap"),
        score(NASTY, "Clustering", 0.5, "v_measure"),
    ]
    versions = {"jaxembed": "0.1.0", "mteb": "2.26.24"}
    return Run("me/model", "5e1f" * 16, "2026-11-26T19:00:00", "cpu", versions, scores, ["2 texts were empty"])


@pytest.fixture
def samples() -> Samples:
    random = np.random.default_rng(0)
    centres = np.repeat(np.eye(12, 16), 5, axis=0)
    labels = [f"_label $ {number} <b>" if number else "検索" for number in range(12) for _ in range(5)]
    return Samples(
        embeddings=centres + 0.05 * random.normal(size=centres.shape),
        labels=labels,
        positives=np.linspace(0.4, 0.9, 50),
        negatives=np.linspace(-0.2, 0.5, 80),
    )


def cells(run: Run) -> dict[str, list[str]]:
    table = scores_table(run)
    return {row[0]: list(row[1:]) for row in table.rows}


def test_the_published_models_beside_it(run: Run) -> None:
    assert list(scores_table(run).header)[:5] == ["", "metric", "me/model", "udever-bloom-560m", "udever-bloom-1b1"]
    found = cells(run)
    assert found["SciFact"] == ["ndcg_at_10", "60.00", "61.74", "65.42", "69.43", "69.29"]
    assert found["Retrieval, mean of 2 tasks"] == ["", "45.00", "47.96", "51.85", "54.84", "55.66"]
    assert found["AmazonReviewsClassification"] == ["accuracy", "30.00", "32.91", "35.77", "–", "–"]
    assert found["– de"] == ["", "20.00", "26.85", "30.45", "–", "–"]
    assert found["SprintDuplicateQuestions"] == ["max_ap", "90.00", "–", "–", "–", "–"]
    # Not published one by one: the paper's average of these three.
    assert found["PairClassification, mean of 3 tasks"] == ["", "76.67", "81.05†", "83.11†", "84.06†", "85.40†"]
    assert found["all, mean of 7 tasks"][1:] == [f"{100 * (0.6 + 0.3 + 0.3 + 0.9 + 0.6 + 0.8 + 0.5) / 7:.2f}", *"––––"]
    assert found["all, mean of 4 types"][1] == f"{100 * (0.45 + 0.3 + 2.3 / 3 + 0.5) / 4:.2f}"


def test_a_mean_over_different_metrics_says_so(run: Run) -> None:
    code = score("Code", "Retrieval", 0.9, "mrr")
    mixed = dataclasses.replace(run, scores=[*run.scores, code])
    assert cells(mixed)["Retrieval, mean of 3 tasks"][0] == "ndcg_at_10, mrr"


def test_what_is_seen_is_said(tmp_path: Path, run: Run, samples: Samples) -> None:
    """The tasks of the map and of the histogram, and how many texts and pairs there are."""
    named = dataclasses.replace(samples, labelled=NASTY, paired="SciFact", pairs="of a query and a document")
    write_report(run, tmp_path, samples=named)
    page = Page((tmp_path / "report.html").read_text())
    assert page.tags.count("figcaption") == 3
    for said in (
        f"{NASTY}: 60 texts drawn at random, coloured by their label.",
        "SciFact: cosines of 50 positive and 80 negative pairs: pairs of a query and a document.",
        "scores: main metrics, in percent",
    ):
        assert said in page.text
    assert "\nSciFact: cosines of 50 positive" in (tmp_path / "report.md").read_text()
    figure = plots.similarity_histogram(np.array([0.9]), np.array([0.1]), task="$a_b$")
    assert figure.axes[0].get_title() == "$a_b$: AUC 1.000"
    plots.png(figure)  # not as a formula
    figure = plots.scores_by_type({run.model: run})
    assert figure.axes[0].get_title() == "me/model"
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()][1] == "Clustering (1)"
    assert "%" in figure.axes[0].get_ylabel()


def test_no_columns_where_nothing_is_the_same(run: Run) -> None:
    mine = Run("m", "1", "2026", "cpu", {}, [score("Mine", "STS", 0.5, "cosine_spearman")], [])
    table = scores_table(mine)
    assert list(table.header) == ["", "metric", "m"]
    assert [list(row) for row in table.rows] == [
        ["STS, 1 task", "", "50.00"],
        ["Mine", "cosine_spearman", "50.00"],
    ]


class Page(HTMLParser):
    """What a page asks for, and its cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"


def test_folder(tmp_path: Path, run: Run, samples: Samples) -> None:
    write_report(run, tmp_path, samples=samples)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    pictures = {"scores_by_type.png", "embedding_map.png", "similarity_histogram.png"}
    assert set(files) == {"scores.json", "report.md", "report.html", *pictures}
    assert Run.load(tmp_path) == run

    text = files["report.md"].decode()
    assert "| SciFact | ndcg_at_10 | 60.00 | 61.74 |" in text
    assert "| **PairClassification, mean of 3 tasks** |  | **76.67** | **81.05†** |" in text
    assert "\n- 2 texts were empty\n" in text
    assert "\n- †: the average of the paper's table (arXiv 2310.08232" in text
    assert r"\<script\>alert" in text
    assert set(re.findall(r"!\[.*\]\((.*)\)", text)) == pictures
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}
    assert widths == {8}  # a "|" in a name parts no cells

    page = Page(files["report.html"].decode())
    assert not {"script", "link", "iframe", "b"} & set(page.tags)
    assert NASTY in page.text
    found = {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.sources}
    assert found == {files[name] for name in pictures}

    write_report(run, tmp_path)  # without samples: the plots of earlier ones are gone
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"scores.json", "report.md", "report.html", "scores_by_type.png"}


def test_a_run_without_scores(tmp_path: Path) -> None:
    write_report(Run("m", "1", "2026", "cpu", {}, [], ["every task failed"]), tmp_path)
    assert "every task failed" in (tmp_path / "report.md").read_text()


def test_equal_samples_give_equal_maps(samples: Samples) -> None:
    assert samples.embeddings is not None
    one, two = (plots.png(plots.embedding_map(samples.embeddings, samples.labels)) for _ in range(2))
    assert one == two
    assert one != plots.png(plots.embedding_map(samples.embeddings, samples.labels, method="PCA"))


@pytest.mark.parametrize("vectors", [np.eye(3, 5), np.eye(4, 1), np.ones((12, 4)), np.zeros((4, 4))])
def test_maps_of_few_or_equal_texts(vectors: np.ndarray) -> None:
    assert plots.png(plots.embedding_map(vectors)).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.embedding_map(np.eye(2)), "at least 3 texts"),
        (lambda: plots.embedding_map(np.full((4, 4), np.nan)), "expected finite vectors"),
        (lambda: plots.embedding_map(np.eye(4), ["a"]), "1 labels for 4 texts"),
        (lambda: plots.similarity_histogram(np.empty(0), np.ones(3)), "expected finite cosines of positives, found 0"),
        (lambda: plots.similarity_histogram(np.ones(3), np.array([np.inf])), "expected finite cosines of negatives"),
    ],
)
def test_what_cannot_be_drawn(draw: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw()


@pytest.mark.parametrize(("module", "name"), [("matplotlib.figure", "matplotlib"), ("sklearn.metrics", "scikit-learn")])
def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"plots need {name}: pip install 'jaxembed\[eval\]'"):
        plots.similarity_histogram(np.ones(3), np.zeros(3))


def test_the_chance_that_a_positive_is_nearer() -> None:
    figure = plots.similarity_histogram(np.array([0.9, 0.5]), np.array([0.5, 0.1, 0.6]))
    assert figure.axes[0].get_title() == f"AUC {(3 + 0.5 + 1) / 6:.3f}"
