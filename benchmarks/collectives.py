"""What a step moves between the chips of a TPU v5e-8, compiled ahead of time, beside the least possible."""

import argparse
import dataclasses
import math
import os
import time
from collections import Counter
from typing import Any

from common import machine, table

CHUNKS, ROWS, LENGTH, QUERIES, NEGATIVES = 4, 32, 128, 512, 1


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--mesh", action="append", help="DATA,FSDP,TENSOR (default: 2,4,1)")
    options.add_argument("--layers", type=int, default=3)
    options.add_argument("--trainable", default="full", choices=("full", "bitfit"))
    arguments = options.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled"}
    rows = []
    for sizes in arguments.mesh or ["2,4,1"]:
        rows += measure(tuple(map(int, sizes.split(","))), arguments.layers, arguments.trainable)
    print(
        f"{machine()}\n`python benchmarks/collectives.py`: BLOOM, {arguments.layers} layers × 1,024, 250,880 tokens, "
        f"{arguments.trainable}, bfloat16; {CHUNKS} chunks × {ROWS} rows × {LENGTH} tokens a chip, {QUERIES} queries × "
        f"{2 + NEGATIVES} texts\n\n{table(rows)}"
    )


def measure(sizes: tuple[int, ...], layers: int, trainable: str) -> list[dict[str, Any]]:
    """MB that a chip sends in a step, by what they are, on a ring."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.experimental import topologies

    from jaxembed.config import OptimizerConfig
    from jaxembed.data.loader import RowLayout, TextTable, pack_batch
    from jaxembed.models.bloom import Bloom, BloomConfig
    from jaxembed.planning.hlo import read_collectives
    from jaxembed.sharding import make_mesh, named_shardings, partition_specs
    from jaxembed.training.batch import BATCH_SPECS, Batch
    from jaxembed.training.filters import TRAINABLE
    from jaxembed.training.objective import LossOptions
    from jaxembed.training.step import TrainState, make_optimizer, make_step, state_shardings

    def placed(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings)

    mesh = make_mesh(*sizes, devices=list(topologies.get_topology_desc("v5e:2x4", "tpu").devices))
    data, fsdp, tensor = sizes
    chips = data * fsdp
    config = BloomConfig(vocab_size=250_880, dim=1024, layers=layers, heads=16)
    model = jax.eval_shape(lambda key: Bloom(key, config), jax.random.key(0))
    graph, train, frozen = nnx.split(model, TRAINABLE[trainable], ...)
    optimizer = make_optimizer(OptimizerConfig(), 10)
    step: Any = make_step(graph, train, frozen, optimizer, LossOptions(dtype=jnp.bfloat16), QUERIES, mesh)

    texts = QUERIES * (2 + NEGATIVES)
    rows = CHUNKS * ROWS * chips
    per_row = -(-texts // rows)
    lengths = np.full(texts, LENGTH // per_row)  # the rows are full; those that no text fills are empty
    ids: Any = [np.zeros(length, np.int32) for length in lengths]
    text_table = TextTable((ids,), np.zeros(1, int), lengths, np.arange(texts, dtype=np.uint64))
    layout = RowLayout(LENGTH, per_row, ROWS, chips, (CHUNKS,), density=1.0)
    examples = np.arange(texts).reshape(2 + NEGATIVES, QUERIES).T
    fields = pack_batch(text_table, examples, np.zeros(QUERIES, int), layout)
    assert len(fields["tokens"]) == CHUNKS
    batch = Batch(**{field.name: jnp.asarray(fields[field.name]) for field in dataclasses.fields(Batch)})
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(train, jax.eval_shape(optimizer.init, train), count)
    arguments = (
        placed(state, state_shardings(optimizer, train, mesh)),
        placed(frozen, named_shardings(partition_specs(frozen), mesh)),
        placed(batch, named_shardings(BATCH_SPECS, mesh)),
    )
    began = time.perf_counter()
    moves = read_collectives(step.lower(*arguments).compile().as_text())
    seconds = time.perf_counter() - began

    found: Counter[str] = Counter()
    for move in moves:
        axes = move.axes(mesh)
        if move.kind == "all-to-all" or move.dtype == "s32":
            what = "look-up"
        elif "tensor" in axes:
            what = "sums over tensor"
        elif "data" in axes and move.kind == "all-reduce":
            what = "gradients over data"
        elif "data" in axes or (data == 1 and move.shape[-1:] == (config.dim,) and not move.in_loop):
            what = "embeddings"
        elif move.kind == "all-gather":
            what = "weights"
        else:
            what = "gradients over fsdp"
        found[what] += move.wire_bytes

    kernels = sum(v.size for p, v in nnx.to_flat_state(nnx.state(model)) if p[-1] == "kernel") // tensor
    trains = trainable == "full"
    shards = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(arguments[0].trainable))
    tokens = CHUNKS * ROWS * LENGTH
    of_group, of_all, of_data = (fsdp - 1) / fsdp, (chips - 1) / chips, (data - 1) / data
    least = {
        "weights": (kernels * 2 * of_group, "once, in bfloat16"),
        "gradients over fsdp": (kernels * 2 * of_group * trains, "scattered once, in bfloat16"),
        "gradients over data": (shards * 4 * 2 * of_data, "summed once, in float32"),
        "look-up": (tokens * config.dim * 2 * of_group * (1 + trains), "forward and backward, in bfloat16"),
        "embeddings": (texts * config.dim * 4 * of_all * 2, "all texts, there and back, in float32"),
    }
    name = " × ".join(map(str, sizes))
    print(f"mesh {name}: compiled in {seconds:.0f} s", flush=True)
    return [
        {
            "mesh": name,
            "what": what,
            "MB a chip sends": f"{found[what] / 1e6:.1f}",
            "least": f"{size / 1e6:.1f}",
            "that is": why,
        }
        for what, (size, why) in least.items()
    ] + [
        {"mesh": name, "what": what, "MB a chip sends": f"{size / 1e6:.1f}", "least": "", "that is": ""}
        for what, size in found.items()
        if what not in least
    ]


if __name__ == "__main__":
    main()
