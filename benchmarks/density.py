"""How full the calls of encoding are on whole sets: the plan alone, nothing is computed."""

from common import machine, parser, table
from encode import workloads


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--max-length", type=int, default=512, help="tokens at which texts are cut")
    arguments = options.parse_args()

    import numpy as np

    from jaxembed.embedder import _FIRST_WINDOW, _WINDOW, CALL_TOKENS
    from jaxembed.text.format import TextFormat
    from jaxembed.text.packing import call_shapes, plan_calls
    from jaxembed.text.tokenizer import TextTokenizer, load_tokenizer, with_end_token

    raw = with_end_token(load_tokenizer(arguments.data / "tokenizers" / "gpt2.tokenizer.json"), "<|endoftext|>")
    tokenizer = TextTokenizer(raw, TextFormat(max_length=arguments.max_length))
    shapes, rows = call_shapes(arguments.max_length, CALL_TOKENS["cpu"]), []
    for name, texts in workloads(arguments.data).items():
        lengths = np.array([len(ids) for ids in tokenizer(list(dict.fromkeys(texts)), "document")])
        windows = np.split(lengths, range(_FIRST_WINDOW, len(lengths), _WINDOW))
        calls = [call for window in windows for call in plan_calls(window, shapes)]
        computed = sum(shape.tokens for shape, _ in calls)
        rows.append(
            {
                "texts": name,
                "distinct": len(lengths),
                "tokens a text": float(lengths.mean()),
                "calls": len(calls),
                "density": f"{lengths.sum() / computed:.3f}",
            }
        )
    print(f"{machine()}\n`python benchmarks/density.py`\n\n{table(rows)}")


if __name__ == "__main__":
    main()
