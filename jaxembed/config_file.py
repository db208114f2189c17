"""Reads a pydantic model from a YAML file and `--section.key value` overrides, and lists its options for `--help`.

OmegaConf merges and resolves, pydantic validates. Whatever is wrong ends in one InputError that names the file, the
line and the dotted key, or the override.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from etils import epath
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from jaxembed.errors import InputError

_Config = TypeVar("_Config", bound=BaseModel)
_Model = type[BaseModel]
_Keys = tuple[str | int, ...]


def read_config(
    model: type[_Config],
    path: epath.PathLike,
    overrides: Sequence[str] = (),
    replaces: Mapping[str, Sequence[str]] = types.MappingProxyType({}),
) -> _Config:
    """Reads a YAML file, applies the overrides and validates the whole.

    Args:
      model: what the file holds.
      path: the file.
      overrides: `--section.key value` or `--section.key=value`, later ones over earlier ones; a number in a key is a
        place in a list (`--data.train.0.path X`). A value is read as YAML, except that an option which holds text
        takes it as it stands. `${section.key}` stands for another key's value; environment variables are not read.
      replaces: for a key or section that an override may give, those that it then replaces in the file.

    Raises:
      InputError: with file, line and key, or the override, of everything that is wrong.
    """
    data, lines = _read_yaml(epath.Path(path))
    assignments = _parse_overrides(model, overrides)
    merged = _merge(str(path), data, assignments, replaces)
    try:
        return model.model_validate(merged)
    except ValidationError as error:
        problems = [_describe(model, str(path), lines, assignments, problem) for problem in error.errors()]
        raise InputError("\n".join(problems)) from None


def dump_config(config: BaseModel) -> str:
    """The config as YAML with every key, which `read_config` reads back as the same config."""
    return yaml.dump(_escaped(config.model_dump()), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def options_help(model: _Model) -> str:
    """Every option as `--section.key`, with its type, default and meaning; N stands for a place in a list."""
    lines, listed = [], set()
    for option in _options(model):
        # Lists of the same things, such as sources to train on and to evaluate on, are spelled out once.
        about = (option.key.rpartition(".N.")[2], option.description) if ".N." in option.key else option.key
        if about in listed:
            continue
        listed.add(about)
        note = "required" if option.default is _REQUIRED else f"default: {_show(option.default)}"
        lines.append(f"  --{option.key} {_type_name(option.annotation)}  ({note})")
        lines.append(textwrap.fill(option.description, 110, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


class _Dumper(yaml.SafeDumper):
    """Puts text into quotes that YAML 1.1 or 1.2 would read as something else."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core types: `off` and `10:13` are text, `1e-4` is a number. A key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                problem = "found a key that is not text"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            if key.value in seen:
                problem = f"the key {key.value} stands there a second time"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value)


_Loader.yaml_implicit_resolvers = {}


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Within other quotes these would be read back as line ends.
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _read_yaml(file: epath.Path) -> tuple[dict[str, Any], dict[_Keys, int]]:
    """The file's mapping, and the line of every key in it."""
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such config file") from None
    except OSError as error:
        raise InputError(f"{file}: the config file cannot be read: {error.strerror or error}") from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{file}:{line}: expected UTF-8, found the byte {raw[error.start]:#04x}") from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        data = {} if node is None else loader.construct_document(node)
        lines = dict(_lines(node, ()))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InputError(f"{file}{f':{mark.line + 1}' if mark else ''}: not valid YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise InputError(f"{file}:{line}: not valid YAML: a character that it does not allow") from None
    except RecursionError:
        raise InputError(f"{file}: expected a mapping of sections, found one that contains itself") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise InputError(f"{file}: expected a mapping of sections, found {_show(data)}")
    return data, lines


def _lines(node: yaml.Node | None, keys: _Keys) -> Iterator[tuple[_Keys, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*keys, key.value), key.start_mark.line + 1
            yield from _lines(value, (*keys, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*keys, index), item.start_mark.line + 1
            yield from _lines(item, (*keys, index))


def _parse_overrides(model: _Model, overrides: Sequence[str]) -> dict[str, Any]:
    """Dotted key to value, in the order given."""
    assignments: dict[str, Any] = {}
    rest = list(overrides)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or len(argument) == 2:
            raise InputError(f"{argument}: expected an override, --section.key value")
        key, equals, text = argument[2:].partition("=")
        annotations = _annotations(model, key)
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"--{key}: expected a value after it, found {rest[0] if rest else 'nothing'}")
            text = rest.pop(0)
        assignments[key] = _parse_value(key, text, annotations)
    return assignments


def _annotations(model: _Model, key: str) -> list[Any]:
    """What an option may hold: one annotation, or one for each kind of thing in a list that has it."""
    current: list[Any] = [model]
    parts = key.split(".")
    for position, part in enumerate(parts):
        elements = [element for annotation in current if (element := _element(annotation)) is not None]
        if elements and not part.isdecimal():
            parent = ".".join(parts[:position])
            raise InputError(f"--{key}: {parent} is a list; expected {parent}.0 or another place in it")
        models = _models(*current)
        current = elements or [m.model_fields[part].annotation for m in models if part in m.model_fields]
        if not current:
            raise InputError(f"--{key}: {_unknown(model, tuple(parts[: position + 1]), models)}")
    return current


def _parse_value(key: str, text: str, annotations: Sequence[Any]) -> Any:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    leaves = {leaf for annotation in annotations for leaf in _leaves(annotation)}
    if not quoted and all(leaf in (str, type(None)) or isinstance(leaf, str) for leaf in leaves):
        return None if text == "null" and type(None) in leaves else text
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise InputError(f"--{key}: expected a value in YAML, found {_show(text)}") from None


def _merge(
    file: str, data: dict[str, Any], assignments: Mapping[str, Any], replaces: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    _refuse_resolvers(f"{file}: ", data)
    _refuse_resolvers("--", dict(assignments))
    try:
        config = OmegaConf.create(data)
        given = [key for key, value in assignments.items() if value is not None]
        for key, others in replaces.items():
            for other in others:
                if _any_within(given, key) and not _any_within(given, other):
                    section, _, last = other.rpartition(".")
                    holder = OmegaConf.select(config, section) if section else config
                    if OmegaConf.is_dict(holder):
                        holder.pop(last, None)
        for key, value in assignments.items():
            _check_places(file, config, key)
            OmegaConf.update(config, key, value)
        merged: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        reason = str(error).splitlines()[0]
        if isinstance(error, InterpolationKeyError):
            reason = f"${{…}} names a key that neither the file nor an override sets ({reason})"
        raise InputError(f"{file}: {f'{key}: ' if key else ''}{reason}") from None
    return merged


def _any_within(keys: Sequence[str], section: str) -> bool:
    return any(f"{key}.".startswith(f"{section}.") for key in keys)


def _check_places(file: str, config: DictConfig, key: str) -> None:
    """OmegaConf would make a mapping with the key "0" out of a list that is not there."""
    parts = key.split(".")
    for position, part in enumerate(parts):
        if part.isdecimal():
            parent = ".".join(parts[:position])
            items = OmegaConf.select(config, parent)
            count = len(items) if OmegaConf.is_list(items) else 0
            if int(part) >= count:
                entries = "1 entry" if count == 1 else f"{count} entries"
                raise InputError(f"--{key}: {parent} has {entries} in {file}, counted from 0")


def _refuse_resolvers(where: str, value: Any, keys: _Keys = ()) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_resolvers(where, item, (*keys, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_resolvers(where, item, (*keys, index))
    elif isinstance(value, str) and (match := re.search(r"(?<!\\)\$\{[^}]*:", value)):
        raise InputError(
            f"{where}{_dotted(keys)}: found {match[0]}…; expected ${{section.key}}, another key of the config: "
            "environment variables and functions are not read"
        )


def _escaped(value: Any) -> Any:
    """The value with every `${` made plain text for OmegaConf."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, str):
        # One backslash says "no interpolation"; those before it count double.
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text (a number or true/false that is meant as text stands in quotes)",
    "bool_type": "true or false",
    "list_type": "a list",
    "model_type": "a section with keys",
    "model_attributes_type": "a section with keys",
    "too_short": "at least one entry",
    "string_too_short": "text that is not empty",
}


def _describe(
    model: _Model, file: str, lines: Mapping[_Keys, int], assignments: Mapping[str, Any], problem: Any
) -> str:
    """One of pydantic's errors in our words: where, what was expected, what was found."""
    keys, models = _locate(model, problem["loc"])
    dotted, found = _dotted(keys), problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            message = _unknown(model, keys, models)
        case "missing":
            message = "required, but missing"
        case "value_error":
            message = str(problem["ctx"]["error"])
        case "union_tag_not_found" | "union_tag_invalid":
            name = problem["ctx"]["discriminator"].strip("'")
            tag = found.get(name) if isinstance(found, dict) else found
            tags = problem["ctx"].get("expected_tags") or ", ".join(
                f"'{value}'" for m in models for value in _leaves(m.model_fields[name].annotation)
            )
            message = f"expected {name}: one of {tags}, found {_show(tag)}"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            message = f"expected a number {_expected(problem)}, found {_show(found)}"
        case kind:
            message = f"expected {_EXPECTED.get(kind) or _expected(problem)}, found {_show(found)}"
    if any(_any_within([dotted], key) for key in assignments):
        return f"--{dotted}: {message}"
    place = f"{file}{_line(lines, keys)}"
    within = [f"--{key}" for key in assignments if not keys or _any_within([key], dotted)]
    if within:
        place = f"{file} with {', '.join(within)}"
    return f"{place}: {f'{dotted}: ' if keys else ''}{message}"


def _expected(problem: Any) -> str:
    return re.sub(r"^.* should (be|have|match) ", "", problem["msg"])


def _locate(model: _Model, location: Sequence[str | int]) -> tuple[_Keys, list[_Model]]:
    """The keys of the file that pydantic's location stands for, and the models of which the last one is a key.

    Where a list holds several kinds of things, the location has the kind after the place in the list.
    """
    keys: list[str | int] = []
    current: list[Any] = [model]
    models = [model]
    parts = iter(location)
    for part in parts:
        keys.append(part)
        models = _models(*current)
        if isinstance(part, int):
            current = [element for annotation in current if (element := _element(annotation)) is not None]
            models = _models(*current)
            if len(models) > 1 and (tag := next(parts, None)) is not None:
                current = [m for m in models if any(tag in _leaves(f.annotation) for f in m.model_fields.values())]
        else:
            current = [m.model_fields[part].annotation for m in models if part in m.model_fields]
    return tuple(keys), models


def _line(lines: Mapping[_Keys, int], keys: _Keys) -> str:
    """`:12`, the line of the key or of the innermost section around it that the file has."""
    for length in range(len(keys), 0, -1):
        if keys[:length] in lines:
            return f":{lines[keys[:length]]}"
    return ""


def _unknown(root: _Model, keys: _Keys, models: Sequence[_Model]) -> str:
    """What to say of a key that is no option: the closest option, looked for in its section, then everywhere."""
    name, parent = str(keys[-1]), _dotted(keys[:-1])
    siblings = sorted({field for model in models for field in model.model_fields})
    for candidate in difflib.get_close_matches(name, siblings, n=1, cutoff=0.7):
        return f"no such option; did you mean {parent + '.' if parent else ''}{candidate}?"
    everywhere = {option.key.rpartition(".")[2]: option.key for option in _options(root) if ".N." not in option.key}
    for candidate in difflib.get_close_matches(name, everywhere, n=1, cutoff=0.8):
        return f"no such option; did you mean {everywhere[candidate]}?"
    return f"no such option; {parent or 'the config'} has {', '.join(siblings) or 'no keys of its own'}"


_REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class _Option:
    key: str
    annotation: Any
    default: Any
    description: str


def _options(model: _Model, prefix: str = "", defaults: BaseModel | None = None) -> Iterator[_Option]:
    """Every option below a model; `defaults` is the section's default where it has one that is not the model's own."""
    for name, field in model.model_fields.items():
        default = _REQUIRED if field.is_required() else field.default
        if defaults is not None:
            default = getattr(defaults, name)
        element = _element(field.annotation)
        models = _models(field.annotation if element is None else element)
        if not models or element is not None or default is None:
            yield _Option(prefix + name, field.annotation, default, field.description or "")
        for nested in models:
            below = default if isinstance(default, nested) else None
            yield from _options(nested, f"{prefix}{name}.{'N.' if element is not None else ''}", below)


def _type_name(annotation: Any) -> str:
    names = {int: "INT", float: "FLOAT", bool: "true|false", str: "TEXT", type(None): "null"}
    leaves = [
        "LIST" if get_origin(leaf) is list else "SECTION" if _is_model(leaf) else names.get(leaf, str(leaf))
        for leaf in _leaves(annotation)
    ]
    return "|".join(leaves)


def _leaves(annotation: Any) -> list[Any]:
    """The types and literal values that an annotation comes down to."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _leaves(get_args(annotation)[0])
    if origin is Literal:
        return list(get_args(annotation))
    if origin in (Union, types.UnionType):
        return [leaf for part in get_args(annotation) for leaf in _leaves(part)]
    return [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _models(*annotations: Any) -> list[_Model]:
    return [leaf for annotation in annotations for leaf in _leaves(annotation) if _is_model(leaf)]


def _element(annotation: Any) -> Any:
    """What a list holds; None for what is no list."""
    return next((get_args(leaf)[0] for leaf in _leaves(annotation) if get_origin(leaf) is list), None)


def _dotted(keys: _Keys) -> str:
    return ".".join(str(key) for key in keys)


def _show(value: Any) -> str:
    """A value as the user would write it, on one short line."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
