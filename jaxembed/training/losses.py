"""Losses as pure functions of embeddings, scores and grades. `objective` puts them together for a batch.

Embeddings are of unit length, so that q·d is their cosine. Everything is float32.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LOWEST = float(jnp.finfo(jnp.float32).min)
"""The logarithm of an empty sum."""
_HIGHEST = jax.lax.Precision.HIGHEST


class RowMask(NamedTuple):
    """What each row of a softmax asks of its candidates; None asks nothing."""

    positives: Int[Array, " rows"] | None = None
    """Number of the candidate that is the row's positive: it is met, whatever the rest says."""
    examples: Int[Array, " rows"] | None = None
    """The example each row belongs to; with `own` or `others`."""
    own: Bool[Array, " rows"] | None = None
    """Whether it meets candidates of its own example."""
    others: Bool[Array, " rows"] | None = None
    """Whether it meets candidates of other examples."""
    negatives: Bool[Array, " rows"] | None = None
    """Whether it meets hard negatives, of any example."""
    avoided: Int[Array, "rows avoided"] | None = None
    """Texts that it does not meet."""
    texts: Int[Array, " rows"] | None = None
    """Its own text, for candidates that do not meet it."""
    limits: Float[Array, " rows"] | None = None
    """Logit above which a candidate is taken for a false negative."""


class CandidateMask(NamedTuple):
    """What the rows ask about, candidate by candidate; a field is needed where a row asks for it."""

    valid: Bool[Array, " candidates"]
    """False for candidates that fill a gap: nobody meets them."""
    examples: Int[Array, " candidates"] | None = None
    negatives: Bool[Array, " candidates"] | None = None
    texts: Int[Array, " candidates"] | None = None
    """Equal texts have equal numbers."""
    avoided: Int[Array, "candidates avoided"] | None = None
    """Texts of rows that do not meet the candidate."""


def automatic_tile(queries: int, candidates: int) -> int:
    """Candidates a tile: all of them for small batches, else as many as make a tile of logits 64 MiB."""
    return min(candidates, max(128, 2**24 // max(queries, 1)))


def info_nce(
    rows: Float[Array, "rows dim"],
    candidates: Float[Array, "candidates dim"],
    asked: RowMask,
    known: CandidateMask,
    temperature: float,
    tile: int,
) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    """InfoNCE (arXiv 1807.03748) of each row against the candidates it meets, of which one is its positive.

    lossᵢ = log Σⱼ exp(sᵢⱼ / τ) − sᵢ₊ / τ with sᵢⱼ = rᵢ·cⱼ, the sum over the candidates that row i meets. What it meets
    is constant in the gradient, also where it depends on s (`limits`; 0.1 above s₊ in Qwen3-Embedding, arXiv
    2506.05176).

    Logits are float32 and exist for `tile` candidates at a time, in the forward pass as a running log-sum-exp, in the
    backward pass computed again: memory is O(rows · (tile + dim)), for any number of candidates.

    Args:
        temperature: τ. For one that is learned, or another for each row, divide the rows by it and give 1.

    Returns:
        The losses, and the logarithms of their sums, for `joint`. Without positives losses are these logarithms; a row
        that meets nobody has `LOWEST` there.
    """
    candidates = candidates.astype(jnp.float32)
    pad = -len(candidates) % tile
    if pad:
        candidates, known = jax.tree.map(
            lambda x: jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))), (candidates, known)
        )
    return _tiled(rows.astype(jnp.float32), candidates, asked, known, temperature, tile)


def joint(
    losses: Float[Array, " rows"], log_sums: Float[Array, " rows"], others: list[Float[Array, " rows"]]
) -> Float[Array, " rows"]:
    """The losses with the sums of further terms in their denominators, as in GTE (arXiv 2308.03281).

    lossᵢ + log((Zᵢ + Σₜ Zᵢₜ) / Zᵢ), of the logarithms of Zᵢ and Zᵢₜ.
    """
    for log_sum in others:
        more = jax.nn.softplus(log_sum - log_sums)
        losses, log_sums = losses + more, log_sums + more
    return losses


def _meet(asked: RowMask, known: CandidateMask, numbers: Array, logits: Array) -> tuple[Array, Any]:
    """Who meets whom in a tile, and who is the positive."""
    met: Any = known.valid
    if known.examples is not None and asked.examples is not None:
        same = asked.examples[:, None] == known.examples
        if asked.own is not None:
            met = met & (asked.own[:, None] | ~same)
        if asked.others is not None:
            met = met & (asked.others[:, None] | same)
    if asked.negatives is not None and known.negatives is not None:
        met = met & (asked.negatives[:, None] | ~known.negatives)
    if asked.avoided is not None:
        for column in range(asked.avoided.shape[1]):
            met = met & (asked.avoided[:, column, None] != known.texts)
    if known.avoided is not None and asked.texts is not None:
        for column in range(known.avoided.shape[1]):
            met = met & (known.avoided[:, column] != asked.texts[:, None])
    if asked.limits is not None:
        met = met & (logits <= asked.limits[:, None])
    if asked.positives is None:
        return jnp.broadcast_to(met, logits.shape), 0.0
    is_positive = asked.positives[:, None] == numbers
    return met | is_positive, is_positive


def _logits(rows: Array, block: Array, temperature: float) -> Float[Array, "rows tile"]:
    return jnp.matmul(rows, block.T, precision=_HIGHEST) / temperature


def _tiles(candidates: Array, known: CandidateMask, tile: int) -> tuple[Array, CandidateMask, Array]:
    count = len(candidates) // tile

    def cut(x: Array) -> Array:
        return x.reshape(count, tile, *x.shape[1:])

    return cut(candidates), jax.tree.map(cut, known), cut(jnp.arange(len(candidates)))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _tiled(
    rows: Array, candidates: Array, asked: RowMask, known: CandidateMask, temperature: float, tile: int
) -> tuple[Array, Array]:
    return _tiled_forward(rows, candidates, asked, known, temperature, tile)[0]


def _tiled_forward(
    rows: Array, candidates: Array, asked: RowMask, known: CandidateMask, temperature: float, tile: int
) -> tuple[tuple[Array, Array], Any]:
    def body(carry: tuple[Array, Array, Array], x: tuple[Array, CandidateMask, Array]) -> tuple[Any, None]:
        highest, total, positive = carry
        logits = _logits(rows, x[0], temperature)
        met, is_positive = _meet(asked, x[1], x[2], logits)
        logits = jnp.where(met, logits, LOWEST)
        higher = jnp.maximum(highest, logits.max(1))
        total = total * jnp.exp(highest - higher) + jnp.where(met, jnp.exp(logits - higher[:, None]), 0.0).sum(1)
        if asked.positives is not None:
            positive = positive + jnp.where(is_positive, logits, 0.0).sum(1)
        return (higher, total, positive), None

    zero = rows[:, 0] * 0 + candidates[0, 0] * 0  # varies over chips as the inputs do, which the scan's type demands
    start = zero + LOWEST, zero, zero
    (highest, total, positive), _ = jax.lax.scan(body, start, _tiles(candidates, known, tile))
    log_sum = jnp.where(total > 0, highest + jnp.log(total), LOWEST)
    # 0 makes the softmax of a row that meets nobody zero everywhere
    return (log_sum - positive, log_sum), (rows, candidates, asked, known, jnp.where(total > 0, log_sum, 0.0))


def _tiled_backward(temperature: float, tile: int, residuals: Any, cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    rows, candidates, asked, known, log_sum = residuals
    of_loss, of_sum = (cotangent[:, None] / temperature for cotangent in cotangents)

    def body(row_gradient: Array, x: tuple[Array, CandidateMask, Array]) -> tuple[Array, Array]:
        block, here, numbers = x
        logits = _logits(rows, block, temperature)
        met, is_positive = _meet(asked, here, numbers, logits)
        softmax = jnp.exp(jnp.where(met, logits, LOWEST) - log_sum[:, None])
        slope = (softmax - is_positive) * of_loss + softmax * of_sum
        row_gradient = row_gradient + jnp.matmul(slope, block, precision=_HIGHEST)
        return row_gradient, jnp.matmul(slope.T, rows, precision=_HIGHEST)

    zero = rows * 0 + candidates[0] * 0
    row_gradient, blocks = jax.lax.scan(body, zero, _tiles(candidates, known, tile))
    return row_gradient, blocks.reshape(candidates.shape), None, None


_tiled.defvjp(_tiled_forward, _tiled_backward)


def focal(losses: Float[Array, " rows"], gamma: float | Float[Array, " rows"]) -> Float[Array, " rows"]:
    """Losses with a focal weight (arXiv 1708.02002; of InfoNCE in KaLM-Embedding-V2, arXiv 2506.20923).

    (1 − pᵢ)^γ · lossᵢ, where pᵢ = exp(−lossᵢ) is the softmax's share for the positive. The weight has its gradient.
    """
    return losses * (-jnp.expm1(-jnp.maximum(losses, 1e-12))) ** gamma


def cosent(
    similarities: Float[Array, " pairs"],
    grades: Float[Array, " pairs"],
    members: Bool[Array, " pairs"],
    temperature: float,
) -> Float[Array, ""]:
    """CoSENT (https://kexue.fm/archives/8847), as sentence-transformers' CoSENTLoss of scale 1 / τ.

    log(1 + Σ exp((sᵢ − sⱼ) / τ)), the sum over all i and j with gradeᵢ < gradeⱼ. By sorting, in O(pairs · log pairs):
    for each i the log-sum-exp over all higher grades is a running one from the end.

    Args:
        members: the pairs that take part; grades of others are not looked at.
    """
    grades = jnp.where(members, grades, jnp.inf)
    order = jnp.argsort(grades)
    grades, logits, members = grades[order], similarities[order] / temperature, members[order]
    running = jax.lax.cumlogsumexp(jnp.where(members, -logits, LOWEST), reverse=True)
    running = jnp.append(running, LOWEST)
    ends = jnp.where(grades != jnp.append(grades[1:], jnp.nan), jnp.arange(1, len(grades) + 1), len(grades))
    higher = jax.lax.cummin(ends, reverse=True)  # where the next grade begins; searchsorted fails under check_vma
    terms = jnp.where(members, logits + running[higher], LOWEST)
    return jax.nn.logsumexp(jnp.append(terms, 0.0))


def distill_kl(
    student: Float[Array, "queries columns"],
    teacher: Float[Array, "queries columns"],
    temperature: float | Float[Array, " queries"] = 1.0,
    teacher_temperature: float | Float[Array, " queries"] = 1.0,
) -> Float[Array, " queries"]:
    """KL divergence of a query's documents as the student scores them from the teacher's view (arXiv 2010.11386).

    T² · Σ p log(p / p̂) with p = softmax(teacher / Tₜ) and p̂ = softmax(student / T), as sentence-transformers'
    DistillKLDivLoss; its mean over queries is that loss.

    Args:
        student: q·d of each query with its own positive and negatives.
        teacher: any scores of the same pairs; those that are not finite take no part.
    """
    there = jnp.isfinite(teacher)
    hot, teacher_hot = (jnp.asarray(t, jnp.float32)[..., None] for t in (temperature, teacher_temperature))
    ours = jax.nn.log_softmax(jnp.where(there, student / hot, LOWEST), axis=1)
    theirs = jax.nn.log_softmax(jnp.where(there, teacher / teacher_hot, LOWEST), axis=1)
    return jnp.where(there, jnp.exp(theirs) * (theirs - ours), 0.0).sum(1) * hot[..., 0] ** 2


def margin_mse(
    student: Float[Array, "queries columns"],
    teacher: Float[Array, "queries columns"],
    teacher_temperature: float | Float[Array, " queries"] = 1.0,
) -> Float[Array, " queries"]:
    """MarginMSE (arXiv 2010.02666): the teacher's margin between positive and negative, by squared error.

    Mean over a query's negatives k of ((s₊ − sₖ) − (t₊ − tₖ) / Tₜ)². Where all queries have equally many the mean over
    them is sentence-transformers' MarginMSELoss.

    Args:
        student: q·d of each query with its positive, in column 0, and its negatives.
        teacher: scores of the same pairs; negatives whose score is not finite take no part.
    """
    there = jnp.isfinite(teacher[:, 1:]) & jnp.isfinite(teacher[:, :1])
    teacher = jnp.where(jnp.isfinite(teacher), teacher, 0.0)
    scale = jnp.asarray(teacher_temperature, jnp.float32)[..., None]
    errors = (student[:, :1] - student[:, 1:]) - (teacher[:, :1] - teacher[:, 1:]) / scale
    return jnp.where(there, jnp.square(errors), 0.0).sum(1) / jnp.maximum(there.sum(1), 1)


def distill_cosine(student: Float[Array, "texts dim"], teacher: Float[Array, "texts dim"]) -> Float[Array, " texts"]:
    """1 − cosine of student's and teacher's embedding of a text (EmbedDistill, arXiv 2301.12005), of any lengths."""
    products = (student * teacher).sum(1)
    return 1 - products * jax.lax.rsqrt(jnp.square(student).sum(1) * jnp.square(teacher).sum(1))


def distill_mse(student: Float[Array, "texts dim"], teacher: Float[Array, "texts dim"]) -> Float[Array, " texts"]:
    """Mean squared error of student's and teacher's embedding of a text (arXiv 2004.09813)."""
    return jnp.square(student - teacher).mean(1)


def spread_out(embeddings: Float[Array, "texts dim"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Global orthogonal regularisation (GOR, arXiv 1708.06320): embeddings of unrelated texts should be orthogonal.

    M₁² and max(0, M₂ − 1 / dim) of the first two moments of xᵢ·xⱼ over all i ≠ j, as for points spread evenly over the
    sphere. EmbeddingGemma (arXiv 2509.20354) adds the second one of queries and of positives. No [texts, texts] matrix
    exists where texts outnumber dimensions: Σᵢⱼ (xᵢ·xⱼ)² = ‖XᵀX‖².
    """
    texts, dim = embeddings.shape
    lengths = jnp.square(embeddings).sum(1)
    if texts > dim:
        products = jnp.matmul(embeddings.T, embeddings, precision=_HIGHEST)
        first = jnp.square(embeddings.sum(0)).sum() - lengths.sum()
        second = jnp.square(products).sum() - jnp.square(lengths).sum()
    else:
        products = jnp.matmul(embeddings, embeddings.T, precision=_HIGHEST)
        products = jnp.where(jnp.eye(texts, dtype=bool), 0.0, products)
        first, second = products.sum(), jnp.square(products).sum()
    pairs = max(texts * (texts - 1), 1)
    return jnp.square(first / pairs), jnp.maximum(second / pairs - 1 / dim, 0.0)
