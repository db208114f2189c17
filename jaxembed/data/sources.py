"""Where training pairs come from: `Examples`, the columns that every source gives, and the readers of files of rows."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from jaxembed.data.formats import Group, NamedGroup, Reader, RowFormat, number, recognise
from jaxembed.data.id_texts import CORPUS_KEYS
from jaxembed.data.labels import DUPLICATE, EMPTY_TEXT, inference_groups, label_groups
from jaxembed.data.rows import SKIP_REMEDY, Row, file_fingerprint, numbered_rows, text_at, value_at
from jaxembed.data.text_store import Picked, PickedRows, TextStore, find_corpus, store_of_file
from jaxembed.errors import InputError

log = logging.getLogger(__name__)

SAME_TEXT = "anchor equal to its positive"
BAD_ROW = "bad row"
NO_POSITIVE = "no positive"
OTHER_SPLIT = "other split"
EMPTY_NEGATIVE = "empty negative"
FALSE_NEGATIVE = "negative that is a positive"

_Item = TypeVar("_Item")


@dataclass(frozen=True, eq=False)
class TextRows:
    """Which of a source's texts those of its examples are, counted from 0 in the order in which the source has them.

    Every row that is read counts, also one of which no example is made.

    Attributes:
        anchors: of each example.
        positives: of each example, among the positives; or among the documents, where the source names them by id. Its
            own comes first, then `Examples.more_positives`, then −1.
        negatives: the same of the hard negatives.
        counts: how many texts the source has, of "anchors" and of "positives" and "negatives", or of "documents".
    """

    anchors: Int[np.ndarray, " examples"]
    positives: Int[np.ndarray, "examples positives"]
    negatives: Int[np.ndarray, "examples columns"]
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Examples:
    """The pairs of one source, as columns of equal length, and what became of the rows that are not among them.

    Attributes:
        name: the source's name in the config, in metrics and in the model card.
        anchors: queries, one a pair.
        positives: the document that each query should find; a list, or `Picked` from a store on the disk.
        negatives: hard negatives of each query, as many as it has; empty where the source has none at all.
        ids: where each pair comes from, "medquad.jsonl.gz:17" or "json.decoder:JSONDecoder.decode".
        dropped: how many rows (and, of rows that stayed, negatives) were left out, by reason.
        fingerprint: changes when the texts may have changed; does not depend on where the source lies.
        recognised: the format, where it was recognised.
        scores: column 0 is of the positive, the others of the negatives, NaN where there is none. Graded pairs have
            column 0 alone, their grade.
        rows: where the texts stand in the source; None where it has no order that its author knows.
        more_positives: further positives of queries that are one example with all of them; None = there are none.
    """

    name: str
    anchors: Sequence[str]
    positives: Sequence[str]
    negatives: Sequence[Sequence[str]]
    ids: Sequence[str]
    dropped: dict[str, int]
    fingerprint: str
    recognised: str = ""
    scores: Float[np.ndarray, "examples columns"] | None = field(default=None, compare=False)
    rows: TextRows | None = field(default=None, compare=False, repr=False)
    more_positives: PickedRows | None = None

    def __len__(self) -> int:
        return len(self.anchors)

    @cached_property
    def negative_counts(self) -> Int[np.ndarray, " examples"]:
        """How many negatives each pair has."""
        if isinstance(self.negatives, PickedRows):
            return (self.negatives.rows >= 0).sum(1)
        if not len(self.negatives):
            return np.zeros(len(self), np.int64)
        return np.fromiter(map(len, self.negatives), np.int64, len(self))

    @property
    def graded(self) -> bool:
        """Whether these are pairs with a grade, rather than a query and what it should find."""
        return self.scores is not None and self.scores.shape[1] == 1 and not self.negative_counts.any()


def summary(examples: Examples) -> str:
    """One line for the log: "medquad: 12,471 pairs kept, 3 dropped (2 duplicate, 1 empty text)".

    Where the format was recognised it is named: "medquad: tevatron (2 negatives a query), 12,471 pairs kept, …".
    """
    kept = f"{len(examples):,} pair{'' if len(examples) == 1 else 's'} kept"
    if examples.recognised:
        kept = f"{examples.recognised} ({_beside(examples)}), {kept}"
    return f"{examples.name}: {kept}, {describe_dropped(examples.dropped)}"


def describe_dropped(dropped: dict[str, int]) -> str:
    """ "3 dropped (2 duplicate, 1 empty text)", the most frequent reason first."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items(), key=lambda item: -item[1]))
    return f"{sum(dropped.values()):,} dropped" + (f" ({reasons})" if reasons else "")


def _beside(examples: Examples) -> str:
    if examples.graded:
        assert examples.scores is not None
        return f"grades {examples.scores.min():g} to {examples.scores.max():g}"
    counts = examples.negative_counts
    fewest, most = int(counts.min(initial=0 if not len(counts) else counts[0])), int(counts.max(initial=0))
    range_ = "no" if not most else f"{most}" if fewest == most else f"{fewest} to {most}"
    text = f"{range_} negative{'' if range_ == '1' else 's'} a query"
    return text if examples.scores is None else f"{text}, with scores"


def read_jsonl(
    path: str | os.PathLike[str],
    *,
    name: str,
    anchor: str = "anchor",
    positive: str = "positive",
    negatives: Sequence[str] = (),
    score: str | None = None,
    split: str | None = None,
    bad_rows: Literal["error", "skip"] = "error",
) -> Examples:
    """Pairs from named columns of a file of rows, in the file's order; see `rows` for the kinds of files.

    A row whose texts are empty, that repeats an earlier (anchor, positive), or whose anchor equals its positive is
    dropped and counted; of graded pairs those with equal texts stay. Blank lines do not count as rows. Texts are kept
    as they are, white space included.

    Args:
        path: a local file or any path that `etils.epath` knows, "gs://…" too.
        name: the source's name.
        anchor: the column of queries.
        positive: the column of documents that answer them.
        negatives: the columns of hard negatives.
        score: the column of the pairs' grades, if they have some.
        split: rows with another value in their column "split" are dropped.
        bad_rows: "error" stops at the first row that is not UTF-8, not JSON, not an object, lacks a column, or holds
            something else than a string there; "skip" drops and counts such rows.

    Raises:
        InputError: the file is missing, cannot be decompressed, has a bad row (see `bad_rows`), or gives no pair.
    """
    file = epath.Path(path).expanduser()
    columns = (anchor, positive, *negatives)
    options = [*columns, *_given(score=score, split=split)]
    kept = _Kept(file, graded=score is not None)

    def read(row: Row) -> tuple[list[str], list[float]]:
        grade = [] if score is None else [number(value_at(row, score), f"column {score!r}")]
        return [text_at(row, column) for column in columns], grade

    for where, (texts, grade) in _read(file, name, read, kept.dropped, split, bad_rows):
        query, document, *others = texts
        rows = kept.counted(1, len(others))
        if not all(text.strip() for text in texts):
            kept.dropped[EMPTY_TEXT] += 1
        else:
            kept.add(where, query, document, tuple(others), grade, (rows[0], rows[1], range(rows[2], kept.read[2])))
    return kept.examples(name, file_fingerprint(file, name, options), "")


def read_rows(
    path: str | os.PathLike[str],
    *,
    name: str,
    format: RowFormat | None = None,
    corpus: str | os.PathLike[str] | None = None,
    split: str | None = None,
    label_negatives: int = 1,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] = "~/.cache/jaxembed/tokens",
    bad_rows: Literal["error", "skip"] = "error",
) -> Examples:
    """Pairs from a file in one of the known formats, recognised by the keys of its first row.

    What is dropped is what `read_jsonl` drops, except that an empty negative, or one that is a positive of the same
    row, goes alone. A query with several positives gives a pair for each.

    Args:
        path: the file; see `rows` for the kinds.
        name: the source's name.
        format: the format, where it is not to be recognised.
        corpus: file, or folder with a corpus, of the documents that rows name by id.
        split: rows with another value in their column "split" are dropped.
        label_negatives: negatives drawn for each labelled text.
        seed: of what is drawn for labelled texts and NLI rows.
        cache_dir: local folder of the caches, where a corpus is kept.
        bad_rows: see `read_jsonl`.

    Raises:
        InputError: as `read_jsonl`; and where the keys are those of no known format, or of several.
    """
    file = epath.Path(path).expanduser()
    kept = _Kept(file)
    reader: list[Reader] = []

    def read(row: Row) -> Any:
        if not reader:
            try:
                reader.append(recognise(row, format))
            except InputError as error:
                raise _Unrecognised(str(error)) from None
        return reader[0].read(row)

    items = _read(file, name, read, kept.dropped, split, bad_rows)
    first = next(items, None)
    if first is None:
        raise kept.nothing()
    (how,) = reader
    items = _chain(first, items)
    if how.unused:
        log.info("%s: keys that are not read: %s", name, ", ".join(map(repr, how.unused)))
    if (corpus is None) == (how.kind == "ids"):
        problem = (
            "names documents by id; give their corpus" if corpus is None else "has no documents by id; leave out corpus"
        )
        raise InputError(f"{file}: {how.described} {problem} (data source {name!r})")
    options = ["rows", how.format, how.described, *_given(split=split)]
    if how.kind == "ids":
        assert corpus is not None
        store = store_of_file(
            find_corpus(epath.Path(corpus).expanduser()),
            name,
            keys=CORPUS_KEYS,
            directory=cache_dir,
            bad_rows=bad_rows,
        )
        fingerprint = file_fingerprint(file, name, [*options, store.fingerprint])
        return _named_examples(items, store, kept, name, fingerprint, how.described, bad_rows)
    kept.ordered = how.kind in ("pairs", "graded")
    if how.kind == "labels":
        options += [str(label_negatives), str(seed)]
        try:
            items = list(label_groups(list(items), kept.dropped, seed=seed, negatives=label_negatives))
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
    elif how.kind == "inference":
        options.append(str(seed))
        kept.by_negatives = True
        items = inference_groups(items, kept.dropped, seed=seed)
    kept.graded = how.kind == "graded"
    for where, group in items:
        kept.add_group(where, group)
    return kept.examples(name, file_fingerprint(file, name, options), how.described)


class _Unrecognised(InputError):
    """Of the whole file, not of a row that could be skipped."""


def _given(**options: str | None) -> list[str]:
    return [f"{key}={value}" for key, value in options.items() if value is not None]


def _chain(first: _Item, others: Iterable[_Item]) -> Iterator[_Item]:
    yield first
    yield from others


def _read(
    file: epath.Path,
    name: str,
    read: Callable[[Row], _Item],
    dropped: Counter[str],
    split: str | None,
    bad_rows: Literal["error", "skip"],
) -> Iterator[tuple[str, _Item]]:
    """(where, what was read) of every row that is not skipped."""
    for place, row in numbered_rows(file, name):
        try:
            if isinstance(row, InputError):
                raise row
            if split is not None and value_at(row, "split") != split:
                dropped[OTHER_SPLIT] += 1
                continue
            item = read(row)
        except _Unrecognised as error:
            raise InputError(f"{file}:{place}: {error}") from None
        except InputError as error:
            if bad_rows == "error":
                raise InputError(f"{file}:{place}: {error}. {SKIP_REMEDY}") from None
            dropped[BAD_ROW] += 1
            continue
        yield f"{file.name}:{place}", item


_Places = tuple[int, int, Sequence[int]]
"""The number of an anchor, of its positive, of each negative."""


@dataclass
class _Kept:
    """Pairs as they come in, without those that teach nothing."""

    file: epath.Path
    graded: bool = False
    by_negatives: bool = False
    """Whether pairs with other negatives are other pairs."""
    anchors: list[str] = field(default_factory=list)
    positives: list[str] = field(default_factory=list)
    negatives: list[tuple[str, ...]] = field(default_factory=list)
    scores: list[Sequence[float]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    seen: set[tuple[str, ...]] = field(default_factory=set)
    ordered: bool = True
    """Whether texts come in the order in which the file has them."""
    read: tuple[int, int, int] = (0, 0, 0)
    """Anchors, positives and negatives of all rows so far."""
    rows: list[_Places] = field(default_factory=list)

    def counted(self, positives: int, negatives: int) -> tuple[int, int, int]:
        """The numbers of a row's anchor, first positive and first negative."""
        first = self.read
        self.read = first[0] + 1, first[1] + positives, first[2] + negatives
        return first

    def add(
        self,
        where: str,
        anchor: str,
        positive: str,
        negatives: tuple[str, ...],
        scores: Sequence[float],
        rows: _Places,
    ) -> None:
        pair = (anchor, positive, *negatives) if self.by_negatives else (anchor, positive)
        if not (anchor.strip() and positive.strip()):
            self.dropped[EMPTY_TEXT] += 1
        elif anchor == positive and not self.graded:
            self.dropped[SAME_TEXT] += 1
        elif pair in self.seen:
            self.dropped[DUPLICATE] += 1
        else:
            self.seen.add(pair)
            self.anchors.append(anchor)
            self.positives.append(positive)
            self.negatives.append(negatives)
            self.scores.append(scores)
            self.ids.append(where)
            self.rows.append(rows)

    def add_group(self, where: str, group: Group) -> None:
        anchor, first, first_negative = self.counted(len(group.positives), len(group.negatives))
        if not group.positives:
            self.dropped[NO_POSITIVE] += 1
            return
        positives = set(group.positives)
        places: list[int] = []
        for place, text in enumerate(group.negatives, start=len(group.positives)):
            if not text.strip():
                self.dropped[EMPTY_NEGATIVE] += 1
            elif text in positives:
                self.dropped[FALSE_NEGATIVE] += 1
            else:
                places.append(place)
        negatives = tuple(group.negatives[place - len(group.positives)] for place in places)
        for own, positive in enumerate(group.positives):
            scores = [group.scores[place] for place in (own, *places)] if group.scores else ()
            rows = anchor, first + own, [first_negative + place - len(group.positives) for place in places]
            self.add(where, group.anchor, positive, negatives, scores, rows)

    def examples(self, name: str, fingerprint: str, recognised: str) -> Examples:
        if not self.anchors:
            raise self.nothing()
        return Examples(
            name,
            self.anchors,
            self.positives,
            self.negatives,
            self.ids,
            dict(self.dropped),
            fingerprint,
            recognised,
            _matrix(self.scores),
            self._text_rows() if self.ordered else None,
        )

    def _text_rows(self) -> TextRows:
        anchors, positives, negatives = zip(*self.rows)
        matrix = np.full((len(negatives), max(map(len, negatives))), -1, np.int64)
        for row, places in zip(matrix, negatives):
            row[: len(places)] = places
        counts: Mapping[str, int] = dict(zip(("anchors", "positives", "negatives"), self.read))
        return TextRows(np.array(anchors, np.int64), np.array(positives, np.int64)[:, None], matrix, counts)

    def nothing(self) -> InputError:
        return InputError(
            f"{self.file}: no pair left of {sum(self.dropped.values()):,} rows, {describe_dropped(self.dropped)}"
        )


def _matrix(scores: Sequence[Sequence[float]]) -> Float[np.ndarray, "examples columns"] | None:
    """Rows of different lengths, NaN at their ends; None where all are empty."""
    width = max(map(len, scores), default=0)
    if not width:
        return None
    matrix = np.full((len(scores), width), np.nan, np.float32)
    for row, values in enumerate(scores):
        matrix[row, : len(values)] = values
    return matrix


def _named_examples(
    items: Iterable[tuple[str, NamedGroup]],
    store: TextStore,
    kept: _Kept,
    name: str,
    fingerprint: str,
    recognised: str,
    bad_rows: Literal["error", "skip"],
) -> Examples:
    """Pairs whose documents are rows of a store."""
    blank = set(store.blank.tolist())
    anchors, ids, places, read = [], [], [], 0
    positives: list[int] = []
    negatives: list[np.ndarray] = []
    dropped = kept.dropped
    seen: set[tuple[str, int]] = set()
    for read, (where, group) in enumerate(items, 1):
        named = [*group.positives, *group.negatives]
        rows = store.rows_of(named)
        if (rows < 0).any():
            unknown = named[int(np.argmin(rows))]
            if bad_rows == "error":
                at = where.removeprefix(f"{kept.file.name}:")
                raise InputError(f"{kept.file}:{at}: the corpus has no document with the id {unknown!r}. {SKIP_REMEDY}")
            dropped[BAD_ROW] += 1
            continue
        found, others = rows[: len(group.positives)], rows[len(group.positives) :]
        if not len(found):
            dropped[NO_POSITIVE] += 1
        false = np.isin(others, found)
        empty = ~false & np.fromiter((row in blank for row in others.tolist()), bool, len(others))
        for reason, count in ((FALSE_NEGATIVE, int(false.sum())), (EMPTY_NEGATIVE, int(empty.sum()))):
            if count:
                dropped[reason] += count
        others = others[~false & ~empty].astype(np.int32 if len(store) < 2**31 else np.int64)
        for row in found.tolist():
            if row in blank or not group.anchor.strip():
                dropped[EMPTY_TEXT] += 1
            elif (group.anchor, row) in seen:
                dropped[DUPLICATE] += 1
            elif group.anchor == store[row]:
                dropped[SAME_TEXT] += 1
            else:
                seen.add((group.anchor, row))
                anchors.append(group.anchor)
                positives.append(row)
                negatives.append(others)
                ids.append(where)
                places.append(read - 1)
    if not anchors:
        raise kept.nothing()
    matrix = np.full((len(anchors), max(map(len, negatives))), -1, np.int32 if len(store) < 2**31 else np.int64)
    for place, others in enumerate(negatives):
        matrix[place, : len(others)] = others
    found = np.array(positives, np.int64)
    return Examples(
        name,
        anchors,
        Picked(store, found),
        PickedRows(store, matrix),
        ids,
        dict(dropped),
        fingerprint,
        recognised,
        rows=TextRows(np.array(places, np.int64), found[:, None], matrix, {"anchors": read, "documents": len(store)}),
    )
