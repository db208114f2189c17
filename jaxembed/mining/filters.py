"""Which of a query's nearest documents may be its negatives, how many each rule leaves, and which of them are taken."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from jaxembed.errors import InputError


@dataclass(frozen=True)
class Filters:
    """Rules on a candidate with score s, for a query whose positives score s⁺ at least.

    Attributes:
        first, last: ranks among the documents that the query does not leave out, the nearest has rank 1.
        share: s ≤ share · s⁺, and s ≤ s⁺ where s⁺ is negative ("TopK-PercPos", NV-Retriever, arXiv 2407.15831, 3.2).
        margin: s ≤ s⁺ − margin ("TopK-MarginPos" there).
        largest: s ≤ largest ("TopK-Abs" there).
        cross_margin: the same as `margin` on the scores of a cross-encoder; a candidate without one is left out.

    Raises:
        InputError: a number out of its range.
    """

    first: int = 1
    last: int = 100
    share: float | None = None
    margin: float | None = None
    largest: float | None = None
    cross_margin: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last:
            raise InputError(f"ranks: expected 1 ≤ first ≤ last, found {self.first}–{self.last}")
        if self.share is not None and not 0 < self.share <= 1:
            raise InputError(f"share of the positive's score: expected more than 0 and at most 1, found {self.share}")
        for name in ("margin", "largest", "cross_margin"):
            value = getattr(self, name)
            if value is not None and not np.isfinite(value):
                raise InputError(f"{name.replace('_', ' ')}: expected a finite number, found {value}")


@dataclass
class Funnel:
    """How many candidates, and how many queries that have any, are left after each rule, in the order of the rules."""

    candidates: dict[str, int] = field(default_factory=dict)
    queries: dict[str, int] = field(default_factory=dict)

    def add(self, rule: str, candidates: int, queries: int) -> None:
        """Adds what a rule left of some queries."""
        self.candidates[rule] = self.candidates.get(rule, 0) + candidates
        self.queries[rule] = self.queries.get(rule, 0) + queries

    def rows(self) -> list[tuple[str, str, str, str]]:
        """For a table: rule, candidates, their share of the row above, queries with any."""
        rows, before = [], None
        for rule, count in self.candidates.items():
            share = f"{count / before:.1%}" if before else "–"
            rows.append((rule, f"{count:,}", share, f"{self.queries[rule]:,}"))
            before = count
        return rows


def survivors(
    filters: Filters,
    there: Bool[np.ndarray, "queries ranks"],
    scores: Float32[np.ndarray, "queries ranks"],
    positive_scores: Float32[np.ndarray, " queries"],
    cross_scores: Float[np.ndarray, "queries ranks"] | None = None,
    positive_cross_scores: Float[np.ndarray, " queries"] | None = None,
) -> Iterator[tuple[str, Bool[np.ndarray, "queries ranks"]]]:
    """Each rule that is on, and the candidates that it and all before it leave.

    Args:
        there: whether there is a document at that rank; the first column is rank 1.
        positive_scores: the lowest score of each query's positives.
        cross_scores: NaN where a pair has none.
        positive_cross_scores: the lowest of each query's positives, NaN where one has none.
    """
    ranks = np.arange(1, there.shape[1] + 1)
    left = there & (ranks >= filters.first) & (ranks <= filters.last)
    yield f"ranks {filters.first:,} to {filters.last:,}", left
    # In float64, so that a limit is what the formula says.
    scores, positive = scores.astype(np.float64), positive_scores.astype(np.float64)[:, None]
    if filters.share is not None:
        left = left & (scores <= np.minimum(filters.share * positive, positive))
        yield f"score ≤ {filters.share:g} · positive's", left
    if filters.margin is not None:
        left = left & (scores <= positive - filters.margin)
        yield f"score ≤ positive's − {filters.margin:g}", left
    if filters.largest is not None:
        left = left & (scores <= filters.largest)
        yield f"score ≤ {filters.largest:g}", left
    if filters.cross_margin is not None:
        assert cross_scores is not None
        assert positive_cross_scores is not None
        left = left & ~np.isnan(cross_scores) & ~np.isnan(positive_cross_scores)[:, None]
        yield "has cross-encoder scores", left
        limit = positive_cross_scores.astype(np.float64)[:, None] - filters.cross_margin
        left = left & (cross_scores <= np.where(np.isnan(limit), -np.inf, limit))
        yield f"cross score ≤ positive's − {filters.cross_margin:g}", left


def choose(
    left: Bool[np.ndarray, "queries ranks"], count: int, random: np.random.Generator | None = None
) -> Int[np.ndarray, "queries count"]:
    """Columns of at most `count` candidates of each query, nearest first, −1 where there are no more.

    Args:
        random: draws them without replacement, each set of `count` as likely as any other; None takes the nearest.
            A call draws `queries` · `ranks` numbers, so that it does not matter how queries are divided among calls.
    """
    ranks = left.shape[1]
    priority = (
        np.broadcast_to(np.arange(ranks, dtype=np.float64), left.shape) if random is None else random.random(left.shape)
    )
    order = np.argsort(np.where(left, priority, np.inf), axis=1, kind="stable")[:, :count]
    taken = np.sort(np.where(np.take_along_axis(left, order, 1), order, ranks), axis=1)
    columns = np.full((len(left), count), -1, np.int64)
    columns[:, : taken.shape[1]] = np.where(taken < ranks, taken, -1)
    return columns
