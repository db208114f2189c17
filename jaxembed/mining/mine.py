"""Hard negatives from the task to the file, in the order in which it happens."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from jaxembed.errors import InputError
from jaxembed.mining.cross_scores import CrossScores
from jaxembed.mining.filters import Filters, Funnel, choose, survivors
from jaxembed.mining.search import Blocks, Vectors, nearest, pair_scores
from jaxembed.mining.spool import embed_on_disk
from jaxembed.mining.task import Ragged, Task
from jaxembed.mining.writers import Mined
from jaxembed.text.format import RoleName

logger = logging.getLogger(__name__)

QUERIES = 32_768
"""Whose embeddings and lists are in memory at once; the corpus is read once for so many."""


@runtime_checkable
class Model(Protocol):
    """What mining asks of an embedder; `jaxembed.Embedder` is one."""

    @property
    def dim(self) -> int: ...

    @property
    def model_hash(self) -> str: ...

    @property
    def dtype(self) -> Any: ...

    @property
    def tokenizer(self) -> Any: ...

    def encode(self, sentences: list[str], **options: Any) -> Float[np.ndarray, "texts dim"]: ...


@dataclass(frozen=True)
class Side:
    """How the texts of one side are embedded: their role, and a prompt in place of the role's own."""

    role: RoleName
    prompt: str | None = None


@dataclass(frozen=True)
class Options:
    """How to mine.

    Attributes:
        count: negatives of a query.
        filters: which documents may be negatives.
        seed: draws them at random from those; None takes the nearest.
        queries, documents: how each side is embedded.
        recall: None is exact; else see `search.nearest`.
        blocks: see there.
    """

    count: int = 5
    filters: Filters = field(default_factory=Filters)
    seed: int | None = None
    queries: Side = Side("query")
    documents: Side = Side("document")
    recall: float | None = None
    blocks: Blocks = field(default_factory=Blocks)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"number of negatives: expected at least 1, found {self.count}")
        if self.recall is not None and not 0 < self.recall < 1:
            raise InputError(f"recall of an approximate search: expected a number between 0 and 1, found {self.recall}")


@dataclass
class Report:
    """What became of the candidates."""

    funnel: Funnel = field(default_factory=Funnel)
    queries: int = 0
    asked: int = 0
    """Negatives of a query."""
    fewer: int = 0
    """Queries that got fewer than asked, those without any among them."""
    none: int = 0

    def __str__(self) -> str:
        rows = [("left after", "candidates", "of the row above", "queries with any"), *self.funnel.rows()]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
            for row in rows
        ]
        lines.append(
            f"{self.fewer:,} of {self.queries:,} queries got fewer than the {self.asked} negatives asked for, "
            f"{self.none:,} of them none"
        )
        return "\n".join(lines)


def mine(
    task: Task,
    model: Model,
    work: Path,
    options: Options = Options(),
    *,
    cross_scores: CrossScores | None = None,
    progress: bool = True,
) -> tuple[Mined, Report]:
    """The negatives of every query, and how many candidates each rule left.

    Embeddings are kept below `work`; a run that was killed, or one with other rules, goes on with those that are there.

    Raises:
        InputError: the work directory cannot be written, an embedding is not finite, or scores of a cross-encoder and
            the margin on them are not given together.
    """
    if (cross_scores is None) != (options.filters.cross_margin is None):
        raise InputError("scores of a cross-encoder and a margin on them (cross_margin) have to be given together")
    queries, documents = embed_task(task, model, work, options, progress=progress)
    return mine_embeddings(task, queries, documents, options, cross_scores=cross_scores, progress=progress)


def embed_task(
    task: Task, model: Model, work: Path, options: Options, *, progress: bool = True
) -> tuple[Vectors, Vectors]:
    """Embeddings of queries and documents, of unit length, on the disk."""

    def embedded(name: str, texts: Sequence[str], fingerprint: str, side: Side) -> Vectors:
        def embed(some: list[str]) -> Float[np.ndarray, "some dim"]:
            return model.encode(
                some, prompt_name=side.role, prompt=side.prompt, normalize_embeddings=True, show_progress_bar=False
            )

        key = {
            "model": model.model_hash,
            "dtype": str(np.dtype(model.dtype)),
            "tokenizer and text format": model.tokenizer.fingerprint,
            "role": side.role,
            "prompt": side.prompt,
            "text hashes": fingerprint,
        }
        return embed_on_disk(texts, embed, work, name=name, dim=model.dim, key=key, progress=progress)

    queries = embedded("queries", task.queries, task.queries_fingerprint, options.queries)
    return queries, embedded("documents", task.documents, task.documents_fingerprint, options.documents)


def mine_embeddings(
    task: Task,
    queries: Vectors,
    documents: Vectors,
    options: Options,
    *,
    cross_scores: CrossScores | None = None,
    progress: bool = True,
) -> tuple[Mined, Report]:
    """`mine`, when the embeddings are there; `QUERIES` queries are in memory at a time."""
    filters, count = options.filters, len(task.queries)
    negatives = np.full((count, options.count), -1, np.int64)
    scores = np.full((count, options.count), -np.inf, np.float32)
    positive_scores = np.empty(len(task.positives.values), np.float32)
    random = None if options.seed is None else np.random.default_rng(options.seed)
    report = Report(queries=count, asked=options.count)
    total = task.candidates * -(-count // QUERIES)
    with tqdm(total=total, unit="document", desc="search", disable=not progress) as bar:
        for start in range(0, count, QUERIES):
            stop = min(start + QUERIES, count)
            vectors = np.ascontiguousarray(queries[start:stop])
            excluded = [task.left_out[query] for query in range(start, stop)]
            excluded = [rows[rows < task.candidates] for rows in excluded]
            rows, found = nearest(
                vectors,
                documents,
                filters.last,
                candidates=task.candidates,
                excluded=excluded,
                blocks=options.blocks,
                recall=options.recall,
                progress=bar.update,
            )
            own = slice(task.positives.offsets[start], task.positives.offsets[stop])
            owner, positives = task.positives.row_of[own], task.positives.values[own]
            positive_scores[own] = pair_scores(vectors, documents, owner - start, positives, options.blocks.documents)
            lowest = np.full(stop - start, np.inf, np.float32)
            np.minimum.at(lowest, owner - start, positive_scores[own])
            cross, cross_lowest = None, None
            if cross_scores is not None:
                cross = cross_scores.of(np.arange(start, stop)[:, None], rows)
                cross_lowest = np.full(stop - start, np.inf)
                with np.errstate(invalid="ignore"):
                    np.minimum.at(cross_lowest, owner - start, cross_scores.of(owner, positives))  # NaN stays
            _count_documents(report.funnel, task, [len(some) for some in excluded])
            left = rows >= 0
            for rule, left in survivors(filters, rows >= 0, found, lowest, cross, cross_lowest):
                report.funnel.add(rule, int(left.sum()), int(left.any(axis=1).sum()))
            columns = choose(left, options.count, random)
            taken = columns >= 0
            negatives[start:stop] = np.where(taken, np.take_along_axis(rows, columns, 1), -1)
            scores[start:stop] = np.where(taken, np.take_along_axis(found, columns, 1), -np.inf)
            way = "nearest" if random is None else "drawn"
            report.funnel.add(f"at most {options.count} {way}", int(taken.sum()), int(taken.any(axis=1).sum()))
            report.fewer += int((taken.sum(axis=1) < options.count).sum())
            report.none += int((~taken.any(axis=1)).sum())
    return Mined(task, negatives, scores, Ragged(positive_scores, task.positives.offsets)), report


def _count_documents(funnel: Funnel, task: Task, excluded: Sequence[int]) -> None:
    """What is left before anything is ranked."""
    queries = len(excluded)
    funnel.add("all documents", queries * (task.candidates + task.repeated), queries)
    funnel.add("repeated texts", queries * task.candidates, queries)
    own = np.asarray(excluded)
    funnel.add("positives and own text", int((task.candidates - own).sum()), int((own < task.candidates).sum()))
