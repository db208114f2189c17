"""The losses of a batch written down again in torch, float64: query by query, candidate by candidate, text by text."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from jaxembed.training.objective import LossOptions, SetLoss

normalize = torch.nn.functional.normalize


def reference_losses(
    embeddings: torch.Tensor,
    examples: np.ndarray,
    names: Sequence[Any],
    data_set: Sequence[int],
    options: LossOptions,
    known: Sequence[Collection[Any]] | None = None,
    scores: np.ndarray | None = None,
    log_temperature: torch.Tensor | None = None,
    teacher: np.ndarray | None = None,
) -> torch.Tensor:
    """Of each query.

    Args:
        embeddings: of every text, by its number.
        examples: numbers of anchor, positive, negatives; −1 for none.
        names: what each text is; equal texts have equal names.
        known: names of texts that are positives of each query elsewhere.
        teacher: embeddings of anchor, positive, negatives, NaN for none.
    """
    known = known or [()] * len(examples)
    total: Any = 0.0
    for dim, weight in options.matryoshka or ((embeddings.shape[1], 1.0),):
        x = normalize(embeddings[:, :dim], dim=1)
        total += weight * torch.stack(
            _losses(x, examples, names, data_set, options, known, scores, log_temperature, teacher)
        )
    return total


def _losses(x, examples, names, data_set, options, known, scores, log_temperature, teacher) -> list[torch.Tensor]:
    rows = range(len(examples))
    sets = options.sets or (SetLoss(),) * options.data_sets
    run = options.temperature if log_temperature is None else log_temperature.exp()
    losses = []
    for i in rows:
        mine, loss = sets[data_set[i]], torch.zeros((), dtype=x.dtype)
        if mine.kind == "info_nce":
            loss = loss + _info_nce(i, mine.temperature or run, mine, x, examples, names, options, known)
        elif mine.info_nce_weight:
            loss = loss + mine.info_nce_weight * _info_nce(i, run, mine, x, examples, names, options, known)
        if mine.kind in ("kl", "margin_mse"):
            loss = loss + _distill(i, mine, x, examples, scores)
        if mine.kind in ("embedding_cosine", "embedding_mse"):
            loss = loss + _taught(mine, x, examples[i], teacher[i])
        if mine.kind == "cosent":
            loss = loss + _cosent([j for j in rows if data_set[j] == data_set[i]], mine, x, examples, scores)
        losses.append(mine.weight * loss)
    if options.spread_out or options.spread_out_mean:
        for column in (0, 1):
            pairs = torch.stack([x[examples[i, column]] @ x[examples[j, column]] for i in rows for j in rows if i != j])
            moments = pairs.mean() ** 2, ((pairs**2).mean() - 1 / x.shape[1]).clamp(min=0)
            spread = options.spread_out_mean * moments[0] + options.spread_out * moments[1]
            losses = [loss + spread for loss in losses]
    return losses


def _info_nce(i, temperature, mine, x, examples, names, options, known) -> torch.Tensor:
    anchor, positive = examples[i, :2]
    top = x[anchor] @ x[positive]
    wrong = set()
    if options.mask_duplicates:
        wrong |= {names[anchor], names[positive]}
    if options.mask_known:
        wrong |= set(known[i])

    def meets(row: int, other: int) -> bool:
        return names[other] not in wrong and (mine.margin is None or bool(x[row] @ x[other] <= top + mine.margin))

    forward = [top]
    for j, example in enumerate(examples):
        for column, text in enumerate(example[1:]):
            if text < 0 or (i, 0) == (j, column) or (column and not mine.hard_negatives):
                continue
            if (i == j or mine.in_batch) and meets(anchor, text):
                forward.append(x[anchor] @ x[text])
            if i != j and mine.in_batch and mine.document_document and meets(positive, text):
                forward.append(x[positive] @ x[text])
        if i != j and mine.in_batch and mine.query_query and meets(anchor, example[0]):
            forward.append(x[anchor] @ x[example[0]])
    backward = [top]
    for j, example in enumerate(examples):
        theirs = names[positive] == names[example[1]] and options.mask_duplicates
        theirs |= names[positive] in known[j] and options.mask_known
        if i != j and mine.in_batch and not theirs and meets(positive, example[0]):
            backward.append(x[positive] @ x[example[0]])
    if mine.in_batch and mine.document_query == "joint":
        forward += backward
    loss = _softmax_loss(forward, temperature, mine.focal)
    if mine.in_batch and mine.document_query == "symmetric":
        loss = (loss + _softmax_loss(backward, temperature, mine.focal)) / 2
    return loss


def _softmax_loss(cosines, temperature, gamma) -> torch.Tensor:
    log_p = torch.log_softmax(torch.stack(cosines) / temperature, 0)[0]
    return -log_p * (1 - log_p.exp()) ** gamma if gamma else -log_p


def _distill(i, mine, x, examples, scores) -> torch.Tensor:
    columns = [c for c, text in enumerate(examples[i, 1:]) if text >= 0 and math.isfinite(scores[i, c])]
    ours = torch.stack([x[examples[i, 0]] @ x[examples[i, 1 + c]] for c in columns])
    theirs = torch.tensor([float(scores[i, c]) for c in columns], dtype=x.dtype) / mine.teacher_temperature
    if mine.kind == "margin_mse":
        if columns[0] or len(columns) < 2:
            return 0 * ours.sum()
        return (((ours[0] - ours[1:]) - (theirs[0] - theirs[1:])) ** 2).mean()
    hot = mine.temperature or 1.0
    p = torch.softmax(theirs, 0)
    return (p * (p.log() - torch.log_softmax(ours / hot, 0))).sum() * hot**2


def _taught(mine, x, example, teacher) -> torch.Tensor:
    distances = []
    for text, vector in zip(example, torch.tensor(teacher, dtype=x.dtype)):
        if text >= 0 and vector[0].isfinite():
            theirs = normalize(vector[: x.shape[1]], dim=0)
            cosine = mine.kind == "embedding_cosine"
            distances.append(1 - x[text] @ theirs if cosine else ((x[text] - theirs) ** 2).mean())
    return torch.stack(distances).mean() if distances else 0 * x.sum()


def _cosent(members, mine, x, examples, scores) -> torch.Tensor:
    members = [i for i in members if math.isfinite(scores[i, 0])]
    cosines = {i: (x[examples[i, 0]] @ x[examples[i, 1]]) / (mine.temperature or 0.05) for i in members}
    pairs = [cosines[i] - cosines[j] for i in members for j in members if scores[i, 0] < scores[j, 0]]
    return torch.logsumexp(torch.stack([torch.zeros((), dtype=x.dtype), *pairs]), 0)
