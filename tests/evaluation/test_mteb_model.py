"""mteb's scores of an exported model: by `MTEBModel`, and by sentence-transformers; roles, instructions, revisions."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import mteb
from datasets import Dataset
from flax import nnx
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

from jaxembed.embedder import Embedder
from jaxembed.errors import InputError
from jaxembed.evaluation import MTEBModel, to_mteb
from jaxembed.evaluation.mteb_model import model_name
from jaxembed.evaluation.mteb_samples import sample_texts
from jaxembed.evaluation.tasks import LocalTask
from jaxembed.text.format import DEFAULT_TEXT_FORMAT, UDEVER, UDEVER_MARKERS, TextFormat
from jaxembed.text.tokenizer import TextTokenizer, train_byte_level_bpe, with_markers

from blooms import random_bloom
from local_tasks import LOCAL_TASKS
from runs import SHAPE, make_rows

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),  # mteb, of tensors of its own
]

TASKS = {task.name: task for task in LOCAL_TASKS}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    """With room for four markers, which its tokenizer has."""
    folder = tmp_path_factory.mktemp("base")
    random_bloom(dataclasses.replace(SHAPE, vocab_size=SHAPE.vocab_size + 4)).save_pretrained(folder)
    texts = [text for row in make_rows(50) for text in row.values()]
    tokenizer = with_markers(train_byte_level_bpe(texts, SHAPE.vocab_size), UDEVER_MARKERS)
    TextTokenizer(tokenizer, DEFAULT_TEXT_FORMAT).save(folder)
    return Embedder.from_pretrained(folder)


def embedder(base: Embedder, text_format: TextFormat = DEFAULT_TEXT_FORMAT) -> Embedder:
    """Of the same weights."""
    return Embedder(base.decoder, TextTokenizer(base.tokenizer.tokenizer, text_format))


def scores(model: Any, task: LocalTask) -> dict[str, float]:
    result = mteb.evaluate(model, to_mteb(task), cache=None, show_progress_bar=False)
    found = result.task_results[0].scores["test"][0]
    return {name: value for name, value in found.items() if isinstance(value, float)}


@pytest.mark.parametrize(
    ("text_format", "names"),
    [(DEFAULT_TEXT_FORMAT, list(TASKS)), (UDEVER, ["retrieval", "sts"])],
    ids=["prefixes", "markers"],
)
def test_the_same_scores_as_by_sentence_transformers(
    text_format: TextFormat, names: list[str], base: Embedder, tmp_path: Path
) -> None:
    text_format = dataclasses.replace(text_format, max_length=32)
    embedder(base, text_format).save_pretrained(tmp_path / "model", verify=False)
    ours, theirs = MTEBModel(tmp_path / "model"), SentenceTransformer(str(tmp_path / "model"), device="cpu")
    for task in map(TASKS.__getitem__, names):
        expected, found = scores(theirs, task), scores(ours, task)
        assert found.keys() == expected.keys()
        assert 0.1 < abs(found["main_score"]) < 0.95
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=1e-4, nan_ok=True), (task.name, name)


def batches(texts: list[str]) -> Any:
    """As mteb hands over texts."""
    return DataLoader(Dataset.from_dict({"text": texts}), batch_size=2)


TEXTS = ["a few words", "and more", "of them"]
CLAIMS = mteb.get_task("SciFact").metadata
PAIRS = mteb.get_task("STSBenchmark").metadata


@pytest.mark.parametrize(
    ("options", "metadata", "part", "role", "prompt"),
    [
        ({}, CLAIMS, PromptType.query, "query", None),
        ({}, CLAIMS, PromptType.document, "document", None),
        ({}, PAIRS, None, "query", None),
        ({"symmetric": ["Retrieval"]}, CLAIMS, PromptType.document, "query", None),
        ({"instructions": {"query": "q ", "Retrieval-query": "r "}}, CLAIMS, PromptType.query, "query", "query: r "),
        (
            {"instructions": {"SciFact": "s ", "Retrieval": "r "}},
            CLAIMS,
            PromptType.document,
            "document",
            "document: s ",
        ),
        ({"instructions": {"query": "q "}}, PAIRS, None, "query", None),
        ({"instructions": {"STS": "alike: "}}, PAIRS, None, "query", "query: alike: "),
        (
            {"instruction_template": "Task: {instruction}; "},
            CLAIMS,
            PromptType.query,
            "query",
            "query: Task: Given a scientific claim, retrieve documents that support or refute the claim; ",
        ),
        ({"instruction_template": "Task: {instruction}; "}, CLAIMS, PromptType.document, "document", None),
    ],
)
def test_how_texts_are_read(
    options: dict[str, Any], metadata: Any, part: PromptType | None, role: str, prompt: str | None, base: Embedder
) -> None:
    model = MTEBModel(base, **options)
    found = model.encode(batches(TEXTS), task_metadata=metadata, prompt_type=part, batch_size=32)
    np.testing.assert_array_equal(found, base.encode(TEXTS, role, prompt))


def test_the_instruction_of_a_local_task(base: Embedder) -> None:
    task = to_mteb(dataclasses.replace(TASKS["retrieval"], instruction="find "))
    model = MTEBModel(base)
    for part, prompt in ((PromptType.query, "query: find "), (PromptType.document, "document: ")):
        found = model.encode(batches(TEXTS), task_metadata=task.metadata, prompt_type=part)
        np.testing.assert_array_equal(found, base.encode(TEXTS, part.value, prompt))


def test_length_and_width(base: Embedder) -> None:
    model = MTEBModel(base, normalize=False, truncate_dim=8)
    found = model.encode(batches(TEXTS), task_metadata=PAIRS)
    np.testing.assert_array_equal(found, base.encode(TEXTS, normalize_embeddings=False)[:, :8])
    assert model.mteb_model_meta.embed_dim == 8


def test_name_and_revision(base: Embedder, tmp_path: Path) -> None:
    other = embedder(base)
    other.replace_state(jax.tree.map(lambda array: array + 1, nnx.state(base.model)))
    shorter = dataclasses.replace(DEFAULT_TEXT_FORMAT, max_length=20)
    other_tokens = train_byte_level_bpe(["other words and more of them"], SHAPE.vocab_size)
    models = [
        MTEBModel(embedder(base)),
        MTEBModel(other),
        MTEBModel(embedder(base, shorter)),
        MTEBModel(embedder(base), instructions={"query": "q "}),
        MTEBModel(embedder(base), normalize=False),
        MTEBModel(embedder(base), symmetric=["STS"]),
        MTEBModel(Embedder(base.decoder, TextTokenizer(other_tokens, DEFAULT_TEXT_FORMAT))),
    ]
    revisions = [model.mteb_model_meta.revision for model in models]
    assert len(set(revisions)) == len(models)
    assert revisions[0] == MTEBModel(embedder(base)).revision
    assert {revision.startswith(base.model_hash[:16]) for revision in revisions if revision != revisions[1]} == {True}

    trained = models[0]  # the same object, after its embedder was given other weights
    trained.embedder.replace_state(jax.tree.map(lambda array: array + 1, nnx.state(base.model)))
    assert trained.revision == trained.mteb_model_meta.revision == revisions[1]

    embedder(base).save_pretrained(tmp_path / "run" / "model", verify=False)
    saved = MTEBModel(tmp_path / "run" / "model")
    assert (saved.mteb_model_meta.name, saved.revision) == ("run/model", revisions[0])
    assert model_name("izhx/udever-bloom-560m") == "izhx/udever-bloom-560m"
    assert model_name("~nobody-of-this-name/model") == "~nobody-of-this-name/model"


def test_a_damaged_model(base: Embedder) -> None:
    damaged = embedder(base)
    damaged.replace_state(jax.tree.map(lambda array: array * np.nan, nnx.state(base.model)))
    for name in ("retrieval", "sts", "bitext", "classes"):
        with pytest.raises(
            InputError, match=rf"^{name}: the embedding of the text '.*' is not finite: the model is dam"
        ):
            scores(MTEBModel(damaged), TASKS[name])


def test_samples_of_texts_with_several_labels_or_none() -> None:
    task: Any = to_mteb(TASKS["classes"])
    texts = [f"text {n}" for n in range(9)]
    labels = [[], [3, 1], [], [2], [1], [], [2, 3], [3], []]
    task.dataset["test"] = Dataset.from_dict({"text": texts, "label": labels})
    found = sample_texts(task)
    assert found is not None
    assert dict(zip(found.texts, found.labels)) == {text: str(some[0]) for text, some in zip(texts, labels) if some}
    task.dataset["test"] = Dataset.from_dict({"text": texts, "label": [[]] * 9})
    assert sample_texts(task) is None


def test_a_template_without_a_place(base: Embedder) -> None:
    with pytest.raises(InputError, match=r"instruction_template: expected \"\{instruction\}\" in it, found 'Task: '"):
        MTEBModel(base, instruction_template="Task: ")
