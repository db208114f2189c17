"""The epoch plan: which examples make up which batch, a function of the seed and the data alone.

Batches are rows of an array of example numbers; the mesh, the hosts and the packing come later and change nothing here,
so that resuming needs no more than the number of the step. Example numbers run through the data sets one after the
other.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt64

from jaxembed.errors import InputError

_ROUNDS = 64
_PATIENCE = 8


@dataclass(frozen=True, eq=False)
class Rotation:
    """All positives and negatives of the examples of a data set, of which each pass through it takes the next ones.

    As sentence-transformers' and SGPT's `train_bi-encoder_mnrl.py`, which take the first of a query's list and append
    it at the end.

    Attributes:
        positives: row numbers into the texts of the whole run; those an example has come first, then −1.
        negatives: the same.
        taken: negatives of an example in one pass.
    """

    positives: Int[np.ndarray, "examples positives"]
    negatives: Int[np.ndarray, "examples negatives"]
    taken: int

    def picks(
        self, examples: Int[np.ndarray, " visits"], passes: Int[np.ndarray, " visits"]
    ) -> tuple[Int64[np.ndarray, " visits"], Int64[np.ndarray, "visits taken"]]:
        """Which of its positives, and which of its negatives (−1 for none), each example has in a pass, from 0.

        Pass p of an example with n negatives, of which k are taken: (p · k + j) mod n for j < k; all where n ≤ k.
        """
        positives = passes % (self.positives[examples] >= 0).sum(1)
        counts = (self.negatives[examples] >= 0).sum(1)[:, None]
        column = np.arange(self.taken)
        turns = (passes[:, None] * self.taken + column) % np.maximum(counts, 1)
        return positives, np.where(counts > self.taken, turns, np.where(column < counts, column, -1))

    def texts(
        self, examples: Int[np.ndarray, " visits"], passes: Int[np.ndarray, " visits"]
    ) -> Int[np.ndarray, "visits documents"]:
        """Row numbers of the positive and the negatives of `picks`."""
        positives, negatives = self.picks(examples, passes)
        found = np.full((len(examples), 1 + self.taken), -1, np.int64)
        found[:, 0] = self.positives[examples, positives]
        if self.negatives.shape[1]:
            found[:, 1:] = np.where(negatives >= 0, self.negatives[examples[:, None], negatives], -1)
        return found


@dataclass(frozen=True, eq=False)
class DataSet:
    """The examples of one source, as the plan sees them.

    Attributes:
        name: for messages and metrics.
        texts: row numbers into the texts of the whole run: anchor, positive, negatives; -1 where there is none.
        weight: share in the mix relative to the others; None = its number of examples.
        rotation: where each pass has other positives and negatives; `texts` are those of the first.
    """

    name: str
    texts: Int[np.ndarray, "examples columns"]
    weight: float | None = None
    rotation: Rotation | None = None


@dataclass(frozen=True)
class Mixing:
    """How the data sets of a run share its batches.

    Attributes:
        homogeneous: each batch comes from one data set; else from all of them.
        cap: examples by which a data set without a weight counts at most, and that an epoch takes of it; None = all.
    """

    homogeneous: bool = False
    cap: int | None = None


MIXED = Mixing()


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The batches of one epoch.

    Attributes:
        order: example numbers.
        passes: how often the data set of each was passed through before, for `Rotation`.
        hash: SHA-256 over the order and all that it was computed from.
        clashes: examples that still share a text with another one of their batch, less one of each group that does.
        swapped: examples that changed places with one of another batch because they did.
    """

    order: Int64[np.ndarray, "batches batch"]
    passes: Int64[np.ndarray, "batches batch"]
    hash: str
    clashes: int
    swapped: int


def epoch_plan(
    datasets: Sequence[DataSet],
    text_hashes: UInt64[np.ndarray, " texts"],
    batch_size: int,
    seed: int,
    epoch: int,
    mixing: Mixing = MIXED,
) -> EpochPlan:
    """The plan of one epoch.

    An epoch is as many examples as the data sets have together, at most `mixing.cap` of each counted. Without weights
    each is in it once; with weights or a cap a data set has its share of the epoch and goes on in the next where this
    one stopped, each example once before any comes again. Within the epoch the data sets are spread evenly. Two
    examples that share a text (anchor or document, of either) would be false negatives of each other: one of them
    changes places with a random example of another batch. The examples that do not fill a last batch are left out; they
    are others in every epoch, or, where batches are homogeneous, in every pass through their data set.

    Args:
        datasets: their order decides the numbers of the examples.
        text_hashes: equal texts have equal hashes, in whatever role.
        batch_size: examples a step, over all devices and hosts.
        seed: of the run.
        epoch: from 0.

    Raises:
        InputError: there is not one whole batch, of the data or of a data set whose batches are its own.
    """
    return _plan(_inputs(datasets, text_hashes, batch_size, mixing), batch_size, seed, epoch)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The batches of a run, by step; epochs are computed when they are met, and the last two are kept.

    Attributes:
        steps: number of batches in the run.
        steps_per_epoch: number of batches in each epoch.
    """

    steps: int
    steps_per_epoch: int
    batch_size: int
    seed: int
    _inputs: "_Inputs"
    _epochs: dict[int, EpochPlan] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    @cached_property
    def hash(self) -> str:
        """That of the first epoch: changes with the data, the seed, the batch size, and numpy's generator.

        The length of the run is not in it, because no batch depends on it.
        """
        return self.epoch(0).hash

    def position(self, step: int) -> tuple[int, int]:
        """Epoch of a step, and its index there."""
        return divmod(step, self.steps_per_epoch)

    def epoch(self, epoch: int) -> EpochPlan:
        """The plan of an epoch; safe to call from several threads."""
        with self._lock:
            if epoch not in self._epochs:
                plan = _plan(self._inputs, self.batch_size, self.seed, epoch)
                while len(self._epochs) > 1:
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[epoch] = plan
            return self._epochs[epoch]

    def batch(self, step: int) -> Int64[np.ndarray, " batch"]:
        """Example numbers of the batch of a step, from 0.

        Raises:
            IndexError: the run has no such step.
        """
        return self._row(step)[0]

    def passes(self, step: int) -> Int64[np.ndarray, " batch"]:
        """For each example of the batch of a step the pass through its data set, from 0."""
        return self._row(step)[1]

    def _row(self, step: int) -> tuple[Int64[np.ndarray, " batch"], Int64[np.ndarray, " batch"]]:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is not in a run of {self.steps} steps")
        epoch, index = self.position(step)
        plan = self.epoch(epoch)
        return plan.order[index], plan.passes[index]


def run_plan(
    datasets: Sequence[DataSet],
    text_hashes: UInt64[np.ndarray, " texts"],
    batch_size: int,
    seed: int,
    *,
    epochs: float | None = None,
    steps: int | None = None,
    mixing: Mixing = MIXED,
) -> Schedule:
    """The batches of a whole run, as long as `epochs` (may be a fraction) or `steps` says.

    Raises:
        InputError: not exactly one of the two is given, or there is not one whole batch (see `epoch_plan`).
    """
    if (epochs is None) == (steps is None):
        raise InputError(f"give exactly one of training.epochs and training.steps, found {epochs} and {steps}")
    inputs = _inputs(datasets, text_hashes, batch_size, mixing)
    steps_per_epoch = _steps_per_epoch(inputs, batch_size)
    if steps is None:
        assert epochs is not None
        steps = max(1, round(epochs * steps_per_epoch))
    return Schedule(steps, steps_per_epoch, batch_size, seed, inputs)


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What is the same in every epoch: sizes, shares, and the texts by which examples can clash.

    Texts are numbered by codes from 0 and listed example by example: those of example `e` are
    `codes[starts[e] : starts[e + 1]]`. Texts that no other place of an epoch can hold are not listed.
    """

    sizes: Int64[np.ndarray, " datasets"]
    counts: Int64[np.ndarray, " datasets"]
    codes: Int64[np.ndarray, " entries"]
    starts: Int64[np.ndarray, " bounds"]
    digest: str
    homogeneous: bool
    visits: "_Visits | None" = None
    """Where a data set rotates: in place of `codes` and `starts`, which are of the first pass."""


@dataclass(frozen=True, eq=False)
class _Visits:
    """The texts of all examples, pass by pass."""

    texts: Int64[np.ndarray, "examples columns"]
    """Of the first pass."""
    hashes: UInt64[np.ndarray, " texts"]
    rotations: tuple[tuple[int, int, Rotation], ...]
    """First example of a data set that rotates, the one after its last, and how."""

    def listed(
        self, examples: Int64[np.ndarray, " places"], passes: Int64[np.ndarray, " places"]
    ) -> tuple[Int64[np.ndarray, " entries"], Int64[np.ndarray, " places"]]:
        """As `_listed`."""
        texts = self.texts[examples]
        for first, end, rotation in self.rotations:
            here = np.flatnonzero((first <= examples) & (examples < end))
            texts[here, 1 : 2 + rotation.taken] = rotation.texts(examples[here] - first, passes[here])
        present = texts >= 0
        place, _, code = _distinct_texts(present, self.hashes[texts[present]])
        keep = np.bincount(code)[code] > 1
        return code[keep], np.bincount(place[keep], minlength=len(examples))


def _inputs(
    datasets: Sequence[DataSet], text_hashes: UInt64[np.ndarray, " texts"], batch_size: int, mixing: Mixing
) -> _Inputs:
    sizes = np.array([len(dataset.texts) for dataset in datasets], np.int64)
    weights = [dataset.weight for dataset in datasets]
    capped = sizes if mixing.cap is None else np.minimum(sizes, mixing.cap)
    shares = np.array([size if weight is None else weight for size, weight in zip(capped, weights)], np.float64)
    shares[sizes == 0] = 0
    if any(weight is not None for weight in weights) and shares.sum() > 0:
        counts = np.rint(capped.sum() * shares / shares.sum()).astype(np.int64)
        counts = np.where(sizes > 0, np.maximum(counts, 1), 0)
    else:
        counts = capped
    if mixing.homogeneous:
        for dataset, size in zip(datasets, sizes.tolist()):
            if 0 < size < batch_size:
                raise InputError(
                    f"data set {dataset.name!r} has {size} pairs, and a batch of one data set has {batch_size}: lower "
                    "training.batch_size, leave the data set out, or mix them with data.batches: mixed"
                )

    columns = max((dataset.texts.shape[1] for dataset in datasets), default=1)
    texts = np.full((sizes.sum(), columns), -1, np.int64)
    for dataset, start in zip(datasets, np.cumsum(sizes) - sizes):
        texts[start : start + len(dataset.texts), : dataset.texts.shape[1]] = dataset.texts
    present = texts >= 0
    hashes = np.zeros(texts.shape, np.uint64)
    hashes[present] = text_hashes[texts[present]]
    mixed = [] if mixing == MIXED else [mixing.homogeneous, mixing.cap]
    digest = hashlib.sha256(json.dumps([sizes.tolist(), weights, *mixed]).encode())
    for array in (present, hashes.astype("<u8")):
        digest.update(np.ascontiguousarray(array).data)

    visits = None
    ends = np.cumsum(sizes).tolist()
    rotations = tuple(
        (end - len(dataset.texts), end, dataset.rotation)
        for dataset, end in zip(datasets, ends)
        if dataset.rotation is not None
    )
    if rotations:
        visits = _Visits(texts, text_hashes, rotations)
        for first, _, rotation in rotations:
            digest.update(json.dumps([first, rotation.taken]).encode())
            for pool in (rotation.positives, rotation.negatives):
                digest.update(np.ascontiguousarray(pool >= 0).data)
                digest.update(text_hashes[pool[pool >= 0]].astype("<u8").data)
    example, column, code = _distinct_texts(present, hashes[present])
    # Where an example can come twice in an epoch it clashes with itself, by its anchor.
    comes_again = np.repeat((counts != sizes) & (not mixing.homogeneous), sizes)
    keep = (np.bincount(code)[code] > 1) | (comes_again[example] & (column == 0))
    starts = np.searchsorted(example[keep], np.arange(sizes.sum() + 1))
    return _Inputs(sizes, counts, code[keep], starts, digest.hexdigest(), mixing.homogeneous, visits)


def _distinct_texts(
    present: Bool[np.ndarray, "examples columns"], hashes: UInt64[np.ndarray, " texts"]
) -> tuple[Int64[np.ndarray, " entries"], Int64[np.ndarray, " entries"], Int64[np.ndarray, " entries"]]:
    """Example, column and code of each text that an example has, example by example; of one it has twice the first."""
    example, column = np.nonzero(present)
    _, code = np.unique(hashes, return_inverse=True)
    order = np.lexsort((column, code, example))
    repeated = (np.diff(example[order], prepend=-1) == 0) & (np.diff(code[order], prepend=-1) == 0)
    first = order[~repeated]
    return example[first], column[first], code[first].astype(np.int64)


def _listed(
    inputs: _Inputs, examples: Int64[np.ndarray, " places"], passes: Int64[np.ndarray, " places"]
) -> tuple[Int64[np.ndarray, " entries"], Int64[np.ndarray, " places"]]:
    """Codes of the texts by which the examples in these places can clash, place by place, and how many each has."""
    if inputs.visits is not None:
        return inputs.visits.listed(examples, passes)
    lengths = np.diff(inputs.starts)[examples]
    return inputs.codes[_ranges(inputs.starts[examples], lengths)], lengths


def _steps_per_epoch(inputs: _Inputs, batch_size: int) -> int:
    examples = int(inputs.counts.sum())
    if not 0 < batch_size <= examples:
        raise InputError(
            f"training.batch_size is {batch_size} pairs and the data has {examples}: an epoch needs one whole batch. "
            "Give a smaller batch_size or more data"
        )
    return examples // batch_size


def _plan(inputs: _Inputs, batch_size: int, seed: int, epoch: int) -> EpochPlan:
    _steps_per_epoch(inputs, batch_size)  # raises where there is not one whole batch
    if inputs.homogeneous:
        order, passes, clashes, swapped = _own_batches(inputs, batch_size, seed, epoch)
    else:
        examples, passes = _shuffled(inputs, seed, epoch)
        order, passes, clashes, swapped = _batches(inputs, examples, passes, batch_size, _generator(1, seed, epoch))
    digest = hashlib.sha256(json.dumps(["epoch plan 1", inputs.digest, batch_size, seed, epoch]).encode())
    digest.update(order.astype("<i8").data)
    if inputs.visits is not None:
        digest.update(passes.astype("<i8").data)
    return EpochPlan(order, passes, digest.hexdigest(), clashes, swapped)


_Order = tuple[Int64[np.ndarray, "batches batch"], Int64[np.ndarray, "batches batch"], int, int]
"""Examples and their passes, batch by batch; how many examples clash still, and how many moved."""


def _batches(
    inputs: _Inputs,
    examples: Int64[np.ndarray, " places"],
    passes: Int64[np.ndarray, " places"],
    batch_size: int,
    generator: np.random.Generator,
) -> _Order:
    """The whole batches of a sequence of examples, equal texts parted."""
    places, clashes, swapped = _part_equal_texts(*_listed(inputs, examples, passes), batch_size, generator)
    batches = len(examples) // batch_size
    found = []
    for column in (examples, passes):
        order = np.empty_like(column)
        order[places] = column
        found.append(order[: batches * batch_size].reshape(batches, batch_size))
    return found[0], found[1], clashes, swapped


def _own_batches(inputs: _Inputs, batch_size: int, seed: int, epoch: int) -> _Order:
    """Batches that come from one data set each, those of a data set spread evenly over the epoch.

    A data set is passed through again and again: each pass is a permutation of it, cut into batches.
    """
    before, now = _batch_counts(inputs, batch_size, epoch)
    generator = _generator(0, seed, epoch)
    first = np.cumsum(inputs.sizes) - inputs.sizes
    orders, turns, when, clashes, swapped = [], [], [], 0, 0
    for number in np.flatnonzero(now).tolist():
        size, begin, count = int(inputs.sizes[number]), int(before[number]), int(now[number])
        a_pass = size // batch_size
        parts = []
        for one in range(begin // a_pass, (begin + count - 1) // a_pass + 1):
            examples = first[number] + _generator(2, seed, number, one).permutation(size)
            again = np.full(size, one, np.int64)
            batches, passes, clashing, moved = _batches(
                inputs, examples, again, batch_size, _generator(1, seed, number, one)
            )
            parts.append((batches, passes))
            clashes, swapped = clashes + clashing, swapped + moved
        begin %= a_pass
        for found, column in zip((orders, turns), zip(*parts)):
            found.append(np.concatenate(column)[begin : begin + count])
        when.append((np.arange(count) + generator.random(count)) / count)
    spread = np.argsort(np.concatenate(when), kind="stable")
    return np.concatenate(orders)[spread], np.concatenate(turns)[spread], clashes, swapped


def _batch_counts(
    inputs: _Inputs, batch_size: int, epoch: int
) -> tuple[Int64[np.ndarray, " datasets"], Int64[np.ndarray, " datasets"]]:
    """Batches of each data set in all epochs before this one, and in this one.

    By largest remainder; what a data set gets too few of, or too many, it gets or gives in the next epoch.
    """
    batches, total = _steps_per_epoch(inputs, batch_size), int(inputs.counts.sum())
    given = counts = np.zeros_like(inputs.sizes)
    for number in range(epoch + 1):
        given = given + counts
        wanted = (number + 1) * batches * inputs.counts - total * given  # in batches / total
        counts = np.maximum(wanted // total, 0)
        missing = batches - int(counts.sum())
        order = np.argsort(counts * total - wanted, kind="stable")
        if missing >= 0:
            counts[order[:missing]] += 1
        else:  # a data set of less than one batch an epoch is ahead of its share
            order = order[counts[order] > 0]
            counts[order[missing:]] -= 1
    return given, counts


def _generator(*entropy: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def _shuffled(
    inputs: _Inputs, seed: int, epoch: int
) -> tuple[Int64[np.ndarray, " places"], Int64[np.ndarray, " places"]]:
    """The examples of an epoch in random order, each data set spread evenly over it, and the pass of each."""
    generator = _generator(0, seed, epoch)
    examples, turns, when = [], [], []
    first = 0
    for number, (size, count) in enumerate(zip(inputs.sizes.tolist(), inputs.counts.tolist())):
        if count:
            begin = epoch * count
            passes = range(begin // size, (begin + count - 1) // size + 1)
            stream = np.concatenate([_generator(2, seed, number, one).permutation(size) for one in passes])
            begin -= passes[0] * size
            examples.append(first + stream[begin : begin + count])
            turns.append(np.repeat(np.asarray(passes, np.int64), size)[begin : begin + count])
            when.append((np.arange(count) + generator.random(count)) / count)
        first += size
    spread = np.argsort(np.concatenate(when), kind="stable")
    return np.concatenate(examples)[spread], np.concatenate(turns)[spread]


def _part_equal_texts(
    codes: Int64[np.ndarray, " entries"],
    lengths: Int64[np.ndarray, " places"],
    batch_size: int,
    generator: np.random.Generator,
) -> tuple[Int64[np.ndarray, " places"], int, int]:
    """Places for the examples such that those of a batch share no text, as far as a few rounds of random swaps get.

    Args:
        codes: of the texts of one example after the other.
        lengths: how many each example has.

    Returns:
        The place of each example, how many still clash, and how many were swapped to get there.
    """
    examples = len(lengths)
    batches = examples // batch_size
    ends = np.cumsum(lengths)
    owner = np.repeat(np.arange(examples), lengths)
    code_count = int(codes.max(initial=0)) + 1
    places = np.arange(examples)
    best, fewest, swapped, swapped_then, since = places, examples + 1, 0, 0, 0

    def meets(who: Int64[np.ndarray, " swaps"], where: Int64[np.ndarray, " swaps"]) -> Bool[np.ndarray, " swaps"]:
        entries = _ranges(ends[who] - lengths[who], lengths[who])
        wanted = np.repeat(where, lengths[who]) * code_count + codes[entries]
        found = keys[np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)] == wanted
        return np.bincount(np.repeat(np.arange(len(who)), lengths[who]), found, len(who)) > 0

    for _ in range(_ROUNDS):
        batch = places // batch_size
        listed = np.flatnonzero(batch[owner] < batches)  # what is left out at the end may share what it likes
        keys = batch[owner[listed]] * code_count + codes[listed]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        offenders = np.unique(owner[listed[order[1:][keys[1:] == keys[:-1]]]])
        since = 0 if len(offenders) < 0.99 * fewest else since + 1
        if len(offenders) < fewest:
            best, fewest, swapped_then = places.copy(), len(offenders), swapped
        if not len(offenders) or since == _PATIENCE or examples == batch_size:
            break
        # A random place outside the offender's own batch, whose example does not clash itself and is not wanted twice.
        jumps = batch_size + generator.integers(0, examples - batch_size, len(offenders))
        at = np.empty_like(places)
        at[places] = np.arange(examples)
        partners, first = np.unique(at[(batch[offenders] * batch_size + jumps) % examples], return_index=True)
        free = ~np.isin(partners, offenders)
        offenders, partners = offenders[first[free]], partners[free]
        good = ~meets(offenders, batch[partners]) & ~meets(partners, batch[offenders])
        offenders, partners = offenders[good], partners[good]
        places[offenders], places[partners] = places[partners], places[offenders]
        swapped += len(offenders)
    return best, fewest, swapped_then


def _ranges(starts: Int64[np.ndarray, " ranges"], lengths: Int64[np.ndarray, " ranges"]) -> Int64[np.ndarray, " all"]:
    """The numbers start, start + 1, … of each range, one range after the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)
