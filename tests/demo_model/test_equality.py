"""The engine on the real demo model: however it cuts the work into steps, its greedy tokens are transformers'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from captured import capture_on_cpu
from margin_rule import Reference, check, generate, next_tokens_of, read_references, token_ids_of

from octavo import LLM
from octavo.runner.graphs import graph_sizes

BYTES_PER_BLOCK = 30 * 2 * 16 * 3 * 64 * 4  # layers, keys and values, tokens, KV heads, head_dim, float32
MAX_MODEL_LEN = 608  # tokens: the longest request of w2s ends at 599
ROOMY_KV_CACHE = 360 * BYTES_PER_BLOCK  # all of w2s at once takes 246
SMALL_KV_CACHE = 40 * BYTES_PER_BLOCK  # the longest request and little more


def load(**settings: Any) -> LLM:
    limits = {"max_model_len": MAX_MODEL_LEN, "kv_cache_memory_bytes": ROOMY_KV_CACHE}
    return LLM("demo", dtype="float32", **limits | settings)


@pytest.fixture(scope="module")
def references() -> list[Reference]:
    return read_references("w2s")


@pytest.fixture(scope="module")
def shared_llm() -> Iterator[LLM]:
    with load() as llm:
        yield llm


@pytest.fixture
def llm(shared_llm: LLM) -> LLM:
    """The engine with an empty prefix cache."""
    assert shared_llm.engine.scheduler.block_pool.reset_prefix_cache()
    return shared_llm


def test_all_at_once(llm: LLM, references: list[Reference]) -> None:
    check(references, token_ids_of(generate(llm, references)), next_tokens_of(llm))


def test_with_prompts_from_the_prefix_cache(llm: LLM, references: list[Reference]) -> None:
    generate(llm, [replace(reference, token_ids=reference.token_ids[:1]) for reference in references])
    outputs = generate(llm, references)
    assert all(output.num_cached_tokens for output in outputs if len(output.prompt_token_ids) > 16)
    check(references, token_ids_of(outputs), next_tokens_of(llm))


def test_each_alone(llm: LLM, references: list[Reference]) -> None:
    alone = [token_ids for reference in references for token_ids in token_ids_of(generate(llm, [reference]))]
    check(references, alone, next_tokens_of(llm))


def test_without_prefix_cache(references: list[Reference]) -> None:
    with load(enable_prefix_caching=False) as llm:
        check(references, token_ids_of(generate(llm, references)), next_tokens_of(llm))


@pytest.mark.parametrize("max_num_batched_tokens", [16, 64, 8192])
def test_whatever_the_token_budget(max_num_batched_tokens: int, references: list[Reference]) -> None:
    num_prompt_tokens = sum(len(reference.prompt_token_ids) for reference in references)
    num_step_tokens = list[int]()
    with load(max_num_batched_tokens=max_num_batched_tokens) as llm:
        llm.engine.step_listeners.append(lambda step: num_step_tokens.append(step.num_tokens))
        check(references, token_ids_of(generate(llm, references)), next_tokens_of(llm))
    assert max(num_step_tokens) == min(max_num_batched_tokens, num_prompt_tokens)


@pytest.mark.parametrize("max_steps_in_flight", [2, 4])
def test_with_steps_in_flight(max_steps_in_flight: int, references: list[Reference]) -> None:
    num_in_flight = list[int]()
    with load(max_steps_in_flight=max_steps_in_flight) as llm:
        llm.engine.step_listeners.append(lambda step: num_in_flight.append(llm.engine.scheduler.num_steps_in_flight))
        check(references, token_ids_of(generate(llm, references)), next_tokens_of(llm))
    assert max(num_in_flight) == max_steps_in_flight


@pytest.mark.parametrize(
    "settings",
    [{}, {"enable_prefix_caching": False, "max_num_batched_tokens": 64, "max_steps_in_flight": 4}],
    ids=["alone", "with all else"],
)
def test_with_preemptions(settings: dict[str, Any], references: list[Reference]) -> None:
    with load(kv_cache_memory_bytes=SMALL_KV_CACHE, **settings) as llm:
        outputs = generate(llm, references)
        assert llm.stats().num_preemptions > 0
        check(references, token_ids_of(outputs), next_tokens_of(llm))


def test_with_captured_steps_and_tokens_that_stay_on_the_device(
    references: list[Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    capture_on_cpu(monkeypatch, graph_sizes(len(references)))
    with load(max_steps_in_flight=2, max_num_seqs=len(references)) as llm:
        check(references, token_ids_of(generate(llm, references)), next_tokens_of(llm))


def test_with_plain_linears(references: list[Reference], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.builtin.unquantized.can_prepack", lambda dtype: False)
    with load() as llm:
        check(references, token_ids_of(generate(llm, references)), next_tokens_of(llm))


@pytest.mark.full
def test_sixty_four_requests_at_once() -> None:
    references = read_references("w2")
    with LLM("demo", dtype="float32") as llm:
        check(references, token_ids_of(generate(llm, references)), next_tokens_of(llm))
