"""What a run needs beside its texts before the first step, from the config alone: decoder, loss, batches."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int

from jaxembed import hosts
from jaxembed.checkpoint.hub import find_directory
from jaxembed.checkpoint.peft import base_config, base_directory
from jaxembed.checkpoint.pretrained import Decoder, load_decoder, random_decoder
from jaxembed.config import (
    EMBEDDING_KINDS,
    SetLossConfig,
    Source,
    TrainConfig,
)
from jaxembed.data.loader import (
    CHUNK_TOKENS,
    Batches,
    RowLayout,
    choose_layout,
    sample_lengths,
)
from jaxembed.data.plan import Mixing, run_plan
from jaxembed.data.sources import Examples
from jaxembed.data.teacher import TeacherEmbeddings, open_teacher
from jaxembed.errors import InputError
from jaxembed.models import FAMILIES, Family, family_of
from jaxembed.models.pooled import check_pooling
from jaxembed.sharding import chips_of_process, compute_dtype, named_shardings, partition_specs
from jaxembed.text.format import TextFormat
from jaxembed.text.tokenizer import TextTokenizer
from jaxembed.training.filters import with_parts
from jaxembed.training.objective import LossOptions, SetLoss
from jaxembed.training.texts import prepare_texts, train_token_ids

logger = logging.getLogger(__name__)

DENSE = 0.85
"""Density of the rows below which a run warns."""


def prepare_decoder(config: TrainConfig, tokenizer: TextTokenizer, mesh: Mesh, dtype: Any) -> Decoder:
    """The decoder to train, loaded or with random weights, its parameters in `dtype`.

    Raises:
        InputError: it cannot be loaded, the mesh does not divide it, or the pooling does not suit its attention.
    """
    if config.model.path is not None:
        directory = find_directory(config.model.path)
        decoder = load_decoder(
            directory, dtype=dtype, mesh=mesh, attention=config.model.attention, progress=hosts.is_main()
        )
    else:
        decoder = random_decoder(*scratch_decoder(config, tokenizer.vocab_size), config.seed, mesh)
    check_pooling(tokenizer.text_format.pooling, decoder.config.causal)
    return decoder


def prepare_parts(config: TrainConfig, decoder: Decoder, tokenizer: TextTokenizer, mesh: Mesh) -> Decoder:
    """The decoder with parameters of their own for what trains in part, each where it will live.

    Raises:
        InputError: `training` names a token that the tokenizer does not have, or more layers than there are.
    """
    tokens = train_token_ids(config.training, tokenizer)
    model = with_parts(decoder.model, config.training, decoder.config.layers, tokens, config.seed)
    if model is decoder.model:
        return decoder
    graph, state = nnx.split(model)
    state = hosts.put_tree(state, named_shardings(partition_specs(state), mesh))
    return dataclasses.replace(decoder, model=nnx.merge(graph, state))


def scratch_decoder(config: TrainConfig, tokens: int) -> tuple[Family, Any]:
    """Family and shape of the decoder that `model.scratch` describes, for a tokenizer of so many tokens.

    Raises:
        InputError: more tokens than the rows that it gives the vocabulary table.
    """
    scratch = config.model.scratch
    assert scratch is not None
    family = FAMILIES[scratch.family]
    vocab_size = scratch.vocab_size or -(-tokens // 8) * 8
    if vocab_size < tokens:
        raise InputError(f"model.scratch.vocab_size: {vocab_size:,} rows are too few for {tokens:,} tokens")
    shape = family.config(
        vocab_size=vocab_size,
        dim=scratch.dim,
        layers=scratch.layers,
        heads=scratch.heads,
        epsilon=scratch.layer_norm_epsilon,
        initializer_range=scratch.initializer_range,
        causal=config.model.attention != "bidirectional",
    )
    return family, shape


def parameter_dtype(config: TrainConfig) -> Any:
    """What is loaded: float32 where everything trains, what the config says for a frozen base."""
    frozen = config.training.trainable != "full"
    return jnp.dtype("float32" if config.model.param_dtype == "auto" or not frozen else config.model.param_dtype)


def loss_options(config: TrainConfig, examples: Sequence[Examples], text_format: TextFormat, dim: int) -> LossOptions:
    """The loss of every data set, and how it is computed.

    Raises:
        InputError: a loss that its data has not what it takes for, or Matryoshka dimensions that the model has not.
    """
    loss = config.loss
    sets = tuple(
        _set_loss(config, source, found, f"data.train.{number}")
        for number, (source, found) in enumerate(zip(config.data.train, examples))
    )
    if loss.learn_temperature and not any(
        each.contrastive_weight and each.contrastive_temperature is None for each in sets
    ):
        raise InputError("loss.learn_temperature: no source has InfoNCE at the run's temperature, to train it")
    wide = [size for size in loss.matryoshka_dims if size > dim]
    if wide:
        raise InputError(f"loss.matryoshka_dims: {wide[0]}, but embeddings have {dim} dimensions")
    if loss.matryoshka_dims and dim not in loss.matryoshka_dims:
        logger.warning("loss.matryoshka_dims lacks %d, all dimensions: the whole embedding is not trained", dim)
    return LossOptions(
        temperature=loss.temperature,
        least_temperature=loss.least_temperature,
        tile=loss.tile,
        dtype=compute_dtype(config.model.compute_dtype),
        chunk_checkpoint=config.training.chunk_checkpoint,
        layer_checkpoint=config.model.layer_checkpoint,
        data_sets=len(examples),
        pooling=text_format.pooling,
        sets=sets,
        mask_duplicates=loss.mask_duplicates,
        mask_known=loss.mask_known,
        spread_out=loss.spread_out,
        spread_out_mean=loss.spread_out_mean,
        matryoshka=tuple(zip(loss.matryoshka_dims, loss.matryoshka_weights or [1.0] * len(loss.matryoshka_dims))),
    )


def _set_loss(config: TrainConfig, source: Source, examples: Examples, key: str) -> SetLoss:
    run, own = config.loss, source.loss or SetLossConfig()
    negatives = config.training.negatives != 0 and bool(examples.negative_counts.any())
    kind = own.kind or ("cosent" if examples.graded else "info_nce")
    if kind in ("cosent", "kl", "margin_mse") and examples.scores is None:
        raise InputError(f"{key}.loss.kind: {kind} needs scores, and {examples.name} has none")
    if kind in ("kl", "margin_mse") and (examples.graded or not negatives):
        raise InputError(f"{key}.loss.kind: {kind} needs hard negatives with scores, and {examples.name} has none")
    compares = kind != "cosent" and (kind not in EMBEDDING_KINDS or own.info_nce_weight)
    if not source.in_batch and compares and not negatives:
        raise InputError(f"{key}.in_batch: false leaves a query its hard negatives, and {examples.name} has none")

    def of(name: str) -> Any:
        value = getattr(own, name)
        return getattr(run, name) if value is None else value

    return SetLoss(
        kind=kind,
        weight=own.weight,
        temperature=own.temperature,
        teacher_temperature=own.teacher_temperature or 1.0,
        info_nce_weight=own.info_nce_weight,
        in_batch=source.in_batch,
        hard_negatives=of("hard_negatives"),
        query_query=of("query_query"),
        document_document=of("document_document"),
        document_query=of("document_query"),
        margin=of("mask_margin"),
        focal=of("focal_gamma"),
    )


def model_dim(config: TrainConfig) -> int:
    """Dimensions of the decoder that the config names, without reading its weights."""
    if config.model.scratch is not None:
        return config.model.scratch.dim
    assert config.model.path is not None
    directory = find_directory(config.model.path)
    described = base_config(directory, base_directory(directory))
    return family_of(described).config.from_huggingface(described).dim


def open_teachers(
    sources: Sequence[Source], examples: Sequence[Examples], dim: int
) -> tuple[TeacherEmbeddings | None, ...]:
    """The teacher's embeddings of the sources that have them; see `open_teacher`."""
    found = []
    for number, (source, own) in enumerate(zip(sources, examples)):
        given = source.teacher_embeddings
        if given is None:
            found.append(None)
            continue
        files = given.model_dump(exclude={"truncate_dim"}, exclude_none=True)
        key = f"data.train.{number}.teacher_embeddings"
        found.append(open_teacher(files, own.rows, own.name, key, dim=dim, truncate_dim=given.truncate_dim))
    return tuple(found)


def _scores(examples: Sequence[Examples], columns: int) -> Float[np.ndarray, "examples columns"] | None:
    """The scores of all examples, of so many documents at most; None where no source has any."""
    if all(found.scores is None for found in examples):
        return None
    scores = np.full((sum(map(len, examples)), columns), np.nan, np.float32)
    start = 0
    for found in examples:
        if found.scores is not None:
            given = found.scores[:, :columns]
            scores[start : start + len(found), : given.shape[1]] = given
        start += len(found)
    return scores


def prepare_batches(
    config: TrainConfig,
    examples: Sequence[Examples],
    tokenizer: TextTokenizer,
    mesh: Mesh,
    dim: int,
    platform: str | None = None,
) -> Batches:
    """Tokenises what is not in the cache, draws the plan, chooses the layout.

    Args:
        platform: of the devices; None: the default one's.

    Raises:
        InputError: fewer pairs than a batch, or a batch or row length that does not fit mesh and texts.
    """
    chips = mesh.shape["data"] * mesh.shape["fsdp"]
    check_batch_size(config, chips)
    teachers = open_teachers(config.data.train, examples, dim)
    table, data_sets = prepare_texts(config, examples, tokenizer)
    schedule = run_plan(
        data_sets,
        table.hashes,
        config.training.batch_size,
        config.seed,
        epochs=config.training.epochs,
        steps=config.training.steps,
        mixing=Mixing(config.data.batches == "homogeneous", config.data.cap),
    )
    texts = np.concatenate([data_set.texts for data_set in data_sets])
    which = np.repeat(np.arange(len(data_sets)), [len(data_set.texts) for data_set in data_sets])
    layout = run_layout(config, sample_lengths(schedule, table, texts), chips, dim, platform)
    rotations = tuple(data_set.rotation for data_set in data_sets)
    widths = [0 if each is None else each.negatives.shape[1] for each in rotations]
    scores = _scores(examples, 1 + max(texts.shape[1] - 2, *widths))
    mine = chips_of_process(mesh) if hosts.count() > 1 else None
    return Batches(schedule, table, texts, which, layout, tokenizer.pad_id, scores, rotations, teachers, mine)


def check_batch_size(config: TrainConfig, chips: int) -> None:
    """
    Raises:
        InputError: the batch is no multiple of the devices that share it.
    """
    if config.training.batch_size % chips:
        raise InputError(
            f"training.batch_size: {config.training.batch_size} is not a multiple of the {chips} devices "
            "that share the batch (mesh.data × mesh.fsdp)"
        )


def run_layout(
    config: TrainConfig,
    lengths: Sequence[Int[np.ndarray, " texts"]],
    chips: int,
    dim: int,
    platform: str | None = None,
) -> RowLayout:
    """The rows of a run, for a sample of batches given as the lengths of their texts, the longest of all among them.

    Args:
        platform: of the devices; None: the default one's.

    Raises:
        InputError: the configured rows are too short.
    """
    longest = max(int(some.max()) for some in lengths)
    if config.training.row_length is not None and config.training.row_length < longest:
        raise InputError(
            f"training.row_length: {config.training.row_length} is shorter than the longest text, {longest} tokens; "
            "raise it or lower text_format.max_length"
        )
    choose = partial(
        choose_layout,
        lengths,
        chips=chips,
        dim=dim,
        chunk_tokens=CHUNK_TOKENS.get(platform or jax.default_backend(), CHUNK_TOKENS["gpu"]),
    )
    layout = choose(row_length=config.training.row_length, chunk_rows=config.training.chunk_rows)
    if layout.density < DENSE:
        logger.warning("%s", _sparse(layout, choose, config.training.chunk_rows))
    return layout


def _sparse(layout: RowLayout, choose: Callable[..., RowLayout], chunk_rows: int | None) -> str:
    """What is said of a layout below `DENSE`: which other one does better, or why none does.

    Args:
        choose: (row_length, chunk_rows) → layout, for the texts and devices of the run.
        chunk_rows: as configured.
    """
    said = f"expected density {layout.density:.2f}: many of the computed positions hold no token; "
    better = choose(row_length=None, chunk_rows=chunk_rows)
    if better.density >= layout.density + 0.02:
        return f"{said}training.row_length: {better.row_length} (or null) would have {better.density:.2f}"
    said += "no row length does better for the work it costs"
    if layout.filled < layout.density / layout.filled:  # the smaller share is what to mend
        return f"{said}: they fill {layout.filled:.0%} of the rows they need"
    at_once = layout.chips * layout.chunk_rows
    said += f": a batch needs too few rows for {layout.chips} device(s) × {layout.chunk_rows} at once; "
    halves = (layout.chunk_rows >> shift for shift in range(1, layout.chunk_rows.bit_length()))
    fewer = [choose(row_length=layout.row_length, chunk_rows=rows) for rows in halves]
    denser = next((each for each in fewer if each.density >= DENSE), fewer[-1] if fewer else layout)
    if denser.density >= layout.density + 0.02:
        said += f"training.chunk_rows: {denser.chunk_rows} would have {denser.density:.2f}, "
    return f"{said}a larger training.batch_size or fewer devices would fill those {at_once}"
