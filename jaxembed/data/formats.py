"""The formats of training data that people have: which one a row has, by its keys, and what it says.

Every format comes down to `Group`s (a query, its positives, its negatives), except three: labelled texts and NLI rows,
of which pairs are made, and rows that name documents by id.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from jaxembed.config import RowFormat
from jaxembed.data.rows import Row, checked_text, keys_of, text_at, type_name, value_at
from jaxembed.errors import InputError


@dataclass(frozen=True, slots=True)
class Group:
    """A query with everything that its row says of it; scores are of the positives, then the negatives, or none."""

    anchor: str
    positives: Sequence[str]
    negatives: Sequence[str] = ()
    scores: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class NamedGroup:
    """A query whose documents are named by id."""

    anchor: str
    positives: Sequence[str]
    negatives: Sequence[str]


@dataclass(frozen=True, slots=True)
class Labelled:
    text: str
    label: str


@dataclass(frozen=True, slots=True)
class Inference:
    premise: str
    hypothesis: str
    label: str | None
    """ "entailment", "neutral", "contradiction", or None where the annotators did not agree."""


@dataclass(frozen=True)
class Reader:
    """How the rows of one file are read, settled by its first row.

    Attributes:
        format: name of the format.
        described: the same for the log, with the columns where the format leaves a choice.
        kind: what `read` gives.
        read: a row's meaning; an InputError says what is wrong with it, not where.
        unused: keys of the first row that are not read.
    """

    format: RowFormat
    described: str
    kind: Literal["pairs", "graded", "ids", "labels", "inference"]
    read: Callable[[Row], Any]
    unused: tuple[str, ...]


@dataclass(frozen=True)
class _Format:
    keys: str
    """The keys of a row, for messages."""
    fits: Callable[[Row], bool]
    reader: Callable[[Row], Reader]


def recognise(row: Row, format: RowFormat | None = None) -> Reader:
    """How to read a file with this first row.

    Args:
        row: the first row.
        format: the format, where it is not to be recognised.

    Raises:
        InputError: the keys are those of no known format, or of several; names the keys found and the formats.
    """
    if format is not None:
        return (_ordered_columns if format == "sentence-transformers" else _FORMATS[format].reader)(row)
    fitting: list[RowFormat] = [name for name in _FORMATS if _FORMATS[name].fits(row)]
    fitting = [name for name in fitting if name not in _BY_PLAIN_NAMES] or fitting
    if len(fitting) == 1:
        return _FORMATS[fitting[0]].reader(row)
    pairs = [] if fitting else _column_pairs(row)
    if fitting:
        problem = f"these keys fit several formats, {' and '.join(fitting)}; choose one with format"
    elif len(pairs) > 1:
        found = ", ".join(f"{anchor} → {positive}" for anchor, positive in pairs)
        problem = f"these keys allow several pairs ({found}); choose one with anchor and positive"
    elif pairs and (key := _score_key(row)):
        problem = (
            f"beside the pair {pairs[0][0]} → {pairs[0][1]} the key {key!r} holds {row[key]!r:.60}, neither a number "
            "nor an NLI label, so that it cannot be known which rows are pairs; choose with anchor and positive"
        )
    elif {"_id", "text"} <= row.keys() or {"query-id", "corpus-id"} <= row.keys():
        problem = "these keys are of a file in a BEIR folder; give the folder with kind: beir"
    elif {"qid", "neg"} <= row.keys():
        problem = "these keys are of mined negatives by id; give them as mined with kind: beir"
    else:
        problem = (
            "these keys are those of no known format; name the columns with anchor and positive, or choose a format"
        )
    formats = "\n".join(f"  {name}: {known.keys}" for name, known in _FORMATS.items())
    raise InputError(f"{problem}. Keys found: {keys_of(row)}. Formats known, with their keys:\n{formats}")


def with_instruction(instruction: str, text: str) -> str:
    """Instruction and text, parted by a space unless the instruction ends in white space or in a wide letter."""
    if not instruction:
        return text
    last = instruction[-1]
    glued = last.isspace() or unicodedata.east_asian_width(last) in "WF"
    return instruction + text if glued else f"{instruction} {text}"


def title_and_text(title: str, text: str) -> str:
    """A document as BEIR and tevatron embed it: "title text", without a title the text as it is."""
    return f"{title} {text}" if title.strip() else text


def passage_text(value: Any, what: str) -> str:
    """Title and text of an object such as {"docid", "title", "text"}."""
    if not isinstance(value, dict):
        raise InputError(f"{what}: expected an object with title and text, found {type_name(value)}")
    if "text" not in value:
        raise InputError(f"{what}: no key 'text'; keys found: {keys_of(value)}")
    title = value.get("title")
    title = "" if title is None else checked_text(title, f"{what}, 'title'")
    return title_and_text(title, checked_text(value["text"], f"{what}, 'text'"))


def id_text(value: Any, what: str) -> str:
    """An id, written as a string or a whole number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return checked_text(value, what)


def number(value: Any, what: str) -> float:
    """A finite number; TSV and CSV, and some JSON, have it as a string."""
    try:
        converted = float(value) if isinstance(value, (int, float, str)) else math.nan
    except (ValueError, OverflowError):
        converted = math.nan
    if not math.isfinite(converted):
        found = repr(value)[:60] if isinstance(value, (str, float)) else type_name(value)
        raise InputError(f"{what}: expected a finite number, found {found}")
    return converted


_ANCHORS = ("anchor", "query", "question")
_POSITIVES = (
    "positive", "positives", "pos", "answer", "passage", "document", "doc", "code", "response", "context",
)  # fmt: skip
_TIED = (
    ("sentence1", "sentence2"), ("sentencea", "sentenceb"), ("s1", "s2"), ("text1", "text2"), ("texta", "textb"),
    ("src", "tgt"), ("source", "target"), ("title", "abstract"), ("title", "body"), ("docstring", "code"),
)  # fmt: skip
_SCORES = ("score", "scores", "similarity", "similarityscore", "label", "labels")
_NEGATIVE = re.compile(r"(hard)?neg(ative)?s?\d*|rejectedresponse")
_INFERENCE = (("premise", "hypothesis"), ("sentence1", "sentence2"))
_INFERENCE_LABEL = ("label", "gold_label")
_LABELS: dict[Any, str | None] = {
    "entailment": "entailment", "neutral": "neutral", "contradiction": "contradiction", "-": None,
    "0": "entailment", "1": "neutral", "2": "contradiction", "-1": None,
}  # fmt: skip


@lru_cache(4096)
def _plain(key: str) -> str:
    """ "sentence_A" → "sentencea"."""
    return re.sub(r"[^a-z0-9]", "", key.lower())


def _column_pairs(row: Row) -> list[tuple[str, str]]:
    """The pairs of keys that could be anchor and positive, by their names."""
    plain: dict[str, str] = {}
    for key, value in row.items():
        if isinstance(value, str) or (_plain(key) in ("positive", "positives") and isinstance(value, list)):
            plain.setdefault(_plain(key), key)
    free = [(anchor, positive) for anchor in _ANCHORS for positive in _POSITIVES]
    return [(plain[one], plain[other]) for one, other in [*free, *_TIED] if one in plain and other in plain]


def _score_key(row: Row) -> str | None:
    plain = {_plain(key): key for key, value in reversed(row.items()) if value is not None}
    return next((plain[name] for name in _SCORES if name in plain), None)


def _is_number(value: Any) -> bool:
    try:
        number(value, "")
    except InputError:
        return False
    return True


def _is_scores(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


@lru_cache(4096)
def _negatives_among(keys: tuple[str, ...]) -> tuple[str, ...]:
    """In the order of their numbers."""

    def place(key: str) -> int:
        return int((re.search(r"\d+$", key) or ["0"])[0])

    return tuple(sorted((key for key in keys if _NEGATIVE.fullmatch(_plain(key))), key=place))


def _negative_keys(row: Row) -> tuple[str, ...]:
    return _negatives_among(tuple(row))


def _fits_columns(row: Row) -> bool:
    key = _score_key(row)
    scored = key is None or _is_scores(row[key]) or (_is_number(row[key]) and bool(_negative_keys(row)))
    return len(_column_pairs(row)) == 1 and scored


def _fits_graded(row: Row) -> bool:
    key = _score_key(row)
    return len(_column_pairs(row)) == 1 and key is not None and _is_number(row[key]) and not _negative_keys(row)


def _pair(row: Row) -> tuple[str, str]:
    pairs = _column_pairs(row)
    if len(pairs) != 1:
        raise InputError(f"expected one pair of columns, found {pairs or 'none'}; columns of this row: {keys_of(row)}")
    return pairs[0]


def _graded(row: Row) -> Reader:
    score = _score_key(row)
    if score is None:
        raise InputError(f"no column with a score; columns of this row: {keys_of(row)}")
    return _graded_columns("graded", row, *_pair(row), _negative_keys(row), score)


def _graded_columns(
    format: RowFormat, row: Row, anchor: str, positive: str, negatives: Sequence[str], score: str
) -> Reader:
    if negatives:
        raise InputError(f"graded pairs have no negatives, found the columns {', '.join(map(repr, negatives))}")

    def read(row: Row) -> Group:
        grade = number(value_at(row, score), f"column {score!r}")
        return Group(text_at(row, anchor), [text_at(row, positive)], (), [grade])

    described = f"graded pairs, {anchor} → {positive} by {score}"
    return Reader(format, described, "graded", read, _others(row, anchor, positive, score))


def _columns(row: Row) -> Reader:
    """By the columns' names."""
    anchor, positive = _pair(row)
    return _named_columns(row, anchor, positive, None, _score_key(row))


def _ordered_columns(row: Row) -> Reader:
    """By the columns' order, as sentence-transformers takes them: anchor, positive, negatives, and perhaps a score."""
    score = _score_key(row)
    texts = [key for key in row if key != score]
    if len(texts) < 2:
        raise InputError(f"expected at least two columns of text, found {', '.join(map(repr, texts)) or 'none'}")
    if score is not None and _is_number(row[score]) and len(texts) == 2:
        return _graded_columns("sentence-transformers", row, texts[0], texts[1], texts[2:], score)
    return _named_columns(row, texts[0], texts[1], texts[2:], score)


def _named_columns(row: Row, anchor: str, positive: str, negatives: list[str] | None, score: str | None) -> Reader:
    def read(row: Row) -> Group:
        value = value_at(row, positive)
        several = _texts(value, f"column {positive!r}") if isinstance(value, list) else [text_at(row, positive)]
        others: list[str] = []
        for key in _negative_keys(row) if negatives is None else negatives:
            found = row.get(key)
            if isinstance(found, list):
                others += _texts(found, f"column {key!r}")
            elif found is not None and found != "":  # a row may have fewer
                others.append(checked_text(found, f"column {key!r}"))
        if score is None and (key := _score_key(row)) is not None and negatives is None:
            raise InputError(f"column {key!r}: the first row has none")
        scores: list[float] = []
        if score is not None:
            given, what = value_at(row, score), f"column {score!r}"
            if _is_number(given) and len(several) == len(others) == 1:  # MarginMSE's label; only differences count
                given = [given, 0.0]
            scores = _scores(given, what, len(several) + len(others))
        return Group(text_at(row, anchor), several, others, scores)

    known = [anchor, positive, *(negatives or _negative_keys(row)), *([] if score is None else [score])]
    return Reader("sentence-transformers", f"columns {anchor} → {positive}", "pairs", read, _others(row, *known))


def _others(row: Row, *known: str) -> tuple[str, ...]:
    return tuple(key for key in row if key not in known)


def _texts(value: Any, what: str) -> list[str]:
    if not isinstance(value, list):
        raise InputError(f"{what}: expected a list of strings, found {type_name(value)}")
    return [checked_text(text, f"{what}[{place}]") for place, text in enumerate(value)]


def _scores(value: Any, what: str, count: int) -> list[float]:
    if not isinstance(value, list) or len(value) != count:
        found = f"{len(value)}" if isinstance(value, list) else type_name(value)
        raise InputError(f"{what}: expected a list of {count} numbers, one for each document, found {found}")
    return [number(score, f"{what}[{place}]") for place, score in enumerate(value)]


def _list_at(row: Row, key: str, *, optional: bool = False) -> list[Any]:
    value = row.get(key) if optional else value_at(row, key)
    if value is None and optional:
        return []
    if not isinstance(value, list):
        raise InputError(f"column {key!r}: expected a list, found {type_name(value)}")
    return value


def _tevatron(row: Row) -> Reader:
    def passages(row: Row, key: str, *, optional: bool = False) -> list[str]:
        values = _list_at(row, key, optional=optional)
        return [passage_text(value, f"column {key!r}[{place}]") for place, value in enumerate(values)]

    def read(row: Row) -> Group:
        positives = passages(row, "positive_passages")
        negatives = passages(row, "negative_passages", optional=True)
        objects = [*row["positive_passages"], *(row.get("negative_passages") or [])]
        scores = [
            number(each["score"], "key 'score' of a passage") for each in objects if each.get("score") is not None
        ]
        # Some files have a first stage's scores for a part of the passages: no teacher's.
        return Group(text_at(row, "query"), positives, negatives, scores if len(scores) == len(objects) else [])

    unused = _others(row, "query_id", "query", "positive_passages", "negative_passages")
    return Reader("tevatron", "tevatron", "pairs", read, unused)


def _tevatron_ids(row: Row) -> Reader:
    query = "query_text" if "query_text" in row else "query"

    def names(row: Row, key: str, *, optional: bool = False) -> list[str]:
        values = _list_at(row, key, optional=optional)
        return [id_text(value, f"column {key!r}[{place}]") for place, value in enumerate(values)]

    def read(row: Row) -> NamedGroup:
        positives = names(row, "positive_document_ids")
        return NamedGroup(text_at(row, query), positives, names(row, "negative_document_ids", optional=True))

    unused = _others(row, "query_id", query, "positive_document_ids", "negative_document_ids")
    return Reader("tevatron-ids", "tevatron with document ids", "ids", read, unused)


def _flagembedding(row: Row) -> Reader:
    def read(row: Row) -> Group:
        prompt = row.get("prompt")
        prompt = "" if prompt is None else checked_text(prompt, "column 'prompt'")
        positives = _texts(value_at(row, "pos"), "column 'pos'")
        negatives = _texts(_list_at(row, "neg", optional=True), "column 'neg'")
        given = [row.get(key) is not None for key in ("pos_scores", "neg_scores")]
        scores: list[float] = []
        if any(given) and not all(given) and negatives:
            missing = ("pos_scores", "neg_scores")[given.index(False)]
            raise InputError(f"column {missing!r}: missing, but the row has the other scores")
        if given[0]:
            scores += _scores(row["pos_scores"], "column 'pos_scores'", len(positives))
            scores += _scores(_list_at(row, "neg_scores", optional=True), "column 'neg_scores'", len(negatives))
        return Group(with_instruction(prompt, text_at(row, "query")), positives, negatives, scores)

    unused = _others(row, "query", "pos", "neg", "pos_scores", "neg_scores", "prompt", "type")
    return Reader("flagembedding", "FlagEmbedding", "pairs", read, unused)


def _gritlm(row: Row) -> Reader:
    def entry(value: Any, what: str) -> str:
        if not isinstance(value, list) or len(value) != 2:
            raise InputError(f"{what}: expected [instruction, text], found {_shape(value)}")
        instruction, text = _texts(value, what)
        return with_instruction(instruction, text)

    def entries(row: Row, key: str, *, optional: bool = False) -> list[str]:
        values = _list_at(row, key, optional=optional)
        if len(values) == 2 and all(isinstance(value, str) for value in values):
            values = [values]  # INSTRUCTOR's MEDI has one, not nested
        return [entry(value, f"column {key!r}[{place}]") for place, value in enumerate(values)]

    def read(row: Row) -> Group:
        query = entry(value_at(row, "query"), "column 'query'")
        return Group(query, entries(row, "pos"), entries(row, "neg", optional=True))

    return Reader("gritlm", "GritLM pairs", "pairs", read, _others(row, "query", "pos", "neg"))


def _shape(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else type_name(value)


def _ms_swift(row: Row) -> Reader:
    def conversation(value: Any, what: str) -> str:
        """System messages are the instruction; the others, of which there is one as a rule, the text."""
        if not isinstance(value, list) or not value:
            raise InputError(
                f"{what}: expected a list of messages, found {'none' if value == [] else type_name(value)}"
            )
        parts: dict[bool, list[str]] = {True: [], False: []}
        for place, message in enumerate(value):
            if not isinstance(message, dict):
                raise InputError(f"{what}[{place}]: expected a message, found {type_name(message)}")
            text = checked_text(message.get("content"), f"{what}[{place}], 'content'")
            parts[message.get("role") == "system"].append(text)
        return with_instruction("\n".join(parts[True]), "\n".join(parts[False]))

    def conversations(row: Row, key: str, *, optional: bool = False) -> list[str]:
        values = _list_at(row, key, optional=optional)
        return [conversation(value, f"column {key!r}[{place}]") for place, value in enumerate(values)]

    def read(row: Row) -> Group:
        anchor = conversation(value_at(row, "messages"), "column 'messages'")
        positives = conversations(row, "positive_messages")
        negatives = conversations(row, "negative_messages", optional=True)
        if not graded:
            return Group(anchor, positives, negatives)
        if negatives:
            raise InputError("column 'negative_messages': graded rows (with a label) have none")
        return Group(anchor, positives, (), [number(value_at(row, "label"), "column 'label'")] * len(positives))

    graded = row.get("label") is not None and not row.get("negative_messages")
    unused = _others(row, "messages", "positive_messages", "negative_messages", "label")
    return Reader("ms-swift", f"ms-swift{', graded' * graded}", "graded" if graded else "pairs", read, unused)


def _labelled(row: Row) -> Reader:
    def read(row: Row) -> Labelled:
        return Labelled(text_at(row, "text"), id_text(value_at(row, "label"), "column 'label'"))

    return Reader("labelled", "labelled texts", "labels", read, _others(row, "text", "label"))


def _fits_labelled(row: Row) -> bool:
    return isinstance(row.get("text"), str) and row.get("label") is not None and not _column_pairs(row)


def _inference_columns(row: Row) -> tuple[str, str, str] | None:
    label = next((key for key in _INFERENCE_LABEL if key in row), None)
    return next(((*pair, label) for pair in _INFERENCE if label and all(key in row for key in pair)), None)


def _fits_nli(row: Row) -> bool:
    found = _inference_columns(row)
    if found is None:
        return False
    premise, _, label = found
    value = row[label]
    if premise == "premise":
        return value is None or (str(value).lower() in _LABELS and not isinstance(value, (float, bool)))
    # Beside sentence1 and sentence2 a number is a grade.
    return isinstance(value, str) and value.lower() in _LABELS and not _is_number(value)


def _nli(row: Row) -> Reader:
    columns = _inference_columns(row)
    if columns is None:
        raise InputError(f"no premise, hypothesis and label; columns of this row: {keys_of(row)}")
    premise, hypothesis, label = columns

    def read(row: Row) -> Inference:
        value = value_at(row, label)
        name = "-" if value is None else str(value).lower()
        if name not in _LABELS:
            expected = "entailment, neutral, contradiction, or 0, 1, 2 for the same"
            raise InputError(f"column {label!r}: expected {expected}, found {value!r:.60}")
        return Inference(text_at(row, premise), text_at(row, hypothesis), _LABELS[name])

    return Reader("nli", "NLI", "inference", read, _others(row, *columns))


def _is_text_and_list(row: Row, text: str, others: str) -> bool:
    return isinstance(row.get(text), str) and isinstance(row.get(others), list)


_FORMATS: dict[RowFormat, _Format] = {
    "sentence-transformers": _Format(
        "anchor, query or question; positive, answer, passage, document, code, …; or sentence1 and sentence2, s1 and "
        "s2, title and abstract, …; negative or negative_1, negative_2, …; scores (a list, of a teacher)",
        _fits_columns,
        _columns,
    ),
    "graded": _Format("two texts as above, and score or label, a number", _fits_graded, _graded),
    "tevatron": _Format(
        "query, positive_passages and negative_passages (objects with title and text)",
        lambda row: "positive_passages" in row,
        _tevatron,
    ),
    "tevatron-ids": _Format(
        "query_text, positive_document_ids, negative_document_ids; needs corpus",
        lambda row: "positive_document_ids" in row,
        _tevatron_ids,
    ),
    "flagembedding": _Format(
        "query, pos and neg (lists), pos_scores, neg_scores, prompt",
        lambda row: _is_text_and_list(row, "query", "pos"),
        _flagembedding,
    ),
    "gritlm": _Format(
        "query ([instruction, text]), pos and neg (lists of the same)",
        lambda row: isinstance(row.get("query"), list) and "pos" in row,
        _gritlm,
    ),
    "ms-swift": _Format(
        "messages, positive_messages, negative_messages, label",
        lambda row: "messages" in row and "positive_messages" in row,
        _ms_swift,
    ),
    "labelled": _Format("text, label", _fits_labelled, _labelled),
    "nli": _Format("premise or sentence1, hypothesis or sentence2, label or gold_label", _fits_nli, _nli),
}
_BY_PLAIN_NAMES = ("sentence-transformers", "graded", "labelled")  # these give way to the others
