"""Texts to token ids in a text format, exactly as sentence-transformers tokenises for the exported model."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Int
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxembed.errors import InputError
from jaxembed.text.format import ROLES, Role, RoleName, TextFormat, read_json, read_text_format, write_text_format

BLOOM_SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

_CASE_CHANGE = r"(?<=[\p{Ll}\p{N}])(?=\p{Lu})|(?<=\p{Lu})(?=\p{Lu}\p{Ll})"
_WORDS = r"[\p{L}\p{M}]+|\p{N}|[^\p{L}\p{M}\p{N}]+"


class TextTokenizer:
    """A tokenizer with a text format: texts and a role in, token ids out.

    Attributes:
        text_format: the format; not to be changed.
        special_tokens: the tokens of the tokenizer that have a purpose, by transformers' names ("pad_token", …).
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        text_format: TextFormat,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """Copies `tokenizer`; its own truncation and padding settings are dropped.

        Args:
            special_tokens: default: those of BLOOM that are in the vocabulary.

        Raises:
            InputError: the text format asks for tokens that the tokenizer does not have, or nothing ends a sequence.
        """
        own = _copy(tokenizer)
        own.no_truncation()
        own.no_padding()
        if special_tokens is None:
            special_tokens = {name: token for name, token in BLOOM_SPECIAL_TOKENS.items() if token in _added(own)}
        self.text_format = text_format
        self.special_tokens = dict(special_tokens)
        self._json = own.to_str()
        for name in ROLES:
            _check_end(own, text_format.role(name), name)
            _check_room(own, text_format, name)
        plan = _plan_literal_text if text_format.literal_markers == "text" else _plan
        self._plans = {name: plan(own, text_format, name) for name in ROLES}

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str], text_format: TextFormat | None = None) -> TextTokenizer:
        """The tokenizer of a model's directory, in the text format of that directory unless another is given.

        Raises:
            InputError: no tokenizer.json, or no text format (see `read_text_format`).
        """
        path = epath.Path(directory)
        if text_format is None:
            text_format = read_text_format(path)
        return cls(load_tokenizer(path / "tokenizer.json"), text_format, _read_special_tokens(path))

    @classmethod
    def from_file(cls, tokenizer_json: str | os.PathLike[str], text_format: TextFormat) -> TextTokenizer:
        """The tokenizer in a `tokenizer.json`."""
        return cls(load_tokenizer(tokenizer_json), text_format)

    def __call__(self, texts: Sequence[str], role: RoleName) -> list[Int[np.ndarray, " length"]]:
        """Token ids of each text, int32, 1 to `max_length` of them, the last one the end token.

        Nothing is stripped or normalised beyond what the tokenizer itself does.

        Raises:
            InputError: something in `texts` is not a text; the message gives its index.
        """
        self.text_format.role(role)  # refuses an unknown name
        if isinstance(texts, str):
            raise InputError("texts: expected a list of strings, got one string")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"texts[{index}]: expected a string, got {type(text).__name__}: {text!r:.80}")
        return self._plans[role].encode(texts)

    def with_format(self, text_format: TextFormat) -> TextTokenizer:
        """The same tokenizer in another text format; raises as the constructor does."""
        return TextTokenizer(self.tokenizer, text_format, self.special_tokens)

    def skipped(self, role: RoleName) -> int:
        """How many leading tokens of every sequence pooling leaves out; 0 where it includes the prompt.

        As sentence-transformers counts them (`Transformer._get_prompt_length`): the prompt's tokens where it stands
        alone, what the post-processor puts before it included. Where the tokenizer joins the prompt's end with the
        text's beginning the border may be off by a token, there and here.
        """
        if self.text_format.include_prompt or not self.text_format.role(role).prompt:
            return 0
        return len(self._plans[role].encode([""])[0]) - 1

    @functools.cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer without text format, truncation and padding; a copy that `self` does not use."""
        return tokenizers.Tokenizer.from_str(self._json)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over tokenizer and text format: equal fingerprints give equal ids."""
        text_format = json.dumps(self.text_format.to_dict(), sort_keys=True)
        return hashlib.sha256(f"{self._json}\n{text_format}".encode()).hexdigest()

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def pad_id(self) -> int:
        """Id of the padding token; 0 where the tokenizer has none (padding is masked, any id will do)."""
        token = self.special_tokens.get("pad_token")
        return (self.tokenizer.token_to_id(token) if token else None) or 0

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` and `jaxembed_text_format.json` into the directory."""
        (epath.Path(directory) / "tokenizer.json").write_bytes(self._json.encode())
        write_text_format(self.text_format, directory)


def load_tokenizer(tokenizer_json: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """Reads a `tokenizer.json`.

    Raises:
        InputError: there is no such file, or it is no tokenizer.
    """
    path = epath.Path(tokenizer_json)
    try:
        return tokenizers.Tokenizer.from_str(path.read_bytes().decode())
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file. Only fast tokenizers can be read; write one with transformers: "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        ) from None
    except Exception as error:  # the tokenizers library raises bare Exception
        raise InputError(f"{path}: not a tokenizer.json: {error}") from error


def with_end_token(tokenizer: tokenizers.Tokenizer, token: str) -> tokenizers.Tokenizer:
    """A copy whose post-processor ends every sequence with `token`, whatever it does besides.

    Raises:
        InputError: the tokenizer has no such token.
    """
    tokenizer = _copy(tokenizer)
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise InputError(f"end token {token!r}: the tokenizer has no such token")
    end = processors.TemplateProcessing(single=f"$A {token}", special_tokens=[(token, token_id)])
    original = tokenizer.post_processor
    tokenizer.post_processor = end if original is None else processors.Sequence([original, end])
    return tokenizer


def with_markers(tokenizer: tokenizers.Tokenizer, markers: Sequence[str]) -> tokenizers.Tokenizer:
    """A copy that has the markers as special tokens; new ones take the next free ids."""
    tokenizer = _copy(tokenizer)
    tokenizer.add_special_tokens(list(markers))
    return tokenizer


def train_byte_level_bpe(
    texts: Iterable[str], vocab_size: int, split_identifiers: bool = False
) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer with BLOOM's conventions, trained on texts; equal texts give equal tokenizers.

    Ids 0 to 3 are `<unk> <s> </s> <pad>`, no space is put before a text, and every sequence ends with `</s>`.

    Args:
        split_identifiers: words are lower-cased, `camelCase` and `snake_case` are cut into their parts, digits stand
            alone, and spaces and underscores are dropped, so that a word has the same tokens wherever it stands: in a
            sentence, at the start of a line, inside an identifier. Lossy: decoding gives neither case nor spaces back.

    Raises:
        InputError: `vocab_size` has no room for the four special tokens and the 256 bytes.
    """
    special = list(BLOOM_SPECIAL_TOKENS.values())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(special) + len(alphabet):
        raise InputError(f"vocab_size: expected at least {len(special) + len(alphabet)}, got {vocab_size}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if split_identifiers:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Replace(Regex(_CASE_CHANGE), " "), normalizers.Lowercase()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"[\s_]+"), "removed"),
                pre_tokenizers.Split(Regex(_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return with_end_token(tokenizer, BLOOM_SPECIAL_TOKENS["eos_token"])


@dataclass(frozen=True)
class _Plan:
    """How the texts of one role become ids.

    `before + text + after` goes through the encoder, which truncates. Then `head` is inserted after the `lead` ids that
    the post-processor puts first, and `end`, if there is one, takes the last place (`append`: a new place).
    """

    encoder: tokenizers.Tokenizer
    before: str
    after: str
    post_process: bool
    end: int | None
    append: bool = False
    head: tuple[int, ...] = ()
    lead: int = 0

    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, " length"]]:
        sequences = [self.before + text + self.after for text in texts]
        try:
            encodings = self.encoder.encode_batch_fast(sequences, add_special_tokens=self.post_process)
        except TypeError:
            _refuse_surrogates(texts)
            raise
        return [self._ids(encoding.ids) for encoding in encodings]

    def _ids(self, ids: list[int]) -> Int[np.ndarray, " length"]:
        if self.head:
            ids[self.lead : self.lead] = self.head
        if self.append and self.end is not None:
            ids.append(self.end)
        elif self.end is not None:
            ids[-1] = self.end  # truncation may have cut it off
        return np.asarray(ids, np.int32)


def _plan(tokenizer: tokenizers.Tokenizer, text_format: TextFormat, name: RoleName) -> _Plan:
    """Markers in texts become tokens. Sets the truncation of `tokenizer`: a copy of BLOOM's would take a second."""
    role = text_format.role(name)
    tokenizer.enable_truncation(text_format.max_length)
    end = tokenizer.token_to_id(role.suffix) if role.suffix else None
    return _Plan(tokenizer, role.prompt, role.suffix, post_process=not role.suffix, end=end)


def _plan_literal_text(tokenizer: tokenizers.Tokenizer, text_format: TextFormat, name: RoleName) -> _Plan:
    """Markers in texts stay text: the prompt up to its last marker is put in as ids, and so is the suffix."""
    role = text_format.role(name)
    around = [part for each in (text_format.query, text_format.document) for part in (each.prompt, each.suffix)]
    special = {
        content
        for content, token in _added(tokenizer).items()
        if token.special or any(content in part for part in around)
    }
    cut = max((role.prompt.rfind(token) + len(token) for token in special if token in role.prompt), default=0)
    head = tokenizer.encode(role.prompt[:cut], add_special_tokens=False).ids
    lead = tokenizer.encode("a", add_special_tokens=not role.suffix).special_tokens_mask.index(0)
    encoder = _with_special(tokenizer, special)
    encoder.enable_truncation(text_format.max_length - len(head) - bool(role.suffix))
    encoder.encode_special_tokens = True
    end = tokenizer.token_to_id(role.suffix) if role.suffix else None
    return _Plan(encoder, role.prompt[cut:], "", not role.suffix, end, append=True, head=tuple(head), lead=lead)


def _check_end(tokenizer: tokenizers.Tokenizer, role: Role, name: str) -> None:
    if role.suffix:
        token = _added(tokenizer).get(role.suffix)
        if token is None:
            raise InputError(
                f"text format: {name}.suffix: {role.suffix!r} is not among the tokenizer's added tokens "
                f"({', '.join(_added(tokenizer)) or 'it has none'}); add it with jaxembed.text.tokenizer.with_markers"
            )
        if token.lstrip or token.single_word:
            raise InputError(f"text format: {name}.suffix: {role.suffix!r} would change the text before it: {token}")
    elif tokenizer.encode("a").special_tokens_mask[-1:] != [1]:
        raise InputError(
            f"text format: {name}: nothing ends a sequence: there is no suffix, and the tokenizer's post-processor "
            "adds no end token. Name an added token as suffix of both roles, or give the tokenizer an end token with "
            'jaxembed.text.tokenizer.with_end_token(tokenizer, "</s>")'
        )


def _check_room(tokenizer: tokenizers.Tokenizer, text_format: TextFormat, name: RoleName) -> None:
    role = text_format.role(name)
    fixed = len(tokenizer.encode(role.prompt + role.suffix, add_special_tokens=not role.suffix).ids)
    if fixed >= text_format.max_length:
        raise InputError(
            f"text format: max_length: {text_format.max_length} tokens leave no room for a text: what stands around it "
            f"as a {name} takes {fixed}"
        )


def _copy(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(tokenizer.to_str())


def _added(tokenizer: tokenizers.Tokenizer) -> dict[str, tokenizers.AddedToken]:
    return {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}


def _with_special(tokenizer: tokenizers.Tokenizer, contents: set[str]) -> tokenizers.Tokenizer:
    """A copy in which these added tokens are special: only special ones can be switched off."""
    values = json.loads(tokenizer.to_str())
    for token in values["added_tokens"]:
        token["special"] = token["special"] or token["content"] in contents
    return tokenizers.Tokenizer.from_str(json.dumps(values))


def _read_special_tokens(path: epath.Path) -> dict[str, str] | None:
    file = path / "tokenizer_config.json"
    if not file.exists():
        return None
    config = read_json(file)
    found = {}
    for name in BLOOM_SPECIAL_TOKENS:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found or None


def _refuse_surrogates(texts: Sequence[str]) -> None:
    for index, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"texts[{index}]: not valid Unicode: {error}") from None
