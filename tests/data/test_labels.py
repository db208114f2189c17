"""Labelled texts and NLI rows: which pairs are made of them, and how evenly they are drawn."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxembed.data.formats import Inference, Labelled
from jaxembed.data.labels import inference_groups, label_groups
from jaxembed.data.sources import Examples, read_rows
from jaxembed.errors import InputError

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(str.strip)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def columns(examples: Examples) -> list[tuple[str, str, tuple[str, ...]]]:
    return list(zip(examples.anchors, examples.positives, map(tuple, examples.negatives), strict=True))


labelled = st.lists(st.tuples(text, st.sampled_from(["a", "b", "c"])), min_size=2, max_size=40)


@quick
@given(rows=labelled, negatives=st.integers(0, 5), seed=st.integers(0, 2**32))
def test_labelled_texts_become_pairs(tmp_path: Path, rows: list, negatives: int, seed: int) -> None:
    first: dict[str, str] = {}
    for one, label in rows:
        first.setdefault(one, label)
    sizes = Counter(first.values())
    path = write(tmp_path / "rows.jsonl", [{"text": one, "label": label, "label_text": "x"} for one, label in rows])

    def read() -> Examples:
        return read_rows(path, name="rows", label_negatives=negatives, seed=seed)

    if len(sizes) == 1 or max(sizes.values()) == 1:
        with pytest.raises(InputError, match="no negatives can be drawn" if len(sizes) == 1 else "no pair left"):
            read()
        return
    found = read()
    several = [one for one, label in first.items() if sizes[label] > 1]
    assert sorted(found.anchors) == sorted(several) == sorted(found.positives)
    for anchor, positive, others in zip(found.anchors, found.positives, found.negatives):
        assert anchor != positive
        assert first[anchor] == first[positive]
        assert first[anchor] not in {first[other] for other in others}
        assert len(set(others)) == len(others) == min(negatives, len(first) - sizes[first[anchor]])
    lonely = sum(count == 1 for count in sizes.values())
    assert found.dropped.get("only text of its label", 0) == lonely
    assert found.dropped.get("duplicate", 0) == len(rows) - len(first)
    assert columns(read()) == columns(found)


def test_negatives_of_labelled_texts_are_drawn_evenly() -> None:
    rows = [(str(place), Labelled(str(place), "abc"[place % 3])) for place in range(30)]
    drawn: Counter[str] = Counter()
    for seed in range(200):
        drawn.update(n for _, one in label_groups(rows, Counter(), seed=seed, negatives=3) for n in one.negatives)
    counts = np.array(list(drawn.values()))
    assert len(counts) == 30
    expected_count = 200 * 30 * 3 / 30
    # Chi-square with 29 degrees of freedom: 58.3 is its 0.999 quantile. Draws without replacement scatter less.
    assert ((counts - expected_count) ** 2 / expected_count).sum() < 58.3
    positives = {
        tuple(one.positives) for seed in range(20) for _, one in label_groups(rows, Counter(), seed=seed, negatives=0)
    }
    assert len(positives) == 30


sentence = st.sampled_from("abcdefg")
inference = st.lists(
    st.tuples(sentence, sentence, st.sampled_from(["entailment", "neutral", "contradiction", "-"])),
    min_size=1,
    max_size=40,
)


@pytest.mark.parametrize("keys", [("premise", "hypothesis", "label"), ("sentence1", "sentence2", "gold_label")])
@quick
@given(rows=inference, numbers=st.booleans())
def test_nli_rows_become_triples_both_ways_round(
    tmp_path: Path, keys: tuple[str, ...], rows: list, numbers: bool
) -> None:
    """The reference is the loop of SGPT's training script, with sets where it draws."""
    code = {"entailment": 0, "neutral": 1, "contradiction": 2, "-": -1}
    if keys[0] == "sentence1":
        numbers = False
    path = write(
        tmp_path / "rows.jsonl",
        [dict(zip(keys, (p, f"{h} ", code[label] if numbers else label))) for p, h, label in rows],
    )
    data: dict[str, dict[str, set]] = {}
    for one, other, label in rows:
        for a, b in ((one, other), (other, one)):
            if label != "-":
                data.setdefault(a, {"entailment": set(), "neutral": set(), "contradiction": set()})[label].add(b)
    # Beyond the script: no negative is an entailment too, and no text stands twice in a triple.
    for a, others in data.items():
        others["contradiction"] -= others["entailment"] | {a}
        others["entailment"] -= {a}
    both = {a: others for a, others in data.items() if others["entailment"] and others["contradiction"]}
    allowed = {
        triple
        for a, others in both.items()
        for e in others["entailment"]
        for c in others["contradiction"]
        for triple in ((a, e, c), (e, a, c))
    }
    if not both:
        with pytest.raises(InputError, match="no pair left"):
            read_rows(path, name="rows", format="nli")
        return
    found = read_rows(path, name="rows", format="nli")
    triples = [(a, p, *n) for a, p, n in zip(found.anchors, found.positives, found.negatives)]
    assert len(set(triples)) == len(triples)
    assert set(triples) <= allowed
    assert {a for a, *_ in triples} | {p for _, p, _ in triples} >= set(both)
    assert len(triples) + found.dropped.get("duplicate", 0) == 2 * len(both)
    assert found.dropped.get("no label", 0) == sum(label == "-" for *_, label in rows)
    assert columns(read_rows(path, name="rows", format="nli")) == columns(found)


def test_nli_triples_of_a_small_case() -> None:
    rows = [
        ("f:1", ("A man eats.", "A person eats.", "entailment")),
        ("f:2", ("A man eats.", "Nobody eats.", "contradiction")),
    ]
    dropped: Counter[str] = Counter()
    found = inference_groups([(where, Inference(*row)) for where, row in rows], dropped, seed=0)
    assert [(one.anchor, *one.positives, *one.negatives) for _, one in found] == [
        ("A man eats.", "A person eats.", "Nobody eats."),
        ("A person eats.", "A man eats.", "Nobody eats."),
    ]
    assert dropped == {"sentence without both an entailment and a contradiction": 2}
