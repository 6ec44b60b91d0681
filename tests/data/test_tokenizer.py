"""Tokenizers: exact round trips, silent padding and stop ids, and errors that say what to do."""

import pathlib

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.data.tasks import ALPHABET
from jaxrl_llm.data.tokenizer import (
    UNKNOWN_TEXT,
    CharacterTokenizer,
    FileTokenizer,
    TokenizerConfig,
    make_tokenizer,
)

CORPUS = ["What is 12 + 34?", "The answer is \\boxed{46}.", "Grüße, 世界 🙂"]


@pytest.fixture
def tokenizer_file(tmp_path: pathlib.Path) -> str:
    """A byte-level BPE with chat tokens, which adds a token around texts, truncates and pads."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<start>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", 1)]
    )
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def load(path: str) -> FileTokenizer:
    config = TokenizerConfig(kind="file", path=path, stop_tokens=("<|im_end|>", "<|endoftext|>"))
    tokenizer = make_tokenizer(config)
    assert isinstance(tokenizer, FileTokenizer)
    return tokenizer


@settings(deadline=None)
@given(st.text(alphabet=ALPHABET))
def test_character_tokens_round_trip(text: str) -> None:
    tokenizer = make_tokenizer(TokenizerConfig())
    token_ids = tokenizer.encode(text)
    assert len(token_ids) == len(text)
    assert tokenizer.decode(token_ids) == text


def test_character_ids_are_padding_stop_then_the_alphabet() -> None:
    tokenizer = CharacterTokenizer("ab")
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("ba") == [3, 2]
    assert tokenizer.decode([2, 0, 3, 1]) == "ab"
    assert make_tokenizer(TokenizerConfig()).vocab_size == 16


def test_ids_outside_the_vocabulary_are_visible_in_the_text(tokenizer_file: str) -> None:
    assert CharacterTokenizer("ab").decode([2, 4, -1, 3]) == f"a{UNKNOWN_TEXT * 2}b"
    tokenizer = load(tokenizer_file)
    ids = tokenizer.encode("12")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, *ids]) == f"12{UNKNOWN_TEXT}12"


def test_a_character_outside_the_alphabet_is_named() -> None:
    with pytest.raises(ValueError, match=r"'1x' has characters \['x'\] outside"):
        make_tokenizer(TokenizerConfig()).encode("1x")


@pytest.mark.parametrize("text", [*CORPUS, "unseen ~ text\n\twith blanks ", ""])
def test_file_tokens_round_trip_and_nothing_is_added(tokenizer_file: str, text: str) -> None:
    tokenizer = load(tokenizer_file)
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode(token_ids) == text
    assert 1 not in token_ids, "the post-processor's start token"
    assert 0 not in token_ids, "the file's padding"


def test_file_stop_ids_are_silent_and_other_special_tokens_are_not(tokenizer_file: str) -> None:
    tokenizer = load(tokenizer_file)
    assert tokenizer.stop_token_ids == (2, 3)
    assert tokenizer.pad_token_id == 2
    assert tokenizer.decode([1, *tokenizer.encode("12"), 2, 3]) == "<start>12"
    assert tokenizer.encode("<|im_end|>") == [2]
    assert tokenizer.vocab_size == tokenizer.tokenizer.get_vocab_size()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alphabet": ""}, "give each character exactly once"),
        ({"alphabet": "aba"}, "give each character exactly once"),
        ({"kind": "file", "stop_tokens": ("x",)}, "path is empty"),
        ({"kind": "file", "path": "x"}, "stop_tokens is empty"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**settings)


def test_a_bad_tokenizer_file_is_refused_by_name(
    tokenizer_file: str, tmp_path: pathlib.Path
) -> None:
    def config(path: str, stop: str) -> TokenizerConfig:
        return TokenizerConfig(kind="file", path=path, stop_tokens=(stop,))

    with pytest.raises(ValueError, match=r"'nowhere\.json' is no file"):
        make_tokenizer(config("nowhere.json", "a"))
    with pytest.raises(ValueError, match="token '<eos>' is not in"):
        make_tokenizer(config(tokenizer_file, "<eos>"))
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"model": 3')
    with pytest.raises(ValueError, match=r"damaged\.json is no tokenizer\.json"):
        make_tokenizer(config(str(damaged), "a"))
