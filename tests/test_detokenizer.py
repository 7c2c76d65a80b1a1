"""IncrementalDetokenizer: a stream that never shows half a character nor a part of a stop string."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models, pre_tokenizers

from octavo.detokenizer import IncrementalDetokenizer
from octavo.interfaces import TokenizerData
from octavo.sampling_params import SamplingParams
from octavo.tokenizer import Tokenizer


def byte_level() -> Tokenizer:
    """Bytes, and tokens that begin or end inside characters; <s> is special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("Ġ", "w"), ("Ã", "©"), ("©", "Ã"), ("ê", "°"), ("Ģ", "ê"), ("ð", "Ł")]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *(left + right for left, right in merges)])}
    raw = Raw(models.BPE(vocabulary, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<s>"])
    return Tokenizer(TokenizerData(tokenizer=raw, chat_template=None, special_tokens={}))


def sentencepiece() -> Tokenizer:
    tokens = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "가"]
    raw = Raw(models.BPE({token: index for index, token in enumerate(tokens)}, [("▁", "a")], byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens(["<s>"])
    return Tokenizer(TokenizerData(tokenizer=raw, chat_template=None, special_tokens={}))


BYTE_LEVEL = byte_level()
SENTENCEPIECE = sentencepiece()
PROMPT = BYTE_LEVEL.encode("hello")

token_lists = st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=40)
texts = st.one_of(
    st.text(),
    st.text(alphabet=st.sampled_from("hello wéé가각나👍🏽👩‍👦🇰🇷\u200d\ufffd")),
    st.sampled_from(["👩‍👩‍👧‍👦", "안녕하세요", "🇰🇷🇯🇵", "e\u0301", "\ufffd\ufffd"]),
)


def token_id_of(byte: int) -> int:
    return next(token_id for token_id in range(256) if BYTE_LEVEL.token_bytes(token_id) == bytes([byte]))


def chunks(token_ids: Sequence[int], seed: int) -> Iterator[Sequence[int]]:
    """The tokens cut into updates of random sizes, empty ones included."""
    sizes, start = random.Random(seed), 0
    while start < len(token_ids):
        end = start + sizes.randint(0, 4)
        yield token_ids[start:end]
        start = end


def stream(detokenizer: IncrementalDetokenizer, token_ids: Sequence[int], seed: int = 0) -> list[str]:
    """What each update returns, the last one being the finish."""
    return [detokenizer.update(chunk) for chunk in chunks(token_ids, seed)] + [detokenizer.update([], finished=True)]


def start(params: SamplingParams | None = None, prompt: Sequence[int] = PROMPT) -> IncrementalDetokenizer:
    return IncrementalDetokenizer(BYTE_LEVEL, prompt, params or SamplingParams())


# ------------------------------------------------------------------------------------------- whole characters


@given(token_lists, st.booleans(), st.integers())
@settings(deadline=None)
def test_stream_joined_is_the_whole_text(token_ids: list[int], skip: bool, seed: int) -> None:
    detokenizer = start(SamplingParams(skip_special_tokens=skip))
    deltas = stream(detokenizer, token_ids, seed)
    assert "".join(deltas) == detokenizer.text == BYTE_LEVEL.decode(token_ids, skip_special_tokens=skip)
    assert detokenizer.num_tokens == len(token_ids)


@given(texts, st.integers())
@settings(deadline=None)
def test_stream_of_a_text_shows_whole_characters_only(text: str, seed: int) -> None:
    shown = ""
    for delta in stream(start(), BYTE_LEVEL.encode(text, add_special_tokens=False), seed):
        shown += delta
        assert text.startswith(shown)
    assert shown == text


def test_character_is_shown_with_its_last_byte() -> None:
    detokenizer = start()
    first, second, third = BYTE_LEVEL.encode("나", add_special_tokens=False)
    assert [detokenizer.update([token_id]) for token_id in (first, second, third)] == ["", "", "나"]


def test_bytes_that_are_no_text_are_not_kept_back_for_ever() -> None:
    detokenizer = start()
    for num_tokens in range(1, 100):
        detokenizer.update([token_id_of(0xFF)])
        assert detokenizer.text == "\ufffd" * num_tokens


def test_unfinished_character_is_shown_at_the_end() -> None:
    detokenizer = start()
    assert detokenizer.update(BYTE_LEVEL.encode("나")[:2]) == ""
    assert detokenizer.update([], finished=True) == "\ufffd"


@pytest.mark.parametrize("num_bytes", [1, 2, 3])
def test_character_that_the_prompt_began_is_shown_whole(num_bytes: int) -> None:
    token_ids = BYTE_LEVEL.encode("가") + [token_id_of(byte) for byte in "👍".encode()]
    cut = len(token_ids) - num_bytes
    assert "".join(stream(start(prompt=token_ids[:cut]), token_ids[cut:])) == "👍"


def test_character_that_the_prompt_alone_broke_is_not_the_output_s() -> None:
    detokenizer = start(prompt=BYTE_LEVEL.encode("가나")[:-2])
    assert "".join(stream(detokenizer, BYTE_LEVEL.encode("he"))) == "he"


@pytest.mark.parametrize(("skip", "expected"), [(True, "나a"), (False, "\ufffd<s>\ufffd\ufffda<s>")])
def test_special_tokens_are_text_only_when_asked_for(skip: bool, expected: str) -> None:
    first, *rest = BYTE_LEVEL.encode("나a")
    token_ids = [first, BYTE_LEVEL.vocab_size - 1, *rest, BYTE_LEVEL.vocab_size - 1]
    assert "".join(stream(start(SamplingParams(skip_special_tokens=skip)), token_ids)) == expected


def test_each_token_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    token_ids = BYTE_LEVEL.encode("hello wéé가각나" * 50)
    looked_at: list[int] = []
    token_bytes = BYTE_LEVEL.token_bytes
    detokenizer = start(SamplingParams(stop=["never"]))

    def look(token_id: int) -> bytes:
        looked_at.append(token_id)
        return token_bytes(token_id)

    monkeypatch.setattr(BYTE_LEVEL, "token_bytes", look)
    stream(detokenizer, token_ids)
    assert looked_at == token_ids


def test_nothing_is_made_into_text_without_detokenize() -> None:
    assert "".join(stream(start(SamplingParams(detokenize=False)), PROMPT)) == ""


# ------------------------------------------------------------------------------------------- special tokens


def spaced(decoder: decoders.Decoder | None) -> Tokenizer:
    """A vocabulary of words, decoded with spaces between them, special tokens included."""
    raw = Raw(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    if decoder is not None:
        raw.decoder = decoder
    raw.add_special_tokens(["<s>", "<e>"])
    return Tokenizer(TokenizerData(tokenizer=raw, chat_template=None, special_tokens={}))


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece()], ids=["plain", "wordpiece"])
@pytest.mark.parametrize(
    ("spaces", "prompt", "expected"),
    [
        (True, [0], " a <s> <e> b <e> <s> <s>"),
        (False, [0], " a <s><e> b <e><s><s>"),
        (False, [], "a <s><e> b <e><s><s>"),
    ],
)
def test_spaces_between_special_tokens_can_be_left_out(
    decoder: decoders.Decoder | None, spaces: bool, prompt: list[int], expected: str
) -> None:
    params = SamplingParams(skip_special_tokens=False, spaces_between_special_tokens=spaces)
    for seed in range(5):
        detokenizer = IncrementalDetokenizer(spaced(decoder), prompt, params)
        assert "".join(stream(detokenizer, [0, 2, 3, 1, 3, 2, 2], seed)) == expected


def test_no_space_is_left_out_behind_the_prompt_s_last_word() -> None:
    params = SamplingParams(skip_special_tokens=False, spaces_between_special_tokens=False)
    for prompt, expected in (([0], " <s> a"), ([3], "<s> a"), ([3, 0], " <s> a")):
        assert "".join(stream(IncrementalDetokenizer(spaced(None), prompt, params), [2, 0])) == expected


@given(token_lists, st.integers())
@settings(deadline=None)
def test_tokenizers_that_put_no_spaces_give_the_same_text_either_way(token_ids: list[int], seed: int) -> None:
    params = SamplingParams(skip_special_tokens=False, spaces_between_special_tokens=False)
    assert "".join(stream(start(params), token_ids, seed)) == BYTE_LEVEL.decode(token_ids, skip_special_tokens=False)


def test_without_skipped_special_tokens_the_setting_changes_nothing() -> None:
    params = SamplingParams(spaces_between_special_tokens=False)
    assert "".join(stream(IncrementalDetokenizer(spaced(None), [0], params), [2, 3, 1, 3, 0])) == " b a"


# ------------------------------------------------------------------------------------------- sentencepiece


def ids(*tokens: str) -> list[int]:
    found = [SENTENCEPIECE.token_to_id(token) for token in tokens]
    return [token_id for token_id in found if token_id is not None]


def test_space_that_begins_the_output_is_kept_after_a_prompt() -> None:
    detokenizer = IncrementalDetokenizer(SENTENCEPIECE, ids("<s>", "b"), SamplingParams())
    assert [detokenizer.update([token_id]) for token_id in ids("▁a", "b", "▁", "▁a")] == [" a", "b", " ", " a"]


def test_space_that_begins_the_text_is_dropped_when_the_prompt_has_no_text() -> None:
    detokenizer = IncrementalDetokenizer(SENTENCEPIECE, ids("<s>"), SamplingParams())
    assert [detokenizer.update([token_id]) for token_id in ids("▁a", "▁a")] == ["a", " a"]


def test_characters_made_of_byte_tokens_are_shown_one_by_one() -> None:
    detokenizer = IncrementalDetokenizer(SENTENCEPIECE, ids("b"), SamplingParams())
    tokens = ids("<0xEB>", "<0x82>", "<0x98>", "<0xEB>", "<0x8B>", "<0xA4>", "가", "<0xEB>", "a")
    deltas = [detokenizer.update([token_id]) for token_id in tokens]
    assert deltas == ["", "", "나", "", "", "다", "가", "", "\ufffda"]


# ------------------------------------------------------------------------------------------- stop strings


def expected_stop(token_ids: Sequence[int], params: SamplingParams) -> tuple[str, str | None]:
    """Text and stop string, looked for by trying every place: the first end that lies after `min_tokens` tokens."""
    text = BYTE_LEVEL.decode(token_ids)
    before = start()
    before.update(token_ids[: params.min_tokens])
    first_end = len(before.text) + 1 if params.min_tokens else 1
    for end in range(first_end, len(text) + 1):
        found = [string for string in params.stop_strings if text[:end].endswith(string)]
        if found:
            string = max(found, key=len)
            return text[: end if params.include_stop_str_in_output else end - len(string)], string
    return text, None


stop_strings = st.lists(st.text(alphabet="aé가", min_size=1, max_size=5), min_size=1, max_size=4)


@given(
    st.text(alphabet="aé가", max_size=40),
    stop_strings,
    st.booleans(),
    st.integers(0, 10),
    st.integers(),
    st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_first_stop_string_is_found_however_the_tokens_are_cut(
    text: str, strings: list[str], include: bool, min_tokens: int, seed: int, one_by_one: bool
) -> None:
    params = SamplingParams(stop=strings, include_stop_str_in_output=include, min_tokens=min_tokens, max_tokens=None)
    token_ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    detokenizer = start(params)
    if one_by_one:
        shown = "".join(detokenizer.update([token_id]) for token_id in token_ids)
        shown += detokenizer.update([], finished=True)
    else:
        shown = "".join(stream(detokenizer, token_ids, seed))
    assert (shown, detokenizer.stop_reason) == expected_stop(token_ids, params)
    assert detokenizer.text == shown


@given(st.text(alphabet="aé가", max_size=40), stop_strings)
@settings(deadline=None)
def test_what_may_begin_a_stop_string_is_held_and_no_more(text: str, strings: list[str]) -> None:
    detokenizer, whole = start(SamplingParams(stop=strings)), start()
    for token_id in BYTE_LEVEL.encode(text, add_special_tokens=False):
        detokenizer.update([token_id])
        if detokenizer.stop_reason is not None:
            break
        whole.update([token_id])
        beginnings = [string[:length] for string in strings for length in range(len(string))]
        held = max(len(beginning) for beginning in beginnings if whole.text.endswith(beginning))
        assert detokenizer.text == whole.text[: len(whole.text) - held]


def update_by_letter(detokenizer: IncrementalDetokenizer, text: str) -> list[str]:
    return [detokenizer.update(BYTE_LEVEL.encode(letter)) for letter in text]


def test_tail_that_may_begin_a_stop_string_is_held_and_let_go() -> None:
    detokenizer = start(SamplingParams(stop="END"))
    assert update_by_letter(detokenizer, "aENxEND") == ["a", "", "", "ENx", "", "", ""]
    assert (detokenizer.text, detokenizer.stop_reason) == ("aENx", "END")


def test_held_tail_is_shown_at_the_end() -> None:
    detokenizer = start(SamplingParams(stop="END"))
    assert update_by_letter(detokenizer, "aEN") == ["a", "", ""]
    assert detokenizer.update([], finished=True) == "EN"
    assert detokenizer.stop_reason is None


def test_stop_string_that_overlaps_itself_is_found() -> None:
    detokenizer = start(SamplingParams(stop="aab"))
    update_by_letter(detokenizer, "aaab")
    assert (detokenizer.text, detokenizer.stop_reason) == ("a", "aab")


def test_stop_string_may_begin_in_one_that_min_tokens_let_pass() -> None:
    detokenizer = start(SamplingParams(stop="aba", min_tokens=3))
    update_by_letter(detokenizer, "ababa")
    assert (detokenizer.text, detokenizer.stop_reason) == ("ab", "aba")


def test_stop_string_that_ends_first_wins_and_of_two_the_longer() -> None:
    detokenizer = start(SamplingParams(stop=["bcd", "c", "bc"]))
    assert detokenizer.update(BYTE_LEVEL.encode("abcd")) == "a"
    assert detokenizer.stop_reason == "bc"


def test_stop_string_within_min_tokens_is_text() -> None:
    detokenizer = start(SamplingParams(stop="b", min_tokens=3))
    update_by_letter(detokenizer, "abab")
    assert (detokenizer.text, detokenizer.num_tokens, detokenizer.stop_reason) == ("aba", 4, "b")


def test_tokens_after_the_stop_string_are_not_counted_nor_shown() -> None:
    detokenizer = start(SamplingParams(stop="c", include_stop_str_in_output=True))
    assert detokenizer.update(BYTE_LEVEL.encode("abcde")) == "abc"
    assert detokenizer.num_tokens == 3
    assert detokenizer.update(BYTE_LEVEL.encode("f"), finished=True) == ""
    assert detokenizer.text == "abc"
