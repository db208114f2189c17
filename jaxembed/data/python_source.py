"""Pairs from Python source: a docstring's summary as query, its function without the docstring as document.

Nothing is imported or run: files are found, parsed with `ast`, and cut by line numbers.
"""

import ast
import copy
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from jaxembed.data.sources import DUPLICATE, Examples, describe_dropped
from jaxembed.errors import InputError

FEW_WORDS = "docstring of fewer than 3 words"
NO_CODE = "no code beside the docstring"
ALSO_HELD_OUT = "also held out"
UNREADABLE = "unreadable file"

_log = logging.getLogger(__name__)

_QUERY_CHARACTERS = 300
_PROGRESS_FROM_FILES = 1000
_NOT_SOURCE = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
_NOT_LIBRARY = {"idlelib", "lib2to3", "turtledemo", "test"}
# A docstring's summary ends where one of its sections begins, in Google's, numpy's, Sphinx's or doctest's manner.
_SECTION = re.compile(
    r"\s*(?:(?:Args|Arguments|Parameters|Params|Returns?|Raises|Yields|Examples?|Notes?|See also|Attributes|Usage)"
    r"\s*:?\s*$"
    r"|[:@](?:param|type|returns?|rtype|raises)\b|>>>|\.\. |[-=~*]{3,}\s*$)",
    re.IGNORECASE,
)

# Where a node keeps statements, and where it keeps what keeps statements.
_STATEMENTS = ("body", "handlers", "cases", "orelse", "finalbody")
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class _Pair:
    id: str
    query: str
    document: str

    @property
    def key(self) -> str:
        """Equal for copies of a function, whatever their indentation and docstring."""
        return "".join(self.document.split())


def harvest_python(
    *,
    name: str,
    path: str | os.PathLike[str] | None = "stdlib",
    packages: Sequence[str] = (),
    held_out: float = 0.1,
    part: Literal["train", "held_out", "all"] = "train",
) -> Examples:
    """(docstring summary → function without its docstring) pairs of functions, async functions and methods.

    The modules below `path` are divided into train and held-out by a hash of their names, the same on every machine;
    packages are for training only. A function in held-out is nowhere in train, copies of it included; the first of
    several copies stays. A function inside a documented function is part of that one's document and no pair of its own.
    Order: modules below `path` by name, then packages as listed.

    Args:
        name: the source's name.
        path: "stdlib" for the standard library of this interpreter, a local folder, or None for packages alone.
        packages: installed packages, by distribution name ("orbax-checkpoint") or import name; missing ones are named
            in a warning.
        held_out: share of the modules below `path` that is held out, in [0, 1).
        part: which side; "all" is both, packages included.

    Raises:
        InputError: no such folder, a share outside [0, 1), or nothing to harvest.
    """
    if not 0 <= held_out < 1:
        raise InputError(f"data source {name!r}: held_out: expected a share in [0, 1), found {held_out}")
    modules = {} if path is None else _standard_library() if path == "stdlib" else _folder(path, name)
    kept_out = {module: file for module, file in modules.items() if is_held_out(module, held_out)}
    if part == "held_out":
        modules = kept_out
    else:
        modules = modules | _packages(packages, taken=modules)

    progress = tqdm(modules.items(), desc=name, unit="file", disable=len(modules) < _PROGRESS_FROM_FILES)
    with _no_garbage_collection():
        harvested = [(module, _harvest_file(module, file)) for module, file in progress]
    held_out_keys = {pair.key for module, (pairs, _) in harvested if module in kept_out for pair in pairs}

    kept: dict[str, _Pair] = {}
    dropped: Counter[str] = Counter()
    for module, (pairs, counts) in harvested:
        if part == "train" and module in kept_out:
            continue
        dropped += counts
        for pair in pairs:
            if part == "train" and pair.key in held_out_keys:
                dropped[ALSO_HELD_OUT] += 1
            elif pair.key in kept:
                dropped[DUPLICATE] += 1
            else:
                kept[pair.key] = pair
    if not kept:
        raise InputError(
            f"data source {name!r}: no documented function in {len(modules):,} Python files of the {part} part "
            f"(path: {path}, packages: {', '.join(packages) or 'none'}), {describe_dropped(dropped)}"
        )
    anchors = [pair.query for pair in kept.values()]
    positives = [pair.document for pair in kept.values()]
    return Examples(
        name=name,
        anchors=anchors,
        positives=positives,
        negatives=[()] * len(kept),
        ids=[pair.id for pair in kept.values()],
        dropped=dict(dropped),
        fingerprint=hashlib.sha256(repr((anchors, positives)).encode()).hexdigest(),
    )


def is_held_out(module: str, share: float) -> bool:
    """Whether a module, by its dotted name, is on the held-out side: its hash, read as a fraction, is below the share.

    What is hashed beside the name was chosen by the count of pairs alone: a tenth of the standard library's modules
    then holds about a tenth of its pairs. The bare name would hold out a fifth, a third of which is `tkinter`.
    """
    return int.from_bytes(hashlib.sha256(f"held-out:{module}".encode()).digest()[:8]) < share * 2**64


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Trees have no cycles, but allocating their nodes starts collections that take longer than the parsing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _standard_library() -> dict[str, Path]:
    names = sys.stdlib_module_names - _NOT_LIBRARY
    files = _below(Path(sysconfig.get_path("stdlib")))
    return {
        module: file
        for module, file in files.items()
        if module.split(".")[0] in names and not _is_test(module.split("."))
    }


def _folder(path: str | os.PathLike[str], name: str) -> dict[str, Path]:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(f'{folder}: no such folder (data source {name!r}; path is "stdlib" or a local folder)')
    return _below(folder)


def _below(folder: Path, prefix: tuple[str, ...] = ()) -> dict[str, Path]:
    """Dotted module name → file for every Python file below a folder, by name; no hidden folders, no environments."""
    found = {}
    for root, folders, files in os.walk(folder):
        here = Path(root)
        folders[:] = [
            sub
            for sub in folders
            if not sub.startswith(".") and sub not in _NOT_SOURCE and not (here / sub / "pyvenv.cfg").exists()
        ]
        for file in files:
            if file.endswith(".py"):
                found[_module_name((*prefix, *here.relative_to(folder).parts, file)) or folder.name] = here / file
    return dict(sorted(found.items()))


def _module_name(parts: Sequence[str]) -> str:
    *parents, last = parts
    stem = last.removesuffix(".py")
    return ".".join(parents if stem == "__init__" else [*parents, stem])


def _is_test(parts: Sequence[str]) -> bool:
    return not {"test", "tests"}.isdisjoint(parts) or parts[-1].startswith("test_") or parts[-1].endswith("_test")


def _packages(packages: Sequence[str], taken: dict[str, Path]) -> dict[str, Path]:
    """Modules of installed packages, their tests left out, without those whose name or file is taken already."""
    found: dict[str, Path] = {}
    missing = []
    taken_files = {file.resolve() for file in taken.values()} if packages else set()
    for package in packages:
        files = _distribution(package) or _import_package(package)
        if not files:
            missing.append(package)
        for module, file in files.items():
            if module not in taken and not _is_test(module.split(".")) and file.resolve() not in taken_files:
                found.setdefault(module, file)
    if missing:
        _log.warning("not installed, or without Python source, and therefore not harvested: %s", ", ".join(missing))
    return found


def _distribution(name: str) -> dict[str, Path]:
    try:
        distribution = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return {}
    files = [
        file
        for file in distribution.files or ()
        if file.suffix == ".py" and ".." not in file.parts and not file.name.startswith("__editable__")
    ]
    return dict(sorted((_module_name(file.parts), Path(str(file.locate()))) for file in files))


def _import_package(name: str) -> dict[str, Path]:
    """Only the top package is looked up: `find_spec` of a dotted name would import its parents."""
    name = name.replace("-", "_")
    top = name.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return {}
    found: dict[str, Path] = {}
    if spec is not None and spec.submodule_search_locations is not None:
        for location in spec.submodule_search_locations:
            found = _below(Path(location), (top,)) | found
    elif spec is not None and spec.has_location and spec.origin and spec.origin.endswith(".py"):
        found[top] = Path(spec.origin)
    return {module: file for module, file in found.items() if f"{module}.".startswith(f"{name}.")}


def _harvest_file(module: str, file: Path) -> tuple[list[_Pair], Counter[str]]:
    dropped: Counter[str] = Counter()
    pairs = []
    try:
        # `decode_source` follows the coding cookie and makes every line end "\n", so that lines are those of `ast`.
        source = importlib.util.decode_source(file.read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        dropped[UNREADABLE] += 1
        return pairs, dropped
    lines = source.split("\n")
    places: set[str] = set()
    for qualified_name, function in _documented_functions(tree):
        query = _summary(ast.get_docstring(function, clean=False) or "")
        if len(query.split()) < 3:
            dropped[FEW_WORDS] += 1
        elif all(isinstance(statement, ast.Pass) or _is_constant(statement) for statement in function.body):
            dropped[NO_CODE] += 1
        else:
            place = f"{module}:{qualified_name}"
            if place in places:  # a property's setter, or a definition for another platform
                place = f"{place}:{function.lineno}"
            places.add(place)
            pairs.append(_Pair(place, query, _without_docstring(function, lines)))
    return pairs, dropped


def _documented_functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, _Function]]:
    """Functions with a docstring and their qualified names, in the order of the file, none inside another."""
    for node in (node for field in _STATEMENTS for node in getattr(tree, field, ())):
        if isinstance(node, ast.ClassDef):
            yield from _documented_functions(node, f"{prefix}{node.name}.")
        elif not isinstance(node, _Function):
            yield from _documented_functions(node, prefix)
        elif ast.get_docstring(node, clean=False) is None:
            yield from _documented_functions(node, f"{prefix}{node.name}.<locals>.")
        else:
            yield prefix + node.name, node


def _summary(docstring: str) -> str:
    """The first paragraph on one line, cut after a sentence, else after a word, where it is long."""
    paragraph = []
    for line in inspect.cleandoc(docstring).split("\n"):
        if not line.strip() or _SECTION.match(line):
            break
        paragraph.append(line)
    text = " ".join(" ".join(paragraph).split()).encode("utf-8", "replace").decode()
    if len(text) <= _QUERY_CHARACTERS:
        return text
    cut = text[: _QUERY_CHARACTERS + 1]
    sentence = cut.rfind(". ")
    return cut[: sentence + 1] if sentence > 0 else cut.rpartition(" ")[0] or cut[:-1]


def _without_docstring(function: _Function, lines: Sequence[str]) -> str:
    """The function's text from `def` on, comments kept, dedented; its tree is the original's but for the docstring."""
    docstring, after = function.body[:2]
    # Columns of `ast` count UTF-8 bytes.
    before = lines[docstring.lineno - 1].encode()[: docstring.col_offset].decode()
    behind = lines[(docstring.end_lineno or 0) - 1].encode()[docstring.end_col_offset :].decode()
    next_line = min([after.lineno, *(node.lineno for node in getattr(after, "decorator_list", ()))])
    gap = [behind, *lines[docstring.end_lineno : next_line - 1]]
    if before.strip() or any(text.strip() and not text.lstrip().startswith("#") for text in gap):
        # The docstring shares its line with code, or stands in parentheses.
        bare = copy.copy(function)
        bare.body, bare.decorator_list = function.body[1:], []
        return ast.unparse(bare)
    head = range(function.lineno, docstring.lineno)
    body = range((docstring.end_lineno or 0) + 1, (function.end_lineno or 0) + 1)
    comment = [behind.strip()] if behind.strip() else []
    verbatim = _lines_inside_strings(function, lines, [*head, *body])
    indent = lines[function.lineno - 1][: function.col_offset]

    def dedented(number: int) -> str:
        line = lines[number - 1]
        if number in verbatim:
            return line
        return line[len(indent) :] if line.startswith(indent) else line.lstrip()

    rest = [dedented(number) for number in body]
    while not comment and not rest[0].strip():
        rest.pop(0)
    return "\n".join([*map(dedented, head), *(before[len(indent) :] + text for text in comment), *rest])


def _lines_inside_strings(function: _Function, lines: Sequence[str], numbers: Iterable[int]) -> set[int]:
    """Numbers of the lines that begin within a string literal: dedenting them would change its value."""

    def may_go_on(number: int) -> bool:
        line = lines[number - 1]
        return '"""' in line or "'''" in line or line.endswith("\\")

    inside: set[int] = set()
    if any(map(may_go_on, numbers)):  # most functions end here, without a walk over their tree
        for node in ast.walk(function):
            if isinstance(node, ast.JoinedStr) or (
                isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
            ):
                last = node.end_lineno or node.lineno
                if last > node.lineno and any(map(may_go_on, range(node.lineno, last + 1))):
                    inside.update(range(node.lineno + 1, last + 1))
    return inside


def _is_constant(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
