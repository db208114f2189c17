"""`Embedder`: texts in, embeddings out; what notebooks, evaluation and users hold in their hands."""

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from tqdm import tqdm

from jaxembed.checkpoint.export import Verification, verify_export, write_sentence_transformers
from jaxembed.checkpoint.huggingface import iter_huggingface, weights_hash
from jaxembed.checkpoint.model_card import model_card
from jaxembed.checkpoint.pretrained import Decoder, find_directory, load_decoder
from jaxembed.checkpoint.safetensors import write_safetensors
from jaxembed.errors import InputError
from jaxembed.ops.norms import unit_norm
from jaxembed.sharding import compute_dtype
from jaxembed.text.format import RoleName, TextFormat
from jaxembed.text.packing import RowShape, call_shapes, fill_rows, plan_calls
from jaxembed.text.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

CALL_TOKENS = {"cpu": 768, "gpu": 16_384, "tpu": 16_384}
"""Tokens that a call computes at once, by platform. On a CPU what fits its cache is fastest."""

_FIRST_WINDOW, _WINDOW = 1024, 8192  # texts tokenised and packed together: few at first, so that computing starts early
_IN_FLIGHT = 2  # calls dispatched before the first result is waited for


class Embedder:
    """A decoder with its tokenizer and text format.

    Attributes:
        model: the decoder, an `nnx.Module`.
        tokenizer: texts and role → token ids; holds the text format.
        compiled_shapes: the shapes of packed rows that have been compiled so far; at most six.
    """

    def __init__(self, decoder: Decoder, tokenizer: TextTokenizer, *, dtype: Any = "auto") -> None:
        """
        Args:
            dtype: of the computation: "float32", "bfloat16", or "auto" for what suits the device.

        Raises:
            InputError: the tokenizer knows more tokens than the decoder.
        """
        if tokenizer.vocab_size > decoder.config.vocab_size:
            raise InputError(
                f"the tokenizer has {tokenizer.vocab_size:,} tokens, the decoder's vocabulary table only "
                f"{decoder.config.vocab_size:,} rows: they do not belong together"
            )
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.dtype = compute_dtype(dtype)
        self.compiled_shapes: set[RowShape] = set()
        graph, self._state = nnx.split(decoder.model)

        def embed(state: nnx.State, tokens: Array, segments: Array, last: Array) -> Float[Array, "rows slots dim"]:
            return nnx.merge(graph, state).states(tokens, segments, last, dtype=self.dtype)

        self._embed = jax.jit(embed)

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | os.PathLike[str],
        *,
        text_format: TextFormat | None = None,
        dtype: Any = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> "Embedder":
        """Loads a Hugging Face or sentence-transformers directory, or a hub id.

        Args:
            text_format: instead of the one saved with the model.
            dtype: of the computation; parameters are bfloat16 where it is, else float32.
            revision, token, cache_dir, local_files_only: for the hub, as in transformers.

        Raises:
            InputError: the model is not there, damaged, not supported, or has no text format and none is given.
        """
        directory = find_directory(
            model_name_or_path, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        tokenizer = TextTokenizer.from_directory(directory, text_format)
        decoder = load_decoder(directory, dtype=compute_dtype(dtype), progress=logger.isEnabledFor(logging.INFO))
        return cls(decoder, tokenizer, dtype=dtype)

    @property
    def model(self) -> Any:
        return nnx.merge(nnx.graphdef(self.decoder.model), self._state)

    @property
    def text_format(self) -> TextFormat:
        return self.tokenizer.text_format

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self.decoder.config.dim

    @property
    def model_hash(self) -> str:
        """SHA-256 of the decoder's weights under Hugging Face's names: the same in every container."""
        decoder = self.decoder
        return weights_hash(self._flat_state(), decoder.family.weight_map(decoder.config), decoder.config.layers)

    def replace_state(self, state: nnx.State) -> None:
        """Puts other weights in place of the present ones, without compiling again."""
        self._state = state

    @overload
    def encode(self, sentences: str, *args: Any, **kwargs: Any) -> Float[np.ndarray, " dim"]: ...
    @overload
    def encode(self, sentences: Sequence[str], *args: Any, **kwargs: Any) -> Float[np.ndarray, "texts dim"]: ...

    def encode(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        *,
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
    ) -> Float[np.ndarray, "*texts dim"]:
        """Embeds texts, in their order; equal texts are computed once.

        Args:
            sentences: one text, or any number of them. An empty text is a text like any other.
            prompt_name: the role, "query" or "document"; None is "query", also for symmetric tasks.
            prompt: text to put before each text, after the role's own prefix, such as an instruction.
            batch_size: rows of the longest length computed at once; None chooses for the device.
            show_progress_bar: None shows one for more than a thousand texts where INFO is logged.
            normalize_embeddings: unit length; None as the text format has it.
            truncate_dim: keeps the first dimensions only, and scales those to unit length where asked for.

        Returns:
            float32; one vector for one text.

        Raises:
            InputError: something is not a text, an unknown role, or a `truncate_dim` beyond the model's.
        """
        one = isinstance(sentences, str)
        texts = [sentences] if one else list(sentences)
        role: RoleName = "query" if prompt_name is None else prompt_name  # type: ignore[assignment]
        self.text_format.role(role)
        dim = self.dim if truncate_dim is None else truncate_dim
        if not 1 <= dim <= self.dim:
            raise InputError(f"truncate_dim: expected 1 to {self.dim}, found {truncate_dim}")
        normalize = self.text_format.normalize if normalize_embeddings is None else normalize_embeddings
        if show_progress_bar is None:
            show_progress_bar = len(texts) > 1000 and logger.isEnabledFor(logging.INFO)
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"sentences[{index}]: expected a string, got {type(text).__name__}: {text!r:.80}")
        distinct = list(dict.fromkeys(texts))
        out = np.empty((len(distinct), dim), np.float32)
        prompted = distinct if prompt is None else [prompt + text for text in distinct]
        with tqdm(total=len(distinct), unit="text", desc="encode", disable=not show_progress_bar) as bar:
            for places, vectors in self._embed_all(prompted, role, batch_size):
                out[places] = vectors[:, :dim]
                bar.update(len(places))
        if normalize:
            out = np.asarray(unit_norm(jnp.asarray(out))) if len(out) else out
        if len(distinct) != len(texts):
            place = {text: index for index, text in enumerate(distinct)}
            out = out[[place[text] for text in texts]]
        return out[0] if one else out

    def encode_query(self, sentences: str | Sequence[str], **kwargs: Any) -> Float[np.ndarray, "*texts dim"]:
        """`encode` in the role of a query."""
        return self.encode(sentences, "query", **kwargs)

    def encode_document(self, sentences: str | Sequence[str], **kwargs: Any) -> Float[np.ndarray, "*texts dim"]:
        """`encode` in the role of a document."""
        return self.encode(sentences, "document", **kwargs)

    def similarity(self, a: Float[np.ndarray, "*a dim"], b: Float[np.ndarray, "*b dim"]) -> Float[np.ndarray, "as bs"]:
        """Cosine of every vector of `a` with every one of `b`."""
        a, b = (np.atleast_2d(np.asarray(x, np.float32)) for x in (a, b))
        unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)  # noqa: E731
        return unit(a) @ unit(b).T

    def save_pretrained(
        self, path: str | os.PathLike[str], *, card: str | None = None, overwrite: bool = False, verify: bool = True
    ) -> Verification | None:
        """Writes a sentence-transformers directory that transformers, vLLM and TEI read too.

        Args:
            card: its README.md; None writes a short one.
            overwrite: replaces what is at `path`.
            verify: where sentence-transformers is installed, loads the directory there and compares.

        Returns:
            The comparison, None where sentence-transformers is not installed or `verify` is off.

        Raises:
            InputError: `path` is not empty and `overwrite` is off.
            ExportError: sentence-transformers reads the directory differently.
        """
        decoder = self.decoder
        rules = decoder.family.weight_map(decoder.config)

        def write_weights(directory: str | os.PathLike[str]) -> None:
            write_safetensors(directory, *iter_huggingface(self._flat_state(), rules, decoder.config.layers))

        write_sentence_transformers(
            path,
            huggingface_config=dict(decoder.huggingface_config),
            tokenizer=self.tokenizer,
            tokenizer_class=decoder.family.tokenizer_class,
            write_weights=write_weights,
            model_card=card or model_card(name=Path(path).name, text_format=self.text_format, dim=self.dim),
            overwrite=overwrite,
        )
        if not verify:
            return None
        plain = Embedder(decoder, self.tokenizer, dtype="float32")
        plain.replace_state(jax.tree.map(lambda x: x.astype(jnp.float32), self._state))
        return verify_export(path, plain.encode, self.tokenizer)

    def _flat_state(self) -> dict[tuple[str, ...], Array]:
        return {tuple(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(self._state)}

    def _embed_all(
        self, texts: Sequence[str], role: RoleName, batch_size: int | None
    ) -> Iterator[tuple[list[int], Float[np.ndarray, "some dim"]]]:
        """Indices and raw vectors of all texts, in the order in which they are computed."""
        longest = self.text_format.max_length
        tokens = batch_size * longest if batch_size else CALL_TOKENS.get(jax.default_backend(), CALL_TOKENS["gpu"])
        shapes = call_shapes(longest, tokens)
        starts = [0, *range(_FIRST_WINDOW, len(texts), _WINDOW), len(texts)]
        windows = [range(a, b) for a, b in pairwise(starts) if a < b]
        waiting: deque[tuple[np.ndarray, Array]] = deque()

        def finished() -> tuple[list[int], Float[np.ndarray, "some dim"]]:
            which, vectors = waiting.popleft()
            return which[which >= 0].tolist(), np.asarray(vectors)[which >= 0]

        with ThreadPoolExecutor(1) as background:
            tokenize = lambda window: self.tokenizer([texts[i] for i in window], role)  # noqa: E731
            ahead = background.submit(tokenize, windows[0]) if windows else None
            for number, window in enumerate(windows):
                assert ahead is not None
                ids = ahead.result()
                ahead = background.submit(tokenize, windows[number + 1]) if number + 1 < len(windows) else None
                for shape, members in plan_calls(np.array([len(x) for x in ids]), shapes):
                    if shape not in self.compiled_shapes:
                        self.compiled_shapes.add(shape)
                        size, count = f"{shape.rows} × {shape.length}", len(self.compiled_shapes)
                        logger.info("compiling for rows of %s tokens, shape %d of %d", size, count, len(shapes))
                    rows = fill_rows(ids, members, shape, self.tokenizer.pad_id)
                    which = np.where(rows.texts >= 0, rows.texts + window.start, -1)
                    waiting.append((which, self._embed(self._state, rows.tokens, rows.segments, rows.last)))
                    if len(waiting) > _IN_FLIGHT:
                        yield finished()
            while waiting:
                yield finished()
