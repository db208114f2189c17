"""A teacher's embeddings of training texts: .npy files that stay on the disk, a row a text."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int
from tqdm import tqdm

from jaxembed.data.sources import TextRows
from jaxembed.errors import InputError

_BLOCK_BYTES = 1 << 26  # read at once when a file is checked


@dataclass(frozen=True, eq=False)
class TeacherEmbeddings:
    """The teacher's embeddings of the texts of one source, mapped into memory.

    Attributes:
        arrays: of the texts of "anchors" and of "positives" and "negatives", or of "documents"; none of what has none.
        rows: where each example's texts stand in them.
        dim: first dimensions that are taken.
    """

    arrays: Mapping[str, Float[np.ndarray, "texts teacher_dim"]]
    rows: TextRows
    dim: int

    def __str__(self) -> str:
        """For the log: "teacher embeddings of 1,200 anchors, 1,200 positives, 768 dimensions of float16"."""
        parts = ", ".join(f"{len(array):,} {name}" for name, array in self.arrays.items())
        (wide, *_), kinds = zip(*((array.shape[1], str(array.dtype)) for array in self.arrays.values()))
        taken = f"the first {self.dim} of {wide}" if wide > self.dim else str(self.dim)
        return f"teacher embeddings of {parts}, {taken} dimensions of {', '.join(dict.fromkeys(kinds))}"

    def of(
        self,
        examples: Int[np.ndarray, " examples"],
        positives: Int[np.ndarray, " examples"],
        negatives: Int[np.ndarray, "examples columns"],
    ) -> Float32[np.ndarray, "examples texts dim"]:
        """Of anchor, positive and negatives of these examples, NaN where there is none.

        Args:
            positives: which of its positives each example has.
            negatives: which of its hard negatives, −1 for none.
        """
        found = np.full((len(examples), 2 + negatives.shape[1], self.dim), np.nan, np.float32)
        held = self.rows.negatives[examples]
        inside = (negatives >= 0) & (negatives < held.shape[1])
        chosen = np.full(negatives.shape, -1, np.int64)
        if held.shape[1]:
            places = np.where(inside, negatives, 0)
            chosen = np.where(inside, np.take_along_axis(held, places, 1), -1)
        self._fill(found[:, 0], "anchors", self.rows.anchors[examples])
        self._fill(found[:, 1], "positives", self.rows.positives[examples, positives])
        for column in range(negatives.shape[1]):
            self._fill(found[:, 2 + column], "negatives", chosen[:, column])
        return found

    def _fill(self, target: np.ndarray, name: str, rows: Int[np.ndarray, " examples"]) -> None:
        array = self.arrays.get(name, None if name == "anchors" else self.arrays.get("documents"))
        if array is not None:
            there = rows >= 0
            target[there] = array[rows[there], : self.dim]


def open_teacher(
    files: Mapping[str, str | os.PathLike[str]],
    rows: TextRows | None,
    name: str,
    key: str,
    *,
    dim: int,
    truncate_dim: int | None = None,
) -> TeacherEmbeddings:
    """The teacher's embeddings of a source, every number of them looked at once.

    Args:
        files: .npy files by "anchors", "positives", "negatives", "documents"; [texts, dim], or of more axes before the
            last one, which are read row after row.
        rows: of the source's examples.
        name: the source's.
        key: of its section, for messages.
        dim: of the model.
        truncate_dim: first dimensions of the teacher's that are taken; None = all.

    Raises:
        InputError: with the file: it is missing or not a local .npy of floats, has another number of rows than the
            source has texts or other dimensions than the model, or holds NaN, infinity or a zero vector.
    """
    if rows is None:
        raise InputError(
            f"{key}: the texts of {name} have no order of their own (labelled texts, NLI rows and Python source give "
            "pairs that are made of them); write the pairs to a file first"
        )
    arrays = {}
    for part, path in files.items():
        if part not in rows.counts:
            known = ", ".join(rows.counts)
            raise InputError(f"{key}.{part}: {name} has no such texts of its own; it has {known}")
        arrays[part] = _open(os.fspath(path), f"{key}.{part}", rows.counts[part], part, name, dim, truncate_dim)
    return TeacherEmbeddings(arrays, rows, dim)


def _open(path: str, key: str, count: int, part: str, name: str, dim: int, truncate_dim: int | None) -> Any:
    if "://" in path:
        raise InputError(f"{key}: {path} is not local; embeddings are mapped into memory, so copy the file here first")
    try:
        array = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise InputError(f"{key}: {path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{key}: {path}: not a .npy file: {error}") from None
    if not isinstance(array, np.ndarray) or array.ndim < 2 or array.dtype.kind != "f":
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "several arrays (.npz)"
        raise InputError(f"{key}: {path}: expected an array of floats [texts, dim], found {found}")
    array = array.reshape(-1, array.shape[-1])
    texts, wide = array.shape
    if texts != count:
        raise InputError(
            f"{key}: {path}: {texts:,} rows, but {name} has {count:,} {part}; every row that is read counts, one that "
            "is dropped as a duplicate too"
        )
    if (wide if truncate_dim is None else min(truncate_dim, wide)) != dim:
        taken = "" if truncate_dim is None else f", of which truncate_dim takes {truncate_dim}"
        remedy = f"; truncate_dim: {dim} takes the first {dim}" if wide > dim else ""
        raise InputError(
            f"{key}: {path}: the teacher has {wide} dimensions{taken}, the model {dim}; they have to be equal{remedy}"
        )
    block = max(1, _BLOCK_BYTES // max(1, wide * array.itemsize))
    with tqdm(total=texts, unit=" rows", desc=os.path.basename(path), delay=2) as bar:
        for start in range(0, texts, block):
            lengths = np.abs(np.asarray(array[start : start + block, :dim], np.float32)).sum(1)
            bad = np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))
            if len(bad):
                problem = "only zeros" if lengths[bad[0]] == 0 else "NaN or infinity"
                raise InputError(f"{key}: {path}: row {start + int(bad[0])} (from 0) holds {problem}")
            bar.update(len(lengths))
    return np.asarray(array)
