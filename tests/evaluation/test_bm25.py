import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxembed.errors import InputError
from jaxembed.evaluation.bm25 import bm25_metrics, words
from jaxembed.evaluation.retrieval import metrics_from_ranks

DOCUMENTS = [
    "def read_http_header(stream): return parse(stream.readline())",
    "def writeHttpBody(stream, body): stream.write(body)",
    "class LRUCache: keeps the last items read",
    "def max_size(cache): return cache.maxSize",
    "sorts the items of a list in place, then returns the list",
    "",
    "def parse(line): return line.split(':', 1)",
]
QUERIES = ["read the header of a stream", "largest size of the cache", "body", "unheard words only", "split a line"]


def lucene_ranks(queries: list[list[str]], documents: list[list[str]]) -> np.ndarray:
    """Lucene's BM25 with k1 = 1.5, b = 0.75, written down from the paper's formula, in float64."""
    average = sum(map(len, documents)) / len(documents)
    ranks = np.full((len(queries), len(documents)), -1)
    for row, query in enumerate(queries):
        scores = []
        for document in documents:
            counts, score = Counter(document), 0.0
            for word in query:
                holding = sum(word in other for other in documents)
                idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
                score += idf * counts[word] / (counts[word] + 1.5 * (1 - 0.75 + 0.75 * len(document) / average))
            scores.append(score)
        order = [i for i in sorted(range(len(documents)), key=lambda i: (-scores[i], i)) if scores[i] > 0]
        ranks[row, : len(order)] = order
    return ranks


@pytest.mark.parametrize("split_identifiers", [False, True])
def test_equals_the_formula(split_identifiers):
    relevant = [{0, 1}, {3}, {1}, {2}, {6}]
    ranks = lucene_ranks(*([words(text, split_identifiers) for text in texts] for texts in (QUERIES, DOCUMENTS)))
    assert bm25_metrics(QUERIES, DOCUMENTS, relevant, split_identifiers) == pytest.approx(
        metrics_from_ranks(ranks, relevant), abs=1e-12
    )


def test_identifiers_are_found_by_their_parts():
    documents = ["def other(): pass", "def parseHttpHeader(): pass", "def max_cache_size(): pass"]
    queries, relevant = ["http header", "size of the cache"], [{1}, {2}]
    assert bm25_metrics(queries, documents, relevant, split_identifiers=False)["mrr@10"] == 0
    assert bm25_metrics(queries, documents, relevant, split_identifiers=True)["mrr@10"] == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Plain words, twice.", ["plain", "words", "twice"]),
        ("snake_case", ["snake_case", "snake", "case"]),
        ("camelCase", ["camelcase", "camel", "case"]),
        ("HTTPServer2", ["httpserver2", "http", "server2"]),
        ("__init__", ["__init__", "init"]),
        ("utf8 Übung 漢字", ["utf8", "übung", "漢字"]),
        ("", []),
    ],
)
def test_words_with_their_parts(text, found):
    assert words(text, split_identifiers=True) == found


@given(st.text())
def test_plain_words_are_the_words(text):
    assert words(text, split_identifiers=False) == [word.lower() for word in re.findall(r"\w+", text)]
    assert set(words(text, split_identifiers=False)) <= set(words(text, split_identifiers=True))


def test_nothing_to_find():
    found = bm25_metrics(["a word", ""], ["", "?!"], [{0}, {1}], split_identifiers=False)
    assert set(found.values()) == {0.0}


def test_every_query_needs_an_answer():
    with pytest.raises(InputError, match="query 1 has no relevant document"):
        bm25_metrics(["a", "b"], ["a", "b"], [{0}, set()], split_identifiers=False)
