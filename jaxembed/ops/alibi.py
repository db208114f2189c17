"""ALiBi (arXiv 2108.12409): a penalty on attention that grows with distance, of a slope per head."""

import math

import numpy as np
from jaxtyping import Float


def alibi_slopes(heads: int) -> Float[np.ndarray, " heads"]:
    """Slopes of BLOOM, float32: powers of one base; where `heads` is no power of two, odd powers of a second one.

    Source: `build_alibi_tensor` of transformers' modeling_bloom.py.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = np.float32(2 ** (-(2 ** -(math.log2(power) - 3)))) ** np.arange(1, 1 + power, dtype=np.float32)
    if power != heads:
        base = np.float32(2 ** (-(2 ** -(math.log2(2 * power) - 3))))
        slopes = np.concatenate([slopes, base ** np.arange(1, 1 + 2 * (heads - power), 2, dtype=np.float32)])
    return slopes.astype(np.float32)
