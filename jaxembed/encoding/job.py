"""A corpus of any size to shards of embeddings, on all devices of all hosts; begun again it goes on where it was.

A shard holds the texts of so many rows of the corpus and is embedded by itself: equal texts are looked for, and texts
packed, inside it only. So what it holds depends on the corpus and the options alone, not on who writes it or when. Each
process takes shards in turn and embeds them on its own devices; nothing but the list of what is to do crosses hosts.
"""

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from jaxtyping import Float32, Num
from tqdm import tqdm

from jaxembed import hosts
from jaxembed.data.files import TEMPORARY, is_local
from jaxembed.embedder import Embedder
from jaxembed.encoding.manifest import (
    Manifest,
    from_json,
    read_manifest,
    refuse_other_files,
    refuse_other_job,
    to_json,
    write_manifest,
)
from jaxembed.encoding.readers import (
    BadRows,
    Fields,
    File,
    Text,
    find_files,
    is_unicode,
    read_shards,
    refuse_changed,
    survey,
)
from jaxembed.encoding.writers import WRITERS, ids_file
from jaxembed.errors import InputError
from jaxembed.quantization import Precision, quantize_embeddings
from jaxembed.text.format import RoleName

logger = logging.getLogger(__name__)

CALIBRATION_TEXTS = 4096
"""Drawn from the whole corpus, for the ranges of int8 and uint8."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
        inputs: files and patterns, local or in a bucket.
        output: directory of the shards, local or in a bucket; one for all processes.
        ranges: minimum and maximum of each dimension for int8 and uint8, float32 `[2, dim]`; None: those of
            `CALIBRATION_TEXTS` texts of the corpus.
        shard_size: rows of the corpus in a shard.
        The others are as in `Embedder.encode`.
    """

    inputs: Sequence[str]
    output: str
    fields: Fields = dataclasses.field(default_factory=Fields)
    bad_rows: BadRows = "error"
    role: RoleName = "document"
    prompt: str | None = None
    precision: Precision = "float32"
    ranges: Float32[np.ndarray, "2 dim"] | None = None
    truncate_dim: int | None = None
    batch_size: int | None = None
    format: Literal["parquet", "npy"] = "parquet"
    shard_size: int = 32_768


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a job ended.

    Attributes:
        manifest: of the output directory.
        texts, tokens, seconds: of what this process embedded now.
    """

    manifest: Manifest
    texts: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        manifest = self.manifest
        skipped = f", {manifest.skipped:,} rows skipped" if manifest.skipped else ""
        where = f"{manifest.texts:,} texts in {len(manifest.shards):,} shards{skipped}"
        if not self.texts:
            return f"{where}; all were there already"
        texts, tokens = self.texts / self.seconds, self.tokens / self.seconds
        return f"{where}; {self.texts:,} of them now, {texts:,.0f} texts/s, {tokens:,.0f} tokens/s"


def encode_corpus(options: Options, load: Callable[[], Embedder], *, progress: bool = True) -> Summary:
    """Embeds the corpus, or what is left to do of it.

    Args:
        load: gives the model; called when nothing is wrong with files and directory.
        progress: shows bars.

    Raises:
        InputError: wrong options or rows, no files or no texts, an output directory of something else, too little room
            on its disk, an embedding that is not finite, or files that were changed meanwhile.
    """
    if options.shard_size < 1:
        raise InputError(f"--shard-size: expected a whole number of at least 1, found {options.shard_size}")
    if not options.output:
        raise InputError("--output: expected a directory, found an empty name")
    fields = {f"--{name}-field": value for name, value in vars(options.fields).items()}
    for option, value in {"--prompt": options.prompt, **fields}.items():
        if value is not None and not is_unicode(value):
            raise InputError(f"{option}: {value!r} is not UTF-8")
    files = find_files(options.inputs)
    directory = epath.Path(options.output).expanduser()
    found = read_manifest(directory)
    job = _job(options)
    if found is not None:
        refuse_other_job(directory, found, job)
        if hosts.is_main():
            refuse_other_files(directory, found, files)
    # Not their times: each host may have a copy of its own.
    hosts.agree("the input", {file.path: f"{file.bytes:,} bytes" for file in files})
    model = load()
    encode = _Encode(model, options)
    job |= _job_of_model(model)
    hosts.agree("the job", {name: json.dumps(value) for name, value in job.items()})
    if found is not None:
        refuse_other_job(directory, found, job)
    if hosts.count() > 1 or found is None or not found.complete or _absent(directory, found):  # else only read
        hosts.check_shared(directory, "--output")
    if found is None and hosts.is_main():
        found = _begin(options, job, files, model, encode, progress)
        _check_room(directory, found, encode, done=0)
        if (other := read_manifest(directory)) is not None:  # of a start meanwhile: looking through takes its time
            refuse_other_job(directory, other, job)
            refuse_other_files(directory, other, files)
        write_manifest(directory, found)
    # Process 0's: a shared disk may go on for a while saying that no such file is there.
    found = from_json(hosts.broadcast("the manifest", "" if found is None else to_json(found)))
    if found.machine != _machine(model):
        logger.warning(
            "begun on %s, going on on %s: numbers agree to rounding, not to the bit", found.machine, _machine(model)
        )
    encode.ranges = found.ranges
    leftovers = [path for path in directory.iterdir() if path.name.startswith(".") and path.name.endswith(TEMPORARY)]
    absent = set(_absent(directory, found))
    _check_room(directory, found, encode, done=len(found.shards) - len(absent))
    todo = json.loads(hosts.broadcast("shards to do", json.dumps([shard in absent for shard in found.shards])))
    mine = np.flatnonzero(todo)[jax.process_index() :: jax.process_count()].tolist()
    summary = _embed_shards(found, directory, mine, encode, options, progress)
    if mine:
        refuse_changed(files)
    hosts.barrier("the last shard")
    if hosts.is_main() and (any(todo) or not found.complete):
        _finish(directory, found, leftovers if any(todo) else ())
    return summary


class _Encode:
    """Texts to vectors as the options say."""

    def __init__(self, model: Embedder, options: Options) -> None:
        self._model = model
        self.ranges = options.ranges
        self._options = {
            "prompt_name": options.role,
            "prompt": options.prompt,
            "batch_size": options.batch_size,
            "truncate_dim": options.truncate_dim,
            "show_progress_bar": False,
        }
        self.precision: Precision = options.precision
        nothing = self([])  # refuses wrong options
        self.bytes = nothing.shape[1] * nothing.dtype.itemsize
        """Of one embedding."""

    def __call__(
        self, texts: Sequence[str], progress: Callable[[int, int], object] | None = None
    ) -> Num[np.ndarray, "texts width"]:
        return self._model.encode(
            texts, **self._options, precision=self.precision, ranges=self.ranges, progress=progress
        )

    def floats(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts dim"]:
        return self._model.encode(texts, **self._options)


def _job(options: Options) -> dict[str, Any]:
    """What of the options the embeddings and their files depend on."""
    return {
        "id field": options.fields.id,
        "text field": options.fields.text,
        "title field": options.fields.title,
        "bad rows": options.bad_rows,
        "role": options.role,
        "prompt": options.prompt,
        "precision": options.precision,
        "given ranges": None if options.ranges is None else options.ranges.astype(float).tolist(),
        "truncate dim": options.truncate_dim,
        "batch size": options.batch_size,
        "format": options.format,
        "shard size": options.shard_size,
    }


def _job_of_model(model: Embedder) -> dict[str, Any]:
    return {
        "model hash": model.model_hash,
        "text format": model.text_format.to_dict(),
        "tokenizer and text format": model.tokenizer.fingerprint,
        "dtype": str(np.dtype(model.dtype)),
        "dim": model.dim,
    }


def _machine(model: Embedder) -> str:
    device = jax.local_devices()[0]
    shape = {} if model.mesh is None else {axis: size for axis, size in model.mesh.shape.items() if size > 1}
    split = "".join(f", {axis} {size}" for axis, size in shape.items())
    return f"{device.device_kind}{split}, {model.attention_kernel} attention, jax {jax.__version__}"


def _begin(
    options: Options, job: dict[str, Any], files: Sequence[File], model: Embedder, encode: _Encode, progress: bool
) -> Manifest:
    """Looks the corpus through; the manifest of an empty directory."""
    calibrated = options.precision in ("int8", "uint8") and options.ranges is None
    found = survey(
        files,
        options.fields,
        options.role,
        options.bad_rows,
        sample=CALIBRATION_TEXTS if calibrated else 0,
        progress=progress,
    )
    rows = sum(part.rows for part in found.parts)
    count = -(-rows // options.shard_size)
    shards = [f"embeddings-{shard:05d}-of-{count:05d}.{options.format}" for shard in range(count)]
    logger.info("%s: %s texts in %s shards", options.output, f"{found.texts:,}", f"{count:,}")
    ranges = options.ranges
    if calibrated:
        logger.info("taking the ranges of %s from %s texts", options.precision, f"{len(found.sample):,}")
        vectors = encode.floats(found.sample)
        quantize_embeddings(vectors, options.precision)  # refuses what is not finite, or a single text
        ranges = np.stack([vectors.min(axis=0), vectors.max(axis=0)])
    return Manifest(job, _machine(model), found.parts, found.texts, found.skipped, shards, options.shard_size, ranges)


def _check_room(directory: epath.Path, manifest: Manifest, encode: _Encode, done: int) -> None:
    """Refuses a disk that cannot take what is left to write."""
    if not is_local(directory):
        return
    rows = sum(map(len, manifest.rows[done:]))
    needed, free = rows * encode.bytes / 1e9, shutil.disk_usage(directory).free / 1e9
    if needed > free:
        raise InputError(
            f"--output {directory}: {rows:,} embeddings of {encode.bytes:,} bytes take {needed:,.2f} GB, free are "
            f"{free:,.2f} GB"
        )


def _embed_shards(
    manifest: Manifest,
    directory: epath.Path,
    shards: Sequence[int],
    encode: _Encode,
    options: Options,
    progress: bool,
) -> Summary:
    rows = manifest.rows
    write = WRITERS[options.format]
    start, tokens, texts = time.monotonic(), 0, 0
    reader = read_shards(manifest.parts, [rows[shard] for shard in shards], options.bad_rows)
    left = sum(len(rows[shard]) for shard in shards)
    total = sum(map(len, rows)) if jax.process_count() == 1 else left
    with (
        tqdm(total=total, initial=total - left, unit="text", desc="encode", disable=not progress) as bar,
        ThreadPoolExecutor(1) as background,
    ):

        def count(more: int, more_tokens: int) -> None:
            nonlocal tokens, texts
            texts, tokens = texts + more, tokens + more_tokens
            bar.set_postfix_str(f"{tokens / (time.monotonic() - start):,.0f} tokens/s", refresh=False)
            bar.update(more)

        for shard, found in zip(shards, _ahead(reader, background)):
            ids, some = [one for one, _ in found], [text for _, text in found]
            vectors = encode(some, count)
            _check_finite(vectors, ids)
            write(directory / manifest.shards[shard], ids, vectors)
            bar.update(len(rows[shard]) - len(found))  # rows that were skipped
    return Summary(manifest, texts, tokens, time.monotonic() - start)


def _ahead(reader: Iterator[list[Text]], background: ThreadPoolExecutor) -> Iterator[list[Text]]:
    """The same, the next one being read while one is in use."""
    coming = background.submit(next, reader, None)
    while (found := coming.result()) is not None:
        coming = background.submit(next, reader, None)
        yield found


def _check_finite(vectors: Num[np.ndarray, "texts width"], ids: Sequence[str]) -> None:
    if vectors.dtype == np.float32 and not np.isfinite(vectors).all():
        broken = ids[int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])]
        raise InputError(
            f"the embedding of the text {broken!r} is not finite: the model is damaged, or its dtype too narrow"
        )


def _absent(directory: epath.Path, manifest: Manifest) -> list[str]:
    """Shards that are not there, or not with their ids."""
    there = {path.name for path in directory.iterdir()}
    ids = {shard: ids_file(directory / shard).name for shard in manifest.shards if shard.endswith(".npy")}
    return [shard for shard in manifest.shards if not {shard, ids.get(shard, shard)} <= there]


def _finish(directory: epath.Path, manifest: Manifest, leftovers: Sequence[epath.Path]) -> None:
    """Deletes the temporary files that were there all the while, of processes that were killed."""
    if (now := read_manifest(directory)) is not None:
        refuse_other_job(directory, now, manifest.job)
    if absent := _absent(directory, manifest):
        raise InputError(f"{directory}: {absent[0]} was removed while the job ran; start it again")
    for path in leftovers:
        path.unlink(missing_ok=True)
    write_manifest(directory, dataclasses.replace(manifest, complete=True))
