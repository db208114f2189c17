"""The token cache: texts become token ids once, and stay on the local disk as memory-mapped arrays.

One directory a key, written whole or not at all:

    tokens.bin    int32, the ids of all distinct texts, one after the other
    offsets.npy   int64 [distinct + 1], where each begins in tokens.bin
    hashes.npy    uint64 [distinct], `text_hash` of each
    rows.npy      int64 [texts], which distinct text each text of the source is; absent where that is the text itself
    meta.json     counts and what the key was made of
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt64
from tqdm import tqdm

from jaxembed.errors import InputError

log = logging.getLogger(__name__)

_Opened = TypeVar("_Opened")
_FORMAT = 1


class Tokenizer(Protocol):
    """What the cache asks of a tokenizer; `jaxembed.text.tokenizer.TextTokenizer` is one."""

    @property
    def fingerprint(self) -> Any:  # a string; pyright takes no cached property for a property that returns one
        """Changes whenever any text may get other ids: vocabulary, text format, truncation."""
        ...

    def __call__(self, texts: Sequence[str], role: Any) -> list[Int[np.ndarray, " length"]]: ...


@dataclass(frozen=True, eq=False)
class TokenCache:
    """Token ids of the texts of one source in one role; text `i` is `cache[i]`.

    Attributes:
        directory: where the arrays lie.
        tokens: ids of the distinct texts, one after the other; on the disk.
        offsets: where each distinct text begins in `tokens`, and where the last one ends.
        rows: which distinct text each text is; None where text `i` is distinct text `i`.
        distinct_hashes: `text_hash` of each distinct text.
    """

    directory: Path
    tokens: Int32[np.ndarray, " tokens"]
    offsets: Int64[np.ndarray, " distinct+1"]
    rows: Int64[np.ndarray, " texts"] | None
    distinct_hashes: UInt64[np.ndarray, " distinct"]

    def __len__(self) -> int:
        return len(self.distinct_hashes if self.rows is None else self.rows)

    def __getitem__(self, text: int) -> Int32[np.ndarray, " length"]:
        """The ids of a text, markers and end token included: a read-only view."""
        row = text if self.rows is None else self.rows[text]
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all its arrays: equal on hosts that tokenised the same texts the same way."""
        recorded = json.loads((self.directory / "meta.json").read_text()).get("sha256")
        return recorded or _digest(hashlib.sha256(), self.tokens, self.offsets, self.distinct_hashes, self.rows)

    @cached_property
    def lengths(self) -> Int32[np.ndarray, " texts"]:
        """Number of ids of each text."""
        lengths = np.diff(self.offsets).astype(np.int32)
        return lengths if self.rows is None else lengths[self.rows]

    @cached_property
    def hashes(self) -> UInt64[np.ndarray, " texts"]:
        """`text_hash` of each text; equal texts have equal hashes whatever their source and role."""
        return self.distinct_hashes if self.rows is None else self.distinct_hashes[self.rows]


def text_hash(text: str) -> int:
    """The 8-byte BLAKE2b hash of a text in UTF-8, as an unsigned little-endian integer."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def build_token_cache(
    texts: Sequence[str],
    role: Literal["query", "document"],
    tokenizer: Tokenizer,
    *,
    source_fingerprint: str,
    directory: str | os.PathLike[str],
    distinct: bool = False,
    batch: int = 4096,
    progress: bool = True,
) -> TokenCache:
    """The token cache of `texts`: the one that is there, else a new one.

    Processes that build the same cache at once do not disturb each other: each writes a directory of its own, the first
    to end gives it its name, the others use that one.

    Args:
        texts: may repeat; each distinct one is tokenised once. Read in batches where `distinct` is given.
        role: how the tokenizer marks them.
        tokenizer: gives the ids.
        source_fingerprint: changes whenever `texts` may have changed; names the column too where a source has several.
        directory: local folder that holds the caches.
        distinct: the texts are known to differ, as documents of a corpus are: they need not be in memory to find those
            that repeat, and the cache has 20 bytes a text in memory at the most.
        batch: texts given to the tokenizer at once, in its own threads.
        progress: whether to show a bar.

    Raises:
        InputError: the cache cannot be written (full disk, no permission).
    """
    if not distinct:
        texts = list(texts)
    key = {"source": source_fingerprint, "tokenizer": tokenizer.fingerprint, "role": role, "format": _FORMAT}
    key |= {"distinct_texts": True} if distinct else {}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    built = False

    def write(temporary: Path) -> None:
        nonlocal built
        built = True
        _write(temporary, texts, role, tokenizer, key, batch, progress)

    final = Path(directory).expanduser() / name
    cache = built_once(final, lambda at: _open(at, texts), write, "token cache")
    state = "built" if built else "hit"
    log.info("token cache %s: %d texts, %d tokens in %s", state, len(cache), len(cache.tokens), final)
    return cache


def built_once(final: Path, opened: Callable[[Path], _Opened], write: Callable[[Path], None], what: str) -> _Opened:
    """What lies in a directory that is written whole or not at all, by an earlier call, this one, or another process.

    Args:
        final: the directory.
        opened: reads it; FileNotFoundError, OSError, ValueError, KeyError and EOFError mean that it is damaged.
        write: fills a new directory.
        what: it is, for messages.

    Raises:
        InputError: it cannot be written (full disk, no permission).
    """
    found = _if_sound(final, opened, what)
    if found is not None:
        return found
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(final)
        temporary.mkdir()
        try:
            write(temporary)
            return _publish(temporary, final, opened, what)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"cannot write the {what} in {final.parent}: {error}. data.cache_dir names another place"
        ) from error


def _write(
    directory: Path,
    texts: Sequence[str],
    role: str,
    tokenizer: Tokenizer,
    key: dict[str, Any],
    batch: int,
    progress: bool,
) -> None:
    rows, count = None, len(texts)
    if "distinct_texts" not in key:
        row_of: dict[str, int] = {}
        rows = np.fromiter((row_of.setdefault(text, len(row_of)) for text in texts), np.int64, count)
        texts = list(row_of)
    digest = hashlib.sha256()
    offsets = np.zeros(len(texts) + 1, np.int64)
    hashes = np.zeros(len(texts), np.uint64)
    with (
        open(directory / "tokens.bin", "wb") as file,
        tqdm(total=len(texts), unit=" texts", desc=f"tokenising ({role})", disable=not progress) as bar,
    ):
        for start in range(0, len(texts), batch):
            some = list(texts[start : start + batch])
            ids = tokenizer(some, role)
            hashes[start : start + len(some)] = np.fromiter(map(text_hash, some), np.uint64, len(some))
            offsets[start + 1 : start + 1 + len(ids)] = [len(one) for one in ids]
            written = np.concatenate(ids).astype(np.int32, copy=False).tobytes()
            file.write(written)
            digest.update(written)
            bar.update(len(ids))
    np.cumsum(offsets, out=offsets)
    np.save(directory / "offsets.npy", offsets)
    np.save(directory / "hashes.npy", hashes)
    if rows is not None:
        np.save(directory / "rows.npy", rows)
    meta = key | {"texts": count, "distinct": len(texts), "tokens": int(offsets[-1])}
    meta["sha256"] = _digest(digest, offsets, hashes, rows)
    (directory / "meta.json").write_text(json.dumps(meta, indent=1))


def _digest(digest: Any, *arrays: np.ndarray | None) -> str:
    """Of what the digest has taken in, and of arrays: the tokens first."""
    for array in arrays:
        if array is not None:
            digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _publish(temporary: Path, final: Path, opened: Callable[[Path], _Opened], what: str) -> _Opened:
    """Gives a finished directory its name, unless another process was first with a sound one."""
    while True:
        try:
            temporary.rename(final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            found = _if_sound(final, opened, what, warn=False)
            if found is not None:
                return found
            _discard(final)
        else:
            return opened(final)


def _discard(directory: Path) -> None:
    """Moves a directory out of the way before it is deleted, so that nobody meets it half-deleted."""
    grave = _temporary(directory)
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        directory.rename(grave)
        shutil.rmtree(grave)


def _temporary(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.{uuid.uuid4().hex}.tmp")


def _if_sound(directory: Path, opened: Callable[[Path], _Opened], what: str, *, warn: bool = True) -> _Opened | None:
    try:
        return opened(directory)
    except FileNotFoundError:
        if not directory.exists():
            return None
        reason = "a file is missing"
    except (OSError, ValueError, KeyError, EOFError) as error:
        reason = str(error)
    if warn:
        log.warning("the %s %s is damaged (%s) and will be built again", what, directory, reason)
    return None


def _open(directory: Path, texts: Sequence[str]) -> TokenCache:
    meta = json.loads((directory / "meta.json").read_text())
    several = "distinct_texts" not in meta
    # A cache of a corpus stays on the disk but for what is computed from it.
    offsets, hashes = (
        np.asarray(np.load(directory / f"{name}.npy", mmap_mode=None if several else "r"))
        for name in ("offsets", "hashes")
    )
    rows = np.load(directory / "rows.npy") if several else None
    size = (directory / "tokens.bin").stat().st_size
    if size != 4 * meta["tokens"]:
        raise ValueError(f"tokens.bin has {size} bytes, expected {4 * meta['tokens']}")
    count = len(hashes) if rows is None else len(rows)
    if (len(offsets), len(hashes), count) != (meta["distinct"] + 1, meta["distinct"], meta["texts"]):
        raise ValueError("its arrays are not as long as meta.json says")
    if offsets[0] != 0 or offsets[-1] != meta["tokens"] or (np.diff(offsets) < 0).any():
        raise ValueError("offsets.npy does not ascend from 0 to the number of tokens")
    if rows is not None and len(rows) and not (rows.min() >= 0 and rows.max() < len(hashes)):
        raise ValueError("rows.npy points outside the distinct texts")
    ends = [0, -1] if len(texts) else []
    if count != len(texts) or any(
        int(hashes[end if rows is None else rows[end]]) != text_hash(texts[end]) for end in ends
    ):
        raise ValueError("it holds other texts than the source")
    # An empty file cannot be mapped.
    tokens = np.memmap(directory / "tokens.bin", np.int32, "r") if size else np.zeros(0, np.int32)
    return TokenCache(directory, np.asarray(tokens), offsets, rows, hashes)
