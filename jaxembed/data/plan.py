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
class DataSet:
    """The examples of one source, as the plan sees them.

    Attributes:
        name: for messages and metrics.
        texts: row numbers into the texts of the whole run: anchor, positive, negatives; -1 where there is none.
        weight: share in the mix relative to the others; None = its number of examples.
    """

    name: str
    texts: Int[np.ndarray, "examples columns"]
    weight: float | None = None


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
        hash: SHA-256 over the order and all that it was computed from.
        clashes: examples that still share a text with another one of their batch, less one of each group that does.
        swapped: examples that changed places with one of another batch because they did.
    """

    order: Int64[np.ndarray, "batches batch"]
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
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is not in a run of {self.steps} steps")
        epoch, index = self.position(step)
        return self.epoch(epoch).order[index]


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

    example, column = np.nonzero(present)
    _, code = np.unique(hashes[present], return_inverse=True)
    # An example that has a text twice does not clash with itself.
    order = np.lexsort((column, code, example))
    repeated = (np.diff(example[order], prepend=-1) == 0) & (np.diff(code[order], prepend=-1) == 0)
    first = order[~repeated]
    example, code, column = example[first], code[first], column[first]
    # Where an example can come twice in an epoch it clashes with itself, by its anchor.
    comes_again = np.repeat((counts != sizes) & (not mixing.homogeneous), sizes)
    keep = (np.bincount(code)[code] > 1) | (comes_again[example] & (column == 0))
    starts = np.searchsorted(example[keep], np.arange(sizes.sum() + 1))
    return _Inputs(sizes, counts, code[keep].astype(np.int64), starts, digest.hexdigest(), mixing.homogeneous)


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
        order, clashes, swapped = _own_batches(inputs, batch_size, seed, epoch)
    else:
        examples = _shuffled(inputs, seed, epoch)
        order, clashes, swapped = _batches(inputs, examples, batch_size, _generator(1, seed, epoch))
    digest = hashlib.sha256(json.dumps(["epoch plan 1", inputs.digest, batch_size, seed, epoch]).encode())
    digest.update(order.astype("<i8").data)
    return EpochPlan(order, digest.hexdigest(), clashes, swapped)


def _batches(
    inputs: _Inputs, examples: Int64[np.ndarray, " places"], batch_size: int, generator: np.random.Generator
) -> tuple[Int64[np.ndarray, "batches batch"], int, int]:
    """The whole batches of a sequence of examples, equal texts parted; how many clash still, and how many moved."""
    places, clashes, swapped = _part_equal_texts(inputs, examples, batch_size, generator)
    order = np.empty_like(examples)
    order[places] = examples
    batches = len(examples) // batch_size
    return order[: batches * batch_size].reshape(batches, batch_size), clashes, swapped


def _own_batches(
    inputs: _Inputs, batch_size: int, seed: int, epoch: int
) -> tuple[Int64[np.ndarray, "batches batch"], int, int]:
    """Batches that come from one data set each, those of a data set spread evenly over the epoch.

    A data set is passed through again and again: each pass is a permutation of it, cut into batches.
    """
    before, now = _batch_counts(inputs, batch_size, epoch)
    generator = _generator(0, seed, epoch)
    first = np.cumsum(inputs.sizes) - inputs.sizes
    orders, when, clashes, swapped = [], [], 0, 0
    for number in np.flatnonzero(now).tolist():
        size, begin, count = int(inputs.sizes[number]), int(before[number]), int(now[number])
        a_pass = size // batch_size
        passes = []
        for one in range(begin // a_pass, (begin + count - 1) // a_pass + 1):
            examples = first[number] + _generator(2, seed, number, one).permutation(size)
            batches, clashing, moved = _batches(inputs, examples, batch_size, _generator(1, seed, number, one))
            passes.append(batches)
            clashes, swapped = clashes + clashing, swapped + moved
        begin %= a_pass
        orders.append(np.concatenate(passes)[begin : begin + count])
        when.append((np.arange(count) + generator.random(count)) / count)
    return np.concatenate(orders)[np.argsort(np.concatenate(when), kind="stable")], clashes, swapped


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


def _shuffled(inputs: _Inputs, seed: int, epoch: int) -> Int64[np.ndarray, " places"]:
    """The examples of an epoch in random order, each data set spread evenly over it."""
    generator = _generator(0, seed, epoch)
    examples, when = [], []
    first = 0
    for number, (size, count) in enumerate(zip(inputs.sizes.tolist(), inputs.counts.tolist())):
        if count:
            begin = epoch * count
            passes = range(begin // size, (begin + count - 1) // size + 1)
            stream = np.concatenate([_generator(2, seed, number, one).permutation(size) for one in passes])
            begin -= passes[0] * size
            examples.append(first + stream[begin : begin + count])
            when.append((np.arange(count) + generator.random(count)) / count)
        first += size
    return np.concatenate(examples)[np.argsort(np.concatenate(when), kind="stable")]


def _part_equal_texts(
    inputs: _Inputs,
    examples: Int64[np.ndarray, " places"],
    batch_size: int,
    generator: np.random.Generator,
) -> tuple[Int64[np.ndarray, " places"], int, int]:
    """Places for the examples such that those of a batch share no text, as far as a few rounds of random swaps get.

    Returns:
        The place of each example, how many still clash, and how many were swapped to get there.
    """
    batches = len(examples) // batch_size
    lengths = np.diff(inputs.starts)[examples]
    ends = np.cumsum(lengths)
    codes = inputs.codes[_ranges(inputs.starts[examples], lengths)]
    owner = np.repeat(np.arange(len(examples)), lengths)
    code_count = int(codes.max(initial=0)) + 1
    places = np.arange(len(examples))
    best, fewest, swapped, swapped_then, since = places, len(examples) + 1, 0, 0, 0

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
        if not len(offenders) or since == _PATIENCE or len(examples) == batch_size:
            break
        # A random place outside the offender's own batch, whose example does not clash itself and is not wanted twice.
        jumps = batch_size + generator.integers(0, len(examples) - batch_size, len(offenders))
        at = np.empty_like(places)
        at[places] = np.arange(len(examples))
        partners, first = np.unique(at[(batch[offenders] * batch_size + jumps) % len(examples)], return_index=True)
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
