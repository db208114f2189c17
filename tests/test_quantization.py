"""`quantize_embeddings` against sentence-transformers' function of that name, bit for bit."""

import logging
from typing import Any, get_args

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import sentence_transformers.util.quantization as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed import InputError, quantize_embeddings
from jaxembed.quantization import Precision

PRECISIONS = get_args(Precision)
BYTES = ("int8", "uint8")
NUMBERS = st.one_of(st.sampled_from([0.0, -0.0, 0.25, -1.0, 1e-40]), st.floats(-4, 4, width=32))


@st.composite
def matrices(draw: st.DrawFn, dim: int, dtype: Any = np.float32) -> np.ndarray:
    """Two vectors or more, often with equal columns."""
    return draw(hnp.arrays(dtype, (draw(st.integers(2, 6)), dim), elements=NUMBERS, fill=st.just(0.5)))


def same(found: np.ndarray, expected: Any) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


@given(st.data(), st.sampled_from(PRECISIONS), st.integers(1, 19), st.sampled_from(["self", "samples", "ranges"]))
@settings(deadline=None)
def test_the_same_bits(data: st.DataObject, precision: Precision, dim: int, calibration: str) -> None:
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    embeddings = data.draw(matrices(dim, dtype))
    options: dict[str, Any] = {}
    if calibration == "samples":
        options["calibration_embeddings"] = data.draw(matrices(dim, dtype))
    elif calibration == "ranges":
        options["ranges"] = np.sort(data.draw(hnp.arrays(np.float64, (2, dim), elements=NUMBERS)), axis=0)
    parts = [embeddings, embeddings[0]] if options or precision not in BYTES else [embeddings]
    for part in parts:
        found = quantize_embeddings(part, precision, **options)
        with np.errstate(over="ignore"):  # it warns where a range is next to nothing
            expected = reference.quantize_embeddings(part, precision, **options)
        same(found, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_many_and_none(precision: Precision, caplog: pytest.LogCaptureFixture) -> None:
    embeddings = np.random.default_rng(0).standard_normal((1000, 100)).astype(np.float32)
    embeddings[:, 7] = 0.125  # a dimension without a range
    same(quantize_embeddings(embeddings, precision), reference.quantize_embeddings(embeddings, precision))
    same(quantize_embeddings(embeddings[:0], precision), reference.quantize_embeddings(embeddings[:0], precision))
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "jaxembed.quantization"):
        quantize_embeddings(embeddings[:99], precision)
    assert [record.name for record in caplog.records] == ["jaxembed.quantization"] * (precision in BYTES)


def test_what_the_numbers_mean() -> None:
    embeddings = np.array([[-100.0, 3.0], [0.5, 3.0], [155.0, 3.0]], np.float32)
    assert quantize_embeddings(embeddings, "uint8").tolist() == [[0, 0], [100, 0], [255, 0]]
    assert quantize_embeddings(embeddings, "int8").tolist() == [[-128, -128], [-28, -128], [127, -128]]
    ranges = np.array([[0, -2], [51, 8.2]], np.float32)
    assert quantize_embeddings(embeddings, "uint8", ranges=ranges).tolist() == [[0, 125], [2, 125], [255, 125]]
    bits = np.array([1, -1, 0, 2, 0, 0, 0, 0, 5], np.float32)
    assert quantize_embeddings(bits, "ubinary").tolist() == [0b10010000, 0b10000000]
    assert quantize_embeddings(bits, "binary").tolist() == [0b10010000 - 128, 0]


ONES = np.ones((2, 8), np.float32)


@pytest.mark.parametrize(
    ("embeddings", "precision", "options", "message"),
    [
        (ONES, "int4", {}, "precision: expected one of float32, int8, uint8, binary, ubinary, found 'int4'"),
        (ONES, None, {}, "precision: .* found None"),
        (ONES.astype(np.int8), "binary", {}, "embeddings: expected float32, found int8"),
        ([[1.0], [1.0, 2.0]], "binary", {}, "embeddings: expected vectors of one width"),
        (ONES[None], "binary", {}, r"embeddings: expected one vector or a matrix, found shape \(1, 2, 8\)"),
        (ONES * np.nan, "uint8", {}, "embeddings: not all numbers are finite, which uint8"),
        (ONES * np.nan, "binary", {}, "embeddings: not all numbers are finite, which binary"),
        (ONES[0] * np.inf, "ubinary", {}, "embeddings: not all numbers are finite, which ubinary"),
        (ONES[:1], "int8", {}, "precision int8: .* from a single embedding; give `ranges`"),
        (ONES[0], "uint8", {}, "precision uint8: .* from a single embedding"),
        (ONES, "int8", {"ranges": ONES[:, :4]}, r"ranges: expected shape \(2, 8\).* found \(2, 4\)"),
        (ONES, "int8", {"ranges": np.stack([ONES[0], -ONES[0]])}, "ranges: expected minima in row 0"),
        (ONES, "int8", {"ranges": ONES * np.nan}, "ranges: expected minima in row 0"),
        (ONES, "int8", {"calibration_embeddings": ONES[:, :4]}, r"expected shape \(samples, 8\), found \(2, 4\)"),
        (ONES, "int8", {"calibration_embeddings": ONES[:0]}, r"calibration_embeddings: .*found \(0, 8\)"),
        (ONES, "int8", {"calibration_embeddings": [["a"]]}, "calibration_embeddings: expected float32"),
        (ONES, "int8", {"calibration_embeddings": ONES * np.nan}, "calibration_embeddings: not all numbers are finite"),
    ],
)
def test_what_is_refused(embeddings: Any, precision: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize_embeddings(embeddings, precision, **options)
