"""The model card as its readers see it: the hub's parser, YAML, Python, and a table read back cell by cell."""

import ast
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.checkpoint.model_card import TAGS, model_card
from jaxembed.text.format import DEFAULT_TEXT_FORMAT, Role, TextFormat

PRINTABLE = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=30)
TRICKY = ["plain", 'a "quoted" name', "back\\slash", "a|b", "`code`", "```", "````", "{{ x }}", "名前: 1", "#: - & *"]


def card_of(**options):
    return model_card(**{"name": "tiny", "text_format": DEFAULT_TEXT_FORMAT, "dim": 32, **options})


def blocks(card, language):
    """The fenced blocks of a language."""
    return [text for _, text in re.findall(rf"^(`{{3,}}){language}\n(.*?)\n\1$", card, re.MULTILINE | re.DOTALL)]


def table(card, heading):
    """Rows of the table under a heading, by its column names."""
    section = card.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert all(cell == "---" for cell in cells[1])
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def loaded_name(code):
    """The string that the code passes to the class or method that loads a model."""
    tree = ast.parse(code)
    compile(tree, "card", "exec")
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (found,) = [
        call.args[0].value
        for call in calls
        if ast.unparse(call.func) in ("SentenceTransformer", "Embedder.from_pretrained")
        and isinstance(call.args[0], ast.Constant)
    ]
    return found


@pytest.mark.parametrize("base", ["bigscience/bloom-560m", "owner/a: 'b' \"c\" #1", None])
@pytest.mark.parametrize("license", ["apache-2.0", "yes", "1.0", None])
def test_the_hub_reads_the_front_matter(base, license):
    found = ModelCard(card_of(base_model=base, license=license)).data
    assert found.to_dict() == {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": list(TAGS),
        **({"base_model": base} if base else {}),
        **({"license": license} if license else {}),
    }


@given(name=PRINTABLE)
@settings(max_examples=50, deadline=None)
def test_the_code_compiles_and_loads_that_name(name):
    both = blocks(card_of(name=name), "python")
    assert [loaded_name(code) for code in both] == [name, name]


@pytest.mark.parametrize("name", TRICKY)
def test_names_come_through(name):
    card = card_of(
        name=name,
        text_format=TextFormat(Role(name), Role("", "", name)),
        description=f"About {name}.",
        training_data=[{"name": name, "pairs": 12_345}],
        config={"data": {"train": [{"name": name, "path": f"/{name}\n"}]}, "seed": 0},
        results=[{"data": name, "metric": "mrr@10", "before": 0.12345, "after": 1, "BM25": None}],
        versions={"jax": "0.10.2"},
    )
    assert f"\n# {name}\n" in card
    assert f"About {name}." in card
    assert [loaded_name(code) for code in blocks(card, "python")] == [name, name]
    (config,) = blocks(card, "yaml")
    assert yaml.safe_load(config) == {"data": {"train": [{"name": name, "path": f"/{name}\n"}]}, "seed": 0}
    assert table(card, "Training data") == [{"name": name, "pairs": "12,345"}]
    result = {"data": name, "metric": "mrr@10", "before": "0.1235", "after": "1", "BM25": "–"}
    assert table(card, "Results") == [result]
    assert table(card, "Versions") == [{"package": "jax", "version": "0.10.2"}]


def test_rows_of_different_columns_share_a_table():
    card = card_of(results=[{"data": "a", "before": 0.5}, {"data": "b", "after": 0.25}])
    assert table(card, "Results") == [
        {"data": "a", "before": "0.5000", "after": "–"},
        {"data": "b", "before": "–", "after": "0.2500"},
    ]


def test_what_it_says_of_the_embedding():
    card = card_of(dim=77, text_format=TextFormat(Role("q: "), Role("d: "), 123, normalize=False))
    assert "finetuned" not in card
    assert "trained from scratch" not in card  # which nobody said
    for said in ("77 numbers", "not normalised", "cut at 123 tokens"):
        assert said in card
    assert "trained from scratch" in card_of(config={"seed": 0})
    card = card_of(base_model="bigscience/bloom-560m")
    for said in ("finetuned from `bigscience/bloom-560m`", "of unit length"):
        assert said in card


def test_sections_without_content_are_left_out():
    headings = re.findall("^## (.*)$", card_of(), re.MULTILINE)
    assert headings == ["Text format", "Use"]
    card = card_of(weights_hash="0123abcd", versions={"jax": "1"})
    assert re.findall("^## (.*)$", card, re.MULTILINE) == ["Text format", "Use", "Weights", "Versions"]
    assert "`0123abcd`" in card


@pytest.mark.parametrize(
    ("pooling", "said"),
    [
        ("last", "the hidden state of the last token,"),
        ("mean", "the mean of the hidden states of all tokens,"),
        ("weighted_mean", "weighted by their places"),
        ("first", "the hidden state of the first token,"),
    ],
)
def test_pooling_is_said(pooling, said):
    for include_prompt in (True, False):
        text_format = TextFormat(pooling=pooling, include_prompt=include_prompt)
        card = card_of(text_format=text_format)
        assert said in card
        assert ("`include_prompt: false`" in card) == (pooling != "last" and not include_prompt)
        assert "is_causal" not in card


def test_bidirectional_attention_is_said_with_those_who_do_not_read_it():
    card = card_of(causal=False, description="Mine.")
    assert "\n\nMine.\n\nA text embedder" in card
    assert "\n\nAttention is bidirectional (`is_causal: false` in `config.json`), which transformers 5.24 or" in card
    assert "vLLM's BLOOM" in card
    assert "With sentence-transformers (6.0 or newer, transformers 5.24 or newer):" in card
