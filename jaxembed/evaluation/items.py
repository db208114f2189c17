"""What a paired bootstrap needs of each item of a task: the forms, and the score that items give when drawn anew.

| form | of | its score |
|---|---|---|
| value | queries, texts, sets of texts | their mean |
| cosine, grade | pairs of STS | Spearman's correlation |
| label, and ranks by one measure or more | pairs with label 0 or 1 | the best average precision |
| gold, predicted | numbers of translations | F1 of each translation, weighted by how often it is wanted |
| set, document, label, cluster, times | documents that a clustering had, so many times | the sets' mean V-measure |
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import scipy.special
from jaxtyping import Float, Int

MEASURES = ("similarity", "cosine", "manhattan", "euclidean", "dot")
"""Of how alike a pair is: mteb's, distances turned round."""

_TRANSLATIONS = ("gold", "predicted")
_CLUSTERS = ("set", "document", "label", "cluster", "times")
_NOTHING = 1e-12


@dataclass(frozen=True)
class Resampler:
    """A score of weighted items.

    Attributes:
        units: the number of what is drawn: pairs, sentences, documents.
        sets: the number of clusterings that the score is a mean of, drawn as well; 1: it is no mean.
        given: what is the task's and not the model's.
        scores: of each set, from how often each unit was drawn.
    """

    units: int
    sets: int
    given: np.ndarray
    scores: Callable[[Float[np.ndarray, "units resamples"]], Float[np.ndarray, "sets resamples"]]

    def whole(self) -> float:
        return float(self.scores(np.ones((self.units, 1))).mean())


def problem(items: Mapping[str, Sequence[float]]) -> str | None:
    """What is wrong with the form of items; None: nothing."""
    names, lengths = set(items), {len(values) for values in items.values()}
    ranked = "label" in names and len(names) > 1 and names <= {"label", *MEASURES}
    forms = ({"value"}, {"cosine", "grade"}, set(_TRANSLATIONS), set(_CLUSTERS))
    if not (ranked or names in forms) or len(lengths) != 1 or 0 in lengths:
        found = ", ".join(f"{len(values)} {name!r}" for name, values in items.items()) or "none"
        several = "'cosine' as 'grade', 'label' as ranks, 'gold' as 'predicted', or " + ", ".join(map(repr, _CLUSTERS))
        return f"expected items 'value', or as many {several}, found {found}"
    for name in names & {"label", *_TRANSLATIONS, *_CLUSTERS}:
        values = np.asarray(items[name], np.float64)
        if not (np.isfinite(values).all() and np.array_equal(values, np.round(values)) and values.min() >= 0):
            return f"expected whole numbers as {name!r} of the items"
    if ranked and max(items["label"]) > 1:
        return f"expected 0 or 1 as 'label' of the items, found {max(items['label'])}"
    return None


def whole(items: Mapping[str, Sequence[float]]) -> float | None:
    """The score of all items; None: a correlation, which is left to others."""
    if "value" in items:
        return float(np.mean(items["value"]))
    found = resampler(items)
    return None if found is None else found.whole()


def resampler(items: Mapping[str, Sequence[float]]) -> Resampler | None:
    """None: of means and correlations, which need none."""
    columns = {name: np.asarray(values, np.float64) for name, values in items.items()}
    if "cluster" in columns:
        return _v_measure(np.array([columns[name] for name in _CLUSTERS], np.int64))
    if "gold" in columns:
        return _f1(*(columns[name].astype(np.int64) for name in _TRANSLATIONS))
    if "label" in columns:
        label = columns.pop("label")
        orders = {values.tobytes(): values for values in columns.values()}  # often the same by several measures
        found = [_average_precision(values, label == 1) for values in orders.values()]
        return Resampler(len(label), 1, label, lambda counts: np.max([one(counts) for one in found], axis=0)[None])
    return None


def _average_precision(
    ranks: Float[np.ndarray, " pairs"], right: np.ndarray
) -> Callable[[Float[np.ndarray, "pairs resamples"]], Float[np.ndarray, " resamples"]]:
    """As scikit-learn's: of equal ranks none is before another."""
    order = np.argsort(-ranks, kind="stable")
    ordered = ranks[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    places = np.flatnonzero(right[order])
    ends = last[np.searchsorted(last, places)]
    last_right = np.searchsorted(places, ends, side="right") - 1

    def scores(counts: Float[np.ndarray, "pairs resamples"]) -> Float[np.ndarray, " resamples"]:
        if not len(places):
            return np.zeros(counts.shape[1])
        found = counts[order[places]]
        up_to = found.cumsum(axis=0)
        precision = up_to[last_right] / np.maximum(counts[order].cumsum(axis=0)[ends], 1)
        return (found * precision).sum(axis=0) / np.maximum(up_to[-1], 1)

    return scores


def _f1(gold: Int[np.ndarray, " sentences"], predicted: Int[np.ndarray, " sentences"]) -> Resampler:
    number = int(max(gold.max(), predicted.max())) + 1
    wanted, answered = (_sums(each, number) for each in (gold, predicted))
    right = (gold == predicted)[:, None]

    def scores(counts: Float[np.ndarray, "sentences resamples"]) -> Float[np.ndarray, "1 resamples"]:
        support = wanted @ counts
        f1 = 2 * (wanted @ (counts * right)) / np.maximum(support + answered @ counts, 1)
        return (support * f1).sum(axis=0, keepdims=True) / support.sum(axis=0)

    return Resampler(len(gold), 1, gold, scores)


def _v_measure(rows: Int[np.ndarray, "5 rows"]) -> Resampler:
    """Entropies of labels, clusters and both are sums over the cells of each set's table of labels and clusters."""
    sets, documents, labels, _, times = rows
    names, number = np.unique(sets, return_inverse=True)
    units, of_unit = np.unique(documents, return_inverse=True)
    cells, of_cell = np.unique(np.array([number, labels, rows[3]]), axis=1, return_inverse=True)
    table = _sums(of_cell.reshape(-1), cells.shape[1], of_unit, len(units), times)
    whole = _sums(cells[0], len(names))
    label_of, cluster_of = (np.unique(cells[[0, which]], axis=1, return_inverse=True) for which in (1, 2))
    drawn, of_drawn = np.unique(np.array([sets, documents, labels]), axis=1, return_inverse=True)
    given = np.vstack([drawn, np.bincount(of_drawn.reshape(-1), times).astype(np.int64)])
    groups = [
        (_sums(inverse.reshape(-1), kinds.shape[1]), _sums(kinds[0], len(names)))
        for kinds, inverse in (label_of, cluster_of)
    ]

    def scores(counts: Float[np.ndarray, "documents resamples"]) -> Float[np.ndarray, "sets resamples"]:
        found = table @ counts
        total = np.maximum(whole @ found, 1)

        def entropy(parts: np.ndarray, by_set: scipy.sparse.csr_array) -> np.ndarray:
            return np.log(total) - by_set @ scipy.special.xlogy(parts, parts) / total

        of_labels, of_clusters = (entropy(kinds @ found, by_set) for kinds, by_set in groups)
        mutual = of_labels + of_clusters - entropy(found, whole)
        homogeneity, completeness = (
            np.where(each > _NOTHING, mutual / np.maximum(each, _NOTHING), 1.0) for each in (of_labels, of_clusters)
        )
        return 2 * homogeneity * completeness / np.maximum(homogeneity + completeness, _NOTHING)

    return Resampler(len(units), len(names), given, scores)


def _sums(
    of: Int[np.ndarray, " items"],
    groups: int,
    columns: Int[np.ndarray, " items"] | None = None,
    width: int | None = None,
    weights: np.ndarray | None = None,
) -> scipy.sparse.csr_array:
    """The matrix that adds up the items of each group, each item a column or in a column of `columns`."""
    columns = np.arange(len(of)) if columns is None else columns
    weights = np.ones(len(of)) if weights is None else weights.astype(np.float64)
    return scipy.sparse.csr_array((weights, (of, columns)), shape=(groups, width or len(of)))
