"""`manifest.json` of an output directory: what its embeddings depend on, so that no other job goes on with them."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float32

from jaxembed.data.files import new_file
from jaxembed.data.id_texts import TextColumns
from jaxembed.encoding.readers import File, Part
from jaxembed.errors import InputError

MANIFEST = "manifest.json"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What an output directory holds.

    Attributes:
        job: what the embeddings depend on besides the corpus, as options and hashes by name.
        machine: on what it was begun; elsewhere the last bits may differ.
        parts: the files of the corpus.
        texts: of all shards.
        skipped: rows that could not be read.
        shards: names of the files, in the order of the corpus; ids of `.npy` files are beside them.
        shard_rows: rows of the corpus in each shard but the last.
        ranges: minimum and maximum of each dimension, for int8 and uint8.
        complete: whether all shards are there.
    """

    job: Mapping[str, Any]
    machine: str
    parts: Sequence[Part]
    texts: int
    skipped: int
    shards: Sequence[str]
    shard_rows: int
    ranges: Float32[np.ndarray, "2 dim"] | None = None
    complete: bool = False

    @property
    def rows(self) -> Sequence[range]:
        """The rows of each shard, counted through all files."""
        total = sum(part.rows for part in self.parts)
        return [range(first, min(first + self.shard_rows, total)) for first in range(0, total, self.shard_rows)]


def to_json(manifest: Manifest) -> str:
    ranges = None if manifest.ranges is None else manifest.ranges.astype(float).tolist()
    values = {"format": _FORMAT, **dataclasses.asdict(manifest), "ranges": ranges}
    return json.dumps(values, indent=1, ensure_ascii=False)


def from_json(text: str) -> Manifest:
    """
    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is no manifest.
    """
    values = json.loads(text)
    if values.pop("format") != _FORMAT:
        raise ValueError("it is of another version of jaxembed")
    parts = [
        Part(**{**part, "file": File(**part["file"]), "columns": TextColumns(**part["columns"])})
        for part in values.pop("parts")
    ]
    ranges = values.pop("ranges")
    return Manifest(**values, parts=parts, ranges=None if ranges is None else np.array(ranges, np.float32))


def write_manifest(directory: epath.Path, manifest: Manifest) -> None:
    with new_file(directory / MANIFEST) as file:
        file.write(f"{to_json(manifest)}\n".encode())


def read_manifest(directory: epath.Path) -> Manifest | None:
    """The manifest of a directory, None of one that is empty or not there.

    Raises:
        InputError: a file, a directory of something else, or a manifest that cannot be read.
    """
    if not directory.exists():
        return None
    if not directory.is_dir():
        raise InputError(f"--output {directory}: is a file; expected a directory")
    path = directory / MANIFEST
    if not path.exists():
        others = sorted(other.name for other in directory.iterdir() if not other.name.startswith("."))
        if others:
            raise InputError(
                f"--output {directory}: holds {others[0]}, but no {MANIFEST}, so it is not the output of an earlier "
                "start; choose another directory"
            )
        return None
    try:
        return from_json(path.read_text())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read: {error}; choose another --output, or remove it") from error


def read_ranges(directory: str | os.PathLike[str], model: str | None = None) -> Float32[np.ndarray, "2 dim"]:
    """Minimum and maximum of each dimension, as an int8 or uint8 job took them.

    Args:
        model: hash of the model that they are for; None: of whichever.

    Raises:
        InputError: there is no such job, or it was another model's.
    """
    found = read_manifest(epath.Path(directory).expanduser())
    if found is None or found.ranges is None:
        raise InputError(f"--ranges {directory}: expected the output directory of a job in int8 or uint8")
    if model not in (None, found.job.get("model hash")):
        raise InputError(
            f"--ranges {directory}: its embeddings are of another model, whose weights have the hash "
            f"{found.job.get('model hash')}; those of this one have {model}"
        )
    return found.ranges


def refuse_other_job(directory: epath.Path, manifest: Manifest, job: Mapping[str, Any]) -> None:
    """Compares what a job is, as far as it is known, with what the directory was begun with.

    Raises:
        InputError: names all that differs.
    """
    differences = [
        f"{name} was {_shown(manifest.job.get(name))}, is now {_shown(value)}"
        for name, value in job.items()
        if manifest.job.get(name) != value
    ]
    _refuse(directory, differences)


def refuse_other_files(directory: epath.Path, manifest: Manifest, files: Sequence[File]) -> None:
    """Compares the files of the corpus with those that the directory was begun with.

    Raises:
        InputError: names the first ones that came, went or changed.
    """
    before, now = {part.file.path: part.file for part in manifest.parts}, {file.path: file for file in files}
    differences = [f"{path} is no longer among the --input files" for path in before if path not in now]
    differences += [f"{path} is a new --input file" for path in now if path not in before]
    for path, file in before.items():
        if path in now and now[path].bytes != file.bytes:
            differences.append(f"{path} had {file.bytes:,} bytes, has now {now[path].bytes:,}")
        elif path in now and now[path].modified != file.modified:
            differences.append(f"{path} was written again")
    if not differences and list(before) != list(now):
        differences.append("the --input files were given in another order")
    _refuse(directory, differences)


def _refuse(directory: epath.Path, differences: Sequence[str]) -> None:
    if differences:
        more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise InputError(
            f"--output {directory}: holds embeddings of another job: {'; '.join(differences[:4])}{more}. Choose "
            "another directory, or start it as it was begun"
        )


def _shown(value: Any) -> str:
    return f"{json.dumps(value, ensure_ascii=False):.120}"
