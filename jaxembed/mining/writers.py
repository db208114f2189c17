"""Mined negatives as rows of the formats that trainers read, in a file that is whole or not there."""

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Float32, Int
from tqdm import tqdm

from jaxembed.data.files import new_file
from jaxembed.errors import InputError
from jaxembed.mining.task import Ragged, Task


@dataclass(frozen=True)
class Mined:
    """The negatives of every query of a task.

    Attributes:
        negatives: rows of `task.documents`, nearest first, −1 where a query has no more.
        scores: of the negatives.
        positive_scores: of `task.positives`.
    """

    task: Task
    negatives: Int[np.ndarray, "queries count"]
    scores: Float32[np.ndarray, "queries count"]
    positive_scores: Ragged


Row = dict[str, Any]
Format = Callable[[Mined, int, bool], Iterator[Row]]
"""(what was mined, the query, whether scores are written) → its rows."""


def _sentence_transformers(mined: Mined, query: int, scores: bool) -> Iterator[Row]:
    task = mined.task
    negatives = {f"negative_{index}": text for index, text in enumerate(_texts(task, _rows(mined, query)), start=1)}
    for row, score in zip(task.positives[query].tolist(), mined.positive_scores[query].tolist()):
        found: Row = {"anchor": task.queries[query], "positive": task.documents[row], **negatives}
        if scores:
            found["scores"] = [round(score, 6), *_rounded(mined, query)]
        yield found


def _flag_embedding(mined: Mined, query: int, scores: bool) -> Iterator[Row]:
    task = mined.task
    row: Row = {
        "query": task.queries[query],
        "pos": _texts(task, task.positives[query]),
        "neg": _texts(task, _rows(mined, query)),
    }
    if scores:
        row["pos_scores"] = [round(score, 6) for score in mined.positive_scores[query].tolist()]
        row["neg_scores"] = _rounded(mined, query)
    yield row


def _tevatron(mined: Mined, query: int, scores: bool) -> Iterator[Row]:
    task = mined.task

    def passages(rows: list[int], of: list[float]) -> list[Row]:
        found = [{"docid": task.document_ids[row], "title": "", "text": task.documents[row]} for row in rows]
        return [{**each, "score": score} for each, score in zip(found, of)] if scores else found

    yield {
        "query_id": task.query_ids[query],
        "query": task.queries[query],
        "positive_passages": passages(
            task.positives[query].tolist(), [round(score, 6) for score in mined.positive_scores[query].tolist()]
        ),
        "negative_passages": passages(_rows(mined, query).tolist(), _rounded(mined, query)),
    }


def _ms_swift(mined: Mined, query: int, scores: bool) -> Iterator[Row]:
    def messages(text: str) -> list[Row]:
        return [{"role": "user", "content": text}]

    task = mined.task
    negatives = [messages(text) for text in _texts(task, _rows(mined, query))]
    for positive in _texts(task, task.positives[query]):
        found: Row = {"messages": messages(task.queries[query]), "positive_messages": [messages(positive)]}
        yield {**found, "negative_messages": negatives} if negatives else found


def _gritlm(mined: Mined, query: int, scores: bool) -> Iterator[Row]:
    task = mined.task
    yield {
        "query": ["", task.queries[query]],
        "pos": [["", text] for text in _texts(task, task.positives[query])],
        "neg": [["", text] for text in _texts(task, _rows(mined, query))],
    }


def _ids(mined: Mined, query: int, scores: bool) -> Iterator[Row]:
    task = mined.task
    yield {
        "qid": task.query_ids[query],
        "pos": [task.document_ids[row] for row in task.positives[query].tolist()],
        "neg": [task.document_ids[row] for row in _rows(mined, query).tolist()],
    }


FORMATS: Mapping[str, Format] = {
    "sentence-transformers": _sentence_transformers,
    "flagembedding": _flag_embedding,
    "tevatron": _tevatron,
    "ms-swift": _ms_swift,
    "gritlm": _gritlm,
    "beir": _ids,
}
WITH_SCORES = ("sentence-transformers", "flagembedding", "tevatron")
"""Formats that have a place for scores."""


def check_output(path: Path, to: str, *, scores: bool = False, overwrite: bool = False) -> None:
    """What of `write_mined` can be refused before the long part.

    Raises:
        InputError: the file is there and `overwrite` is off, its folder is missing, or the format has no scores.
    """
    if "://" in str(path) or str(path).startswith("gs:/"):
        raise InputError(f"{path}: expected a local file; copy it afterwards")
    if scores and to not in WITH_SCORES:
        raise InputError(f"--scores: the format {to} has no place for scores; {', '.join(WITH_SCORES)} have")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected the name of a .jsonl or .jsonl.gz file")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"{path}: expected a name that ends in .jsonl or .jsonl.gz")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: is there already; choose another name, or allow it with --overwrite")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder")


def write_mined(
    path: Path,
    mined: Mined,
    to: str,
    *,
    scores: bool = False,
    only_full: bool = False,
    progress: bool = True,
) -> int:
    """Writes a JSONL file, compressed where its name ends in ".gz"; returns the number of rows.

    Equal results give equal bytes, compressed too. The file has its name when it is whole, and replaces what was there.

    Args:
        to: a key of `FORMATS`.
        scores: writes the model's scores, to six digits, where the format has a place for them.
        only_full: leaves out queries with fewer negatives than `mined` has columns.

    Raises:
        InputError: the file cannot be written.
    """
    rows = 0
    try:
        with new_file(path) as file, _packed(file, path.suffix == ".gz") as out:
            for query in tqdm(range(len(mined.task.queries)), unit="query", desc="write", disable=not progress):
                if only_full and (mined.negatives[query] < 0).any():
                    continue
                for row in FORMATS[to](mined, query, scores):
                    out.write(f"{json.dumps(row, ensure_ascii=False)}\n".encode())
                    rows += 1
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    return rows


def _packed(file: IO[bytes], compressed: bool) -> AbstractContextManager[Any]:
    # No name and no time in the header: equal rows, equal bytes.
    return gzip.GzipFile("", "wb", fileobj=file, mtime=0) if compressed else nullcontext(file)


def _rows(mined: Mined, query: int) -> Int[np.ndarray, " some"]:
    rows = mined.negatives[query]
    return rows[rows >= 0]


def _rounded(mined: Mined, query: int) -> list[float]:
    there = mined.negatives[query] >= 0
    return [round(score, 6) for score in mined.scores[query][there].tolist()]


def _texts(task: Task, rows: Int[np.ndarray, " some"]) -> list[str]:
    return [task.documents[int(row)] for row in rows]
