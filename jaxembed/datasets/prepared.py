"""Prepared data sets: built once from their original files, then read by row. `DATASETS` names those there are."""

import array
import contextlib
import hashlib
import io
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import Int
from tensorflow_datasets.proto import tf_example_pb2

from jaxembed.data.sources import DUPLICATE, EMPTY_TEXT, SAME_TEXT, Examples, TextRows
from jaxembed.data.text_store import Picked, PickedRows
from jaxembed.datasets.all_nli import AllNli
from jaxembed.datasets.ms_marco import MsMarco
from jaxembed.errors import InputError

logger = logging.getLogger(__name__)

DATASETS: dict[str, tuple[type[tfds.core.DatasetBuilder], tuple[str | None, ...]]] = {
    "ms_marco": (MsMarco, ("passages", "hard_negatives")),
    "all_nli": (AllNli, (None,)),
}
"""Data set to its builder and configs, in the order in which they are built; the last one holds the examples."""

DEFAULT_DATA_DIR = "~/tensorflow_datasets"

_BATCH = 4096
_SAMPLE = 1 << 16


def open_builders(dataset: str, data_dir: str | os.PathLike[str] = DEFAULT_DATA_DIR) -> list[Any]:
    """The tfds builders of a data set's configs, prepared or not.

    Raises:
        InputError: no such data set.
    """
    if dataset not in DATASETS:
        raise InputError(f"data set {dataset!r}: there is none of that name; there are {', '.join(DATASETS)}")
    builder, configs = DATASETS[dataset]
    where = os.path.expanduser(data_dir)
    return [builder(config=config, data_dir=where, file_format="array_record") for config in configs]  # pyright: ignore


def prepare_dataset(
    dataset: str,
    *,
    data_dir: str | os.PathLike[str] = DEFAULT_DATA_DIR,
    manual_dir: str | os.PathLike[str] | None = None,
) -> list[Any]:
    """Builds what is not there of a data set; a build that is cut off leaves nothing that counts as built.

    Args:
        dataset: one of `DATASETS`.
        data_dir: tfds' directory, local or gs://.
        manual_dir: directory with the original files; None downloads them to `downloads` in `data_dir`.

    Returns:
        The builders of its configs.

    Raises:
        InputError: an original file that is missing, cannot be downloaded, is damaged or has a bad row, or a
            directory that cannot be written.
    """
    builders = open_builders(dataset, data_dir)
    for place, builder in enumerate(builders):
        if is_prepared(builder):
            logger.info("%s: prepared already, in %s", builder.info.full_name, builder.data_path)
            continue
        manual = None if manual_dir is None else epath.Path(manual_dir).expanduser()
        if manual is not None and not (manual.is_dir() and any(manual.iterdir())):
            raise InputError(f"{manual}: no such directory, or nothing in it (original files of {dataset})")
        config = tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # tfds prints of sizes that it does not know
                builder.download_and_prepare(download_config=config)
        except OSError as error:
            if not is_prepared(builder):  # else another process was faster
                raise InputError(f"cannot prepare {dataset} in {builder.data_path}: {error}") from error
        builder = builders[place] = open_builders(dataset, data_dir)[place]
        if not is_prepared(builder):  # tfds takes any directory of that name for a prepared one
            raise InputError(f"{builder.data_path}: there, but not a data set that was prepared to its end; delete it")
        logger.info("%s: prepared, %s in %s", builder.info.full_name, describe(builder), builder.data_path)
    return builders


def is_prepared(builder: Any) -> bool:
    """Whether the data set is there, whole; tfds itself warns where nothing is."""
    return builder.data_path.exists() and builder.is_prepared()


def describe(builder: Any) -> str:
    """ "8,841,823 rows, 3.0 GB" of a prepared builder."""
    split = builder.info.splits["train"]
    return f"{split.num_examples:,} rows, {split.num_bytes / 1e9:.2f} GB"


@dataclass(frozen=True, eq=False)
class PreparedTexts(Sequence[str]):
    """The texts of a prepared data set by row, read from the disk when asked for.

    Attributes:
        source: tfds' random access to the serialized rows.
        feature: the text's name in a row.
        fingerprint: changes when the texts may have changed.
    """

    source: Any
    feature: str
    fingerprint: str

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return _parse(self.source[int(row)])[self.feature].bytes_list.value[0].decode()

    def texts(self, rows: Sequence[int] | Int[np.ndarray, " rows"]) -> list[str]:
        """The texts of these rows, read together."""
        records = self.source.__getitems__([int(row) for row in rows])
        return [_parse(record)[self.feature].bytes_list.value[0].decode() for record in records]


def read_prepared(
    dataset: str,
    *,
    name: str,
    data_dir: str | os.PathLike[str] = DEFAULT_DATA_DIR,
    manual_dir: str | os.PathLike[str] | None = None,
    split: str = "train",
) -> Examples:
    """The examples of a prepared data set; texts of passages stay on the disk.

    Of MS MARCO each training query is one example with its first positive, the others as `more_positives`, and all its
    hard negatives in the order in which they were prepared.

    Args:
        dataset: one of `DATASETS`.
        name: the source's name.
        data_dir: where it was prepared.
        manual_dir: directory with the original files, from which it is prepared where it is not; None for an error.
        split: in tfds' notation: "train", "train[:1000]", "train[10%:20%]".

    Raises:
        InputError: it is not prepared and `manual_dir` is None, or see `prepare_dataset`; a split that there is not.
    """
    builders = open_builders(dataset, data_dir)
    if not all(map(is_prepared, builders)):
        if manual_dir is None:
            raise InputError(
                f"data source {name!r}: {dataset} is not prepared in {os.path.expanduser(data_dir)}; prepare it with "
                f"python -m jaxembed.prepare --dataset {dataset} --data-dir {data_dir}, or give manual_dir, the "
                "directory of its original files"
            )
        builders = prepare_dataset(dataset, data_dir=data_dir, manual_dir=manual_dir)
    read = _ms_marco_examples if dataset == "ms_marco" else _all_nli_examples
    examples = read(builders, name, split)
    if not examples.anchors:
        raise InputError(f"data source {name!r}: {dataset} has no example in split {split!r}")
    return examples


def _ms_marco_examples(builders: Sequence[Any], name: str, split: str) -> Examples:
    passages, queries = builders
    store = PreparedTexts(_open_source(passages, "train", name), "text", _fingerprint(passages, "train"))
    anchors, ids = [], []
    positives, more, negatives, counts, numbers = (array.array("i") for _ in range(5))
    several = array.array("i")
    source = _open_source(queries, split, name)
    dropped: Counter[str] = Counter(queries.info.metadata.get("dropped", {}) if split == "train" else {})
    seen: set[tuple[str, int]] = set()
    for number, row in enumerate(_rows(source)):
        query, (positive, *others) = _text(row["query"]), row["positive_ids"].int64_list.value
        if not query.strip():
            dropped[EMPTY_TEXT] += 1
        elif (query, positive) in seen:
            dropped[DUPLICATE] += 1
        else:
            seen.add((query, positive))
            anchors.append(query)
            ids.append(f"ms_marco:{row['query_id'].int64_list.value[0]}")
            positives.append(positive)
            numbers.append(number)
            more.extend(others)
            several.append(len(others))
            negatives.extend(row["negative_ids"].int64_list.value)
            counts.append(len(row["negative_ids"].int64_list.value))
    table, others = _ragged(counts, negatives), _ragged(several, more)
    fingerprint = _digest(store.fingerprint, _fingerprint(queries, split))
    first = np.asarray(positives, np.int32)
    every = np.concatenate([first[:, None], others], axis=1)
    return Examples(
        name,
        anchors,
        Picked(store, first),  # pyright: ignore[reportArgumentType] (texts by row too)
        PickedRows(store, table),  # pyright: ignore[reportArgumentType]
        ids,
        dict(dropped),
        fingerprint,
        recognised="MS MARCO with hard negatives",
        rows=TextRows(np.asarray(numbers, np.int64), every, table, {"anchors": len(source), "documents": len(store)}),
        more_positives=PickedRows(store, others) if others.shape[1] else None,  # pyright: ignore[reportArgumentType]
    )


def _ragged(lengths: Sequence[int], values: Sequence[int]) -> Int[np.ndarray, "rows columns"]:
    """Rows of these lengths, −1 at their ends."""
    counts = np.asarray(lengths, np.int32)
    table = np.full((len(counts), counts.max(initial=0)), -1, np.int32)
    table[np.arange(table.shape[1]) < counts[:, None]] = values
    return table


def _all_nli_examples(builders: Sequence[Any], name: str, split: str) -> Examples:
    (builder,) = builders
    source = _open_source(builder, split, name)
    kept: dict[tuple[str, str], tuple[str, int]] = {}
    dropped: Counter[str] = Counter()
    sentences: dict[str, str] = {}  # most come several times
    for number, row in enumerate(_rows(source)):
        texts = (
            sentences.setdefault(text, text) for text in (_text(row[key]) for key in ("anchor", "positive", "negative"))
        )
        anchor, positive, negative = texts
        if not (anchor and positive and negative):  # they were stripped
            dropped[EMPTY_TEXT] += 1
        elif anchor == positive:
            dropped[SAME_TEXT] += 1
        elif (anchor, positive) in kept:
            dropped[DUPLICATE] += 1
        else:
            kept[anchor, positive] = negative, number
    rows = np.array([number for _, number in kept.values()], np.int64)
    return Examples(
        name,
        [anchor for anchor, _ in kept],
        [positive for _, positive in kept],
        [(negative,) for negative, _ in kept.values()],
        [f"all_nli:{number}" for _, number in kept.values()],
        dict(dropped),
        _fingerprint(builder, split),
        recognised="AllNLI triples",
        rows=TextRows(
            rows, rows[:, None], rows[:, None], dict.fromkeys(("anchors", "positives", "negatives"), len(source))
        ),
    )


def _open_source(builder: Any, split: str, name: str) -> Any:
    """tfds' random access to a split, records as they are: its own decoding takes three times as long."""
    try:
        source = builder.as_data_source(split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        if len(source):
            source[0]
        return source
    except (ValueError, AssertionError) as error:
        raise InputError(f"data source {name!r}: split {split!r} of {builder.info.full_name}: {error}") from None


def _rows(source: Any) -> Iterator[Any]:
    """The features of each row, by name."""
    for start in range(0, len(source), _BATCH):
        for record in source.__getitems__(range(start, min(start + _BATCH, len(source)))):
            yield _parse(record)


def _parse(record: bytes) -> Any:
    return tf_example_pb2.Example.FromString(record).features.feature  # pyright: ignore[reportAttributeAccessIssue]


def _text(feature: Any) -> str:
    return feature.bytes_list.value[0].decode()


def _fingerprint(builder: Any, split: str) -> str:
    """Hash of the shards' sizes, beginnings and ends, and of the split: whatever place and time they have."""
    parts = [split]
    for path in sorted(builder.data_path.glob("*array_record*")):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for start in (0, max(0, size - _SAMPLE)):
                file.seek(start)
                parts.append(hashlib.sha256(file.read(_SAMPLE)).hexdigest())
        parts.append(str(size))
    return _digest(*parts)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
