"""One global batch as the devices hold it: packed rows, and where in them each text of the loss is found."""

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxembed.sharding import BATCH_AXES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """`chips` is data × fsdp; `capacity` slots of each chip are gathered, chosen by the packer.

    Candidates are the positives of all queries, then their hard negatives column by column: number j is a document of
    query j modulo `queries`.
    """

    tokens: Int[Array, "chunks rows length"]
    segments: Int[Array, "chunks rows length"]
    first: Int[Array, "chunks rows slots"]
    """First position of each text that is pooled."""
    last: Int[Array, "chunks rows slots"]
    pick: Int[Array, " chips*capacity"]
    """Slots that hold a text, numbered within their chip's part of `last`."""
    own: Int[Array, " queries"]
    """Place of each query among the gathered slots; a chip has its part of the queries."""
    query_places: Int[Array, " queries"]
    """The same, of all queries on every chip."""
    candidates: Int[Array, " candidates"]
    """Place of each document among the gathered slots."""
    positives: Int[Array, " queries"]
    """Number of each query's positive among the candidates, which is the query's own number."""
    valid: Bool[Array, " candidates"]
    """False where an example has no further negative."""
    query_codes: Int[Array, " queries"]
    """Numbers of the queries' texts within the batch: equal texts, in whatever role, have equal numbers."""
    candidate_codes: Int[Array, " candidates"]
    """The same numbers of the documents' texts, −1 where there is none."""
    known: Int[Array, "queries known"]
    """The same numbers of documents that are positives of the query in other examples of the data, −1 for none."""
    scores: Float[Array, "queries columns"]
    """Grade of a pair in column 0, or a teacher's scores of positive and negatives; NaN where there is none."""
    teacher: Float[Array, "queries texts dim"]
    """A teacher's embeddings of query, positive and negatives, NaN for those without; a chip has those of its part."""
    data_set: Int[Array, " queries"]
    """Number of the data set each query comes from; a chip has its part."""
    data_sets: Int[Array, " queries"]
    """The same, of all queries on every chip."""


_ROWS: Any = PartitionSpec(None, BATCH_AXES)
_SPLIT: Any = PartitionSpec(BATCH_AXES)
_WHOLE: Any = PartitionSpec()
BATCH_SPECS = Batch(
    tokens=_ROWS,
    segments=_ROWS,
    first=_ROWS,
    last=_ROWS,
    pick=_SPLIT,
    own=_SPLIT,
    query_places=_WHOLE,
    candidates=_WHOLE,
    positives=_SPLIT,
    valid=_WHOLE,
    query_codes=_WHOLE,
    candidate_codes=_WHOLE,
    known=_WHOLE,
    scores=_WHOLE,
    teacher=_SPLIT,
    data_set=_SPLIT,
    data_sets=_WHOLE,
)
"""How each field is split over the chips."""
