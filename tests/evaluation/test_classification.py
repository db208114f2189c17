"""The classification protocol against mteb's own drawing and scikit-learn's scores."""

import sys

import numpy as np
import pytest
from datasets import Dataset
from mteb.abstasks import AbsTaskClassification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score

from jaxembed.errors import InputError
from jaxembed.evaluation.classification import classification_metrics, undersamples

LABELS = np.random.default_rng(0).choice(list("aaabbc"), 100).tolist() + ["d"] * 3


def test_samples_are_those_of_mteb() -> None:
    task = AbsTaskClassification.__new__(AbsTaskClassification)
    task.seed = 42
    order, expected = None, []
    for number in range(task.n_experiments):
        _, order, sample = task._undersample_data(Dataset.from_dict({"label": LABELS}), number, order)
        expected.append(sample)
    assert [sample.tolist() for sample in undersamples(LABELS)] == expected
    assert all(len(sample) == 3 * 8 + 3 for sample in expected)


def test_metrics_are_means_over_experiments() -> None:
    random = np.random.default_rng(1)
    train = random.normal(size=(len(LABELS), 6)).astype(np.float32)
    test, test_labels = random.normal(size=(50, 6)).astype(np.float32), random.choice(list("abcd"), 50).tolist()
    samples = undersamples(LABELS)
    found = classification_metrics(train, samples, LABELS, test, test_labels)
    each = []
    for sample in samples:
        learned = LogisticRegression(max_iter=1000).fit(train[sample], [LABELS[row] for row in sample])
        each.append(accuracy_score(test_labels, learned.predict(test)))
    assert found["accuracy"] == pytest.approx(np.mean(each), abs=0.02)
    assert 0 < found["f1"] < 1


def test_what_is_no_number_is_refused() -> None:
    train = np.ones((len(LABELS), 2), np.float32)
    test = np.array([[1, np.nan]], np.float32)
    with pytest.raises(InputError, match="found NaN or infinity among those tested on"):
        classification_metrics(train, undersamples(LABELS), LABELS, test, ["a"])


def test_scikit_learn_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(InputError, match=r"classification needs sklearn\.linear_model: pip install 'jaxembed\[eval\]'"):
        classification_metrics(np.ones((1, 1), np.float32), [], ["a"], np.ones((1, 1), np.float32), ["a"])
