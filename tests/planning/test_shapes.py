"""Released shapes by name: their numbers of parameters are those of the checkpoints on the hub."""

import pytest

from jaxembed.checkpoint.pretrained import abstract_decoder
from jaxembed.config import ModelConfig
from jaxembed.errors import InputError
from jaxembed.planning.shapes import RELEASED, decoder_shape
from jaxembed.training.filters import count

PARAMETERS = {
    "560m": 559_214_592,
    "1b1": 1_065_314_304,
    "1b7": 1_722_408_960,
    "3b": 3_002_557_440,
    "7b1": 7_069_016_064,
}


@pytest.mark.parametrize("name", [name for name in RELEASED if name.startswith("bigscience")])
def test_parameters(name: str) -> None:
    family, shape = decoder_shape(ModelConfig(path=name))
    assert count(abstract_decoder(family, shape)[1]) == PARAMETERS[name.rpartition("-")[2]]


def test_udever_has_the_shape_of_its_base() -> None:
    for size in ("560m", "1b1", "3b", "7b1"):
        assert RELEASED[f"izhx/udever-bloom-{size}"] == RELEASED[f"bigscience/bloom-{size}"]
    assert not decoder_shape(ModelConfig(path="izhx/udever-bloom-560m", attention="bidirectional"))[1].causal


def test_others_have_to_be_here() -> None:
    with pytest.raises(InputError, match=r"model.path: .*A plan downloads nothing; known by name are bigscience"):
        decoder_shape(ModelConfig(path="./no-such-directory"))
