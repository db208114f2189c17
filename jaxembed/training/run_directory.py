"""A training run as the source of a conversion: its base, with the trained part of a checkpoint in place."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from flax import nnx

from jaxembed.checkpoint.buffers import Buffers
from jaxembed.checkpoint.convert import Source, open_source
from jaxembed.checkpoint.export import is_causal
from jaxembed.checkpoint.hub import find_directory
from jaxembed.checkpoint.huggingface import WeightsHash, in_order
from jaxembed.checkpoint.model_card import model_card
from jaxembed.checkpoint.orbax import checkpoint_record, complete_steps, newest_checkpoint
from jaxembed.checkpoint.parts import Parts, huggingface_shapes
from jaxembed.checkpoint.pretrained import abstract_decoder, flat_state, random_decoder, with_attention
from jaxembed.checkpoint.safetensors import TensorSpec
from jaxembed.checkpoint.stores import read_to_host, store_contents
from jaxembed.config import TrainConfig, load_config
from jaxembed.errors import InputError
from jaxembed.models import Family
from jaxembed.models.weights import ParameterPath, Plan, assignments, shorten
from jaxembed.text.tokenizer import TextTokenizer
from jaxembed.training.dev import BEST_DIRECTORY
from jaxembed.training.filters import trains, with_parts
from jaxembed.training.gradient import LOG_TEMPERATURE
from jaxembed.training.prepare import parameter_dtype, scratch_decoder
from jaxembed.training.report import CONFIG_FILE
from jaxembed.training.texts import train_token_ids

Which = Literal["newest", "best"] | int
"""Of a run's states; a number is that of a step."""

_Tensors = Iterator[tuple[str, np.ndarray]]


def is_run(path: Path) -> bool:
    """Whether it is a training run's directory."""
    return (path / CONFIG_FILE).is_file() and (path / "checkpoints").is_dir()


def open_run(path: Path, which: Which | None = None) -> Source:
    """The model of a run as one of its checkpoints has it, in the text format that it was trained in.

    The tensors are those of the run's own export, had it ended at that checkpoint: what training changes in float32,
    the others in the dtype in which they were held. Nothing of the optimiser is read.

    Args:
        which: the newest checkpoint that can be read, the best one, or that of a step; None: the one that the run
            would export, which is the newest one where no state is known as the best yet.

    Raises:
        InputError: no such checkpoint, or it does not belong to the config, or the base is another one than then.
    """
    config = load_config(path / CONFIG_FILE, ["--run_dir", str(path)])
    checkpoint, info, note = _choose(path, config, which)
    tokenizer = TextTokenizer.from_directory(path / "tokenizer")
    dtype = np.dtype(parameter_dtype(config))
    if config.model.path is not None:
        base = open_source(find_directory(config.model.path))
        family, model = base.family, base.config
        huggingface_config = with_attention(base.huggingface_config, config.model.attention)
        read_base = functools.partial(_read_base, base, dtype)
    else:
        dtype = np.dtype(np.float32)  # random weights are
        family, model = scratch_decoder(config, tokenizer.vocab_size)
        huggingface_config = model.to_huggingface()
        read_base = functools.partial(_read_random, family, model, config.seed, dtype)
    abstract = _abstract_with_parts(config, family, model, tokenizer)
    trained = _trained_part(checkpoint, config, flat_state(nnx.state(abstract)), model.layers)
    own = flat_state(abstract_decoder(family, model)[1])
    stacks = _Stacks(checkpoint, trained)
    parts = Parts.of(abstract, functools.cache(stacks.read))
    plan = list(assignments(family.weight_map(model), model.layers))
    _check_base(path, info, read_base, [each.source for each in plan])
    # Stack by stack, for a checkpoint holds the layers of a parameter in one array.
    plan.sort(key=lambda each: each.path)
    shapes = huggingface_shapes(family.weight_map(model), model.layers, own)
    specs = {}
    for each in plan:
        wide = parts.place(each)[0] in trained or parts.upper(each.path) in trained or parts.changes(each.path)
        specs[each.source] = TensorSpec(each.source, np.dtype(np.float32) if wide else dtype, shapes[each.source])

    def read(names: Sequence[str], buffers: Buffers) -> _Tensors:
        places = {each.source: each for each in plan}
        frozen = read_base([name for name in names if parts.place(places[name])[0] not in trained], buffers)
        for name in names:
            each = places[name]
            path, index = parts.place(each)
            if path in trained:
                stack = stacks.read(path)
                array = each.rule.relayout.to_huggingface(stack if index is None else stack[index], in_order)
            else:
                held = array = next(frozen)[1]
                if parts.changes(each.path):
                    array = parts.merged(each, held)
                array = array.astype(specs[name].dtype, copy=False)
                if array is not held:
                    buffers.give(held)
            yield name, array

    def card(name: str, weights_hash: str) -> str:
        return model_card(
            name=name,
            text_format=tokenizer.text_format,
            dim=model.dim,
            description=f"The model after step {info.get('step')} of its training{note}.",
            base_model=config.model.path,
            config=config.model_dump(mode="json"),
            causal=is_causal(huggingface_config),
            weights_hash=weights_hash,
        )

    return Source(
        path, "training run", family, model, huggingface_config, Plan(tuple(plan), "", ()), specs, read,
        tokenizer=tokenizer, card=card, state=f"after step {info.get('step')}{note}",
    )  # fmt: skip


def _choose(path: Path, config: TrainConfig, which: Which | None) -> tuple[epath.Path, Mapping[str, Any], str]:
    """The checkpoint, its record, and what else is known of the state."""
    checkpoints, best = epath.Path(path) / "checkpoints", epath.Path(path) / BEST_DIRECTORY
    has_best, metric, note = best.is_dir() and bool(complete_steps(best)), config.evaluation.best_metric, ""
    if which is None:
        which = "best" if has_best and config.export.checkpoint != "last" else "newest"
        if metric is not None and not has_best:
            note = f"; no value of {metric} is known yet"
    if which == "newest":
        return *newest_checkpoint(checkpoints), note
    steps = complete_steps(checkpoints)
    if which in steps:
        return checkpoints / str(which), checkpoint_record(checkpoints / str(which)), note
    kept = f"the steps that are kept: {', '.join(map(str, steps)) or 'none'}"
    if has_best:
        checkpoint, info = newest_checkpoint(best)
        if which in ("best", info["step"]):
            return checkpoint, info, f", where {info['metric']} was best: {info['value']:.4f}"
        kept += f"; the best one: {info['step']}"
    elif which == "best":
        why = "the run has no evaluation.best_metric" if metric is None else f"no value of {metric} is known yet"
        raise InputError(f"{path}: none of its states is known as the best: {why}; {kept}")
    raise InputError(f"{checkpoints}: no checkpoint of step {which}; {kept}")


class _Stacks:
    """Trained parameters, read from the checkpoint; the last one is held."""

    def __init__(self, checkpoint: epath.Path, trained: Mapping[ParameterPath, jax.ShapeDtypeStruct]) -> None:
        self._checkpoint, self._trained = checkpoint, trained
        self._held: tuple[ParameterPath, np.ndarray] | None = None

    def read(self, path: ParameterPath) -> np.ndarray:
        if self._held is None or self._held[0] != path:
            self._held = None  # before the next one is read
            wanted = {(_leaf(path),): self._trained[path]}
            [(_, array)] = read_to_host(self._checkpoint, wanted, Buffers())
            self._held = path, array
        return self._held[1]


def _abstract_with_parts(config: TrainConfig, family: Family, model: Any, tokenizer: TextTokenizer) -> Any:
    """The decoder as it was trained, without any memory."""
    graph, state = abstract_decoder(family, model)
    tokens = train_token_ids(config.training, tokenizer)

    def make(state: nnx.State) -> Any:
        return with_parts(nnx.merge(graph, state), config.training, model.layers, tokens, config.seed)

    return jax.eval_shape(make, state)


def _leaf(path: ParameterPath) -> str:
    """The name of a parameter's array in a training checkpoint."""
    return ".".join(("trainable", *path, "value"))


def _trained_part(
    checkpoint: epath.Path, config: TrainConfig, abstract: Mapping[ParameterPath, Any], layers: int
) -> dict[ParameterPath, jax.ShapeDtypeStruct]:
    contents = {name: leaf for name, leaf in store_contents(checkpoint).items() if name.startswith("trainable.")}
    contents.pop(_leaf((LOG_TEMPERATURE,)), None)  # no part of the model
    keep = trains(config.training, layers)
    # Arrays without elements (the stack of a model of one layer) are not stored.
    wanted = {_leaf(path): path for path, variable in abstract.items() if keep(path, variable) and variable.size}
    if wanted.keys() != contents.keys():
        other = sorted(wanted.keys() ^ contents.keys())
        raise InputError(f"{checkpoint}: does not hold the trainable part of the run's config: {shorten(other)}")
    for name, path in wanted.items():
        if contents[name].shape != abstract[path].shape:
            raise InputError(
                f"{checkpoint}: {name} has shape {list(contents[name].shape)}, expected {list(abstract[path].shape)}"
            )
    return {path: contents[name] for name, path in wanted.items()}


def _read_base(base: Source, dtype: np.dtype[Any], names: Sequence[str], buffers: Buffers) -> _Tensors:
    prefix = base.plan.prefix
    for name, array in base.read([prefix + name for name in names], buffers):
        cast = array.astype(dtype, copy=False)
        if cast is not array:
            buffers.give(array)
        yield name.removeprefix(prefix), cast


def _read_random(
    family: Family, model: Any, seed: int, dtype: np.dtype[Any], names: Sequence[str], buffers: Buffers
) -> _Tensors:
    if not names:
        return
    state = flat_state(nnx.state(random_decoder(family, model, seed).model))
    places = {each.source: each for each in assignments(family.weight_map(model), model.layers)}
    for name in names:
        each = places[name]
        array = np.asarray(state[each.path][...] if each.index is None else state[each.path][each.index])
        yield name, each.rule.relayout.to_huggingface(array, in_order).astype(dtype, copy=False)


def _check_base(
    path: Path, info: Mapping[str, Any], read_base: Callable[[Sequence[str], Buffers], _Tensors], names: Sequence[str]
) -> None:
    """Everything that was frozen has to be what it was."""
    recorded = info.get("base_hash")
    if recorded is None:
        return
    found = WeightsHash()
    buffers = Buffers()
    for name, array in read_base(names, buffers):
        found.add(name, array)
        buffers.give(array)
    if found.hexdigest() != recorded:
        raise InputError(
            f"{path}: the base model {info.get('base')!r} is not the one that the run began with: its weights have the "
            f"hash {found.hexdigest()}, then it was {recorded}"
        )
