"""What `train --check` says of a config: its data as the model will see it, and its length. Trains nothing."""

import tempfile
from collections.abc import Sequence

import numpy as np
from etils import epath

from jaxembed.config import TrainConfig
from jaxembed.data.plan import DataSet, Mixing, run_plan
from jaxembed.data.sources import Examples
from jaxembed.data.teacher import TeacherEmbeddings
from jaxembed.text.format import RoleName
from jaxembed.text.tokenizer import TextTokenizer
from jaxembed.training.dev import read_dev_sets
from jaxembed.training.prepare import model_dim, open_teachers
from jaxembed.training.step import warmup_steps
from jaxembed.training.texts import prepare_tokenizer, read_sources, rotates, source_tokenizer, train_token_ids

_SAMPLED = 256
_WIDTH = 160  # characters of a shown text


def check(config: TrainConfig) -> str:
    """Reads all sources, tokenises a sample of each, counts steps; the report.

    Raises:
        InputError: what a run would refuse before its first step: a bad row, a tokenizer or text format that does not
            do, too few pairs for a batch.
    """
    sources = read_sources(config.data.train, config.data)
    read_dev_sets(config)
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = prepare_tokenizer(config, sources, epath.Path(directory))
    train_token_ids(config.training, tokenizer)
    teachers: Sequence[TeacherEmbeddings | None] = [None] * len(sources)
    if any(section.teacher_embeddings for section in config.data.train):
        teachers = open_teachers(config.data.train, sources, model_dim(config))
    schedule = run_plan(
        [
            DataSet(source.name, np.arange(len(source))[:, None], section.weight)
            for source, section in zip(sources, config.data.train)
        ],
        # Which texts are equal changes the order of a run, and not its length.
        np.arange(max(map(len, sources)), dtype=np.uint64),
        config.training.batch_size,
        config.seed,
        epochs=config.training.epochs,
        steps=config.training.steps,
        mixing=Mixing(config.data.batches == "homogeneous", config.data.cap),
    )
    ends = np.cumsum([len(source) for source in sources])
    drawn = np.bincount(np.searchsorted(ends, schedule.epoch(0).order.ravel(), side="right"), minlength=len(sources))
    lines = []
    for source, section, teacher, count in zip(sources, config.data.train, teachers, drawn.tolist()):
        lines += [_drawn(source, count), *_sample(source, *source_tokenizer(tokenizer, section, source))]
        if rotates(section, source):
            lines.append("  each pass takes the next ones of the hard negatives, where a query has more than are taken")
        if teacher is not None:
            lines.append(f"  {teacher}")
        lines.append("")
    lines.append(
        f"{schedule.steps:,} steps of {config.training.batch_size:,} pairs, {schedule.steps_per_epoch:,} an epoch, "
        f"{warmup_steps(config.optimizer, schedule.steps):,} of them warm-up; nothing was trained, nothing written"
    )
    return "\n".join(lines)


def _drawn(source: Examples, count: int) -> str:
    held = [len(row) for row in source.negatives]
    few, many = min(held, default=0), max(held, default=0)
    negatives = f"{few} to {many}" if few < many else f"{many or 'no'}"
    negatives += " hard negative" if many == 1 else " hard negatives"
    return f"{source.name}: {len(source):,} pairs, {negatives} each, {count:,} pairs of the first epoch"


def _sample(source: Examples, tokenizer: TextTokenizer, roles: tuple[RoleName, RoleName]) -> list[str]:
    """The first pair as tokens, and how long and how often cut the texts of a sample are."""
    rows: list[int] = np.unique(np.linspace(0, len(source) - 1, min(_SAMPLED, len(source))).astype(int)).tolist()
    columns: list[tuple[str, RoleName, Sequence[str]]] = [
        ("anchor", roles[0], [source.anchors[row] for row in rows]),
        ("positive", roles[1], [source.positives[row] for row in rows]),
        ("negative", roles[1], [negative for row in rows for negative in source.negatives[row]]),
    ]
    lines = []
    for column, role, texts in columns:
        if not texts:
            continue
        ids = tokenizer(texts, role)
        lengths = np.array([len(one) for one in ids])
        cut = np.mean(lengths == tokenizer.text_format.max_length)
        shown = tokenizer.tokenizer.decode(ids[0].tolist(), skip_special_tokens=False).replace("\n", "⏎")
        if len(shown) > _WIDTH:
            shown = f"{shown[: _WIDTH * 2 // 3]} … {shown[-_WIDTH // 3 :]}"
        lines.append(f"  {column}, as {role}: {shown}")
        lines.append(
            f"    {lengths[0]} tokens; of {len(texts):,}: median {np.median(lengths):.0f}, longest {lengths.max()}, "
            f"{cut:.1%} of {tokenizer.text_format.max_length} tokens (cut there)"
        )
    return lines
