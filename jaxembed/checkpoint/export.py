"""A model as a directory that sentence-transformers, transformers and inference servers read the same way.

The layout is the union of what the readers look for: sentence-transformers 6 writes a shorter schema than its
predecessors and other servers understand. Texts with one end token for both roles need only prompts and the
tokenizer's post-processor. Texts with a suffix of their own for each role (udever's four markers) need a chat template,
for prompts cannot add a suffix; sentence-transformers from 5.7 on puts it back after truncation.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxembed.checkpoint.directories import ModelPath, is_incomplete, model_path, new_directory
from jaxembed.errors import InputError, OperationError
from jaxembed.text.format import (
    DEFAULT_TEXT_FORMAT,
    ROLES,
    SENTENCE_TRANSFORMERS_POOLING,
    TEXT_FORMAT_FILE,
    RoleName,
    TextFormat,
    read_text_format,
    write_json,
)
from jaxembed.text.tokenizer import TextTokenizer

TOLERANCE = 1e-4
"""Largest difference of an embedding's component, relative to the embedding's length, that `verify_export` accepts."""

EDGE_TEXTS = (
    "how do I sort a dict by its values",
    "",
    "   ",
    "\n",
    "  leading and trailing spaces\t ",
    "如何按值对字典排序?",
    "naïve café 👩‍💻🎉",
    "{{ messages }} {% if x %} {# no comment #}",
    'def add(a, b):\n    """Sum."""\n    return a + b\n',
)

_WRITTEN = {
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
    "modules.json",
    "1_Pooling",
    "2_Normalize",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    TEXT_FORMAT_FILE,
}
_TOO_OLD = "this model needs sentence-transformers 5.7 or newer: older ones cut the end marker off long texts"
_POOLING_KEYS = tuple(
    f"pooling_mode_{mode}"
    for mode in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
)


class ExportError(OperationError):
    """A written model does not give in sentence-transformers what it gives here; it should not be published."""


def write_sentence_transformers(
    directory: str | os.PathLike[str],
    *,
    huggingface_config: Mapping[str, Any],
    tokenizer: TextTokenizer,
    write_weights: Callable[[Path], object],
    model_card: str | Callable[[], str],
    tokenizer_class: str = "BloomTokenizerFast",
    overwrite: bool = False,
) -> ModelPath:
    """Writes a sentence-transformers directory, local or in a bucket; returns its path.

    Everything is written by `new_directory`, so that what bears the name is whole.

    Args:
        huggingface_config: `config.json`; `hidden_size` (or `n_embed`) is the embeddings' width.
        tokenizer: tokenizer and text format.
        write_weights: called with the directory; puts `model.safetensors` (or shards and index) there, in the names of
            transformers' AutoModel.
        model_card: `README.md`; a function is called when the weights are written.
        tokenizer_class: a name that transformers 4 knows; 5 takes `tokenizer.json` under any.
        overwrite: replace a directory that holds nothing but a model written by this function.

    Raises:
        InputError: the directory is there and not empty, and `overwrite` is False or it holds something else.
    """
    target = model_path(directory)
    refuse_existing(target, overwrite)
    with new_directory(target) as partial:
        write_weights(partial)
        card = model_card if isinstance(model_card, str) else model_card()
        write_description(partial, huggingface_config, tokenizer, card, tokenizer_class)
    return target


def exported_config(huggingface_config: Mapping[str, Any], dtypes: Iterable[Any]) -> dict[str, Any]:
    """The `config.json` of an export whose tensors have these dtypes.

    Trained and frozen parameters may differ; readers cast all to the dtype that the config names, under the key that
    old transformers read too.
    """
    others = {key: value for key, value in huggingface_config.items() if key != "dtype"}
    return {**others, "torch_dtype": jnp.result_type(*dtypes).name}


def is_causal(huggingface_config: Mapping[str, Any]) -> bool:
    """Whether the decoder of a `config.json` attends backwards only."""
    return bool(huggingface_config.get("is_causal", True))


def oldest_readers(text_format: TextFormat, causal: bool = True) -> dict[str, str]:
    """The oldest releases, by package, that read an export as it is meant.

    sentence-transformers 5.7 puts a suffix back after truncation; 6.0 is the first to heed what is required of
    transformers, whose BLOOM took no notice of `is_causal` in 4; the `first` token after a prompt is found by 6.2,
    and 5 reads the first one of the row.
    """
    reader = "5.7" if text_format.has_suffixes else "5.1"
    if not causal:
        reader = "6.0"
    if text_format.pooling == "first" and not text_format.include_prompt:
        reader = "6.2"
    # The release that was tried; some before it may do.
    return {"sentence-transformers": reader, **({} if causal else {"transformers": "5.24"})}


def write_description(
    directory: Path,
    huggingface_config: Mapping[str, Any],
    tokenizer: TextTokenizer,
    model_card: str,
    tokenizer_class: str = "BloomTokenizerFast",
) -> None:
    """Writes all files of a sentence-transformers directory but the weights."""
    write_json(directory / "config.json", dict(huggingface_config))
    tokenizer.save(directory)
    causal = is_causal(huggingface_config)
    if not causal:
        # transformers 4, which would read the weights as a causal model's, cannot load this one.
        tokenizer_class = "TokenizersBackend"
    write_json(directory / "tokenizer_config.json", _tokenizer_config(tokenizer, tokenizer_class))
    _write_modules(directory, tokenizer.text_format, _width(huggingface_config), causal)
    (directory / "README.md").write_text(model_card, encoding="utf-8")


@dataclass(frozen=True)
class Verification:
    """What `verify_export` found; `str()` of it is a line to print."""

    texts: int
    difference: float
    text: str
    role: RoleName
    reader: str

    def __str__(self) -> str:
        return (
            f"{self.reader} gives the same ids and embeddings for {self.texts} edge texts in both roles; largest "
            f"difference {self.difference:.1e} ({self.role} {_shown(self.text)})"
        )


def can_verify() -> bool:
    """Whether what `verify_export` reads with is installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "sentence_transformers"))


def verify_export(
    directory: str | os.PathLike[str],
    encode: Callable[[list[str], RoleName], Float[np.ndarray, "texts dim"]],
    tokenize: Callable[[list[str], RoleName], list[np.ndarray]],
    name: str | None = None,
) -> Verification | None:
    """Loads an exported model in sentence-transformers (CPU, float32) and compares ids and embeddings on edge texts.

    Args:
        encode: our embeddings of texts in a role, computed in float32 from the weights in the directory.
        tokenize: our token ids of texts in a role.
        name: of the directory, in errors.

    Returns:
        The largest difference, or None where sentence-transformers is not installed.

    Raises:
        ExportError: other ids, or an embedding that differs by more than `TOLERANCE`; names text and role.
    """
    if not can_verify():
        return None
    import torch
    from sentence_transformers import SentenceTransformer

    where = name or os.fspath(directory)
    reader = f"sentence-transformers {importlib.metadata.version('sentence-transformers')}"
    try:
        model = SentenceTransformer(
            str(directory), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
        )
    except ImportError as error:  # what the export requires is newer than what is installed
        why = " ".join(str(error).split())
        raise ExportError(f"{where}: cannot be verified, {reader} refuses it here: {why}") from error
    text_format = read_text_format(directory)
    texts = edge_texts(text_format)
    for role in ROLES:
        features = model.preprocess(texts, prompt=model.prompts[role], task=role)
        masks = features["attention_mask"].bool()
        theirs = [ids[mask].tolist() for ids, mask in zip(features["input_ids"], masks)]
        for text, our_ids, their_ids in zip(texts, tokenize(texts, role), theirs):
            if our_ids.tolist() != their_ids:
                raise ExportError(_ids_differ(where, reader, role, text, our_ids.tolist(), their_ids))

    worst: tuple[float, str, RoleName] = (0.0, texts[0], ROLES[0])
    encoders = {"query": model.encode_query, "document": model.encode_document}
    for role in ROLES:
        # Four at a time: rows are padded, and few are padded to the length of the longest.
        theirs = encoders[role](texts, batch_size=4, show_progress_bar=False, convert_to_numpy=True)
        ours = np.asarray(encode(texts, role), np.float32)
        if ours.shape != theirs.shape:
            raise ExportError(
                f"{where}: {reader} gives embeddings of shape {theirs.shape}, jaxembed {ours.shape}; role {role}"
            )
        lengths = np.maximum(np.linalg.norm(theirs, axis=-1), np.finfo(np.float32).tiny)
        differences = np.abs(ours - theirs).max(axis=-1) / lengths
        for text, difference in zip(texts, differences.tolist()):
            if not difference <= TOLERANCE:  # also where it is NaN
                raise ExportError(
                    f"{where}: {reader} gives another embedding than jaxembed: largest difference "
                    f"{difference:.1e}, allowed {TOLERANCE:.0e}; role {role}, text {_shown(text)}"
                )
            worst = max(worst, (difference, text, role), key=lambda each: each[0])
    return Verification(len(texts), worst[0], worst[1], worst[2], reader)


def edge_texts(text_format: TextFormat) -> list[str]:
    """Texts on which readers of a model tend to differ, among them one that is too long and one with markers.

    The latter is left out where markers in texts stay text, which no other reader can do.
    """
    texts = [*EDGE_TEXTS, " ".join(f"word{number}" for number in range(text_format.max_length))]
    if text_format.literal_markers == "token":
        roles = (text_format.query, text_format.document)
        markers = dict.fromkeys(part for role in roles for part in (role.prefix, role.suffix) if part)
        texts.append(f"literal {' '.join(markers)} and </s> <s>")
    return texts


def refuse_existing(target: ModelPath, overwrite: bool) -> None:
    """Refuses a directory that `write_sentence_transformers` would refuse.

    Raises:
        InputError: it is there and not empty, and `overwrite` is False or it holds something else than a model.
    """
    if not target.exists() or is_incomplete(target):
        return
    if not target.is_dir():
        raise InputError(f"{target}: is a file; a model is written as a directory")
    found = sorted(entry.name for entry in target.iterdir())
    if found and not overwrite:
        raise InputError(f"{target}: is not empty; choose another directory, or allow it with overwrite")
    foreign = [
        name for name in found if name not in _WRITTEN and not (name.startswith("model") and ".safetensors" in name)
    ]
    if foreign:
        raise InputError(f"{target}: holds {foreign[0]!r}, which is no part of a model; choose another directory")


def _width(config: Mapping[str, Any]) -> int:
    width = config.get("hidden_size", config.get("n_embed"))
    if not isinstance(width, int):
        raise InputError(f"config.json: expected hidden_size or n_embed, found only {', '.join(config)}")
    return width


def _tokenizer_config(tokenizer: TextTokenizer, tokenizer_class: str) -> dict[str, Any]:
    text_format = tokenizer.text_format
    added = {token.content for token in tokenizer.tokenizer.get_added_tokens_decoder().values()}
    parts = [part for role in (text_format.query, text_format.document) for part in (role.prefix, role.suffix)]
    known = set(tokenizer.special_tokens.values())
    markers = list(dict.fromkeys(part for part in parts if part in added - known))
    return {
        "tokenizer_class": tokenizer_class,
        **tokenizer.special_tokens,
        **({"additional_special_tokens": markers} if markers else {}),
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 adds token_type_ids otherwise
        "model_max_length": text_format.max_length,  # without it nothing is truncated
        # Older sentence-transformers count places, and find the first token, from the beginning of the row.
        "padding_side": "left" if text_format.pooling == "last" else "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
    }


def _write_modules(directory: Path, text_format: TextFormat, width: int, causal: bool) -> None:
    names = ["Transformer", "Pooling", *(["Normalize"] if text_format.normalize else [])]
    paths = ["" if index == 0 else f"{index}_{name}" for index, name in enumerate(names)]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (name, path) in enumerate(zip(names, paths))
    ]
    write_json(directory / "modules.json", modules)
    for path in paths[1:]:
        (directory / path).mkdir()
    mode, old_key = SENTENCE_TRANSFORMERS_POOLING[text_format.pooling]
    pooling = {
        "word_embedding_dimension": width,
        **{key: key == old_key for key in _POOLING_KEYS},
        "include_prompt": text_format.include_prompt,
        "pooling_mode": mode,  # sentence-transformers 6 reads this one
    }
    write_json(directory / "1_Pooling" / "config.json", pooling)
    if text_format.normalize:
        normalize = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
        write_json(directory / "2_Normalize" / "config.json", normalize)

    transformer: dict[str, Any] = {"max_seq_length": text_format.max_length, "do_lower_case": False}
    oldest = oldest_readers(text_format, causal)
    sentence_transformers = {
        # The oldest version that reads the files as meant; older ones warn.
        "__version__": {"sentence_transformers": f"{oldest['sentence-transformers']}.0"},
        "model_type": "SentenceTransformer",
        "prompts": {"query": text_format.query.prompt, "document": text_format.document.prompt},
        "default_prompt_name": "query",
        "similarity_fn_name": "cosine",
    }
    if text_format.has_suffixes:
        forward = {"method": "forward", "method_output_name": "last_hidden_state"}
        transformer |= {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": forward, "message": {**forward, "format": "flat"}},
            "module_output_name": "token_embeddings",
            # 5.6 and newer take it out; older ones hand it on to the template, which then refuses.
            "processing_kwargs": {"chat_template": {"restore_suffix": True}},
        }
        (directory / "chat_template.jinja").write_text(chat_template(text_format), encoding="utf-8")
    if oldest != oldest_readers(DEFAULT_TEXT_FORMAT):
        sentence_transformers["requirements"] = {package: f">={version}" for package, version in oldest.items()}
    write_json(directory / "sentence_bert_config.json", transformer)
    write_json(directory / "config_sentence_transformers.json", sentence_transformers)


def chat_template(text_format: TextFormat) -> str:
    """The Jinja template that puts prefix, instruction and suffix around a message.

    sentence-transformers hands the prompt over as system message and, from 6.0 on, the role as `task`. The prompt's
    prefix tells the role, else `task` does, else it is a query. A prompt without prefix is taken as an instruction.

    A reader that sets `restore_suffix` has not taken notice of it: it would cut the suffix off texts that are too long.
    """
    query, document = text_format.query, text_format.document
    tests = []
    if query.prefix != document.prefix:
        by_length = sorted((("query", query), ("document", document)), key=lambda each: -len(each[1].prefix))
        tests = [(f"ns.prompt.startswith({_quoted(role.prefix)})", name) for name, role in by_length if role.prefix]
    tests.append(('task is defined and task == "document"', "document"))
    choice = "".join(
        f'{{%- {"elif" if index else "if"} {test} -%}}{{%- set role = "{name}" -%}}\n'
        for index, (test, name) in enumerate(tests)
    )
    cases = "".join(
        f'{{%- {"elif" if index else "if"} role == "{name}" -%}}\n'
        f"{{%- if not ns.prompt -%}}{{%- set ns.prompt = {_quoted(role.prompt)} -%}}\n"
        f"{{%- elif not ns.prompt.startswith({_quoted(role.prefix)}) -%}}"
        f"{{%- set ns.prompt = {_quoted(role.prefix)} + ns.prompt -%}}\n"
        "{%- endif -%}\n"
        f"{{{{- ns.prompt + ns.text + {_quoted(role.suffix)} -}}}}\n"
        for index, (name, role) in enumerate((("query", query), ("document", document)))
    )
    return (
        f"{{%- if restore_suffix is defined -%}}{{{{- raise_exception({_quoted(_TOO_OLD)}) -}}}}{{%- endif -%}}\n"
        '{%- set ns = namespace(prompt="", text="") -%}\n'
        "{%- for message in messages -%}\n"
        '{%- if message["role"] == "system" -%}{%- set ns.prompt = message["content"] -%}\n'
        '{%- else -%}{%- set ns.text = ns.text + message["content"] -%}\n'
        "{%- endif -%}\n"
        "{%- endfor -%}\n"
        f'{choice}{{%- else -%}}{{%- set role = "query" -%}}\n'
        "{%- endif -%}\n"
        f"{cases}{{%- endif -%}}"
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "…")


def _ids_differ(where: str, reader: str, role: str, text: str, ours: Sequence[int], theirs: Sequence[int]) -> str:
    first = next((place for place, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
    window = slice(max(first - 2, 0), first + 3)
    return (
        f"{where}: {reader} tokenises otherwise than jaxembed: {len(theirs)} and {len(ours)} ids, the first "
        f"difference at {first}: {theirs[window]} and {ours[window]}; role {role}, text {_shown(text)}"
    )
