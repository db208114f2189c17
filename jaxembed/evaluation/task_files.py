"""The files of local tasks: their rows, texts by id and judgements, and what is wrong with them said or counted."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from etils import epath

from jaxembed.data.beir import judgements, qrels_names
from jaxembed.data.formats import id_text
from jaxembed.data.id_texts import CORPUS_KEYS, QUERY_KEYS, id_texts, text_columns
from jaxembed.data.rows import Row, keys_of, numbered_rows, type_name, value_at
from jaxembed.data.text_store import find_file
from jaxembed.errors import InputError

SPLITS = ("test", "dev", "validation", "val")
"""Of which a folder's judgements or texts are taken, the first that is there."""

KINDS = (".jsonl", ".tsv", ".csv", ".parquet")
RELEVANT = "relevant"
"""Column of queries that name their documents themselves."""

BAD_ROW = "rows that could not be used, left out"
EMPTY_QUERY = "empty queries, left out"
EMPTY_DOCUMENT = "documents with an empty text, kept"
EMPTY_TEXT = "rows with an empty text, left out"
NOT_RELEVANT = "judged queries without a relevant document, left out"
OWN_DOCUMENT = "queries that are documents too, by id and text, each left out of its own results"

_REMEDY = "Mend the row, or have such rows left out and counted with bad_rows: skip"


@dataclass
class TaskFiles:
    """Reads the files of one task, and counts what it leaves out.

    Attributes:
        name: of the task.
        bad_rows: "error" stops at a row that cannot be used, "skip" leaves it out.
        only: column and the value that rows must have there, to be read.
        counts: what was found wrong, by a phrase that says what became of it.
    """

    name: str
    bad_rows: Literal["error", "skip"] = "error"
    only: tuple[str, str] | None = None
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def notes(self) -> tuple[str, ...]:
        """The counts in words."""
        return tuple(f"{phrase}: {count:,}" for phrase, count in sorted(self.counts.items()) if count)

    def bad(self, path: epath.Path, line: int, problem: InputError | str) -> None:
        """Raises InputError, or counts the row, as `bad_rows` says."""
        if self.bad_rows == "error":
            raise InputError(f"{path}:{line}: {problem}. {_REMEDY}")
        self.counts[BAD_ROW] += 1

    def rows(self, path: epath.Path, *, progress: bool = True) -> Iterator[tuple[int, Row]]:
        """The rows of a file, with their lines."""
        for line, row in numbered_rows(path, self.name, progress=progress):
            if isinstance(row, InputError):
                self.bad(path, line, row)
            elif self.only is None:
                yield line, row
            else:
                column, wanted = self.only
                try:
                    if str(value_at(row, column)) == wanted:
                        yield line, row
                except InputError as error:
                    self.bad(path, line, error)

    def first_row(self, path: epath.Path) -> Row:
        """The first of the rows, by whose keys a file is recognised."""
        counts = self.counts.copy()
        row = next((row for _, row in self.rows(path, progress=False)), None)
        self.counts = counts  # bad rows before it count when the file is read
        if row is None:
            of_which = "" if self.only is None else f" with {'='.join(self.only)}"
            raise InputError(f"{path}: no row{of_which} that can be read (task {self.name!r})")
        return row

    def corpus(self, path: epath.Path) -> dict[str, str]:
        """Documents by id, a title before its text, without white space around them, as mteb reads them."""
        found = {one: text.strip() for one, text in self._texts(path, CORPUS_KEYS).items()}
        self.counts[EMPTY_DOCUMENT] += sum(not text for text in found.values())
        return found

    def queries(self, path: epath.Path) -> dict[str, str]:
        """Queries by id, empty ones included."""
        return self._texts(path, QUERY_KEYS)

    def _texts(self, path: epath.Path, keys: tuple[Sequence[str], Sequence[str]]) -> dict[str, str]:
        texts: dict[str, str] = {}
        for line, found in id_texts(path, self.name, text_columns(path, self.name, keys)):
            if isinstance(found, InputError):
                self.bad(path, line, found)
            elif found[0] in texts:
                self.bad(path, line, f"the id {found[0]!r} stands there twice")
            else:
                texts[found[0]] = found[1]
        if not texts:
            raise InputError(f"{path}: no text with an id (task {self.name!r})")
        return texts

    def judged(self, path: epath.Path) -> Iterator[tuple[int, tuple[str, str, float]]]:
        """Line, and query id, document id and grade, of a file of judgements."""
        for line, found in judgements(path, self.name):
            if isinstance(found, InputError):
                self.bad(path, line, found)
            else:
                yield line, found

    def named_in_queries(self, path: epath.Path) -> Iterator[tuple[int, tuple[str, str, float]]]:
        """The same, of queries that name their documents themselves: an id, or a list of ids."""
        keys = QUERY_KEYS[0]
        for line, row in self.rows(path):
            try:
                key = next((key for key in keys if key in row), None)
                if key is None:
                    raise InputError(f"no column {' or '.join(map(repr, keys))}; columns of this row: {keys_of(row)}")
                query, named = id_text(row[key], f"column {key!r}"), value_at(row, RELEVANT)
                each = named if isinstance(named, list) else [named]
                ids = [id_text(one, f"column {RELEVANT!r}") for one in each]
            except InputError as error:
                self.bad(path, line, error)
                continue
            self.counts[NOT_RELEVANT] += not ids
            yield from ((line, (query, one, 1.0)) for one in ids)

    def relevant(
        self,
        path: epath.Path,
        judged: Iterator[tuple[int, tuple[str, str, float]]],
        queries: dict[str, str],
        corpus: dict[str, str],
    ) -> dict[str, dict[str, int]]:
        """The grades above 0 by query and document, of queries that are not empty and have one.

        Raises:
            InputError: a judgement names an id that is not there, has a grade that is no whole number, or contradicts
                an earlier one.
        """
        found: dict[str, dict[str, int]] = {}
        for line, (query, document, grade) in judged:
            if query not in queries or document not in corpus:
                what, one = ("query", query) if query not in queries else ("document", document)
                self.bad(path, line, f"no {what} has the id {one!r}")
            elif grade != int(grade):
                self.bad(path, line, f"expected a whole number as grade, found {grade:g}")
            else:
                before = found.setdefault(query, {}).setdefault(document, int(grade))
                if before != grade:
                    self.bad(
                        path, line, f"query {query!r}, document {document!r} is judged twice: {before}, then {grade:g}"
                    )
        empty = {query for query in found if not queries[query].strip()}
        found = {query: {one: grade for one, grade in grades.items() if grade > 0} for query, grades in found.items()}
        useless = {query for query, grades in found.items() if not grades} - empty
        self.counts[EMPTY_QUERY] += len(empty)
        self.counts[NOT_RELEVANT] += len(useless)
        kept = {query: grades for query, grades in found.items() if query not in empty and query not in useless}
        if not kept:
            noted = f": {'; '.join(self.notes)}" if self.notes else ""
            raise InputError(f"{path}: no query with a relevant document (task {self.name!r}){noted}")
        return kept

    def are_documents(
        self, queries: Mapping[str, str], corpus: Mapping[str, str], relevant: Mapping[str, Mapping[str, int]]
    ) -> bool:
        """Whether queries stand in the corpus themselves, as those of ArguAna and Quora; counts them.

        Equal ids alone do not say so, for both may be numbered from 1: the texts of most have to be equal too, but for
        a title, and no query may be judged to answer itself.
        """
        shared = [query for query in queries if query in corpus]
        same = [" ".join(corpus[query].split()).endswith(" ".join(queries[query].split())) for query in shared]
        if 2 * sum(same) <= len(shared) or any(query in relevant[query] for query in shared):
            return False
        self.counts[OWN_DOCUMENT] += len(shared)
        return True

    def none_empty(self, *texts: str) -> bool:
        """Whether none of a row's texts is empty; counts the row, where one is."""
        if all(text.strip() for text in texts):
            return True
        self.counts[EMPTY_TEXT] += 1
        return False


def find_qrels(folder: epath.Path, split: str | None) -> epath.Path:
    """The judgements of a split, or of the first of `SPLITS` that has some."""
    splits = SPLITS if split is None else (split,)
    names = [name for one in splits for name in qrels_names(one)]
    return find_file(folder, names, f"judgements of the split {' or '.join(splits)}")


def find_any(folder: epath.Path, names: Sequence[str]) -> epath.Path | None:
    """The first of the names that is in the folder, plain or with ".gz" behind it."""
    found = (folder / f"{name}{gz}" for name in names for gz in ("", ".gz"))
    return next((path for path in found if path.exists()), None)


def find_one(folder: epath.Path, what: str, names: Sequence[str]) -> epath.Path | None:
    """The first of the names, or the one file whose name ends in `what`, such as de.corpus.jsonl.gz; None: neither.

    Raises:
        InputError: several files end so; names them.
    """
    if (found := find_any(folder, names)) is not None:
        return found
    ends = tuple(f"{what}{kind}{gz}" for kind in KINDS for gz in ("", ".gz"))
    several = sorted(path for path in folder.iterdir() if path.name.endswith(ends))
    if len(several) > 1:
        listed = ", ".join(path.name for path in several)
        raise InputError(f"{folder}: several files of {what}: {listed}; choose one with {what}")
    return several[0] if several else None


def label_text(value: object, what: str) -> str:
    """A label as text; whole numbers are those of a file that has them as 1.0, true is "true" as in JSON."""
    if isinstance(value, bool):
        return str(value).lower()
    return id_text(int(value) if isinstance(value, float) and value.is_integer() else value, what)


def checked_labels(value: object, what: str) -> list[int]:
    """Whole numbers from 0 on, 1.0 among them; true is 1."""
    if not isinstance(value, list):
        raise InputError(f"{what}: expected a list of labels, found {type_name(value)}")
    for place, one in enumerate(value):
        if not isinstance(one, int | float) or one < 0 or one % 1 != 0:
            raise InputError(f"{what}[{place}]: expected a whole number from 0 on, found {one!r:.40}")
    return [int(one) for one in value]
