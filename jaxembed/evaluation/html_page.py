"""A page that opens without network: no script, no style sheet, no image outside of it."""

import base64
import html
from collections.abc import Mapping, Sequence

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
tr.strong { font-weight: 600; background: #f4f4f4; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; display: block; }
"""


def page(
    title: str,
    tables: Sequence[str],
    pictures: Mapping[str, bytes],
    notes: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
    captions: Mapping[str, str] | None = None,
) -> str:
    """
    Args:
        title, notes, facts, captions: texts; they are escaped here.
        tables: HTML.
        pictures: PNG files, by what is said where they are not seen.
    """
    facts, captions = facts or {}, captions or {}
    images = [
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        + (f"<figcaption>{html.escape(captions[name])}</figcaption>" if name in captions else "")
        + "</figure>"
        for name, content in pictures.items()
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>",
            f"<h1>{html.escape(title)}</h1>",
            *(["<ul>", *(f"<li>{html.escape(f'{k}: {v}')}</li>" for k, v in facts.items()), "</ul>"] if facts else ()),
            *tables,
            *(["<ul>", *(f"<li>{html.escape(note)}</li>" for note in notes), "</ul>"] if notes else ()),
            *images,
            "</body>\n</html>\n",
        ]
    )
