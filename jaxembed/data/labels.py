"""Pairs of texts that have labels: of a class, or of natural language inference."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from jaxembed.data.formats import Group, Inference, Labelled
from jaxembed.errors import InputError

EMPTY_TEXT = "empty text"
DUPLICATE = "duplicate"
ONLY_ONE = "only text of its label"
NO_LABEL = "no label"
NO_TRIPLE = "sentence without both an entailment and a contradiction"


def label_groups(
    labelled: Sequence[tuple[str, Labelled]], dropped: Counter[str], *, seed: int, negatives: int
) -> Iterator[tuple[str, Group]]:
    """Each text with another of its label as positive, and texts of other labels as negatives.

    The texts of a label are put into a random circle, and the positive of each is the next one, so that every text is
    anchor once and positive once. Negatives are drawn from all texts of the other labels, none twice for an anchor.

    Args:
        labelled: (where from, text and label). A text that repeats an earlier one is dropped, whatever its label.
        dropped: counts what is left out.
        seed: of the circles and the negatives.
        negatives: drawn for each text, fewer where there are no more.

    Raises:
        InputError: all texts have one label.
    """
    rows: dict[str, list[tuple[str, str]]] = {}
    seen: set[str] = set()
    for where, item in labelled:
        if not item.text.strip():
            dropped[EMPTY_TEXT] += 1
        elif item.text in seen:
            dropped[DUPLICATE] += 1
        else:
            seen.add(item.text)
            rows.setdefault(item.label, []).append((where, item.text))
    if len(rows) == 1:
        raise InputError(f"all texts have the label {next(iter(rows))!r}: no negatives can be drawn")
    if lonely := sum(len(members) == 1 for members in rows.values()):
        dropped[ONLY_ONE] += lonely
    generator = np.random.Generator(np.random.PCG64(seed))
    ordered = [member for members in rows.values() for member in members]
    start = 0
    for members in rows.values():
        size, others = len(members), len(ordered) - len(members)
        if size > 1:
            circle = generator.permutation(size)
            following = np.empty(size, np.int64)
            following[circle] = np.roll(circle, -1)
            drawn = _draw_distinct(generator, others, size, min(negatives, others))
            drawn += np.where(drawn >= start, size, 0)  # over the label's own texts
            for (where, text), positive, chosen in zip(members, following.tolist(), drawn.tolist()):
                yield where, Group(text, [members[positive][1]], [ordered[row][1] for row in chosen])
        start += size


def _draw_distinct(generator: np.random.Generator, below: int, rows: int, count: int) -> Int[np.ndarray, "rows count"]:
    """For each row `count` distinct numbers below `below`, by R. W. Floyd's sampling (CACM 30(9), 1987)."""
    drawn = np.empty((rows, count), np.int64)
    for place in range(count):
        top = below - count + place
        fresh = generator.integers(0, top + 1, rows)
        taken = (drawn[:, :place] == fresh[:, None]).any(1)
        drawn[:, place] = np.where(taken, top, fresh)
    return drawn


def inference_groups(
    rows: Iterable[tuple[str, Inference]], dropped: Counter[str], *, seed: int
) -> Iterator[tuple[str, Group]]:
    """NLI rows as triples both ways round, as SGPT and sentence-transformers' AllNLI example make them.

    Every row counts in both directions (premise, hypothesis) and (hypothesis, premise). A sentence that has both an
    entailment and a contradiction then gives two triples, (sentence, entailment, contradiction) and
    (entailment, sentence, contradiction), each drawn at random from those it has.

    Args:
        rows: (where from, premise, hypothesis and label); texts are stripped.
        dropped: counts the rows without a label, and the sentences that lack one of the two.
        seed: of the draws.
    """
    sentences: dict[str, tuple[str, dict[str, None], dict[str, None]]] = {}
    for where, row in rows:
        if row.label is None:
            dropped[NO_LABEL] += 1
            continue
        premise, hypothesis = row.premise.strip(), row.hypothesis.strip()
        for one, other in ((premise, hypothesis), (hypothesis, premise)):
            _, entailed, contradicted = sentences.setdefault(one, (where, {}, {}))
            if row.label != "neutral":
                (entailed if row.label == "entailment" else contradicted)[other] = None
    generator = np.random.Generator(np.random.PCG64(seed))
    for sentence, (where, entailed, contradicted) in sentences.items():
        # What annotators call both, or the sentence itself, is no contradiction.
        alike = [other for other in entailed if other != sentence]
        unlike = [other for other in contradicted if other not in entailed and other != sentence]
        if not alike or not unlike:
            dropped[NO_TRIPLE] += 1
            continue
        first, second, third, fourth = generator.integers(0, [len(alike), len(unlike)] * 2).tolist()
        yield where, Group(sentence, [alike[first]], [unlike[second]])
        yield where, Group(alike[third], [sentence], [unlike[fourth]])
