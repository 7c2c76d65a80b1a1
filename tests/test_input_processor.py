"""InputProcessor: what a request asks for is checked against the model before the engine hears of it."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models, normalizers, pre_tokenizers

from octavo import SamplingParams
from octavo.errors import ConfigError, RequestError
from octavo.input_processor import InputProcessor, default_sampling_params
from octavo.interfaces import TokenizerData
from octavo.model_config import ModelConfig
from octavo.tokenizer import Tokenizer

PIECES = ["w", "o", "r", "d", "Ġ", "or", "ord", "word", "Ġw", "Ċ", "<s>"]
W, OH, R, D, SPACE, OR, ORD, WORD, SPACE_W, NEWLINE, BOS = range(len(PIECES))
VOCAB_SIZE = len(PIECES)
EOS = R
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "eos_token_id": EOS,
}


def byte_level(*merges: tuple[str, str]) -> Tokenizer:
    raw = Raw(models.BPE({piece: index for index, piece in enumerate(PIECES[:-1])}, list(merges)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<s>"])
    return Tokenizer(TokenizerData(tokenizer=raw, chat_template=None, special_tokens={}))


def processor(tokenizer: Tokenizer | None = None, **settings: Any) -> InputProcessor:
    config = ModelConfig.from_dict(CONFIG, {})
    return InputProcessor(tokenizer or byte_level(), config, settings.pop("max_model_len", 16), 0, **settings)


def refusal(prompt: list[int] | None = None, max_logprobs: int = 20, **fields: Any) -> str:
    with pytest.raises(RequestError) as caught:
        processor(max_logprobs=max_logprobs).request("x", prompt or [1, 2], SamplingParams(**fields))
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- token ids


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
def test_token_ids_outside_the_vocabulary_are_refused_by_name(field: str) -> None:
    for wrong in (VOCAB_SIZE, -1):
        value: Any = {3: 1.0, wrong: 1.0} if field == "logit_bias" else [3, wrong]
        fields: dict[str, Any] = {field: value}
        assert refusal(**fields) == f"{field} must be in [0, {VOCAB_SIZE}); found [{wrong}]."


def test_all_faults_are_named_together() -> None:
    message = refusal(stop_token_ids=[99], logit_bias={98: 1.0}, logprobs=21)
    assert all(part in message for part in ("stop_token_ids", "[99]", "logit_bias", "[98]", "logprobs=21"))


def test_a_choice_without_a_token_is_refused() -> None:
    assert "leaves nothing of allowed_token_ids" in refusal(allowed_token_ids=[W], bad_words=["w"])
    assert "min_tokens is 2: nothing could be sampled" in refusal(
        allowed_token_ids=[EOS, D], bad_words=["d"], min_tokens=2
    )
    assert "nothing could be sampled" in refusal(
        allowed_token_ids=[W], stop_token_ids=[W], ignore_eos=True, min_tokens=1
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [EOS]},
        {"allowed_token_ids": [EOS, W], "min_tokens": 2},
        {"allowed_token_ids": [EOS], "ignore_eos": True, "min_tokens": 2},
        {"allowed_token_ids": [W], "bad_words": ["word"]},
        {"bad_words": ["w"], "min_tokens": 3},
    ],
    ids=str,
)
def test_a_choice_with_a_token_is_served(fields: dict[str, Any]) -> None:
    processor().request("x", [1], SamplingParams(**fields))


# ------------------------------------------------------------------------------------------------- logprobs


@pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize(
    ("max_logprobs", "allowed", "refused"),
    [(20, [0, 20, -1], [21]), (5, [5], [6, -1]), (0, [0], [1, -1]), (-1, [-1, VOCAB_SIZE], [VOCAB_SIZE + 1])],
)
def test_logprobs_are_bounded_by_max_logprobs(
    field: str, max_logprobs: int, allowed: list[int], refused: list[int]
) -> None:
    inputs = processor(max_logprobs=max_logprobs)
    for count in allowed:
        fields: dict[str, Any] = {field: count}
        inputs.request("x", [1], SamplingParams(**fields))
    most = VOCAB_SIZE if max_logprobs == -1 else max_logprobs
    for count in refused:
        fields = {field: count}
        assert f"{field}={count} was asked for; max_logprobs allows {most}" in refusal(None, max_logprobs, **fields)


# ------------------------------------------------------------------------------------------------- truncation


@pytest.mark.parametrize(("num_tokens", "kept"), [(None, 20), (1, 1), (3, 3), (20, 20), (10**9, 20), (-1, 31)], ids=str)
def test_the_last_tokens_are_kept(num_tokens: int | None, kept: int) -> None:
    prompt = [index % VOCAB_SIZE for index in range(40 if num_tokens == -1 else 20)]
    request = processor(max_model_len=32).request("x", prompt, SamplingParams(truncate_prompt_tokens=num_tokens))
    assert request.prompt_token_ids == prompt[-kept:]
    assert request.max_total_tokens == min(32, kept + 16)


def test_a_prompt_still_too_long_is_refused() -> None:
    assert "The prompt has 16 tokens; max_model_len is 16" in refusal([1] * 40, truncate_prompt_tokens=16)


def test_a_token_that_truncation_drops_may_be_anything() -> None:
    request = processor().request("x", [99, 1, 2], SamplingParams(truncate_prompt_tokens=2))
    assert request.prompt_token_ids == [1, 2]


def test_every_completion_has_the_truncated_prompt_and_the_bad_words() -> None:
    params = SamplingParams(n=3, truncate_prompt_tokens=1, bad_words=["w"])
    first = processor().request("x", [1, 2], params)
    family = [first, *first.siblings]
    assert [request.prompt_token_ids for request in family] == [[2]] * 3
    assert len({request.bad_words_token_ids for request in family}) == 1


# ------------------------------------------------------------------------------------------------- bad words


def bad_words_of(tokenizer: Tokenizer, *words: str) -> tuple[tuple[int, ...], ...]:
    return processor(tokenizer).request("x", [1], SamplingParams(bad_words=words)).bad_words_token_ids


def test_a_bad_word_is_forbidden_with_and_without_a_space_before() -> None:
    tokenizer = byte_level(("o", "r"), ("or", "d"), ("Ġ", "w"))
    assert bad_words_of(tokenizer, "word") == ((W, ORD), (SPACE_W, ORD))
    assert bad_words_of(tokenizer, "  word") == ((W, ORD), (SPACE_W, ORD))


def test_a_bad_word_is_forbidden_with_a_space_also_where_it_then_has_other_tokens() -> None:
    tokenizer = byte_level(("o", "r"), ("or", "d"), ("w", "ord"), ("Ġ", "w"))
    assert [len(word) for word in bad_words_of(tokenizer, "word")] == [1]  # Ġ, word: the second is forbidden anyway
    other = byte_level(("Ġ", "w"), ("o", "r"), ("or", "d"), ("w", "ord"))
    assert bad_words_of(other, "word") == ((WORD,), (SPACE_W, ORD))


def test_a_space_that_stays_a_token_of_its_own_adds_nothing() -> None:
    assert bad_words_of(byte_level(), "wo") == ((W, OH),)


def test_white_space_may_be_a_bad_word() -> None:
    assert bad_words_of(byte_level(), "\n") == ((NEWLINE,),)
    assert bad_words_of(byte_level(), " ") == ((SPACE,),)
    assert bad_words_of(byte_level(), "\nw") == ((NEWLINE, W),)


def test_a_sentencepiece_space_is_there_already() -> None:
    raw = Raw(models.BPE({"▁": 0, "w": 1, "▁w": 2}, [("▁", "w")]))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = Tokenizer(TokenizerData(tokenizer=raw, chat_template=None, special_tokens={}))
    assert bad_words_of(tokenizer, "w") == ((2,),)


def test_equal_bad_words_are_one() -> None:
    assert bad_words_of(byte_level(), "w", "w", " w") == ((W,),)


def test_a_bad_word_without_tokens_in_the_vocabulary_is_refused() -> None:
    assert refusal(bad_words=["한"]) == "bad_words: '한' has no tokens in the model's vocabulary."


# ------------------------------------------------------------------------------------------------- defaults


def test_defaults_are_what_generation_config_recommends() -> None:
    recommended = {
        "repetition_penalty": 1.1,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.05,
        "max_new_tokens": 99,
    }
    assert default_sampling_params("auto", recommended) == SamplingParams(
        repetition_penalty=1.1, temperature=0.6, top_k=20, top_p=0.95, min_p=0.05, max_tokens=99
    )


def test_nothing_else_of_generation_config_is_a_default() -> None:
    others = {"do_sample": False, "eos_token_id": [1], "top_p": None, "max_length": 7, "num_beams": 3, "n": 2}
    assert default_sampling_params("auto", others) == SamplingParams()


def test_generation_config_none_passes_over_it() -> None:
    assert default_sampling_params("none", {"temperature": 0.1}) == SamplingParams()


@pytest.mark.parametrize("wrong", [{"top_p": 3}, {"temperature": "hot"}, {"max_new_tokens": 0}], ids=str)
def test_a_recommendation_out_of_range_says_what_to_set(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json recommends .* Set generation_config='none'"):
        default_sampling_params("auto", wrong)
