"""What a run needs before its first step: examples, tokenizer, decoder, batches. Each from the config alone."""

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from jaxembed.checkpoint.hub import find_directory
from jaxembed.checkpoint.pretrained import Decoder, load_decoder, random_decoder
from jaxembed.config import DataConfig, JsonlSource, PythonSource, RoleConfig, TrainConfig
from jaxembed.data.loader import CHUNK_TOKENS, Batches, RowLayout, choose_layout, sample_lengths, tokenize_examples
from jaxembed.data.plan import run_plan
from jaxembed.data.python_source import harvest_python
from jaxembed.data.sources import Examples, read_jsonl, summary
from jaxembed.errors import InputError
from jaxembed.models import FAMILIES, Family
from jaxembed.text.format import DEFAULT_TEXT_FORMAT, Role, TextFormat, write_json
from jaxembed.text.tokenizer import TextTokenizer, load_tokenizer, train_byte_level_bpe, with_end_token

logger = logging.getLogger(__name__)

DENSE = 0.85
"""Density of the rows below which a run warns."""


def read_sources(sources: Sequence[JsonlSource | PythonSource], config: DataConfig) -> list[Examples]:
    """The examples of each source, with one logged line of counts for each.

    Raises:
        InputError: a source that is missing, empty, or has a bad row while `data.bad_rows` is "error".
    """
    found = []
    for source in sources:
        if isinstance(source, JsonlSource):
            examples = read_jsonl(
                source.path,
                name=source.name,
                anchor=source.anchor,
                positive=source.positive,
                negatives=source.negatives,
                bad_rows=config.bad_rows,
            )
        else:
            examples = harvest_python(
                name=source.name,
                path=source.path,
                packages=source.packages,
                held_out=source.held_out,
                part=source.part,
            )
        logger.info("%s", summary(examples))
        found.append(examples)
    return found


def configured_format(config: TrainConfig) -> TextFormat | None:
    """The text format of the config, None where it leaves it to the model."""
    section = config.text_format
    if section is None:
        return None

    def role(values: RoleConfig) -> Role:
        return Role(values.prefix, values.suffix, values.instruction)

    return TextFormat(
        query=role(section.query),
        document=role(section.document),
        max_length=section.max_length,
        pooling=section.pooling,
        normalize=section.normalize,
        literal_markers=section.literal_markers,
    )


def prepare_tokenizer(
    config: TrainConfig, examples: Sequence[Examples], saved: epath.Path, *, resume: bool = False
) -> TextTokenizer:
    """The model's tokenizer, a given one, or one trained on the training texts; kept in `saved` for a resumed run."""
    if resume:
        return TextTokenizer.from_directory(saved)
    text_format = configured_format(config)
    if config.model.path is not None:
        tokenizer = _tokenizer_of_model(find_directory(config.model.path), text_format)
    else:
        text_format = text_format or DEFAULT_TEXT_FORMAT
        if config.tokenizer.path is not None:
            path = epath.Path(config.tokenizer.path)
            raw = load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)
        else:
            assert config.tokenizer.train_vocab_size is not None
            texts = (text for source in examples for column in (source.anchors, source.positives) for text in column)
            raw = train_byte_level_bpe(
                texts, config.tokenizer.train_vocab_size, split_identifiers=config.tokenizer.split_identifiers
            )
        tokenizer = TextTokenizer(raw, text_format)
    saved.mkdir(parents=True, exist_ok=True)
    tokenizer.save(saved)
    write_json(saved / "tokenizer_config.json", tokenizer.special_tokens)
    return tokenizer


def _tokenizer_of_model(directory: Path, text_format: TextFormat | None) -> TextTokenizer:
    """In the given format, else the directory's own, else the default one, with an end token where there is none."""
    if text_format is None:
        try:
            return TextTokenizer.from_directory(directory)
        except InputError as error:
            logger.info("%s; using the default text format", error)
            text_format = DEFAULT_TEXT_FORMAT
    try:
        return TextTokenizer.from_directory(directory, text_format)
    except InputError:
        end = "</s>"
        raw = load_tokenizer(directory / "tokenizer.json")
        if text_format.has_suffixes or raw.token_to_id(end) is None:
            raise
        logger.info("the tokenizer adds no end token; every text will end with %s", end)
        return TextTokenizer(with_end_token(raw, end), text_format)


def prepare_decoder(config: TrainConfig, tokenizer: TextTokenizer, mesh: Mesh, dtype: Any) -> Decoder:
    """The decoder to train, loaded or with random weights, its parameters in `dtype`."""
    if config.model.path is not None:
        return load_decoder(find_directory(config.model.path), dtype=dtype, mesh=mesh)
    return random_decoder(*scratch_decoder(config, tokenizer), config.seed, mesh)


def scratch_decoder(config: TrainConfig, tokenizer: TextTokenizer) -> tuple[Family, Any]:
    """Family and shape of the decoder that `model.scratch` describes."""
    scratch = config.model.scratch
    assert scratch is not None
    family = FAMILIES[scratch.family]
    vocab_size = scratch.vocab_size or -(-tokenizer.vocab_size // 8) * 8
    if vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"model.scratch.vocab_size: {vocab_size:,} rows are too few for {tokenizer.vocab_size:,} tokens"
        )
    shape = family.config(
        vocab_size=vocab_size,
        dim=scratch.dim,
        layers=scratch.layers,
        heads=scratch.heads,
        epsilon=scratch.layer_norm_epsilon,
        initializer_range=scratch.initializer_range,
    )
    return family, shape


def parameter_dtype(config: TrainConfig) -> Any:
    """What is loaded: float32 where everything trains, what the config says for a frozen base."""
    frozen = config.training.trainable != "full"
    return jnp.dtype("float32" if config.model.param_dtype == "auto" or not frozen else config.model.param_dtype)


def prepare_batches(
    config: TrainConfig, examples: Sequence[Examples], tokenizer: TextTokenizer, mesh: Mesh, dim: int
) -> Batches:
    """Tokenises what is not in the cache, draws the plan, chooses the layout.

    Raises:
        InputError: fewer pairs than a batch, or a batch or row length that does not fit mesh and texts.
    """
    chips = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.training.batch_size % chips:
        raise InputError(
            f"training.batch_size: {config.training.batch_size} is not a multiple of the {chips} devices "
            "that share the batch (mesh.data × mesh.fsdp)"
        )
    cache_dir = os.path.expanduser(config.data.cache_dir or "~/.cache/jaxembed/tokens")
    weights = [source.weight for source in config.data.train]
    held = max((len(row) for source in examples for row in source.negatives), default=0)
    negatives = held if config.training.negatives is None else config.training.negatives
    if negatives > held:
        raise InputError(f"training.negatives: {negatives} hard negatives a query, but the sources have {held} at most")
    table, data_sets = tokenize_examples(examples, weights, tokenizer, cache_dir, negatives)
    schedule = run_plan(
        data_sets,
        table.hashes,
        config.training.batch_size,
        config.seed,
        epochs=config.training.epochs,
        steps=config.training.steps,
    )
    texts = np.concatenate([data_set.texts for data_set in data_sets])
    which = np.repeat(np.arange(len(data_sets)), [len(data_set.texts) for data_set in data_sets])
    longest = int(table.lengths.max())
    if config.training.row_length is not None and config.training.row_length < longest:
        raise InputError(
            f"training.row_length: {config.training.row_length} is shorter than the longest text, {longest} tokens; "
            "raise it or lower text_format.max_length"
        )
    lengths = sample_lengths(schedule, table, texts)
    choose = partial(
        choose_layout,
        lengths,
        chips=chips,
        dim=dim,
        chunk_tokens=CHUNK_TOKENS.get(jax.default_backend(), CHUNK_TOKENS["gpu"]),
    )
    layout = choose(row_length=config.training.row_length, chunk_rows=config.training.chunk_rows)
    if layout.density < DENSE:
        logger.warning("%s", _sparse(layout, choose, config.training.chunk_rows))
    return Batches(schedule, table, texts, which, layout, tokenizer.pad_id)


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
