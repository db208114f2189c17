"""Embeddings on the disk: killed anywhere, they end as if nothing had happened; nothing stale is ever used."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from jaxembed.errors import InputError
from jaxembed.mining.spool import embed_on_disk

TEXTS = [f"text {number}" for number in range(103)]
KEY = {"model": "a"}


def vectors(texts: list[str]) -> np.ndarray:
    return np.array([[len(text), int(text.split()[1]), 1.0] for text in texts], np.float32)


def embed(work: Path, embed_some=vectors, key=KEY, texts=TEXTS):
    return embed_on_disk(texts, embed_some, work, name="documents", dim=3, key=key, chunk=20, progress=False)


@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, at: int) -> None:
    calls: list[list[str]] = []

    def dies(texts: list[str]) -> np.ndarray:
        if len(calls) == at:
            raise KeyboardInterrupt
        calls.append(texts)
        return vectors(texts)

    with pytest.raises(KeyboardInterrupt):
        embed(tmp_path, dies)
    [directory] = tmp_path.iterdir()
    with open(directory / "embeddings.f32", "ab") as file:
        file.write(b"half a row")  # as a kill in the middle of a write leaves it
    again: list[list[str]] = []
    found = embed(tmp_path, lambda texts: again.append(texts) or vectors(texts))
    assert [text for texts in calls + again for text in texts] == TEXTS
    assert found.shape == (103, 3)
    np.testing.assert_array_equal(found[0:103], vectors(TEXTS))
    np.testing.assert_array_equal(found[97:200], vectors(TEXTS)[97:])
    assert (directory / "embeddings.f32").stat().st_size == 103 * 12


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    embed(tmp_path)
    found = embed(tmp_path, lambda texts: pytest.fail("embedded again"))
    np.testing.assert_array_equal(found[:], vectors(TEXTS))


@pytest.mark.parametrize("change", ["key", "texts"])
def test_another_model_or_other_texts_are_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    embed(tmp_path)
    key, texts = ({"model": "b"}, TEXTS) if change == "key" else (KEY, TEXTS[:50])
    calls = []
    with caplog.at_level(logging.INFO):
        embed(tmp_path, lambda some: calls.append(some) or vectors(some), key, texts)
    assert sum(map(len, calls)) == len(texts)
    assert "are of another model, other texts or another prompt; embedding anew" in caplog.text
    embed(tmp_path, lambda texts: pytest.fail("embedded again"))  # the first ones are still there


@pytest.mark.parametrize("damage", ["cut", "no record", "no JSON", "another key", "no file"])
def test_damage_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    embed(tmp_path)
    [directory] = tmp_path.iterdir()
    file, record = directory / "embeddings.f32", directory / "progress.json"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "no record":
        record.unlink()
    elif damage == "no JSON":
        record.write_text("{")
    elif damage == "another key":
        record.write_text(json.dumps({"done": 103, "key": {}}))
    else:
        file.unlink()
    found = embed(tmp_path)
    np.testing.assert_array_equal(found[:], vectors(TEXTS))
    assert ("damaged; embedding anew" in caplog.text) == (damage != "no record")


def test_a_file_that_was_cut_later_is_an_error(tmp_path: Path) -> None:
    found = embed(tmp_path)
    found.file.write_bytes(found.file.read_bytes()[:-5])
    with pytest.raises(InputError, match="cut since it was written"):
        found[90:103]


def test_embeddings_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    def broken(texts: list[str]) -> np.ndarray:
        return np.where(np.array(texts)[:, None] == "text 31", np.nan, vectors(texts))

    with pytest.raises(InputError, match=r"text 31 \('text 31'\) is not finite"):
        embed(tmp_path, broken)


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="embeddings cannot be written"):
        embed(tmp_path / "file")
