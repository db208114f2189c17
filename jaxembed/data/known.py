"""Which texts are positives of a query anywhere in the data, by the hashes of both: they are no negatives for it."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt64

_MOST = 16  # of a query within one batch; a step is compiled for one number


@dataclass(frozen=True, eq=False)
class KnownPositives:
    """The positives of all queries that have several; of the others all is known from their example.

    Attributes:
        queries: their hashes, ascending.
        starts: those of query `i` are `positives[starts[i] : starts[i + 1]]`.
        width: columns of `codes`, for any batch.
    """

    queries: UInt64[np.ndarray, " queries"]
    starts: Int[np.ndarray, " bounds"]
    positives: UInt64[np.ndarray, " positives"]
    width: int

    @staticmethod
    def of(queries: UInt64[np.ndarray, " examples"], positives: UInt64[np.ndarray, " examples"]) -> "KnownPositives":
        """Of the pairs of all examples."""
        order = np.lexsort((positives, queries))
        queries, positives = queries[order], positives[order]
        fresh = np.ones(len(order), bool)
        fresh[1:] = (queries[1:] != queries[:-1]) | (positives[1:] != positives[:-1])
        distinct, counts = np.unique(queries[fresh], return_counts=True)
        several = counts > 1
        kept = positives[fresh][np.repeat(several, counts)]
        counts = counts[several]
        width = min(int(counts.max(initial=1)) - 1, _MOST)
        return KnownPositives(distinct[several], np.concatenate([[0], np.cumsum(counts)]), kept, width)

    def codes(
        self,
        queries: UInt64[np.ndarray, " batch"],
        positives: UInt64[np.ndarray, " batch"],
        texts: UInt64[np.ndarray, " texts"],
    ) -> Int[np.ndarray, "batch width"]:
        """Of each query of a batch the places in `texts`, ascending hashes, of its other positives; −1 for none."""
        found = np.full((len(queries), self.width), -1, np.int32)
        if not self.width:
            return found
        place = np.minimum(np.searchsorted(self.queries, queries), len(self.queries) - 1)
        rows = np.flatnonzero(self.queries[place] == queries)
        first, lengths = self.starts[place[rows]], np.diff(self.starts)[place[rows]]
        owner = np.repeat(rows, lengths)
        hashes = self.positives[np.arange(len(owner)) + np.repeat(first - np.cumsum(lengths) + lengths, lengths)]
        code = np.minimum(np.searchsorted(texts, hashes), len(texts) - 1)
        here = (texts[code] == hashes) & (hashes != positives[owner])
        owner, code = owner[here], code[here]
        column = np.arange(len(owner)) - np.searchsorted(owner, owner)
        fits = column < self.width
        found[owner[fits], column[fits]] = code[fits]
        return found
