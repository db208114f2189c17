"""A corpus whose nearest texts are found for queries: embedded once, on the disk, and searched exactly.

The embeddings are the output of `jaxembed.encoding`: made here from a file of texts, or by an earlier `encode`.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float32

from jaxembed.data.files import is_local
from jaxembed.embedder import Embedder
from jaxembed.encoding.job import Options, encode_corpus
from jaxembed.encoding.manifest import MANIFEST, Manifest, read_manifest
from jaxembed.encoding.readers import File, Text, find_files, read_shards
from jaxembed.encoding.writers import ids_file
from jaxembed.errors import InputError
from jaxembed.mining.search import nearest

logger = logging.getLogger(__name__)

INDEX = ".index"
"""What the folder of a corpus's embeddings is called, after the corpus."""


AS_DOCUMENTS = Options(inputs=(), output="", format="npy")
"""How the texts of a file are embedded by default; `.npy`, because a slice of it is read without the rest."""


@dataclass(frozen=True)
class Hit:
    """A text that was found.

    Attributes:
        score: cosine.
        text: None: its file is not there any more.
    """

    score: float
    id: str
    text: str | None


class Shards:
    """The embeddings of a job, as rows of unit length; a slice is read from the disk."""

    def __init__(self, directory: epath.Path, manifest: Manifest) -> None:
        """
        Raises:
            InputError: a shard is missing or cannot be read.
        """
        self._paths = [directory / name for name in manifest.shards]
        self._vectors = functools.lru_cache(maxsize=1)(_vectors)
        self._ids = functools.lru_cache(maxsize=8)(_ids)
        counts = [self._checked(path, _rows_and_width) for path in self._paths]
        self.starts = np.cumsum([0, *(rows for rows, _ in counts)])
        self.shape = (int(self.starts[-1]), counts[0][1])

    def __getitem__(self, rows: slice) -> Float32[np.ndarray, "rows dim"]:
        start, stop, _ = rows.indices(self.shape[0])
        parts = [np.empty((0, self.shape[1]), np.float32)]
        for shard, path in enumerate(self._paths):
            first, end = self.starts[shard], self.starts[shard + 1]
            if max(first, start) < min(end, stop):
                vectors = self._checked(path, self._vectors)
                parts.append(np.asarray(vectors[max(start - first, 0) : stop - first], np.float32))
        return unit(np.concatenate(parts))

    def place(self, row: int) -> tuple[int, int]:
        """Number of the row's shard, and of the row in it."""
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return shard, row - int(self.starts[shard])

    def id_of(self, row: int) -> str:
        shard, place = self.place(row)
        return self._checked(self._paths[shard], self._ids)[place]

    def _checked(self, path: epath.Path, read: Any) -> Any:
        try:
            return read(path)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{path}: embeddings that cannot be read: {error}; remove it, of .npy also the .ids.json beside it, "
                "then encode the corpus again"
            ) from None


class Corpus:
    """Texts with their embeddings.

    Attributes:
        vectors: of the texts.
        job: how they were embedded, as in the manifest.
    """

    def __init__(self, directory: epath.Path, manifest: Manifest) -> None:
        self.vectors = Shards(directory, manifest)
        self.job = manifest.job
        self._manifest = manifest
        self._readable = self._texts_are_there()

    def search(self, queries: Float32[np.ndarray, "queries dim"], k: int) -> list[list[Hit]]:
        """The `k` nearest texts of each query by cosine, best first, of equal ones the first in the corpus.

        Args:
            queries: of any length.

        Raises:
            InputError: a query that is not finite, or another width.
        """
        if queries.shape[1] != self.vectors.shape[1] or not np.isfinite(queries).all():
            raise InputError(
                f"expected finite embeddings of {self.vectors.shape[1]} dimensions as in the corpus, found "
                f"{queries.shape[1]}: the model is damaged, or another one"
            )
        rows, scores = nearest(unit(queries), self.vectors, min(k, self.vectors.shape[0]))
        texts = self._texts(sorted(set(rows.ravel().tolist())))
        return [
            [Hit(score, self.vectors.id_of(row), texts.get(row)) for row, score in zip(some, found)]
            for some, found in zip(rows.tolist(), scores.tolist())
        ]

    def _texts(self, rows: Sequence[int]) -> dict[int, str]:
        """By row, of those whose files are as they were."""
        self._readable = self._readable and self._texts_are_there()
        if not self._readable:
            return {}
        manifest = self._manifest
        if not manifest.skipped:  # then rows of embeddings are rows of the corpus
            found = read_shards(manifest.parts, [range(row, row + 1) for row in rows], "error")
            return {row: text for row, [(_, text)] in zip(rows, found)}
        places = [self.vectors.place(row) for row in rows]
        shards = sorted({shard for shard, _ in places})
        texts: dict[int, list[Text]] = dict(
            zip(shards, read_shards(manifest.parts, [manifest.rows[shard] for shard in shards], "skip"))
        )
        return {row: texts[shard][place][1] for row, (shard, place) in zip(rows, places)}

    def _texts_are_there(self) -> bool:
        for part in self._manifest.parts:
            try:
                [found] = find_files([part.file.path])
            except InputError:
                found = None
            if found != part.file:
                how = "is not there any more" if found is None else "was changed since"
                logger.warning("%s %s, so ids are shown without texts", part.file.path, how)
                return False
        return True


def open_corpus(corpus: str, model: Embedder, options: Options = AS_DOCUMENTS, index: str | None = None) -> Corpus:
    """The corpus with its embeddings, those that are missing made now.

    Args:
        corpus: a file or pattern that `encode` reads, or a folder that it wrote.
        options: how a file is embedded; its inputs and output are set here.
        index: folder of a file's embeddings; None: beside the file, named after it. Each model, version of the corpus
            and way to embed has a folder of its own in it.

    Raises:
        InputError: what `encode` refuses; a folder of another model, in another precision, or not complete.
    """
    if epath.Path(corpus).expanduser().is_dir():
        return _open_encoded(epath.Path(corpus).expanduser(), model)
    if is_local(epath.Path(corpus)):
        corpus = os.path.abspath(os.path.expanduser(corpus))  # one corpus from whatever directory it is named
    files = find_corpus_files(corpus)
    folder = epath.Path(f"{files[0].path}{INDEX}" if index is None else index).expanduser()
    if not is_local(folder):
        raise InputError(f"{folder}: embeddings have to lie on this machine to be searched; give a local --index")
    directory = folder / _name(files, model, options)
    if not directory.exists() and folder.is_dir() and (others := sorted(path.name for path in folder.iterdir())):
        logger.info("%s: %s is of another model or another version of the corpus; embedding anew", folder, others[0])
    with _own_options():
        summary = encode_corpus(replace(options, inputs=[corpus], output=str(directory)), lambda: model)
    logger.info("%s: %s", directory, summary)
    return Corpus(directory, summary.manifest)


def find_corpus_files(corpus: str) -> list[File]:
    """The files of a corpus that is no folder.

    Raises:
        InputError: there is none.
    """
    with _own_options():
        return find_files([corpus])


def unit(vectors: Float32[np.ndarray, "texts dim"]) -> Float32[np.ndarray, "texts dim"]:
    """Of unit length; zeros stay."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))


@contextlib.contextmanager
def _own_options() -> Iterator[None]:
    """Errors of `encode` name the options of `search`."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("--input", "--corpus").replace("--output", "--index")) from None


def _open_encoded(directory: epath.Path, model: Embedder) -> Corpus:
    if not (directory / MANIFEST).exists():
        raise InputError(
            f"--corpus {directory}: a folder without {MANIFEST}; expected a file, a pattern in quotes such as "
            f"'{directory}/*.jsonl.gz', or a folder that `jaxembed encode` wrote"
        )
    if not is_local(directory):
        raise InputError(f"--corpus {directory}: embeddings have to lie on this machine to be searched; copy them here")
    with _own_options():
        manifest = read_manifest(directory)
    assert manifest is not None
    if not manifest.complete:
        raise InputError(f"--corpus {directory}: not complete; start `jaxembed encode` again as it was started")
    job = manifest.job
    if job["precision"] != "float32":
        raise InputError(f"--corpus {directory}: embeddings in {job['precision']}; search needs float32")
    if job["model hash"] != model.model_hash:
        raise InputError(
            f"--corpus {directory}: embeddings of another model, weights {job['model hash'][:12]}…; --model has "
            f"{model.model_hash[:12]}…"
        )
    if job["tokenizer and text format"] != model.tokenizer.fingerprint:
        raise InputError(f"--corpus {directory}: embedded by another tokenizer or text format than that of --model")
    return Corpus(directory, manifest)


def _name(files: Sequence[File], model: Embedder, options: Options) -> str:
    """Of the folder: a hash of all that the embeddings depend on."""
    given = asdict(replace(options, inputs=[], output="", ranges=None))
    key = {
        "files": [asdict(file) for file in files],
        "model": model.model_hash,
        "tokenizer and text format": model.tokenizer.fingerprint,
        "dtype": str(np.dtype(model.dtype)),
        "options": given,
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _rows_and_width(path: epath.Path) -> tuple[int, int]:
    if path.suffix == ".npy":
        return _vectors(path).shape
    import pyarrow.parquet as pq

    column = pq.read_schema(path).field("embedding")
    return pq.read_metadata(path).num_rows, column.type.list_size


def _vectors(path: epath.Path) -> np.ndarray:
    """`[texts, width]`; of `.npy` mapped, not read."""
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")
    import pyarrow.parquet as pq

    column = pq.read_table(path, columns=["embedding"])["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), column.type.list_size)


def _ids(path: epath.Path) -> list[str]:
    if path.suffix == ".npy":
        return json.loads(ids_file(path).read_text())
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=["id"])["id"].to_pylist()
