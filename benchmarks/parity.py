"""Agreement with PyTorch: hidden states with transformers, training losses with sentence-transformers.

The functions are those of the tests, which hold the same comparisons to a bound; here their figures are printed.
"""

import os
import sys
import tempfile
from pathlib import Path

from common import machine, table

TESTS = Path(__file__).parents[1] / "tests"
HEADS = (4, 6, 16, 20)


def hidden_states() -> list[dict[str, object]]:
    """Of random BLOOMs, against `transformers.BloomModel` on the same tokens."""
    import numpy as np
    import test_bloom as t

    from jaxembed.text.packing import fill_rows

    from blooms import from_torch, random_bloom

    texts = t.random_texts(t.LENGTHS)
    order = np.argsort([-len(text) for text in texts]).tolist()
    rows = fill_rows(texts, [order[:1], order[1:5], order[5:]], t.SHAPE)
    found = []
    for heads in HEADS:
        reference = random_bloom(t.config(heads))
        model = from_torch(t.config(heads), reference)
        ids, mask = t.padded(texts, max(map(len, texts)), left=False)
        theirs = [s[: len(text)] for s, text in zip(t.torch_states(reference, ids, mask), texts)]

        def padded(left: bool, model: object = model) -> list[np.ndarray]:
            states = np.asarray(t.states(model, *t.padded(texts, t.SHAPE.length, left)))
            return [s[-len(text) :] if left else s[: len(text)] for s, text in zip(states, texts)]

        packed = np.asarray(t.states(model, rows.tokens, rows.segments))
        places = {int(text): (row, slot) for (row, slot), text in np.ndenumerate(rows.texts) if text >= 0}
        last = {text: (row, int(rows.last[row, slot])) for text, (row, slot) in places.items()}
        in_rows = [packed[last[i][0], last[i][1] + 1 - len(text) : last[i][1] + 1] for i, text in enumerate(texts)]
        for layout, ours in (("right-padded", padded(False)), ("left-padded", padded(True)), ("packed", in_rows)):
            difference = max(np.abs(a - b).max() for a, b in zip(ours, theirs)) / np.concatenate(theirs).std()
            cosine = min(t.cosines(a[-1], b[-1]) for a, b in zip(ours, theirs))
            found.append(
                {
                    "heads": heads,
                    "rows": layout,
                    "largest difference / standard deviation": f"{difference:.1e}",
                    "1 − smallest cosine of an embedding": f"{max(1 - cosine, 0):.1e}",
                }
            )
    return found


def curves() -> list[dict[str, object]]:
    """Of training, against sentence-transformers with the same weights, batches, AdamW and schedule."""
    import numpy as np
    import test_curves as t

    from jaxembed.models.bloom import BloomConfig
    from jaxembed.text.format import DEFAULT_TEXT_FORMAT
    from jaxembed.text.tokenizer import TextTokenizer, train_byte_level_bpe

    from blooms import random_bloom

    found = []
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        base.mkdir()
        tokenizer = train_byte_level_bpe([*t.EXAMPLES.anchors, *t.EXAMPLES.positives], 400)
        TextTokenizer(tokenizer, DEFAULT_TEXT_FORMAT).save(base)
        random_bloom(BloomConfig(vocab_size=400, dim=32, layers=3, heads=4), scale=0.05).save_pretrained(base)
        cases = t.test_losses_are_those_of_sentence_transformers.pytestmark[0].args[1]
        for number, (trainable, cached, negatives, chunk_rows) in enumerate(cases):
            model = Path(temporary) / str(number)
            ours, batches = t.our_losses(base, model, trainable, negatives, chunk_rows)
            theirs = t.their_losses(model, trainable, negatives, cached, batches)
            found.append(
                {
                    "trained": trainable,
                    "sentence-transformers": f"{'Cached' * cached}MultipleNegativesRankingLoss",
                    "hard negatives": negatives,
                    "rows a chunk": chunk_rows or "all",
                    "steps": len(ours),
                    "loss": f"{ours[0]:.3f} → {ours[-1]:.3f}",
                    "largest relative difference": f"{np.max(np.abs(ours - theirs) / theirs):.1e}",
                }
            )
    return found


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path[:0] = [str(TESTS), str(TESTS / "models"), str(TESTS / "training")]
    states = hidden_states()
    import test_bloom as t

    lengths = ", ".join(map(str, t.LENGTHS))
    print(f"{machine()}\n`python benchmarks/parity.py`\n")
    print(f"Hidden states of random BLOOMs, 3 layers, float32, texts of {lengths} tokens, against transformers:\n")
    print(table(states))
    print("\nLosses of each step of training, all weights and biases random, against sentence-transformers:\n")
    print(table(curves()))


if __name__ == "__main__":
    main()
