"""Scores that a cross-encoder gave to pairs of a query and a document, from a file."""

import logging
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from etils import epath
from jaxtyping import Float, Float32, Int, Int64

from jaxembed.data.cache import text_hash
from jaxembed.data.formats import id_text, number
from jaxembed.data.rows import Row, keys_of, numbered_rows, text_at, value_at
from jaxembed.errors import InputError
from jaxembed.mining.task import Task

logger = logging.getLogger(__name__)

QUERY_IDS = ("qid", "query_id", "query-id")
DOCUMENT_IDS = ("pid", "docid", "doc_id", "corpus_id", "corpus-id")
QUERY_TEXTS = ("query", "anchor", "question")
DOCUMENT_TEXTS = ("document", "passage", "text", "positive")

_AT_ONCE = 1 << 16  # rows whose documents are looked up together


@dataclass(frozen=True)
class CrossScores:
    """Scores by query and row of the documents; 12 bytes a pair."""

    keys: Int64[np.ndarray, " pairs"]
    """query · documents + row, ascending."""
    scores: Float32[np.ndarray, " pairs"]
    documents: int

    def of(self, query: Int[np.ndarray, "*#pairs"], row: Int[np.ndarray, "*#pairs"]) -> Float[np.ndarray, "*pairs"]:
        """The scores of pairs in float64, NaN where there is none; `query` and `row` are broadcast."""
        keys = query.astype(np.int64) * self.documents + row
        place = np.minimum(np.searchsorted(self.keys, keys), max(len(self.keys) - 1, 0))
        if not len(self.keys):
            return np.full(keys.shape, np.nan)
        return np.where((self.keys[place] == keys) & (row >= 0), self.scores[place], np.nan).astype(np.float64)


def read_cross_scores(path: str | os.PathLike[str], task: Task) -> CrossScores:
    """The scores of a task's pairs, in a file of rows (JSON lines, TSV, CSV or Parquet) with three columns each.

    The query is named by id (`QUERY_IDS`) or by its text (`QUERY_TEXTS`), the document likewise, and `score` is a
    number. Rows of queries and documents that are not in the task are passed over, with a logged count. Of a pair that
    comes twice the last score counts.

    Raises:
        InputError: a row that cannot be read, or no score of any pair of the task; names file, line and key.
    """
    file = epath.Path(path).expanduser()
    keys, scores = array("q"), array("f")
    waiting: list[tuple[Sequence[int], str, float]] = []
    strangers, columns = 0, None
    queries: dict[str, list[int]] = {}
    hashes: dict[str, int] = {}

    def settle() -> int:
        """Finds the documents of the rows that wait, many at once; returns how many rows are of no use."""
        names = [name for _, name, _ in waiting]
        rows = [hashes.get(name, -1) for name in names] if hashes else task.rows_of(names).tolist()
        missed = 0
        for (owners, _, score), row in zip(waiting, rows):
            missed += row < 0 or not owners
            for query in owners if row >= 0 else ():
                keys.append(query * len(task.documents) + row)
                scores.append(score)
        waiting.clear()
        return missed

    for line, row in numbered_rows(file, "cross-encoder scores"):
        try:
            if isinstance(row, InputError):
                raise row
            if columns is None:
                columns = _key(row, QUERY_IDS, QUERY_TEXTS), _key(row, DOCUMENT_IDS, DOCUMENT_TEXTS)
                for index, name in enumerate(task.queries if columns[0][1] else task.query_ids):
                    queries.setdefault(_short(name) if columns[0][1] else name, []).append(index)
                if columns[1][1]:
                    hashes = {_short(task.documents[index]): index for index in range(len(task.documents))}
            query, document = (_name(row, *column) for column in columns)
            waiting.append((queries.get(query, ()), document, number(value_at(row, "score"), "column 'score'")))
        except InputError as error:
            raise InputError(f"{file}:{line}: {error}") from None
        if len(waiting) == _AT_ONCE:
            strangers += settle()
    strangers += settle()
    if not keys:
        raise InputError(f"{file}: none of its {strangers:,} scores is of a query and a document that are mined here")
    if strangers:
        logger.info("%s: %s scores of other queries or documents", file, f"{strangers:,}")
    ordered = np.frombuffer(keys, np.int64)
    order = np.argsort(ordered, kind="stable")
    order = order[np.append(np.diff(ordered[order]) != 0, True)]
    return CrossScores(ordered[order], np.frombuffer(scores, np.float32)[order], len(task.documents))


def _key(row: Row, id_keys: Sequence[str], text_keys: Sequence[str]) -> tuple[str, bool]:
    for keys, by_text in ((id_keys, False), (text_keys, True)):
        for key in keys:
            if key in row:
                return key, by_text
    expected = ", ".join(map(repr, (*id_keys, *text_keys)))
    raise InputError(f"expected a column out of {expected}; columns of this row: {keys_of(row)}")


def _name(row: Row, key: str, by_text: bool) -> str:
    return _short(text_at(row, key)) if by_text else id_text(value_at(row, key), f"column {key!r}")


def _short(text: str) -> str:
    """A text's hash, which takes less memory."""
    return f"{text_hash(text):x}"
