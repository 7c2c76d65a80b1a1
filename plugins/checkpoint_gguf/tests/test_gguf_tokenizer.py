"""Tokenizers rebuilt from metadata: the same ids as the programs they come from, refusals when that is not certain."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers

from octavo.errors import CheckpointError
from octavo.interfaces import TokenizerData
from octavo_checkpoint_gguf.pre_tokenizers import SPLITTINGS
from octavo_checkpoint_gguf.tokenizer import read_tokenizer

# Byte-level tokens: printable bytes stand for themselves, the others follow U+0100.
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTES = [*PRINTABLE, *(byte for byte in range(256) if byte not in PRINTABLE)]
ALPHABET = [*map(chr, PRINTABLE), *map(chr, range(256, 256 + 68))]

BYTE_LEVEL: Mapping[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|end|>", "<|start|>", "<think>", *ALPHABET, "he", "ll", "hell", "hello"],
    "tokenizer.ggml.token_type": [3, 3, 4, *[1] * 260],
    "tokenizer.ggml.merges": ["h e", "l l", "he ll", "hell o"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 0,
}
PIECES = ["▁", *"thean", "▁t", "he", "▁the", "▁a", "an", "▁an", "en", "th", "▁th", "▁then", "가", "aa", "aaa"]
SENTENCEPIECE: Mapping[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(PIECES)],
    "tokenizer.ggml.scores": [*[0.0] * 259, *(-float(index) for index in range(len(PIECES)))],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}

mixed_texts = st.one_of(
    st.text(),
    st.text(alphabet=st.sampled_from("hello 019½Ⅷ'sdLL.,!\n\r\t\u00a0  가나é👍Àb")),
    st.text("thean ▁가", max_size=12),
)


def byte_level(**changes: object) -> TokenizerData:
    return read_tokenizer({**BYTE_LEVEL, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}})


def sentencepiece(**changes: object) -> TokenizerData:
    return read_tokenizer({**SENTENCEPIECE, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}})


def tokens(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = False) -> list[str]:
    encoded: list[str] = tokenizer.encode(text, add_special_tokens=add_special_tokens).tokens
    return encoded


# ------------------------------------------------------------------------------------------- byte-level


BYTE_LEVEL_TOKENIZER = byte_level().tokenizer


def test_words_are_merged_and_digits_stay_alone() -> None:
    assert tokens(BYTE_LEVEL_TOKENIZER, "hello 12") == ["hello", "Ġ", "1", "2"]


@given(mixed_texts)
@settings(deadline=None)
def test_byte_level_text_comes_back(text: str) -> None:
    ids = BYTE_LEVEL_TOKENIZER.encode(text, add_special_tokens=False).ids
    assert BYTE_LEVEL_TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_control_tokens_are_special_and_user_defined_ones_are_text() -> None:
    ids = BYTE_LEVEL_TOKENIZER.encode("<think>a<|end|>").ids
    assert ids[0] == 2
    assert ids[-1] == 0
    assert BYTE_LEVEL_TOKENIZER.decode(ids) == "<think>a"


@given(mixed_texts)
@settings(deadline=None, max_examples=200)
def test_smollm_splits_as_its_tokenizer_json_does(text: str) -> None:
    theirs = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    assert pieces(SPLITTINGS["smollm"].pre_tokenizer(), text) == pieces(theirs, text)


@given(mixed_texts)
@settings(deadline=None, max_examples=200)
def test_gpt_2_splits_as_its_tokenizer_json_does(text: str) -> None:
    theirs = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    assert pieces(SPLITTINGS["gpt-2"].pre_tokenizer(), text) == pieces(theirs, text)


def pieces(pre_tokenizer: pre_tokenizers.PreTokenizer, text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)]


TEXT = "I'LL pay 12345½ euros,  PaulÀb said…\n\n  now/\n"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-bpe", "I 'LL _pay _ 123 45½ _euros , _ _PaulÀb _said …\n\n _ _now /\n"),
        ("qwen2", "I 'LL _pay _ 1 2 3 4 5 ½ _euros , _ _PaulÀb _said …\n\n _ _now /\n"),
        ("tekken", "I 'LL _pay _ 1 2 3 4 5 ½ _euros , _ _Paul Àb _said …\n\n _ _now /\n"),
        ("smollm", "I ' LL _pay _ 1 2 3 4 5 ½ _euros , _ _PaulÀb _said … \n\n_ _now / \n"),
        ("gpt-2", "I ' LL _pay _12345½ _euros , _ _PaulÀb _said … \n\n_ _now / \n"),
        ("default", "I ' LL _pay _ 123 45½ _euros , _ _PaulÀb _said … \n\n_ _now / \n"),
    ],
)
def test_text_is_split_as_the_name_says(name: str, expected: str) -> None:
    split = pieces(SPLITTINGS[name].pre_tokenizer(), TEXT)
    text = [bytes(BYTES[ALPHABET.index(character)] for character in piece).decode() for piece in split]
    assert [piece.replace(" ", "_") for piece in text] == expected.split(" ")


@pytest.mark.parametrize(("name", "expected"), [("llama-bpe", ["hello"]), ("smaug-bpe", ["hell", "o"])])
def test_whole_words_are_taken_without_merging_where_the_model_does_so(name: str, expected: list[str]) -> None:
    merges = BYTE_LEVEL["tokenizer.ggml.merges"][:-1]
    assert tokens(byte_level(pre=name, merges=merges).tokenizer, "hello") == expected


def test_qwen_composes_characters_first() -> None:
    assert tokens(byte_level(pre="qwen2").tokenizer, "e\u0301") == tokens(BYTE_LEVEL_TOKENIZER, "é")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["h"]),
        ({"add_bos_token": True}, ["<|start|>", "h"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["<|start|>", "h", "<|end|>"]),
        ({"pre": "llama-bpe"}, ["<|start|>", "h"]),
        ({"pre": "llama-bpe", "add_bos_token": False}, ["h"]),
        ({"pre": "tekken", "bos_token_id": None}, ["h"]),
    ],
)
def test_text_begins_and_ends_as_the_file_says(changes: Mapping[str, object], expected: list[str]) -> None:
    assert tokens(byte_level(**changes).tokenizer, "h", add_special_tokens=True) == expected


def test_special_tokens_and_chat_template_are_read() -> None:
    data = read_tokenizer({**BYTE_LEVEL, "tokenizer.chat_template": "{{ bos_token }}"})
    assert data.chat_template == "{{ bos_token }}"
    assert data.special_tokens == {"bos_token": "<|start|>", "eos_token": "<|end|>"}


# ------------------------------------------------------------------------------------------- sentencepiece


SENTENCEPIECE_TOKENIZER = sentencepiece().tokenizer


def sentencepiece_encode(text: str) -> list[str]:
    """Sentencepiece's rule: join the neighbours whose joined token scores best, of equals the leftmost, to the end."""
    scores = {piece: -index for index, piece in enumerate(PIECES)}
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [left + right for left, right in pairwise(parts)]
        best = max((pair for pair in pairs if pair in scores), key=scores.__getitem__, default=None)
        if best is None:
            break
        place = pairs.index(best)
        parts[place : place + 2] = [best]
    in_bytes = ([part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts)
    return [token for tokens in in_bytes for token in tokens]


@given(st.text(alphabet=st.sampled_from("thean 가b\n👍"), max_size=20))
@settings(deadline=None, max_examples=300)
def test_sentencepiece_joins_the_best_scored_neighbours(text: str) -> None:
    assert tokens(SENTENCEPIECE_TOKENIZER, text) == sentencepiece_encode(text)


@given(mixed_texts.map(lambda text: text.replace("▁", " ")))
@settings(deadline=None)
def test_sentencepiece_text_comes_back(text: str) -> None:
    assert SENTENCEPIECE_TOKENIZER.decode(SENTENCEPIECE_TOKENIZER.encode(text).ids) == text


def test_sentencepiece_text_begins_with_bos_and_a_space_unless_the_file_says_otherwise() -> None:
    assert tokens(SENTENCEPIECE_TOKENIZER, "the", add_special_tokens=True) == ["<s>", "▁the"]
    without = sentencepiece(add_space_prefix=False, add_bos_token=False).tokenizer
    assert tokens(without, "the", add_special_tokens=True) == ["t", "he"]
    assert without.decode(without.encode(" the").ids) == " the"


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pre": "brand-new"}, r"pre is 'brand-new', and how that cuts text is not known here; known: default, gpt-2"),
        ({"pre": None}, "pre is None"),
        ({"model": "t5"}, "model is 't5'; 'gpt2'"),
        ({"model": None}, "model is None"),
        ({"tokens": None}, "holds no vocabulary"),
        ({"tokens": ["a", "a"]}, "has 'a' twice"),
        ({"token_type": [1]}, "token_type does not have one entry for each of 263 tokens"),
        ({"merges": None}, "without tokenizer.ggml.merges"),
        ({"merges": ["q zz"]}, "merges do not fit the vocabulary"),
        ({"bos_token_id": -1}, "bos_token_id is -1, outside the vocabulary"),
        ({"model": "llama"}, "without tokenizer.ggml.scores"),
    ],
)
def test_tokenizer_that_is_not_certain_is_refused(changes: Mapping[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        byte_level(**changes)


def test_regular_expressions_are_valid() -> None:
    assert all(Regex(pattern) for splitting in SPLITTINGS.values() for pattern in splitting.patterns)
