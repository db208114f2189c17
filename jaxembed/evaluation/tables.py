"""A table of strings as Markdown and as HTML, and numbers as the tables have them."""

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """
    Attributes:
        header: of the columns; all but the first are flush right.
        rows: cells of each row.
        strong: numbers of the rows that sum up others.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[int] = field(default_factory=frozenset)

    def markdown(self) -> str:
        header, *rows = ([markdown_text(cell) for cell in line] for line in (self.header, *self.rows))
        for number in self.strong:
            rows[number] = [f"**{cell}**" if cell else "" for cell in rows[number]]
        lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def html(self) -> str:
        def line(cells: Sequence[str], tag: str, kind: str = "") -> str:
            return f"<tr{kind}>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

        body = [line(row, "td", ' class="strong"' if n in self.strong else "") for n, row in enumerate(self.rows)]
        return "\n".join(["<table>", line(self.header, "th"), *body, "</table>"])


def percent(value: float | None, *, sign: bool = False) -> str:
    """61.74 of .6174, as the field prints scores; "–" where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{100 * value:+.2f}" if sign else f"{100 * value:.2f}"


def tasks_of(count: int) -> str:
    """Names a mean over so many tasks."""
    return "1 task" if count == 1 else f"mean of {count} tasks"


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = re.sub(r"[\\`*|<>]|(?<!\w)_|_(?!\w)|(?<=\])\(", r"\\\g<0>", text)
    return " ".join(text.split())
