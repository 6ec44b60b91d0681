"""Text to token ids and back: a small character tokenizer, and any tokenizer.json.

What it is: two frozen classes with the same members (encode, decode, vocab_size, stop_token_ids,
pad_token_id), chosen by TokenizerConfig. What it is not: chat templates (see DataConfig.template)
or training of tokenizers. Neither class ever adds tokens on its own, so the ids of a prompt and of
its response concatenate without a seam.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Literal

import tokenizers

from jaxrl_llm.data.tasks import ALPHABET

UNKNOWN_TEXT = "\ufffd"
"""What an id outside the vocabulary decodes to: models pad their vocabulary and sample there."""


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer, and which of its tokens end a response."""

    # "character": one token per character of `alphabet`; "file": a Hugging Face tokenizer.json.
    kind: Literal["character", "file"] = "character"
    # character: the characters in id order; ids 0 and 1 are taken by padding and stop.
    alphabet: str = ALPHABET
    # file: path of the tokenizer.json.
    path: str = ""
    # file: tokens that end a response, such as "<|im_end|>" "<|endoftext|>"; the first one ends
    # demonstrations.
    stop_tokens: tuple[str, ...] = ()
    # file: token that fills padding (never trained on); empty takes the first stop token.
    pad_token: str = ""

    def __post_init__(self) -> None:
        if self.kind == "character" and (
            not self.alphabet or len(set(self.alphabet)) != len(self.alphabet)
        ):
            raise ValueError(
                f"tokenizer alphabet is {self.alphabet!r}; give each character exactly once"
            )
        if self.kind == "file" and not self.path:
            raise ValueError("tokenizer path is empty; give the path of a tokenizer.json")
        if self.kind == "file" and not self.stop_tokens:
            raise ValueError(
                "tokenizer stop_tokens is empty; name the tokens that end a response, "
                'for example "<|im_end|>"'
            )


@dataclasses.dataclass(frozen=True)
class CharacterTokenizer:
    """One token per character; id 0 is padding, id 1 ends a response, characters follow."""

    alphabet: str
    pad_token_id: int = 0
    stop_token_ids: tuple[int, ...] = (1,)

    @property
    def vocab_size(self) -> int:
        """Number of ids, padding and stop included."""
        return len(self.alphabet) + 2

    def encode(self, text: str) -> list[int]:
        """Ids of the characters; ValueError for a character outside the alphabet."""
        strangers = sorted(set(text) - set(self.alphabet))
        if strangers:
            raise ValueError(
                f"text {_shortened(text)} has characters {strangers} outside the tokenizer's "
                f"alphabet {self.alphabet!r}; add them to the alphabet or take another tokenizer"
            )
        return [self.alphabet.index(character) + 2 for character in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids: padding and stop ids give nothing, ids outside the range U+FFFD."""
        characters = ("", "", *self.alphabet)
        return "".join(
            characters[token] if 0 <= token < len(characters) else UNKNOWN_TEXT
            for token in token_ids
        )


@dataclasses.dataclass(frozen=True)
class FileTokenizer:
    """A tokenizer.json, read by the tokenizers library."""

    tokenizer: tokenizers.Tokenizer
    pad_token_id: int
    stop_token_ids: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        """Largest id + 1, added tokens included."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without any token the file's post-processor would add around it."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids: padding and stop ids give nothing, ids outside the range U+FFFD."""
        silent = {self.pad_token_id, *self.stop_token_ids}
        pieces: list[str] = []
        run: list[int] = []
        for token in token_ids:
            if self.tokenizer.id_to_token(int(token)) is None:
                pieces += [self._decode_known(run), UNKNOWN_TEXT]
                run = []
            elif token not in silent:
                run.append(int(token))
        return "".join([*pieces, self._decode_known(run)])

    def _decode_known(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)


Tokenizer = CharacterTokenizer | FileTokenizer


def make_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The configured tokenizer; ValueError if its file is missing, damaged or lacks a token."""
    if config.kind == "character":
        return CharacterTokenizer(config.alphabet)
    path = pathlib.Path(config.path)
    if not path.is_file():
        raise ValueError(f"tokenizer path {config.path!r} is no file; give a tokenizer.json")
    try:
        loaded = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for any content it cannot read
        raise ValueError(f"{config.path} is no tokenizer.json: {error}") from error
    # A file may ask for truncation or padding; either would change prompts without a word.
    loaded.no_truncation()
    loaded.no_padding()
    stop_ids = tuple(_token_id(loaded, token, config.path) for token in config.stop_tokens)
    pad_id = _token_id(loaded, config.pad_token, config.path) if config.pad_token else stop_ids[0]
    return FileTokenizer(loaded, pad_id, stop_ids)


def _token_id(tokenizer: tokenizers.Tokenizer, token: str, path: str) -> int:
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise ValueError(f"token {token!r} is not in {path}; check stop_tokens and pad_token")
    return int(token_id)


def _shortened(text: str, limit: int = 60) -> str:
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."
