"""`Embedder`: texts in, embeddings out; what notebooks, evaluation and users hold in their hands."""

import dataclasses
import functools
import logging
import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Num
from tqdm import tqdm

from jaxembed import hosts
from jaxembed.checkpoint.directories import Uploads, download, model_path
from jaxembed.checkpoint.export import (
    Verification,
    can_verify,
    edge_texts,
    exported_config,
    verify_export,
    write_sentence_transformers,
)
from jaxembed.checkpoint.hub import check_push, find_directory, push_directory
from jaxembed.checkpoint.huggingface import iter_huggingface, read_config, weights_hash
from jaxembed.checkpoint.model_card import model_card
from jaxembed.checkpoint.peft import base_directory, tokenizer_directory
from jaxembed.checkpoint.pretrained import Decoder, load_decoder
from jaxembed.checkpoint.safetensors import write_safetensors
from jaxembed.errors import InputError
from jaxembed.models import family_of
from jaxembed.models.pooled import check_pooling, pooled_states
from jaxembed.ops.attention import choose_kernel
from jaxembed.quantization import Precision, quantize_embeddings
from jaxembed.sharding import (
    BATCH_AXES,
    Alone,
    Chips,
    check_divisible,
    compute_dtype,
    manual,
    named_shardings,
    partition_specs,
)
from jaxembed.text.format import ROLES, Pooling, RoleName, TextFormat
from jaxembed.text.packing import Rows, RowShape, call_shapes, fill_rows, plan_calls
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
        mesh: of the devices that share each call; None: one device.
        compiled_shapes: the shapes of packed rows that have been compiled so far; at most six for each `batch_size`.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: TextTokenizer,
        *,
        dtype: Any = "auto",
        mesh: Mesh | None = None,
        attention_kernel: str = "auto",
    ) -> None:
        """
        Args:
            dtype: of the computation: "float32", "bfloat16", or "auto" for what suits the device.
            mesh: of the devices that share each call: rows are split over `data` and `fsdp`, weights are put where
                training has them. Every process of a mesh gives the same texts and gets all embeddings. None: the
                default device, or wherever the weights are.
            attention_kernel: "plain", "splash" (TPU) or "flash" (GPU), or "auto" for what suits the device.

        Raises:
            InputError: the tokenizer knows more tokens than the decoder, a pooling that does not suit its attention,
                another dtype, a kernel that does not run here, or a mesh that does not divide the model.
        """
        dtype = _check_dtype(dtype)
        if tokenizer.vocab_size > decoder.config.vocab_size:
            raise InputError(
                f"the tokenizer has {tokenizer.vocab_size:,} tokens, the decoder's vocabulary table only "
                f"{decoder.config.vocab_size:,} rows: they do not belong together"
            )
        pooling = tokenizer.text_format.pooling
        check_pooling(pooling, decoder.config.causal)
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.mesh = mesh
        devices = None if mesh is None else list(mesh.devices.flat)
        self.dtype = compute_dtype(dtype, devices)
        self.attention_kernel = choose_kernel(
            attention_kernel, devices, head_dim=decoder.config.head_dim, dtype=self.dtype
        )
        self.compiled_shapes: set[RowShape] = set()
        self._hash = decoder.weights_hash
        graph, state = nnx.split(decoder.model)
        self._state = self._placed(state)
        self._embed = embedding_function(graph, self._state, pooling, self.dtype, mesh, self.attention_kernel)

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | os.PathLike[str],
        *,
        text_format: TextFormat | Mapping[str, Any] | None = None,
        dtype: Any = "auto",
        mesh: Mesh | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> "Embedder":
        """Loads a Hugging Face or sentence-transformers directory, or a hub id.

        An adapter as PEFT writes it (LoRA) is merged into the base model that it names.

        Args:
            text_format: instead of the one saved with the model; a `TextFormat`, or its keys as in a config.
            dtype: of the computation; parameters are bfloat16 where it is, else float32.
            mesh: of the devices that share each call, as in `Embedder`; None: the default device.
            revision, token, cache_dir, local_files_only: for the hub: branch, tag or commit; access token; where
                downloads lie; take what lies there, ask nobody.

        Raises:
            InputError: the model is not there, damaged, not supported, not divided by the mesh, or has no text format
                and none is given.
        """
        dtype = _check_dtype(dtype)
        find = functools.partial(find_directory, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        directory = find(model_name_or_path, revision=revision)
        base = base_directory(directory, find)
        # Another architecture is the first thing to say.
        family_of(read_config(base), str(base / "config.json"))
        if text_format is not None and not isinstance(text_format, TextFormat):
            text_format = TextFormat.from_dict(text_format, "text_format")
        tokenizer = TextTokenizer.from_directory(tokenizer_directory(directory, base), text_format)
        progress = logger.isEnabledFor(logging.INFO)
        held = compute_dtype(dtype, None if mesh is None else list(mesh.devices.flat))
        decoder = load_decoder(directory, dtype=held, mesh=mesh, progress=progress, base=base)
        return cls(decoder, tokenizer, dtype=dtype, mesh=mesh)

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
        """SHA-256 of the decoder's weights (`WeightsHash`), as they are in the checkpoint, whatever they were cast to.

        The same for a Hugging Face directory, its Orbax form and every other container of the same tensors. Of several
        processes that share the mesh each has to ask.
        """
        if not isinstance(self._hash, str):
            self._hash = self._held_hash() if self._hash is None else self._hash()
        return self._hash

    def replace_state(self, state: nnx.State) -> None:
        """Puts other weights in place of the present ones, without compiling again."""
        self._state = self._placed(state)
        self._hash = None

    def _placed(self, state: nnx.State) -> nnx.State:
        """The weights on the mesh, by the rules table."""
        if self.mesh is None:
            return state
        check_divisible(state, self.mesh)
        return hosts.put_tree(state, named_shardings(partition_specs(state), self.mesh))

    @overload
    def encode(self, sentences: str, *args: Any, **kwargs: Any) -> Num[np.ndarray, " width"]: ...
    @overload
    def encode(self, sentences: Iterable[str], *args: Any, **kwargs: Any) -> Num[np.ndarray, "texts width"]: ...

    def encode(
        self,
        sentences: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        *,
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
        precision: Precision = "float32",
        ranges: Float[np.ndarray, "2 dim"] | None = None,
        calibration_embeddings: Float[np.ndarray, "samples dim"] | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Num[np.ndarray, "*texts width"]:
        """Embeds texts, in their order; equal texts are computed once.

        Args:
            sentences: one text, or any number of them. An empty text is a text like any other.
            prompt_name: the role, "query" or "document"; None is "query", also for symmetric tasks.
            prompt: text to put before each text instead of the role's prompt, such as an instruction. Where roles have
                markers (a suffix), the role's prefix stays before it.
            batch_size: rows of the longest length computed at once; None chooses for the device.
            show_progress_bar: None shows one for more than a thousand texts where INFO is logged.
            normalize_embeddings: unit length; None as the text format has it.
            truncate_dim: keeps the first dimensions only, and scales those to unit length where asked for.
            precision: float32, int8, uint8, binary or ubinary: what `quantize_embeddings` makes of the vectors, cut and
                scaled.
            ranges, calibration_embeddings: for int8 and uint8, as in `quantize_embeddings`; without them the ranges are
                those of this call's embeddings.
            progress: is called now and then with how many more texts are done, and how many tokens were computed.

        Returns:
            In `precision`, float32 by default; one vector for one text.

        Raises:
            InputError: something is not a text, an unknown role or precision, a number out of its range, or ranges that
                do not fit.
        """
        one = isinstance(sentences, str)
        texts = _checked([sentences] if one else sentences)
        role = cast(RoleName, "query" if prompt_name is None else prompt_name)
        self.text_format.role(role)  # refuses another name
        dim = self.dim if truncate_dim is None else _whole_number("truncate_dim", truncate_dim, self.dim)
        quantize = functools.partial(
            quantize_embeddings, precision=precision, ranges=ranges, calibration_embeddings=calibration_embeddings
        )
        quantize(np.empty((0, dim), np.float32))  # what is wrong with the arguments is said before the long part
        if batch_size is not None:
            _whole_number("batch_size", batch_size)
        if not isinstance(prompt, str | None):
            raise InputError(f"prompt: expected a string, got {type(prompt).__name__}: {prompt!r:.80}")
        tokenizer = self.tokenizer if prompt is None else _with_prompt(self.tokenizer, role, prompt)
        normalize = self.text_format.normalize if normalize_embeddings is None else normalize_embeddings
        if show_progress_bar is None:
            show_progress_bar = len(texts) > 1000 and logger.isEnabledFor(logging.INFO)
        distinct = list(dict.fromkeys(texts))
        out = np.empty((len(distinct), dim), np.float32)
        with tqdm(total=len(distinct), unit="text", desc="encode", disable=not show_progress_bar) as bar:
            for places, vectors, tokens in self._embed_all(distinct, tokenizer, role, batch_size):
                out[places] = vectors[:, :dim]
                bar.update(len(places))
                if progress is not None:
                    progress(len(places), tokens)
        if progress is not None and len(distinct) != len(texts):
            progress(len(texts) - len(distinct), 0)
        if normalize:
            out = _unit(out)
        if len(distinct) != len(texts):
            place = {text: index for index, text in enumerate(distinct)}
            out = out[[place[text] for text in texts]]
        if precision != "float32":
            out = quantize(out)
        return out[0] if one else out

    def encode_query(self, sentences: str | Iterable[str], **kwargs: Any) -> Num[np.ndarray, "*texts width"]:
        """`encode` in the role of a query."""
        return self.encode(sentences, "query", **kwargs)

    def encode_document(self, sentences: str | Iterable[str], **kwargs: Any) -> Num[np.ndarray, "*texts width"]:
        """`encode` in the role of a document."""
        return self.encode(sentences, "document", **kwargs)

    def similarity(self, a: Float[np.ndarray, "*a dim"], b: Float[np.ndarray, "*b dim"]) -> Float[np.ndarray, "as bs"]:
        """Cosine of every vector of `a` with every one of `b`.

        Raises:
            InputError: the two are not vectors of one width, or they are quantised.
        """
        a, b = _float_vectors(a), _float_vectors(b)
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
            raise InputError(f"similarity: expected embeddings of one width, found shapes {a.shape} and {b.shape}")
        return _unit(a) @ _unit(b).T

    def save_pretrained(
        self, path: str | os.PathLike[str], *, card: str | None = None, overwrite: bool = False, verify: bool = True
    ) -> Verification | None:
        """Writes a sentence-transformers directory that transformers and vLLM read too.

        Weights are written in the dtype in which they are held, `config.json` with the keys that it was read with. Of
        several processes that share the mesh each makes this call; process 0 gathers, tensor by tensor, and writes.
        In a bucket each process writes some files of the weights, by way of a temporary directory.

        Args:
            path: local, or in a bucket (`gs://…`).
            card: its README.md; None writes a short one.
            overwrite: replaces the model that is at `path`.
            verify: where sentence-transformers is installed, loads the directory there and compares.

        Returns:
            The comparison, None where sentence-transformers is not installed or `verify` is off.

        Raises:
            InputError: `path` is not empty and `overwrite` is off, or it holds more than a model.
            ExportError: sentence-transformers reads the directory differently.
        """
        path = model_path(path)
        if isinstance(path, Path):
            path = path.absolute()
        decoder = self.decoder
        rules = decoder.family.weight_map(decoder.config)
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(self._state)}

        def write_weights(directory: str | os.PathLike[str]) -> None:
            weights = iter_huggingface(self._flat_state(), rules, decoder.config.layers)
            if isinstance(path, Path):
                write_safetensors(directory, *weights)
                return
            hosts.barrier("the bucket is ready")
            number, writers = jax.process_index() % hosts.count(), hosts.count()
            with Uploads(path) as uploads:
                write_safetensors(directory, *weights, take=uploads, writer=number, writers=writers)
            hosts.barrier("the bucket has the weights")

        card = card or self._card(path.name)
        if hosts.is_main():
            write_sentence_transformers(
                path,
                huggingface_config=exported_config(decoder.huggingface_config, dtypes),
                tokenizer=self.tokenizer,
                tokenizer_class=decoder.family.tokenizer_class,
                write_weights=write_weights,
                model_card=card,
                overwrite=overwrite,
            )
        elif not isinstance(path, Path):
            with tempfile.TemporaryDirectory(prefix="jaxembed-") as scratch:
                write_weights(scratch)
        else:  # its parts of each tensor go to process 0
            deque(iter_huggingface(self._flat_state(), rules, decoder.config.layers)[1], maxlen=0)
        if not hosts.anyone("verify", verify and hosts.is_main() and can_verify()):
            return None
        plain = Embedder(decoder, self.tokenizer, dtype="float32", mesh=self.mesh)
        plain.replace_state(jax.tree.map(lambda x: x.astype(jnp.float32), self._state))

        def encode(texts: list[str], role: RoleName) -> Float[np.ndarray, "texts dim"]:
            hosts.barrier(f"verify {role}")
            return plain.encode(texts, role)

        if hosts.is_main():
            if isinstance(path, Path):
                return verify_export(path, encode, self.tokenizer)
            with tempfile.TemporaryDirectory(prefix="jaxembed-") as scratch:
                download(path, Path(scratch))
                return verify_export(scratch, encode, self.tokenizer, os.fspath(path))
        for role in ROLES:
            encode(edge_texts(self.text_format), role)
        return None

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str = "Add a jaxembed model",
        exist_ok: bool = False,
        replace_model_card: bool = False,
        revision: str | None = None,
        create_pr: bool = False,
        card: str | None = None,
    ) -> str:
        """Saves the model, verified as by `save_pretrained`, and uploads it to the Hugging Face hub in one commit.

        Args:
            repo_id: owner/name; made where it is not there.
            card: its README.md, also where the repository has one; None writes a short one where it has none.
            token, private, commit_message, exist_ok, replace_model_card, revision, create_pr: as in `push_directory`
                of `jaxembed.checkpoint.hub`, which uploads a directory that is saved already.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            InputError: no token, no permission, no hub id, or the repository is there and `exist_ok` is off.
            ExportError: sentence-transformers reads the model differently; nothing was uploaded.
        """
        check_push(repo_id, token=token, revision=revision, create_pr=create_pr)
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch) / "model"
            self.save_pretrained(directory, card=card or self._card(repo_id))
            return push_directory(
                directory,
                repo_id,
                token=token,
                private=private,
                commit_message=commit_message,
                exist_ok=exist_ok,
                replace_model_card=replace_model_card or card is not None,
                revision=revision,
                create_pr=create_pr,
            )

    def _card(self, name: str) -> str:
        return model_card(
            name=name,
            text_format=self.text_format,
            dim=self.dim,
            weights_hash=self._held_hash(),
            causal=self.decoder.config.causal,
        )

    def _held_hash(self) -> str:
        decoder = self.decoder
        return weights_hash(self._flat_state(), decoder.family.weight_map(decoder.config), decoder.config.layers)

    def _flat_state(self) -> dict[tuple[str, ...], Array]:
        return {tuple(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(self._state)}

    def _call_shapes(self, batch_size: int | None) -> tuple[RowShape, ...]:
        longest = self.text_format.max_length
        devices = jax.devices() if self.mesh is None else list(self.mesh.devices.flat)
        chips = 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        tokens = CALL_TOKENS.get(devices[0].platform, CALL_TOKENS["gpu"])
        return call_shapes(longest, -(-batch_size // chips) * longest if batch_size else tokens, chips)

    def _on_chips(self, rows: Rows) -> list[Any]:
        """What the decoder takes of rows that every process has; on a mesh, split over its chips."""
        arrays = [rows.tokens, rows.segments, rows.first, rows.last]
        if self.mesh is None:
            return arrays
        split = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))
        return [hosts.put(array, split) for array in arrays]

    def _embed_all(
        self, texts: Sequence[str], tokenizer: TextTokenizer, role: RoleName, batch_size: int | None
    ) -> Iterator[tuple[list[int], Float[np.ndarray, "some dim"], int]]:
        """Indices, raw vectors and tokens of all texts, in the order in which they are computed."""
        shapes = self._call_shapes(batch_size)
        starts = [0, *range(_FIRST_WINDOW, len(texts), _WINDOW), len(texts)]
        windows = [range(a, b) for a, b in pairwise(starts) if a < b]
        waiting: deque[tuple[np.ndarray, Array, int]] = deque()
        skipped = tokenizer.skipped(role)

        def finished() -> tuple[list[int], Float[np.ndarray, "some dim"], int]:
            which, vectors, tokens = waiting.popleft()
            return which[which >= 0].tolist(), np.asarray(vectors)[which >= 0], tokens

        def tokenize(window: range) -> list[np.ndarray]:
            return tokenizer([texts[index] for index in window], role)

        with ThreadPoolExecutor(1) as background:
            ahead = background.submit(tokenize, windows[0]) if windows else None
            for number, window in enumerate(windows):
                assert ahead is not None
                ids = ahead.result()
                ahead = background.submit(tokenize, windows[number + 1]) if number + 1 < len(windows) else None
                for shape, members in plan_calls(np.array([len(x) for x in ids]), shapes):
                    if shape not in self.compiled_shapes:
                        self.compiled_shapes.add(shape)
                        size, count = f"{shape.rows} × {shape.length}", len(self.compiled_shapes)
                        logger.info("compiling for rows of %s tokens, shape %d", size, count)
                    rows = fill_rows(ids, members, shape, tokenizer.pad_id, [skipped] * len(ids))
                    which = np.where(rows.texts >= 0, rows.texts + window.start, -1)
                    vectors = self._embed(self._state, *self._on_chips(rows))
                    waiting.append((which, vectors, int(np.count_nonzero(rows.segments))))
                    if len(waiting) > _IN_FLIGHT:
                        yield finished()
            while waiting:
                yield finished()


def embedding_function(
    graph: nnx.GraphDef,
    state: nnx.State,
    pooling: Pooling,
    dtype: Any,
    mesh: Mesh | None,
    attention_kernel: str = "plain",
) -> Callable[..., Float[Array, "rows slots dim"]]:
    """Compiled: (weights, `tokens`, `segments`, `first` and `last` of packed rows) → the vector of every slot.

    Args:
        state: real or abstract weights; only their axes are read.
        mesh: over which rows and weights are split; every device gets all vectors, so that each process can read them.
        attention_kernel: one of `ops.attention.KERNELS`.
    """
    hooks = Alone() if mesh is None else Chips()

    def embed(
        state: nnx.State, tokens: Array, segments: Array, first: Array, last: Array
    ) -> Float[Array, "rows slots dim"]:
        model = nnx.merge(graph, state)
        return pooled_states(
            model, tokens, segments, first, last, pooling,
            dtype=dtype, hooks=hooks, attention_kernel=attention_kernel,
        )  # fmt: skip

    if mesh is None:
        return jax.jit(embed)
    rows = PartitionSpec(BATCH_AXES)
    on_chips = jax.shard_map(
        embed,
        mesh=mesh,
        in_specs=(manual(partition_specs(state)), rows, rows, rows, rows),
        out_specs=rows,
        axis_names=set(BATCH_AXES),
        check_vma=False,  # as in training, where a Pallas kernel may run inside
    )
    return hosts.compiled_together(jax.jit(on_chips, out_shardings=NamedSharding(mesh, PartitionSpec())))


def _checked(sentences: Any) -> list[str]:
    """Any iterable of texts as a list of them."""
    if isinstance(sentences, bytes | Mapping | Set) or not isinstance(sentences, Iterable):
        raise InputError(f"sentences: expected a text or a list of texts, got {type(sentences).__name__}")
    if isinstance(sentences, np.ndarray) and sentences.ndim != 1:
        raise InputError(f"sentences: expected a list of texts, got an array of shape {sentences.shape}")
    texts = list(sentences)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"sentences[{index}]: expected a string, got {type(text).__name__}: {text!r:.80}")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"sentences[{index}]: not valid Unicode: {error}") from None
    return texts


def _float_vectors(embeddings: Any) -> Float[np.ndarray, "texts dim"]:
    try:
        array = np.asarray(embeddings)
        if array.dtype not in (np.int8, np.uint8):
            return np.atleast_2d(array.astype(np.float32))
    except ValueError as error:
        raise InputError(f"similarity: expected embeddings, of texts that `encode` was given: {error}") from None
    raise InputError(f"similarity: expected float embeddings, found {array.dtype}; quantised ones have no cosine")


def _whole_number(name: str, value: Any, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1 or (most and value > most):
        expected = f"from 1 to {most}" if most else "of at least 1"
        raise InputError(f"{name}: expected a whole number {expected}, found {value!r}")
    return int(value)


def _check_dtype(dtype: Any) -> str:
    names = ("auto", "float32", "bfloat16")
    try:
        name = dtype if dtype in names else jnp.dtype(dtype).name
    except TypeError:
        name = None
    if dtype is None or name not in names:
        raise InputError(f"dtype: expected {', '.join(names[:-1])} or {names[-1]}, found {dtype!r}")
    return name


@functools.lru_cache(maxsize=2)
def _with_prompt(tokenizer: TextTokenizer, role: RoleName, prompt: str) -> TextTokenizer:
    """The same tokenizer with another prompt in a role, where sentence-transformers would put it."""
    own = tokenizer.text_format.role(role)
    if own.suffix:
        changed = dataclasses.replace(own, instruction=prompt.removeprefix(own.prefix)) if prompt else own
    else:
        changed = dataclasses.replace(own, prefix=prompt, instruction="")
    return tokenizer.with_format(dataclasses.replace(tokenizer.text_format, **{role: changed}))


def _unit(vectors: Float[np.ndarray, "texts dim"]) -> Float[np.ndarray, "texts dim"]:
    """To unit length; in numpy, for JAX would compile it for every number of texts."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32(1e-12))
