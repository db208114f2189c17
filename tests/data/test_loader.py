"""The loader against a brute-force reading of its batches: every text where the batch says, on any number of chips."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.data.cache import TokenCache, text_hash
from jaxembed.data.known import KnownPositives
from jaxembed.data.loader import (
    Batches,
    RowLayout,
    TextSource,
    TextTable,
    choose_layout,
    iterate,
    pack_batch,
    sample_lengths,
    tokenize_examples,
)
from jaxembed.data.plan import DataSet, run_plan
from jaxembed.data.sources import Examples
from jaxembed.data.text_store import Picked, PickedRows
from jaxembed.text.format import DEFAULT_TEXT_FORMAT, Role, TextFormat
from jaxembed.text.tokenizer import TextTokenizer, train_byte_level_bpe

PAD = 3
FLOATS = ("scores", "teacher")


def table_of(lengths: Sequence[int], caches: int = 3) -> TextTable:
    """Texts of these lengths, no two with the same ids, in several caches."""
    parts, starts = [], [0]
    for part in np.array_split(np.asarray(lengths, np.int64), caches):
        offsets = np.concatenate([[0], np.cumsum(part)])
        tokens = (10_000 * starts[-1] + 10 + np.arange(offsets[-1])).astype(np.int32)
        hashes = np.arange(starts[-1], starts[-1] + len(part), dtype=np.uint64)
        parts.append(TokenCache(Path(), tokens, offsets, np.arange(len(part)), hashes))
        starts.append(starts[-1] + len(part))
    join = np.concatenate
    return TextTable(
        tuple(parts), np.array(starts[:-1]), join([p.lengths for p in parts]), join([p.hashes for p in parts])
    )


def read_back(batch: dict[str, Any], layout: RowLayout, place: int) -> list[int]:
    """The ids of the text whose embedding lies at a place among the gathered slots."""
    capacity = len(batch["pick"]) // layout.chips
    chip, slot = place // capacity, int(batch["pick"][place])
    rows = slice(chip * layout.chunk_rows, (chip + 1) * layout.chunk_rows)
    tokens, segments, last = (batch[name][:, rows] for name in ("tokens", "segments", "last"))
    chunk, row, number = np.unravel_index(slot, last.shape)
    position = last[chunk, row, number]
    assert position >= 0
    own = segments[chunk, row] == segments[chunk, row, position]
    assert np.flatnonzero(own)[-1] == position
    return tokens[chunk, row][own].tolist()


def check_batch(batch: dict[str, Any], layout: RowLayout, table: TextTable, texts: np.ndarray) -> None:
    flat = texts.T.ravel()
    examples, present = len(texts), flat >= 0
    chunks, rows, length = batch["tokens"].shape
    assert (rows, length) == (layout.chips * layout.chunk_rows, layout.row_length)
    assert batch["segments"].shape == (chunks, rows, length)
    assert batch["last"].shape == (chunks, rows, layout.slots)
    places = np.concatenate([batch["own"], batch["candidates"]])
    for text, place in zip(flat[present], places[present]):
        assert read_back(batch, layout, int(place)) == table[int(text)].tolist()
    assert len(set(places[present].tolist())) == present.sum()
    np.testing.assert_array_equal(batch["valid"], present[examples:])
    np.testing.assert_array_equal(batch["positives"], np.arange(examples))
    # Nothing is there beside the texts.
    assert batch["tokens_used"] == table.lengths[flat[present]].sum() == (batch["segments"] > 0).sum()
    assert (batch["last"] >= 0).sum() == present.sum()
    assert (batch["tokens"][batch["segments"] == 0] == PAD).all()
    assert all(batch[name].dtype == np.float32 for name in FLOATS)
    arrays = [array for name, array in batch.items() if isinstance(array, np.ndarray) and name not in FLOATS]
    assert all(array.dtype in (np.int32, bool) for array in arrays)
    np.testing.assert_array_equal(batch["query_places"], batch["own"])
    np.testing.assert_array_equal(batch["data_sets"], batch["data_set"])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_text_is_where_the_batch_says(data: st.DataObject) -> None:
    chips = data.draw(st.sampled_from([1, 2, 8]))
    examples, negatives = chips * data.draw(st.integers(1, 4)), data.draw(st.integers(0, 2))
    total = examples * (2 + negatives)
    row_length = data.draw(st.sampled_from([16, 32, 48]))
    lengths = data.draw(st.lists(st.integers(1, row_length), min_size=total, max_size=total))
    table = table_of(lengths)
    texts = np.array(data.draw(st.permutations(range(total)))).reshape(examples, -1)
    missing = data.draw(st.lists(st.booleans(), min_size=examples * negatives, max_size=examples * negatives))
    texts[:, 2:][np.array(missing, bool).reshape(examples, negatives)] = -1
    layout = RowLayout(row_length, data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3)), chips, (1, 3), 0.0)
    data_set = np.arange(examples) % 2
    batch = pack_batch(table, texts, data_set, layout, PAD)
    check_batch(batch, layout, table, texts)
    np.testing.assert_array_equal(batch["data_set"], data_set)
    assert len(batch["tokens"]) >= layout.chunks_for(1)


@pytest.mark.parametrize("chips", [1, 2, 8])
def test_capacity_holds_whatever_is_missing(chips: int) -> None:
    """A step is compiled for one number of gathered slots: it must not follow the number of negatives."""
    generator = np.random.default_rng(0)
    layout = RowLayout(64, 16, 4, chips, (1, 2, 4), 0.0)
    shapes = set()
    for share in (0.0, 0.2, 0.5, 1.0):
        texts = np.arange(64 * 3).reshape(64, 3)
        texts[generator.random(64) < share, 2] = -1
        batch = pack_batch(table_of(generator.integers(4, 20, 64 * 3)), texts, np.zeros(64, int), layout, PAD)
        shapes.add(len(batch["pick"]))
    assert len(shapes) == 1
    assert shapes.pop() <= 1.1 * 64 * 3 + 8 * chips


def test_numbers_of_chunks() -> None:
    layout = RowLayout(64, 8, 4, 2, (2, 5), 0.0)
    assert [layout.chunks_for(rows) for rows in (1, 16, 17, 40, 41, 64)] == [2, 2, 5, 5, 6, 8]


def lengths_like(kind: str, generator: np.random.Generator, count: int) -> np.ndarray:
    """Queries and documents of a batch, in tokens."""
    queries = generator.lognormal(2.7, 0.4, count)
    spread = {"sentences": (3.0, 0.4), "functions": (4.6, 0.9), "passages": (4.9, 0.3)}[kind]
    lengths = np.concatenate([queries, generator.lognormal(*spread, count)])
    return np.clip(np.rint(lengths), 3, 300).astype(np.int64)


@pytest.mark.parametrize("chips", [1, 8])
@pytest.mark.parametrize("kind", ["sentences", "functions", "passages"])
def test_a_chosen_layout_is_dense(kind: str, chips: int) -> None:
    generator = np.random.default_rng(0)
    batches = [lengths_like(kind, generator, 128 * chips) for _ in range(8)]
    layout = choose_layout(batches, chips=chips, dim=256, chunk_tokens=1024)
    assert layout.chips == chips
    assert layout.row_length % 16 == 0
    assert layout.row_length >= max(lengths.max() for lengths in batches)
    assert 1 <= layout.chunk_rows <= max(1, 1024 // layout.row_length)
    assert len(layout.chunks) <= 2
    assert 0.85 <= layout.density <= 1
    # What it promises is what packing finds.
    used = positions = 0
    for lengths in batches:
        texts = np.arange(len(lengths)).reshape(2, -1).T
        batch = pack_batch(table_of(lengths), texts, np.zeros(len(texts), int), layout, PAD)
        assert len(batch["tokens"]) in layout.chunks
        used += int((batch["segments"] > 0).sum())
        positions += batch["segments"].size
    assert layout.density == pytest.approx(used / positions)


def test_a_layout_as_asked_for() -> None:
    batches = [lengths_like("functions", np.random.default_rng(seed), 64) for seed in range(4)]
    options: dict[str, Any] = {"chips": 2, "dim": 64, "chunk_tokens": 2048}
    assert choose_layout(batches, row_length=512, **options).row_length == 512
    assert choose_layout(batches, row_length=512, **options).chunk_rows == 4
    assert choose_layout(batches, chunk_rows=3, **options).chunk_rows == 3
    assert choose_layout(batches, row_length=304, chunk_rows=1, **options).chunk_rows == 1


def run_of(
    chips: int = 1, steps: int = 7, negatives: int = 1, lengths: Sequence[int] | None = None
) -> tuple[Batches, TextTable]:
    generator = np.random.default_rng(1)
    examples = 40
    table = table_of(generator.integers(2, 40, examples * (2 + negatives)) if lengths is None else lengths)
    texts = np.arange(examples * (2 + negatives)).reshape(examples, -1)
    texts[::3, 2:] = -1
    sets = [DataSet("a", texts[:25]), DataSet("b", texts[25:])]
    schedule = run_plan(sets, table.hashes, 16, seed=0, steps=steps)
    layout = choose_layout(sample_lengths(schedule, table, texts), chips=chips, dim=32, chunk_tokens=256)
    return Batches(schedule, table, texts, np.repeat([0, 1], [25, 15]), layout, PAD), table


@pytest.mark.parametrize("start", [0, 3, 6])
def test_iteration_is_random_access(start: int) -> None:
    batches, _ = run_of()
    found = list(iterate(batches, start))
    assert [batch["step"] for batch in found] == list(range(start, len(batches)))
    for batch in found:
        expected = batches[batch["step"]]
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(batch[name], value, err_msg=name)
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_a_batch_does_not_depend_on_the_chips() -> None:
    runs = {chips: run_of(chips) for chips in (1, 2, 8)}
    for step in range(7):
        seen = set()
        for batches, table in runs.values():
            batch = batches[step]
            examples = batches.schedule.batch(step)
            check_batch(batch, batches.layout, table, batches.texts[examples])
            np.testing.assert_array_equal(batch["data_set"], batches.data_set[examples])
            places = [*batch["own"], *batch["candidates"][batch["valid"]]]
            seen.add(tuple(tuple(read_back(batch, batches.layout, int(place))) for place in places))
        assert len(seen) == 1


def test_rows_hold_the_longest_text_in_or_out_of_the_sample() -> None:
    """The layout is chosen from a few batches of the first epoch; the longest text may come later."""
    lengths = np.full(40 * 3, 10)
    lengths[-2] = 200
    batches, table = run_of(steps=5, lengths=lengths)
    first_epoch = np.concatenate([batches.schedule.batch(step) for step in range(batches.schedule.steps_per_epoch)])
    assert 39 not in first_epoch  # its example is left over there
    assert batches.layout.row_length >= 200
    for step in range(len(batches)):
        check_batch(batches[step], batches.layout, table, batches.texts[batches.schedule.batch(step)])


def test_sampled_lengths_are_those_of_the_batches() -> None:
    batches, table = run_of()
    found = sample_lengths(batches.schedule, table, batches.texts)
    assert len(found) == batches.schedule.steps_per_epoch == 2
    for step, lengths in enumerate(found):
        texts = batches.texts[batches.schedule.batch(step)]
        expected = [*table.lengths[texts[texts >= 0]], *([table.lengths.max()] if step == 0 else [])]
        assert sorted(lengths) == sorted(expected)


TOKENIZER = TextTokenizer(train_byte_level_bpe(["sort a dict"], 300), DEFAULT_TEXT_FORMAT)


def read_by(
    tokenizer: TextTokenizer, sources: list[Examples], negatives: int, weights: list[float | None] | None = None
) -> list[TextSource]:
    weights = weights or [None] * len(sources)
    return [TextSource(one, tokenizer, weight=own, negatives=negatives) for one, own in zip(sources, weights)]


def examples_of(name: str, count: int, negatives: int) -> Examples:
    rows = [tuple(f"{name} {n} negative {column}" for column in range(negatives)) for n in range(count)]
    return Examples(
        name,
        [f"{name} query {n // 2}" for n in range(count)],
        [f"{name} document {n}" for n in range(count)],
        rows if negatives else [],
        [f"{name}:{n}" for n in range(count)],
        {},
        f"fingerprint of {name}",
    )


@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_tokenized_examples(tmp_path: Path, negatives: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [examples_of("a", 5, 2), examples_of("b", 4, 0)]
    table, data_sets = tokenize_examples(read_by(TOKENIZER, sources, negatives, [None, 2.0]), tmp_path)
    assert [(found.name, found.weight) for found in data_sets] == [("a", None), ("b", 2.0)]
    for source, found in zip(sources, data_sets):
        assert found.texts.shape == (len(source), 2 + negatives)
        for row, (example, anchor, positive) in enumerate(
            zip(found.texts, source.anchors, source.positives, strict=True)
        ):
            wanted = source.negatives[row][:negatives] if source.negatives else ()
            texts = [anchor, positive, *wanted]
            roles = itertools.chain(["query"], itertools.repeat("document"))
            assert (example >= 0).sum() == len(texts)
            assert (example[: len(texts)] >= 0).all()
            for number, text, role in zip(example, texts, roles):
                ids = TOKENIZER([text], role)[0]
                np.testing.assert_array_equal(table[int(number)], ids)
                assert table.lengths[number] == len(ids)
                assert table.hashes[number] == text_hash(text)
    monkeypatch.setattr(TextTokenizer, "__call__", lambda *_: pytest.fail("tokenised again"))
    again, same = tokenize_examples(read_by(TOKENIZER, sources, negatives, [None, 2.0]), tmp_path)
    np.testing.assert_array_equal(again.hashes, table.hashes)
    for one, other in zip(data_sets, same):
        np.testing.assert_array_equal(one.texts, other.texts)


def test_sources_of_one_run_do_not_share_columns(tmp_path: Path) -> None:
    """A text in both roles has the ids of each."""
    source = dataclasses.replace(examples_of("a", 2, 0), positives=["a query 0", "x"], anchors=["a query 0", "y"])
    table, (found,) = tokenize_examples(read_by(TOKENIZER, [source], 0), tmp_path)
    query, document = (table[int(text)].tolist() for text in found.texts[0])
    assert query != document
    assert table.hashes[found.texts[0, 0]] == table.hashes[found.texts[0, 1]]


def test_tokens_of_the_prompt_are_not_pooled_where_the_text_format_says_so(tmp_path: Path) -> None:
    text_format = TextFormat(
        Role("query: ", instruction="find it: "), Role("d: "), pooling="mean", include_prompt=False
    )
    tokenizer = TextTokenizer(train_byte_level_bpe(["sort a dict"], 300), text_format)
    assert tokenizer.skipped("query") > tokenizer.skipped("document") > 0
    sources = [examples_of("a", 6, 2), examples_of("b", 6, 0)]
    table, data_sets = tokenize_examples(read_by(tokenizer, sources, 1), tmp_path)
    texts = np.concatenate([found.texts for found in data_sets])
    which = np.repeat([0, 1], 6)
    schedule = run_plan(data_sets, table.hashes, 4, seed=0, steps=3)
    layout = RowLayout(64, 4, 2, 2, (1,), 0.0)
    batches = Batches(schedule, table, texts, which, layout, PAD)
    for batch in batches:
        used = batch["last"] >= 0
        begins = np.where(used, batch["last"] + 1, 0)
        for place in np.argwhere(used):
            chunk, row, slot = place
            segment = batch["segments"][chunk, row]
            begins[chunk, row, slot] = np.flatnonzero(segment == slot + 1)[0]
        left_out = (batch["first"] - begins)[used]
        assert set(left_out.tolist()) == {tokenizer.skipped("query"), tokenizer.skipped("document")}
        assert (left_out == tokenizer.skipped("query")).sum() == 4
        assert (batch["first"][~used] == -1).all()
    included = TextTokenizer(tokenizer.tokenizer, dataclasses.replace(text_format, include_prompt=True))
    assert included.skipped("query") == included.skipped("document") == 0
    assert tokenize_examples(read_by(included, sources, 1), tmp_path)[0].skipped_of(texts) is None


def check_codes(batch: dict[str, Any], hashes: np.ndarray, texts: np.ndarray) -> None:
    """Equal numbers are equal texts, and a text that is not there has none."""
    codes = np.concatenate([batch["query_codes"], batch["candidate_codes"]])
    present, flat = texts.T.ravel() >= 0, hashes.T.ravel()
    assert (codes[~present] == -1).all()
    equal = codes[present][:, None] == codes[present]
    np.testing.assert_array_equal(equal, flat[present][:, None] == flat[present])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_codes_and_known_positives(data: st.DataObject) -> None:
    """Against a dictionary from each query to its positives, with several examples a query and texts in any role."""
    examples, columns = data.draw(st.integers(4, 30)), 4
    drawn = data.draw(st.lists(st.integers(0, 25), min_size=examples * columns, max_size=examples * columns))
    table = dataclasses.replace(
        table_of(np.full(examples * columns, 3)), hashes=np.array(drawn, np.uint64) * np.uint64(2**59 + 7)
    )
    texts = np.arange(examples * columns).reshape(examples, columns)
    texts[data.draw(st.lists(st.booleans(), min_size=examples, max_size=examples)), 3] = -1
    schedule = run_plan([DataSet("a", texts)], table.hashes, 4, seed=0, steps=2)
    layout = RowLayout(16, 5, 2, 1, (8,), 0.0)
    scores = np.random.default_rng(0).normal(size=(examples, 3))
    batches = Batches(schedule, table, texts, np.zeros(examples, int), layout, PAD, scores)
    positives: dict[int, set[int]] = {}
    for query, positive in table.hashes[texts[:, :2]].tolist():
        positives.setdefault(query, set()).add(positive)
    assert batches.known.width == min(16, max(map(len, positives.values())) - 1)
    for step in range(2):
        batch, chosen = batches[step], schedule.batch(step)
        hashes = table.hashes[texts[chosen]]
        check_codes(batch, hashes, texts[chosen])
        np.testing.assert_array_equal(batch["scores"], scores[chosen].astype(np.float32))
        flat, present = hashes.T.ravel(), texts[chosen].T.ravel() >= 0
        codes = np.concatenate([batch["query_codes"], batch["candidate_codes"]])
        named = dict(zip(codes[present].tolist(), flat[present].tolist()))
        for query, positive, known in zip(flat[:4].tolist(), flat[4:8].tolist(), batch["known"].tolist()):
            found = {named[code] for code in known if code >= 0}
            wanted = (positives[query] - {positive}) & set(flat[present].tolist())
            assert found == wanted if len(wanted) <= batches.known.width else found < wanted


def test_more_known_positives_than_a_batch_has_room_for() -> None:
    """All positives of one query in one batch: as many are kept as there are columns, the same number in any batch."""
    queries, positives = np.zeros(40, np.uint64), np.arange(1, 41, dtype=np.uint64)
    known = KnownPositives.of(queries, positives)
    assert known.width == 16
    texts = np.arange(41, dtype=np.uint64)
    found = known.codes(np.array([0, 7], np.uint64), np.array([1, 2], np.uint64), texts)
    assert found.shape == (2, 16)
    assert len(set(found[0].tolist()) - {-1, 1}) == 16
    assert (found[1] == -1).all()
    alone = KnownPositives.of(positives, queries)
    assert alone.width == 0
    assert alone.codes(queries[:3], positives[:3], texts).shape == (3, 0)


class CountingStore:
    """Texts by row, of which some are the same; counts what is read."""

    fingerprint = "corpus"

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 50

    def __getitem__(self, row: int) -> str:
        return f"document {row % 40}"

    def texts(self, rows: np.ndarray) -> list[str]:
        self.read += rows.tolist()
        return [self[row] for row in rows.tolist()]


@pytest.mark.parametrize("negatives", [0, 2, 4])
def test_documents_of_a_store_are_tokenised_once(tmp_path: Path, negatives: int) -> None:
    generator = np.random.default_rng(0)
    store = CountingStore()
    rows = generator.integers(0, 50, (20, 5))
    rows[3, 2:] = rows[5, 4:] = -1
    sources = [
        Examples(name, [f"{name} {n}" for n in range(10)], Picked(store, part[:, 0]), PickedRows(store, part[:, 1:]),
                 [], {}, name, scores=scores)
        for name, part, scores in (("a", rows[:10], np.arange(50.0).reshape(10, 5)), ("b", rows[10:], None))
    ]  # fmt: skip
    listed = dataclasses.replace(
        sources[0],
        name="c",
        positives=list(sources[0].positives),
        negatives=[tuple(row) for row in sources[0].negatives],
    )
    store.read.clear()
    table, found = tokenize_examples(read_by(TOKENIZER, [*sources, listed], negatives), tmp_path)
    named = np.unique(rows[:, : 1 + negatives])
    # The first and the last are read again, to see that a cache is of these texts.
    assert sorted(store.read) == named[named >= 0].tolist()
    every = np.concatenate([rows[:10], rows[10:], rows[:10]])[:, : 1 + negatives]
    documents = np.concatenate([one.texts[:, 1:] for one in found])
    np.testing.assert_array_equal(documents >= 0, every >= 0)
    for text, row in zip(documents[every >= 0], every[every >= 0]):
        assert table.hashes[text] == text_hash(store[int(row)])
        np.testing.assert_array_equal(table[int(text)], TOKENIZER([store[int(row)]], "document")[0])
    for one, source in zip(found, [*sources, listed]):
        for text, anchor in zip(one.texts[:, 0], source.anchors):
            np.testing.assert_array_equal(table[int(text)], TOKENIZER([anchor], "query")[0])
    np.testing.assert_array_equal(found[0].texts[:, 1:] >= 0, found[2].texts[:, 1:] >= 0)
    # One cache of the store, one of the anchors of each source, one of the listed documents.
    assert len(table.caches) == 3 + 1 + 1


def test_columns_in_memory_are_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    whole = TextTokenizer.__call__
    monkeypatch.setattr(
        TextTokenizer, "__call__", lambda self, texts, role: asked.extend(texts) or whole(self, texts, role)
    )
    texts = ["x", "y", "z"]
    source = Examples("a", ["q"] * 3, texts, [("y", "z"), ("z",), ("x",)], [], {}, "a")
    table, (found,) = tokenize_examples(read_by(TOKENIZER, [source], 2), tmp_path)
    assert sorted(asked) == ["q", *texts]
    assert [[table.hashes[text] if text >= 0 else None for text in row[1:]] for row in found.texts] == [
        [text_hash("x"), text_hash("y"), text_hash("z")],
        [text_hash("y"), text_hash("z"), None],
        [text_hash("z"), text_hash("x"), None],
    ]


def test_a_source_may_have_its_own_tokenizer_and_roles(tmp_path: Path) -> None:
    other = TextTokenizer(train_byte_level_bpe(["texts of another kind"], 290), DEFAULT_TEXT_FORMAT)
    store = CountingStore()
    rows = np.array([[3, 4], [5, 3]])
    picked = Examples("p", ["q", "r"], Picked(store, rows[:, 0]), PickedRows(store, rows[:, 1:]), [], {}, "p")
    negatives = [tuple(each) for each in picked.negatives]
    listed = dataclasses.replace(picked, fingerprint="l", positives=list(picked.positives), negatives=negatives)
    own = [(TOKENIZER, ("query", "document")), (other, ("query", "query")), (other, ("query", "query"))]
    table, found = tokenize_examples(
        [TextSource(one, *how, negatives=1) for one, how in zip([picked, picked, listed], own)], tmp_path
    )
    for data_set, (tokenizer, roles) in zip(found, own):
        for row, anchor, texts in zip(data_set.texts, picked.anchors, rows):
            wanted = [(anchor, roles[0]), *((store[text], roles[1]) for text in texts.tolist())]
            for number, (text, role) in zip(row, wanted, strict=True):
                np.testing.assert_array_equal(table[int(number)], tokenizer([text], role)[0])
