"""Adapters that peft trained on the demo model: Octavo answers as peft's own merged models do, however it is asked.

Tokens are compared by the margin rule with the greedy tokens of the merged models, computed one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import torch
import trained_adapters
from margin_rule import Reference, check, generate, next_tokens_of, token_ids_of
from trained_adapters import ADAPTERS, BASE, TrainedAdapters

from octavo import LLM, SamplingParams

ERROR = 1e-4
"""Largest of a logprob, in float32."""

BYTES_PER_BLOCK = 30 * 2 * 16 * 3 * 64 * 4  # layers, keys and values, tokens, KV heads, head_dim, float32
LAYOUTS: dict[str, dict[str, Any]] = {
    "chunks of 4 tokens, no prefix cache": {"max_num_batched_tokens": 4, "enable_prefix_caching": False},
    "preemptions": {"kv_cache_memory_bytes": 8 * BYTES_PER_BLOCK},
    "fewer positions than adapters": {"max_loras": 2, "max_cpu_loras": 3},
}


@pytest.fixture(scope="module")
def trained() -> TrainedAdapters:
    return trained_adapters.trained_adapters()


def load(trained: TrainedAdapters, **settings: Any) -> LLM:
    """An engine that knows all adapters."""
    limits = {"max_loras": len(ADAPTERS), "max_lora_rank": 64, "max_model_len": 64, "max_logprobs": -1}
    paths = {name: trained.path(name) for name in ADAPTERS}
    return LLM("demo", dtype="float32", enable_lora=True, lora_modules=paths, **limits | settings)


@pytest.fixture(scope="module")
def llm(trained: TrainedAdapters) -> Iterator[LLM]:
    with load(trained) as llm:
        yield llm


def mixed(trained: TrainedAdapters) -> tuple[list[Reference], list[str | None]]:
    """Every prompt with every adapter and without, so that neighbours differ, and the adapter of each."""
    num_prompts = len(trained.references[BASE])
    pairs = [(name, index) for index in range(num_prompts) for name in (*ADAPTERS, BASE)]
    references = [trained.references[name][index] for name, index in pairs]
    return references, [None if name == BASE else name for name, _ in pairs]


def check_each(llm: LLM, trained: TrainedAdapters, found: list[list[int]]) -> None:
    """Each of `mixed` by the margin rule, with the adapter's or the base's own next tokens."""
    references, names = mixed(trained)
    for name in (None, *ADAPTERS):
        chosen = [index for index, each in enumerate(names) if each == name]
        wanted = [references[index] for index in chosen]
        check(wanted, [found[index] for index in chosen], next_tokens_of(llm, name))


def test_adapters_answer_unlike_the_base_and_unlike_each_other(trained: TrainedAdapters) -> None:
    for one, other in combinations(trained.references.values(), 2):
        assert all(left.token_ids != right.token_ids for left, right in zip(one, other, strict=True))


def test_the_adapters_are_what_they_are_called(llm: LLM) -> None:
    found = {status.name: status.info for status in llm.adapters()}
    assert {name: info.rank for name, info in found.items() if info} == {
        name: fields["r"] for name, (fields, _) in ADAPTERS.items()
    }
    assert not [info.warnings for info in found.values() if info and info.warnings]


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_are_those_of_the_merged_model(llm: LLM, trained: TrainedAdapters, name: str) -> None:
    references = trained.references[name]
    texts = [each.prompt_token_ids + each.token_ids[:num] for each in references for num in (0, -1)]
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=-1, detokenize=False)
    outputs = llm.generate(texts, params, adapter=name)
    wanted = trained.logits[name].flatten(0, 1).log_softmax(-1)
    for output, logprobs in zip(outputs, wanted, strict=True):
        assert output.outputs[0].logprobs is not None
        (entry,) = output.outputs[0].logprobs
        found = torch.tensor([entry[token_id].logprob for token_id in range(len(logprobs))])
        torch.testing.assert_close(found, logprobs, rtol=0, atol=ERROR)


@pytest.mark.parametrize("name", ADAPTERS)
def test_greedy_tokens_are_those_of_the_merged_model(llm: LLM, trained: TrainedAdapters, name: str) -> None:
    references = trained.references[name]
    alone = [token_ids for each in references for token_ids in token_ids_of(generate(llm, [each], name))]
    check(references, alone, next_tokens_of(llm, name))


def test_all_adapters_and_the_base_in_one_batch_answer_as_each_does_alone(llm: LLM, trained: TrainedAdapters) -> None:
    references, names = mixed(trained)
    num_rows = list[int]()
    llm.engine.step_listeners.append(lambda step: num_rows.append(len(step.rows)))
    try:
        check_each(llm, trained, token_ids_of(generate(llm, references, names)))
    finally:
        llm.engine.step_listeners.pop()
    assert max(num_rows) == len(references)


@pytest.mark.parametrize("settings", LAYOUTS.values(), ids=LAYOUTS)
def test_however_the_work_is_cut_into_steps(trained: TrainedAdapters, settings: dict[str, Any]) -> None:
    references, names = mixed(trained)
    with load(trained, **settings) as llm:
        found = token_ids_of(generate(llm, references, names))
        assert (llm.stats().num_preemptions > 0) == ("kv_cache_memory_bytes" in settings)
        check_each(llm, trained, found)
