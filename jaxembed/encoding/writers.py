"""Shards of embeddings with ids: Parquet, or `.npy` with the ids beside it. Equal embeddings give equal bytes."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Num

from jaxembed.data.files import new_file

Writer = Callable[[epath.Path, Sequence[str], Num[np.ndarray, "texts width"]], None]


def write_parquet(path: epath.Path, ids: Sequence[str], vectors: Num[np.ndarray, "texts width"]) -> None:
    """Columns `id` (string) and `embedding` (a list of fixed size)."""
    import pyarrow as pa  # slow to import
    import pyarrow.parquet as pq

    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    table = pa.table({"id": pa.array(ids, pa.string()), "embedding": embeddings})
    # Parquet has no numbers of one byte: only a dictionary keeps them at about a byte each. Floats do not compress.
    numbers = "embedding.list.element"
    options: dict[str, Any] = {
        "compression": {"id": "zstd", numbers: "none"},
        "use_dictionary": [numbers] if vectors.dtype.itemsize == 1 else False,
        "write_statistics": ["id"],
    }
    with new_file(path) as file:
        pq.write_table(table, file, **options)


def write_npy(path: epath.Path, ids: Sequence[str], vectors: Num[np.ndarray, "texts width"]) -> None:
    """An array `[texts, width]`, and `NAME.ids.json`, a list of their ids, which is written first."""
    with new_file(ids_file(path)) as file:
        file.write(json.dumps(list(ids), ensure_ascii=False, indent=0).encode())
    with new_file(path) as file:
        np.save(file, vectors)


def ids_file(path: epath.Path) -> epath.Path:
    """Where the ids of a `.npy` file are."""
    return path.with_name(f"{path.name.removesuffix('.npy')}.ids.json")


WRITERS: Mapping[str, Writer] = {"parquet": write_parquet, "npy": write_npy}
"""By the name of the format, which is also how its files end."""
