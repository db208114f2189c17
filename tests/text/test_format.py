"""`jaxembed.text.format`: values that refuse nonsense, and formats read from other people's directories."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer import modules

from jaxembed.errors import InputError
from jaxembed.text.format import (
    DEFAULT_TEXT_FORMAT,
    SENTENCE_TRANSFORMERS_POOLING,
    TEXT_FORMAT_FILE,
    UDEVER,
    UDEVER_MARKERS,
    Pooling,
    Role,
    TextFormat,
    read_text_format,
    write_text_format,
)

prefixes = st.builds(Role, prefix=st.text(max_size=9), instruction=st.text(max_size=9))
text_formats = st.builds(
    TextFormat,
    prefixes,
    prefixes,
    st.integers(1, 9999),
    pooling=st.sampled_from(list(SENTENCE_TRANSFORMERS_POOLING)),
    include_prompt=st.booleans(),
    normalize=st.booleans(),
    literal_markers=st.sampled_from(["token", "text"]),
)


def write(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def sentence_transformers_directory(path: Path, pooling: dict, normalize: bool = True, **transformer: object) -> Path:
    modules = ["models.Transformer", "models.Pooling", *(["models.Normalize"] if normalize else [])]
    names = ["", "1_Pooling", "2_Normalize"]
    write(
        path / "modules.json",
        [
            {"idx": index, "name": str(index), "path": names[index], "type": f"sentence_transformers.{module}"}
            for index, module in enumerate(modules)
        ],
    )
    write(path / "1_Pooling" / "config.json", pooling)
    write(path / "sentence_bert_config.json", {"max_seq_length": 77, "do_lower_case": False, **transformer})
    return path


@given(text_formats)
def test_dict_gives_the_value_back(text_format: TextFormat) -> None:
    assert TextFormat.from_dict(json.loads(json.dumps(text_format.to_dict()))) == text_format


@pytest.mark.parametrize("text_format", [DEFAULT_TEXT_FORMAT, UDEVER])
def test_file_gives_the_value_back(tmp_path: Path, text_format: TextFormat) -> None:
    write_text_format(text_format, tmp_path)
    assert read_text_format(tmp_path) == text_format


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_lenght": 3}, "max_lenght"),
        ({"query": {"prefix": 3}}, "query.prefix"),
        ({"document": {"postfix": ""}}, "postfix"),
        ({"document": "passage: "}, "document"),
        ({"max_length": 0}, "max_length"),
        ({"max_length": "12"}, "max_length"),
        ({"pooling": "lasttoken"}, "pooling: expected last, mean, weighted_mean, first, got 'lasttoken'"),
        ({"include_prompt": "no"}, "include_prompt: expected true or false"),
        ({"normalize": "yes"}, "normalize"),
        ({"literal_markers": "drop"}, "literal_markers"),
        ({"query": {"suffix": "[EOQ]"}}, "suffix"),
        (
            {"query": {"suffix": "x"}, "document": {"suffix": "y"}, "include_prompt": False},
            "include_prompt: false does",
        ),
        ([], "mapping"),
    ],
)
def test_nonsense_is_refused_by_name(values: object, named: str) -> None:
    with pytest.raises(InputError, match=named):
        TextFormat.from_dict(values)


def test_the_place_is_named() -> None:
    with pytest.raises(InputError, match=r"^run\.yaml: max_length: .* ≥ 1, got -1$"):
        TextFormat.from_dict({"max_length": -1}, where="run.yaml")


def test_unknown_role() -> None:
    with pytest.raises(InputError, match="passage"):
        UDEVER.role("passage")


def test_udever_markers_in_the_tokenizer(tmp_path: Path) -> None:
    write(tmp_path / "tokenizer.json", {"added_tokens": [{"id": 9, "content": marker} for marker in UDEVER_MARKERS]})
    assert read_text_format(tmp_path) == UDEVER
    write_text_format(DEFAULT_TEXT_FORMAT, tmp_path)
    assert read_text_format(tmp_path) == DEFAULT_TEXT_FORMAT


@pytest.mark.parametrize(
    "pooling",
    [{"pooling_mode": "lasttoken"}, {"pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}],
)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("document", ["document", "passage"])
def test_sentence_transformers_files(tmp_path: Path, pooling: dict, normalize: bool, document: str) -> None:
    path = sentence_transformers_directory(tmp_path, pooling, normalize)
    write(path / "config_sentence_transformers.json", {"prompts": {"query": "q: ", document: "d: "}})
    expected = TextFormat(Role("q: "), Role("d: "), 77, normalize=normalize)
    assert read_text_format(path) == expected


def test_maximum_length_from_the_tokenizer(tmp_path: Path) -> None:
    path = sentence_transformers_directory(tmp_path, {"pooling_mode": "lasttoken"}, max_seq_length=None)
    with pytest.raises(InputError, match="max_length"):
        read_text_format(path)
    write(path / "tokenizer_config.json", {"model_max_length": 1e30})
    with pytest.raises(InputError, match="max_length"):
        read_text_format(path)
    write(path / "tokenizer_config.json", {"model_max_length": 64})
    assert read_text_format(path) == TextFormat(max_length=64)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({}, "mean"),
        ({"pooling_mode": "weightedmean", "pooling_mode_mean_tokens": True}, "weighted_mean"),
        ({"pooling_mode_weightedmean_tokens": True}, "weighted_mean"),
        ({"pooling_mode": "cls"}, "first"),
        ({"pooling_mode_cls_token": True}, "first"),
    ],
)
@pytest.mark.parametrize("include_prompt", [True, False, None])
def test_poolings(tmp_path: Path, config: dict, pooling: Pooling, include_prompt: bool | None) -> None:
    if include_prompt is not None:
        config = {**config, "include_prompt": include_prompt}
    config = {"word_embedding_dimension": 8, **config}
    found = read_text_format(sentence_transformers_directory(tmp_path, config))
    assert (found.pooling, found.include_prompt) == (pooling, include_prompt is not False)
    theirs = modules.Pooling.load(str(tmp_path), subfolder="1_Pooling")
    assert theirs.pooling_mode == SENTENCE_TRANSFORMERS_POOLING[pooling][0]
    assert theirs.include_prompt == found.include_prompt


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"pooling_mode": "max"}, "'max'"),
        ({"pooling_mode_max_tokens": True}, "'max_tokens'"),
        ({"pooling_mode": ["mean", "max"]}, r"'mean\+max'"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}, r"'mean\+lasttoken'"),
    ],
)
def test_other_pooling_is_refused(tmp_path: Path, config: dict, named: str) -> None:
    with pytest.raises(
        InputError, match=rf"1_Pooling.*{named} is not supported; lasttoken, mean, weightedmean, cls are"
    ):
        read_text_format(sentence_transformers_directory(tmp_path, config))


def test_foreign_chat_template_is_refused(tmp_path: Path) -> None:
    path = sentence_transformers_directory(tmp_path, {"pooling_mode": "lasttoken"}, modality_config={"message": {}})
    with pytest.raises(InputError, match="chat template"):
        read_text_format(path)


def test_foreign_module_is_refused(tmp_path: Path) -> None:
    path = sentence_transformers_directory(tmp_path, {"pooling_mode": "lasttoken"})
    write(path / "modules.json", [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}])
    with pytest.raises(InputError, match="Dense"):
        read_text_format(path)


def test_nothing_found_says_how_to_give_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="text_format"):
        read_text_format(tmp_path)


def test_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / TEXT_FORMAT_FILE).write_text("{")
    with pytest.raises(InputError, match=TEXT_FORMAT_FILE):
        read_text_format(tmp_path)
