"""From the files that people have to a `Task`: pairs in any format, a corpus of their own, or a BEIR folder."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from jaxembed.data.beir import read_beir
from jaxembed.data.formats import recognise
from jaxembed.data.id_texts import CORPUS_KEYS
from jaxembed.data.rows import numbered_rows
from jaxembed.data.sources import Examples, read_jsonl, read_rows, summary
from jaxembed.data.text_store import Picked, TextStore, find_corpus, store_of_file
from jaxembed.errors import InputError
from jaxembed.mining.task import Collection, Joined, Task, make_task

logger = logging.getLogger(__name__)

_NAME = "data"  # of the source, in messages


class StoreIds(Sequence[str]):
    """The ids of a store's texts."""

    def __init__(self, store: TextStore) -> None:
        self._store = store

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self._store.id_of(index) for index in range(*row.indices(len(self)))]
        return self._store.id_of(row)


def read_task(
    data: str | os.PathLike[str],
    corpus: str | os.PathLike[str] | None,
    work: str | os.PathLike[str],
    *,
    split: str = "train",
    anchor: str | None = None,
    positive: str | None = None,
) -> Task:
    """What the files say; texts of a corpus go to the disk, below `work`.

    Args:
        data: a file of pairs in any known format, or a BEIR folder.
        corpus: a file of texts with ids, or a folder with one, where negatives come from; None: see
            `task_of_examples`.
        split: the judgements of a BEIR folder.
        anchor, positive: columns of the pairs, where they are not to be recognised.

    Raises:
        InputError: with file, line and key.
    """
    path = epath.Path(data).expanduser()
    file = None if corpus is None else find_corpus(epath.Path(corpus).expanduser())
    if (anchor is None) != (positive is None):
        raise InputError("the columns of anchors and of positives have to be given together")
    if path.is_dir():
        examples = read_beir(path, name=_NAME, split=split, corpus=file, cache_dir=work)
    elif anchor is not None and positive is not None:
        examples = read_jsonl(path, name=_NAME, anchor=anchor, positive=positive)
    else:
        examples = read_rows(path, name=_NAME, corpus=file if _names_documents(path) else None, cache_dir=work)
    logger.info("%s", summary(examples))
    if examples.graded:
        raise InputError(f"{path}: graded pairs have no positives to mine negatives for")
    if file is None or isinstance(examples.positives, Picked):
        return task_of_examples(examples)
    return task_of_examples(examples, store_of_file(file, "corpus", keys=CORPUS_KEYS, directory=work))


def task_of_examples(examples: Examples, corpus: TextStore | None = None) -> Task:
    """Pairs as a task; a query is a distinct id where queries have ids, else a distinct text.

    Where no corpus is given negatives come from the store that the pairs' documents lie in, if they do, else from
    their positives and negatives. Positives that a corpus lacks are embedded, but are nobody's negatives.
    """
    queries, query_of = _queries(examples)
    if isinstance(examples.positives, Picked) and isinstance(store := examples.positives.store, TextStore):
        documents = Collection(_texts(store), StoreIds(store), store.rows_of)
        places = np.asarray(examples.positives.rows, np.int64)
        named = isinstance(examples.anchors, Picked)
        return make_task(queries, documents, query_of, places, blank=np.asarray(store.blank), named=named)
    texts: dict[str, int] = {}
    places = np.array([texts.setdefault(text, len(texts)) for text in examples.positives], np.int64)
    if corpus is None:
        for negatives in examples.negatives:
            for text in negatives:
                texts.setdefault(text, len(texts))
        documents = Collection(list(texts), [f"d{row}" for row in range(len(texts))])
        return make_task(queries, documents, query_of, places)
    # Those that the corpus has are found by their text when the task is made.
    both = (
        Joined(_texts(corpus), list(texts)),
        Joined(StoreIds(corpus), [f"positive {row}" for row in range(len(texts))]),
    )
    return make_task(
        queries,
        Collection(*both, corpus.rows_of),
        query_of,
        places + len(corpus),
        candidates=len(corpus),
        blank=np.asarray(corpus.blank),
    )


def _queries(examples: Examples) -> tuple[Collection, Int[np.ndarray, " pairs"]]:
    """The distinct queries in the order of the pairs, and the one of each pair."""
    anchors = examples.anchors
    if isinstance(anchors, Picked) and isinstance(store := anchors.store, TextStore):
        rows: dict[int, int] = {}
        query_of = np.array([rows.setdefault(row, len(rows)) for row in anchors.rows.tolist()], np.int64)
        return Collection(list(Picked(store, np.array(list(rows)))), [store.id_of(row) for row in rows]), query_of
    texts: dict[str, int] = {}
    query_of = np.array([texts.setdefault(text, len(texts)) for text in anchors], np.int64)
    first = np.unique(query_of, return_index=True)[1]
    return Collection(list(texts), [examples.ids[int(row)] for row in first]), query_of


def _names_documents(path: epath.Path) -> bool:
    """Whether the file's first row names its documents by id; what is wrong with it is said by who reads it."""
    for _, row in numbered_rows(path, _NAME):
        try:
            return not isinstance(row, InputError) and recognise(row).kind == "ids"
        except InputError:
            return False
    return False


def _texts(store: TextStore) -> Picked:
    return Picked(store, np.arange(len(store)))
