"""What a run says about itself: its first line, its files, its model card, its last table."""

import contextlib
import dataclasses
import json
import logging
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from etils import epath
from flax import nnx

from jaxembed import hosts
from jaxembed.checkpoint.directories import ModelPath, model_path
from jaxembed.checkpoint.export import write_description
from jaxembed.checkpoint.model_card import model_card
from jaxembed.checkpoint.peft import is_adapter, named_base, write_adapter
from jaxembed.checkpoint.pretrained import Decoder
from jaxembed.config import DistributedConfig, TrainConfig, dump_config
from jaxembed.data.loader import Batches
from jaxembed.data.sources import Examples, describe_dropped
from jaxembed.embedder import Embedder
from jaxembed.evaluation.dev_set import AnyDevSet, DevSet
from jaxembed.training.filters import count
from jaxembed.training.gradient import LossOptions

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"


def start_line(
    decoder: Decoder,
    trainable: nnx.State,
    frozen: nnx.State,
    mesh: Any,
    batches: Batches,
    options: LossOptions,
    start: int,
) -> str:
    layout, device = batches.layout, jax.devices()[0]
    rows = "/".join(str(chunks * layout.chunk_rows * layout.chips) for chunks in layout.chunks)
    shape = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    if hosts.count() > 1:
        shape += f", {hosts.count()} processes"
    return (
        f"{decoder.huggingface_config['model_type']}, {decoder.config.layers} layers of {decoder.config.dim}: "
        f"{count(trainable):,} parameters train, {count(frozen):,} are frozen, {options.dtype} computes, "
        f"attention {options.attention_kernel}; "
        f"{jax.device_count()} × {device.device_kind} ({shape}); {batches.schedule.batch_size} pairs a step in {rows} "
        f"rows of {layout.row_length}, {layout.chunk_rows} rows a chunk, expected density {layout.density:.2f}, "
        f"{len(layout.chunks)} compiled step(s); "
        + (f"steps {start + 1} to {len(batches)}" if start < len(batches) else f"all {start} steps are done")
    )


def write_run_files(directory: epath.Path, config: TrainConfig, batches: Batches) -> None:
    """By process 0. What the config says of the processes is left out: a resumption may have others."""
    if not hosts.is_main():
        return
    about = {
        "command": sys.argv,
        "git": _git_revision(),
        "plan": batches.schedule.hash,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [device.device_kind for device in jax.devices()],
        "processes": hosts.count(),
        "versions": software_versions(),
    }
    (directory / RUN_FILE).write_text(json.dumps(about, indent=2))
    config = config.model_copy(update={"distributed": DistributedConfig()})
    (directory / CONFIG_FILE).write_text(dump_config(config))  # last: where it is, a run is


def export_path(config: TrainConfig) -> ModelPath:
    return model_path(config.export.path or os.path.join(config.run_dir, "model"))


def write_model(
    config: TrainConfig,
    embedder: Embedder,
    examples: list[Examples],
    dev: dict[str, dict[str, dict[str, float]]],
) -> ModelPath:
    """Exports the model, with its card. Every process calls it, for each has a part of the weights."""
    path = export_path(config)
    card = model_card(
        name=path.name,
        text_format=embedder.text_format,
        dim=embedder.dim,
        base_model=config.model.path,
        training_data=[
            {"name": found.name, "pairs": len(found), "dropped": describe_dropped(found.dropped)}
            for found in examples
        ],
        config=config.model_dump(mode="json"),
        results=[
            {"data": name, "metric": metric, **{column: f"{values[metric]:.4f}" if metric in values else ""
             for column, values in columns.items()}}
            for name, columns in dev.items() for metric in columns["after"]
        ],
        weights_hash=embedder.model_hash,
        causal=embedder.decoder.config.causal,
        versions=software_versions(),
    )  # fmt: skip
    found = embedder.save_pretrained(path, card=card, overwrite=True, verify=config.export.verify == "auto")
    if found is not None:
        logger.info("%s", found)
    elif config.export.verify == "auto":
        logger.info("the export was not read back: sentence-transformers is not installed here")
    return path


def write_run_adapter(config: TrainConfig, embedder: Embedder) -> None:
    """Writes `adapter/` into the directory of a run that trained adapters of a model that others can have."""
    if config.training.trainable != "lora" or config.model.path is None:
        return
    base = named_base(config.model.path)
    if is_adapter(Path(base)):
        logger.info("no adapter is written: the run began with one, %s, which is part of its base", base)
        return
    decoder = dataclasses.replace(embedder.decoder, model=embedder.model)
    card = model_card(
        name="adapter",
        text_format=embedder.text_format,
        dim=embedder.dim,
        description="A LoRA adapter, which PEFT reads too.",
        base_model=config.model.path,
        causal=decoder.config.causal,
    )

    def describe(directory: Path) -> None:
        write_description(
            directory, decoder.huggingface_config, embedder.tokenizer, card, decoder.family.tokenizer_class
        )
        (directory / "config.json").unlink()  # where one is, readers look for the weights of a model
        if not decoder.config.causal:  # sentence-transformers would run the base as its own config says
            (directory / "modules.json").unlink()

    target = model_path(os.path.join(config.run_dir, "adapter"))
    write_adapter(target, decoder, base, describe)
    if hosts.is_main():
        logger.info("adapter: %s", target)


def print_results(
    config: TrainConfig,
    dev: dict[str, dict[str, dict[str, float]]],
    dev_sets: list[AnyDevSet],
    embedder: Embedder,
    model: ModelPath,
    exported: str = "",
) -> None:
    """The last table, and where everything lies; `exported` says which state the model has."""
    queries = config.evaluation.searches
    searched = [found.search(embedder, queries) if queries and isinstance(found, DevSet) else [] for found in dev_sets]
    if not hosts.is_main():
        return
    for found, hits_by_query in zip(dev_sets, searched):
        columns = dev[found.name]
        print(f"\n{found.name}: {found.described}")
        width = max(map(len, columns))
        print(f"  {'':{width}}  " + "  ".join(f"{name:>10}" for name in columns["after"]))
        for column, values in columns.items():
            cells = (f"{values[name]:10.4f}" if name in values else " " * 10 for name in columns["after"])
            print(f"  {column:{width}}  " + "  ".join(cells))
        for query, hits in zip(queries, hits_by_query):
            print(f"\n  {query!r}")
            for score, source, text in hits:
                print(f"    {score:.3f}  {source}  {' '.join(text.split())[:70]}")
    print(f"\nmodel: {model}{exported}\nrun:   {config.run_dir}")


def software_versions() -> dict[str, str]:
    """Of the packages that a run's numbers depend on."""
    names = ("jaxembed", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _git_revision() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
