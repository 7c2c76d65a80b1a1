"""Tokenizer: text to ids and back, the bytes of each token, special tokens, conversations."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Raw

from octavo.errors import CheckpointError, RequestError
from octavo.interfaces import TokenizerData
from octavo.tokenizer import Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_level(*added: AddedToken) -> Raw:
    """Ids 0..255 are bytes, then merges that also cut characters (é is C3 A9), <s>, and what is added."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("Ã", "©"), ("©", "Ã"), ("ì", "ķ")]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *(left + right for left, right in merges)])}
    raw = Raw(models.BPE(vocabulary, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_tokens([AddedToken("<s>", special=True), *added])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", len(vocabulary))])
    return raw


def sentencepiece() -> Raw:
    """Llama 2's kind: a space is ▁, what has no token becomes bytes, the text's first space is dropped."""
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "가", "▁가"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("▁", "a"), ("▁", "가")]
    raw = Raw(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens(["<unk>", "<s>"])
    return raw


def tokenizer_of(raw: Raw, chat_template: str | None = None) -> Tokenizer:
    return Tokenizer(TokenizerData(tokenizer=raw, chat_template=chat_template, special_tokens={"bos_token": "<s>"}))


def text_of_pieces(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    pieces = [tokenizer.token_bytes(token_id, first=index == 0) for index, token_id in enumerate(token_ids)]
    return b"".join(pieces).decode("utf-8", "replace")


BYTE_LEVEL = tokenizer_of(byte_level(AddedToken("생각"), AddedToken("ÿes"), AddedToken("Ā", special=True)))
SENTENCEPIECE = tokenizer_of(sentencepiece())


# ------------------------------------------------------------------------------------------- encode and decode


def test_special_tokens_are_added_only_when_asked_for() -> None:
    assert BYTE_LEVEL.encode("hello") == [
        BYTE_LEVEL.bos_token_id,
        *BYTE_LEVEL.encode("hello", add_special_tokens=False),
    ]


@given(st.text())
@settings(deadline=None)
def test_decoding_what_was_encoded_gives_the_text(text: str) -> None:
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text, False), skip_special_tokens=False) == text


def test_batch_encodes_as_one_by_one() -> None:
    texts = ["hello", "안녕", ""]
    assert BYTE_LEVEL.encode_batch(texts) == [BYTE_LEVEL.encode(text) for text in texts]


def test_special_tokens_are_left_out_of_text_unless_asked_for() -> None:
    token_ids = BYTE_LEVEL.encode("hello")
    assert BYTE_LEVEL.decode(token_ids) == "hello"
    assert BYTE_LEVEL.decode(token_ids, skip_special_tokens=False) == "<s>hello"


@pytest.mark.parametrize(("text", "fault"), [("a\ud800", r"surrogate pair \(U\+D800\)"), (3, "a string, not int")])
def test_what_is_not_text_is_the_request_s_fault(text: str, fault: str) -> None:
    with pytest.raises(RequestError, match=fault):
        BYTE_LEVEL.encode(text)
    with pytest.raises(RequestError, match=fault):
        BYTE_LEVEL.encode_batch(["fine", text])


def test_ids_outside_the_vocabulary_have_no_text() -> None:
    assert BYTE_LEVEL.decode([10**6]) == ""
    assert BYTE_LEVEL.token_bytes(10**6) == b""
    assert BYTE_LEVEL.id_to_token(10**6) is None


def test_truncation_and_padding_in_the_file_are_ignored() -> None:
    raw = byte_level()
    raw.enable_truncation(4)
    raw.enable_padding(length=16)
    assert len(tokenizer_of(raw).encode("hello, world, hello", add_special_tokens=False)) > 4
    assert len(tokenizer_of(raw).encode("a", add_special_tokens=False)) == 1


def test_tokenizer_knows_its_special_ids() -> None:
    assert BYTE_LEVEL.special_ids == {BYTE_LEVEL.bos_token_id, BYTE_LEVEL.token_to_id("Ā")}
    assert BYTE_LEVEL.eos_token_id is BYTE_LEVEL.pad_token_id is BYTE_LEVEL.unk_token_id is None
    assert BYTE_LEVEL.id_to_token(BYTE_LEVEL.vocab_size - 1) == "ÿes"


# ------------------------------------------------------------------------------------------- bytes of tokens


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1)))
@settings(deadline=None)
def test_bytes_of_byte_level_tokens_joined_are_their_text(token_ids: list[int]) -> None:
    assert text_of_pieces(BYTE_LEVEL, token_ids) == BYTE_LEVEL.decode(token_ids, skip_special_tokens=False)


@given(st.text(alphabet=st.sampled_from(" ab가나👍é\n")))
@settings(deadline=None)
def test_bytes_of_sentencepiece_tokens_joined_are_their_text(text: str) -> None:
    token_ids = SENTENCEPIECE.encode(text, add_special_tokens=False)
    assert text_of_pieces(SENTENCEPIECE, token_ids) == SENTENCEPIECE.decode(token_ids) == text


def test_space_at_the_start_of_the_text_alone_is_dropped() -> None:
    token_id = SENTENCEPIECE.token_to_id("▁a")
    assert token_id is not None
    assert SENTENCEPIECE.token_bytes(token_id) == b" a"
    assert SENTENCEPIECE.token_bytes(token_id, first=True) == b"a"


@pytest.mark.parametrize(
    ("decoder", "tokens"),
    [
        (decoders.Metaspace(), ["▁it", "▁is", "n't", "▁.", "a"]),
        (decoders.WordPiece(), ["it", "is", "n't", ".", "##a"]),
        (None, ["it", "is", "n't", ".", "a"]),
    ],
)
def test_bytes_of_tokens_joined_are_their_text_with_other_decoders(
    decoder: decoders.Decoder | None, tokens: list[str]
) -> None:
    raw = Raw(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="a"))
    if decoder is not None:
        raw.decoder = decoder
    tokenizer = tokenizer_of(raw)
    token_ids = [0, 1, 2, 3, 4, 0, 3, 3, 1]
    assert text_of_pieces(tokenizer, token_ids) == tokenizer.decode(token_ids)


def test_decoder_that_needs_the_whole_text_is_refused() -> None:
    raw = Raw(models.WordLevel({"a": 0}, unk_token="a"))
    raw.decoder = decoders.Sequence([decoders.CTC()])
    with pytest.raises(CheckpointError, match="decodes with CTC"):
        tokenizer_of(raw)


# ------------------------------------------------------------------------------------------- conversations


def test_conversation_becomes_the_template_s_text() -> None:
    tokenizer = tokenizer_of(byte_level(), TEMPLATE)
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template(messages) == "<s>[user]hello[assistant]"
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == "<s>[user]hello"


def test_encoded_conversation_has_the_special_tokens_once() -> None:
    tokenizer = tokenizer_of(byte_level(), TEMPLATE)
    assert tokenizer.encode_chat([{"role": "user", "content": "hello"}]).count(tokenizer.bos_token_id or -1) == 1


def test_more_names_reach_the_template() -> None:
    tokenizer = tokenizer_of(byte_level(), "{{ style }}{{ tools is none }}")
    assert tokenizer.apply_chat_template([], style="terse") == "terseTrue"
    assert tokenizer.apply_chat_template([], style="", tools=[1]) == "False"


def test_model_without_a_template_says_what_to_do() -> None:
    with pytest.raises(RequestError, match=r"no chat template.*base model.*plain completion"):
        BYTE_LEVEL.apply_chat_template([{"role": "user", "content": "hello"}])
