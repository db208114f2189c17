"""Negatives and positives that take turns: by the ancestors' lists, in plans of every kind, in batches, in a config."""

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxembed.data.loader import Batches, RowLayout, TextSource, tokenize_examples
from jaxembed.data.plan import DataSet, Mixing, Rotation, run_plan
from jaxembed.data.sources import Examples, TextRows
from jaxembed.data.teacher import TeacherEmbeddings
from jaxembed.data.text_store import Picked, PickedRows
from jaxembed.text.format import DEFAULT_TEXT_FORMAT
from jaxembed.text.tokenizer import TextTokenizer, train_byte_level_bpe

TOKENIZER = TextTokenizer(train_byte_level_bpe(["sort a dict"], 300), DEFAULT_TEXT_FORMAT)


def ragged(rng: np.random.Generator, examples: int, columns: int, least: int, start: int) -> np.ndarray:
    """Numbers from `start` on, of each example at least so many, −1 at the ends."""
    table = start + np.arange(examples * columns).reshape(examples, columns)
    table[np.arange(columns) >= rng.integers(least, columns + 1, examples)[:, None]] = -1
    return table


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_it_is_taking_the_first_and_putting_it_last(taken: int) -> None:
    """`pos.pop(0)` and `pos.append` of sentence-transformers' script, for as many as are taken."""
    rng = np.random.default_rng(0)
    rotation = Rotation(ragged(rng, 20, 3, 1, 0), ragged(rng, 20, 7, 0, 100), taken)
    lists = [[row[row >= 0].tolist() for row in pool] for pool in (rotation.positives, rotation.negatives)]
    for turn in range(9):
        found = rotation.texts(np.arange(20), np.full(20, turn))
        for example in range(20):
            positives, negatives = lists[0][example], lists[1][example]
            assert found[example, 0] == positives[0]
            given = found[example, 1:]
            if len(negatives) <= taken:
                assert given.tolist() == negatives + [-1] * (taken - len(negatives))
            else:
                assert given.tolist() == negatives[:taken]
                negatives += [negatives.pop(0) for _ in range(taken)]
            positives.append(positives.pop(0))


def data_sets(rng: np.random.Generator, weight: float | None = None) -> tuple[list[DataSet], np.ndarray]:
    """One of 50 examples that rotates, with texts that repeat, and one of 30 that does not."""
    positives, negatives = ragged(rng, 50, 2, 1, 50), ragged(rng, 50, 6, 1, 150)
    rotation = Rotation(positives, negatives, 2)
    everyone = np.arange(50)
    first = np.concatenate([everyone[:, None], rotation.texts(everyone, np.zeros(50, int))], axis=1)
    other = 450 + np.arange(120).reshape(30, 4)
    hashes = np.arange(570, dtype=np.uint64)
    hashes[150:450] = rng.integers(150, 350, 300)  # negatives that others have too
    return [DataSet("a", first, weight, rotation), DataSet("b", other)], hashes


@pytest.mark.parametrize("weight", [None, 200.0])
@pytest.mark.parametrize("mixing", [Mixing(), Mixing(homogeneous=True), Mixing(cap=40)])
def test_every_pass_of_an_example_takes_the_next(mixing: Mixing, weight: float | None) -> None:
    sets, hashes = data_sets(np.random.default_rng(1), weight)
    schedule = run_plan(sets, hashes, 8, seed=3, epochs=9, mixing=mixing)
    seen: dict[int, list[int]] = defaultdict(list)
    clashes = 0
    for step in range(schedule.steps):
        examples, passes = schedule.batch(step), schedule.passes(step)
        for example, turn in zip(examples.tolist(), passes.tolist()):
            seen[example].append(turn)
        own = examples < 50
        assert sets[0].rotation is not None
        texts = np.concatenate([examples[own, None], sets[0].rotation.texts(examples[own], passes[own])], axis=1)
        texts = np.concatenate([texts, sets[1].texts[examples[~own] - 50]])
        flat = [text for row in texts for text in {int(hashes[number]) for number in row if number >= 0}]
        clashes += len(flat) - len(set(flat))
    assert len(seen) == 80
    for turns in seen.values():  # in mixed batches the last ones of an epoch are left out
        assert len(turns) == len(set(turns))
    assert max(map(len, seen.values())) >= 7
    assert clashes <= 0.02 * schedule.steps * 8

    again = run_plan(sets, hashes, 8, seed=3, epochs=9, mixing=mixing)
    for step in (schedule.steps - 1, 0, schedule.steps // 2):
        np.testing.assert_array_equal(again.batch(step), schedule.batch(step))
        np.testing.assert_array_equal(again.passes(step), schedule.passes(step))
    assert again.hash == schedule.hash


def test_the_hash_knows_what_takes_turns() -> None:
    sets, hashes = data_sets(np.random.default_rng(1))
    rotation = sets[0].rotation
    assert rotation is not None
    fewer = rotation.negatives.copy()
    fewer[np.flatnonzero(fewer[:, 4] >= 0)[0], 4:] = -1
    changed = [
        None, dataclasses.replace(rotation, negatives=fewer),
        dataclasses.replace(rotation, positives=rotation.positives[:, :1]),
    ]  # fmt: skip
    found = [
        run_plan([dataclasses.replace(sets[0], rotation=each), sets[1]], hashes, 8, seed=0, epochs=1).hash
        for each in (rotation, *changed)
    ]
    assert len(set(found)) == len(found)


class Store:
    fingerprint = "store"

    def __len__(self) -> int:
        return 400

    def __getitem__(self, row: int) -> str:
        return f"document {row}"

    def texts(self, rows: np.ndarray) -> list[str]:
        return [self[row] for row in rows.tolist()]


def test_batches_have_the_texts_scores_and_embeddings_of_their_pass(tmp_path: Path) -> None:
    """Each score and each embedding says which text it is of."""
    rng, count = np.random.default_rng(2), 12
    positives, negatives = ragged(rng, count, 3, 1, 0), ragged(rng, count, 5, 0, 100)
    store: Any = Store()
    rows = TextRows(np.arange(count), positives, negatives, {"anchors": count, "documents": 400})
    scores = np.concatenate([positives[:, :1], negatives], axis=1).astype(np.float64)
    turning = Examples(
        "a", [f"query {n}" for n in range(count)], Picked(store, positives[:, 0]), PickedRows(store, negatives), [], {},
        "a", scores=scores, rows=rows, more_positives=PickedRows(store, positives[:, 1:]),
    )  # fmt: skip
    fixed = Examples("b", [f"other {n}" for n in range(8)], [f"answer {n}" for n in range(8)], [], [], {}, "b")
    table, sets = tokenize_examples(
        [TextSource(turning, TOKENIZER, negatives=2, rotates=True), TextSource(fixed, TOKENIZER, negatives=3)],
        tmp_path,
    )
    assert [each.texts.shape for each in sets] == [(12, 5), (8, 5)]
    texts, which = np.concatenate([each.texts for each in sets]), np.repeat([0, 1], [12, 8])
    all_scores = np.full((20, 6), np.nan)
    all_scores[:12] = scores
    embeddings = np.repeat(np.arange(1, 401, dtype=np.float32)[:, None], 3, axis=1)
    teacher = TeacherEmbeddings({"documents": embeddings}, rows, 3)
    schedule = run_plan(sets, table.hashes, 5, seed=0, epochs=6)
    layout = RowLayout(64, 8, 4, 1, (1,), 0.0)
    batches = Batches(
        schedule, table, texts, which, layout, 0, all_scores, tuple(each.rotation for each in sets), (teacher, None)
    )
    names = {int(table.hashes[n]): n for n in range(len(table.hashes))}
    assert len(names) == 12 + 8 + 8 + (positives >= 0).sum() + (negatives >= 0).sum()
    seen: dict[int, set[int]] = defaultdict(set)
    for step in range(len(batches)):
        batch, examples, passes = batches[step], schedule.batch(step), schedule.passes(step)
        assert batch["teacher"].shape == (5, 5, 3)
        for place, (example, turn) in enumerate(zip(examples.tolist(), passes.tolist())):
            documents = batch["valid"].reshape(-1, 5)[:, place]
            if example >= 12:
                assert documents.tolist() == [True, False, False, False]
                assert np.isnan(batch["teacher"][place]).all()
                continue
            own = [row[row >= 0] for row in (positives[example], negatives[example])]
            taken = [int(own[0][turn % len(own[0])])]
            taken += own[1].tolist() if len(own[1]) <= 2 else own[1][(2 * turn + np.arange(2)) % len(own[1])].tolist()
            assert documents.tolist() == [True] * len(taken) + [False] * (4 - len(taken))
            for column, document in enumerate(taken):
                code = batch["candidate_codes"].reshape(-1, 5)[column, place]
                seen[document].add(int(code >= 0))
                ids = TOKENIZER([store[document]], "document")[0]
                slot = batch["pick"][batch["candidates"].reshape(-1, 5)[column, place]]
                row, number = divmod(int(slot), layout.slots)
                last = batch["last"].reshape(-1, layout.slots)[row, number]
                tokens = batch["tokens"].reshape(-1, 64)[row, last + 1 - len(ids) : last + 1]
                np.testing.assert_array_equal(tokens, ids)
                assert (batch["teacher"][place, 1 + column] == document + 1).all()
                assert column == 0 or batch["scores"][place, column] == document
            assert np.isnan(batch["scores"][place, len(taken) :]).all()
            assert np.isnan(batch["teacher"][place, 1 + len(taken) :]).all()
    assert len(seen) == (positives >= 0).sum() + (negatives >= 0).sum(), "each came at last"
    assert batches.known.width == (positives >= 0).sum(1).max() - 1
