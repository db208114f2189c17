"""What the builders share: original files, and rows in their order in shards of bounded size, without TensorFlow."""

import abc
import itertools
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from jaxembed.datasets.originals import Original
from jaxembed.errors import InputError

SHARD_ROWS = 1 << 16
"""Rows of a shard; tfds holds one shard's rows in memory while it writes it."""

Row = Mapping[str, Any]


class OrderedBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """A data set of one split, `train`, whose rows lie in the order of `_rows`.

    tfds' `GeneratorBasedBuilder` needs TensorFlow for a split beyond 1 GB: it sorts it by way of `tf.io.gfile`.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # where tfds looks for a list of checksums; finding it takes `importlib_resources`
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The original files, under the names that docs/datasets.md lists."

    @abc.abstractmethod
    def _rows(self, dl_manager: Any) -> tuple[int, Iterator[Row]]:
        """How many rows there are, and the rows."""

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable[[], Iterator[tuple[int, Row]]]]]:
        count, rows = self._rows(dl_manager)
        numbered = enumerate(rows)

        def shard() -> Iterator[tuple[int, Row]]:  # tfds exhausts one before it calls the next
            return itertools.islice(numbered, SHARD_ROWS)

        return {"train": [shard] * -(-count // SHARD_ROWS)}


def fetch(dl_manager: Any, original: Original) -> epath.Path:
    """The file in the manual directory where there is one, else downloaded.

    Raises:
        InputError: it is not in the manual directory, or cannot be downloaded.
    """
    try:
        manual = dl_manager.manual_dir
    except AssertionError:  # no such directory, or nothing in it
        manual = None
    if manual is not None:
        return original.find(epath.Path(manual))
    try:
        cached = any(path.is_file() for path in dl_manager.download_dir.iterdir())
        if not cached and not urllib.request.getproxies():  # without a network tfds tries again for minutes
            socket.getaddrinfo(urllib.parse.urlsplit(original.url).hostname, None)
        return epath.Path(dl_manager.download(original.url))
    except Exception as error:  # of requests, urllib3 or tfds itself
        raise InputError(
            f"{original.url}: cannot be downloaded ({type(error).__name__}: {error}). Get it by other means "
            f"({original.size}) and name the folder it lies in by --manual-dir"
        ) from error
