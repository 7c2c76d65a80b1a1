"""LLM: prompts in, finished outputs back; what is sampled, what ends an output, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_model import ASSISTANT, BOS, EOS, MAX_POSITIONS, USER, VOCAB_SIZE, token_ids_of, write_tiny_llama

from octavo import LLM, RequestOutput, SamplingParams
from octavo.errors import ConfigError, RequestError

PROMPT = "hello world"
BLOCK_SIZE = 8

MakeLLM = Callable[..., LLM]


def greedy(max_tokens: int | None = 12, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **fields)


def is_idle(llm: LLM) -> bool:
    stats = llm.stats()
    return (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_llm(folder: Path) -> Iterator[MakeLLM]:
    """Loads the tiny model, or another one, and shuts it down after the test."""
    made = []

    def make(model: Path = folder, **settings: Any) -> LLM:
        made.append(LLM(str(model), **{"dtype": "float32", "block_size": BLOCK_SIZE, "max_num_seqs": 4, **settings}))
        return made[-1]

    yield make
    for llm in made:
        llm.shutdown()


@pytest.fixture(scope="module")
def shared_llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), dtype="float32", block_size=BLOCK_SIZE, max_num_seqs=4) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """The tiny model, its prefix cache empty; every test leaves it idle."""
    assert shared_llm.engine.scheduler.block_pool.reset_prefix_cache()
    yield shared_llm
    assert is_idle(shared_llm)


@pytest.fixture(scope="module")
def answer(shared_llm: LLM) -> RequestOutput:
    """40 greedy tokens after PROMPT; the first dozen are characters, not special tokens."""
    (output,) = shared_llm.generate(PROMPT, greedy(40))
    assert len(output.outputs[0].text) >= 12
    return output


def token_ids(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


# ----------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("form", ["text", "ids", "dict of text", "dict of ids"])
def test_a_prompt_has_four_forms(llm: LLM, answer: RequestOutput, form: str) -> None:
    ids = [BOS, *token_ids_of(PROMPT)]
    prompts: dict[str, Any] = {
        "text": PROMPT,
        "ids": ids,
        "dict of text": {"prompt": PROMPT},
        "dict of ids": {"prompt_token_ids": ids},
    }
    (output,) = llm.generate(prompts[form], greedy())
    assert output.prompt == (PROMPT if "text" in form else None)
    assert output.prompt_token_ids == ids
    assert token_ids(output) == token_ids(answer)[:12]
    assert output.finished


def test_outputs_come_in_the_order_of_the_prompts_however_long_each_takes(llm: LLM) -> None:
    prompts = ["a" * 30, "b", {"prompt": "c"}, token_ids_of("d"), "e", "f"]
    lengths = [20, 2, 9, 1, 15, 4]
    outputs = llm.generate(prompts, [greedy(length, ignore_eos=True) for length in lengths])
    assert [chr(output.prompt_token_ids[-1] - 5 + ord(" ")) for output in outputs] == list("abcdef")
    assert [len(token_ids(output)) for output in outputs] == lengths


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_default_params_draw_16_tokens_from_the_whole_vocabulary(llm: LLM) -> None:
    (output,) = llm.generate([PROMPT])
    assert len(token_ids(output)) == 16 or EOS in token_ids(output)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], None),
        ([[]], "The prompt is empty"),
        ({"prompt_token_ids": []}, "The prompt is empty"),
        ([[5, VOCAB_SIZE]], rf"Token ids must be in \[0, {VOCAB_SIZE}\); found \[{VOCAB_SIZE}\]"),
        ([-1], r"Token ids must be in .* found \[-1\]"),
        ("x" * MAX_POSITIONS, f"The prompt has {MAX_POSITIONS + 1} tokens; max_model_len is {MAX_POSITIONS}"),
        ([5] * MAX_POSITIONS, f"The prompt has {MAX_POSITIONS} tokens; max_model_len is {MAX_POSITIONS}"),
        ({"text": "x"}, r"found keys \['text'\]"),
        ({"prompt": None}, "A prompt is a text"),
        ([5, "x"], "A prompt is a text"),
        ([None], "found NoneType"),
        (None, "found NoneType"),
        (7, "found int"),
        (b"bytes are integers too", "found bytes"),
        ([b"bytes"], "found bytes"),
        ([[5.0, 6.0]], "found list"),
    ],
)
def test_a_bad_prompt_is_refused_and_nothing_is_started(llm: LLM, prompt: Any, message: str | None) -> None:
    if message is None:
        assert llm.generate(prompt) == []
        return
    before = llm.stats().num_steps
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt)
    with pytest.raises(RequestError, match=message):
        llm.generate(["good", *(prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt])])
    assert llm.stats().num_steps == before
    assert is_idle(llm)
    assert len(token_ids(llm.generate("good", greedy(3))[0])) == 3


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([SamplingParams()] * 3, "2 prompts came with 3 SamplingParams"),
        ({"temperature": 0.0}, "found dict"),
        ([SamplingParams(), 5], "found int"),
        (SamplingParams(stop_token_ids=[3, VOCAB_SIZE]), rf"stop_token_ids must be .* found \[{VOCAB_SIZE}\]"),
        (SamplingParams(stop_token_ids=[-1]), r"stop_token_ids must be .* found \[-1\]"),
    ],
    ids=str,
)
def test_bad_params_are_refused_and_nothing_is_started(llm: LLM, params: Any, message: str) -> None:
    before = llm.stats().num_steps
    with pytest.raises(RequestError, match=message):
        llm.generate(["a", "b"], params)
    assert llm.stats().num_steps == before


# ---------------------------------------------------------------------------------------------------- sampling


def test_completions_of_one_prompt_differ_and_a_seed_repeats_them_all(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=7, ignore_eos=True)
    (first,), (second,) = llm.generate(PROMPT, params), llm.generate(PROMPT, params)
    assert [completion.index for completion in first.outputs] == [0, 1, 2]
    assert len({completion.text for completion in first.outputs}) == 3
    assert first.outputs == second.outputs


def test_a_seeded_prompt_draws_the_same_among_others(llm: LLM) -> None:
    params = SamplingParams(seed=3, ignore_eos=True, max_tokens=20)
    alone = token_ids(llm.generate(PROMPT, params)[0])
    among = llm.generate(["a", "bb" * 20, PROMPT, "c"], [greedy(), SamplingParams(), params, SamplingParams(n=2)])
    assert token_ids(among[2]) == alone


def test_without_a_seed_draws_differ_and_the_engines_seed_repeats_them(make_llm: MakeLLM) -> None:
    params = SamplingParams(ignore_eos=True)
    drawn = [[token_ids(output) for output in make_llm(seed=seed).generate([PROMPT] * 2, params)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1]


# ------------------------------------------------------------------------------------------------------ the end


def test_max_tokens_ends_with_length(llm: LLM) -> None:
    (output,) = llm.generate(PROMPT, greedy(5))
    completion = output.outputs[0]
    assert (len(completion.token_ids), completion.finish_reason, completion.stop_reason) == (5, "length", None)


def test_without_max_tokens_a_request_goes_on_to_max_model_len(llm: LLM) -> None:
    (output,) = llm.generate(PROMPT, greedy(None, ignore_eos=True))
    assert len(output.prompt_token_ids) + len(token_ids(output)) == MAX_POSITIONS
    assert output.outputs[0].finish_reason == "length"


def test_max_model_len_ends_what_max_tokens_does_not(make_llm: MakeLLM) -> None:
    llm = make_llm(max_model_len=20)
    (output,) = llm.generate([5] * 19, greedy(50, ignore_eos=True))
    assert (len(token_ids(output)), output.outputs[0].finish_reason) == (1, "length")
    with pytest.raises(RequestError, match="The prompt has 20 tokens; max_model_len is 20"):
        llm.generate([5] * 20, greedy(50))


@pytest.mark.parametrize("included", [False, True])
def test_a_stop_string_ends_the_text_before_it_or_with_it(llm: LLM, answer: RequestOutput, included: bool) -> None:
    text = answer.outputs[0].text
    stop = text[4:7]
    assert text.index(stop) == 4
    params = greedy(40, stop=["never said", stop], include_stop_str_in_output=included)
    completion = llm.generate(PROMPT, params)[0].outputs[0]
    assert completion.text == text[: 7 if included else 4]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.token_ids == token_ids(answer)[:7]


def test_a_stop_token_ends_the_text_and_is_told(llm: LLM, answer: RequestOutput) -> None:
    stop = token_ids(answer)[6]
    at = token_ids(answer).index(stop)
    completion = llm.generate(PROMPT, greedy(40, stop_token_ids=[stop]))[0].outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.token_ids == token_ids(answer)[: at + 1]
    assert completion.text == answer.outputs[0].text[:at]


class TestEndOfSequence:
    """A model whose end-of-sequence token is what it says eighth."""

    at = 7

    @pytest.fixture
    def ending_llm(self, tmp_path: Path, make_llm: MakeLLM, answer: RequestOutput) -> LLM:
        eos = token_ids(answer)[self.at]
        assert token_ids(answer).index(eos) == self.at
        return make_llm(write_tiny_llama(tmp_path, eos_token_id=[EOS, eos]))

    def test_it_ends_the_output_and_is_no_reason_of_the_users(self, ending_llm: LLM, answer: RequestOutput) -> None:
        completion = ending_llm.generate(PROMPT, greedy(40))[0].outputs[0]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
        assert completion.token_ids == token_ids(answer)[: self.at + 1]
        assert completion.text == answer.outputs[0].text[: self.at]

    def test_it_can_be_ignored(self, ending_llm: LLM, answer: RequestOutput) -> None:
        assert token_ids(ending_llm.generate(PROMPT, greedy(40, ignore_eos=True))[0]) == token_ids(answer)

    def test_it_is_not_drawn_before_min_tokens(self, ending_llm: LLM, answer: RequestOutput) -> None:
        found = token_ids(ending_llm.generate(PROMPT, greedy(40, min_tokens=20))[0])
        assert found[: self.at] == token_ids(answer)[: self.at]
        assert len(found) >= 20
        assert not {EOS, token_ids(answer)[self.at]} & set(found[:20])


def test_an_end_of_sequence_id_outside_the_vocabulary_is_no_harm(tmp_path: Path, make_llm: MakeLLM) -> None:
    llm = make_llm(write_tiny_llama(tmp_path, eos_token_id=[EOS, VOCAB_SIZE + 7]))
    assert len(token_ids(llm.generate(PROMPT, greedy(8, min_tokens=8))[0])) == 8


def test_without_detokenizing_there_are_tokens_only(llm: LLM, answer: RequestOutput) -> None:
    completion = llm.generate(PROMPT, greedy(12, detokenize=False))[0].outputs[0]
    assert (completion.text, completion.token_ids) == ("", token_ids(answer)[:12])


def test_the_times_of_a_request_follow_each_other(llm: LLM) -> None:
    metrics = llm.generate(PROMPT, greedy())[0].metrics
    assert metrics is not None
    times = (
        metrics.arrival_time,
        metrics.first_scheduled_time or 0,
        metrics.first_token_time or 0,
        metrics.last_token_time or 0,
    )
    assert times == tuple(sorted(times))


# ---------------------------------------------------------------------------------------------------- the cache


def test_a_prompt_seen_before_comes_from_the_prefix_cache(llm: LLM) -> None:
    prompt = "x" * 30  # 31 tokens: 3 full blocks, and the last token is always computed
    first, second = (llm.generate(prompt, greedy())[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 24)
    assert first.outputs == second.outputs


def test_the_prefix_cache_can_be_turned_off(make_llm: MakeLLM) -> None:
    llm = make_llm(enable_prefix_caching=False)
    assert [llm.generate("x" * 30, greedy())[0].num_cached_tokens for _ in range(2)] == [0, 0]


def test_requests_that_take_turns_for_memory_answer_as_with_plenty(make_llm: MakeLLM) -> None:
    prompts, params = ["a" * 20, "b" * 21, "c" * 22], greedy(60, ignore_eos=True)
    plenty = make_llm()
    bytes_per_block = 2 * BLOCK_SIZE * 2 * 12 * 4 * 2  # key and value, tokens, KV heads, head_dim, float32, layers
    scarce = make_llm(kv_cache_memory_bytes=16 * bytes_per_block)
    wanted, found = plenty.generate(prompts, params), scarce.generate(prompts, params)
    assert (plenty.stats().num_blocks, scarce.stats().num_blocks) == (4 * MAX_POSITIONS // BLOCK_SIZE, 16)
    assert (plenty.stats().num_preemptions, scarce.stats().num_preemptions > 0) == (0, True)
    assert [token_ids(output) for output in found] == [token_ids(output) for output in wanted]
    assert max(output.metrics.num_preemptions for output in found if output.metrics) > 0
    assert is_idle(scarce)


def test_every_request_of_a_full_batch_has_whole_blocks(make_llm: MakeLLM) -> None:
    assert make_llm(max_model_len=17, max_num_seqs=3).stats().num_blocks == 3 * 3


def test_a_cache_smaller_than_the_model_serves_what_it_holds(
    make_llm: MakeLLM, caplog: pytest.LogCaptureFixture
) -> None:
    llm = make_llm(kv_cache_memory_bytes=30_000)
    held = llm.stats().num_blocks * BLOCK_SIZE
    assert held < MAX_POSITIONS
    assert f"The KV cache holds {held} tokens, fewer than the model's {MAX_POSITIONS}" in caplog.text
    with pytest.raises(RequestError, match=f"max_model_len is {held}"):
        llm.generate([5] * held)
    assert len(token_ids(llm.generate([5] * (held - 1), greedy())[0])) == 1


def test_settings_that_the_model_cannot_serve_are_refused(make_llm: MakeLLM) -> None:
    with pytest.raises(ConfigError, match=f"the model's positions end at {MAX_POSITIONS}"):
        make_llm(max_model_len=MAX_POSITIONS + 1)
    with pytest.raises(ConfigError, match="lower max_model_len to at most"):
        make_llm(max_model_len=100, kv_cache_memory_bytes=30_000)


# -------------------------------------------------------------------------------------------------------- chat


def test_a_conversation_is_answered_through_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    wanted = [BOS, USER, *token_ids_of("hi"), EOS, ASSISTANT]
    (output,) = llm.chat(messages, greedy())
    assert output.prompt_token_ids == wanted
    assert token_ids(output) == token_ids(llm.generate(wanted, greedy())[0])
    *_, streamed = llm.stream_chat(messages, greedy())
    assert streamed.outputs == output.outputs
    assert llm.chat(messages, greedy(), add_generation_prompt=False)[0].prompt_token_ids == wanted[:-1]


def test_several_conversations_are_answered_in_order(llm: LLM) -> None:
    conversations = [[{"role": "user", "content": text}] for text in ("one", "two", "three")]
    outputs = llm.chat(conversations, greedy())
    assert [output.prompt_token_ids for output in outputs] == [
        llm.chat(conversation, greedy(1))[0].prompt_token_ids for conversation in conversations
    ]


@pytest.mark.parametrize("messages", ["hello", [5], [{"content": "no role"}, "x"]], ids=str)
def test_what_is_no_conversation_is_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises(RequestError):
        llm.chat(messages)


def test_the_manifest_names_what_was_chosen(llm: LLM, folder: Path) -> None:
    assert llm.manifest.model_path == str(folder)
    assert (llm.manifest.device, llm.manifest.dtype) == ("cpu", "float32") or llm.manifest.device == "cuda"
    assert llm.manifest.components["model"].name == "llama"
    assert llm.manifest.components["checkpoint"].name == "huggingface"


def test_the_tokenizer_is_the_models(llm: LLM) -> None:
    assert llm.get_tokenizer().encode(PROMPT) == [BOS, *token_ids_of(PROMPT)]
