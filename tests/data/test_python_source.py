import ast
import hashlib
import importlib.util
import json
import logging
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from jaxembed.data import python_source
from jaxembed.data.python_source import harvest_python, is_held_out
from jaxembed.errors import InputError


def tree(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def harvest_text(root: Path, source: str | bytes) -> dict[str, tuple[str, str]]:
    """Qualified name → (query, document) of one module."""
    examples = harvest_python(name="m", path=tree(root, {"m.py": source}), part="all")
    return {
        name.removeprefix("m:"): pair
        for name, pair in zip(examples.ids, zip(examples.anchors, examples.positives, strict=True), strict=True)
    }


def trees_without_docstring(source: str) -> dict[str, list[str]]:
    """What `ast.unparse` makes of every function of a module, at any depth, without its docstring and decorators."""
    found: dict[str, list[str]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = ast.parse(source)
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            node.body, node.decorator_list = node.body[1:], []
            found.setdefault(node.name, []).append(ast.unparse(node))
    return found


SHAPES = '''\
# -*- coding: utf-8 -*-
import functools


@functools.cache
@staticmethod
def decorated(a, *, b=1):
    """Add two numbers together.

    Not part of the query.
    """

    # a comment that stays
    return a + b  # this one too


class Outer:
    """A class docstring is no pair."""

    class Inner:
        def method(self):
            \'\'\'Return the text of
            several   lines.\'\'\'
            text = """first
  second
            third"""
            return (text,
        "less indented")

    async def wait(self, é="ünï", 名="字"): 'Wait for it "patiently" please.'; await self; return é

    @property
    def undocumented(self):
        def inner(x):
            "A function inside an undocumented one."
            return x

        return inner

    if True:
        try:
            def conditional(self):
                (
                    "Text in parentheses, on its own lines."
                )
                return 1
        except ValueError:
            def conditional(self):
                r"""Raw \\d docstring with a comment."""  # kept
                @functools.cache
                def helper():
                    """Helpers stay in their function."""
                    return 2
                return helper


def only_docstring():
    """This one has nothing to show."""


def stub() -> int:
    """An abstract thing without code."""
    ...


def laconic():
    """Two words."""
    return 0


def no_docstring():
    return 1


def not_a_docstring():
    f"an f-string is {1} no docstring"
    return 1


def bytes_are_none():
    b"these are no docstring either"
    return 1


def continued(): "Docstring before a semicolon." ; return "\\
   kept"
'''


def test_every_shape_of_function(tmp_path):
    pairs = harvest_text(tmp_path, SHAPES)
    second = [number for number, line in enumerate(SHAPES.split("\n"), 1) if "def conditional" in line][1]
    assert {name: query for name, (query, _) in pairs.items()} == {
        "decorated": "Add two numbers together.",
        "Outer.Inner.method": "Return the text of several lines.",
        "Outer.wait": 'Wait for it "patiently" please.',
        "Outer.undocumented.<locals>.inner": "A function inside an undocumented one.",
        "Outer.conditional": "Text in parentheses, on its own lines.",
        f"Outer.conditional:{second}": "Raw \\d docstring with a comment.",
        "continued": "Docstring before a semicolon.",
    }
    documents = {name: document for name, (_, document) in pairs.items()}
    assert documents["decorated"] == (
        "def decorated(a, *, b=1):\n    # a comment that stays\n    return a + b  # this one too"
    )
    assert documents["Outer.Inner.method"] == (
        'def method(self):\n    text = """first\n  second\n            third"""\n    return (text,\n"less indented")'
    )
    assert documents["Outer.wait"] == "async def wait(self, é='ünï', 名='字'):\n    await self\n    return é"
    assert documents["Outer.conditional"] == "def conditional(self):\n    return 1"
    assert documents[f"Outer.conditional:{second}"].startswith(
        "def conditional(self):\n    # kept\n    @functools.cache\n"
    )
    originals = trees_without_docstring(SHAPES)
    for name, document in documents.items():
        assert ast.unparse(ast.parse(document)) in originals[name.split(":")[0].rpartition(".")[2]]


def test_what_is_dropped_is_counted(tmp_path):
    files = {
        "a.py": SHAPES,
        "broken.py": "def f(:\n",
        "latin.py": b'def f():\n    "caf\xe9 is not UTF-8"\n    return 1\n',
        "null.py": b"x = 1\0\n",
        "cookie.py": b"# coding: no-such-codec\n",
    }
    examples = harvest_python(name="m", path=tree(tmp_path, files), part="all")
    assert examples.dropped == {
        "unreadable file": 4,
        "no code beside the docstring": 2,
        "docstring of fewer than 3 words": 1,
    }


def test_coding_cookies_line_ends_and_form_feeds(tmp_path):
    body = 'def f(é):\n    "Déjà vu once more."\n\f\n    x = "\x0b\x1c"\n    return é\n'
    expected = "def f(é):\n    x = '\\x0b\\x1c'\n    return é"
    for number, source in enumerate(
        [b"# coding: latin-1\n" + body.encode("latin-1"), body.replace("\n", "\r\n").encode(), body.encode("utf-8-sig")]
    ):
        query, document = harvest_text(tmp_path / str(number), source)["f"]
        assert query == "Déjà vu once more."
        assert ast.unparse(ast.parse(document)) == expected


@pytest.mark.parametrize(
    ("docstring", "query"),
    [
        ("Do one thing well.\n    Args:\n        x: a number", "Do one thing well."),
        ("Do one thing well.\n    :param x: a number", "Do one thing well."),
        ("Do one thing well.\n    >>> 1 + 1", "Do one thing well."),
        ("Do one thing well.\n    ------------------", "Do one thing well."),
        ("\n    Do one\tthing\n      well.\n\n    More.", "Do one thing well."),
        ("One sentence here. " + "word " * 100, "One sentence here."),
        ("word " * 100, "word " * 59 + "word"),
        ("a b c " + "x" * 400, "a b c"),
    ],
)
def test_the_query_is_the_summary(tmp_path, docstring, query):
    pairs = harvest_text(tmp_path, f'def f():\n    """{docstring}\n    """\n    return 1\n')
    assert pairs == {"f": (query, "def f():\n    return 1")}


names = st.sampled_from(["alpha", "Béta", "γ", "变量"])
strings = st.sampled_from(
    ['"plain"', '"""tri\n  ple"""', "'''é\n\n x'''", 'f"{1}"', 'f"""a {1}\n b"""', '"a" \\\n "b"', "b'''x\ny'''"]
)
comments = st.sampled_from(["", "# note", "# ünï", "\n", "\n# alone\n"])
docstrings = st.sampled_from(
    [
        '"three plain words"',
        "'three plain wörds'",
        '"""three\n  plain words\n\nand more"""',
        '"three " "plain words"',
        'u"three plain words"',
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_function_keeps_its_tree(tmp_path, data):
    """Functions put together from awkward pieces, at some depth of nesting, against the trees of `ast`."""
    docstring, name = data.draw(docstrings), data.draw(names)
    brackets, one_line = data.draw(st.booleans()), data.draw(st.booleans())
    depth = data.draw(st.integers(0, 3))
    indent = "\t" * depth if data.draw(st.booleans()) else "    " * depth
    statements = data.draw(
        st.lists(
            st.builds("{} = {}".format, names, strings) | st.builds("return [\n{}\n]".format, strings),
            min_size=1,
            max_size=4,
        )
    )
    step = "  "
    before, behind = data.draw(comments), data.draw(comments)
    opened = f"({docstring})" if brackets else docstring
    head = f"{indent}def {name}(a={data.draw(strings)}):"
    if one_line:
        source = f"{head} {opened}; {'; '.join(statements)}\n"
    else:
        gap = behind if "\n" in behind else f"  {behind}\n"
        body = "".join(f"{indent}{step}{statement}\n" for statement in statements)
        source = f"{head}{before or ' '}\n{indent}{step}{opened}{gap}{body}"
    for level in range(depth):
        outer = indent[: len(indent) // depth * (depth - 1 - level)]
        source = f"{outer}class C{level}:\n{source}"
    try:
        tree_of_source = trees_without_docstring(source)
    except SyntaxError:
        assume(False)
    (_, document) = next(iter(harvest_text(tmp_path, source).values()))
    assert ast.unparse(ast.parse(document)) in [text for same_name in tree_of_source.values() for text in same_name]


def module_on_side(held_out: bool, prefix: str = "m") -> str:
    return next(f"{prefix}{i}" for i in range(1000) if is_held_out(f"{prefix}{i}", 0.1) == held_out)


def function(name: str, query: str = "", quote: str = '"') -> str:
    return f"def {name}(x):\n    {quote}{query or f'Compute the {name} of x.'}{quote}\n    return x, {name!r}\n\n"


def test_a_module_and_a_function_are_on_one_side_only(tmp_path):
    train, held_out = module_on_side(False), module_on_side(True)
    indented = "class A:\n" + "".join(
        f"    {line}\n" for line in function("shared", "Another summary of shared.").split("\n")
    )
    folder = tree(
        tmp_path,
        {
            f"{train}.py": function("one") + function("shared") + function("one", "Twice the same code.") + indented,
            f"{held_out}.py": function("two") + function("shared"),
        },
    )
    sides = {part: harvest_python(name="m", path=folder, part=part) for part in ("train", "held_out", "all")}
    assert sides["train"].ids == [f"{train}:one"]
    assert sides["train"].dropped == {"also held out": 2, "duplicate": 1}
    assert sides["held_out"].ids == [f"{held_out}:two", f"{held_out}:shared"]
    assert sides["held_out"].dropped == {}
    assert sorted(sides["all"].positives) == sorted(sides["train"].positives + sides["held_out"].positives)
    assert harvest_python(name="m", path=folder, part="train", held_out=0.0).dropped == {"duplicate": 3}
    assert len({side.fingerprint for side in sides.values()}) == 3


def test_the_side_of_a_module_never_changes():
    """Recomputed from the digest's digits, as another program would; and the sides have the sizes asked for."""
    modules = [f"package.module_{i}" for i in range(4000)]
    for share in (0.0, 0.1, 0.5):
        sides = [is_held_out(module, share) for module in modules]
        assert sides == [
            int(hashlib.sha256(b"held-out:" + module.encode()).hexdigest()[:16], 16) / 2**64 < share
            for module in modules
        ]
        assert abs(sum(sides) / len(sides) - share) < 0.02
    assert [m for m in sys.stdlib_module_names if is_held_out(m, 0.1) and m in {"logging", "ast", "json", "re"}] == [
        "logging"
    ]


def test_a_folder_is_searched_in_order_without_environments(tmp_path):
    names = ["b/__init__.py", "b/c.py", "a.py", "__init__.py", "tests/test_a.py"]
    skipped = [".hidden/x.py", "venv/lib/x.py", "b/__pycache__/x.py", "lib/site-packages/x.py", "a.txt"]
    folder = tree(tmp_path / "project", {name: function(f"f{i}") for i, name in enumerate(names + skipped)})
    tree(folder, {"venv/pyvenv.cfg": ""})
    ids = harvest_python(name="m", path=str(folder), part="all").ids
    assert ids == ["a:f2", "b:f0", "b.c:f1", "project:f3", "tests.test_a:f4"]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A distribution "Some-Dist" with a namespace package, and packages that are there without a distribution."""
    site = tree(
        tmp_path / "site",
        {
            "space/some/__init__.py": "raise SystemExit('imported')\n" + function("one"),
            "space/some/core.py": function("two"),
            "space/some/core_test.py": function("three"),
            "space/some/tests/helper.py": function("four"),
            "some_dist-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: Some-Dist\nVersion: 1.0\n",
            "plain/__init__.py": "raise SystemExit('imported')\n" + function("five"),
            "plain/sub/deep.py": function("six"),
            "single.py": function("seven"),
        },
    )
    record = "".join(
        f"{path.relative_to(site)},,\n" for path in sorted(site.rglob("*")) if "space" in path.parts and path.is_file()
    )
    tree(site, {"some_dist-1.0.dist-info/RECORD": record + "../../bin/tool.py,,\n"})
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    return site


@pytest.mark.parametrize(
    ("package", "ids"),
    [
        ("some-dist", ["space.some:one", "space.some.core:two"]),
        ("Some_Dist", ["space.some:one", "space.some.core:two"]),
        ("space.some", ["space.some:one", "space.some.core:two"]),
        ("plain", ["plain:five", "plain.sub.deep:six"]),
        ("plain.sub.deep", ["plain.sub.deep:six"]),
        ("single", ["single:seven"]),
    ],
)
def test_packages_are_found_by_either_name_and_not_imported(installed, package, ids):
    assert harvest_python(name="m", path=None, packages=[package]).ids == ids
    assert not {"space", "space.some", "plain", "plain.sub"} & set(sys.modules)


def test_missing_packages_are_named_in_a_warning(installed, caplog):
    with caplog.at_level(logging.WARNING):
        examples = harvest_python(name="m", path=None, packages=["nowhere", "single", "plain.nowhere", ""])
    assert examples.ids == ["single:seven"]
    assert "nowhere, plain.nowhere" in caplog.text


def test_packages_are_for_training_and_give_up_what_is_held_out(installed, tmp_path):
    held_out, train = module_on_side(True), module_on_side(False)
    package = next(f"p{i}" for i in range(1000) if is_held_out(f"p{i}", 0.1))
    tree(installed, {f"{package}.py": function("eight") + function("shared", "The same code, another summary.")})
    tree(installed, {f"{held_out}.py": function("nine")})
    folder = tree(tmp_path / "folder", {f"{held_out}.py": function("shared"), f"{train}.py": function("ten")})
    packages = [package, held_out, "single"]
    assert harvest_python(name="m", path=folder, packages=packages).ids == [
        f"{train}:ten",
        f"{package}:eight",
        "single:seven",
    ]
    assert harvest_python(name="m", path=folder, packages=packages, part="held_out").ids == [f"{held_out}:shared"]
    again = harvest_python(name="m", path=installed, packages=["single"], held_out=0.0)
    assert sum(name.endswith(":seven") for name in again.ids) == 1


def test_bad_arguments_are_errors(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        harvest_python(name="m", path=tmp_path / "nowhere")
    with pytest.raises(InputError, match="no documented function in 0 Python files"):
        harvest_python(name="m", path=tmp_path)
    with pytest.raises(InputError, match="no documented function in 0 Python files of the held_out part"):
        harvest_python(name="m", path=None, packages=["numpy"], part="held_out")
    with pytest.raises(InputError, match=r"held_out: expected a share in \[0, 1\), found 1.0"):
        harvest_python(name="m", path=tmp_path, held_out=1.0)


def test_the_standard_library():
    start = time.process_time()
    train, held_out, everything = (harvest_python(name="py", part=part) for part in ("train", "held_out", "all"))
    assert time.process_time() - start < 20
    assert len(train) > 3000
    assert len(held_out) > 300

    def modules(examples):
        return {name.partition(":")[0] for name in examples.ids}

    def code(examples):
        return {"".join(text.split()) for text in examples.positives}

    assert not modules(train) & modules(held_out)
    assert not code(train) & code(held_out)
    assert len(code(train)) == len(train)
    assert code(train) | code(held_out) == code(everything)
    assert {name.split(".")[0] for name in modules(everything)} <= sys.stdlib_module_names
    assert not any(word in name.split(".") for name in modules(everything) for word in ("test", "tests", "idlelib"))
    assert "json.decoder:JSONDecoder.decode" in everything.ids
    assert len(set(everything.ids)) == len(everything)
    assert not any("\n" in query or len(query) > 300 or len(query.split()) < 3 for query in everything.anchors)
    files = python_source._standard_library()
    originals = {}
    for name, document in zip(everything.ids, everything.positives, strict=True):
        module, qualified = name.split(":")[:2]
        if module not in originals:
            originals[module] = trees_without_docstring(importlib.util.decode_source(files[module].read_bytes()))
        assert ast.unparse(ast.parse(document)) in originals[module][qualified.rpartition(".")[2]]


def test_another_process_finds_the_same(tmp_path):
    folder = tree(tmp_path, {f"pkg/m{i}.py": function(f"f{i}") for i in range(30)})
    script = (
        "import sys, json\nfrom jaxembed.data.python_source import harvest_python\n"
        "e = harvest_python(name='m', path=sys.argv[1], held_out=.5)\nprint(json.dumps([e.ids, e.fingerprint]))"
    )
    run = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    here = harvest_python(name="m", path=folder, held_out=0.5)
    assert json.loads(run.stdout) == [here.ids, here.fingerprint]
