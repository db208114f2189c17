from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from jaxembed import config_file
from jaxembed.errors import InputError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Circle(_Strict):
    kind: Literal["circle"] = Field(description="round")
    radius: float = Field(gt=0, description="radius, in metres")


class Square(_Strict):
    kind: Literal["square"] = Field(description="with corners")
    side: int = Field(default=1, description="side, in metres")
    label: str | None = Field(default=None, description="what is written on it")


class Pen(_Strict):
    width: float = Field(default=0.5, description="width, in millimetres")
    color: Literal["red", "off"] = Field(default="red", description="colour")


class Drawing(_Strict):
    title: str = Field(default="untitled", description="title")
    count: int = Field(default=0, description="a count")
    window: str | None = Field(default=None, description="FROM:TO")
    framed: bool = Field(default=False, description="frame around it")
    pen: Pen = Field(default=Pen(width=2.0), description="pen")
    words: list[str] = Field(default=[], description="words on it")
    shapes: list[Annotated[Circle | Square, Field(discriminator="kind")]] = Field(default=[], description="shapes")


@pytest.fixture
def read(tmp_path):
    def run(text: str | bytes, *overrides: str, **kwargs) -> Drawing:
        file = tmp_path / "drawing.yaml"
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return config_file.read_config(Drawing, file, overrides, **kwargs)

    return run


SHAPES = "shapes:\n  - {kind: circle, radius: 2}\n  - kind: square\n    side: 3\n"


def test_an_empty_file_is_the_defaults(read):
    assert read("") == read("# nothing\n") == Drawing()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("count: 012", 12),
        ("count: -3", -3),
        ("window: 10:13", "10:13"),
        ("window: 2024-01-01", "2024-01-01"),
        ("window: off", "off"),
        ("window: ~", None),
        ("framed: true", True),
        ("pen: {width: 1e-4}", 1e-4),
        ("pen: {width: .5}", 0.5),
        ("pen: {width: 2}", 2.0),
        ("pen: {color: off}", "off"),
    ],
)
def test_yaml_values_are_what_they_look_like(read, text, value):
    config = read(text)
    name = text.partition(":")[0]
    found = getattr(config, name)
    assert (getattr(found, text.partition("{")[2].partition(":")[0]) if name == "pen" else found) == value


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["--count", "4"], "count", 4),
        (["--count=4"], "count", 4),
        (["--count", "4", "--count", "5"], "count", 5),
        (["--count", "-4"], "count", -4),
        (["--pen.width", "1e-4"], "pen.width", 1e-4),
        (["--pen.color", "off"], "pen.color", "off"),
        (["--framed", "true"], "framed", True),
        (["--title", "8"], "title", "8"),
        (["--title", "query: "], "title", "query: "),
        (["--title", "'a # b'"], "title", "a # b"),
        (["--title", "null"], "title", "null"),
        (["--title=--x=y"], "title", "--x=y"),
        (["--title="], "title", ""),
        (["--title", "~/a"], "title", "~/a"),
        (["--window", "10:13"], "window", "10:13"),
        (["--window", "null"], "window", None),
        (["--words", "[a, b]"], "words", ["a", "b"]),
        (["--shapes.0.radius", "5"], "shapes.0.radius", 5.0),
        (["--shapes.1.label", "3"], "shapes.1.label", "3"),
        (["--shapes", "[]"], "shapes", []),
        (["--pen", "{width: 3}"], "pen.width", 3.0),
        (["--title", "${window}!"], "title", "0:1!"),
    ],
)
def test_overrides(read, overrides, key, value):
    found = read("window: 0:1\n" + SHAPES, *overrides)
    for part in key.split("."):
        found = found[int(part)] if part.isdecimal() else getattr(found, part)
    assert found == value


def test_the_later_of_two_alternatives_replaces_the_other(read):
    replaces = {"title": ("window", "pen"), "window": ("title",)}
    text = "window: 0:1\npen: {width: 3}\n"
    assert read(text, replaces=replaces).window == "0:1"
    assert read(text, "--count", "3", replaces=replaces).window == "0:1"
    assert read(text, "--title", "x", "--window", "1:2", replaces=replaces).window == "1:2"
    replaced = read(text, "--title", "x", replaces=replaces)
    assert (replaced.title, replaced.window, replaced.pen) == ("x", None, Drawing().pen)


def test_interpolation_of_other_keys(read):
    assert read("title: ${window} of ${pen.color}\nwindow: a\npen: {color: red}").title == "a of red"
    assert read("title: \\${window}").title == "${window}"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("cuont: 3", [], "{file}:1: cuont: no such option; did you mean count?"),
        ("title: x\npen:\n  widht: 3", [], "{file}:3: pen.widht: no such option; did you mean pen.width?"),
        ("width: 3", [], "{file}:1: width: no such option; did you mean pen.width?"),
        ("pen: {zzz: 3}", [], "{file}:1: pen.zzz: no such option; pen has color, width"),
        (SHAPES + "    sied: 3", [], "{file}:5: shapes.1.sied: no such option; did you mean shapes.1.side?"),
        (SHAPES + "    radius: 3", [], "{file}:5: shapes.1.radius: no such option; shapes.1 has kind, label, side"),
        ("\ncount: many", [], '{file}:2: count: expected a whole number, found "many"'),
        ("count: 1.5", [], "{file}:1: count: expected a whole number, found 1.5"),
        ("count: true", [], "{file}:1: count: expected a whole number, found true"),
        ("framed: on", [], '{file}:1: framed: expected true or false, found "on"'),
        ("title: 3", [], "{file}:1: title: expected text (a number or true/false that is meant as text stands in "),
        ("words: a", [], '{file}:1: words: expected a list, found "a"'),
        ("pen: 3", [], "{file}:1: pen: expected a section with keys, found 3"),
        ("pen: {color: blue}", [], "{file}:1: pen.color: expected 'red' or 'off', found \"blue\""),
        ("shapes: [{kind: circle}]", [], "{file}:1: shapes.0.radius: required, but missing"),
        ("shapes: [{side: 3}]", [], "{file}:1: shapes.0: expected kind: one of 'circle', 'square', found null"),
        ("shapes: [{kind: x}]", [], "{file}:1: shapes.0: expected kind: one of 'circle', 'square', found \"x\""),
        ("shapes: [{kind: circle, radius: 0}]", [], "{file}:1: shapes.0.radius: expected a number greater than 0, f"),
        ("title: a\ncount: 1\ntitle: b", [], "{file}:3: not valid YAML: the key title stands there a second time"),
        ("title: a\n1: b", [], "{file}:2: not valid YAML: found a key that is not text"),
        ("title: [a\ncount: 3", [], "{file}:2: not valid YAML: expected ',' or ']'"),
        ("title: a\n\tcount: 3", [], "{file}:2: not valid YAML: found "),
        ("title: a\ncount: \x07", [], "{file}:2: not valid YAML: "),
        (b"title: a\ncount: \xff", [], "{file}:2: expected UTF-8, found the byte 0xff"),
        ("pen: &a\n  width: *a", [], "{file}: "),
        ("- a", [], '{file}: expected a mapping of sections, found ["a"]'),
        ("title: ${oc.env:HOME}", [], "{file}: title: found ${oc.env:…; expected ${section.key}, another key"),
        ("words: ['${oc.decode:${title}}']", [], "{file}: words.0: found ${oc.decode:…"),
        ("title: ${nope}", [], "{file}: title: ${…} names a key that neither the file nor an override sets"),
        ("title: ${title}", [], "{file}: "),
        ("title: ???", [], "{file}: title: "),
        ("", ["count", "3"], "count: expected an override, --section.key value"),
        ("", ["--count"], "--count: expected a value after it, found nothing"),
        ("", ["--count", "--title", "x"], "--count: expected a value after it, found --title"),
        ("", ["--cuont", "3"], "--cuont: no such option; did you mean count?"),
        ("", ["--pen.widht=3"], "--pen.widht: no such option; did you mean pen.width?"),
        ("", ["--count.x", "3"], "--count.x: no such option; count has no keys of its own"),
        ("", ["--count", "many"], '--count: expected a whole number, found "many"'),
        ("", ["--words", "[a"], '--words: expected a value in YAML, found "[a"'),
        ("", ["--title", "${oc.env:HOME}"], "--title: found ${oc.env:…"),
        ("", ["--pen", "{width: x}"], '--pen.width: expected a number, found "x"'),
        (SHAPES, ["--shapes.2.side", "3"], "--shapes.2.side: shapes has 2 entries in {file}, counted from 0"),
        ("", ["--shapes.0.side", "3"], "--shapes.0.side: shapes has 0 entries in {file}, counted from 0"),
        (SHAPES, ["--shapes.-1.side", "3"], "--shapes.-1.side: shapes is a list; expected shapes.0 or another place"),
        (SHAPES, ["--shapes.side", "3"], "--shapes.side: shapes is a list; expected shapes.0 or another place in it"),
        (SHAPES, ["--shapes.0.sied", "3"], "--shapes.0.sied: no such option; did you mean shapes.0.side?"),
        (SHAPES, ["--shapes.1.side", "x"], '--shapes.1.side: expected a whole number, found "x"'),
        (SHAPES, ["--shapes.1.kind", "x"], "{file} with --shapes.1.kind: shapes.1: expected kind: one of "),
    ],
)
def test_errors_name_the_place(read, tmp_path, text, overrides, message):
    with pytest.raises(InputError) as caught:
        read(text, *overrides)
    assert str(caught.value).startswith(message.replace("{file}", str(tmp_path / "drawing.yaml")))
    assert "\n" not in str(caught.value)


def test_every_error_is_told_at_once(read):
    with pytest.raises(InputError) as caught:
        read("count: x\nframed: 3", "--pen.width", "x")
    assert len(str(caught.value).splitlines()) == 3


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: there is no such config file"):
        config_file.read_config(Drawing, tmp_path / "none.yaml")
    with pytest.raises(InputError, match="the config file cannot be read"):
        config_file.read_config(Drawing, tmp_path)


texts = st.text(st.characters(codec="utf-8"), max_size=20) | st.text("\\${}:'\"# ab.?-~\n", max_size=12)
drawings = st.builds(
    Drawing,
    title=texts.filter(lambda text: text != "???"),
    window=st.none() | st.sampled_from(["off", "10:13", "null", "1e3", "~", "", "${a}", "\\${a}", "\\\\${a}"]),
    count=st.integers(-(2**60), 2**60),
    framed=st.booleans(),
    pen=st.builds(Pen, width=st.floats(allow_nan=False, allow_infinity=False)),
    words=st.lists(texts.filter(lambda text: text != "???"), max_size=3),
    shapes=st.lists(
        st.builds(Circle, kind=st.just("circle"), radius=st.floats(1e-300, 1e300))
        | st.builds(Square, kind=st.just("square"), side=st.integers()),
        max_size=3,
    ),
)


@given(drawings)
def test_what_is_dumped_is_read_back(tmp_path_factory, drawing):
    file = tmp_path_factory.mktemp("dump") / "drawing.yaml"
    file.write_text(config_file.dump_config(drawing), encoding="utf-8")
    assert config_file.read_config(Drawing, file) == drawing


@pytest.mark.parametrize("end", ["\x85", "\u2028", "\u2029", "\n", "\r"])
def test_line_ends_of_any_kind_are_read_back(tmp_path, end):
    drawing = Drawing(title=f"a{end}b '\"{end}")
    (tmp_path / "drawing.yaml").write_bytes(config_file.dump_config(drawing).encode())
    assert config_file.read_config(Drawing, tmp_path / "drawing.yaml") == drawing


def test_help_lists_every_option_with_type_default_and_meaning():
    text = config_file.options_help(Drawing)
    for line in (
        '  --title TEXT  (default: "untitled")\n      title\n',
        "  --window TEXT|null  (default: null)\n",
        "  --pen.width FLOAT  (default: 2.0)\n      width, in millimetres\n",
        '  --pen.color red|off  (default: "red")\n',
        "  --words LIST  (default: [])\n",
        "  --shapes.N.radius FLOAT  (required)\n      radius, in metres\n",
        "  --shapes.N.side INT  (default: 1)\n",
    ):
        assert line in text
