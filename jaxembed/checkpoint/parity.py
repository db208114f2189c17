"""Hidden states layer by layer against transformers: how a conversion proves that it changed nothing."""

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int
from numpy.typing import DTypeLike

from jaxembed.checkpoint.export import edge_texts
from jaxembed.checkpoint.pretrained import load_decoder
from jaxembed.errors import InputError
from jaxembed.text.format import ROLES, TextFormat, read_text_format
from jaxembed.text.tokenizer import TextTokenizer, load_tokenizer

TOLERANCE = 1e-4
"""Largest difference of a hidden state, relative to the standard deviation of its layer, that counts as the same."""

LONGEST = 64
"""Tokens of a text at most: attention blocks and padding are met with fewer than a model's maximum."""

FLOAT32 = np.dtype(np.float32)

LayerStates = Float[np.ndarray, "states length dim"]
"""All hidden states of one text: embeddings, each layer's output, the last one after the final norm."""


@dataclass(frozen=True)
class LayerDifference:
    """How far the hidden states of one layer are apart, over all positions of all texts.

    Attributes:
        name: "embeddings", "layer 0", …, and "final" for the last layer with the norm after it.
        difference: the largest absolute one.
        deviation: standard deviation of the reference's states.
        cosine: the smallest one between the two states of a text's last token.
    """

    name: str
    difference: float
    deviation: float
    cosine: float

    @property
    def relative(self) -> float:
        """Largest difference in standard deviations."""
        if self.difference == 0:
            return 0.0
        return self.difference / self.deviation if self.deviation else np.inf

    @property
    def ok(self) -> bool:
        return self.relative <= TOLERANCE  # not where it is NaN


@dataclass(frozen=True)
class LayerParity:
    """What `verify_conversion` found; `str()` of it is a table to print.

    Attributes:
        reader: what read the reference, with its version.
        sequences: how many token sequences were compared, and what they are.
    """

    layers: tuple[LayerDifference, ...]
    reader: str
    sequences: str

    @property
    def ok(self) -> bool:
        """Whether every layer is the same to `TOLERANCE`."""
        return bool(self.layers) and all(layer.ok for layer in self.layers)

    @property
    def worst(self) -> LayerDifference:
        """The layer that differs most; a NaN is more than any number."""
        return max(self.layers, key=lambda layer: np.inf if np.isnan(layer.relative) else layer.relative)

    def __str__(self) -> str:
        head = ("hidden states", "largest difference", "standard deviation", "relative", "smallest cosine")
        lines = [
            (
                layer.name,
                f"{layer.difference:.1e}",
                f"{layer.deviation:.3g}",
                f"{layer.relative:.1e}{'' if layer.ok else ' !'}",
                f"{layer.cosine:.7f}",
            )
            for layer in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(head, *lines)]
        table = [
            "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
            for line in (head, *lines)
        ]
        worst = self.worst
        same = "the same hidden states as" if self.ok else "OTHER hidden states than"
        verdict = (
            f"{same} {self.reader}, {self.sequences}: the largest difference is {worst.relative:.1e} standard "
            f"deviations ({worst.name}), allowed are {TOLERANCE:.0e}"
        )
        return "\n".join([*table, verdict])


def compare_layers(ours: Sequence[LayerStates], theirs: Sequence[LayerStates]) -> list[LayerDifference]:
    """Compares the hidden states of the same texts, computed twice, layer by layer.

    Args:
        ours: of each text, without padding.
        theirs: the reference.

    Raises:
        InputError: they are not of the same shapes.
    """
    shapes, their_shapes = ([states.shape for states in side] for side in (ours, theirs))
    if shapes != their_shapes or not shapes:
        raise InputError(f"hidden states of the same shapes expected, found {shapes} and {their_shapes}")
    states = len(theirs[0])
    found = []
    for index in range(states):
        a, b = (np.concatenate([text[index] for text in side]).astype(np.float64) for side in (ours, theirs))
        ends = np.cumsum([text.shape[1] for text in theirs]) - 1
        name = "embeddings" if index == 0 else "final" if index == states - 1 else f"layer {index - 1}"
        cosine = _cosines(a[ends], b[ends]).min()
        found.append(LayerDifference(name, float(np.abs(a - b).max()), float(b.std()), float(cosine)))
    return found


def verify_conversion(
    converted: str | os.PathLike[str], reference: str | os.PathLike[str], *, dtype: DTypeLike | None = None
) -> LayerParity:
    """Runs the edge texts through a converted model here and through the one it comes from in transformers, in float32.

    Without torch, the reference is what this package itself reads from that directory; `reader` says so. One of the two
    models is in memory at a time. Texts are cut after `LONGEST` tokens. Without a text format they are tokenised as
    they are; without a tokenizer, their bytes are the tokens.

    Args:
        converted: any directory that `load_decoder` reads.
        reference: a Hugging Face directory.
        dtype: where the conversion was to a narrower one: the reference's weights are rounded to it too.

    Raises:
        InputError: one of the two cannot be read, the tokenizer does not belong to the model, or the two differ in
            layers or width.
    """
    converted, reference = Path(converted), Path(reference)
    tokens, sequences = _edge_tokens(converted if (converted / "tokenizer.json").exists() else reference)
    if importlib.util.find_spec("torch"):
        reader, read = f"transformers {importlib.metadata.version('transformers')}", _transformers_states
    else:
        reader, read = "jaxembed's own reading of the source (torch is not installed)", _jax_states
    rounded = FLOAT32 if dtype is None else np.dtype(dtype)
    theirs = read(reference, tokens, rounded)
    ours = _jax_states(converted, tokens)
    return LayerParity(tuple(compare_layers(ours, theirs)), reader, sequences)


def _edge_tokens(directory: Path) -> tuple[list[Int[np.ndarray, " length"]], str]:
    """Token sequences of the edge texts, none of them empty, and a few words on what they are."""
    try:
        text_format = read_text_format(directory)
        tokenizer = TextTokenizer.from_directory(directory, text_format)
    except InputError:  # a model that is not an embedder, or one for a text format that is not supported here
        texts = edge_texts(TextFormat(max_length=LONGEST))
        if (directory / "tokenizer.json").exists():
            plain = load_tokenizer(directory / "tokenizer.json")
            plain.no_truncation()
            plain.no_padding()
            found, kind = [np.array(plain.encode(text).ids, np.int32) for text in texts], "edge texts without format"
        else:
            found, kind = [np.array([*text.encode()], np.int32) for text in texts], "edge texts as bytes (no tokenizer)"
    else:
        texts = edge_texts(text_format)
        found, kind = [ids for role in ROLES for ids in tokenizer(texts, role)], "edge texts in both roles"
    found = [ids[:LONGEST] for ids in found if len(ids)]
    return found, f"{len(found)} {kind}"


def _jax_states(
    directory: Path, tokens: Sequence[Int[np.ndarray, " length"]], rounded: np.dtype = FLOAT32
) -> list[LayerStates]:
    # A device's float32 products may be of fewer bits, and a model that fits the host need not fit the device.
    with jax.default_device(_host()), jax.default_matmul_precision("highest"):
        decoder = load_decoder(directory, dtype=rounded, progress=False)
        ids, mask = _padded(tokens, decoder.config.vocab_size, directory)
        graph, state = nnx.split(decoder.model)
        run = jax.jit(lambda state, ids, mask: nnx.merge(graph, state).layer_states(ids, mask))
        states = np.asarray(run(state, ids, mask))
    return [states[:, row, : len(text)] for row, text in enumerate(tokens)]


def _transformers_states(
    directory: Path, tokens: Sequence[Int[np.ndarray, " length"]], rounded: np.dtype
) -> list[LayerStates]:
    import torch
    import transformers

    with _quiet_transformers():
        try:
            model = transformers.AutoModel.from_pretrained(
                directory, dtype=getattr(torch, rounded.name), local_files_only=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{directory}: transformers cannot read it: {str(error).splitlines()[0]}") from error
    model = model.float().eval()
    ids, mask = (torch.from_numpy(each) for each in _padded(tokens, model.config.vocab_size, directory))
    with torch.inference_mode():
        found = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    return [np.stack([layer[row, : len(text)].numpy() for layer in found]) for row, text in enumerate(tokens)]


def _padded(
    tokens: Sequence[Int[np.ndarray, " length"]], vocab_size: int, directory: Path
) -> tuple[Int[np.ndarray, "rows length"], Int[np.ndarray, "rows length"]]:
    """A sequence a row, padded on the right; and where it is."""
    if (largest := max(ids.max() for ids in tokens)) >= vocab_size:
        raise InputError(f"{directory}: the tokenizer gives token {largest:,}, the table has {vocab_size:,} rows")
    length = max(map(len, tokens))
    ids = np.stack([np.pad(ids, (0, length - len(ids))) for ids in tokens]).astype(np.int32)
    return ids, (np.arange(length) < np.array([[len(ids)] for ids in tokens])).astype(np.int32)


def _cosines(a: Float[np.ndarray, "texts dim"], b: Float[np.ndarray, "texts dim"]) -> Float[np.ndarray, " texts"]:
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / np.maximum(norms, np.finfo(np.float64).tiny)


def _host() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return None


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bar, and no report of a head that a decoder has no use for."""
    from transformers.utils import logging

    restore: Callable[[], None] = logging.enable_progress_bar if logging.is_progress_bar_enabled() else lambda: None
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        restore()
