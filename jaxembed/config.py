"""The configuration of a training run: every option, what it means, its default and its bounds.

These models are the only list of options: the checks, `--help` and the JSON schema for editors all come from them.
How they are read from a file and the command line is `config_file`'s subject.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from etils import epath
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from jaxembed import config_file

# What an override replaces in the file: `--training.steps 5` shortens a recipe that counts epochs.
_REPLACES = {
    "model.path": ("model.scratch", "tokenizer"),
    "model.scratch": ("model.path",),
    "training.epochs": ("training.steps",),
    "training.steps": ("training.epochs",),
    "tokenizer.path": ("tokenizer.train_vocab_size", "tokenizer.split_identifiers"),
    "tokenizer.train_vocab_size": ("tokenizer.path",),
}


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[\w.\-]+", name):
        raise ValueError(f'expected letters, digits, "." "_" "-" only, found "{name}"')
    return name


_FilePath = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
_Name = Annotated[str, AfterValidator(_checked_name)]
_Text = Annotated[str, Field(min_length=1)]
_Count = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0)]
_Float = Literal["float32", "bfloat16"]
_Recompute = Literal["none", "dots", "full"]
RowFormat = Literal[
    "sentence-transformers",
    "graded",
    "tevatron",
    "tevatron-ids",
    "flagembedding",
    "gritlm",
    "ms-swift",
    "labelled",
    "nli",
]
TaskKind = Literal[
    "retrieval",
    "code_search",
    "sts",
    "pairs",
    "classification",
    "clustering",
    "reranking",
    "bitext",
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class ScratchConfig(_Section):
    """A decoder with fresh weights."""

    family: Literal["bloom"] = Field(default="bloom", description="architecture")
    layers: _Count = Field(default=2, description="number of layers")
    dim: _Count = Field(default=128, description="width of the hidden state, and of the embedding")
    heads: _Count = Field(default=4, description="attention heads a layer; divides dim")
    vocab_size: _Count | None = Field(
        default=None, description="rows of the vocabulary table; null = as the tokenizer has ids"
    )
    initializer_range: _Positive = Field(default=0.02, description="standard deviation of the initial weights")
    layer_norm_epsilon: _Positive = Field(default=1e-5, description="epsilon of every LayerNorm")

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> ScratchConfig:
        if self.dim % self.heads:
            raise ValueError(f"heads has to divide dim, found {self.heads} heads and dim {self.dim}")
        return self


class ModelConfig(_Section):
    """The decoder: exactly one of `path` and `scratch`."""

    path: _FilePath | None = Field(
        default=None,
        description="Hugging Face or sentence-transformers directory, or hub id, of the weights to start from",
    )
    scratch: ScratchConfig | None = Field(default=None, description="shape of a new decoder with random weights")
    param_dtype: Literal["auto"] | _Float = Field(
        default="auto",
        description="type of frozen parameters; auto = float32. Those that train are float32 always",
    )
    compute_dtype: Literal["auto"] | _Float = Field(
        default="auto",
        description="type of the arithmetic; auto = bfloat16 on TPU and on GPU of compute capability 8.0 on, "
        "float32 elsewhere",
    )
    attention: Literal["causal", "bidirectional"] | None = Field(
        default=None,
        description="what a token attends to: those before it, or its whole text; saved with the model; null = as its "
        "config.json says, causal from scratch",
    )
    attention_kernel: Literal["auto", "plain", "splash", "flash"] = Field(
        default="auto",
        description="how attention is computed; auto = splash on TPU and flash on GPU of compute capability 8.0 on, "
        "both for bfloat16 and float16, plain elsewhere",
    )
    layer_checkpoint: _Recompute = Field(
        default="none",
        description="what each layer computes again in the backward pass: none = all but matmuls and attention, dots = "
        "all but matmuls, full = all",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.path is None) == (self.scratch is None):
            found = "neither" if self.path is None else "both"
            raise ValueError(
                "give exactly one of model.path (weights to start from) and model.scratch (a new decoder), "
                f"found {found}"
            )
        return self


class TokenizerConfig(_Section):
    """The tokenizer of a decoder from scratch; a decoder from `model.path` brings its own."""

    train_vocab_size: Annotated[int, Field(ge=260)] | None = Field(
        default=None, description="train a byte-level BPE tokenizer with this many ids on the training texts"
    )
    split_identifiers: bool = Field(
        default=False,
        description="train it on lower-cased parts of snake_case and camelCase, without spaces: words of a query and "
        "parts of a name are then the same tokens",
    )
    path: _FilePath | None = Field(default=None, description="directory with tokenizer.json, or that file")

    @model_validator(mode="after")
    def _one_origin(self) -> TokenizerConfig:
        if self.train_vocab_size is not None and self.path is not None:
            raise ValueError("give one of tokenizer.train_vocab_size and tokenizer.path, found both")
        if self.split_identifiers and self.train_vocab_size is None:
            raise ValueError("split_identifiers is for a tokenizer that is trained; give train_vocab_size too")
        return self


class RoleConfig(_Section):
    """What stands around a text in one role."""

    prefix: str = Field(default="", description='text put before, such as "query: " or a marker such as "[BOQ]"')
    suffix: str = Field(
        default="", description='one token, by its string, that ends the sequence; "" = the tokenizer\'s own'
    )
    instruction: str = Field(default="", description="text between the prefix and the user's text")


class TextFormatConfig(_Section):
    """How a text becomes tokens and an embedding; saved with the model."""

    query: RoleConfig = Field(default=RoleConfig(prefix="query: "), description="queries")
    document: RoleConfig = Field(default=RoleConfig(prefix="document: "), description="documents")
    max_length: _Count = Field(default=512, description="longest sequence, in tokens, prefix and end token included")
    pooling: Literal["last", "mean", "weighted_mean", "first"] = Field(
        default="last",
        description="hidden states that become the embedding: of the last token, the mean of all, the mean weighted by "
        "place (SGPT), of the first token (bidirectional attention only)",
    )
    include_prompt: bool = Field(
        default=True, description="whether prefix and instruction count in means; false does not go with suffixes"
    )
    normalize: bool = Field(default=True, description="scale embeddings to unit length")
    literal_markers: Literal["token", "text"] = Field(
        default="token", description="what a marker written out in a user's text becomes"
    )


EMBEDDING_KINDS = ("embedding_cosine", "embedding_mse")
"""The kinds of loss that take `teacher_embeddings`."""


class SetLossConfig(_Section):
    """The loss of one source."""

    kind: Literal["info_nce", "cosent", "kl", "margin_mse", "embedding_cosine", "embedding_mse"] | None = Field(
        default=None,
        description="InfoNCE; CoSENT, for graded pairs; KL or MarginMSE to a teacher's scores of positive and hard "
        "negatives; cosine distance or squared error to teacher_embeddings; null = CoSENT for graded pairs, else "
        "InfoNCE",
    )
    weight: _Positive = Field(default=1.0, description="multiplies the loss of each example")
    temperature: _Positive | None = Field(
        default=None,
        description="divides the cosine similarities; null = loss.temperature for InfoNCE, 0.05 for CoSENT, 1 for KL, "
        "whose loss is multiplied by its square",
    )
    teacher_temperature: _Positive | None = Field(
        default=None, description="divides the teacher's scores in KL and MarginMSE; null = 1"
    )
    info_nce_weight: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="InfoNCE, at loss.temperature, added to another kind, times this"
    )
    hard_negatives: bool | None = Field(default=None, description="as in loss; null = as there")
    query_query: bool | None = Field(default=None, description="as in loss; null = as there")
    document_document: bool | None = Field(default=None, description="as in loss; null = as there")
    document_query: Literal["none", "joint", "symmetric"] | None = Field(
        default=None, description="as in loss; null = as there"
    )
    mask_margin: Annotated[float, Field(ge=0)] | None = Field(default=None, description="as in loss; null = as there")
    focal_gamma: Annotated[float, Field(ge=0)] | None = Field(default=None, description="as in loss; null = as there")

    @model_validator(mode="after")
    def _fits_kind(self) -> SetLossConfig:
        other = self.kind not in (None, "info_nce")
        if self.info_nce_weight and not other:
            raise ValueError("info_nce_weight goes beside another kind than info_nce; use weight")
        if self.teacher_temperature is not None and self.kind not in ("kl", "margin_mse"):
            raise ValueError("teacher_temperature is for kind: kl and kind: margin_mse")
        if self.temperature is not None and self.kind == "margin_mse":
            raise ValueError("kind: margin_mse has no temperature; scale the teacher's scores by teacher_temperature")
        if self.temperature is not None and self.kind in EMBEDDING_KINDS:
            raise ValueError(f"kind: {self.kind} has no temperature; use weight")
        terms = ("hard_negatives", "query_query", "document_document", "document_query", "mask_margin", "focal_gamma")
        given = [name for name in terms if getattr(self, name) is not None]
        if other and given and not self.info_nce_weight:
            raise ValueError(f"{', '.join(given)}: for InfoNCE only, found kind: {self.kind} without info_nce_weight")
        return self


class TeacherEmbeddingsConfig(_Section):
    """Embeddings of a source's texts by another model: local .npy files of floats, a row a text, in the source's order.

    They are mapped into memory, never read whole. Texts without a file take no part.
    """

    anchors: _FilePath | None = Field(default=None, description=".npy of the anchors, one a row of the source")
    positives: _FilePath | None = Field(default=None, description=".npy of the positives, row after row of the source")
    negatives: _FilePath | None = Field(
        default=None, description=".npy of all hard negatives, row after row of the source"
    )
    documents: _FilePath | None = Field(
        default=None, description=".npy of the corpus, where rows name documents by id: positives and negatives"
    )
    truncate_dim: _Count | None = Field(
        default=None, description="first dimensions that are taken, of a teacher with more than the model; null = all"
    )

    @model_validator(mode="after")
    def _says_of_what(self) -> TeacherEmbeddingsConfig:
        if self.documents is not None and (self.positives is not None or self.negatives is not None):
            raise ValueError("documents are positives and negatives; give either it or those")
        if not (self.anchors or self.positives or self.negatives or self.documents):
            raise ValueError("give one of anchors, positives, negatives and documents, found none")
        return self


class _SourceSection(_Section):
    """What every source has, whatever its kind."""

    name: _Name = Field(description="name of the data set in logs and metrics: letters, digits, . _ -")
    weight: _Positive | None = Field(
        default=None, description="share in the mix, relative to the others; null = its size"
    )
    query_instruction: str | None = Field(
        default=None, description="instruction of this source's queries; null = that of text_format"
    )
    document_instruction: str | None = Field(
        default=None, description="instruction of this source's documents; null = that of text_format"
    )
    symmetric: bool | None = Field(
        default=None,
        description="documents play the part of queries too (similarity, paraphrases, NLI); null = for graded pairs",
    )
    hard_negatives: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="hard negatives a query of this source; null = training.negatives"
    )
    negatives_order: Literal["first", "rotate"] | None = Field(
        default=None,
        description="hard negatives taken of a query that has more: the first ones always, or in each pass the next "
        "ones; null = rotate for ms_marco, whose positives take turns too, else first",
    )
    in_batch: bool = Field(
        default=True, description="whether queries meet texts of other examples; false = their own hard negatives only"
    )
    loss: SetLossConfig | None = Field(default=None, description="loss of this source; null = as the section loss says")
    teacher_embeddings: TeacherEmbeddingsConfig | None = Field(
        default=None, description="a teacher's embeddings of this source's texts, for loss.kind: embedding_…"
    )

    @model_validator(mode="after")
    def _teacher_has_its_loss(self) -> _SourceSection:
        kind = None if self.loss is None else self.loss.kind
        if (kind in EMBEDDING_KINDS) != (self.teacher_embeddings is not None):
            found = f"found kind: {kind}" if self.teacher_embeddings is not None else "found none"
            raise ValueError(f"teacher_embeddings and loss.kind: {' or '.join(EMBEDDING_KINDS)} go together, {found}")
        return self

    @model_validator(mode="after")
    def _terms_are_in_batch(self) -> _SourceSection:
        if self.loss is not None and not self.in_batch:
            on = [name for name in ("query_query", "document_document") if getattr(self.loss, name)]
            on += ["document_query"] if self.loss.document_query not in (None, "none") else []
            if on:
                raise ValueError(f"in_batch: false leaves loss.{on[0]} no candidates; switch one of them off")
        return self


class JsonlSource(_SourceSection):
    """Pairs from a file of rows: named columns, or a format that is recognised by its keys."""

    kind: Literal["jsonl"] = Field(description="file of rows: JSON lines, TSV, CSV or Parquet")
    path: _FilePath = Field(
        description=".jsonl, .tsv or .csv, each also with .gz, or .parquet; from the current directory"
    )
    format: RowFormat | None = Field(
        default=None, description="format of the rows; null = by the keys of the first one"
    )
    anchor: _Text | None = Field(
        default=None, description="key of the query; null = by the format, anchor where another key is named"
    )
    positive: _Text | None = Field(
        default=None,
        description="key of the document that answers it; null = by the format, positive where another key is named",
    )
    negatives: list[_Text] = Field(default=[], description="keys of the hard negatives")
    score: _Text | None = Field(default=None, description="key of the grade of graded pairs")
    corpus: _FilePath | None = Field(
        default=None, description="file, or BEIR folder, with the documents that rows name by id"
    )
    split: _Text | None = Field(default=None, description="rows taken, by their key split; null = all")
    label_negatives: Annotated[int, Field(ge=0)] = Field(
        default=1, description="negatives drawn from other labels for each labelled text"
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        default=0, description="seed of what is drawn for labelled texts and NLI rows"
    )

    @model_validator(mode="after")
    def _columns_or_format(self) -> JsonlSource:
        if self.named_columns and (self.format is not None or self.corpus is not None):
            other = "format" if self.format is not None else "corpus"
            raise ValueError(f"{other} does not go with anchor, positive, negatives or score; give one of the two")
        return self

    @property
    def named_columns(self) -> bool:
        """Whether columns are named, so that there is nothing to recognise."""
        return bool(self.anchor or self.positive or self.negatives or self.score)


class BeirSource(_SourceSection):
    """Queries, documents and judgements by id, in a folder; documents stay on the disk."""

    kind: Literal["beir"] = Field(description="folder with corpus, queries and judgements by id")
    path: _FilePath = Field(description="folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv, plain or .gz")
    split: _Text = Field(default="train", description="which judgements")
    corpus: _FilePath | None = Field(default=None, description="the corpus; null = found in the folder")
    queries: _FilePath | None = Field(default=None, description="the queries; null = found in the folder")
    qrels: _FilePath | None = Field(default=None, description="the judgements; null = found in the folder")
    mined: _FilePath | None = Field(
        default=None, description="mined negatives by id, .jsonl or .tsv; null = no hard negatives"
    )
    mined_negatives: _Count = Field(
        default=16, description="negatives a query that are taken from it, of several systems the first ones in turn"
    )


class PythonSource(_SourceSection):
    """Pairs (docstring, function without its docstring) harvested from Python source files."""

    kind: Literal["python"] = Field(description="docstring and function pairs from Python code")
    path: _FilePath | None = Field(
        default="stdlib",
        description="folder to harvest; stdlib = this Python's standard library; null = packages only",
    )
    packages: list[_Text] = Field(default=[], description="installed packages to harvest; missing ones are named")
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="share of modules that are never trained on"
    )
    part: Literal["train", "held_out", "all"] = Field(
        default="train", description="which of the modules this source yields"
    )

    @model_validator(mode="after")
    def _something_to_harvest(self) -> PythonSource:
        if self.path is None and not self.packages:
            raise ValueError("give path (a folder, or stdlib) or packages, found neither")
        if self.part == "held_out" and self.held_out == 0:
            raise ValueError("part: held_out is empty with held_out: 0; expected a share above 0")
        return self


class TfdsSource(_SourceSection):
    """A data set of the paper, prepared from its original files by `python -m jaxembed.prepare`."""

    kind: Literal["tfds"] = Field(description="prepared TensorFlow data set; TensorFlow is not needed")
    dataset: Literal["ms_marco", "all_nli"] = Field(
        description="MS MARCO passages with hard negatives, or triples of SNLI and MultiNLI"
    )
    data_dir: _FilePath = Field(
        default="~/tensorflow_datasets", description="where it is prepared, local or gs://, as tfds lays it out"
    )
    manual_dir: _FilePath | None = Field(
        default=None,
        description="directory with the original files, from which it is prepared where it is not; null = "
        "downloaded by jaxembed.prepare, an error in training",
    )
    split: _Text = Field(default="train", description="examples taken, in tfds' notation such as train[:1000]")


class TaskSource(_Section):
    """A local task, as `python -m jaxembed.evaluate` has it: retrieval, STS or classification."""

    kind: Literal["task"] = Field(description="local task: folder or file, recognised by what is in it")
    name: _Name = Field(description="name of the task in logs and metrics: letters, digits, . _ -")
    path: _FilePath = Field(description="BEIR folder, folder of labelled texts, or file of rows")
    task: TaskKind | None = Field(
        default=None,
        description="kind of task; null = as folder or keys say; retrieval, code_search, sts and "
        "classification can be dev tasks",
    )
    train: _FilePath | None = Field(default=None, description="file of labelled texts to learn from")
    split: _Text | None = Field(
        default=None, description="of a folder; null = the first of test, dev, validation, val that is there"
    )
    corpus: _FilePath | None = Field(default=None, description="documents; null = found beside the others")
    queries: _FilePath | None = Field(default=None, description="queries; null = found in the folder")
    qrels: _FilePath | None = Field(default=None, description="judgements; null = found in the folder")
    anchor: _Text | None = Field(default=None, description="column of a pair's first text; null = by the keys")
    positive: _Text | None = Field(default=None, description="column of a pair's second text")
    score: _Text | None = Field(default=None, description="column of a pair's grade")
    text: _Text | None = Field(default=None, description="column of labelled texts; null = text")
    label: _Text | None = Field(default=None, description="column of their labels; null = label")
    format: RowFormat | None = Field(default=None, description="format of the rows; null = by the keys")
    only: _Text | None = Field(default=None, description="COLUMN=VALUE of the rows that are read; null = all")
    query_instruction: str | None = Field(
        default=None,
        description="instruction of queries and all texts that are no documents; null = that of text_format",
    )
    document_instruction: str | None = Field(
        default=None, description="instruction of documents; null = that of text_format"
    )

    def options(self) -> dict[str, Any]:
        """The arguments of `read_task` that the section has."""
        own = {"kind", "path", "task", "query_instruction", "document_instruction"}
        return {"kind": self.task, **self.model_dump(exclude=own)}


Source = Annotated[JsonlSource | BeirSource | PythonSource | TfdsSource, Field(discriminator="kind")]
DevSource = Annotated[JsonlSource | BeirSource | PythonSource | TfdsSource | TaskSource, Field(discriminator="kind")]


class DataConfig(_Section):
    """Where the pairs come from."""

    train: Annotated[list[Source], Field(min_length=1)] = Field(
        description="sources trained on; N is a place in the list, from 0"
    )
    dev: list[DevSource] = Field(
        default=[],
        description="sources that the run is evaluated on, keys as in data.train; or local tasks, kind: task",
    )
    batches: Literal["mixed", "homogeneous"] = Field(
        default="mixed", description="pairs of all sources in every batch, or each batch from one source"
    )
    cap: _Count | None = Field(
        default=None,
        description="pairs by which a source without a weight counts in the mix, and that an epoch takes of it, at "
        "most; null = all that it has",
    )
    bad_rows: Literal["error", "skip"] = Field(default="error", description="what a row that cannot be read leads to")
    cache_dir: _FilePath | None = Field(
        default=None, description="local directory of the token cache; null = ~/.cache/jaxembed/tokens"
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> DataConfig:
        for key, sources in (("train", self.train), ("dev", self.dev)):
            names = [source.name for source in sources]
            doubled = sorted({name for name in names if names.count(name) > 1})
            if doubled:
                raise ValueError(f"every source of data.{key} needs its own name, found {', '.join(doubled)} twice")
        return self


class LoraConfig(_Section):
    """Low-rank adapters (LoRA), float32, beside the matrices of every layer; merged into them on export."""

    rank: _Count = Field(default=16, description="rank of an adapter")
    alpha: _Positive = Field(default=32.0, description="what the adapters add is multiplied by alpha / rank")
    targets: Annotated[list[Literal["qkv", "out", "up", "down"]], Field(min_length=1)] = Field(
        default=["qkv", "out", "up", "down"],
        description="matrices with an adapter: queries, keys and values; attention's output; the MLP's two",
    )

    @field_validator("targets")
    @classmethod
    def _targets_are_unique(cls, targets: list[str]) -> list[str]:
        if len(set(targets)) < len(targets):
            raise ValueError(f"expected each target once, found {', '.join(targets)}")
        return targets


class TrainingConfig(_Section):
    """How long and on what: exactly one of `epochs` and `steps`."""

    batch_size: _Count = Field(default=64, description="pairs a step, over all devices")
    epochs: _Positive | None = Field(default=None, description="passes over the training pairs")
    steps: _Count | None = Field(default=None, description="optimiser steps")
    trainable: Literal["full", "bitfit", "lora", "last_layers", "rows"] = Field(
        default="full",
        description="all parameters, the biases, low-rank adapters of the matrices, the last layers, train_tokens only",
    )
    lora: LoraConfig | None = Field(
        default=None, description="the adapters of trainable: lora; null = those of its defaults"
    )
    last_layers: _Count | None = Field(
        default=None, description="layers that train, from the last one down, of trainable: last_layers"
    )
    train_tokens: list[_Text] = Field(
        default=[],
        description="tokens whose rows of the vocabulary table train, as the tokenizer has them; with all but full",
    )
    row_length: _Count | None = Field(
        default=None, description="tokens in a packed row; null = chosen from the lengths"
    )
    chunk_rows: _Count | None = Field(
        default=None, description="packed rows a device runs at once (bounds the memory); null = chosen"
    )
    chunk_checkpoint: _Recompute = Field(
        default="full",
        description="what each chunk computes again in the backward pass: nothing, all but its matmuls, all",
    )
    negatives: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="hard negatives a query; null = as many as the sources have columns for"
    )

    @model_validator(mode="after")
    def _one_duration(self) -> TrainingConfig:
        if (self.epochs is None) == (self.steps is None):
            found = "neither" if self.epochs is None else "both"
            raise ValueError(f"give exactly one of training.epochs and training.steps, found {found}")
        return self

    @model_validator(mode="after")
    def _what_trains(self) -> TrainingConfig:
        if self.lora is not None and self.trainable != "lora":
            raise ValueError(f"training.lora is for trainable: lora, found trainable: {self.trainable}")
        if self.last_layers is not None and self.trainable != "last_layers":
            raise ValueError(f"training.last_layers is for trainable: last_layers, found trainable: {self.trainable}")
        if self.last_layers is None and self.trainable == "last_layers":
            raise ValueError("trainable: last_layers needs training.last_layers, the number of layers")
        if self.trainable == "rows" and not self.train_tokens:
            raise ValueError("trainable: rows needs training.train_tokens")
        if self.trainable == "full" and self.train_tokens:
            raise ValueError("training.train_tokens: with trainable: full all rows train; leave it out")
        return self


class LossConfig(_Section):
    """InfoNCE over the candidates of the global batch, and what goes with it; sources may have `loss` of their own."""

    temperature: _Positive = Field(default=0.05, description="divides the cosine similarities of InfoNCE")
    learn_temperature: bool = Field(
        default=False, description="train the logarithm of the temperature too, from that value on"
    )
    least_temperature: _Positive = Field(default=0.01, description="a learned temperature does not fall below")
    hard_negatives: bool = Field(default=True, description="hard negatives, of the query and of others in its batch")
    query_query: bool = Field(default=False, description="queries of the batch among the candidates, as negatives")
    document_document: bool = Field(
        default=False, description="cosines of the positive with the other documents of the batch among the logits"
    )
    document_query: Literal["none", "joint", "symmetric"] = Field(
        default="none",
        description="cosines of the positive with the queries of the batch: not used, more logits of the same softmax, "
        "or a second direction whose loss is averaged with the first",
    )
    mask_duplicates: bool = Field(
        default=True, description="no negative has the text of the positive, or of the query itself"
    )
    mask_known: bool = Field(
        default=True, description="no negative is a positive of the same query elsewhere in the training data"
    )
    mask_margin: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="negatives whose cosine is more than this above the positive's are left out "
        "(Qwen3-Embedding: 0.1); null = none",
    )
    focal_gamma: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="power of (1 - p) by which each loss is weighted, p the positive's share; 0 = none"
    )
    spread_out: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="weight of the mean squared cosine of unrelated texts, above 1 / dim (EmbeddingGemma); 0 = none",
    )
    spread_out_mean: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="weight of the squared mean cosine of unrelated texts (GOR); 0 = none"
    )
    matryoshka_dims: list[_Count] = Field(
        default=[],
        description="first dimensions of the embedding that are trained to serve alone, such as [1024, 512, 256, 128, "
        "64]; [] = the whole embedding only",
    )
    matryoshka_weights: list[_Positive] | None = Field(
        default=None, description="weight of the loss of each of matryoshka_dims; null = 1 each"
    )
    tile: _Count | None = Field(default=None, description="candidates scored at once; null = chosen by the batch")

    @model_validator(mode="after")
    def _fits_together(self) -> LossConfig:
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if len(set(dims)) < len(dims):
            raise ValueError(f"matryoshka_dims has a number twice: {dims}")
        if weights is not None and len(weights) != len(dims):
            raise ValueError(f"matryoshka_weights: expected one for each of the {len(dims)} dims, found {len(weights)}")
        if self.learn_temperature and self.least_temperature > self.temperature:
            raise ValueError(
                f"least_temperature {self.least_temperature} is above temperature {self.temperature}, from which "
                "learn_temperature starts"
            )
        return self


class OptimizerGroup(_Section):
    """Parameters with rates of their own."""

    match: _Text = Field(
        description="regular expression, found anywhere in a parameter's path such as layers/qkv/kernel; the first "
        "group that matches takes it"
    )
    learning_rate: _Positive | None = Field(
        default=None, description="highest learning rate of the group, under the same schedule; null = the common one"
    )
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="decay of all parameters of the group; null = the common one, on matrices only"
    )

    @field_validator("match")
    @classmethod
    def _match_compiles(cls, match: str) -> str:
        try:
            re.compile(match)
        except re.error as error:
            raise ValueError(f"expected a regular expression, found {match!r}: {error}") from None
        return match

    @model_validator(mode="after")
    def _says_something(self) -> OptimizerGroup:
        if self.learning_rate is None and self.weight_decay is None:
            raise ValueError("give learning_rate or weight_decay, found neither")
        return self


class OptimizerConfig(_Section):
    """AdamW, without decay on biases and norms, and its schedule."""

    learning_rate: _Positive = Field(default=1e-4, description="highest learning rate, after the warm-up")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.01, description="decoupled weight decay")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="decay of the gradient's mean")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.999, description="decay of the squared gradient's mean"
    )
    epsilon: _Positive = Field(default=1e-8, description="added to the root of the squared gradient's mean")
    clip_norm: _Positive | None = Field(
        default=1.0, description="largest global norm of the gradient; null = no clipping"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="linear", description="learning rate after the warm-up: kept, or down to 0 at the last step"
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="steps of linear warm-up; null = by warmup_ratio"
    )
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="share of all steps that warm up, where warmup_steps is null"
    )
    groups: list[OptimizerGroup] = Field(default=[], description="parameters with rates of their own")


class MeshConfig(_Section):
    """Devices along each axis of the mesh; one of them may be -1, all that the others leave."""

    data: int = Field(default=-1, description="devices that split the batch; 1 where another axis is -1")
    fsdp: int = Field(default=1, description="devices that split the batch and every parameter")
    tensor: int = Field(default=1, description="devices that split each layer")

    @field_validator("data", "fsdp", "tensor")
    @classmethod
    def _size_is_a_count(cls, size: int) -> int:
        if size != -1 and size < 1:
            raise ValueError(f"expected -1 (all that are left) or a number from 1 on, found {size}")
        return size

    @model_validator(mode="before")
    @classmethod
    def _another_takes_the_rest(cls, values: Any) -> Any:
        """Where another axis takes what is left, `data` does not, unless the file says so."""
        if isinstance(values, Mapping) and "data" not in values and -1 in values.values():
            return {**values, "data": 1}
        return values

    @model_validator(mode="after")
    def _one_takes_the_rest(self) -> MeshConfig:
        rest = [axis for axis in ("data", "fsdp", "tensor") if getattr(self, axis) == -1]
        if len(rest) > 1:
            raise ValueError(f"expected -1 (all that are left) for one axis at most, found it for {' and '.join(rest)}")
        return self


class DistributedConfig(_Section):
    """Processes on several hosts; what is null is as SLURM, GKE, Cloud TPU or Open MPI says, else there is one."""

    coordinator: str | None = Field(default=None, description="host:port of process 0, at a free port")
    num_processes: _Count | None = Field(default=None, description="processes of the run, usually one a host")
    process_id: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="number of this process, from 0; the one option that differs between hosts"
    )
    timeout: _Count = Field(default=300, description="seconds to wait, at the start, for all processes to turn up")

    @field_validator("coordinator")
    @classmethod
    def _coordinator_is_an_address(cls, coordinator: str | None) -> str | None:
        if coordinator is None:
            return None
        if not re.fullmatch(r"\S+:\d{1,5}", coordinator):
            raise ValueError(f'expected HOST:PORT such as 10.0.0.1:8476, found "{coordinator}"')
        host, _, port = coordinator.rpartition(":")
        if not 1 <= int(port) <= 65_535:
            raise ValueError(f"expected a port from 1 to 65535, found {port}")
        try:
            host.encode("idna")  # as the system's resolver is asked
        except UnicodeError as error:
            raise ValueError(f'"{host}" is no name of a host: {error}') from None
        return coordinator


class CheckpointConfig(_Section):
    """Saved state, from which `--resume` goes on."""

    every_steps: _Count | None = Field(default=None, description="steps between checkpoints; null = at the end only")
    keep: _Count = Field(default=2, description="latest checkpoints kept")


class EvaluationConfig(_Section):
    """On `data.dev`."""

    every_steps: _Count | None = Field(
        default=None, description="steps between evaluations; null = before and after only"
    )
    batch_size: _Count = Field(
        default=128,
        description="pairs in a batch of the dev loss, in which each query meets the documents of its batch",
    )
    bm25: bool = Field(default=True, description="report BM25 on the same pairs beside it")
    searches: list[_Text] = Field(default=[], description="queries whose best hits are printed at the end")
    best_metric: str | None = Field(
        default=None,
        description="NAME/METRIC of a dev set, such as stsb/spearman, by which the best evaluated state is kept in "
        "best/ of the run directory; null = none",
    )

    @model_validator(mode="after")
    def _best_of_several(self) -> EvaluationConfig:
        if self.best_metric is not None and self.every_steps is None:
            raise ValueError("best_metric needs every_steps: without it there is the last state only")
        return self


class ExportConfig(_Section):
    """The sentence-transformers directory written at the end."""

    path: _FilePath | None = Field(default=None, description="where to, local or gs://; null = model/ in run_dir")
    checkpoint: Literal["best", "last"] | None = Field(
        default=None,
        description="state that is exported; null = the best one where evaluation.best_metric is given, else the last",
    )
    verify: Literal["auto", "off"] = Field(
        default="auto",
        description="reload it in sentence-transformers and compare: where that is installed, or not at all",
    )


class LoggingConfig(_Section):
    """Metrics of the run."""

    every_steps: _Count = Field(default=10, description="steps between log entries")
    tensorboard: bool = Field(default=True, description="write TensorBoard events beside metrics.jsonl")


class ProfileConfig(_Section):
    """A trace of some steps."""

    steps: str | None = Field(default=None, description="first and last step traced, such as 10:13; null = none")

    @field_validator("steps")
    @classmethod
    def _steps_are_a_range(cls, steps: str | None) -> str | None:
        if steps is not None:
            match = re.fullmatch(r"(\d+):(\d+)", steps)
            if match is None or int(match[1]) >= int(match[2]):
                raise ValueError(f'expected FIRST:LAST such as 10:13, found "{steps}"')
        return steps

    @property
    def window(self) -> tuple[int, int] | None:
        """First and last step of the trace, or None."""
        if self.steps is None:
            return None
        first, last = self.steps.split(":")
        return int(first), int(last)


class TrainConfig(_Section):
    """Everything that a training run is made of."""

    run_dir: _FilePath = Field(
        default="runs/{name}", description="directory of the run, local or gs://; {name} = the config file's name"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0, description="seed of weights and of the order of examples"
    )
    model: ModelConfig = Field(description="the decoder")
    tokenizer: TokenizerConfig = Field(default=TokenizerConfig(), description="tokenizer of a decoder from scratch")
    text_format: TextFormatConfig | None = Field(
        default=None, description="how texts are formatted; null = as the model's directory says, or the default"
    )
    data: DataConfig = Field(description="the pairs")
    training: TrainingConfig = Field(description="how long and on what")
    loss: LossConfig = Field(default=LossConfig(), description="the loss")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="optimiser and schedule")
    mesh: MeshConfig = Field(default=MeshConfig(), description="devices")
    distributed: DistributedConfig = Field(default=DistributedConfig(), description="processes on several hosts")
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), description="checkpoints")
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), description="evaluation")
    export: ExportConfig = Field(default=ExportConfig(), description="the model written at the end")
    logging: LoggingConfig = Field(default=LoggingConfig(), description="metrics")
    profile: ProfileConfig = Field(default=ProfileConfig(), description="tracing")
    compile_cache: _FilePath | None = Field(
        default="~/.cache/jaxembed/compiled",
        description="directory of compiled programs, kept between runs; null = none",
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, data: Any) -> Any:
        """A section that is absent, or there without keys, has its defaults."""
        if not isinstance(data, Mapping):
            return data
        filled = dict(data)
        for name, field in cls.model_fields.items():
            section = isinstance(field.annotation, type) and issubclass(field.annotation, _Section)
            if section and filled.get(name) is None:
                filled[name] = {}
        return filled

    @model_validator(mode="after")
    def _best_metric_is_of_a_dev_set(self) -> TrainConfig:
        if self.evaluation.best_metric is None:
            if self.export.checkpoint == "best":
                raise ValueError("export.checkpoint: best needs evaluation.best_metric")
            return self
        names = [source.name for source in self.data.dev]
        name, slash, _ = self.evaluation.best_metric.rpartition("/")
        if not slash or name not in names:
            raise ValueError(
                "evaluation.best_metric: expected NAME/METRIC with the name of a source in data.dev "
                f'({", ".join(names) or "there is none"}), found "{self.evaluation.best_metric}"'
            )
        return self

    @model_validator(mode="after")
    def _tokenizer_fits_model(self) -> TrainConfig:
        given = self.tokenizer.path is not None or self.tokenizer.train_vocab_size is not None
        if self.model.scratch is not None and not given:
            raise ValueError("model.scratch needs a tokenizer; give tokenizer.train_vocab_size or tokenizer.path")
        if self.model.path is not None and given:
            raise ValueError(f"{self.model.path} brings its own tokenizer; leave out the section tokenizer")
        return self


def load_config(path: epath.PathLike, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config in a YAML file, with overrides `--section.key value`; see `config_file.read_config`.

    Where an override gives one of two alternatives, the file's other one is dropped: `model.path` or `model.scratch`
    (with its tokenizer), `training.epochs` or `training.steps`. Relative paths count from the current directory.

    Raises:
      InputError: with the file, line and key, or the override, of everything that is wrong.
    """
    config = config_file.read_config(TrainConfig, path, overrides, _REPLACES)
    return config.model_copy(update={"run_dir": config.run_dir.replace("{name}", epath.Path(path).stem)})


def dump_config(config: TrainConfig) -> str:
    """The config as YAML with every key, which `load_config` reads back as the same config."""
    return config_file.dump_config(config)


def options_help(model: type[BaseModel] = TrainConfig) -> str:
    """Every option as `--section.key`, with its type, default and meaning, for `--help`."""
    return config_file.options_help(model)


def json_schema(model: type[BaseModel] = TrainConfig) -> dict[str, Any]:
    """JSON schema of the config file, for editors."""
    return model.model_json_schema()
