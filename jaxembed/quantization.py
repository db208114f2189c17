"""Embeddings in a byte or a bit a number, bit for bit as sentence-transformers' `quantize_embeddings` gives them."""

import logging
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Num

from jaxembed.errors import InputError

logger = logging.getLogger(__name__)

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]

_STEPS = 255  # from the lowest level of a byte to the highest
_ENOUGH = 100  # embeddings whose ranges are taken without a warning, as in sentence-transformers


def quantize_embeddings(
    embeddings: Float[np.ndarray, "*texts dim"],
    precision: Precision,
    ranges: Float[np.ndarray, "2 dim"] | None = None,
    calibration_embeddings: Float[np.ndarray, "samples dim"] | None = None,
) -> Num[np.ndarray, "*texts width"]:
    """Stores embeddings in a quarter (int8, uint8) or a 32nd (binary, ubinary) of their memory.

    - uint8: each dimension's range is cut into 255 equal steps, and a number becomes the count of whole steps below it;
      numbers outside the range become 0 and 255. A dimension that is constant gets steps of 1.
    - int8: the same minus 128.
    - ubinary: a bit a dimension, set where the number is positive; eight to a byte, the first in the highest bit. A
      dimension that is no multiple of 8 is filled with zeros: `width` is `dim / 8`, rounded up.
    - binary: the same bytes minus 128, as int8.

    Args:
        embeddings: the vectors of any number of texts, or one vector.
        ranges: for int8 and uint8, each dimension's minimum in row 0 and maximum in row 1.
        calibration_embeddings: where there are no `ranges`, those of these embeddings; by default those of `embeddings`
            themselves, which is stable for many only. Vectors quantised in several calls are comparable only with the
            same ranges.

    Returns:
        float32, int8, uint8, int8, uint8, in the order of `Precision`.

    Raises:
        InputError: another precision, not floating-point vectors, for all but float32 not finite, ranges or calibration
            embeddings of another width, calibration embeddings that are not finite, or ranges to be taken from a
            single embedding.
    """
    if precision not in get_args(Precision):
        raise InputError(f"precision: expected one of {', '.join(get_args(Precision))}, found {precision!r}")
    embeddings = _floats("embeddings", embeddings)
    if embeddings.ndim not in (1, 2):
        raise InputError(f"embeddings: expected one vector or a matrix, found shape {embeddings.shape}")
    if precision == "float32":
        return embeddings.astype(np.float32)
    if not np.isfinite(embeddings).all():
        raise InputError(f"embeddings: not all numbers are finite, which {precision} cannot hold")
    if precision in ("binary", "ubinary"):
        unsigned = np.packbits(embeddings > 0, axis=-1)
    else:
        low, high = _ranges(embeddings, precision, ranges, calibration_embeddings)
        step = (high - low) / _STEPS
        step = np.where(step == 0, 1, step)
        with np.errstate(over="ignore"):  # of a range of next to nothing: the last level all the same
            levels = (embeddings - low) / step
        np.floor(levels, out=levels)  # in place: embeddings may fill much of the memory
        unsigned = np.clip(levels, 0, _STEPS, out=levels).astype(np.uint8)
    if precision in ("uint8", "ubinary"):
        return unsigned
    return (unsigned ^ 0x80).view(np.int8)  # minus 128, in two's complement


def _ranges(embeddings: np.ndarray, precision: str, ranges: Any, calibration_embeddings: Any) -> np.ndarray:
    """Minima and maxima of the dimensions, float32 `[2, dim]`."""
    dim = embeddings.shape[-1]
    if ranges is not None:
        ranges = _floats("ranges", ranges)
        if ranges.shape != (2, dim):
            raise InputError(f"ranges: expected shape (2, {dim}), minima and maxima, found {ranges.shape}")
        if not (ranges[0] <= ranges[1]).all():  # also where one is NaN
            raise InputError("ranges: expected minima in row 0 and maxima in row 1, found a minimum above its maximum")
        return ranges.astype(np.float32)
    if calibration_embeddings is not None:
        samples = _floats("calibration_embeddings", calibration_embeddings)
        if samples.ndim != 2 or samples.shape[1] != dim or not len(samples):
            raise InputError(f"calibration_embeddings: expected shape (samples, {dim}), found {samples.shape}")
        if not np.isfinite(samples).all():
            raise InputError("calibration_embeddings: not all numbers are finite, so that they have no range")
    elif embeddings.ndim == 1 or len(embeddings) == 1:
        raise InputError(
            f"precision {precision}: the ranges of the dimensions cannot be taken from a single embedding; give "
            "`ranges` or `calibration_embeddings`"
        )
    elif not len(embeddings):
        return np.zeros((2, dim), np.float32)
    else:
        samples = embeddings
        if len(samples) < _ENOUGH:
            message = "%s ranges taken from %d embeddings; `calibration_embeddings` of more make them stable"
            logger.warning(message, precision, len(samples))
    return np.stack([samples.min(axis=0), samples.max(axis=0)]).astype(np.float32)


def _floats(name: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise InputError(f"{name}: expected vectors of one width: {error}") from None
    if array.dtype.kind != "f":
        raise InputError(f"{name}: expected float32, found {array.dtype}")
    return array
