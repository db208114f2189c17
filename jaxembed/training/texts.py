"""The texts of a run, from the config alone: its sources as examples, its tokenizer, all of them as token ids."""

import dataclasses
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from etils import epath

from jaxembed.checkpoint.hub import find_directory
from jaxembed.checkpoint.huggingface import read_config
from jaxembed.checkpoint.peft import base_directory, tokenizer_directory
from jaxembed.config import (
    BeirSource,
    DataConfig,
    JsonlSource,
    RoleConfig,
    Source,
    TfdsSource,
    TrainConfig,
    TrainingConfig,
)
from jaxembed.data.beir import read_beir
from jaxembed.data.loader import TextSource, TextTable, tokenize_examples
from jaxembed.data.plan import DataSet
from jaxembed.data.python_source import harvest_python
from jaxembed.data.sources import Examples, read_jsonl, read_rows, summary
from jaxembed.errors import InputError
from jaxembed.text.format import DEFAULT_TEXT_FORMAT, Role, RoleName, TextFormat, write_json
from jaxembed.text.tokenizer import TextTokenizer, load_tokenizer, train_byte_level_bpe, with_end_token, with_markers

logger = logging.getLogger(__name__)

TOKEN_CACHE = "~/.cache/jaxembed/tokens"

_MARKER = re.compile(r"\[\w+\]|<\S+>")


def read_sources(sources: Sequence[Source], config: DataConfig) -> list[Examples]:
    """The examples of each source, with one logged line of counts for each.

    Raises:
        InputError: a source that is missing, empty, in no known format, or has a bad row while `data.bad_rows` is
            "error".
    """
    found = []
    for source in sources:
        examples = _read_source(source, config)
        logger.info("%s", summary(examples))
        found.append(examples)
    return found


def _read_source(source: Source, config: DataConfig) -> Examples:
    cache_dir = config.cache_dir or TOKEN_CACHE
    if isinstance(source, JsonlSource) and source.named_columns:
        return read_jsonl(
            source.path,
            name=source.name,
            anchor=source.anchor or "anchor",
            positive=source.positive or "positive",
            negatives=source.negatives,
            score=source.score,
            split=source.split,
            bad_rows=config.bad_rows,
        )
    if isinstance(source, JsonlSource):
        return read_rows(
            source.path,
            name=source.name,
            format=source.format,
            corpus=source.corpus,
            split=source.split,
            label_negatives=source.label_negatives,
            seed=source.seed,
            cache_dir=cache_dir,
            bad_rows=config.bad_rows,
        )
    if isinstance(source, BeirSource):
        return read_beir(
            source.path,
            name=source.name,
            split=source.split,
            corpus=source.corpus,
            queries=source.queries,
            qrels=source.qrels,
            mined=source.mined,
            mined_negatives=source.mined_negatives,
            cache_dir=cache_dir,
            bad_rows=config.bad_rows,
        )
    if isinstance(source, TfdsSource):
        from jaxembed.datasets.prepared import read_prepared  # tfds takes a second to import

        return read_prepared(
            source.dataset,
            name=source.name,
            data_dir=source.data_dir,
            manual_dir=source.manual_dir,
            split=source.split,
        )
    return harvest_python(
        name=source.name,
        path=source.path,
        packages=source.packages,
        held_out=source.held_out,
        part=source.part,
    )


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
        include_prompt=section.include_prompt,
        normalize=section.normalize,
        literal_markers=section.literal_markers,
    )


def is_symmetric(source: Source, examples: Examples) -> bool:
    """Whether the source's documents are read as queries too."""
    return examples.graded if source.symmetric is None else source.symmetric


def source_tokenizer(
    tokenizer: TextTokenizer, source: Source, examples: Examples
) -> tuple[TextTokenizer, tuple[RoleName, RoleName]]:
    """The tokenizer with the source's own instructions, and the roles of its anchors and its documents."""
    text_format = tokenizer.text_format
    roles: tuple[RoleName, RoleName] = ("query", "query" if is_symmetric(source, examples) else "document")
    own = {
        role: dataclasses.replace(text_format.role(role), instruction=instruction)
        for role, instruction in (("query", source.query_instruction), ("document", source.document_instruction))
        if instruction is not None
    }
    return (tokenizer.with_format(dataclasses.replace(text_format, **own)) if own else tokenizer), roles


def prepare_tokenizer(
    config: TrainConfig, examples: Sequence[Examples], saved: epath.Path, *, resume: bool = False
) -> TextTokenizer:
    """The model's tokenizer, a given one, or one trained on the training texts; kept in `saved` for a resumed run."""
    if resume:
        return TextTokenizer.from_directory(saved)
    text_format = configured_format(config)
    if config.model.path is not None:
        directory = find_directory(config.model.path)
        tokenizer = _tokenizer_of_model(tokenizer_directory(directory, base_directory(directory)), text_format)
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
        tokenizer = TextTokenizer(_with_own_markers(raw, text_format), text_format)
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
    raw = load_tokenizer(directory / "tokenizer.json")
    marked = _with_own_markers(raw, text_format)
    if marked is not raw:
        rows = read_config(directory).get("vocab_size", 0)
        if marked.get_vocab_size() > rows:
            raise InputError(
                f"{directory}: the vocabulary table has {rows:,} rows, too few for {marked.get_vocab_size():,} tokens: "
                "there are no spare rows for the markers of text_format; use a prefix of plain text and no suffix"
            )
        return TextTokenizer(marked, text_format)
    try:
        return TextTokenizer.from_directory(directory, text_format)
    except InputError:
        end = "</s>"
        if text_format.has_suffixes or raw.token_to_id(end) is None:
            raise
        logger.info("the tokenizer adds no end token; every text will end with %s", end)
        return TextTokenizer(with_end_token(raw, end), text_format)


def _with_own_markers(raw: tokenizers.Tokenizer, text_format: TextFormat) -> tokenizers.Tokenizer:
    """With the format's markers that the tokenizer lacks (suffixes, and prefixes such as `[BOQ]`) as new tokens."""
    wanted = [
        marker
        for role in (text_format.query, text_format.document)
        for marker in ([role.prefix] if _MARKER.fullmatch(role.prefix) else []) + ([role.suffix] if role.suffix else [])
    ]
    added = {token.content for token in raw.get_added_tokens_decoder().values()}
    missing = [marker for marker in dict.fromkeys(wanted) if marker not in added]
    if not missing:
        return raw
    marked = with_markers(raw, missing)
    ids = ", ".join(f"{marker} = {marked.token_to_id(marker)}" for marker in missing)
    logger.info("markers that the tokenizer lacked are new tokens: %s", ids)
    return marked


def train_token_ids(config: TrainingConfig, tokenizer: TextTokenizer) -> list[int]:
    """The ids of `training.train_tokens`. Raises `InputError` for what is no token."""
    ids = []
    for index, token in enumerate(config.train_tokens):
        found = tokenizer.tokenizer.token_to_id(token)
        if found is None:
            raise InputError(f"training.train_tokens.{index}: {token!r} is no token of the tokenizer")
        ids.append(found)
    return ids


def rotates(source: Source, examples: Examples) -> bool:
    """Whether each pass through the source takes the next ones of its hard negatives, and positives."""
    order = source.negatives_order
    if order is None:
        order = "rotate" if isinstance(source, TfdsSource) and source.dataset == "ms_marco" else "first"
    return order == "rotate" and bool(examples.negative_counts.any() or examples.more_positives is not None)


def prepare_texts(
    config: TrainConfig, examples: Sequence[Examples], tokenizer: TextTokenizer
) -> tuple[TextTable, list[DataSet]]:
    """The token ids of all texts that training needs, and the data sets as rows of them; tokenises what is not cached.

    Raises:
        InputError: more hard negatives a query are asked for than any source has.
    """
    cache_dir = os.path.expanduser(config.data.cache_dir or TOKEN_CACHE)
    sections = config.data.train
    held = [int(source.negative_counts.max(initial=0)) for source in examples]
    wanted = config.training.negatives
    if wanted is not None and wanted > max(held):
        raise InputError(
            f"training.negatives: {wanted} hard negatives a query, but the sources have {max(held)} at most"
        )
    sources = []
    for place, (section, found, most) in enumerate(zip(sections, examples, held)):
        own = section.hard_negatives
        if own is not None and own > most:
            raise InputError(
                f"data.train.{place}.hard_negatives: {own} hard negatives a query, but {section.name} has {most}"
            )
        taken = own if own is not None else most if wanted is None else min(wanted, most)
        reader, roles = source_tokenizer(tokenizer, section, found)
        sources.append(TextSource(found, reader, roles, section.weight, taken, rotates(section, found)))
    return tokenize_examples(sources, cache_dir)
