"""A training run from its config to its export, in the order in which it happens."""

import contextlib
import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from jaxembed import hosts
from jaxembed.checkpoint.directories import ModelPath
from jaxembed.checkpoint.export import refuse_existing
from jaxembed.checkpoint.hub import find_directory
from jaxembed.checkpoint.huggingface import weights_hash
from jaxembed.checkpoint.orbax import TrainingCheckpoints
from jaxembed.checkpoint.pretrained import Decoder, merged_decoder
from jaxembed.config import TrainConfig, load_config
from jaxembed.data.loader import Batches, iterate
from jaxembed.data.sources import Examples
from jaxembed.embedder import Embedder
from jaxembed.errors import InputError, OperationError
from jaxembed.evaluation.dev_set import AnyDevSet
from jaxembed.ops.attention import choose_kernel
from jaxembed.sharding import compute_dtype, make_mesh
from jaxembed.text.tokenizer import TextTokenizer
from jaxembed.training.agreement import agree_on_base, agree_on_batches, agree_on_data, agree_on_start
from jaxembed.training.dev import BestCheckpoint, Found, read_dev_sets
from jaxembed.training.filters import trains
from jaxembed.training.gradient import with_temperature, without_temperature
from jaxembed.training.metrics import MetricsWriter, StepLog
from jaxembed.training.prepare import (
    loss_options,
    parameter_dtype,
    prepare_batches,
    prepare_decoder,
    prepare_parts,
)
from jaxembed.training.profile import Profile
from jaxembed.training.report import (
    CONFIG_FILE,
    RUN_FILE,
    export_path,
    print_results,
    start_line,
    write_model,
    write_run_adapter,
    write_run_files,
)
from jaxembed.training.step import (
    StepMetrics,
    TrainState,
    initial_state,
    learning_rate,
    make_optimizer,
    make_step,
    put_batch,
)
from jaxembed.training.termination import Stopped, Termination
from jaxembed.training.texts import prepare_tokenizer, read_sources

logger = logging.getLogger(__name__)

_STEPS = "the steps"
_NAMED = 64  # examples of a batch in a message


class TrainingError(OperationError):
    """A run that cannot go on: its numbers are no numbers any more."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int
    finished: bool
    """False where SIGTERM ended it."""
    model: ModelPath | None
    """Where the export lies."""
    dev: dict[str, dict[str, dict[str, float]]]
    """Data set → "before", "after", "BM25, …" → metric → value."""


def run(config: TrainConfig, *, resume: bool = False) -> Result:
    """Trains as the config says, in its run directory.

    On several hosts every process makes this call, within `hosts.together`.

    Raises:
        InputError: something in config, data, model or checkpoints cannot be used.
        TrainingError: loss or gradient is not finite any more.
        CheckpointError: a checkpoint could not be written or read.
        ExportError: sentence-transformers reads the export differently.
    """
    directory = epath.Path(config.run_dir).expanduser()
    if not resume:
        _refuse_used(directory)
    progress = _Progress()
    with Termination() as termination:
        try:
            return _run(config, directory, resume, termination, progress)
        except Stopped:
            text = _stopped(directory, resume, termination.doing, progress)
            logger.warning("%s", text)
            if not termination.agreed:
                hosts.end_all(text)
            return Result(progress.done, False, None, progress.dev)


@dataclasses.dataclass
class _Progress:
    """How far a run has come, for whoever ends it."""

    steps: int = 0
    """Of the whole run; 0 before they are known."""
    done: int = 0
    """Steps whose state is saved."""
    dev: dict[str, dict[str, dict[str, float]]] = dataclasses.field(default_factory=dict)


def _stopped(directory: epath.Path, resume: bool, doing: str, progress: _Progress) -> str:
    """Where SIGTERM ended the run, and how to go on."""
    after = f"after step {progress.done} of {progress.steps}, everything is saved"
    if not progress.done:
        after = "before the first step, so that there is nothing to save"
        if resume:
            after = "before the first step of this resumption; checkpoints are as they were"
    during = "" if doing == _STEPS else f"during {doing}, "
    if not (directory / CONFIG_FILE).exists():
        return f"stopped by SIGTERM {during}{after}; start again with the same command"
    return f"stopped by SIGTERM {during}{after}; go on with: python -m jaxembed.train --resume {directory}"


def _run(
    config: TrainConfig, directory: epath.Path, resume: bool, termination: Termination, progress: _Progress
) -> Result:
    agree_on_start(config)
    if hosts.is_main():
        refuse_existing(export_path(config), overwrite=True)
    hosts.check_shared(directory, "run_dir")
    if config.compile_cache and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compile_cache))
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    attention = partial(
        choose_kernel,
        config.model.attention_kernel,
        list(mesh.devices.flat),
        dtype=compute_dtype(config.model.compute_dtype),
    )
    attention()
    examples = read_sources(config.data.train, config.data)
    dev_sets = read_dev_sets(config)
    agree_on_data(examples, dev_sets)
    tokenizer = _prepare_tokenizer(config, examples, directory / "tokenizer", resume)
    if config.model.path is not None:
        agree_on_base(find_directory(config.model.path))
    decoder = prepare_decoder(config, tokenizer, mesh, parameter_dtype(config))
    options = loss_options(config, examples, tokenizer.text_format, decoder.config.dim)
    kernel = attention(head_dim=decoder.config.head_dim)
    options = dataclasses.replace(options, attention_kernel=kernel)
    batches = prepare_batches(config, examples, tokenizer, mesh, decoder.config.dim)
    agree_on_batches(batches)
    progress.steps = steps = len(batches)

    known_base = None if config.training.trainable == "full" else base_hash(decoder)
    decoder = prepare_parts(config, decoder, tokenizer, mesh)
    graph, trainable, frozen = nnx.split(decoder.model, trains(config.training, decoder.config.layers), ...)
    trainable = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
    if config.loss.learn_temperature:
        trainable = with_temperature(trainable, config.loss.temperature)
    optimizer = make_optimizer(config.optimizer, steps)
    step = make_step(graph, trainable, frozen, optimizer, options, config.training.batch_size, mesh)
    state = initial_state(optimizer, trainable, mesh)
    embedder = Embedder(decoder, tokenizer, dtype=config.model.compute_dtype, mesh=mesh, attention_kernel=kernel)

    identity = {"plan": batches.schedule.hash, "base": config.model.path, "base_hash": known_base}
    with TrainingCheckpoints(directory / "checkpoints", config.checkpoint.keep) as checkpoints:
        start = 0
        if resume and (found := restore(checkpoints, state, identity)) is not None:
            start, state = found
            progress.done = start
        elif resume:
            _refuse_other_data(directory, batches)
            logger.info("no checkpoint yet: starting from the beginning")
        else:
            write_run_files(directory, config, batches)
        logger.info("%s", start_line(decoder, trainable, frozen, mesh, batches, options, start))
        best_metric = config.evaluation.best_metric
        with (
            contextlib.nullcontext()
            if best_metric is None
            else BestCheckpoint(directory, best_metric, identity) as best,
            MetricsWriter(directory, tensorboard=config.logging.tensorboard, after_step=start) as metrics,
        ):
            termination.now("the first evaluation")
            progress.dev = dev = _evaluate_before(config, directory, dev_sets, embedder, metrics, termination)
            termination.now(_STEPS)
            with termination.noted():
                state = _train(
                    config, step, state, frozen, batches, start, mesh, examples, checkpoints, metrics, identity,
                    lambda done, state: _evaluate(
                        config, dev_sets, embedder, _merged(state.trainable, frozen), metrics, done, termination
                    ),
                    best, termination, progress,
                )  # fmt: skip
            done = progress.done
            termination.now("the last evaluation")
            after = _evaluate(config, dev_sets, embedder, _merged(state.trainable, frozen), metrics, done, termination)
            for name, values in after.items():
                dev[name]["after"] = values
            exported = ""
            if best is not None:
                best.consider(done, state.trainable, after)
                exported = _use_best(config, best, dev, embedder, state, frozen)
    termination.now("the export")
    model = write_model(config, _merged_embedder(embedder), examples, dev)
    write_run_adapter(config, embedder)
    print_results(config, dev, dev_sets, embedder, model, exported)
    return Result(done, True, model, dev)


def _prepare_tokenizer(config: TrainConfig, examples: list[Examples], saved: epath.Path, resume: bool) -> TextTokenizer:
    """Process 0's; the others read what it saved."""
    if not hosts.is_main():
        hosts.barrier("tokenizer")
        return prepare_tokenizer(config, examples, saved, resume=True)
    tokenizer = prepare_tokenizer(config, examples, saved, resume=resume)
    hosts.barrier("tokenizer")
    return tokenizer


def restore(
    checkpoints: TrainingCheckpoints, state: TrainState, identity: dict[str, Any]
) -> tuple[int, TrainState] | None:
    """The newest readable checkpoint, refused if plan, base or frozen weights are not those of this run."""

    def check(info: dict[str, Any]) -> None:
        for key, expected in identity.items():
            if info.get(key) != expected:
                raise InputError(
                    f"{checkpoints.directory}: its checkpoints belong to another run: {key} is {info.get(key)!r}, now "
                    f"{expected!r}; data, tokenizer, base model, and what the order of pairs depends on (seed, "
                    "training.batch_size, data.batches, …), must be those of the run that is resumed"
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
    evaluate: Callable[[int, TrainState], Found],
    best: BestCheckpoint | None,
    termination: Termination,
    progress: _Progress,
) -> TrainState:
    """Steps `start` … end.

    Raises:
        Stopped: SIGTERM came before the last step; the state is saved.
    """
    steps, schedule = len(batches), learning_rate(config.optimizer, len(batches))
    every = config.checkpoint.every_steps
    log = StepLog(metrics, [found.name for found in examples], schedule)
    profile = Profile(config)

    def save(done: int) -> None:
        checkpoints.save(done, state, {**identity, "step": done})

    def save_and_stop(done: int) -> NoReturn:
        save(done)
        checkpoints.wait()
        progress.done, termination.agreed = done, True
        raise Stopped

    with (
        profile,
        logging_redirect_tqdm(),
        tqdm(
            total=steps, initial=start, unit="step", desc="train", dynamic_ncols=True, disable=not hosts.is_main()
        ) as bar,
    ):
        for done, fields in enumerate(iterate(batches, start), start + 1):
            profile.before(done)
            state, measured = step(state, frozen, put_batch(fields, mesh))
            log.add(done, fields, measured)
            _stop_if_not_finite(log.before_last, batches, examples, checkpoints)
            profile.after(done, state)
            at_end, stop = done == steps, termination.stop_after(done)
            evaluating = config.evaluation.every_steps and done % config.evaluation.every_steps == 0 and not at_end
            saving = at_end or stop or (every and done % every == 0)
            if done % config.logging.every_steps == 0 or saving or evaluating:
                _stop_if_not_finite(log.last, batches, examples, checkpoints)
                bar.set_postfix_str(log.write(done))
            bar.update(done - bar.n)
            if stop and not at_end:
                save_and_stop(done)
            if saving:
                save(done)
            if evaluating:
                try:
                    with log.paused(), termination.at_once():
                        found = evaluate(done, state)
                except Stopped:
                    save_and_stop(done)
                if best is not None:
                    with log.paused():
                        checkpoints.wait()
                        best.consider(done, state.trainable, found)
    checkpoints.wait()
    progress.done = steps
    return state


def _stop_if_not_finite(
    measured: tuple[int, StepMetrics] | None,
    batches: Batches,
    examples: list[Examples],
    checkpoints: TrainingCheckpoints,
) -> None:
    """Ends a run whose numbers are none, and takes back the checkpoint from which it went wrong."""
    if measured is None:
        return
    done, metrics = measured
    loss, norm, weights = float(metrics.loss), float(metrics.gradient_norm), float(metrics.weight_norm)
    if math.isfinite(loss) and math.isfinite(norm) and math.isfinite(weights):
        return
    ids = [name for found in examples for name in found.ids]
    inside = [ids[example] for example in batches.schedule.batch(done - 1)]
    found = f"loss {loss}, gradient norm {norm}, weights' norm {weights} after the update"
    taken_back = ""
    if not (math.isfinite(loss) and math.isfinite(norm)) and checkpoints.discard(done - 1):
        taken_back = f" The checkpoint of step {done - 1}, which led there, is deleted."
    raise TrainingError(
        f"step {done}: {found}; stopped, nothing of this step was saved.{taken_back} "
        f"A lower optimizer.learning_rate or float32 may help. The batch: {', '.join(inside[:_NAMED])}"
        + (f" and {len(inside) - _NAMED:,} more" if len(inside) > _NAMED else "")
    )


def _merged(trainable: nnx.State, frozen: nnx.State) -> nnx.State:
    return nnx.merge_state(without_temperature(trainable)[0], frozen)


def _use_best(
    config: TrainConfig,
    best: BestCheckpoint,
    dev: dict[str, dict[str, dict[str, float]]],
    embedder: Embedder,
    state: TrainState,
    frozen: nnx.State,
) -> str:
    """Adds the best evaluation to the table, and gives the embedder the best weights where those are exported.

    Returns which state that is, for the last lines.
    """
    if best.info is None:
        logger.warning("evaluation.best_metric: %s was never a finite number; the last state is exported", best.metric)
        return ""
    step, value = best.info["step"], best.info["value"]
    for name, values in best.info["dev"].items():
        if name in dev:  # a resumed run may have others
            dev[name][f"best, step {step}"] = values
    name, _, metric = best.metric.rpartition("/")
    before = dev[name]["before"][metric]
    if (before < value) if metric == "loss" else (before > value):
        logger.warning("%s was better before training: %.4f, then at best %.4f", best.metric, before, value)
    if config.export.checkpoint == "last":
        return f" (the last state; {best.metric} was best after step {step}: {value:.4f})"
    embedder.replace_state(_merged(best.restore(state.trainable), frozen))
    return f" (after step {step}, where {best.metric} was best: {value:.4f})"


def _merged_embedder(embedder: Embedder) -> Embedder:
    """The same model without parts of their own, as it is exported."""
    decoder = dataclasses.replace(embedder.decoder, model=embedder.model)
    merged = merged_decoder(decoder)
    if merged is decoder:
        return embedder
    return Embedder(
        merged,
        embedder.tokenizer,
        dtype=embedder.dtype.name,
        mesh=embedder.mesh,
        attention_kernel=embedder.attention_kernel,
    )


def _evaluate(
    config: TrainConfig,
    dev_sets: list[AnyDevSet],
    embedder: Embedder,
    weights: nnx.State,
    metrics: MetricsWriter,
    done: int,
    termination: Termination,
) -> dict[str, dict[str, float]]:
    embedder.replace_state(weights)
    found = {}
    for dev in dev_sets:
        termination.check_all()
        found[dev.name] = dev.evaluate(
            embedder, temperature=config.loss.temperature, batch_size=config.evaluation.batch_size
        )
        metrics.write(done, found[dev.name], f"dev/{dev.name}")
        shown = ", ".join(f"{name} {value:.4f}" for name, value in found[dev.name].items())
        logger.info("step %d, %s: %s", done, dev.name, shown)
    return found


def _evaluate_before(
    config: TrainConfig,
    directory: epath.Path,
    dev_sets: list[AnyDevSet],
    embedder: Embedder,
    metrics: MetricsWriter,
    termination: Termination,
) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics at step 0 and of BM25; a resumed run reads what it found then, of the dev sets that are as they were."""
    path = directory / "dev_before.json"
    known: dict[str, Any] = {}
    if hosts.is_main() and path.exists():
        then = {section.name: section for section in load_config(directory / CONFIG_FILE, []).data.dev}
        other = {section.name for section in config.data.dev if section != then.get(section.name)}
        known = {name: values for name, values in json.loads(path.read_text()).items() if name not in other}
    dev = json.loads(hosts.broadcast("dev_before.json", json.dumps(known)))
    missing = [found for found in dev_sets if found.name not in dev]
    if missing:
        for found in missing:
            dev[found.name] = found.bm25() if config.evaluation.bm25 else {}
        weights = nnx.state(embedder.model)
        for name, values in _evaluate(config, missing, embedder, weights, metrics, 0, termination).items():
            dev[name] = {"before": values, **dev[name]}
        if hosts.is_main():
            path.write_text(json.dumps(dev, indent=2))
    return {found.name: dev[found.name] for found in dev_sets}


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


def base_hash(decoder: Decoder) -> str:
    """The `WeightsHash` of the decoder as training finds it."""
    state = {tuple(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(nnx.state(decoder.model))}
    return weights_hash(state, decoder.family.weight_map(decoder.config), decoder.config.layers)
