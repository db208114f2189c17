"""Small local tasks, one of every type; texts that belong together share words, so that scores are not chance."""

import numpy as np

from jaxembed.evaluation.tasks import (
    BitextTask,
    ClassificationTask,
    ClusteringTask,
    LocalTask,
    PairTask,
    RerankingTask,
    RetrievalTask,
    StsTask,
)

from runs import make_rows

COUNT, CHUNK, CANDIDATES = 60, 20, 10


def local_tasks(count: int = COUNT) -> list[LocalTask]:
    """The tasks; `count` is a multiple of 20."""
    random = np.random.default_rng(0)
    rows = make_rows(count)
    first, second = [row["anchor"] for row in rows], [row["positive"] for row in rows]
    queries = {f"q{number}": text for number, text in enumerate(first)}
    corpus = {f"d{number}": text for number, text in enumerate(second)}
    graded = {f"q{n}": {f"d{n}": 2, f"d{(n + 1) % count}": 1} for n in range(count)}
    single = {f"q{n}": {f"d{n}": 1} for n in range(count)}
    chunks = tuple(tuple(f"q{n}" for n in range(start, start + CHUNK)) for start in range(0, count, CHUNK))
    labels = [f"label {number % 4}" for number in range(count)]
    texts = [f"{'wxyz'[number % 4] * 3} {text}" for number, text in enumerate(second)]
    half = count // 2
    candidates = [(second[number:] + second[:number])[:CANDIDATES] for number in range(count)]
    return [
        RetrievalTask("retrieval", queries, corpus, graded),
        RetrievalTask("code search", queries, corpus, single, metric="mrr", groups=chunks),
        StsTask("sts", first, second, random.uniform(0, 5, count).tolist()),
        PairTask("pairs", first, second[:half] + second[:half], [1] * half + [0] * half),
        ClassificationTask("classes", texts, labels, texts[::-1], labels[::-1]),
        ClusteringTask("clusters", texts, labels),
        RerankingTask("reranking", first, candidates, [[1] + [0] * (CANDIDATES - 1)] * count),
        BitextTask("bitext", first, second),
    ]


LOCAL_TASKS = local_tasks()
