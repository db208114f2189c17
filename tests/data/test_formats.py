"""Each format written here in its original form and read back: the plain columns, and nothing else."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxembed.data.formats import recognise, with_instruction
from jaxembed.data.sources import Examples, read_rows, summary
from jaxembed.errors import InputError

Row = dict[str, Any]

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(str.strip)
maybe_blank = st.one_of(text, st.sampled_from(["", " ", "\n"]))
group = st.tuples(text, st.lists(maybe_blank, min_size=0, max_size=3), st.lists(maybe_blank, max_size=3))
groups = st.lists(group, min_size=1, max_size=8)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, rows: list[Row]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def expected(
    rows: list[tuple[str, list[str], list[str]]],
) -> tuple[list[tuple[str, str, tuple[str, ...], int]], Counter]:
    """(anchor, positive, negatives, line) of what should stay, and what should not, by the rules of docs/data.md."""
    kept, dropped, seen = [], Counter(), set()
    for line, (anchor, positives, negatives) in enumerate(rows, start=1):
        if not positives:
            dropped["no positive"] += 1
            continue
        blank = [text for text in negatives if not text.strip()]
        false = [text for text in negatives if text.strip() and text in positives]
        dropped["empty negative"] += len(blank)
        dropped["negative that is a positive"] += len(false)
        left = tuple(text for text in negatives if text.strip() and text not in positives)
        for positive in positives:
            if not (anchor.strip() and positive.strip()):
                dropped["empty text"] += 1
            elif anchor == positive:
                dropped["anchor equal to its positive"] += 1
            elif (anchor, positive) in seen:
                dropped["duplicate"] += 1
            else:
                seen.add((anchor, positive))
                kept.append((anchor, positive, left, line))
    return kept, +dropped


def columns(examples: Examples) -> list[tuple[str, str, tuple[str, ...], int]]:
    lines = [int(one.rpartition(":")[2]) for one in examples.ids]
    negatives = [tuple(each) for each in examples.negatives]
    return list(zip(examples.anchors, examples.positives, negatives, lines, strict=True))


def passage(text: str) -> Row:
    return {"docid": "7", "title": "", "text": text}


def message(text: str) -> list[Row]:
    return [{"role": "user", "content": text}]


WRITERS = {
    "tevatron": lambda q, ps, ns: {
        "query_id": "1", "query": q, "positive_passages": [passage(p) for p in ps],
        "negative_passages": [passage(n) for n in ns],
    },
    "flagembedding": lambda q, ps, ns: {"query": q, "pos": ps, "neg": ns, "type": "normal"},
    "gritlm": lambda q, ps, ns: {"query": ["", q], "pos": [["", p] for p in ps], "neg": [["", n] for n in ns]},
    "ms-swift": lambda q, ps, ns: {
        "messages": message(q), "positive_messages": [message(p) for p in ps],
        "negative_messages": [message(n) for n in ns],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
@quick
@given(rows=groups, extra=st.booleans())
def test_a_format_written_is_read_back(tmp_path: Path, name: str, rows: list, extra: bool) -> None:
    written = [WRITERS[name](*row) | ({"answers": ["x"], "answer": "x", "id": 3} if extra else {}) for row in rows]
    path = write(tmp_path / "rows.jsonl.gz", written)
    kept, dropped = expected(rows)
    for format in (None, name):
        if not kept:
            with pytest.raises(InputError, match="no pair left"):
                read_rows(path, name="rows", format=format)
            continue
        found = read_rows(path, name="rows", format=format)
        assert columns(found) == kept
        assert found.dropped == dropped
        assert found.scores is None
        assert recognise(written[0]).format == name


PAIRS = [
    ("anchor", "positive"), ("query", "positive"), ("query", "answer"), ("question", "answer"), ("query", "passage"),
    ("query", "code"), ("query", "document"), ("Question", "Answer"), ("s1", "s2"), ("sentence1", "sentence2"),
    ("sentence_A", "sentence_B"), ("sentence-A", "sentence-B"), ("src", "tgt"), ("title", "abstract"),
    ("query", "response"),
]  # fmt: skip
NEGATIVES = [
    [],
    ["negative"],
    ["negative_1", "negative_2"],
    [f"negative_{i}" for i in range(1, 13)],
    ["rejected_response"],
]


@pytest.mark.parametrize("keys", PAIRS, ids="-".join)
@quick
@given(data=st.data(), negatives=st.sampled_from(NEGATIVES), backwards=st.booleans())
def test_columns_are_recognised_by_their_names(
    tmp_path: Path, keys: tuple[str, str], data: st.DataObject, negatives: list[str], backwards: bool
) -> None:
    rows = data.draw(st.lists(st.tuples(text, text, st.lists(text, max_size=len(negatives))), min_size=1, max_size=5))
    written = [{"topic": "x", **dict(zip(keys, row[:2])), **dict(zip(negatives, row[2])), "number": 3} for row in rows]
    # A row may lack its last negatives, and name the keys in another order.
    written = [dict(reversed(row.items())) if backwards else row for row in written]
    kept, _ = expected([(anchor, [positive], others) for anchor, positive, others in rows])
    if kept:
        found = read_rows(write(tmp_path / "rows.jsonl", written), name="rows")
        assert columns(found) == kept
        assert f"rows: columns {keys[0]} → {keys[1]} (" in summary(found)


@quick
@given(rows=st.lists(st.tuples(text, text, text, text), min_size=1, max_size=5, unique=True))
def test_forced_columns_go_by_their_order(tmp_path: Path, rows: list) -> None:
    """As in sentence-transformers, whose losses take the columns in order whatever their names are."""
    keys = ("answer", "query", "hard", "harder")
    path = write(tmp_path / "rows.jsonl", [dict(zip(keys, row)) for row in rows])
    kept, _ = expected([(a, [b], [c, d]) for a, b, c, d in rows])
    if kept:
        assert columns(read_rows(path, name="rows", format="sentence-transformers")) == kept


@pytest.mark.parametrize(
    "keys", [("s1", "s2", "score"), ("sentence1", "sentence2", "label"), ("query", "code", "label")]
)
@quick
@given(
    rows=st.lists(
        st.tuples(text, text, st.one_of(st.integers(0, 5), st.floats(-1, 5, width=32))), min_size=1, max_size=6
    )
)
def test_graded_pairs_keep_equal_texts(tmp_path: Path, keys: tuple[str, ...], rows: list) -> None:
    path = write(tmp_path / "rows.jsonl", [dict(zip(keys, row)) for row in rows])
    first = {}
    for one, other, grade in rows:
        first.setdefault((one, other), grade)
    for format in (None, "graded", "sentence-transformers"):
        found = read_rows(path, name="rows", format=format)
        assert list(zip(found.anchors, found.positives)) == list(first)
        assert found.scores is not None
        np.testing.assert_array_equal(found.scores[:, 0], np.array(list(first.values()), np.float32))
        assert found.graded
        assert found.dropped.get("duplicate", 0) == len(rows) - len(first)
    assert f"rows: graded pairs, {keys[0]} → {keys[1]} by {keys[2]} (grades " in summary(read_rows(path, name="rows"))


def scored(kind: str, q: str, ps: list[str], ns: list[str], scores: list[float]) -> Row:
    if kind == "flagembedding":
        return {"query": q, "pos": ps, "neg": ns, "pos_scores": scores[: len(ps)], "neg_scores": scores[len(ps) :]}
    if kind == "tevatron":
        passages = [{**passage(each), "score": score} for each, score in zip([*ps, *ns], scores)]
        return {"query": q, "positive_passages": passages[: len(ps)], "negative_passages": passages[len(ps) :]}
    negatives = {f"negative_{place}": each for place, each in enumerate(ns, start=1)}
    return {"anchor": q, "positive": ps[0], **negatives, "label": scores[: 1 + len(ns)]}


@pytest.mark.parametrize("kind", ["flagembedding", "tevatron", "sentence-transformers"])
@quick
@given(data=st.data())
def test_scores_of_a_teacher_stay_with_their_texts(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """Also where a negative goes: its score goes with it."""
    rows = data.draw(
        st.lists(
            st.tuples(
                text, st.lists(text, min_size=1, max_size=2, unique=True), st.lists(maybe_blank.filter(len), max_size=4)
            ),
            min_size=1,
            max_size=5,
        )
    )
    if kind == "sentence-transformers":
        rows = [(q, ps[:1], ns) for q, ps, ns in rows]
    table = {}
    written = []
    for number, (q, ps, ns) in enumerate(rows):
        scores = [round(number + place / 16, 4) for place in range(len(ps) + len(ns))]
        table[number + 1] = scores
        written.append(scored(kind, q, ps, ns, scores))
    kept, _ = expected(rows)
    if not kept:
        return
    found = read_rows(write(tmp_path / "rows.jsonl", written), name="rows")
    assert columns(found) == kept
    assert found.scores is not None
    for (_, positive, negatives, line), row in zip(kept, found.scores):
        _, ps, ns = rows[line - 1]
        places = [len(ps) + place for place, n in enumerate(ns) if n.strip() and n not in ps]
        wanted = [table[line][ps.index(positive)], *(table[line][place] for place in places)]
        np.testing.assert_array_equal(row[: 1 + len(negatives)], np.array(wanted, np.float32))
        assert np.isnan(row[1 + len(negatives) :]).all()


def test_one_number_beside_one_negative_is_a_margin(tmp_path: Path) -> None:
    """The label of sentence-transformers' MarginMSELoss."""
    path = write(tmp_path / "rows.jsonl", [{"query": "q", "positive": "p", "negative": "n", "label": 2.5}])
    found = read_rows(path, name="rows")
    assert found.scores is not None
    assert found.scores.tolist() == [[2.5, 0.0]]
    assert not found.graded


@pytest.mark.parametrize(
    ("instruction", "together"),
    [
        ("", "text"),
        ("Find it.", "Find it. text"),
        ("Find it: ", "Find it: text"),
        ("Find\n", "Find\ntext"),
        ("检索：", "检索：text"),
    ],
)
def test_instructions_of_rows_stand_before_the_text(tmp_path: Path, instruction: str, together: str) -> None:
    assert with_instruction(instruction, "text") == together

    def rows(positive: str) -> dict[str, Row]:
        return {
            "flagembedding": {"query": "text", "pos": [positive], "neg": [], "prompt": instruction},
            "gritlm": {"query": [instruction, "text"], "pos": [["", positive]], "neg": [[instruction, "text"]]},
            "medi": {"query": [instruction, "text"], "pos": ["", positive], "neg": [instruction, "text"]},
            "ms-swift": {
                "messages": [{"role": "system", "content": instruction}, {"role": "user", "content": "text"}],
                "positive_messages": [message(positive)],
            },
        }

    for (name, one), other in zip(rows("p").items(), rows("other").values()):
        found = read_rows(write(tmp_path / f"{name}.jsonl", [one, other]), name="rows")
        assert found.anchors == [together] * 2
        assert found.positives == ["p", "other"]
        if name in ("gritlm", "medi"):
            assert tuple(found.negatives[0]) == (together,)


def test_a_title_stands_before_the_text(tmp_path: Path) -> None:
    passages = [
        {"docid": "1", "title": "Title", "text": "text"},
        {"docid": "2", "text": "alone"},
        {"title": None, "text": "b"},
    ]
    row = {"query": "q", "positive_passages": passages, "negative_passages": [{"title": " ", "text": "n"}]}
    found = read_rows(write(tmp_path / "rows.jsonl", [row]), name="queries")
    assert found.positives == ["Title text", "alone", "b"]
    assert found.negatives[0] == ("n",)
    assert summary(found) == "queries: tevatron (1 negative a query), 3 pairs kept, 0 dropped"


def test_parquet_holds_nested_formats(tmp_path: Path) -> None:
    rows = [WRITERS["tevatron"]("q", ["p"], ["n", "m"]), WRITERS["tevatron"]("r", ["p"], [])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = read_rows(tmp_path / "rows.parquet", name="rows")
    assert columns(found) == [("q", "p", ("n", "m"), 1), ("r", "p", (), 2)]
    assert "tevatron (0 to 2 negatives a query), 2 pairs kept" in summary(found)


GOOD = {
    "columns": {"query": "q", "answer": "a"},
    "negatives": {"anchor": "q", "positive": "a", "negative": "n", "scores": [1.0, 0.5]},
    "graded": {"s1": "q", "s2": "a", "score": 1},
    "tevatron": {"query": "q", "positive_passages": [passage("a")], "negative_passages": [passage("n")]},
    "flagembedding": {"query": "q", "pos": ["a"], "neg": ["n"]},
    "gritlm": {"query": ["i", "q"], "pos": [["", "a"]], "neg": [["", "n"]]},
    "ms-swift": {"messages": message("q"), "positive_messages": [message("a")], "label": 1.0},
    "labelled": {"text": "t", "label": "l"},
    "nli": {"premise": "p", "hypothesis": "h", "label": 0},
}
BAD = [
    ("columns", {"query": "q", "answers": "a"}, "no column 'answer'; columns of this row: 'query', 'answers'"),
    ("columns", {"query": "q", "answer": ["a", 1]}, r"column 'answer'[1]: expected a string, found a number"),
    ("columns", {"query": "q", "answer": "a", "label": 0}, "column 'label': the first row has none"),
    ("columns", {"query": "q", "answer": "a", "negative": 3}, "column 'negative': expected a string, found a number"),
    ("columns", {"query": "q", "answer": "\ud800"}, "column 'answer': holds half of a surrogate pair"),
    (
        "negatives",
        {"anchor": "q", "positive": "a", "negative": "n", "scores": [1]},
        "column 'scores': expected a list of 2 numbers",
    ),
    ("negatives", {"anchor": "q", "positive": "a", "negative": "n"}, "no column 'scores'"),
    (
        "negatives",
        {"anchor": "q", "positive": "a", "negative": "n", "scores": [1, "x"]},
        "column 'scores'[1]: expected a finite number, found 'x'",
    ),
    ("graded", {"s1": "q", "s2": "a"}, "no column 'score'"),
    ("graded", {"s1": "q", "s2": "a", "score": None}, "column 'score': expected a finite number, found null"),
    ("graded", {"s1": "q", "s2": "a", "score": float("nan")}, "column 'score': expected a finite number, found nan"),
    ("graded", {"s1": "q", "s2": "a", "score": 10**400}, "column 'score': expected a finite number"),
    ("tevatron", {"query": "q", "pos": ["a"]}, "no column 'positive_passages'"),
    ("tevatron", {"query": "q", "positive_passages": ["a"]}, "column 'positive_passages'[0]: expected an object"),
    (
        "tevatron",
        {"query": "q", "positive_passages": [{"docid": "1"}]},
        "column 'positive_passages'[0]: no key 'text'; keys found: 'docid'",
    ),
    (
        "tevatron",
        {"query": "q", "positive_passages": [passage("a")], "negative_passages": "n"},
        "column 'negative_passages': expected a list, found a string",
    ),
    ("tevatron", {"query": None, "positive_passages": [passage("a")]}, "column 'query': expected a string, found null"),
    (
        "flagembedding",
        {"query": "q", "pos": "a", "neg": []},
        "column 'pos': expected a list of strings, found a string",
    ),
    ("flagembedding", {"query": "q", "pos": ["a"], "neg": [None]}, "column 'neg'[0]: expected a string, found null"),
    ("flagembedding", {"query": "q", "pos": ["a"], "neg": ["n"], "pos_scores": [1]}, "column 'neg_scores': missing"),
    (
        "flagembedding",
        {"query": "q", "pos": ["a"], "neg": ["n"], "pos_scores": [1], "neg_scores": []},
        "column 'neg_scores': expected a list of 1 numbers",
    ),
    ("flagembedding", {"query": "q", "pos": ["a"], "prompt": 1}, "column 'prompt': expected a string, found a number"),
    ("gritlm", {"query": "q", "pos": [["", "a"]]}, "column 'query': expected [instruction, text], found a string"),
    (
        "gritlm",
        {"query": ["i", "q"], "pos": [["a"]]},
        "column 'pos'[0]: expected [instruction, text], found a list of 1",
    ),
    ("gritlm", {"query": ["i", "q"], "pos": [["", 1]]}, "column 'pos'[0][1]: expected a string, found a number"),
    (
        "ms-swift",
        {"messages": "q", "positive_messages": []},
        "column 'messages': expected a list of messages, found a string",
    ),
    (
        "ms-swift",
        {"messages": message("q"), "positive_messages": message("a"), "label": 1},
        "column 'positive_messages'[0]: expected a list of messages, found an object",
    ),
    (
        "ms-swift",
        {"messages": message("q"), "positive_messages": [[{"role": "user"}]], "label": 1},
        "column 'positive_messages'[0][0], 'content': expected a string, found null",
    ),
    ("ms-swift", {"messages": message("q"), "positive_messages": [message("a")]}, "no column 'label'"),
    ("labelled", {"text": "t"}, "no column 'label'"),
    ("labelled", {"text": "t", "label": 1.5}, "column 'label': expected a string, found a number"),
    (
        "nli",
        {"premise": "p", "hypothesis": "h", "label": "entails"},
        "column 'label': expected entailment, neutral, contradiction",
    ),
    ("nli", {"premise": "p", "hypothesis": None, "label": 1}, "column 'hypothesis': expected a string, found null"),
    ("nli", {"premise": "p", "label": 1}, "no column 'hypothesis'"),
]


@pytest.mark.parametrize(("kind", "row", "words"), BAD, ids=lambda value: str(value)[:50])
def test_a_row_that_changes_its_shape_is_named_or_counted(tmp_path: Path, kind: str, row: Row, words: str) -> None:
    """With file, line and key."""
    others = (
        [{**GOOD["labelled"], "text": "u", "label": "m"}, {**GOOD["labelled"], "text": "v"}]
        if kind == "labelled"
        else []
    )
    if kind == "nli":
        others = [{"premise": "p", "hypothesis": "i", "label": 2}]
    path = write(tmp_path / "rows.jsonl", [GOOD[kind], row, *others])
    with pytest.raises(InputError) as caught:
        read_rows(path, name="rows")
    assert f"{path}:2: {words}" in str(caught.value)
    assert "bad_rows: skip" in str(caught.value)
    found = read_rows(path, name="rows", bad_rows="skip")
    assert found.dropped["bad row"] == 1
    assert not any(one.endswith(":2") for one in found.ids)


UNKNOWN = [
    ({"synset": "1", "members": ["unable"], "definition": "not able"}, "those of no known format"),
    ({"query": "q", "passage": "p", "label": "NOT_ENOUGH_INFO"}, "the key 'label' holds 'NOT_ENOUGH_INFO'"),
    ({"question": "q", "context": "c", "answer": "a"}, "several pairs (question → answer, question → context)"),
    ({"_id": "1", "title": "t", "text": "x"}, "give the folder with kind: beir"),
    ({"qid": "1", "neg": {"bm25": ["2"]}}, "give them as mined with kind: beir"),
    ({"title": "t", "text": "x"}, "those of no known format"),
    ({"messages": message("q")}, "those of no known format"),
    ({"query": "q", "pos": ["a"], "positive_passages": []}, "several formats, tevatron and flagembedding"),
    ({"query": "q", "docs": ["d"], "labels": [1]}, "those of no known format"),
    ({}, "Keys found: none"),
]


@pytest.mark.parametrize(("row", "words"), UNKNOWN, ids=lambda value: str(value)[:50])
@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_unknown_keys_are_an_error_that_knows_the_formats(tmp_path: Path, row: Row, words: str, bad_rows: str) -> None:
    path = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(InputError) as caught:
        read_rows(path, name="rows", bad_rows=bad_rows)
    message = str(caught.value)
    assert f"{path}:1: " in message
    assert words in message
    for word in [
        *map(repr, row),
        "tevatron: query, positive_passages",
        "flagembedding: query, pos and neg",
        "nli: premise",
    ]:
        assert word in message


json_value = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)
all_keys = sorted({key for row in GOOD.values() for key in row} | {"title", "neg_scores", "pos_scores", "prompt"})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(GOOD)),
    rows=st.lists(st.dictionaries(st.sampled_from(all_keys), json_value, max_size=4), min_size=1, max_size=3),
    keep=st.booleans(),
)
def test_whatever_a_row_holds_the_error_says_where(tmp_path: Path, kind: str, rows: list[Row], keep: bool) -> None:
    """Never another exception than InputError; what is read is text."""
    if keep:  # wrong values in rows that are right otherwise
        rows = [GOOD[kind], *({**GOOD[kind], **row} for row in rows)]
    path = write(tmp_path / "rows.jsonl", rows)
    try:
        found = read_rows(path, name="rows")
    except InputError as error:
        wrong = str(error)
    else:
        wrong = None
    if wrong is not None:
        assert re.match(rf"{re.escape(str(path))}(:\d+)?: ", wrong)
        return
    for one in [*found.anchors, *found.positives, *(text for row in found.negatives for text in row)]:
        assert one.encode().strip()


def test_the_examples_of_the_documentation_are_recognised() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    table = re.findall(r"^\| `([a-z-]+)` \|.*\| `(\{.*\})` \|$", page, re.MULTILINE)
    assert {name for name, _ in table} == {
        "sentence-transformers", "graded", "tevatron", "tevatron-ids", "flagembedding", "gritlm", "ms-swift",
        "labelled", "nli",
    }  # fmt: skip
    for name, example in table:
        assert recognise(json.loads(example)).format == name
