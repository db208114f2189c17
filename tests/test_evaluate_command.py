"""`jaxembed evaluate` from files to a report, its messages, and the recipe that reproduces the paper's scores."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest

from jaxembed import evaluate, evaluation, sharding
from jaxembed.__main__ import run_command
from jaxembed.errors import InputError
from jaxembed.evaluation.scores import Run, TaskScore
from jaxembed.evaluation.tasks import LocalTask
from jaxembed.text.format import DEFAULT_TEXT_FORMAT, UDEVER_MARKERS
from jaxembed.text.tokenizer import TextTokenizer, train_byte_level_bpe, with_markers

from blooms import random_bloom
from local_tasks import LOCAL_TASKS
from runs import SHAPE, make_rows, write_base, write_jsonl

pytestmark = pytest.mark.usefixtures("quick_compilation")

REPRODUCE = Path(__file__).parents[1] / "configs" / "reproduce-udever.yaml"
TASKS = {task.name: task for task in LOCAL_TASKS}


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled for eight takes longer than all the rest here."""
    monkeypatch.setattr(sharding, "local_mesh", lambda fsdp: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def beir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in BEIR's layout."""
    folder = tmp_path_factory.mktemp("data") / "beir"
    (folder / "qrels").mkdir(parents=True)
    rows = make_rows(30)
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{n}", "text": row["anchor"]} for n, row in enumerate(rows)])
    write_jsonl(
        folder / "corpus.jsonl", [{"_id": f"d{n}", "title": "", "text": row["positive"]} for n, row in enumerate(rows)]
    )
    judged = "".join(f"q{n}\td{n}\t1\n" for n in range(len(rows)))
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    return folder


@pytest.fixture(scope="module")
def sts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"s1": row["anchor"], "s2": row["positive"], "score": n % 5} for n, row in enumerate(make_rows(30))]
    file = tmp_path_factory.mktemp("data") / "alike.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def run(*arguments: object) -> int:
    return run_command(evaluate.main, [str(argument) for argument in arguments])


def test_files_to_a_report(
    model: Path, beir: Path, sts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ["--task", beir, "--task", f"sts:{sts},name=alike"]
    for width in (16, 8):
        folder = tmp_path / str(width)
        assert run("--model", model, *tasks, "--output", folder, "--name", f"w{width}", "--truncate-dim", width) == 0
        found = Run.load(folder)
        assert [(score.task, score.metric) for score in found.scores] == [
            ("beir", "ndcg_at_10"),
            ("alike", "cosine_spearman"),
        ]
        said = capsys.readouterr()
        assert f"| beir | ndcg_at_10 | {100 * found.scores[0].value:.2f} |" in said.out
        assert f"{folder}: scores.json, report.md, report.html" in said.out
    assert run("--compare", tmp_path / "16", tmp_path / "8", "--output", tmp_path / "both") == 0
    assert "w8 − w16" in capsys.readouterr().out
    assert (tmp_path / "both" / "comparison.html").exists()
    assert run("--compare", tmp_path / "16", tmp_path / "8") == 0
    assert "w8 − w16" in capsys.readouterr().out


def test_the_paper_s_scores_beside_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random model with udever's markers, and tasks of the same types under the same names."""
    random_bloom(dataclasses.replace(SHAPE, vocab_size=SHAPE.vocab_size + 8)).save_pretrained(tmp_path / "model")
    texts = [text for row in make_rows(50) for text in row.values()]
    tokenizer = with_markers(train_byte_level_bpe(texts, SHAPE.vocab_size), UDEVER_MARKERS)
    TextTokenizer(tokenizer, DEFAULT_TEXT_FORMAT).save(tmp_path / "model")
    stand_ins = {
        "STSBenchmark": TASKS["sts"],
        "SciFact": TASKS["retrieval"],
        "NFCorpus": TASKS["retrieval"],
        "Banking77Classification": TASKS["classes"],
    }

    def named_tasks(names: list[str]) -> list[object]:
        return [evaluation.to_mteb(dataclasses.replace(stand_ins[name], name=name)) for name in names]

    monkeypatch.setattr(evaluation, "named_tasks", named_tasks)
    model = ["--model", tmp_path / "model", "--name", "tiny"]
    assert run("--config", REPRODUCE, *model, "--output", tmp_path / "out") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "|  | metric | tiny | published | difference |"
    found = {score.task: 100 * score.value for score in Run.load(tmp_path / "out").scores}
    for task, metric, published in (
        ("STSBenchmark", "cosine_spearman", 83.63),
        ("SciFact", "ndcg_at_10", 61.74),
        ("NFCorpus", "ndcg_at_10", 27.34),
        ("Banking77Classification", "accuracy", 80.97),
    ):
        ours = found[task]
        assert f"| {task} | {metric} | {ours:.2f} | {published:.2f} | {ours - published:+.2f} |" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: --model: expected a directory or a hub id"),
        (["--model", "nowhere/at/all", "--task", "{sts}"], "nowhere/at/all"),
        (["--model", "{model}"], "error: there is nothing to evaluate on"),
        (["--model", "{model}", "--task", "nowhere.jsonl"], "error: nowhere.jsonl: no such file"),
        (["--model", "{model}", "--mteb-tasks", "SciFakt"], "error: mteb: 'SciFakt' not found. Did you mean"),
        (["--model", "{model}", "--fsdp", "0", "--task", "{sts}"], "error: --fsdp: Input should be greater than"),
        (["--compare", "{model}"], "found no scores.json"),
        (
            ["--compare", "a", "b", "--output", "gs://bucket/both"],
            "error: --output gs://bucket/both: a report is written",
        ),
        (
            ["--model", "{model}", "--task", "{sts}", "--output", "~nouser/x"],
            "error: --output ~nouser/x: no such folder",
        ),
        (["--config", "nowhere.yaml"], "error: nowhere.yaml: there is no such config file"),
        (["--config", "{config}"], ".yaml:2: tsks: no such option"),
    ],
)
def test_messages(
    arguments: list[str], message: str, model: Path, sts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model: x\ntsks: []\n")
    assert run(*(each.format(model=model, sts=sts, config=config) for each in arguments)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert len(said.err.splitlines()) == 1


def test_reports_of_models_of_one_name(
    model: Path, sts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stand_in(model: evaluation.MTEBModel, tasks: list[LocalTask], output: Path) -> Run:
        score = TaskScore(tasks[0].name, "STS", "default", "test", "cosine_spearman", 0.5, {}, 1.0)
        run = Run("m", model.revision, "2026", "cpu", {}, [score], [])
        run.save(output)
        return run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "evaluate", stand_in)
    shutil.copytree(model, tmp_path / "a" / "run" / "best")
    write_base(tmp_path / "b" / "run" / "best", scale=0.3)
    folder = Path("evaluations") / "run__best"
    assert run("--model", "a/run/best", "--task", sts) == 0
    before = (folder / "scores.json").read_text()
    first = Run.load(folder).revision

    # Other weights, as after more training, and another reading have reports of their own; the first one stays.
    for arguments in (["--model", "b/run/best"], ["--model", "a/run/best", "--truncate-dim", 8]):
        capsys.readouterr()
        for _ in range(2):
            assert run(*arguments, "--task", sts) == 0
        said = capsys.readouterr().out.splitlines()[-1]
        other = Path(said.removesuffix(": scores.json, report.md, report.html"))
        revision = Run.load(other).revision
        assert other.name == f"run__best@{revision}"
        assert revision != first
    assert sorted(path.name for path in folder.parent.iterdir())[0] == "run__best"
    assert len(list(folder.parent.iterdir())) == 3
    assert (folder / "scores.json").read_text() == before
    assert run("--compare", *folder.parent.iterdir()) == 0

    # Where it is said to go there it goes; a damaged report is none.
    assert run("--model", "b/run/best", "--task", sts, "--output", folder) == 0
    assert (folder / "scores.json").read_text() != before
    (folder / "scores.json").write_text(before[:-9])
    assert run("--model", "a/run/best", "--task", sts) == 0
    assert (folder / "scores.json").read_text() == before


def test_a_wrong_corpus(model: Path, beir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qrels = beir / "qrels" / "test.tsv"
    text = qrels.read_text()
    try:
        qrels.write_text(text.replace("\td3\t", "\tnone\t"))
        assert run("--model", model, "--task", beir) == 2
    finally:
        qrels.write_text(text)
    said = capsys.readouterr().err
    assert "none" in said
    assert "test.tsv:5" in said


def test_without_mteb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    monkeypatch.delitem(sys.modules, "jaxembed.evaluation.run", raising=False)
    monkeypatch.delitem(vars(evaluation), "evaluate", raising=False)
    with pytest.raises(InputError, match=r"evaluate needs mteb: pip install 'jaxembed\[eval\]'"):
        evaluation.evaluate  # noqa: B018 (to be looked up)
