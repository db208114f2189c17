"""Embeddings on the disk, a chunk of texts at a time; a killed run goes on at the chunk where it was.

One directory a set of texts, a role and a model, named by the hash of what the embeddings depend on:

    embeddings.f32   float32 [texts, dim]
    progress.json    that key, and how many texts are done
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32
from tqdm import tqdm

from jaxembed.data.files import new_file
from jaxembed.errors import InputError

logger = logging.getLogger(__name__)

CHUNK = 8192
"""Texts embedded and written at once. Part of the key: how texts are packed into rows is felt in the last bits."""

_FORMAT = 1


@dataclass(frozen=True)
class Embeddings:
    """Embeddings in a file; a slice of rows is read, not mapped, so that only what is asked for is in memory."""

    file: Path
    shape: tuple[int, int]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Float32[np.ndarray, "rows dim"]:
        start, stop, _ = rows.indices(self.shape[0])
        count = max(0, stop - start) * self.shape[1]
        values = np.fromfile(self.file, np.float32, count, offset=4 * start * self.shape[1])
        if len(values) != count:
            raise InputError(f"{self.file}: cut since it was written; remove it and mine again")
        return values.reshape(-1, self.shape[1])


def embed_on_disk(
    texts: Sequence[str],
    embed: Callable[[list[str]], Float[np.ndarray, "some dim"]],
    work: Path,
    *,
    name: str,
    dim: int,
    key: Mapping[str, Any],
    chunk: int = CHUNK,
    progress: bool = True,
) -> Embeddings:
    """The embeddings of all texts, in a directory below `work`: those that are there, and the others computed.

    Args:
        embed: gives the vectors of at most `chunk` texts.
        name: of the directory, before its hash: "queries" or "documents".
        key: all that the embeddings depend on: model, texts, role, dtype. Another one is another directory.

    Raises:
        InputError: the directory cannot be written, or an embedding is not finite.
    """
    key = {**key, "texts": len(texts), "dim": dim, "chunk": chunk, "format": _FORMAT}
    directory = work / f"{name}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"
    file, record = directory / "embeddings.f32", directory / "progress.json"
    try:
        if not directory.exists() and (others := sorted(work.glob(f"{name}-*"))):
            logger.info(
                "%s: %s are of another model, other texts or another prompt; embedding anew", work, others[0].name
            )
        directory.mkdir(parents=True, exist_ok=True)
        done = _done(file, record, key, 4 * dim)
        if done:
            logger.info("%s: %s of %s texts are embedded already", directory, f"{done:,}", f"{len(texts):,}")
        with (
            open(file, "r+b" if file.exists() else "w+b") as stream,
            tqdm(total=len(texts), initial=done, unit="text", desc=f"embed {name}", disable=not progress) as bar,
        ):
            stream.truncate(4 * dim * done)
            stream.seek(0, os.SEEK_END)
            for start in range(done, len(texts), chunk):
                some = [texts[index] for index in range(start, min(start + chunk, len(texts)))]
                vectors = np.ascontiguousarray(embed(some), np.float32)
                _check_finite(vectors, some, start)
                stream.write(vectors.data)
                stream.flush()
                os.fsync(stream.fileno())  # else the record could outlive what it speaks of
                _write_record(record, key, start + len(some))
                bar.update(len(some))
    except OSError as error:
        raise InputError(f"{directory}: embeddings cannot be written: {error.strerror or error}") from error
    return Embeddings(file, (len(texts), dim))


def _done(file: Path, record: Path, key: Mapping[str, Any], row_bytes: int) -> int:
    """How many texts are embedded, by the record and by the file's size."""
    if not record.exists():
        return 0
    try:
        found = json.loads(record.read_bytes())
        done = int(found["done"])
        sound = found["key"] == key and done * row_bytes <= file.stat().st_size
        sound = sound and (done % key["chunk"] == 0 or done == key["texts"])
    except (OSError, ValueError, KeyError, TypeError):
        sound, done = False, 0
    if not sound:
        logger.warning("%s: damaged; embedding anew", file)
    return done if sound else 0


def _write_record(record: Path, key: Mapping[str, Any], done: int) -> None:
    with new_file(record) as file:
        file.write(json.dumps({"done": done, "key": key}, indent=1).encode())


def _check_finite(vectors: Float32[np.ndarray, "some dim"], texts: Sequence[str], start: int) -> None:
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        index = int(broken[0])
        raise InputError(
            f"the embedding of text {start + index} ({texts[index]!r:.80}) is not finite: the model is damaged, "
            "or its dtype too narrow"
        )
