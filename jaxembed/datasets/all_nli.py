"""SNLI and MultiNLI as triples: a sentence, one that it entails, one that contradicts it, both ways round."""

import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import Int64

from jaxembed.datasets.builders import OrderedBuilder, Row, fetch
from jaxembed.datasets.originals import Original, numbered_lines, text_of
from jaxembed.errors import InputError

ALL_NLI = Original(("AllNLI.tsv.gz", "AllNLI.tsv"), "https://sbert.net/datasets/AllNLI.tsv.gz", "41 MB")

_COLUMNS = ("split", "sentence1", "sentence2", "label")
_LABELS = ("contradiction", "entailment", "neutral")


class AllNli(OrderedBuilder):
    """Triples from the training rows of SNLI and MultiNLI, by `training_nli_v2.py` of sentence-transformers."""

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({"anchor": text, "positive": text, "negative": text}),
            disable_shuffling=True,
            homepage="https://nlp.stanford.edu/projects/snli, https://cims.nyu.edu/~sbowman/multinli",
            license="SNLI: CC BY-SA 4.0; MultiNLI: mostly OANC, parts CC BY and CC BY-SA 3.0",
        )

    def _rows(self, dl_manager: Any) -> tuple[int, Iterator[Row]]:
        path = fetch(dl_manager, ALL_NLI)
        judgements = read_judgements(path)
        triples = draw_triples(judgements)
        if not len(triples):
            raise InputError(f"{path}: no sentence with both an entailment and a contradiction in its training rows")
        sentences = judgements.sentences
        rows = ({"anchor": sentences[a], "positive": sentences[p], "negative": sentences[n]} for a, p, n in triples)
        return len(triples), rows


@dataclass(frozen=True)
class Judgements:
    """Pairs of sentences by number, in the file's order.

    Attributes:
        sentences: numbered as they first come.
        first: `sentence1` of each row.
        second: `sentence2` of each row.
        labels: place in ("contradiction", "entailment", "neutral").
    """

    sentences: list[str]
    first: Int64[np.ndarray, " rows"]
    second: Int64[np.ndarray, " rows"]
    labels: Int64[np.ndarray, " rows"]


def read_judgements(path: epath.Path) -> Judgements:
    """The training rows of a tab-separated file with a line of column names, white space around sentences taken away.

    Raises:
        InputError: file and line of what is not so.
    """
    numbers: dict[str, int] = {}
    rows = array.array("q")
    lines = numbered_lines(path, ALL_NLI, "all_nli")
    header = text_of(next(lines, (1, b""))[1], path, 1).split("\t")
    absent = [column for column in _COLUMNS if column not in header]
    if absent:
        raise InputError(f"{path}:1: expected the columns {', '.join(_COLUMNS)}, found no {', '.join(absent)}")
    split, first, second, label = (header.index(column) for column in _COLUMNS)
    for number, line in lines:
        values = text_of(line, path, number).split("\t")
        if len(values) != len(header):
            raise InputError(f"{path}:{number}: expected {len(header)} columns, found {len(values)}")
        if values[split] != "train":
            continue
        if values[label] not in _LABELS:
            raise InputError(f"{path}:{number}: label: expected one of {', '.join(_LABELS)}, found {values[label]!r}")
        one, other = (numbers.setdefault(values[place].strip(), len(numbers)) for place in (first, second))
        rows.extend((one, other, _LABELS.index(values[label])))
    columns = np.asarray(rows, np.int64).reshape(-1, 3).T
    return Judgements(list(numbers), *columns)


def draw_triples(judgements: Judgements, seed: int = 0) -> Int64[np.ndarray, "triples 3"]:
    """Numbers of (anchor, positive, negative): two triples for each sentence that entails one and contradicts one.

    With E and C the distinct sentences that go with x in either order as entailment and as contradiction, the two are
    (x, e, c) and (e′, x, c′), e and e′ drawn from E, c and c′ from C. `training_nli_v2.py` of sentence-transformers.
    """
    random = np.random.default_rng(seed)
    partners = []
    for label in (_LABELS.index("entailment"), _LABELS.index("contradiction")):
        having = judgements.labels == label
        one, other = judgements.first[having], judgements.second[having]
        pairs = np.stack([np.concatenate([one, other]), np.concatenate([other, one])], axis=1)
        pairs = np.unique(pairs, axis=0) if len(pairs) else pairs
        anchors, starts, counts = np.unique(pairs[:, 0], return_index=True, return_counts=True)
        partners.append((anchors, starts, counts, pairs[:, 1]))
    (entailing, *_), (contradicting, *_) = partners
    anchors = np.intersect1d(entailing, contradicting)

    def drawn(found: Any) -> np.ndarray:
        having, starts, counts, others = found
        place = np.searchsorted(having, anchors)
        return others[starts[place] + random.integers(0, counts[place])]

    straight = np.stack([anchors, drawn(partners[0]), drawn(partners[1])], axis=1)
    turned = np.stack([drawn(partners[0]), anchors, drawn(partners[1])], axis=1)
    return np.stack([straight, turned], axis=1).reshape(-1, 3)
