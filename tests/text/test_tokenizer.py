"""`jaxembed.text.tokenizer` against transformers' fast tokenizer, and the promises of its own.

That exported models get the same ids in sentence-transformers is tested in `tests/checkpoint/test_export.py`.
"""

import dataclasses
import inspect
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from jaxembed.errors import InputError
from jaxembed.text.format import DEFAULT_TEXT_FORMAT, ROLES, UDEVER, UDEVER_MARKERS, Role, RoleName, TextFormat
from jaxembed.text.tokenizer import TextTokenizer, train_byte_level_bpe, with_end_token, with_markers

TEXTS = [Path(dataclasses.__file__).read_text(), Path(np.__file__).read_text(), "größe naïve 排序 🎉"]
BPE = train_byte_level_bpe(TEXTS, 600)
SPLIT = train_byte_level_bpe(TEXTS, 600, split_identifiers=True)
MARKED = with_markers(BPE, UDEVER_MARKERS)
PREFIXES = dataclasses.replace(DEFAULT_TEXT_FORMAT, max_length=16)
MARKERS = dataclasses.replace(UDEVER, max_length=16)
PREFIX_TOKENIZER = TextTokenizer(MARKED, PREFIXES)
MARKER_TOKENIZER = TextTokenizer(MARKED, MARKERS)

texts = st.lists(st.text(max_size=40) | st.sampled_from(["[EOQ] </s>", " [BOD]", "a" * 99, "\n", "  "]), max_size=4)
roles = st.sampled_from(ROLES)
COMMON = st.characters(max_codepoint=0xFFFF, exclude_categories=["Cn", "Cs"])  # alike in all versions of Unicode


def transformers_ids(text: str, max_length: int, add_special_tokens: bool) -> list[int]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=MARKED, model_max_length=max_length)
    return tokenizer(text, truncation=True, add_special_tokens=add_special_tokens)["input_ids"]


@given(texts, roles)
@settings(max_examples=50, deadline=None)
def test_prefixes_and_end_token(texts: list[str], role: RoleName) -> None:
    prefix = PREFIXES.role(role).prefix
    expected = [transformers_ids(prefix + text, 16, True) for text in texts]
    assert [ids.tolist() for ids in PREFIX_TOKENIZER(texts, role)] == expected


@given(texts, roles)
@settings(max_examples=50, deadline=None)
def test_udever_is_truncation_to_one_less_and_the_end_marker(texts: list[str], role: RoleName) -> None:
    prefix, suffix = MARKERS.role(role).prefix, MARKED.token_to_id(MARKERS.role(role).suffix)
    expected = [[*transformers_ids(prefix + text, 15, False), suffix] for text in texts]
    assert [ids.tolist() for ids in MARKER_TOKENIZER(texts, role)] == expected


@given(texts, roles, st.sampled_from([PREFIXES, MARKERS]), st.sampled_from(["token", "text"]))
@settings(max_examples=50, deadline=None)
def test_lengths_and_ends(texts: list[str], role: RoleName, text_format: TextFormat, literal_markers: str) -> None:
    tokenizer = TextTokenizer(MARKED, dataclasses.replace(text_format, literal_markers=literal_markers))  # pyright: ignore[reportArgumentType]
    end = MARKED.token_to_id(text_format.role(role).suffix or "</s>")
    for ids in tokenizer(texts, role):
        assert ids.dtype == np.int32
        assert 1 <= len(ids) <= text_format.max_length
        assert ids[-1] == end


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "text_format",
    [
        PREFIXES,
        MARKERS,
        TextFormat(Role("[BOQ]", instruction="Find: "), Role("[BOD]"), 16),
        TextFormat(Role("[BOQ]", "[EOQ]", "Find: "), Role("[BOD]", "[EOD]"), 16),
    ],
)
def test_literal_markers_stay_text(text_format: TextFormat, role: RoleName, special: bool) -> None:
    marked = tokenizers.Tokenizer.from_str(BPE.to_str())
    (marked.add_special_tokens if special else marked.add_tokens)(list(UDEVER_MARKERS))
    as_text = TextTokenizer(marked, dataclasses.replace(text_format, literal_markers="text"))
    as_token = TextTokenizer(marked, text_format)
    plain = ["", " x", "sort a dict", "long text " * 9]
    assert [ids.tolist() for ids in as_text(plain, role)] == [ids.tolist() for ids in as_token(plain, role)]
    # An added token that is neither special nor the format's, such as a run of spaces, is none to be kept from texts.
    around = str(text_format)
    markers = [marker for marker in UDEVER_MARKERS if special or marker in around]
    text = f"x{''.join(markers)}</s>"
    [empty], [ids] = as_text([""], role), as_text([text], role)
    control = {marked.token_to_id(marker) for marker in (*UDEVER_MARKERS, "</s>")}
    assert [id for id in ids.tolist() if id in control] == [id for id in empty.tolist() if id in control]
    written = "".join(str(marked.id_to_token(id)) for id in ids.tolist() if id not in control).replace("Ġ", " ")
    assert (text_format.role(role).prompt.rpartition("]")[2] + text).startswith(written)
    assert len(written) > 8


def test_a_beginning_token_of_the_post_processor_stays_first() -> None:
    tokenizer = with_markers(BPE, UDEVER_MARKERS)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    text_format = TextFormat(Role("[BOQ]"), Role("[BOD]"), 8, literal_markers="text")
    [ids] = TextTokenizer(tokenizer, text_format)(["x" * 30], "query")
    assert [*ids[:2], ids[-1]] == [1, tokenizer.token_to_id("[BOQ]"), 2]
    assert len(ids) == 8


def test_texts_are_not_stripped() -> None:
    for tokenizer in (PREFIX_TOKENIZER, MARKER_TOKENIZER):
        ids = [tuple(each) for each in tokenizer(["x", " x", "x ", "x\n", "\tx"], "query")]
        assert len(set(ids)) == 5


def test_bad_texts_are_named_by_index() -> None:
    tokenize = inspect.unwrap(TextTokenizer.__call__)  # beartype, which the tests put before it, would refuse first
    with pytest.raises(InputError, match=r"texts\[1\].*NoneType"):
        tokenize(PREFIX_TOKENIZER, ["x", None], "query")
    with pytest.raises(InputError, match=r"texts\[2\].*Unicode"):
        tokenize(PREFIX_TOKENIZER, ["x", "y", "\ud800"], "query")
    with pytest.raises(InputError, match="list"):
        tokenize(PREFIX_TOKENIZER, "x", "query")
    with pytest.raises(InputError, match="passage"):
        tokenize(PREFIX_TOKENIZER, ["x"], "passage")


def test_end_is_asked_for_and_can_be_added() -> None:
    without = tokenizers.Tokenizer.from_str(BPE.to_str())
    without.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    with pytest.raises(InputError, match="with_end_token"):
        TextTokenizer(without, PREFIXES)
    added = TextTokenizer(with_end_token(without, "</s>"), PREFIXES)
    assert [ids.tolist() for ids in added(["a b"], "query")] == [
        ids.tolist() for ids in PREFIX_TOKENIZER(["a b"], "query")
    ]
    with pytest.raises(InputError, match="<end>"):
        with_end_token(without, "<end>")
    with pytest.raises(InputError, match=r"\[EOQ\].*with_markers"):
        TextTokenizer(BPE, MARKERS)


def test_maximum_length_leaves_room() -> None:
    with pytest.raises(InputError, match="max_length"):
        TextTokenizer(MARKED, dataclasses.replace(UDEVER, max_length=2))
    [ids] = TextTokenizer(MARKED, dataclasses.replace(UDEVER, max_length=3))(["abc"], "query")
    assert len(ids) == 3


def test_the_given_tokenizer_is_left_alone() -> None:
    given_tokenizer = tokenizers.Tokenizer.from_str(MARKED.to_str())
    given_tokenizer.enable_truncation(3)
    given_tokenizer.enable_padding(length=50)
    before = given_tokenizer.to_str()
    tokenizer = TextTokenizer(given_tokenizer, MARKERS)
    assert [len(ids) for ids in tokenizer(["", "a" * 99], "document")] == [2, 16]
    assert given_tokenizer.to_str() == before
    assert tokenizer.tokenizer.truncation is None
    assert tokenizer.tokenizer.padding is None


def test_directory_gives_the_tokenizer_back(tmp_path: Path) -> None:
    MARKER_TOKENIZER.save(tmp_path)
    again = TextTokenizer.from_directory(tmp_path)
    assert again.text_format == MARKERS
    assert again.fingerprint == MARKER_TOKENIZER.fingerprint != PREFIX_TOKENIZER.fingerprint
    assert TextTokenizer.from_file(tmp_path / "tokenizer.json", PREFIXES).fingerprint == PREFIX_TOKENIZER.fingerprint
    assert (again.vocab_size, again.pad_id) == (604, 3)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": {"content": "</s>"}}')
    assert TextTokenizer.from_directory(tmp_path).pad_id == 2


def test_missing_and_broken_tokenizer_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        TextTokenizer.from_directory(tmp_path, PREFIXES)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer"):
        TextTokenizer.from_directory(tmp_path, PREFIXES)


def test_trained_bpe() -> None:
    assert [BPE.token_to_id(token) for token in ("<unk>", "<s>", "</s>", "<pad>")] == [0, 1, 2, 3]
    assert BPE.get_vocab_size() == 600
    assert BPE.to_str() == train_byte_level_bpe(TEXTS, 600).to_str()
    text = " def ƒ(x):\n\treturn '排序 🎉 unseen Ж'\x00"
    ids = BPE.encode(text).ids
    assert ids[-1] == 2
    assert 0 not in ids
    assert BPE.decode(ids) == text
    with pytest.raises(InputError, match="260"):
        train_byte_level_bpe(TEXTS, 259)


def test_split_identifiers_gives_a_word_the_same_tokens_everywhere() -> None:
    def ids(text: str) -> list[int]:
        return SPLIT.encode(text, add_special_tokens=False).ids

    def of_words(text: str) -> list[int]:
        return [token for word in text.split() for token in ids(word)]

    for text in (" Read\n\tHTTP  header ", "_read_http_header", "readHTTPHeader", "ReadHttpHeader"):
        assert ids(text) == of_words("read http header"), text
    assert ids("def größe2Max(x):") == of_words("def größe 2 max ( x ):")
    assert SPLIT.encode(" \n_ ").ids == [2]
    assert SPLIT.decode(ids("def Größe_排序 ('🎉')\x00")) == "defgröße排序('🎉')\x00"
    assert SPLIT.to_str() == train_byte_level_bpe(TEXTS, 600, split_identifiers=True).to_str()


@given(st.text(COMMON, max_size=60) | st.from_regex(r"([A-Za-z]{1,4}[0-9_ ]?){1,9}", fullmatch=True))
@settings(max_examples=100, deadline=None)
def test_split_identifiers_against_reading_character_by_character(text: str) -> None:
    """Cut where the case rises or the kind of character changes; spaces and underscores alone are lost."""

    def category(character: str) -> str:
        return unicodedata.category(character) if character else ""

    def kind(character: str) -> str:
        return {"L": "word", "M": "word"}.get(category(character)[:1], "other")

    pieces, before = [], " "
    for character, after in zip(text, [*text[1:], ""]):
        previous, here = category(before), category(character)
        acronym_ends = previous == "Lu" and category(after) == "Ll"
        rises = here == "Lu" and (previous == "Ll" or previous[0] == "N" or acronym_ends)
        if not _lost(character):
            number = here[0] == "N" or previous[0] == "N"
            if _lost(before) or rises or number or kind(character) != kind(before):
                pieces.append("")
            pieces[-1] += character
        before = character
    found = SPLIT.pre_tokenizer.pre_tokenize_str(SPLIT.normalizer.normalize_str(text))
    assert [SPLIT.decoder.decode([piece]) for piece, _ in found] == ["".join(map(str.lower, piece)) for piece in pieces]


def _lost(character: str) -> bool:
    return character == "_" or (character.isspace() and character not in "\x1c\x1d\x1e\x1f")


@given(texts, roles)
@settings(max_examples=50, deadline=None)
def test_split_identifiers_is_read_by_transformers(texts: list[str], role: RoleName) -> None:
    with tempfile.TemporaryDirectory() as directory:
        TextTokenizer(SPLIT, PREFIXES).save(directory)
        theirs = PreTrainedTokenizerFast(tokenizer_file=f"{directory}/tokenizer.json", model_max_length=16)
        ours = TextTokenizer.from_directory(directory)
    expected = [theirs(PREFIXES.role(role).prefix + text, truncation=True)["input_ids"] for text in texts]
    assert [ids.tolist() for ids in ours(texts, role)] == expected
    assert all(0 not in ids for ids in expected)
