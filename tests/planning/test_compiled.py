"""What the compiler says, read and kept."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxembed.errors import InputError
from jaxembed.planning.compiled import Compiled, compile_program, parse_exhausted, program_hash
from jaxembed.planning.topologies import find_topology
from jaxembed.sharding import make_mesh

V5E = find_topology("v5e-8")


def traced(size: int = 8) -> Any:
    return jax.jit(lambda x: jnp.sin(x) @ x).trace(jax.ShapeDtypeStruct((size, size), jnp.float32))


class Refused:
    """A traced program whose compiler has other ideas."""

    def __init__(self, text: str) -> None:
        self.text = text

    def lower(self) -> "Refused":
        return self

    def as_text(self) -> str:
        return self.text

    def compile(self) -> None:
        raise RuntimeError(self.text)


TEMPORARIES = """RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (48.00G)
exceeds available HBM (15.75G)""".replace("\n", " ")
USED = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.51G of
15.75G hbm. Exceeded hbm capacity by 4.76G.""".replace("\n", " ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TEMPORARIES, (48.0, 15.75)),
        (USED, (20.51, 15.75)),
        ("Used 512.00M of 15.75G hbm", (0.5, 15.75)),
        ("RESOURCE_EXHAUSTED: something else", (None, None)),
    ],
)
def test_what_the_refusal_says(text: str, expected: tuple[float | None, float | None]) -> None:
    assert parse_exhausted(text) == expected


def test_memory_refused_is_a_result_and_the_rest_an_error(tmp_path: Path) -> None:
    mesh = make_mesh()
    found = compile_program(Refused("RESOURCE_EXHAUSTED: Used 20.51G of 15.75G hbm"), V5E, mesh, str(tmp_path))
    assert (found.fits, found.needed, found.limit) == (False, 20.51, 15.75)
    with pytest.raises(InputError, match="the TPU compiler refuses the program: INTERNAL"):
        compile_program(Refused("INTERNAL: no idea"), V5E, mesh, str(tmp_path))


def test_what_was_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh()
    first = compile_program(traced(), V5E, mesh, str(tmp_path))
    assert first.fits
    assert first.arguments == 8 * 8 * 4
    assert first.total >= first.arguments + first.results
    assert len(list(tmp_path.iterdir())) == 1
    again = compile_program(traced(), V5E, mesh, str(tmp_path))
    assert again == first  # the seconds it took, too
    other = program_hash(traced(16).lower(), V5E)
    assert (
        len({other, program_hash(traced().lower(), V5E), program_hash(traced().lower(), find_topology("v6e-8"))}) == 3
    )
    assert dataclasses.replace(again, moved=()) == Compiled(**{**dataclasses.asdict(first), "moved": ()})


@pytest.mark.parametrize("text", ["", "[]", "{", '{"topology": "x", "moved": []}'])
def test_what_was_kept_is_damaged(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    mesh = make_mesh()
    first = compile_program(traced(), V5E, mesh, str(tmp_path))
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    again = compile_program(traced(), V5E, mesh, str(tmp_path))
    assert again.total == first.total
    assert f"{path}: cannot be read" in caplog.text
    assert path.read_text() != text


def test_a_cache_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    refused = Refused("RESOURCE_EXHAUSTED: Used 20.51G of 15.75G hbm")
    assert compile_program(refused, V5E, make_mesh(), str(tmp_path / "file" / "plans")).needed == 20.51
    assert ".json: cannot be kept (" in caplog.text
