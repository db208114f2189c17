"""How a text becomes a token sequence: what is put before and after it, how long it may be, what is pooled.

A model is trained with one text format and understands no other, so the format is saved beside its weights
(`jaxembed_text_format.json`) and the same value serves training, encoding, mining, evaluation and export.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import yaml
from etils import epath

from jaxembed.errors import InputError

TEXT_FORMAT_FILE = "jaxembed_text_format.json"
UDEVER_MARKERS = ("[BOQ]", "[EOQ]", "[BOD]", "[EOD]")

RoleName = Literal["query", "document"]
LiteralMarkers = Literal["token", "text"]
Pooling = Literal["last", "mean", "weighted_mean", "first"]
ROLES: tuple[RoleName, ...] = get_args(RoleName)

SENTENCE_TRANSFORMERS_POOLING: Mapping[Pooling, tuple[str, str]] = {
    "last": ("lasttoken", "pooling_mode_lasttoken"),
    "mean": ("mean", "pooling_mode_mean_tokens"),
    "weighted_mean": ("weightedmean", "pooling_mode_weightedmean_tokens"),
    "first": ("cls", "pooling_mode_cls_token"),
}
"""Names in sentence-transformers' Pooling: the value of `pooling_mode`, and the older boolean key."""


@dataclass(frozen=True)
class Role:
    """What stands around a text: `prefix + instruction + text + suffix`.

    Attributes:
        prefix: a marker token ("[BOQ]") or plain text ("query: ") that names the role.
        suffix: the one added token that ends the sequence; "" leaves the end token to the tokenizer's post-processor.
        instruction: text between prefix and the user's text, such as a description of the task.
    """

    prefix: str = ""
    suffix: str = ""
    instruction: str = ""

    @property
    def prompt(self) -> str:
        """All that stands before the user's text; what sentence-transformers calls the prompt."""
        return self.prefix + self.instruction


@dataclass(frozen=True)
class TextFormat:
    """The text format of a model; see `Role` for the sequence.

    Attributes:
        max_length: tokens of a sequence at most, markers and end token included; a longer text loses its tail, never
            the end token.
        pooling: which hidden states are the embedding: that of the "last" or of the "first" token, the "mean" of all,
            or their "weighted_mean", by their place in the sequence: 1, 2, … (SGPT).
        include_prompt: whether prefix and instruction count in means; False: pooling begins after as many tokens as the
            prompt alone has, in sentence-transformers' way of counting. The last token is what it is.
        normalize: whether embeddings have unit length.
        literal_markers: what a marker that a user wrote into a text becomes: "token" as in every other reader of the
            exported model, or "text", which only jaxembed can do.

    Raises:
        InputError: a value out of its range, only one role with a suffix, or `include_prompt` False and suffixes, which
            sentence-transformers cannot have both.
    """

    query: Role = Role()
    document: Role = Role()
    max_length: int = 512
    pooling: Pooling = "last"
    include_prompt: bool = True
    normalize: bool = True
    literal_markers: LiteralMarkers = "token"

    def __post_init__(self) -> None:
        _check(vars(self), "text format")
        if bool(self.query.suffix) != bool(self.document.suffix):
            raise InputError(
                "text format: suffix: give both roles a suffix token, or neither (then the tokenizer's post-processor "
                f"adds the end token); got query {self.query.suffix!r}, document {self.document.suffix!r}"
            )
        if self.has_suffixes and not self.include_prompt:
            raise InputError(
                "text format: include_prompt: false does not go with a suffix: sentence-transformers puts such texts "
                "through a chat template, and leaves no prompt out there; the export would embed otherwise"
            )

    def role(self, name: str) -> Role:
        """The role of that name.

        Raises:
            InputError: the name is neither "query" nor "document".
        """
        if name not in ROLES:
            raise InputError(f'role: expected "query" or "document", got {name!r}')
        return self.query if name == "query" else self.document

    @property
    def has_suffixes(self) -> bool:
        """Whether each role ends in a token of its own, rather than in the post-processor's end token."""
        return bool(self.query.suffix)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any, where: str = "text format") -> TextFormat:
        """Reads what `to_dict` wrote, or the `text_format` part of a config; keys left out take their defaults.

        Raises:
            InputError: an unknown key or a wrong type; the message begins with `where`.
        """
        values = dict(_known(cls, values, where))
        for name in ROLES:
            if name in values:
                role = _known(Role, values[name], f"{where}: {name}")
                for key, value in role.items():
                    if not isinstance(value, str):
                        raise InputError(f"{where}: {name}.{key}: expected a string, got {value!r}")
                values[name] = Role(**role)
        _check(values, where)
        return cls(**values)


def _check(values: Mapping[str, Any], where: str) -> None:
    length = values.get("max_length", 1)
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise InputError(f"{where}: max_length: expected a whole number of tokens ≥ 1, got {length!r}")
    if values.get("pooling", "last") not in get_args(Pooling):
        raise InputError(f"{where}: pooling: expected {', '.join(get_args(Pooling))}, got {values['pooling']!r}")
    for key in ("include_prompt", "normalize"):
        if not isinstance(values.get(key, True), bool):
            raise InputError(f"{where}: {key}: expected true or false, got {values[key]!r}")
    if values.get("literal_markers", "token") not in get_args(LiteralMarkers):
        raise InputError(f'{where}: literal_markers: expected "token" or "text", got {values["literal_markers"]!r}')


def _known(cls: type, values: Any, where: str) -> Mapping[str, Any]:
    names = [field.name for field in dataclasses.fields(cls)]
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: expected a mapping with keys out of {', '.join(names)}; got {values!r}")
    if unknown := sorted(set(values) - set(names), key=str):
        raise InputError(f"{where}: unknown key {unknown[0]!r}; the keys are {', '.join(names)}")
    return values


DEFAULT_TEXT_FORMAT = TextFormat(query=Role(prefix="query: "), document=Role(prefix="document: "))
"""For models without markers of their own: text prefixes, the end token from the tokenizer. Every reader is exact."""

UDEVER = TextFormat(query=Role("[BOQ]", "[EOQ]"), document=Role("[BOD]", "[EOD]"), max_length=300)
"""The format of arXiv 2310.08232: a begin and an end marker for each role, 300 tokens at most."""


def read_text_format(directory: str | os.PathLike[str]) -> TextFormat:
    """The text format of the model in a directory.

    Read from the first that is there: `jaxembed_text_format.json`; udever's four markers among the tokenizer's added
    tokens; the files of sentence-transformers (prompts, maximum length, pooling, normalisation).

    Raises:
        InputError: none of them is there, or they ask for something that jaxembed does not support.
    """
    path = epath.Path(directory)
    if (path / TEXT_FORMAT_FILE).exists():
        return TextFormat.from_dict(read_json(path / TEXT_FORMAT_FILE), where=str(path / TEXT_FORMAT_FILE))
    tokenizer_file = path / "tokenizer.json"
    added = read_json(tokenizer_file).get("added_tokens", []) if tokenizer_file.exists() else []
    if {token["content"] for token in added}.issuperset(UDEVER_MARKERS):
        return UDEVER
    if (path / "modules.json").exists():
        return _read_sentence_transformers(path)
    raise InputError(
        f"{path}: no text format found (looked for {TEXT_FORMAT_FILE}, the markers {' '.join(UDEVER_MARKERS)} in "
        "tokenizer.json, and modules.json of sentence-transformers). A model that was not trained as an embedder has "
        'none: give one as `text_format`, for example {"query": {"prefix": "query: "}, "document": {"prefix": '
        '"document: "}, "max_length": 512}'
    )


def read_text_format_file(path: str | os.PathLike[str]) -> TextFormat:
    """A text format that stands alone in a YAML or JSON file, under the keys of a config's `text_format`.

    Raises:
        InputError: no such file, no YAML, or something else than a text format; names file and key.
    """
    try:
        values = yaml.safe_load(epath.Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {error}") from error
    return TextFormat.from_dict(values, where=str(path))


def write_text_format(text_format: TextFormat, directory: str | os.PathLike[str]) -> None:
    """Writes `jaxembed_text_format.json` into the directory."""
    write_json(epath.Path(directory) / TEXT_FORMAT_FILE, text_format.to_dict())


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file.

    Raises:
        InputError: there is no such file, or it isn't JSON in UTF-8.
    """
    try:
        return json.loads(epath.Path(path).read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f"{path}: not a JSON file: {error}") from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value as indented JSON, characters beyond ASCII as they are."""
    epath.Path(path).write_bytes((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _read_sentence_transformers(path: epath.Path) -> TextFormat:
    modules = {module["type"].rpartition(".")[2]: path / module.get("path", "") for module in _modules(path)}
    if unknown := sorted(set(modules) - {"Transformer", "Pooling", "Normalize"}):
        raise InputError(
            f"{path / 'modules.json'}: module {unknown[0]} is not supported; Transformer, Pooling, Normalize are"
        )
    if "Pooling" not in modules:
        raise InputError(f"{path / 'modules.json'}: no Pooling module, so it isn't known which token is the embedding")
    pooling_file = modules["Pooling"] / "config.json"
    pooling_config = read_json(pooling_file)
    mode = _pooling_mode(pooling_config)
    poolings: dict[Any, Pooling] = {names[0]: pooling for pooling, names in SENTENCE_TRANSFORMERS_POOLING.items()}
    if mode not in poolings:
        raise InputError(f"{pooling_file}: pooling {mode!r} is not supported; {', '.join(poolings)} are")
    transformer_file = modules.get("Transformer", path) / "sentence_bert_config.json"
    transformer = read_json(transformer_file) if transformer_file.exists() else {}
    if "message" in transformer.get("modality_config", {}):
        raise InputError(
            f"{transformer_file}: texts go through a chat template, which jaxembed cannot read; "
            "give the prefix and suffix of both roles as `text_format`"
        )
    if transformer.get("do_lower_case"):
        raise InputError(f"{transformer_file}: do_lower_case is not supported")
    prompts_file = path / "config_sentence_transformers.json"
    prompts = (read_json(prompts_file).get("prompts") or {}) if prompts_file.exists() else {}
    # encode_document of sentence-transformers tries these names in this order.
    document = next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), "")
    return TextFormat(
        query=Role(prefix=prompts.get("query", "")),
        document=Role(prefix=document),
        max_length=_max_length(path, transformer),
        pooling=poolings[mode],
        include_prompt=bool(pooling_config.get("include_prompt", True)),
        normalize="Normalize" in modules,
    )


def _modules(path: epath.Path) -> list[dict[str, Any]]:
    modules = read_json(path / "modules.json")
    if not isinstance(modules, list) or not all(isinstance(module, dict) and "type" in module for module in modules):
        raise InputError(f"{path / 'modules.json'}: expected a list of modules, each with a type and a path")
    return modules


def _pooling_mode(config: dict[str, Any]) -> Any:
    """The mode in either schema: sentence-transformers 6's one key, or one boolean a mode."""
    if (mode := config.get("pooling_mode")) is not None:
        modes = mode if isinstance(mode, list) else [mode]
    else:
        names = {key: mode for mode, key in SENTENCE_TRANSFORMERS_POOLING.values()}
        prefix = "pooling_mode_"
        keys = [key for key, on in config.items() if key.startswith(prefix) and on]
        # Without any, sentence-transformers takes the mean.
        modes = [names.get(key, key.removeprefix(prefix)) for key in keys] or ["mean"]
    return "+".join(map(str, modes))


def _max_length(path: epath.Path, transformer: dict[str, Any]) -> int:
    tokenizer_file = path / "tokenizer_config.json"
    tokenizer = read_json(tokenizer_file) if tokenizer_file.exists() else {}
    length = transformer.get("max_seq_length") or tokenizer.get("model_max_length")
    if not isinstance(length, int | float) or length > 2**31:  # transformers writes 1e30 for "no limit"
        raise InputError(f"{path}: neither max_seq_length nor model_max_length is set; give `text_format` a max_length")
    return int(length)
