"""Plots of a run, by matplotlib without pyplot, so that no display is asked for and nothing stays behind.

Needs the extra `eval`.
"""

import importlib
import io
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from jaxembed.errors import InputError
from jaxembed.evaluation.scores import Run, averages, by_task, task_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from jaxembed.evaluation.comparison import Comparison

_LABELS = 10  # that get a colour
_OTHERS = "0.8"
_BINS = 50
_SMALLEST_MAP = 10  # texts that t-SNE makes sense for
_THREADS_FROM = 500  # texts


def png(figure: "Figure") -> bytes:
    """The figure as a PNG file; equal figures give equal bytes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # matplotlib's own font lacks many scripts; its boxes say so well enough.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def scores_by_type(runs: Mapping[str, Run]) -> "Figure":
    """A bar a type and run, the mean over its tasks, and a dot a task; how many tasks stands behind the type.

    Args:
        runs: by the name that the legend has; every run has a colour, also in `differences`.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure, axes = _figure(8, 4)
    types: dict[str, int] = {}
    for run in runs.values():
        for kind, found in by_task(run.scores).items():
            types[kind] = max(len(found), types.get(kind, 0))
    width = 0.8 / len(runs)
    bars = []
    for number, run in enumerate(runs.values()):
        tasks, means = by_task(run.scores), averages(run.scores).types
        places = {kind: place - 0.4 + width * (number + 0.5) for place, kind in enumerate(types)}
        heights = [100 * means[kind] for kind in means]
        bars.append(axes.bar([places[kind] for kind in means], heights, 0.9 * width, color=f"C{number}", alpha=0.6))
        for kind, found in tasks.items():
            values = [100 * task_value(scores) for scores in found.values()]
            spread = places[kind] + 0.25 * width * np.linspace(-1, 1, len(values)) * (len(values) > 1)
            axes.plot(spread, values, ".", color="0.2", markersize=4)
    axes.set_xticks(range(len(types)), [f"{kind} ({n})" for kind, n in types.items()], rotation=20, ha="right")
    axes.set_ylabel("main metric, % (dots: tasks)")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if len(runs) > 1:
        _legend(axes, bars, list(runs))
    else:
        _title(axes, next(iter(runs)))
    return figure


def embedding_map(
    embeddings: Float[np.ndarray, "texts dim"],
    labels: Sequence[str] | None = None,
    *,
    method: Literal["t-SNE", "PCA"] = "t-SNE",
    task: str | None = None,
) -> "Figure":
    """The texts as points in a plane, coloured by the most frequent labels.

    Args:
        method: of scikit-learn, on the unit vectors. t-SNE keeps neighbours together, distances across the map mean
            little; PCA is linear. Fewer texts than ten are always placed by PCA.
        task: for the title.

    Raises:
        InputError: fewer than three texts, numbers that are not finite, labels of another number of texts, or
            matplotlib or scikit-learn is not installed.
    """
    vectors = np.asarray(embeddings, np.float32)
    if vectors.ndim != 2 or len(vectors) < 3 or not np.isfinite(vectors).all():
        raise InputError(f"embedding map: expected finite vectors of at least 3 texts, found shape {vectors.shape}")
    if labels is not None and len(labels) != len(vectors):
        raise InputError(f"embedding map: {len(labels)} labels for {len(vectors)} texts")
    if len(vectors) < _SMALLEST_MAP:
        method = "PCA"
    points = _in_the_plane(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), method)
    figure, axes = _figure(7, 5)
    size = 36 if len(points) < 200 else 12
    counts = Counter(labels or ())
    named = [label for label, _ in counts.most_common(_LABELS)]
    of = np.array([named.index(label) if label in named else -1 for label in labels or [""] * len(points)])
    color = _OTHERS if named else "C0"
    rest = axes.scatter(*points[of < 0].T, s=size, color=color, linewidths=0)
    handles = [axes.scatter(*points[of == n].T, s=size, color=f"C{n}", linewidths=0) for n in range(len(named))]
    if named:
        some = [f"{len(counts) - len(named)} other labels"] if len(counts) > len(named) else []
        _legend(axes, [*handles, rest][: len(named) + len(some)], [*named, *some], beside=True)
    axes.set_xticks([])
    axes.set_yticks([])
    _title(axes, task, f"{len(points):,} texts, by {method}")
    return figure


def similarity_histogram(
    positives: Float[np.ndarray, " some"], negatives: Float[np.ndarray, " others"], task: str | None = None
) -> "Figure":
    """How the cosines of pairs that belong together lie beside those of others, and how well they are told apart.

    AUC is the chance that a positive pair has the larger cosine.

    Args:
        task: for the title.

    Raises:
        InputError: a side is empty or not finite, or matplotlib or scikit-learn is not installed.
    """
    sides = {"positives": np.asarray(positives, np.float64), "negatives": np.asarray(negatives, np.float64)}
    for name, cosines in sides.items():
        if not len(cosines) or not np.isfinite(cosines).all():
            raise InputError(f"similarity histogram: expected finite cosines of {name}, found {len(cosines)} numbers")
    figure, axes = _figure(7, 4)
    metrics = _sklearn("metrics")
    together = np.concatenate(list(sides.values()))
    truth = np.repeat([1, 0], [len(cosines) for cosines in sides.values()])
    auc = metrics.roc_auc_score(truth, together)
    bins = np.histogram_bin_edges(together, _BINS).tolist()
    for number, (name, cosines) in enumerate(sides.items()):
        label = f"{len(cosines):,} {name}, mean {cosines.mean():.2f}"
        axes.hist(cosines, bins, weights=np.full(len(cosines), 100 / len(cosines)), alpha=0.6, label=label)
        axes.axvline(cosines.mean(), color=f"C{number}", linestyle="--")
    axes.set_xlabel("cosine")
    axes.set_ylabel("% of pairs")
    _title(axes, task, f"AUC {auc:.3f}")
    axes.legend()
    return figure


def differences(comparison: "Comparison") -> "Figure":
    """What each later run has more than the first, a line a row of the comparison, with the intervals.

    Raises:
        InputError: matplotlib is not installed.
    """
    first, *others = comparison.names
    rows = comparison.rows
    figure, axes = _figure(7, 1.2 + 0.22 * len(rows) * len(others))
    handles: list[Any] = []
    for number in range(len(others)):
        found, heights = [row.differences[number] for row in rows], np.arange(len(rows)) - 0.35
        heights += 0.7 * (number + 0.5) / len(others)
        handles += axes.plot([100 * each.value for each in found], heights, "o", color=f"C{number + 1}", markersize=4)
        for each, height in zip(found, heights):
            if each.low is not None and each.high is not None:
                axes.plot([100 * each.low, 100 * each.high], [height, height], color=f"C{number + 1}")
    axes.axvline(0, color="0.4", linewidth=1)
    axes.set_yticks(range(len(rows)))
    for text in axes.set_yticklabels([row.name for row in rows]):
        text.set_parse_math(False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("difference in points, with paired bootstrap intervals")
    _legend(axes, handles, [f"{name} − {first}" for name in others])
    return figure


def _in_the_plane(vectors: Float[np.ndarray, "texts dim"], method: str) -> Float[np.ndarray, "texts 2"]:
    if method == "PCA" or vectors.shape[1] < 2:
        if vectors.shape[1] < 2:
            vectors = np.pad(vectors, ((0, 0), (0, 1)))
        with np.errstate(invalid="ignore"):  # where all texts are one point it divides by their variance
            return _sklearn("decomposition").PCA(2, svd_solver="full").fit_transform(vectors)
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    # Where all texts are one point, "pca" would divide by nothing.
    init = "pca" if vectors.std(axis=0).max() > 1e-6 else "random"
    tsne = _sklearn("manifold").TSNE(2, perplexity=perplexity, init=init, random_state=0)
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    # Where others use the cores too, threads that wait for each other take fifty times as long for so few.
    with threadpool_limits(1 if len(vectors) < _THREADS_FROM else None):
        return tsne.fit_transform(vectors)


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: pip install 'jaxembed[eval]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _sklearn(module: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError:
        raise InputError("plots need scikit-learn: pip install 'jaxembed[eval]'") from None


def _title(axes: "Axes", name: str | None, rest: str = "") -> None:
    """The name as it is, not as a formula."""
    short = name if name is None or len(name) <= 60 else f"{name[:59]}…"
    axes.set_title(": ".join(part for part in (short, rest) if part)).set_parse_math(False)


def _legend(axes: "Axes", handles: Sequence[Any], names: Sequence[str], *, beside: bool = False) -> None:
    """Above the axes or beside them. Names stay as they are: a "$" begins no formula, and a "_" hides nothing."""
    loc, place = ("upper left", (1, 1)) if beside else ("lower left", (0, 1))
    legend = axes.legend(handles, [str(number) for number in range(len(handles))], loc=loc, bbox_to_anchor=place)
    for text, name in zip(legend.get_texts(), names):
        text.set_parse_math(False)
        text.set_text(f"{name[:39]}…" if len(name) > 40 else name)
