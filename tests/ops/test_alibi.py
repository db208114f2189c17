"""ALiBi's slopes against the paper's and transformers'."""

import numpy as np
import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from jaxembed.ops.alibi import alibi_slopes


@pytest.mark.parametrize("heads", [*range(1, 34), 71, 112])
def test_slopes_are_those_of_transformers(heads: int) -> None:
    at_one = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    np.testing.assert_allclose(alibi_slopes(heads), at_one, rtol=2e-7)
    assert alibi_slopes(heads).dtype == np.float32


def test_slopes_of_the_paper() -> None:
    """Section 3 of arXiv 2108.12409: 1/2, 1/4, … 1/256 for eight heads."""
    np.testing.assert_array_equal(alibi_slopes(8), 0.5 ** np.arange(1, 9))
