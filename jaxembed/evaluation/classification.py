"""Classification by a logistic regression on few embeddings a label, as MTEB has it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxembed.errors import InputError

SAMPLES = 8
"""Texts a label to learn from, in each experiment."""

_EXPERIMENTS = 10
_SEED = 42
_ITERATIONS = 100


def require_scikit_learn() -> None:
    """Raises `InputError` where scikit-learn is not installed."""
    try:
        import sklearn.linear_model  # noqa: F401 (is it there?)
    except ModuleNotFoundError as error:
        raise InputError(f"classification needs {error.name}: pip install 'jaxembed[eval]'") from error


def undersamples(labels: Sequence[str]) -> list[Int[np.ndarray, " sample"]]:
    """For each of ten experiments the places of at most eight texts a label, in the order in which they are drawn.

    As `AbsTaskClassification` of mteb 2 draws them: every experiment shuffles the last one's order again, by a
    generator that starts anew from the same seed, and takes the first ones of each label.
    """
    order = list(range(len(labels)))
    found = []
    for _ in range(_EXPERIMENTS):
        np.random.RandomState(_SEED).shuffle(order)
        taken: Counter[str] = Counter()
        sample = []
        for place in order:
            if taken[labels[place]] < SAMPLES:
                taken[labels[place]] += 1
                sample.append(place)
        found.append(np.array(sample))
    return found


def classification_metrics(
    train: Float[np.ndarray, "learned dim"],
    samples: Sequence[Int[np.ndarray, " sample"]],
    train_labels: Sequence[str],
    test: Float[np.ndarray, "tested dim"],
    test_labels: Sequence[str],
) -> dict[str, float]:
    """accuracy and f1 (the mean over labels), each a mean over the experiments.

    The classifier is scikit-learn's logistic regression, with 100 iterations of L-BFGS at most.

    Args:
      train: embeddings of the texts to learn from.
      samples: rows of `train` that each experiment learns from.
      train_labels: of the rows of `train`.
      test: embeddings of the texts to be tested on.
      test_labels: theirs.

    Raises:
      InputError: an embedding is not finite, or scikit-learn is not installed.
    """
    require_scikit_learn()
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score
    from threadpoolctl import threadpool_limits

    for embeddings, what in ((train, "learned from"), (test, "tested on")):
        if not np.isfinite(embeddings).all():
            raise InputError(f"expected finite embeddings, found NaN or infinity among those {what}")
    codes = np.unique([*train_labels, *test_labels], return_inverse=True)[1]
    learned, tested = codes[: len(train_labels)], codes[len(train_labels) :]
    found = []
    # Matrices are small: more threads would wait for each other, beside JAX's own ten times as long as one works.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # the protocol ends it early
        for sample in samples:
            classifier = LogisticRegression(max_iter=_ITERATIONS, random_state=_SEED)
            predicted = classifier.fit(train[sample], learned[sample]).predict(test)
            found.append((accuracy_score(tested, predicted), f1_score(tested, predicted, average="macro")))
    accuracy, f1 = np.mean(found, axis=0)
    return {"accuracy": float(accuracy), "f1": float(f1)}
