"""A training run from its config to its export, in the order in which it happens."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from jaxembed.checkpoint.export import refuse_existing
from jaxembed.checkpoint.huggingface import hash_tensors
from jaxembed.checkpoint.model_card import model_card
from jaxembed.checkpoint.orbax import TrainingCheckpoints
from jaxembed.checkpoint.pretrained import Decoder
from jaxembed.checkpoint.safetensors import TensorSpec
from jaxembed.config import TrainConfig, dump_config
from jaxembed.data.loader import Batches, iterate
from jaxembed.data.sources import Examples, describe_dropped
from jaxembed.embedder import Embedder
from jaxembed.errors import InputError
from jaxembed.evaluation.dev_set import DevSet
from jaxembed.sharding import compute_dtype, make_mesh
from jaxembed.training.filters import TRAINABLE, count
from jaxembed.training.gradient import LossOptions
from jaxembed.training.metrics import MetricsWriter
from jaxembed.training.prepare import prepare_batches, prepare_decoder, prepare_tokenizer, read_sources
from jaxembed.training.step import (
    StepMetrics,
    TrainState,
    initial_state,
    learning_rate,
    make_optimizer,
    make_step,
    put_batch,
)

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"


class TrainingError(RuntimeError):
    """A run that cannot go on: its numbers are no numbers any more."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int
    finished: bool
    """False where SIGTERM ended it."""
    model: Path | None
    """Where the export lies."""
    dev: dict[str, dict[str, dict[str, float]]]
    """Data set → "before", "after", "BM25, …" → metric → value."""


def run(config: TrainConfig, *, resume: bool = False) -> Result:
    """Trains as the config says, in its run directory.

    Raises:
        InputError: something in config, data, model or checkpoints cannot be used.
        TrainingError: loss or gradient is not finite any more.
        CheckpointError: a checkpoint could not be written or read.
        ExportError: sentence-transformers reads the export differently.
    """
    directory = epath.Path(config.run_dir).expanduser()
    if not resume:
        _refuse_used(directory)
    refuse_existing(_export_path(config), overwrite=True)
    if config.compile_cache and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compile_cache))
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    examples = read_sources(config.data.train, config.data)
    dev_sets = [DevSet.of(found) for found in read_sources(config.data.dev, config.data)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run_dir: cannot make the directory {directory}: {error}") from error
    tokenizer = prepare_tokenizer(config, examples, directory / "tokenizer", resume=resume)
    decoder = prepare_decoder(config, tokenizer, mesh, _parameter_dtype(config))
    batches = prepare_batches(config, examples, tokenizer, mesh, decoder.config.dim)
    steps = len(batches)

    graph, trainable, frozen = nnx.split(decoder.model, TRAINABLE[config.training.trainable], ...)
    trainable = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
    optimizer = make_optimizer(config.optimizer, steps)
    options = LossOptions(
        temperature=config.loss.temperature,
        tile=config.loss.tile,
        dtype=compute_dtype(config.model.compute_dtype),
        chunk_checkpoint=config.training.chunk_checkpoint,
        layer_checkpoint=config.model.layer_checkpoint,
        normalize=tokenizer.text_format.normalize,
        data_sets=len(examples),
    )
    step = make_step(graph, trainable, frozen, optimizer, options, config.training.batch_size, mesh)
    state = initial_state(optimizer, trainable, mesh)
    embedder = Embedder(decoder, tokenizer, dtype=config.model.compute_dtype)

    identity = {"plan": batches.schedule.hash, "base": config.model.path, "frozen": _hash(frozen)}
    with TrainingCheckpoints(directory / "checkpoints", config.checkpoint.keep) as checkpoints:
        start = 0
        if resume and (found := restore(checkpoints, state, identity)) is not None:
            start, state = found
        elif resume:
            _refuse_other_data(directory, batches)
            logger.info("no checkpoint yet: starting from the beginning")
        else:
            _write_run_files(directory, config, batches)
        logger.info("%s", _start_line(decoder, trainable, frozen, mesh, batches, options, start))
        with MetricsWriter(directory, tensorboard=config.logging.tensorboard, after_step=start) as metrics:
            dev = _evaluate_before(config, directory, dev_sets, embedder, metrics)
            state, finished = _train(
                config, step, state, frozen, batches, start, mesh, examples, checkpoints, metrics, identity,
                lambda done, state: _evaluate(config, dev_sets, embedder, _merged(state, frozen), metrics, done),
            )  # fmt: skip
            done = int(state.step)
            if not finished:
                logger.warning(
                    "stopped by SIGTERM after step %d of %d, everything is saved; go on with: "
                    "python -m jaxembed.train --resume %s", done, steps, directory,
                )  # fmt: skip
                return Result(done, False, None, dev)
            after = _evaluate(config, dev_sets, embedder, _merged(state, frozen), metrics, done)
            for name, values in after.items():
                dev[name]["after"] = values
    model = _export(config, embedder, examples, dev)
    _print_results(config, dev, dev_sets, embedder, model)
    return Result(done, True, model, dev)


def restore(
    checkpoints: TrainingCheckpoints, state: TrainState, identity: dict[str, Any]
) -> tuple[int, TrainState] | None:
    """The newest readable checkpoint, refused if plan, base or frozen weights are not those of this run."""

    def check(info: dict[str, Any]) -> None:
        for key, expected in identity.items():
            if info.get(key) != expected:
                raise InputError(
                    f"{checkpoints.directory}: its checkpoints belong to another run: {key} is {info.get(key)!r}, now "
                    f"{expected!r}; data, tokenizer and base model must be those of the run that is resumed"
                )

    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    found = checkpoints.restore_latest(like, check)
    return None if found is None else (found[0], found[1])


def _train(
    config: TrainConfig,
    step: Any,
    state: TrainState,
    frozen: nnx.State,
    batches: Batches,
    start: int,
    mesh: Any,
    examples: list[Examples],
    checkpoints: TrainingCheckpoints,
    metrics: MetricsWriter,
    identity: dict[str, Any],
    evaluate: Any,
) -> tuple[TrainState, bool]:
    """Steps `start` … end; (state, whether it came to the end)."""
    steps, schedule = len(batches), learning_rate(config.optimizer, len(batches))
    every = config.checkpoint.every_steps
    log = _Log(config, metrics, [found.name for found in examples], schedule)
    profile = _Profile(config)

    def save(done: int) -> None:
        checkpoints.save(done, state, {**identity, "step": done})

    with (
        _terminated() as terminated,
        profile,
        logging_redirect_tqdm(),
        tqdm(total=steps, initial=start, unit="step", desc="train", dynamic_ncols=True) as bar,
    ):
        for done, fields in enumerate(iterate(batches, start), start + 1):
            profile.before(done)
            state, measured = step(state, frozen, put_batch(fields, mesh))
            log.add(done, fields, measured)
            _stop_if_not_finite(log.before_last, batches, examples)
            profile.after(done, state)
            at_end, stop = done == steps, terminated()
            evaluating = config.evaluation.every_steps and done % config.evaluation.every_steps == 0 and not at_end
            saving = at_end or stop or (every and done % every == 0)
            if done % config.logging.every_steps == 0 or saving or evaluating:
                _stop_if_not_finite(log.last, batches, examples)
                bar.set_postfix_str(log.write(done))
            bar.update(done - bar.n)
            if saving:
                save(done)
            if stop and not at_end:
                checkpoints.wait()
                return state, False
            if evaluating:
                with log.paused():
                    evaluate(done, state)
    checkpoints.wait()
    return state, True


class _Log:
    """Step metrics on their way from the devices to files: fetched one step late, so that nothing waits for them."""

    def __init__(self, config: TrainConfig, metrics: MetricsWriter, names: list[str], schedule: Any) -> None:
        self._writer, self._names, self._schedule = metrics, names, schedule
        self._pairs = config.training.batch_size
        self.last: tuple[int, StepMetrics] | None = None
        self.before_last: tuple[int, StepMetrics] | None = None
        self._since: list[tuple[dict[str, Any], StepMetrics]] = []
        self._time = time.perf_counter()

    def add(self, done: int, fields: dict[str, Any], measured: StepMetrics) -> None:
        self.before_last, self.last = self.last, (done, measured)
        self._since.append((fields, measured))

    def write(self, done: int) -> str:
        """One row of means since the last; its short form for the progress bar."""
        fetched = jax.device_get([measured for _, measured in self._since])
        seconds = time.perf_counter() - self._time
        texts = sum(int((fields["last"] >= 0).sum()) for fields, _ in self._since)
        tokens = sum(fields["tokens_used"] for fields, _ in self._since)
        positions = sum(fields["tokens"].size for fields, _ in self._since)
        values = {
            "loss": float(np.mean([m.loss for m in fetched])),
            "gradient_norm": float(np.mean([m.gradient_norm for m in fetched])),
            "learning_rate": float(self._schedule(done - 1)),
            "texts_per_second": texts / seconds,
            "tokens_per_second": tokens / seconds,
            "density": tokens / positions,
        }
        sums = np.sum([m.by_data_set for m in fetched], axis=0)
        if len(self._names) > 1:
            values |= {f"loss/{name}": float(a / n) for name, a, n in zip(self._names, *sums) if n}
        self._writer.write(done, values, "train")
        self._since, self._time = [], time.perf_counter()
        return f"loss {values['loss']:.4f}, {values['texts_per_second']:,.0f} texts/s"

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training."""
        begun = time.perf_counter()
        yield
        self._time += time.perf_counter() - begun


class _Profile:
    """The trace of the steps that the config names, of as many as this run takes; a context manager."""

    def __init__(self, config: TrainConfig) -> None:
        self._window = config.profile.window
        self._directory = os.path.join(config.run_dir, "profile")
        self._tracing = False

    def before(self, done: int) -> None:
        if self._window and self._window[0] <= done <= self._window[1] and not self._tracing:
            jax.profiler.start_trace(self._directory)
            self._tracing = True

    def after(self, done: int, state: TrainState) -> None:
        if self._tracing and self._window and done == self._window[1]:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._tracing = False

    def __enter__(self) -> "_Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracing:
            self._stop()


def _stop_if_not_finite(measured: tuple[int, StepMetrics] | None, batches: Batches, examples: list[Examples]) -> None:
    if measured is None:
        return
    done, metrics = measured
    loss, norm = float(metrics.loss), float(metrics.gradient_norm)
    if math.isfinite(loss) and math.isfinite(norm):
        return
    ids = [name for found in examples for name in found.ids]
    inside = [ids[example] for example in batches.schedule.batch(done - 1)]
    raise TrainingError(
        f"step {done}: loss {loss}, gradient norm {norm}; stopped, nothing of this step was saved. "
        f"A lower optimizer.learning_rate or float32 may help. The batch: {', '.join(inside)}"
    )


@contextlib.contextmanager
def _terminated() -> Iterator[Any]:
    """A function that says whether SIGTERM has come; the signal itself no longer kills."""
    came = False

    def handler(*_: object) -> None:
        nonlocal came
        came = True

    try:
        previous = signal.signal(signal.SIGTERM, handler)
    except ValueError:  # not the main thread, as in some notebooks
        yield lambda: False
        return
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, previous)


def _merged(state: TrainState, frozen: nnx.State) -> nnx.State:
    return nnx.merge_state(state.trainable, frozen)


def _evaluate(
    config: TrainConfig,
    dev_sets: list[DevSet],
    embedder: Embedder,
    weights: nnx.State,
    metrics: MetricsWriter,
    done: int,
) -> dict[str, dict[str, float]]:
    embedder.replace_state(weights)
    found = {}
    for dev in dev_sets:
        found[dev.name] = dev.evaluate(
            embedder, temperature=config.loss.temperature, batch_size=config.evaluation.batch_size
        )
        metrics.write(done, found[dev.name], f"dev/{dev.name}")
        shown = ", ".join(f"{name} {value:.4f}" for name, value in found[dev.name].items())
        logger.info("step %d, %s: %s", done, dev.name, shown)
    return found


def _evaluate_before(
    config: TrainConfig, directory: epath.Path, dev_sets: list[DevSet], embedder: Embedder, metrics: MetricsWriter
) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics at step 0 and of BM25; a resumed run reads what it found then."""
    path = directory / "dev_before.json"
    if path.exists():
        return json.loads(path.read_text())
    dev: dict[str, dict[str, dict[str, float]]] = {found.name: {} for found in dev_sets}
    for found in dev_sets:
        if config.evaluation.bm25:
            dev[found.name] |= found.bm25()
    for name, values in _evaluate(config, dev_sets, embedder, nnx.state(embedder.model), metrics, 0).items():
        dev[name] = {"before": values, **dev[name]}
    path.write_text(json.dumps(dev, indent=2))
    return dev


def _export_path(config: TrainConfig) -> Path:
    return Path(config.export.path or os.path.join(config.run_dir, "model")).expanduser()


def _export(
    config: TrainConfig,
    embedder: Embedder,
    examples: list[Examples],
    dev: dict[str, dict[str, dict[str, float]]],
) -> Path:
    path = _export_path(config)
    card = model_card(
        name=path.name,
        text_format=embedder.text_format,
        dim=embedder.dim,
        base_model=config.model.path,
        training_data=[
            {"name": found.name, "pairs": len(found), "dropped": describe_dropped(found.dropped) or "none"}
            for found in examples
        ],
        config=config.model_dump(mode="json"),
        results=[
            {"data": name, "metric": metric, **{column: f"{values[metric]:.4f}" if metric in values else ""
             for column, values in columns.items()}}
            for name, columns in dev.items() for metric in columns["after"]
        ],
        versions=_versions(),
    )  # fmt: skip
    found = embedder.save_pretrained(path, card=card, overwrite=True, verify=config.export.verify == "auto")
    if found is not None:
        logger.info("%s", found)
    elif config.export.verify == "auto":
        logger.info("the export was not read back: sentence-transformers is not installed here")
    return path


def _print_results(
    config: TrainConfig,
    dev: dict[str, dict[str, dict[str, float]]],
    dev_sets: list[DevSet],
    embedder: Embedder,
    model: Path,
) -> None:
    for found in dev_sets:
        columns = dev[found.name]
        print(f"\n{found.name}: {len(found.queries):,} queries, {len(found.documents):,} documents")
        width = max(map(len, columns))
        print(f"  {'':{width}}  " + "  ".join(f"{name:>10}" for name in columns["after"]))
        for column, values in columns.items():
            cells = (f"{values[name]:10.4f}" if name in values else " " * 10 for name in columns["after"])
            print(f"  {column:{width}}  " + "  ".join(cells))
        for query, hits in zip(config.evaluation.searches, found.search(embedder, config.evaluation.searches)):
            print(f"\n  {query!r}")
            for score, source, text in hits:
                print(f"    {score:.3f}  {source}  {' '.join(text.split())[:70]}")
    print(f"\nmodel: {model}\nrun:   {config.run_dir}")


def _refuse_used(directory: epath.Path) -> None:
    if (directory / CONFIG_FILE).exists():
        raise InputError(
            f"{directory}: holds a run already; go on with it by --resume {directory}, "
            "or give another directory by --run_dir"
        )


def _refuse_other_data(directory: epath.Path, batches: Batches) -> None:
    plan = json.loads((directory / RUN_FILE).read_text())["plan"]
    if plan != batches.schedule.hash:
        raise InputError(
            f"{directory}: this run began with other data: its plan is {plan!r}, now {batches.schedule.hash!r}; "
            "bring back the data, or begin another run"
        )


def _write_run_files(directory: epath.Path, config: TrainConfig, batches: Batches) -> None:
    about = {
        "command": sys.argv,
        "git": _git_revision(),
        "plan": batches.schedule.hash,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [device.device_kind for device in jax.devices()],
        "versions": _versions(),
    }
    (directory / RUN_FILE).write_text(json.dumps(about, indent=2))
    (directory / CONFIG_FILE).write_text(dump_config(config))  # last: where it is, a run is


def _versions() -> dict[str, str]:
    names = ("jaxembed", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tokenizers", "numpy")
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


def _parameter_dtype(config: TrainConfig) -> Any:
    """What is loaded: float32 where everything trains, what the config says for a frozen base."""
    frozen = config.training.trainable != "full"
    return jnp.dtype("float32" if config.model.param_dtype == "auto" or not frozen else config.model.param_dtype)


def _hash(frozen: nnx.State) -> str | None:
    """SHA-256 of the frozen parameters, None where all train."""
    arrays = [("/".join(map(str, path)), variable[...]) for path, variable in nnx.to_flat_state(frozen)]
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in arrays]
    return hash_tensors(specs, ((name, np.asarray(array)) for name, array in arrays)) if arrays else None


def _start_line(
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
    return (
        f"{decoder.huggingface_config['model_type']}, {decoder.config.layers} layers of {decoder.config.dim}: "
        f"{count(trainable):,} parameters train, {count(frozen):,} are frozen, {options.dtype} computes; "
        f"{jax.device_count()} × {device.device_kind} ({shape}); {batches.schedule.batch_size} pairs a step in {rows} "
        f"rows of {layout.row_length}, {layout.chunk_rows} rows a chunk, expected density {layout.density:.2f}, "
        f"{len(layout.chunks)} compiled step(s); "
        + (f"steps {start + 1} to {len(batches)}" if start < len(batches) else f"all {start} steps are done")
    )
