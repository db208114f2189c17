"""The paper's original files, made small: the same formats, names and kinds of content."""

import gzip
import io
import json
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SYSTEMS = ("bm25", "msmarco-distilbert-base-tas-b", "distilbert-margin_mse-mean-dot-v1")


@dataclass
class MsMarcoFiles:
    """What `write_ms_marco` wrote."""

    folder: Path
    passages: list[str]
    queries: dict[int, str]
    rows: list[dict]
    scores: dict[int, dict[int, float]]


def sentences(count: int, random: np.random.Generator, words: int = 8) -> list[str]:
    letters = list("abcdefghijklmnopqrstuvwxyzäß中")
    return [
        " ".join("".join(random.choice(letters, random.integers(2, 7))) for _ in range(random.integers(3, words)))
        for _ in range(count)
    ]


def write_ms_marco(
    folder: Path, *, passages: int = 60, queries: int = 25, mined: int = 12, seed: int = 0, protocol: int = 4
) -> MsMarcoFiles:
    """collection.tsv, queries.train.tsv, the mined negatives and their scores; some queries have no positive."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    texts = sentences(passages, random)
    query_ids = random.choice(100_000, queries, replace=False).tolist()
    query_texts = dict(zip(query_ids, sentences(queries, random, 6)))
    rows, scores = [], {}
    for place, query in enumerate(query_ids):
        positives = [] if place % 7 == 6 else random.choice(passages, random.integers(1, 3), replace=False).tolist()
        rest = [passage for passage in range(passages) if passage not in positives]
        found = {system: random.choice(rest, mined, replace=False).tolist() for system in SYSTEMS}
        if place % 5 == 4:
            del found[SYSTEMS[1]]
        named = {*positives, *(passage for system in found.values() for passage in system)}
        scores[query] = {
            passage: float(np.float32(random.normal(8 if passage in positives else 2, 4))) for passage in sorted(named)
        }
        rows.append({"qid": query, "pos": positives, "neg": found})
    (folder / "collection.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in enumerate(texts)))
    shuffled = random.permutation(query_ids).tolist()
    (folder / "queries.train.tsv").write_text("".join(f"{i}\t{query_texts[i]}\n" for i in shuffled))
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "msmarco-hard-negatives.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    write_scores(folder, scores, protocol)
    return MsMarcoFiles(folder, texts, query_texts, rows, scores)


def write_scores(folder: Path, scores: object, protocol: int = 4) -> Path:
    path = folder / "cross-encoder-ms-marco-MiniLM-L-6-v2-scores.pkl.gz"
    path.write_bytes(gzip.compress(pickle.dumps(scores, protocol)))
    return path


def write_all_nli(folder: Path, *, sentences_: int = 30, rows: int = 200, seed: int = 0) -> list[dict[str, str]]:
    """AllNLI.tsv.gz; sentences come again, so that some have both an entailment and a contradiction."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    pool = [f'{text} "' if i % 9 == 0 else text for i, text in enumerate(sentences(sentences_, random))]
    found = [
        {
            "split": "dev" if i % 10 == 9 else "train",
            "dataset": "SNLI" if i % 2 else "MultiNLI",
            "filename": "snli_1.0_train.txt",
            "sentence1": f" {random.choice(pool)}" if i % 11 == 0 else str(random.choice(pool)),
            "sentence2": str(random.choice(pool)),
            "label": str(random.choice(["entailment", "neutral", "contradiction"])),
        }
        for i in range(rows)
    ]
    lines = ["\t".join(found[0]), *("\t".join(row.values()) for row in found)]
    (folder / "AllNLI.tsv.gz").write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))
    return found


def tar_of(path: Path, inside: str) -> Path:
    """The file in a .tar.gz beside it, after another one, itself gone."""
    archive = path.with_name(f"{path.name.split('.')[0]}.tar.gz")
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in (("README", b"0\tnot this\n"), (inside, path.read_bytes())):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    path.unlink()
    return archive
