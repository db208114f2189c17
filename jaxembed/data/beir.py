"""Retrieval data by id: a corpus, queries, judgements of which documents answer which queries, and mined negatives.

BEIR folders, and MS MARCO's own files (`collection.tsv`, `queries.train.tsv`, `qrels.train.tsv`). Texts stay on the
disk.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from etils import epath
from jaxtyping import Bool, Int, Int64

from jaxembed.data.formats import id_text, number
from jaxembed.data.id_texts import CORPUS_KEYS, QUERY_KEYS
from jaxembed.data.rows import (
    SKIP_REMEDY,
    Row,
    file_fingerprint,
    keys_of,
    kind_of,
    numbered_fields,
    numbered_rows,
    type_name,
)
from jaxembed.data.sources import (
    BAD_ROW,
    DUPLICATE,
    EMPTY_NEGATIVE,
    EMPTY_TEXT,
    FALSE_NEGATIVE,
    SAME_TEXT,
    Examples,
    TextRows,
    describe_dropped,
)
from jaxembed.data.text_store import (
    Picked,
    PickedRows,
    TextStore,
    find_corpus,
    find_file,
    store_of_file,
)
from jaxembed.errors import InputError

NOT_RELEVANT = "judged not relevant"

_BLOCK = 1 << 14  # rows whose ids are looked up at once
_QUERY_IDS = ("query-id", "query_id", "qid", "_id")
_DOCUMENT_IDS = ("corpus-id", "corpus_id", "docid", "doc_id", "pid")
_GRADES = ("score", "relevance", "rel", "label")
_NEGATIVES = ("neg", "negatives", "negative_document_ids", "hard_negatives")
_POSITIVES = ("pos", "positives", "positive_document_ids")
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class _Mined:
    query: str
    positives: list[str]
    negatives: list[str]


def read_beir(
    path: str | os.PathLike[str],
    *,
    name: str,
    split: str = "train",
    corpus: str | os.PathLike[str] | None = None,
    queries: str | os.PathLike[str] | None = None,
    qrels: str | os.PathLike[str] | None = None,
    mined: str | os.PathLike[str] | None = None,
    mined_negatives: int = 16,
    cache_dir: str | os.PathLike[str] = "~/.cache/jaxembed/tokens",
    bad_rows: Literal["error", "skip"] = "error",
) -> Examples:
    """A pair for each judgement above 0, with the negatives that were mined for its query.

    In the folder are `corpus.jsonl` (_id, title, text), `queries.jsonl` (_id, text) and `qrels/SPLIT.tsv` (query-id,
    corpus-id, score), or files of the same kind by other names; see docs/data.md. Without judgements the positives are
    those of the mined file.

    Args:
        path: the folder.
        name: the source's name.
        split: which judgements.
        corpus: the corpus, where it is not in the folder or has another name.
        queries: the same for queries.
        qrels: the same for judgements.
        mined: a file of negatives: JSON lines {"qid", "pos": [id], "neg": [id] or {system: [id]}}, or TSV with the
            columns query, negative or query, positive, negative.
        mined_negatives: negatives of a query that are taken from it, of several systems the first ones in turn.
        cache_dir: local folder of the caches, where corpus and queries are kept.
        bad_rows: "error" stops at a row that cannot be read or that names an unknown id; "skip" drops and counts it.

    Raises:
        InputError: with file, line and key.
    """
    folder = epath.Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (data source {name!r})")
    given = [None if file is None else epath.Path(file).expanduser() for file in (corpus, queries, qrels, mined)]
    corpus_file, queries_file, qrels_file, mined_file = given
    corpus_file = find_corpus(corpus_file or folder)
    queries_file = queries_file or find_file(folder, query_names(split), "queries")
    if qrels_file is None:
        names = qrels_names(split)
        if mined_file is None or any((folder / f"{one}{end}").exists() for one in names for end in ("", ".gz")):
            qrels_file = find_file(folder, names, f"judgements of the split {split!r}")

    def store(file: epath.Path, keys: tuple[Sequence[str], Sequence[str]]) -> TextStore:
        return store_of_file(file, name, keys=keys, directory=cache_dir, bad_rows=bad_rows)

    documents, asked = store(corpus_file, CORPUS_KEYS), store(queries_file, QUERY_KEYS)
    dropped: Counter[str] = Counter({BAD_ROW: documents.skipped + asked.skipped})
    options = ["beir", documents.fingerprint, asked.fingerprint]
    if qrels_file is not None:
        pairs = _judged(qrels_file, name, asked, documents, dropped, bad_rows)
        options.append(file_fingerprint(qrels_file, name, []))
    else:
        assert mined_file is not None
        pairs = _mined_positives(mined_file, name, asked, documents, dropped, bad_rows)
    pairs = _without_useless(pairs, asked, documents, dropped)
    source = qrels_file or mined_file
    if not len(pairs):
        raise InputError(f"{source}: no pair left of {sum(dropped.values()):,} rows, {describe_dropped(+dropped)}")
    negatives: Sequence[Sequence[str]] = []
    if mined_file is not None:
        rows = _mined_rows(mined_file, name, pairs, asked, documents, mined_negatives, dropped, bad_rows)
        negatives = PickedRows(documents, rows)
        options.append(file_fingerprint(mined_file, name, [str(mined_negatives)]))
    assert source is not None
    return Examples(
        name,
        Picked(asked, pairs[:, 0]),
        Picked(documents, pairs[:, 1]),
        negatives,
        [f"{source.name}:{line}" for line in pairs[:, 2].tolist()],
        dict(+dropped),
        _hash(options),
        "BEIR",
        rows=TextRows(
            pairs[:, 0],
            pairs[:, 1:2],
            negatives.rows if isinstance(negatives, PickedRows) else np.zeros((len(pairs), 0), np.int64),
            {"anchors": len(asked), "documents": len(documents)},
        ),
    )


def query_names(split: str) -> list[str]:
    """Files in which a folder may have its queries."""
    kinds = ("jsonl", "tsv", "csv", "parquet")
    return [f"queries{between}.{kind}" for between in (f".{split}", "") for kind in kinds]


def qrels_names(split: str) -> list[str]:
    """Files in which a folder may have its judgements."""
    kinds = ("tsv", "jsonl", "csv", "parquet")
    return [f"qrels{between}{split}.{kind}" for between in ("/", ".") for kind in kinds]


def _hash(options: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(options).encode()).hexdigest()


def _bad(
    file: epath.Path, line: int, error: InputError | str, dropped: Counter[str], bad_rows: Literal["error", "skip"]
) -> None:
    if bad_rows == "error":
        raise InputError(f"{file}:{line}: {error}. {SKIP_REMEDY}")
    dropped[BAD_ROW] += 1


def _blocks(
    items: Iterable[tuple[int, _Item | InputError]],
    file: epath.Path,
    dropped: Counter[str],
    bad_rows: Literal["error", "skip"],
) -> Iterator[list[tuple[int, _Item]]]:
    """What could be read, so many at once that looking up their ids takes arrays."""
    block: list[tuple[int, _Item]] = []
    for line, item in items:
        if isinstance(item, InputError):
            _bad(file, line, item, dropped, bad_rows)
            continue
        block.append((line, item))
        if len(block) == _BLOCK:
            yield block
            block = []
    if block:
        yield block


def _judged(
    file: epath.Path,
    name: str,
    asked: TextStore,
    documents: TextStore,
    dropped: Counter[str],
    bad_rows: Literal["error", "skip"],
) -> Int64[np.ndarray, "pairs 3"]:
    """Query row, document row and line of each judgement above 0."""
    found = [np.zeros((0, 3), np.int64)]
    for block in _blocks(judgements(file, name), file, dropped, bad_rows):
        queries, ids, grades = zip(*(item for _, item in block))
        known, above = _looked_up(block, queries, ids, asked, documents, file, dropped, bad_rows)
        relevant = np.array(grades) > 0
        if irrelevant := int((known & ~relevant).sum()):
            dropped[NOT_RELEVANT] += irrelevant
        found.append(above[known & relevant])
    return np.concatenate(found)


def _mined_positives(
    file: epath.Path,
    name: str,
    asked: TextStore,
    documents: TextStore,
    dropped: Counter[str],
    bad_rows: Literal["error", "skip"],
) -> Int64[np.ndarray, "pairs 3"]:
    """Query row, document row and line of each positive of a mined file."""
    found = [np.zeros((0, 3), np.int64)]
    for block in _blocks(_mined(file, name, 0), file, dropped, bad_rows):
        each = [(line, item.query, one) for line, item in block for one in item.positives]
        if each:
            lines, queries, ids = zip(*each)
            pairs = list(zip(lines, lines))
            known, rows = _looked_up(pairs, queries, ids, asked, documents, file, dropped, bad_rows)
            found.append(rows[known])
    return np.concatenate(found)


def _looked_up(
    numbered: Sequence[tuple[int, Any]],
    queries: Sequence[str],
    ids: Sequence[str],
    asked: TextStore,
    documents: TextStore,
    file: epath.Path,
    dropped: Counter[str],
    bad_rows: Literal["error", "skip"],
) -> tuple[Bool[np.ndarray, " pairs"], Int64[np.ndarray, "pairs 3"]]:
    """Whether both ids of each pair are known, and query row, document row and line."""
    rows = np.stack([asked.rows_of(queries), documents.rows_of(ids), [line for line, _ in numbered]], 1)
    known = (rows[:, 0] >= 0) & (rows[:, 1] >= 0)
    for place in np.flatnonzero(~known).tolist():
        query_unknown = rows[place, 0] < 0
        what, one = ("query", queries[place]) if query_unknown else ("document", ids[place])
        _bad(file, int(rows[place, 2]), f"no {what} has the id {one!r}", dropped, bad_rows)
    return known, rows


def _without_useless(
    pairs: Int64[np.ndarray, "pairs 3"], asked: TextStore, documents: TextStore, dropped: Counter[str]
) -> Int64[np.ndarray, "kept 3"]:
    query, document = pairs[:, 0], pairs[:, 1]
    empty = np.isin(query, asked.blank) | np.isin(document, documents.blank)
    alike = np.zeros(len(pairs), bool)
    for place in np.flatnonzero(asked.bytes_of(query) == documents.bytes_of(document)).tolist():
        alike[place] = asked[int(query[place])] == documents[int(document[place])]
    repeated = np.ones(len(pairs), bool)
    repeated[np.unique(query * len(documents) + document, return_index=True)[1]] = False
    for reason, which in (
        (EMPTY_TEXT, empty),
        (SAME_TEXT, alike & ~empty),
        (DUPLICATE, repeated & ~alike & ~empty),
    ):
        dropped[reason] += int(which.sum())
    return pairs[~(empty | alike | repeated)]


def _mined_rows(
    file: epath.Path,
    name: str,
    pairs: Int64[np.ndarray, "pairs 3"],
    asked: TextStore,
    documents: TextStore,
    limit: int,
    dropped: Counter[str],
    bad_rows: Literal["error", "skip"],
) -> Int[np.ndarray, "pairs columns"]:
    """Rows of the negatives of each pair, −1 where it has fewer."""
    queries, query_of = np.unique(pairs[:, 0], return_inverse=True)
    # Twice as many as wanted: some turn out to be positives.
    rows = np.full((len(queries), 2 * limit), -1, np.int32 if len(documents) < 2**31 else np.int64)
    filled = np.zeros(len(queries), np.int64)
    for block in _blocks(_mined(file, name, 2 * limit), file, dropped, bad_rows):
        who = asked.rows_of([item.query for _, item in block])
        found = documents.rows_of([one for _, item in block for one in item.negatives])
        ends = np.cumsum([len(item.negatives) for _, item in block])
        places = np.minimum(np.searchsorted(queries, who), len(queries) - 1)
        for (line, item), row, place, own in zip(block, who.tolist(), places.tolist(), np.split(found, ends[:-1])):
            if row < 0:
                _bad(file, line, f"no query has the id {item.query!r}", dropped, bad_rows)
            elif (own < 0).any():
                unknown = item.negatives[int(np.argmin(own))]
                _bad(file, line, f"no document has the id {unknown!r}", dropped, bad_rows)
            elif queries[place] == row:
                begin = int(filled[place])
                fresh = own[~np.isin(own, rows[place, :begin])] if begin else own
                end = min(begin + len(fresh), rows.shape[1])
                rows[place, begin:end] = fresh[: end - begin]
                filled[place] = end
    present = rows >= 0
    positives = pairs[:, 0] * len(documents) + pairs[:, 1]
    false = present & np.isin(queries[:, None] * len(documents) + rows, positives)
    empty = present & ~false & np.isin(rows, documents.blank)
    dropped[FALSE_NEGATIVE] += int(false.sum())
    dropped[EMPTY_NEGATIVE] += int(empty.sum())
    keep = present & ~false & ~empty
    order = np.argsort(~keep, axis=1, kind="stable")[:, :limit]
    rows = np.where(np.take_along_axis(keep, order, 1), np.take_along_axis(rows, order, 1), -1)
    return rows[:, : (rows >= 0).sum(1).max()][query_of]


def judgements(file: epath.Path, name: str) -> Iterator[tuple[int, tuple[str, str, float] | InputError]]:
    """(query id, document id, grade): TSV with or without a header, TREC's four columns, CSV, JSON lines, Parquet."""
    if kind_of(file) == "tsv":
        for line, fields in _fields(file, name):
            if isinstance(fields, InputError):
                yield line, fields
                continue
            fields = fields[0].split() if len(fields) == 1 else fields
            if len(fields) not in (3, 4):
                yield line, InputError(f"expected the columns query-id, corpus-id, score, found {len(fields)}")
                continue
            try:
                yield line, (fields[0], fields[-2], number(fields[-1], "column 'score'"))
            except InputError as error:
                yield line, error
        return
    for line, row in numbered_rows(file, name):
        try:
            if isinstance(row, InputError):
                raise row
            query, document, grade = (_key(row, keys) for keys in (_QUERY_IDS, _DOCUMENT_IDS, _GRADES))
            yield (
                line,
                (
                    id_text(row[query], f"column {query!r}"),
                    id_text(row[document], f"column {document!r}"),
                    number(row[grade], f"column {grade!r}"),
                ),
            )
        except InputError as error:
            yield line, error


def _mined(file: epath.Path, name: str, limit: int) -> Iterator[tuple[int, _Mined | InputError]]:
    """Mined negatives by id, of several systems in turn, the first `limit` of them."""
    if kind_of(file) == "tsv":
        for line, fields in _fields(file, name):
            if isinstance(fields, InputError):
                yield line, fields
            elif len(fields) in (2, 3):
                yield line, _Mined(fields[0], fields[1:-1], fields[-1:])
            else:
                problem = f"expected the columns query, negative or query, positive, negative, found {len(fields)}"
                yield line, InputError(problem)
        return
    for line, row in numbered_rows(file, name):
        try:
            if isinstance(row, InputError):
                raise row
            query, key = _key(row, _QUERY_IDS), _key(row, _NEGATIVES)
            positive = next((key for key in _POSITIVES if row.get(key) is not None), None)
            positives = [] if positive is None else _ids(row[positive], f"column {positive!r}")
            systems = row[key]
            if isinstance(systems, dict):
                lists = {f"column {key!r}, {system!r}": ids for system, ids in systems.items()}
            else:
                lists = {f"column {key!r}": systems}
            negatives = _in_turn(lists, positives, limit)
            yield line, _Mined(id_text(row[query], f"column {query!r}"), positives, negatives)
        except InputError as error:
            yield line, error


def _fields(file: epath.Path, name: str) -> Iterator[tuple[int, list[str] | InputError]]:
    """The lines of a TSV file, without its header if it has one."""
    first = True
    for line, fields in numbered_fields(file, name):
        header = first and not isinstance(fields, InputError) and fields[0] in _QUERY_IDS
        first = False
        if not header:
            yield line, fields


def _key(row: Row, keys: Sequence[str]) -> str:
    found = next((key for key in keys if key in row), None)
    if found is None:
        raise InputError(f"no column {' or '.join(map(repr, keys))}; columns of this row: {keys_of(row)}")
    return found


def _ids(value: Any, what: str) -> list[str]:
    return [id_text(one, f"{what}[{place}]") for place, one in enumerate(_checked_list(value, what))]


def _in_turn(lists: Mapping[str, Any], positives: Sequence[str], limit: int) -> list[str]:
    """The first of each list, the second of each, … until there are `limit`: lists are long and few are wanted."""
    checked = [(_checked_list(value, what), what) for what, value in lists.items()]
    taken: dict[str, None] = {}
    for place in range(max((len(ids) for ids, _ in checked), default=0)):
        for ids, what in checked:
            if len(taken) == limit:
                return list(taken)
            if place < len(ids):
                one = id_text(ids[place], f"{what}[{place}]")
                if one not in positives:
                    taken[one] = None
    return list(taken)


def _checked_list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{what}: expected a list of ids, found {type_name(value)}")
    return value
