"""The README of a saved model: what it is, how texts go in, how to load it, what it was trained on, how good it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from jaxembed.checkpoint.export import oldest_readers
from jaxembed.text.format import Pooling, Role, TextFormat

TAGS = ("sentence-transformers", "sentence-similarity", "feature-extraction", "jaxembed")

_POOLING: Mapping[Pooling, str] = {
    "last": "the hidden state of the last token",
    "mean": "the mean of the hidden states of all tokens",
    "weighted_mean": "the mean of the hidden states of all tokens, weighted by their places 1, 2, … in the sequence",
    "first": "the hidden state of the first token",
}
_WEIGHTED = "vLLM and TEI have no weighted mean."
_AFTER_PROMPT = (
    "Tokens of the prompt do not count in it (`include_prompt: false`), which sentence-transformers heeds and vLLM "
    "does not."
)
_BIDIRECTIONAL = (
    "Attention is bidirectional (`is_causal: false` in `config.json`), which transformers {transformers} or newer "
    "reads. Programs that take no notice of it, such as older versions and vLLM's BLOOM, give other embeddings and no "
    "error."
)

_LITERAL_MARKERS = {
    "token": "A marker that stands in a text becomes its token, here as in every other reader.",
    "text": (
        "jaxembed leaves markers that stand in a text as text (`literal_markers: text`). Other readers cannot: there "
        "they become tokens, and the embedding of such a text differs."
    ),
}


def model_card(
    *,
    name: str,
    text_format: TextFormat,
    dim: int,
    description: str = "",
    base_model: str | None = None,
    license: str | None = None,
    training_data: Sequence[Mapping[str, Any]] = (),
    config: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    versions: Mapping[str, str] | None = None,
    weights_hash: str | None = None,
    causal: bool = True,
) -> str:
    """The model card as Markdown with the Hugging Face hub's front matter.

    Args:
        name: the title, and the path or id that the code examples load.
        dim: width of the embeddings.
        description: a paragraph of the author's.
        base_model: id or path of the model that was trained on; None when there was none, or none is known.
        license: the hub's name of a licence.
        training_data: a row a data set; its keys head the table (`name`, `pairs`, `dropped`).
        config: the run's resolved configuration; None for a model that was saved or converted only.
        results: a row a measurement; its keys head the table (`data`, `metric`, `before`, `after`, `BM25`).
        versions: what it was made with, by package.
        weights_hash: SHA-256 of the weights, whatever the files that hold them.
        causal: whether attention is.
    """
    introduction = _introduction(text_format, dim, description, base_model, config is not None, causal)
    parts = [_front_matter(base_model, license), f"# {name}", introduction]
    parts += ["## Text format", _text_format(text_format), "## Use", _usage(name, text_format, causal)]
    if results:
        parts += ["## Results", _table(results)]
    if training_data:
        parts += ["## Training data", _table(training_data)]
    if config:
        parts += ["## Configuration", _fenced("yaml", _yaml(config))]
    if weights_hash:
        parts += [
            "## Weights",
            f"SHA-256 of the weights, by `jaxembed`, whatever the files that hold them: `{weights_hash}`",
        ]
    if versions:
        parts += ["## Versions", _table([{"package": package, "version": of} for package, of in versions.items()])]
    return "\n\n".join(parts) + "\n"


def _front_matter(base_model: str | None, license: str | None) -> str:
    entries: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": list(TAGS),
    }
    if base_model and base_model.count("/") == 1 and not base_model.startswith((".", "/", "~")):
        entries["base_model"] = base_model  # the hub takes ids only, no paths
    if license:
        entries["license"] = license
    # JSON values are YAML values.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()]
    return "\n".join(["---", *lines, "---"])


def _introduction(
    text_format: TextFormat, dim: int, description: str, base_model: str | None, trained: bool, causal: bool
) -> str:
    origin = "written by jaxembed"
    if base_model:
        origin = f"made with jaxembed, finetuned from `{base_model}`"
    elif trained:
        origin = "made with jaxembed, trained from scratch"
    length = "of unit length" if text_format.normalize else "not normalised"
    facts = (
        f"A text embedder {origin}. An embedding is {_POOLING[text_format.pooling]}, "
        f"{dim} numbers, {length}; compare them by cosine similarity. Texts are cut at "
        f"{text_format.max_length} tokens."
    )
    if text_format.pooling == "weighted_mean":
        facts += f" {_WEIGHTED}"
    if text_format.pooling != "last" and not text_format.include_prompt:
        facts += f" {_AFTER_PROMPT}"
    parts = [facts] if causal else [facts, _BIDIRECTIONAL.format(**oldest_readers(text_format, causal))]
    return "\n\n".join([description.strip(), *parts] if description.strip() else parts)


def _text_format(text_format: TextFormat) -> str:
    def sequence(role: Role) -> str:
        end = f"token {_code(role.suffix)}" if role.suffix else "the tokenizer's end token"
        return f"{_code(role.prompt)} + text + {end}" if role.prompt else f"text + {end}"

    rows = [
        {"role": "query", "sequence": sequence(text_format.query)},
        {"role": "document", "sequence": sequence(text_format.document)},
    ]
    symmetric = (
        "Where two texts play the same part (similarity, clustering, classification), embed both as queries. The "
        "format is in `jaxembed_text_format.json`; the code below applies it."
    )
    return f"{_table(rows)}\n\n{symmetric} {_LITERAL_MARKERS[text_format.literal_markers]}"


def _usage(name: str, text_format: TextFormat, causal: bool) -> str:
    calls = (
        'queries = model.encode_query(["how do I sort a dict by value"])\n'
        'documents = model.encode_document(["sorted(d.items(), key=lambda item: item[1])"])\n'
        "print(model.similarity(queries, documents))"
    )
    oldest = oldest_readers(text_format, causal)
    need = f"{oldest.pop('sentence-transformers')} or newer"
    need += "".join(f", {package} {version} or newer" for package, version in oldest.items())
    path = json.dumps(name, ensure_ascii=False)
    torch = f"from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer({path})\n{calls}"
    jax = f"from jaxembed import Embedder\n\nmodel = Embedder.from_pretrained({path})\n{calls}"
    return (
        f"With sentence-transformers ({need}):\n\n{_fenced('python', torch)}\n\n"
        f"With jaxembed, on TPU, GPU or CPU:\n\n{_fenced('python', jax)}"
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    quoted = json.dumps(text, ensure_ascii=False)
    return f"`` {quoted} ``" if "`" in quoted else f"`{quoted}`"


def _yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def _fenced(language: str, text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
