"""From the embeddings of a batch to a loss for each of its queries, by the options of the data set it comes from.

Everything here runs inside the `shard_map`, where a chip has its own queries and all embeddings: it computes the losses
of its own queries, and what needs all of them at once (CoSENT, the spread) it computes whole.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxembed.ops.norms import unit_norm
from jaxembed.text.format import Pooling
from jaxembed.training import losses
from jaxembed.training.batch import Batch
from jaxembed.training.losses import CandidateMask, RowMask


@dataclasses.dataclass(frozen=True)
class SetLoss:
    """The loss of the examples of one data set."""

    kind: Literal["info_nce", "cosent", "kl", "margin_mse", "embedding_cosine", "embedding_mse"] = "info_nce"
    weight: float = 1.0
    temperature: float | None = None
    """Of this kind; None: the run's for InfoNCE, .05 for CoSENT, 1 for KL."""
    teacher_temperature: float = 1.0
    info_nce_weight: float = 0.0
    """InfoNCE, at the run's temperature, beside another kind."""
    in_batch: bool = True
    """Whether a query meets texts of other examples at all."""
    hard_negatives: bool = True
    """Whether queries meet hard negatives, their own and those of others."""
    query_query: bool = False
    document_document: bool = False
    document_query: Literal["none", "joint", "symmetric"] = "none"
    """Terms of InfoNCE; `joint` is one more in the same sum, `symmetric` the mean of both directions."""
    margin: float | None = None
    """Candidates this far above the positive's cosine are taken for false negatives."""
    focal: float = 0.0
    """γ."""

    @property
    def contrastive_temperature(self) -> float | None:
        """Of InfoNCE; None: the run's."""
        return self.temperature if self.kind == "info_nce" else None

    @property
    def contrastive_weight(self) -> float:
        """Of InfoNCE."""
        return self.weight * (1.0 if self.kind == "info_nce" else self.info_nce_weight)


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """What the loss is and what its computation may keep in memory."""

    temperature: float = 0.05
    """Of InfoNCE; where it is learned its first value, which `gradient.with_temperature` takes."""
    least_temperature: float = 0.01
    """Below which a learned one is not led: in CLIP (arXiv 2103.00020) logits grow by a factor of 100 at most."""
    tile: int | None = None
    """Candidates a tile of logits; None chooses."""
    dtype: Any = jnp.float32
    """Of activations and of weights in products."""
    chunk_checkpoint: str = "full"
    layer_checkpoint: str = "none"
    """Keys of `LAYER_CHECKPOINTS`: what a chunk, and a layer within it, keeps for the backward pass."""
    attention_kernel: str = "plain"
    """One of `ops.attention.KERNELS`."""
    data_sets: int = 1
    pooling: Pooling = "last"
    """The text format's."""
    sets: tuple[SetLoss, ...] = ()
    """The loss of each data set, by its number; none: the default for all."""
    mask_duplicates: bool = True
    """Nobody meets the text of its positive, or its own, as a negative."""
    mask_known: bool = True
    """Nobody meets a text that is its positive elsewhere in the data."""
    spread_out: float = 0.0
    spread_out_mean: float = 0.0
    """Weights of the second and of the first moment of `losses.spread_out`, of queries and of positives."""
    matryoshka: tuple[tuple[int, float], ...] = ()
    """(dimensions, weight) of each prefix that is trained; none: the whole embedding."""

    @property
    def by_set(self) -> tuple[SetLoss, ...]:
        return self.sets or (SetLoss(),) * self.data_sets


def batch_losses(
    everyone: Float[Array, "slots dim"], batch: Batch, options: LossOptions, log_temperature: Float[Array, ""] | None
) -> Float[Array, " queries"]:
    """The losses of this chip's queries; their mean over all chips is the loss of the batch.

    With Matryoshka (arXiv 2205.13147) Σ weight · loss over prefixes of the embeddings, scaled to unit length again.

    Args:
        everyone: embeddings of all chips, of unit length.
        log_temperature: where it is learned.
    """
    total: Any = 0.0
    for dim, weight in options.matryoshka or ((everyone.shape[1], 1.0),):
        cut = everyone if dim == everyone.shape[1] else unit_norm(everyone[:, :dim])
        total += weight * _losses(cut, batch, options, log_temperature)
    return total


def _losses(everyone: Array, batch: Batch, options: LossOptions, log_temperature: Array | None) -> Array:
    sets = options.by_set
    queries, documents, others = (everyone[x] for x in (batch.own, batch.candidates, batch.query_places))
    positives = documents[: len(others)]
    total: Any = 0.0
    if any(each.contrastive_weight for each in sets):
        found = _contrastive(queries, documents, others, batch, options, log_temperature)
        total += found * _of_set([each.contrastive_weight for each in sets], batch)
    if any(each.kind in ("kl", "margin_mse") for each in sets):
        total += _distillation(queries, documents, batch, sets)
    if any(each.kind in ("embedding_cosine", "embedding_mse") for each in sets):
        total += _embedding_distillation(queries, documents, batch, sets)
    for number, each in enumerate(sets):
        if each.kind == "cosent":  # grades of different sets are not compared
            grades = batch.scores[:, 0]
            members = (batch.data_sets == number) & jnp.isfinite(grades)
            found = losses.cosent((others * positives).sum(1), grades, members, each.temperature or 0.05)
            total += jnp.where(batch.data_set == number, each.weight * found, 0.0)
    if options.spread_out or options.spread_out_mean:
        for first, second in map(losses.spread_out, (others, positives)):
            total += options.spread_out_mean * first + options.spread_out * second
    return total


def _contrastive(
    queries: Float[Array, "queries dim"],
    documents: Float[Array, "candidates dim"],
    others: Float[Array, "all dim"],
    batch: Batch,
    options: LossOptions,
    log_temperature: Array | None,
) -> Float[Array, " queries"]:
    """InfoNCE of this chip's queries with the terms of their sets.

    The sum is over documents dⱼ of the query qᵢ; with `query_query` also over qᵢ·qⱼ, with `document_document` over
    d⁺ᵢ·dⱼ of other examples' documents, with `document_query` (joint) over d⁺ᵢ·qⱼ, the pair's own among them (GTE,
    arXiv 2308.03281; all with the masks of Qwen3-Embedding, arXiv 2506.05176). Symmetric (CLIP, arXiv 2103.00020): the
    mean with the loss of d⁺ᵢ among all qⱼ.
    """
    sets, number = options.by_set, batch.positives
    count, columns = len(others), len(documents) // len(others)
    own_documents = documents[number]
    scale = _temperature(batch, options, log_temperature)
    temperature = 1.0 if isinstance(scale, Array) else scale
    if isinstance(scale, Array):
        queries, own_documents = queries / scale[:, None], own_documents / scale[:, None]

    code = batch.candidate_codes[number]
    avoided = [code[:, None], batch.query_codes[number][:, None]] if options.mask_duplicates else []
    avoided_of_queries = [batch.candidate_codes[:count, None]] if options.mask_duplicates else []
    if options.mask_known:
        avoided, avoided_of_queries = [*avoided, batch.known[number]], [*avoided_of_queries, batch.known]
    limits = None
    if any(each.margin is not None for each in sets):
        margins = _of_set([float("inf") if each.margin is None else each.margin for each in sets], batch)
        here = (queries * documents[number]).sum(1) / temperature
        limits = jax.lax.stop_gradient(here + margins / scale)

    def asked(others: Sequence[bool], own: bool, negatives: Sequence[bool] | None = None) -> RowMask:
        return RowMask(
            examples=number,
            own=None if own else jnp.zeros(number.shape, bool),
            others=None if all(others) else _of_set(others, batch, each_query=True),
            negatives=None if negatives is None or all(negatives) else _of_set(negatives, batch, each_query=True),
            avoided=jnp.concatenate(avoided, axis=1) if avoided else None,
            limits=limits,
        )

    everybody = jnp.arange(count)
    in_batch = [each.in_batch for each in sets]
    hard = [each.hard_negatives for each in sets]
    of_documents = CandidateMask(
        valid=batch.valid,
        examples=jnp.tile(everybody, columns),
        negatives=jnp.arange(len(documents)) >= count,
        texts=batch.candidate_codes,
    )
    of_queries = CandidateMask(valid=jnp.ones(count, bool), examples=everybody, texts=batch.query_codes)

    def term(rows: Array, candidates: Array, asks: RowMask, known: CandidateMask) -> tuple[Array, Array]:
        tile = options.tile or losses.automatic_tile(count, len(candidates))
        return losses.info_nce(rows, candidates, asks, known, temperature, tile)

    found, log_sums = term(
        queries, documents, asked(in_batch, own=True, negatives=hard)._replace(positives=number), of_documents
    )
    more = []
    if any(on := [each.in_batch and each.query_query for each in sets]):
        more.append(term(queries, others, asked(on, own=False), of_queries)[1])
    if any(on := [each.in_batch and each.document_document for each in sets]):
        more.append(term(own_documents, documents, asked(on, own=False, negatives=hard), of_documents)[1])
    backward = of_queries._replace(avoided=jnp.concatenate(avoided_of_queries, axis=1) if avoided_of_queries else None)
    if any(on := [each.in_batch and each.document_query == "joint" for each in sets]):
        asks = asked(on, own=True)._replace(positives=number, texts=code)
        off = None if all(on) else _of_set(on, batch, each_query=True)
        log_sum = term(own_documents, others, asks, backward)[1]
        more.append(log_sum if off is None else jnp.where(off, log_sum, losses.LOWEST))
    gamma = _of_set([each.focal for each in sets], batch)
    focused = any(each.focal for each in sets)
    found = losses.joint(found, log_sums, more)
    found = losses.focal(found, gamma) if focused else found
    if any(on := [each.in_batch and each.document_query == "symmetric" for each in sets]):
        asks = asked(in_batch, own=True)._replace(positives=number, texts=code)
        back = term(own_documents, others, asks, backward)[0]
        back = losses.focal(back, gamma) if focused else back
        found = jnp.where(_of_set(on, batch, each_query=True), (found + back) / 2, found)
    return found


def _temperature(batch: Batch, options: LossOptions, log_temperature: Array | None) -> float | Float[Array, " queries"]:
    """Of InfoNCE: a number where it is the same for all and fixed, else that of each query."""
    own = [each.contrastive_temperature for each in options.by_set]
    if log_temperature is None:
        fixed = [options.temperature if each is None else each for each in own]
        return fixed[0] if len(set(fixed)) == 1 else _of_set(fixed, batch, each_query=True)
    learned = jnp.exp(log_temperature)
    return jnp.stack([learned if each is None else learned * 0 + each for each in own])[batch.data_set]


def _distillation(queries: Array, documents: Array, batch: Batch, sets: Sequence[SetLoss]) -> Array:
    """KL and MarginMSE of each query over its own documents."""
    number, count = batch.positives, len(batch.data_sets)
    columns = min(len(documents) // count, batch.scores.shape[1])
    own = documents.reshape(-1, count, documents.shape[1])[:columns, number]
    student = (queries * own).sum(2).T
    teacher = jnp.where(batch.valid.reshape(-1, count)[:columns, number].T, batch.scores[number, :columns], jnp.nan)
    total: Any = 0.0
    teacher_temperature = _of_set([each.teacher_temperature for each in sets], batch)
    for kind in ("kl", "margin_mse"):
        weights = [each.weight if each.kind == kind else 0.0 for each in sets]
        if any(weights):
            if kind == "kl":
                temperature = _of_set([each.temperature or 1.0 for each in sets], batch)
                found = losses.distill_kl(student, teacher, temperature, teacher_temperature)
            else:
                found = losses.margin_mse(student, teacher, teacher_temperature)
            total += found * _of_set(weights, batch)
    return total


def _embedding_distillation(queries: Array, documents: Array, batch: Batch, sets: Sequence[SetLoss]) -> Array:
    """Mean distance of each query's own texts from their teacher's embeddings, over those that have one.

    Where all have one, the mean over queries is sentence-transformers' EmbedDistillLoss with "cosine" or "mse". The
    teacher's vectors are cut to the student's dimensions and scaled to unit length, as the student's are.
    """
    number, count, dim = batch.positives, len(batch.data_sets), queries.shape[1]
    own = documents.reshape(-1, count, dim)[:, number]
    student = jnp.concatenate([queries[None], own]).swapaxes(0, 1).reshape(-1, dim)
    teacher = batch.teacher[..., :dim]
    there = jnp.isfinite(teacher[..., 0])
    teacher = unit_norm(jnp.where(there[..., None], teacher, 1.0)).reshape(-1, dim)
    total: Any = 0.0
    for kind, distance in (("embedding_cosine", losses.distill_cosine), ("embedding_mse", losses.distill_mse)):
        weights = [each.weight if each.kind == kind else 0.0 for each in sets]
        if any(weights):
            found = jnp.where(there, distance(student, teacher).reshape(there.shape), 0.0)
            total += found.sum(1) / jnp.maximum(there.sum(1), 1) * _of_set(weights, batch)
    return total


def _of_set(values: Sequence[Any], batch: Batch, *, each_query: bool = False) -> Any:
    """The value of each query's data set; one number where all are the same, unless an array is asked for."""
    if len(set(values)) == 1 and not each_query:
        return values[0]
    return jnp.asarray(values)[batch.data_set]
