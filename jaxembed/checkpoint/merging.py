"""One model out of several: their weighted average, or two of them interpolated on a sphere, tensor by tensor.

The merged model is a `Source` whose tensors are computed as they are read; `checkpoint.convert` writes it like any
other.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from jaxtyping import Float32

from jaxembed.checkpoint.buffers import Buffers
from jaxembed.checkpoint.convert import Container, Source, Summary, convert, plan_conversion
from jaxembed.checkpoint.directories import ModelPath
from jaxembed.checkpoint.export import is_causal
from jaxembed.checkpoint.huggingface import WeightsHash
from jaxembed.checkpoint.model_card import model_card
from jaxembed.errors import InputError
from jaxembed.models.weights import Plan
from jaxembed.text.format import TEXT_FORMAT_FILE, TextFormat, read_text_format
from jaxembed.text.tokenizer import TextTokenizer, load_tokenizer

logger = logging.getLogger(__name__)

Method = Literal["average", "slerp"]
Combine = Callable[[Sequence[Float32[np.ndarray, "*shape"]]], Float32[np.ndarray, "*shape"]]

PARALLEL = 0.9995
"""|cos| of two tensors above which `slerp` goes straight; mergekit's `DOT_THRESHOLD`."""

_BLOCK = 1 << 20  # numbers summed in float64 at once


def average(
    tensors: Sequence[Float32[np.ndarray, "*shape"]], weights: Sequence[float]
) -> Float32[np.ndarray, "*shape"]:
    """θ = Σᵢ wᵢ·θᵢ with Σᵢ wᵢ = 1, computed as θ₀ + Σᵢ₌₁ wᵢ·(θᵢ − θ₀): what is equal in all models stays as it is.

    "Model soups", Wortsman et al. 2022, arXiv 2203.05482.
    """
    first, *others = tensors
    result = np.array(first, np.float32)
    for tensor, weight in zip(others, weights[1:]):
        difference = np.subtract(tensor, first, dtype=np.float32)
        difference *= np.float32(weight)
        result += difference
    return result


def slerp(
    a: Float32[np.ndarray, "*shape"], b: Float32[np.ndarray, "*shape"], t: float
) -> Float32[np.ndarray, "*shape"]:
    """θ = sin((1−t)·Ω)/sin Ω · a + sin(t·Ω)/sin Ω · b, where Ω is the angle between the two flattened tensors.

    Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985; per tensor as in mergekit (Goddard et al.
    2024, arXiv 2403.13257). The angle is computed in float64. Where the two are nearly parallel or antiparallel
    (|cos Ω| > `PARALLEL`), or one is zero, sin Ω is no divisor, and θ = a + t·(b − a).
    """
    lengths = math.sqrt(_dot(a, a) * _dot(b, b))
    cosine = _dot(a, b) / lengths if lengths else 1.0
    if not abs(cosine) <= PARALLEL:  # also where it is NaN
        return average((a, b), (1 - t, t))
    angle = math.acos(cosine)
    result = np.multiply(a, np.float32(math.sin((1 - t) * angle) / math.sin(angle)), dtype=np.float32)
    result += np.multiply(b, np.float32(math.sin(t * angle) / math.sin(angle)), dtype=np.float32)
    return result


@dataclass(frozen=True)
class Merge:
    """What is to be merged and how.

    Attributes:
        sources: the first one gives names, order and dtypes of tensors, tokenizer, text format and small files.
        weights: of `average`, one a source; they are divided by their sum. None: all equal.
        t: of `slerp`: 0 is the first model, 1 the second.

    Raises:
        InputError: weights or `t` that do not fit the sources and the method, or models that do not fit together.
    """

    sources: Sequence[Source]
    method: Method = "average"
    weights: Sequence[float] | None = None
    t: float | None = None

    def __post_init__(self) -> None:
        count = len(self.sources)
        if count < 2:
            raise InputError(f"expected two models or more, found {count}")
        if self.method == "slerp":
            if count != 2:
                raise InputError(f"--method slerp: expected two models, found {count}; use --method average")
            if self.weights is not None:
                raise InputError("--weights belongs to --method average; slerp has --t")
            if self.t is None or not 0 <= self.t <= 1:
                raise InputError(f"--t: expected a number from 0 (the first model) to 1 (the second), found {self.t}")
        else:
            if self.t is not None:
                raise InputError("--t belongs to --method slerp; average has --weights")
            weights = self.weights
            if weights is not None and len(weights) != count:
                raise InputError(f"--weights: expected {count} numbers, one a model, found {len(weights)}")
            if weights is not None and not (all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0):
                raise InputError(f"--weights: expected numbers of at least 0, not all 0, found {list(weights)}")
        for source in self.sources[1:]:
            _check_fits(self.sources[0], source)

    @property
    def shares(self) -> list[float]:
        """Of each model; they add up to 1."""
        if self.method == "slerp":
            assert self.t is not None
            return [1 - self.t, self.t]
        weights = [1.0] * len(self.sources) if self.weights is None else self.weights
        return [weight / sum(weights) for weight in weights]

    @property
    def combine(self) -> Combine:
        """One float32 tensor out of the sources'."""
        if self.method == "slerp":
            return lambda tensors: slerp(tensors[0], tensors[1], self.shares[1])
        return functools.partial(average, weights=self.shares)


def merge(
    how: Merge,
    target: ModelPath,
    *,
    dtype: np.dtype[Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: bool = True,
) -> Summary:
    """Writes the merged model: a directory like the first source's, whole or not there.

    A tensor of each source is in memory, and the next ones are read meanwhile.

    Args:
        dtype: of all tensors; None: each has the first source's.
        max_shard_bytes: of a safetensors file, unless one tensor is larger.

    Raises:
        InputError: the target is there, or a source is damaged; names file and tensor.
    """
    first = how.sources[0]
    if any(source.kind == "training run" for source in how.sources):
        # A checkpoint holds the layers of a parameter in one array, which is to be read once.
        places = tuple(sorted(first.plan.assignments, key=lambda each: each.path))
        first = dataclasses.replace(first, plan=Plan(places, first.plan.prefix, first.plan.ignored))
    text_format = text_format_of(first)
    to: Container = "sentence-transformers" if text_format is not None else "hf"
    if first.kind == "Orbax":
        to = "orbax"
    hashes = [WeightsHash() for _ in how.sources]
    tokenizer = first.tokenizer
    if tokenizer is None and text_format is not None:
        tokenizer = TextTokenizer.from_directory(first.path, text_format)

    def description() -> str:
        return describe(how, [each.hexdigest() for each in hashes])

    def card(name: str, weights_hash: str) -> str:
        assert text_format is not None
        return model_card(
            name=name,
            text_format=text_format,
            dim=first.config.dim,
            description=description(),
            causal=is_causal(first.huggingface_config),
            weights_hash=weights_hash,
        )

    def plain_card(directory: Path) -> None:
        (directory / "README.md").write_text(f"# {target.name}\n\n{description()}\n", encoding="utf-8")

    merged = dataclasses.replace(
        first,
        read=functools.partial(_read, dataclasses.replace(how, sources=[first, *how.sources[1:]]), hashes),
        weights_hash=None,
        tokenizer=tokenizer,
        card=card,
        state="",
    )
    conversion = plan_conversion(merged, to, dtype)
    if to != "sentence-transformers":  # which has no place for them
        _check_ignored(how.sources)
    return convert(
        conversion,
        target,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        verify=plain_card if tokenizer is None else None,
        progress=progress,
    )


def describe(how: Merge, hashes: Sequence[str]) -> str:
    """What was merged, as Markdown for the model card."""
    ways = {"average": "The weighted average of", "slerp": "The spherical interpolation, tensor by tensor, between"}
    lines = [
        f"* {share:.6g} of `{source.path.name}`, weights `{found}`"
        for source, share, found in zip(how.sources, how.shares, hashes)
    ]
    return "\n".join([f"{ways[how.method]} {len(how.sources)} models, made by `jaxembed merge`:", "", *lines])


def text_format_of(source: Source) -> TextFormat | None:
    """The text format of a model, None where its directory has none."""
    if source.tokenizer is not None:
        return source.tokenizer.text_format
    try:
        return read_text_format(source.path)
    except InputError:
        if (source.path / TEXT_FORMAT_FILE).exists() or (source.path / "modules.json").exists():
            raise
        return None


def _read(
    how: Merge, hashes: Sequence[WeightsHash], names: Sequence[str], buffers: Buffers
) -> Iterator[tuple[str, np.ndarray]]:
    """The merged tensors in float32, under the first source's names; takes the hash of each source on the way."""
    first = how.sources[0]
    decoder = {each.source for each in first.plan.assignments}
    streams = [source.read([_name_in(source, first, name) for name in names], buffers) for source in how.sources]
    for name, found in zip(names, zip(*streams)):
        arrays = [array for _, array in found]
        if name in decoder:
            for known, array in zip(hashes, arrays):
                known.add(name.removeprefix(first.plan.prefix), array)
        merged = how.combine([array.astype(np.float32, copy=False) for array in arrays])
        for array in arrays:
            buffers.give(array)
        yield name, merged


def _name_in(source: Source, first: Source, name: str) -> str:
    """What a tensor of the first source is called in another one, which may have another prefix, or none."""
    bare = name.removeprefix(first.plan.prefix)
    return next((each for each in (source.plan.prefix + bare, bare, name) if each in source.tensors), name)


def _check_ignored(sources: Sequence[Source]) -> None:
    """Tensors beside the decoder's, such as a language-model head, have to be in every source, in one shape."""
    first = sources[0]
    for source in sources[1:]:
        shared = {_name_in(source, first, name): name for name in first.plan.ignored}
        missing = [name for theirs, name in shared.items() if theirs not in source.tensors]
        surplus = [name for name in source.plan.ignored if name not in shared]
        for where, lacking, of in ((source, missing, first), (first, surplus, source)):
            if lacking:
                raise InputError(f"{where.path}: no tensor {lacking[0]!r}, which {of.path} has")
        for theirs, name in shared.items():
            ours, found = first.tensors[name].shape, source.tensors[theirs].shape
            if ours != found:
                raise InputError(
                    f"{source.path}: tensor {name!r} has shape {list(found)}; in {first.path} it has {list(ours)}"
                )


def _check_fits(first: Source, other: Source) -> None:
    """Refuses another architecture, vocabulary or text format; warns of a tokenizer that differs in something else."""
    if first.family.model is not other.family.model:
        names = [str(source.huggingface_config.get("model_type")) for source in (first, other)]
        raise InputError(f"{other.path}: the architecture is {names[1]}; {first.path} is {names[0]}")
    ours, theirs = (dataclasses.asdict(source.config) for source in (first, other))
    for key, value in ours.items():
        if theirs[key] != value:
            raise InputError(f"{other.path / 'config.json'}: {key} is {theirs[key]!r}; in {first.path} it is {value!r}")
    _check_vocabularies(first, other)
    formats = [text_format_of(source) for source in (first, other)]
    if formats[1] is None:
        return  # a decoder that is no embedder yet contradicts nothing
    if formats[0] is None:
        raise InputError(f"{first.path}: has no text format, but {other.path} has: name that model first")
    ours, theirs = (_flat(each.to_dict()) for each in formats if each is not None)
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        if ours.get(key) != theirs.get(key):
            raise InputError(
                f"{other.path}: text format: {key} is {theirs.get(key)!r}; in {first.path} it is {ours.get(key)!r}"
            )


def _check_vocabularies(first: Source, other: Source) -> None:
    ours, theirs = (_tokenizer_of(source) for source in (first, other))
    if ours is None or theirs is None:
        return
    known, found = (each.get_vocab(with_added_tokens=True) for each in (ours, theirs))
    for token in sorted(known.keys() | found.keys()):
        if known.get(token) != found.get(token):
            ids = ["no token" if ids.get(token) is None else f"token {ids[token]}" for ids in (found, known)]
            raise InputError(f"{other.path}: tokenizer: {token!r} is {ids[0]}; in {first.path} it is {ids[1]}")
    if ours.to_str() != theirs.to_str():
        logger.warning(
            "%s: the tokenizer has the same tokens as that of %s, but differs elsewhere; the first one's is kept",
            other.path,
            first.path,
        )


def _tokenizer_of(source: Source) -> tokenizers.Tokenizer | None:
    if source.tokenizer is not None:
        return source.tokenizer.tokenizer
    file = source.path / "tokenizer.json"
    if not file.exists():
        return None
    found = load_tokenizer(file)
    found.no_truncation()
    found.no_padding()
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"query": {"prefix": "q"}}` → `{"query.prefix": "q"}`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _dot(a: Float32[np.ndarray, "*shape"], b: Float32[np.ndarray, "*shape"]) -> float:
    """Of flattened tensors, in float64."""
    a, b = a.reshape(-1), b.reshape(-1)
    blocks = range(0, len(a), _BLOCK)
    return math.fsum(
        float(np.dot(a[i : i + _BLOCK].astype(np.float64), b[i : i + _BLOCK].astype(np.float64))) for i in blocks
    )
