"""The GPU runner's way on a CPU: inputs that stay where they are, padding requests, tokens that only the device knows.

In place of a CUDA graph a captured step is computed again, into outputs that stay where they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from captured import capture_on_cpu, plan_of
from tiny_model import write_tiny_llama
from torch import Tensor

from octavo import LLM, RequestOutput, SamplingParams
from octavo.builtin.llama import Llama
from octavo.builtin.torch_attention import TorchAttention
from octavo.runner import graphs, worker
from octavo.runner.graphs import DecodeGraphs, Forward, graph_plan, graph_sizes

BYTES_PER_BLOCK = 2 * 8 * 2 * 12 * 4 * 2  # key and value, tokens, KV heads, head_dim, float32, layers
PROMPTS = ["hello", "a longer prompt than the others", "x", "hello world", "the end", "abc abc abc"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Engines of this test capture steps of 1, 2, 4 and 8 requests; the sizes that were replayed."""
    sizes: list[int] = []
    replay = DecodeGraphs.replay

    def record(self: DecodeGraphs, size: int, with_adapters: bool) -> tuple[Tensor, Tensor]:
        sizes.append(size)
        return replay(self, size, with_adapters)

    capture_on_cpu(monkeypatch, (1, 2, 4, 8))
    monkeypatch.setattr(DecodeGraphs, "replay", record)
    return sizes


@pytest.fixture
def generate(folder: Path) -> Callable[..., list[RequestOutput]]:
    def run(params: SamplingParams | list[SamplingParams], **settings: Any) -> list[RequestOutput]:
        settings = {"dtype": "float32", "block_size": 8, "max_num_seqs": 8, **settings}
        with LLM(str(folder), **settings) as llm:
            return llm.generate(PROMPTS, params)

    return run


def tokens(outputs: Sequence[RequestOutput]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True),
    "different lengths": [SamplingParams(temperature=0.0, max_tokens=3 + 4 * index) for index in range(len(PROMPTS))],
    "drawn": SamplingParams(temperature=1.0, top_p=0.9, top_k=20, seed=3, max_tokens=20),
    "several completions": SamplingParams(temperature=1.0, n=3, seed=5, max_tokens=12),
    "penalties": SamplingParams(temperature=0.0, presence_penalty=2.0, frequency_penalty=1.0, max_tokens=20),
    "penalties beside none": [
        SamplingParams(temperature=0.0, presence_penalty=2.0 * (index % 2), max_tokens=16)
        for index in range(len(PROMPTS))
    ],
    "bad words": SamplingParams(temperature=1.0, seed=1, bad_words=["e", "ab", " "], max_tokens=16),
}

SETTINGS = {
    "one step in flight": {"max_steps_in_flight": 1},
    "two steps in flight": {"max_steps_in_flight": 2},
    "four steps in flight": {"max_steps_in_flight": 4},
    "two steps, small chunks": {"max_steps_in_flight": 2, "max_num_batched_tokens": 7},
    "two steps, preemptions": {"max_steps_in_flight": 2, "kv_cache_memory_bytes": 17 * BYTES_PER_BLOCK},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_captured_steps_give_the_tokens_of_plain_ones(
    params: Any, settings: dict[str, Any], replayed: list[int], generate: Any
) -> None:
    found = tokens(generate(params, max_model_len=64, **settings))
    assert replayed, "no step was replayed"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(worker, "graph_plan", graph_plan)
        wanted = tokens(generate(params, max_model_len=64, max_steps_in_flight=1))
    assert found == wanted


def test_captured_steps_give_the_logprobs_of_plain_ones(replayed: list[int], generate: Any) -> None:
    params = SamplingParams(temperature=0.0, logprobs=3, prompt_logprobs=2, max_tokens=8)
    found = generate(params, max_steps_in_flight=2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(worker, "graph_plan", graph_plan)
        wanted = generate(params)
    for one, other in zip(found, wanted, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert [list(step) for step in one.outputs[0].logprobs] == [list(step) for step in other.outputs[0].logprobs]
        assert one.prompt_logprobs[0] is None
        assert [list(step) for step in one.prompt_logprobs[1:]] == [list(step) for step in other.prompt_logprobs[1:]]


def test_a_step_of_decodes_is_padded_to_the_next_captured_size(replayed: list[int], folder: Path) -> None:
    with LLM(str(folder), dtype="float32", max_num_seqs=8) as llm:
        llm.generate(PROMPTS[:3], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
    assert set(replayed) == {4}


def test_a_step_of_more_requests_than_were_captured_is_computed_plainly(
    replayed: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture_on_cpu(monkeypatch, (1, 2))
    with LLM(str(folder), dtype="float32", max_num_seqs=8) as llm:
        llm.generate(PROMPTS[:3], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
    assert replayed == []


def test_a_backend_that_cannot_be_captured_is_not(
    replayed: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchAttention, "graph_mode", "none")
    with LLM(str(folder), dtype="float32", max_num_seqs=8) as llm:
        llm.generate(PROMPTS[:3], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
    assert replayed == []


def test_a_model_that_cannot_be_captured_is_not(
    replayed: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Llama, "can_be_captured", False)
    with LLM(str(folder), dtype="float32", max_num_seqs=8) as llm:
        llm.generate(PROMPTS[:3], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
    assert replayed == []


# ------------------------------------------------------------------------------------------------------- the plan


def outputs_of(size: int, with_adapters: bool) -> Forward:
    return lambda: (torch.full((size, 1), float(size)), torch.zeros(size, 1))


def test_no_size_is_begun_after_the_time_is_over_and_the_largest_comes_first() -> None:
    captured = DecodeGraphs(plan_of((1, 2, 4, 8), max_seconds=0.0), with_adapters=False).capture(outputs_of)
    assert captured == [8]


def test_small_sizes_are_captured_before_those_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []

    def prepare(size: int, with_adapters: bool) -> Forward:
        order.append(size)
        return outputs_of(size, with_adapters)

    DecodeGraphs(plan_of((1, 2, 4, 8)), with_adapters=False).capture(prepare)
    assert order == [8, 1, 2, 4]


def test_no_size_is_begun_after_the_memory_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter(range(1000, 0, -100))
    memory = graphs.device_memory("cpu")
    monkeypatch.setattr(
        graphs, "device_memory", lambda _: type(memory)(free_bytes=next(free), total_bytes=memory.total_bytes)
    )
    assert DecodeGraphs(plan_of((1, 2, 4, 8), max_share=0.15), with_adapters=False).capture(outputs_of) == [1, 8]


def test_capturing_logs_time_and_memory_beside_what_is_allowed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="octavo.runner.graphs"):
        DecodeGraphs(plan_of((1, 8), max_seconds=0.0), with_adapters=False).capture(outputs_of)
    (message,) = caplog.messages
    assert message.startswith("Captured decode steps of 8 requests in 0.0")
    assert "of 0 s allowed" in message
    assert "left out: 1" in message


def test_the_largest_step_is_always_among_the_sizes() -> None:
    assert graph_sizes(1) == (1,)
    assert graph_sizes(5) == (1, 2, 4, 5)
    assert graph_sizes(256)[-3:] == (128, 192, 256)
    assert graph_sizes(4000)[-1] == 512


def test_nothing_is_captured_on_a_cpu_nor_when_eager_steps_are_asked_for() -> None:
    assert graph_plan("cpu", 8, False) is None
    assert graph_plan("cuda", 8, True) is None
