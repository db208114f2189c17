"""MS MARCO passages, and its training queries with the hard negatives that sentence-transformers mined.

Two configs of one data set: `passages`, in the order of their ids, and `hard_negatives`, which names passages by id.
"""

import array
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import Int32, Int64
from tqdm import tqdm

from jaxembed.datasets.builders import OrderedBuilder, Row, fetch
from jaxembed.datasets.originals import Original, count_lines, numbered_lines, text_of
from jaxembed.datasets.scores import Scores, store_scores
from jaxembed.errors import InputError

logger = logging.getLogger(__name__)

MARGIN = 3.0
PER_SYSTEM = 5

NO_POSITIVE = "query without a positive"
NO_NEGATIVE = "query without a hard negative"

_MICROSOFT = "https://msmarco.z22.web.core.windows.net/msmarcoranking"
_HUGGING_FACE = "https://huggingface.co/datasets/sentence-transformers/msmarco-hard-negatives/resolve/main"
COLLECTION = Original(
    ("collection.tsv", "collection.tar.gz"), f"{_MICROSOFT}/collection.tar.gz", "1.04 GB", "collection.tsv"
)
QUERIES = Original(
    ("queries.train.tsv", "queries.tsv", "queries.tar.gz"), f"{_MICROSOFT}/queries.tar.gz", "19 MB", "queries.train.tsv"
)
NEGATIVES = Original(
    ("msmarco-hard-negatives.jsonl.gz", "msmarco-hard-negatives.jsonl"),
    f"{_HUGGING_FACE}/msmarco-hard-negatives.jsonl.gz",
    "1.23 GB",
)
SCORES = Original(
    ("cross-encoder-ms-marco-MiniLM-L-6-v2-scores.pkl.gz", "cross-encoder-ms-marco-MiniLM-L-6-v2-scores.pkl"),
    f"{_HUGGING_FACE}/cross-encoder-ms-marco-MiniLM-L-6-v2-scores.pkl.gz",
    "1.35 GB",
)


class MsMarco(OrderedBuilder):
    """MS MARCO passages; training queries with hard negatives by the rule of sentence-transformers and SGPT."""

    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name="passages", description="Row i is the passage with id i."),
        tfds.core.BuilderConfig(
            name="hard_negatives",
            description=f"Of each mining system the first {PER_SYSTEM} passages that no earlier one gave and whose "
            f"cross-encoder score is at most the lowest score of a positive less {MARGIN}, in random order.",
        ),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        if self.builder_config_name == "passages":
            features: dict[str, Any] = {"text": tfds.features.Text()}
        else:
            features = {
                "query_id": np.int32,
                "query": tfds.features.Text(),
                "positive_ids": tfds.features.Sequence(np.int32),
                "negative_ids": tfds.features.Sequence(np.int32),
            }
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
            homepage="https://microsoft.github.io/msmarco",
            license="non-commercial research purposes only; https://microsoft.github.io/msmarco",
        )

    def _rows(self, dl_manager: Any) -> tuple[int, Iterator[Row]]:
        if self.builder_config_name == "passages":
            path = fetch(dl_manager, COLLECTION)
            texts = (text for _, text in read_table(path, COLLECTION, "passages", counted_ids=True))
            count = count_lines(path, COLLECTION)
            if not count:
                raise InputError(f"{path}: no passage in it")
            return count, ({"text": text} for text in texts)
        passages = MsMarco(config="passages", data_dir=self.data_dir_root, file_format="array_record")
        count = passages.info.splits["train"].num_examples if passages.data_path.exists() else None
        files = [fetch(dl_manager, original) for original in (QUERIES, NEGATIVES, SCORES)]
        # Beside the data set in the making: /tmp may be in memory, and the entries are 1.3 GB.
        beside = None if "://" in self.data_dir else self.data_dir
        with tempfile.TemporaryDirectory(dir=beside) as directory:
            scores = store_scores(files[2], SCORES, Path(directory))
            chosen = choose_negatives(files[1], scores, passages=count)
        queries = dict(read_table(files[0], QUERIES, "queries"))
        missing = next((int(query) for query in chosen.queries if int(query) not in queries), None)
        if missing is not None:
            raise InputError(f"{files[0]}: no query {missing}, which {files[1].name} names")
        told = {"dropped": chosen.dropped, "systems": chosen.systems, "margin": MARGIN, "per_system": PER_SYSTEM}
        self.info.metadata.update(told)  # pyright: ignore[reportOptionalMemberAccess] (given in _info)
        return len(chosen.queries), chosen.rows(queries)


def read_table(
    path: epath.Path, original: Original, task: str, *, counted_ids: bool = False
) -> Iterator[tuple[int, str]]:
    """The lines "id TAB text" as (id, text), white space at a line's end taken away as the ancestors do.

    Args:
        counted_ids: ids have to be 0, 1, 2, …

    Raises:
        InputError: file and line of one that is not so.
    """
    for number, line in numbered_lines(path, original, task):
        columns = line.split(b"\t")
        if len(columns) != 2 or not columns[0].isdigit():
            found = f"an id that is {columns[0][:20]!r}" if len(columns) == 2 else f"{len(columns)} columns"
            raise InputError(f"{path}:{number}: expected a whole number, a tab and a text, found {found}")
        identifier = int(columns[0])
        if counted_ids and identifier != number - 1:
            raise InputError(
                f"{path}:{number}: expected id {number - 1}, found {identifier}: ids count the lines from 0 in "
                f"{original.names[0]}; a line is missing or out of place"
            )
        yield identifier, text_of(columns[1], path, number).rstrip()


@dataclass(frozen=True)
class Chosen:
    """Queries with their positives and chosen negatives, as flat arrays.

    Attributes:
        queries: ids.
        positives: ids of all queries' positives, query by query.
        positive_ends: where those of each query end.
        negatives: ids of all queries' negatives, query by query.
        negative_ends: where those of each query end.
        dropped: queries that were left out, by reason.
        systems: mining systems in the order in which they were asked.
    """

    queries: Int32[np.ndarray, " queries"]
    positives: Int32[np.ndarray, " positives"]
    positive_ends: Int64[np.ndarray, " queries"]
    negatives: Int32[np.ndarray, " negatives"]
    negative_ends: Int64[np.ndarray, " queries"]
    dropped: dict[str, int]
    systems: list[str]

    def rows(self, texts: Mapping[int, str]) -> Iterator[Row]:
        """Rows of the config `hard_negatives`."""
        positive, negative = 0, 0
        bar = tqdm(self.queries, desc="hard_negatives: writing", unit=" queries", disable=len(self.queries) < 1 << 16)
        for place, query in enumerate(bar):
            positive_end, negative_end = int(self.positive_ends[place]), int(self.negative_ends[place])
            yield {
                "query_id": query,
                "query": texts[int(query)],
                "positive_ids": self.positives[positive:positive_end],
                "negative_ids": self.negatives[negative:negative_end],
            }
            positive, negative = positive_end, negative_end


def choose_negatives(
    path: epath.Path,
    scores: Scores,
    *,
    margin: float = MARGIN,
    per_system: int = PER_SYSTEM,
    passages: int | None = None,
    seed: int = 0,
) -> Chosen:
    """Reads the file of mined negatives and keeps those that `hard_negatives` chooses, shuffled within each query.

    As in sentence-transformers the systems are those of the first query that has a positive, in its order, and a query
    without a positive or without a negative is left out.

    Args:
        path: one JSON object a line, `{"qid": …, "pos": [ids], "neg": {system: [ids]}}`.
        scores: of the cross-encoder.
        margin: by how much a negative has to score lower than every positive.
        per_system: how many a system may give.
        passages: how many there are, where that is known.
        seed: of the shuffles.

    Raises:
        InputError: file and line of a row that is not so, or names a passage that has no score or does not exist.
    """
    queries, positives, negatives = array.array("i"), array.array("i"), array.array("i")
    positive_ends, negative_ends = array.array("q"), array.array("q")
    dropped: Counter[str] = Counter()
    systems: list[str] | None = None
    random = np.random.default_rng(seed)
    for number, line in numbered_lines(path, NEGATIVES, "hard_negatives"):
        if not line.strip():
            continue
        query = 0
        try:
            query, found, mined = _parse_row(line)
            if not found:
                dropped[NO_POSITIVE] += 1
                continue
            systems = list(mined) if systems is None else systems
            chosen = hard_negatives(found, mined, scores.of(query), systems, margin, per_system)
            if passages is not None and (beyond := [one for one in (*found, *chosen) if one >= passages]):
                raise InputError(f"passage {beyond[0]} of query {query}, but the collection has {passages:,}")
        except KeyError as error:
            problem = f"no score for passage {error.args[0]} of query {query} in {SCORES.names[0]}"
            raise InputError(f"{path}:{number}: {problem}") from None
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        if not chosen:
            dropped[NO_NEGATIVE] += 1
            continue
        queries.append(query)
        positives.extend(found)
        negatives.extend(random.permutation(chosen).tolist())
        positive_ends.append(len(positives))
        negative_ends.append(len(negatives))
    if not queries:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "the file is empty"
        raise InputError(f"{path}: no query with a positive and a hard negative ({reasons})")
    ids = np.asarray(queries, np.int32)
    different, first = np.unique(ids, return_index=True)
    if len(different) < len(ids):
        twice = ids[np.setdiff1d(np.arange(len(ids)), first)[0]]
        raise InputError(f"{path}: query {twice} comes twice")
    logger.info(
        "hard negatives: %d queries, %d passages from %d systems", len(queries), len(negatives), len(systems or ())
    )
    return Chosen(
        ids,
        np.asarray(positives, np.int32),
        np.asarray(positive_ends, np.int64),
        np.asarray(negatives, np.int32),
        np.asarray(negative_ends, np.int64),
        dict(dropped),
        systems or [],
    )


def hard_negatives(
    positives: Sequence[int],
    mined: Mapping[str, Sequence[int]],
    scores: Mapping[int, float],
    systems: Sequence[str],
    margin: float = MARGIN,
    per_system: int = PER_SYSTEM,
) -> list[int]:
    """Of each system the first `per_system` passages p, none twice, with score(p) ≤ min(score(positives)) − margin.

    `train_bi-encoder_mnrl.py` of sentence-transformers and of SGPT: a passage that an earlier system gave does not
    count, so that a system may go further down its list.

    Raises:
        KeyError: a passage that had to be compared has no score.
    """
    highest = min(scores[passage] for passage in positives) - margin
    found: dict[int, None] = {}
    for system in systems:
        before = len(found)
        for passage in mined.get(system, ()):
            if scores[passage] <= highest:
                found[passage] = None
                if len(found) - before == per_system:
                    break
    return list(found)


def _parse_row(line: bytes) -> tuple[int, list[int], dict[str, list[int]]]:
    """Query, positives and mined passages. An InputError here says what is wrong, not where."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: byte 0x{line[error.start]:02x}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from None
    expected = 'expected {"qid": number, "pos": [numbers], "neg": {system: [numbers]}}'
    if not isinstance(row, dict):
        raise InputError(expected)
    for key, kind in (("qid", int), ("pos", list), ("neg", dict)):
        if type(row.get(key)) is not kind:
            raise InputError(f"{expected}, found {json.dumps(row.get(key))[:40]} as {key}")
    for key, ids in (("pos", row["pos"]), *row["neg"].items()):
        if (
            not isinstance(ids, list)
            or set(map(type, ids)) - {int}
            or (ids and not 0 <= min(ids) <= max(ids) < 1 << 31)
        ):
            old = isinstance(ids, list) and any(isinstance(one, dict) for one in ids)
            hint = ": this is the older file, which has scores in it" if old else ""
            raise InputError(f"{expected}, found other things in {key}{hint}")
    return row["qid"], row["pos"], row["neg"]
