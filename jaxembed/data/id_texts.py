"""Files of texts with ids: which columns have them, and the texts one after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from etils import epath

from jaxembed.data.formats import id_text, title_and_text
from jaxembed.data.rows import (
    Row,
    checked_text,
    keys_of,
    kind_of,
    numbered_fields,
    numbered_rows,
    text_at,
    value_at,
    within,
)
from jaxembed.errors import InputError

CORPUS_KEYS = (("_id", "docid", "doc_id", "document_id", "pid", "id"), ("text", "document_text", "contents", "passage"))
"""Keys of a document's id and text, the first that a file has; its title is "title"."""
QUERY_KEYS = (("_id", "query_id", "query-id", "qid", "id"), ("text", "query", "query_text", "question"))

TITLE = "title"


@dataclass(frozen=True)
class TextColumns:
    """Where the rows of a file have what belongs to a text."""

    id: str | None
    """None: rows are known by their numbers."""
    text: str | None
    """None: a TSV file without header, of id, text or id, title, text."""
    title: str | None = TITLE
    """Put before the text of rows that have it."""


def text_columns(
    path: epath.Path,
    name: str,
    keys: tuple[Sequence[str], Sequence[str]],
    *,
    title: str | None = None,
    ids_needed: bool = True,
) -> TextColumns:
    """The columns of a file, by its first row that can be read.

    JSON lines, Parquet, CSV, lines of text, or TSV with a header have columns for id, text and perhaps title; TSV
    without a header has the columns id, text or id, title, text (`collection.tsv` of MS MARCO).

    Args:
        path: the file.
        name: of the data source.
        keys: the names of the id's column and of the text's, of each the first that the file has.
        title: a column of titles that the file has to have; None: "title", where a row has it; "": none.
        ids_needed: whether a file without a column of ids is refused.

    Raises:
        InputError: with file and line, where it has not what is needed.
    """
    if kind_of(path) == "tsv" and not _has_header(path, name, keys[:1] if ids_needed else keys):
        return TextColumns("id", None, TITLE if title is None else title or None)
    for number, row in numbered_rows(path, name, progress=False):
        if isinstance(row, InputError):
            continue
        id_key, text_key = (next((key for key in some if key in row), None) for some in keys)
        if text_key is None or (ids_needed and id_key is None):
            expected = " and ".join(" or ".join(map(repr, some)) for some in (keys if ids_needed else keys[1:]))
            raise InputError(f"{path}:{number}: expected the keys {expected}, found {keys_of(row)}")
        if title and title not in row:
            raise InputError(f"{path}:{number}: no column {title!r} of titles, found {keys_of(row)}")
        return TextColumns(id_key, text_key, TITLE if title is None else title or None)
    return TextColumns(keys[0][0] if ids_needed else None, keys[1][0])


def id_texts(
    path: epath.Path,
    name: str,
    columns: TextColumns,
    *,
    label: str = "",
    spans: Sequence[range] | None = None,
    progress: bool = True,
) -> Iterator[tuple[int, tuple[str, str] | InputError]]:
    """Line, and id and text of each row; an error says what is wrong with a row, not where.

    Args:
        label: of the file; a row without id is LABEL:LINE.
        spans, progress: as in `numbered_rows`.
    """
    if columns.text is None:
        for number, fields in within(numbered_fields(path, name, progress=progress), spans):
            if isinstance(fields, InputError):
                yield number, fields
            elif len(fields) not in (2, 3):
                yield number, InputError(f"expected the columns id, text or id, title, text, found {len(fields)}")
            else:
                title = fields[1] if len(fields) == 3 and columns.title is not None else ""
                yield number, (fields[0], title_and_text(title, fields[-1]))
        return
    for number, row in numbered_rows(path, name, spans=spans, progress=progress):
        try:
            if isinstance(row, InputError):
                raise row
            key = columns.id
            one = f"{label}:{number}" if key is None else id_text(value_at(row, key), f"column {key!r}")
            yield number, (one, _titled(row, columns.title, columns.text))
        except InputError as error:
            yield number, error


def _titled(row: Row, title_key: str | None, text_key: str) -> str:
    title = None if title_key is None else row.get(title_key)
    title = "" if title is None else checked_text(title, f"column {title_key!r}")
    return title_and_text(title, text_at(row, text_key))


def _has_header(path: epath.Path, name: str, keys: Sequence[Sequence[str]]) -> bool:
    first = next((fields for _, fields in numbered_fields(path, name, progress=False)), [])
    return not isinstance(first, InputError) and any(set(first) & set(some) for some in keys)
