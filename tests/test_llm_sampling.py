"""Sampling through the whole engine: as transformers does it, and the same whatever runs beside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from margin_rule import MARGIN
from tiny_model import BOS, EOS, MAX_POSITIONS, VOCAB_SIZE, token_ids_of, write_tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedModel

from octavo import LLM, RequestOutput, SamplingParams
from octavo.errors import ConfigError, RequestError

PROMPT = "hello world"
BYTES_PER_BLOCK = 2 * 8 * 2 * 12 * 4 * 2  # key and value, tokens, KV heads, head_dim, float32, layers


def load(folder: Path, **settings: Any) -> LLM:
    return LLM(str(folder), **{"dtype": "float32", "block_size": 8, "max_num_seqs": 8, **settings})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with load(folder) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def greedy(max_tokens: int = 32, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **{"ignore_eos": True, **fields})


def tokens_of(llm: LLM, prompt: str, params: SamplingParams) -> list[int]:
    return llm.generate(prompt, params)[0].outputs[0].token_ids


def generated(reference: PreTrainedModel, prompt: str, **arguments: Any) -> list[int]:
    """32 greedy tokens of transformers, none of them a close call."""
    prompt_ids = torch.tensor([[BOS, *token_ids_of(prompt)]])
    arguments = {"max_new_tokens": 32, "eos_token_id": None, **arguments}
    generate: Any = reference.generate
    found = generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        do_sample=False,
        pad_token_id=EOS,
        return_dict_in_generate=True,
        output_scores=True,
        **arguments,
    )
    for scores in found.scores:
        best, second = scores[0].topk(2).values.tolist()
        assert best - second > MARGIN
    token_ids: list[int] = found.sequences[0, prompt_ids.shape[1] :].tolist()
    return token_ids


# --------------------------------------------------------------------------------------------- as transformers


@pytest.mark.parametrize("prompt", [PROMPT, "a", "the the the the"])
@pytest.mark.parametrize("penalty", [1.3, 0.8, 5.0])
def test_repetition_penalty_is_transformers_(llm: LLM, reference: PreTrainedModel, prompt: str, penalty: float) -> None:
    found = tokens_of(llm, prompt, greedy(repetition_penalty=penalty))
    assert found == generated(reference, prompt, repetition_penalty=penalty)
    assert found != tokens_of(llm, prompt, greedy())


def test_bad_words_are_transformers_(llm: LLM, reference: PreTrainedModel) -> None:
    text = "".join(
        chr(token_id - 5 + ord(" ")) if token_id >= 5 else "\0" for token_id in tokens_of(llm, PROMPT, greedy())
    )
    words = [text[0], text[3:5], text[6:9]]  # one token, two, three; what the output would have had
    assert "\0" not in "".join(words)
    found = tokens_of(llm, PROMPT, greedy(bad_words=words))
    assert found == generated(reference, PROMPT, bad_words_ids=[token_ids_of(word) for word in words])
    assert not any(word in llm.generate(PROMPT, greedy(bad_words=words))[0].outputs[0].text for word in words)


@pytest.mark.parametrize("min_tokens", [0, 1, 5, 20])
def test_min_tokens_is_transformers_(llm: LLM, reference: PreTrainedModel, min_tokens: int) -> None:
    ends = tokens_of(llm, PROMPT, greedy())[2:4]  # tokens that come early
    found = tokens_of(llm, PROMPT, greedy(stop_token_ids=ends, min_tokens=min_tokens))
    assert found == generated(reference, PROMPT, eos_token_id=ends, min_new_tokens=min_tokens)
    assert min_tokens <= len(found) - 1 or len(found) == 32


def test_logit_bias_is_transformers_sequence_bias(llm: LLM, reference: PreTrainedModel) -> None:
    first, second, *_ = tokens_of(llm, PROMPT, greedy())
    bias = {first: -4.0, second: -100.0, 50: 3.0}
    found = tokens_of(llm, PROMPT, greedy(logit_bias=bias))
    assert found == generated(reference, PROMPT, sequence_bias={(token_id,): value for token_id, value in bias.items()})


def test_allowed_token_ids_are_what_transformers_does_not_suppress(llm: LLM, reference: PreTrainedModel) -> None:
    allowed = [7, 11, 30, 31, 60]
    suppressed = [token_id for token_id in range(VOCAB_SIZE) if token_id not in allowed]
    found = tokens_of(llm, PROMPT, greedy(allowed_token_ids=allowed))
    assert found == generated(reference, PROMPT, suppress_tokens=suppressed)


def test_frequency_and_presence_penalties_make_an_output_varied(llm: LLM) -> None:
    plain = tokens_of(llm, PROMPT, greedy(60))
    for fields in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        assert len(set(tokens_of(llm, PROMPT, greedy(60, **fields)))) > len(set(plain))


# ---------------------------------------------------------------------------------- the same whatever runs beside

MIXED: list[tuple[str, SamplingParams]] = [
    ("plain", SamplingParams(seed=1, max_tokens=40, ignore_eos=True)),
    ("seen before", SamplingParams(seed=2, max_tokens=50, ignore_eos=True, repetition_penalty=1.2, temperature=1.5)),
    ("x" * 20, SamplingParams(seed=3, max_tokens=40, n=3, ignore_eos=True, frequency_penalty=0.9, top_k=20)),
    ("x" * 20, SamplingParams(seed=4, max_tokens=30, presence_penalty=1.1, top_p=0.8, min_p=0.02, min_tokens=25)),
    (
        "words",
        SamplingParams(seed=5, max_tokens=40, ignore_eos=True, bad_words=["a", "th", "xyz"], logit_bias={40: 3.0}),
    ),
    (
        "few",
        SamplingParams(seed=6, max_tokens=50, n=2, ignore_eos=True, allowed_token_ids=[*range(40, 60)], min_p=0.01),
    ),
    ("best", SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True, repetition_penalty=1.1)),
    ("tiny", SamplingParams(seed=7, temperature=1e-6, max_tokens=20, ignore_eos=True, frequency_penalty=0.2)),
]


def answers(outputs: list[RequestOutput]) -> list[list[tuple[str, list[int], str | None]]]:
    return [[(each.text, each.token_ids, each.finish_reason) for each in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[list[tuple[str, list[int], str | None]]]:
    with load(folder, enable_prefix_caching=False) as llm:
        return answers([llm.generate(prompt, params)[0] for prompt, params in MIXED])


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kv_cache_memory_bytes": 24 * BYTES_PER_BLOCK},
        {"max_num_batched_tokens": 9},
        {"enable_prefix_caching": False, "max_num_seqs": 3},
    ],
    ids=["batched", "preempted", "in chunks", "without prefix cache"],
)
def test_a_request_has_one_text_alone_and_in_any_company(
    folder: Path, alone: list[list[tuple[str, list[int], str | None]]], settings: dict[str, Any], depth: int
) -> None:
    prompts, params = [prompt for prompt, _ in MIXED], [params for _, params in MIXED]
    with load(folder, max_steps_in_flight=depth, **settings) as llm:
        first, again = llm.generate(prompts, params), llm.generate(prompts, params)
        stats = llm.stats()
    assert (stats.num_preemptions > 0) == ("kv_cache_memory_bytes" in settings)
    assert answers(first) == alone
    assert answers(again) == alone
    cached = sum(output.num_cached_tokens for output in again)
    assert (cached > 0) == settings.get("enable_prefix_caching", True)


def test_the_first_of_n_is_the_one_of_1(llm: LLM) -> None:
    one, three = (llm.generate(PROMPT, SamplingParams(n=n, seed=9, frequency_penalty=0.5))[0] for n in (1, 3))
    assert three.outputs[0] == one.outputs[0]
    assert len({tuple(each.token_ids) for each in three.outputs}) == 3


# ------------------------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias must be in"),
        ({"allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids must be in"),
        ({"bad_words": ["한"]}, "bad_words: '한' has no tokens"),
        ({"logprobs": 21}, "max_logprobs allows 20"),
        ({"prompt_logprobs": -1}, "max_logprobs allows 20"),
    ],
    ids=str,
)
def test_what_the_model_cannot_do_is_refused_and_nothing_started(
    llm: LLM, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate([PROMPT, PROMPT], [greedy(), greedy(**fields)])
    assert (llm.stats().num_running, llm.stats().num_waiting) == (0, 0)
    assert llm.generate(PROMPT, greedy(3))[0].finished


def test_a_prompt_is_cut_to_its_last_tokens(llm: LLM) -> None:
    wanted = llm.generate([token_ids_of("world")], greedy())[0]
    cut = llm.generate(PROMPT, greedy(truncate_prompt_tokens=5))[0]
    assert (cut.prompt, cut.prompt_token_ids) == (PROMPT, token_ids_of("world"))
    assert cut.outputs[0].token_ids == wanted.outputs[0].token_ids
    longest = llm.generate("y" * 500, greedy(truncate_prompt_tokens=-1))[0]
    assert (len(longest.prompt_token_ids), len(longest.outputs[0].token_ids)) == (MAX_POSITIONS - 1, 1)


# ------------------------------------------------------------------------------------------------- defaults


def test_without_params_the_model_s_recommendation_is_sampled_with(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path)
    recommended = {"temperature": 0.0, "repetition_penalty": 1.2, "max_new_tokens": 7, "eos_token_id": EOS}
    (folder / "generation_config.json").write_text(json.dumps(recommended))
    with load(folder) as llm:
        wanted = SamplingParams(temperature=0.0, repetition_penalty=1.2, max_tokens=7)
        assert llm.get_default_sampling_params() == wanted
        assert tokens_of(llm, PROMPT, wanted) == llm.generate(PROMPT)[0].outputs[0].token_ids
        *_, streamed = llm.stream(PROMPT)
        assert streamed.outputs[0].token_ids == tokens_of(llm, PROMPT, wanted)
        assert len(llm.generate(PROMPT, SamplingParams(seed=1, ignore_eos=True))[0].outputs[0].token_ids) == 16
    with load(folder, generation_config="none") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


def test_a_recommendation_out_of_range_stops_only_who_relies_on_it(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"top_p": 7}))
    with load(folder) as llm:
        with pytest.raises(ConfigError, match="generation_config='none'"):
            llm.generate(PROMPT)
        assert len(tokens_of(llm, PROMPT, greedy(3))) == 3
