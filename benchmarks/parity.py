"""Agreement with PyTorch: hidden states, of every layer too, with transformers, losses with sentence-transformers.

The functions are those of the tests, which hold the same comparisons to a bound; here their figures are printed.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from common import machine, table

TESTS = Path(__file__).parents[1] / "tests"
HEADS = (4, 6, 16, 20)
LAYERS = 6  # of the models whose layers are compared one by one
TABLES = ("states", "layers", "curves")


def hidden_states() -> list[dict[str, object]]:
    """Of random BLOOMs, against `transformers.BloomModel` on the same tokens."""
    import numpy as np
    import test_bloom as t

    from blooms import from_torch, random_bloom

    texts = t.random_texts(t.LENGTHS)
    found = []
    for heads in HEADS:
        reference = random_bloom(t.config(heads))
        model = from_torch(t.config(heads), reference)
        theirs = [states[-1] for states in t.torch_layer_states(reference, texts)]
        for layout in t.layouts(texts):
            ours = layout.of_each_text(np.asarray(t.states(model, layout.tokens, layout.segments)))
            difference = max(np.abs(a - b).max() for a, b in zip(ours, theirs)) / np.concatenate(theirs).std()
            cosine = min(t.cosines(a[-1], b[-1]) for a, b in zip(ours, theirs))
            found.append(
                {
                    "heads": heads,
                    "rows": layout.name,
                    "largest difference / standard deviation": f"{difference:.1e}",
                    "1 − smallest cosine of an embedding": f"{max(1 - cosine, 0):.1e}",
                }
            )
    return found


def by_layer() -> list[dict[str, object]]:
    """The same comparison for the hidden states of every layer; of three layouts of the rows the worst."""
    import numpy as np
    import test_bloom as t

    from jaxembed.checkpoint.parity import compare_layers

    from blooms import from_torch, random_bloom

    texts = t.random_texts(t.LENGTHS)
    found: dict[str, dict[str, object]] = {}
    for heads in HEADS:
        reference = random_bloom(t.config(heads, LAYERS))
        model = from_torch(t.config(heads, LAYERS), reference)
        theirs = t.torch_layer_states(reference, texts)
        layouts = [
            compare_layers(
                layout.of_each_text(np.asarray(t.layer_states(model, layout.tokens, layout.segments))), theirs
            )
            for layout in t.layouts(texts)
        ]
        for same in zip(*layouts):
            row = found.setdefault(same[0].name, {"hidden states": same[0].name})
            row[f"{heads} heads"] = f"{max(layer.relative for layer in same):.1e}"
            row[f"{heads} heads, 1 − cosine"] = f"{max(1 - layer.cosine for layer in same):.1e}"
    return list(found.values())


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
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("tables", nargs="*", default=TABLES, metavar="TABLE", help=f"of {', '.join(TABLES)}; all")
    tables = arguments.parse_args().tables
    if unknown := set(tables).difference(TABLES):
        arguments.error(f"unknown table {unknown.pop()}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path[:0] = [str(TESTS), str(TESTS / "models"), str(TESTS / "training")]
    import test_bloom as t

    lengths = ", ".join(map(str, t.LENGTHS))
    print(f"{machine()}\n`{' '.join(['python benchmarks/parity.py', *sys.argv[1:]])}`")
    if "states" in tables:
        print(
            f"\nHidden states of random BLOOMs, 3 layers, float32, texts of {lengths} tokens, against transformers:\n"
        )
        print(table(hidden_states()))
    if "layers" in tables:
        print(
            f"\nParity by layer: random BLOOMs of {LAYERS} layers, float32, the same texts in right-padded, "
            "left-padded and packed rows (the worst of the three), against transformers' `output_hidden_states`. "
            "Largest difference / standard deviation of the layer, and 1 − smallest cosine at a text's last token:\n"
        )
        print(table(by_layer()))
    if "curves" in tables:
        print("\nLosses of each step of training, all weights and biases random, against sentence-transformers:\n")
        print(table(curves()))


if __name__ == "__main__":
    main()
