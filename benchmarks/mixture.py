"""One config on many sets: a small decoder from scratch, and what it learns of retrieval and similarity.

Ten training sets, each with its own instruction, in mixed batches with a cap; judged on sets that are not trained on,
in languages that are and in others. `--twice` trains a second time and compares every weight; `--keep DIR` leaves the
decoder as it was and as it became in DIR/before and DIR/after, for `evaluate.py --models`.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from common import machine, parser, read_rows, table

REPOSITORY = Path(__file__).parents[1]
TRAINED = "en, ja, code"
"""Languages of the training texts: jaquad is Japanese, all others are English or code."""
STS_LANGUAGES = ("en", "ja", "de", "es", "fr", "it", "nl", "pl", "pt", "ru", "zh")


def training_sets(data: Path) -> list[dict[str, object]]:
    def source(name: str, file: str, instruction: str, **more: object) -> dict[str, object]:
        path = str(data / "train" / file)
        return {"kind": "jsonl", "name": name, "path": path, "query_instruction": f"{instruction}: ", **more}

    code = "Find the code that does this"
    similar = "Find a text that means the same"
    return [
        source("medquad", "medquad/train.jsonl.gz", "Find the answer to this medical question"),
        source("arxiv_cs", "arxiv_cs/train.jsonl.gz", "Find the abstract of the paper with this title"),
        source("tldr_cli", "tldr_cli/train.jsonl.gz", "Find the command that does this"),
        source("stackoverflow", "stackoverflow_title_code/train.jsonl.gz", code),
        source("concode", "concode/pairs.jsonl.gz", code),
        source("cloze", "codesearchnet_cloze/pairs.jsonl.gz", code),
        source("squad", "squad_sentences/train.jsonl.gz", "Find the sentence that answers this question"),
        source("jaquad", "jaquad/train10k.jsonl.gz", "Find the passage that answers this question"),
        source("cf_nli", "cf_nli/train.jsonl.gz", similar, symmetric=True, document_instruction=f"{similar}: "),
        source("snli", "snli_devtest/dev.jsonl.gz", similar, symmetric=True, document_instruction=f"{similar}: "),
        source(
            "clinc150",
            "clinc150/train.jsonl.gz",
            "Find a request of the same intent",
            symmetric=True,
            document_instruction="Find a request of the same intent: ",
            in_batch=False,
            label_negatives=4,
        ),
    ]


def dev_sets(data: Path, work: Path) -> list[dict[str, object]]:
    dev = data / "dev"
    question = "Find the passage that answers this question: "

    def beir(name: str, folder: Path, qrels: str, instruction: str) -> dict[str, object]:
        return {"kind": "beir", "name": name, "path": str(folder), "qrels": str(folder / qrels), **said(instruction)}

    def said(instruction: str) -> dict[str, object]:
        return {"query_instruction": instruction}

    xquad = work / "xquad"
    xquad.mkdir()
    queries = read_rows(dev / "xquad" / "de.queries.jsonl.gz")
    (xquad / "corpus.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in read_rows(dev / "xquad" / "de.corpus.jsonl.gz"))
    )
    (xquad / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": row["_id"], "text": row["text"]}) + "\n" for row in queries)
    )
    (xquad / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"{row['_id']}\t{row['relevant']}\t1\n" for row in queries)
    )
    similar = "Find a text that means the same: "
    alike = {"query_instruction": similar, "document_instruction": similar}
    return [
        beir("cosqa", dev / "cosqa", "qrels.dev.jsonl.gz", "Find the code that does this: "),
        beir("cranfield", dev / "cranfield", "qrels.test.jsonl.gz", question),
        beir("medline", dev / "medline", "qrels.test.jsonl.gz", question),
        {
            "kind": "jsonl",
            "name": "medquad-dev",
            "path": str(dev / "medquad" / "dev.jsonl.gz"),
            **said("Find the answer to this medical question: "),
        },
        {
            "kind": "jsonl",
            "name": "pubmedqa",
            "path": str(dev / "pubmedqa" / "pqa_l.jsonl.gz"),
            "anchor": "query",
            "positive": "passage",
            **said(question),
        },
        beir("xquad-de", xquad, "test.tsv", question),
        {
            "kind": "jsonl",
            "name": "arxiv_cs-dev",
            "path": str(dev / "arxiv_cs" / "dev.jsonl.gz"),
            **said("Find the abstract of the paper with this title: "),
        },
        *(
            {"kind": "jsonl", "name": f"stsb-{one}", "path": str(dev / "stsb_multi" / f"{one}.dev.jsonl.gz"), **alike}
            for one in STS_LANGUAGES
        ),
        {"kind": "jsonl", "name": "korsts", "path": str(dev / "korsts" / "korsts.dev.jsonl.gz"), **alike},
    ]


def config(data: Path, work: Path, steps: int) -> dict[str, object]:
    return {
        "model": {"scratch": {"layers": 2, "dim": 256, "heads": 8, "initializer_range": 0.06}},
        "tokenizer": {"train_vocab_size": 16384},
        "text_format": {"max_length": 128},
        "data": {
            "train": training_sets(data),
            "dev": dev_sets(data, work),
            "cap": 12000,
            "cache_dir": str(work / "tokens"),
        },
        "training": {"batch_size": 256, "steps": steps},
        "loss": {"temperature": 0.05},
        "optimizer": {"learning_rate": 2.0e-3, "schedule": "cosine", "warmup_ratio": 0.05, "weight_decay": 0.01},
        "evaluation": {"bm25": False},
        "logging": {"tensorboard": False},
        "export": {"verify": "off"},
    }


def results(run: Path) -> list[dict[str, object]]:
    """A row a dev set: its main metric before and after."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = []
    for name, columns in json.loads((run / "dev_before.json").read_text()).items():
        metric = "spearman" if "spearman" in columns["before"] else "ndcg@10"
        before, key = columns["before"][metric], f"dev/{name}/{metric}"
        after = next(row for row in reversed(rows) if key in row)[key]
        language = name.rpartition("-")[2] if name.startswith(("stsb", "xquad")) else "ko" if name == "korsts" else "en"
        trained = "yes" if language in ("en", "ja") else "no"
        found.append(
            {"set": name, "language trained on": trained, "metric": metric, "before": f"{before:.4f}",
             "after": f"{after:.4f}", "rises": "yes" if after > before else "no"}
        )  # fmt: skip
    return found


def keep_models(run: Path, file: Path, target: Path) -> None:
    """The exported model, and the same with the weights that the config's seed began with."""
    from jaxembed import Embedder
    from jaxembed.config import load_config
    from jaxembed.sharding import make_mesh
    from jaxembed.training.prepare import prepare_decoder

    after = Embedder.from_pretrained(run / "model")
    decoder = prepare_decoder(load_config(file), after.tokenizer, make_mesh(1, 1, 1), "float32")
    Embedder(decoder, after.tokenizer).save_pretrained(target / "before", verify=False, overwrite=True)
    after.save_pretrained(target / "after", verify=False, overwrite=True)


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--twice", action="store_true", help="train again with the same seed and compare weights")
    options.add_argument("--keep", type=Path, metavar="DIR", help="for the models before and after")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        file = work / "mixture.yaml"
        file.write_text(yaml.safe_dump(config(arguments.data.resolve(), work, arguments.steps), sort_keys=False))
        seconds = []
        for name in ("first", "second") if arguments.twice else ("first",):
            start = time.perf_counter()
            command = [sys.executable, "-m", "jaxembed.train", str(file), "--run_dir", str(work / name)]
            subprocess.run(command, check=True, cwd=REPOSITORY)
            seconds.append(time.perf_counter() - start)
        print(f"\n{machine()}\n`python benchmarks/mixture.py{' --twice' * arguments.twice}`\n")
        sets = len(training_sets(arguments.data))
        print(f"{arguments.steps} steps of 256 pairs from {sets} sets ({TRAINED}), {seconds[0]:.0f} s.\n")
        print(table(results(work / "first")))
        if arguments.twice:
            weights = [(work / name / "model" / "model.safetensors").read_bytes() for name in ("first", "second")]
            same = "identical" if weights[0] == weights[1] else "OTHER"
            print(f"\nWeights of a second run with the same seed: {same}")
        if arguments.keep:
            keep_models(work / "first", file, arguments.keep)


if __name__ == "__main__":
    main()
