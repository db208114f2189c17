"""Encoding against sentence-transformers: the same weights and texts, in one run, the peer at its best batch size."""

import os
import tempfile
from pathlib import Path

from common import interleaved, machine, matmul_rate, parser, random_bloom, read_rows, table


def workloads(data: Path) -> dict[str, list[str]]:
    stsb = read_rows(data / "dev/stsb_multi/en.dev.jsonl.gz")
    medquad = read_rows(data / "dev/medquad/dev.jsonl.gz")
    return {
        "STS-B sentences": [text for row in stsb for text in (row["s1"], row["s2"])],
        "CoSQA functions": [row["text"] for row in read_rows(data / "dev/cosqa/corpus.jsonl.gz")],
        "MedQuAD questions and answers": [text for row in medquad for text in (row["query"], row["answer"])],
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=40_000, help="tokens of each workload, from its beginning")
    options.add_argument("--repeats", type=int, default=3, help="measurements of each, of which the median counts")
    options.add_argument("--peer-batches", type=int, nargs="+", default=[4, 8, 16, 32], help="its batch sizes")
    options.add_argument("--max-length", type=int, default=512, help="tokens at which texts are cut")
    arguments = options.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import numpy as np
    from sentence_transformers import SentenceTransformer

    from jaxembed.embedder import Embedder
    from jaxembed.text.packing import call_shapes, density, plan_calls

    with tempfile.TemporaryDirectory() as temporary:
        path = random_bloom(
            Path(temporary) / "bloom", arguments.data, dim=384, layers=6, heads=12, max_length=arguments.max_length
        )
        ours = Embedder.from_pretrained(path)
        theirs = SentenceTransformer(str(path), device="cpu")
    limit = matmul_rate()
    rows, ratios = [], []
    sizes = " / ".join(map(str, arguments.peer_batches))
    for name, texts in workloads(arguments.data).items():
        counts = np.cumsum([len(x) for x in ours.tokenizer(texts, "document")])
        texts = texts[: 1 + int(np.searchsorted(counts, arguments.tokens))]
        ids = ours.tokenizer(list(dict.fromkeys(texts)), "document")
        lengths = np.array([len(x) for x in ids])
        tokens = sum(len(x) for x in ours.tokenizer(texts, "document"))
        difference = np.abs(ours.encode_document(texts) - theirs.encode_document(texts, batch_size=16)).max()
        runs = {"jaxembed": lambda texts=texts: ours.encode_document(texts)}
        for batch in arguments.peer_batches:
            runs[str(batch)] = lambda texts=texts, batch=batch: theirs.encode_document(texts, batch_size=batch)
        seconds = interleaved(runs, arguments.repeats)
        best = min(arguments.peer_batches, key=lambda batch: seconds[str(batch)])
        ratios.append(seconds[str(best)] / seconds["jaxembed"])
        operations = int(lengths.sum()) * 6 * 24 * 384**2
        rows.append(
            {
                "texts": f"{name} ({len(texts)}, {tokens / len(texts):.0f} tokens)",
                f"sentence-transformers, tok/s, batch size {sizes}": " / ".join(
                    f"{'**' * (batch == best)}{tokens / seconds[str(batch)]:,.0f}{'**' * (batch == best)}"
                    for batch in arguments.peer_batches
                ),
                "jaxembed, tok/s": f"{tokens / seconds['jaxembed']:,.0f}",
                "against its best": f"×{ratios[-1]:.2f}",
                "density": density(plan_calls(lengths, call_shapes(arguments.max_length, 768)), lengths),
                "of the matmul rate": f"{operations / seconds['jaxembed'] / limit:.0%}",
                "largest difference": f"{difference:.1e}",
            }
        )
    print(f"{machine()}\n`python benchmarks/encode.py --tokens {arguments.tokens} --repeats {arguments.repeats}`\n")
    print(f"BLOOM, 6 layers of 384, 12 heads, float32; one matrix product runs at {limit / 1e9:,.0f} GFLOP/s.\n")
    print(table(rows))
    print(f"\nGeometric mean ×{np.exp(np.mean(np.log(ratios))):.2f}; {len(ours.compiled_shapes)} compiled shapes.")


if __name__ == "__main__":
    main()
