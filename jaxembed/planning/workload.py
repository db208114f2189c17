"""The batches that a plan is for: lengths of texts, from the token cache or drawn, and one of them really packed."""

import dataclasses
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Int

from jaxembed.config import BeirSource, JsonlSource, Source, TrainConfig
from jaxembed.data.loader import RowLayout, pack_batch, sample_lengths
from jaxembed.data.sources import Examples
from jaxembed.errors import InputError
from jaxembed.text.tokenizer import TextTokenizer
from jaxembed.training.prepare import check_batch_size, prepare_batches, run_layout
from jaxembed.training.texts import prepare_tokenizer, read_sources

SPREAD = 0.7
"""Standard deviation of the logarithm of drawn lengths."""

_SAMPLED_BATCHES, _SAMPLED_TEXTS = 16, 400_000


@dataclasses.dataclass(frozen=True)
class Lengths:
    """What stands in for data that is not there."""

    mean: float
    longest: int

    def draw(self, count: int, seed: int) -> Int[np.ndarray, " texts"]:
        """Log-normal lengths of that mean, cut at `longest` as a tokenizer cuts texts."""
        spread = np.exp(SPREAD * np.random.default_rng(seed).standard_normal(count))

        def cut(median: float) -> np.ndarray:
            return np.clip(np.rint(median * spread), 1, self.longest)

        low, high = 0.0, 64.0 * self.longest  # of the median: the mean of cut lengths grows with it
        for _ in range(60):
            median = (low + high) / 2
            low, high = (median, high) if cut(median).mean() < self.mean else (low, median)
        return cut(high).astype(np.int64)

    def __str__(self) -> str:
        return (
            f"drawn: log-normal (standard deviation of the logarithm {SPREAD}) with mean {self.mean:g}, cut at "
            f"{self.longest}"
        )


def parse_lengths(text: str) -> Lengths:
    """`--lengths MEAN,MAX`.

    Raises:
        InputError: not two numbers, 1 ≤ mean < max.
    """
    try:
        mean, longest = text.split(",")
        found = Lengths(float(mean), int(longest))
    except ValueError:
        raise InputError(f"--lengths: expected MEAN,MAX in tokens, such as 60,300, found {text!r}") from None
    if not 1 <= found.mean < found.longest:
        raise InputError(f"--lengths: expected 1 ≤ MEAN < MAX, found {text!r}")
    return found


@dataclasses.dataclass(frozen=True)
class Workload:
    """The batches of a run, in numbers."""

    fields: dict[str, np.ndarray]
    """One batch as the packer makes it, in the largest shape that the run compiles."""
    layout: RowLayout
    queries: int
    texts: int
    """Of a batch."""
    tokens: float
    """Of a batch, on average."""
    squares: float
    """Σ length² over the texts of a batch, on average: what their attention costs."""
    examples: int | None
    """Of an epoch; None where it is not known."""
    source: str
    """Where the lengths are from."""

    @property
    def positions(self) -> int:
        """Token positions that a step computes in its largest shape."""
        return int(self.fields["tokens"].size)

    @property
    def density(self) -> float:
        """Share of the positions of the largest shape that hold a token."""
        return self.tokens / self.positions

    @property
    def usual_share(self) -> float:
        """Positions of a batch, on average over the shapes, as a share of those of the largest shape."""
        return min(1.0, self.tokens / self.layout.density / self.positions)

    @property
    def steps_of_epoch(self) -> int | None:
        return None if self.examples is None else max(1, self.examples // self.queries)


def drawn_workload(config: TrainConfig, lengths: Lengths, examples: int | None, *, chips: int, dim: int) -> Workload:
    """Batches of texts with drawn lengths, and as many hard negatives as the config reads."""
    check_batch_size(config, chips)
    queries, columns = config.training.batch_size, 2 + configured_negatives(config)
    texts = queries * columns
    count = max(2, min(_SAMPLED_BATCHES, _SAMPLED_TEXTS // texts))
    batches = [lengths.draw(texts, seed) for seed in range(count)]
    layout = run_layout(config, [np.append(batches[0], lengths.longest), *batches[1:]], chips, dim, "tpu")
    fields = pack_batch(
        _Unread(batches[0]),
        np.arange(texts).reshape(columns, queries).T,
        np.zeros(queries, np.int64),
        _largest(layout),
    )
    return _workload(fields, layout, queries, batches, examples, str(lengths))


def data_workload(
    config: TrainConfig, examples: Sequence[Examples], tokenizer: TextTokenizer, *, mesh: Mesh, dim: int
) -> Workload:
    """Batches of the config's own data, which are tokenised where the token cache has them not."""
    batches = prepare_batches(config, examples, tokenizer, mesh, dim, "tpu")
    lengths = sample_lengths(batches.schedule, batches.table, batches.texts)
    fields = dataclasses.replace(batches, layout=_largest(batches.layout))[0]
    return _workload(
        fields, batches.layout, config.training.batch_size, [lengths[0][:-1], *lengths[1:]],
        batches.schedule.steps_per_epoch * config.training.batch_size,
        "the token cache",
    )  # fmt: skip


def read_data(config: TrainConfig) -> tuple[list[Examples], TextTokenizer]:
    """The examples and the tokenizer, from this machine alone.

    Raises:
        InputError: they are not here; says how to plan without.
    """
    try:
        examples = read_sources(config.data.train, config.data)
        with tempfile.TemporaryDirectory() as scratch:
            return examples, prepare_tokenizer(config, examples, epath.Path(scratch))
    except InputError as error:
        raise InputError(
            f"{error}\nA plan takes the lengths of the texts from the data, or, without it, from --lengths MEAN,MAX "
            "(tokens a text on average, and at most)"
        ) from error


def configured_negatives(config: TrainConfig) -> int:
    """Hard negatives a query as far as the config says, without a look at the data."""

    def of(source: Source) -> int:
        if source.hard_negatives is not None:
            return source.hard_negatives
        if isinstance(source, BeirSource):
            return source.mined_negatives if source.mined is not None else 0
        return len(source.negatives) if isinstance(source, JsonlSource) else 0

    own = config.training.negatives
    return max(map(of, config.data.train)) if own is None else own


class _Unread:
    """Texts of which the lengths are known alone, whatever their tokens are."""

    def __init__(self, lengths: Int[np.ndarray, " texts"]) -> None:
        self.lengths = lengths
        self._zeros = np.zeros(int(lengths.max()), np.int32)

    def __getitem__(self, text: int) -> Int[np.ndarray, " tokens"]:
        return self._zeros[: self.lengths[text]]


def _largest(layout: RowLayout) -> RowLayout:
    return dataclasses.replace(layout, chunks=layout.chunks[-1:])


def _workload(
    fields: dict[str, Any],
    layout: RowLayout,
    queries: int,
    batches: Sequence[Int[np.ndarray, " texts"]],
    examples: int | None,
    source: str,
) -> Workload:
    return Workload(
        fields=fields,
        layout=layout,
        queries=queries,
        texts=round(float(np.mean([len(lengths) for lengths in batches]))),
        tokens=float(np.mean([lengths.sum() for lengths in batches])),
        squares=float(np.mean([(lengths.astype(np.float64) ** 2).sum() for lengths in batches])),
        examples=examples,
        source=source,
    )
