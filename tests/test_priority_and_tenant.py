"""Priority and tenant: from whoever calls, through the request, to the scheduler policy, and its numbers back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_llama

from octavo import LLM, AsyncLLM, SamplingParams
from octavo.builtin.fcfs import FCFSPolicy
from octavo.errors import RequestError
from octavo.request import Request

MESSAGES = [{"role": "user", "content": "hi"}]
PARAMS = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)


class Listening(FCFSPolicy):
    """First come, first served; notes who came."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str | None]] = []

    def key(self, request: Request, now: float) -> float:
        self.seen.append((request.priority, request.tenant))
        return super().key(request, now)

    def metrics(self) -> Mapping[str, float]:
        return {"num_seen": float(len(self.seen))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def shared_llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), dtype="float32") as llm:
        yield llm


@pytest.fixture
def llm(shared_llm: LLM) -> LLM:
    shared_llm.engine.scheduler.policy = Listening()
    return shared_llm


def seen(llm: LLM) -> list[tuple[int, str | None]]:
    policy = llm.engine.scheduler.policy
    assert isinstance(policy, Listening)
    return policy.seen


def test_without_a_word_the_priority_is_0_and_there_is_no_tenant(llm: LLM) -> None:
    llm.generate("a", PARAMS)
    assert seen(llm) == [(0, None)]


def test_one_priority_and_one_tenant_are_for_all_prompts(llm: LLM) -> None:
    llm.generate(["a", "b"], PARAMS, priority=3, tenant="x")
    assert seen(llm) == [(3, "x"), (3, "x")]


def test_each_prompt_can_have_its_own(llm: LLM) -> None:
    llm.generate(["a", "b"], PARAMS, priority=[2, -1], tenant=["x", None])
    assert seen(llm) == [(2, "x"), (-1, None)]


def test_every_completion_of_a_prompt_has_its_priority_and_tenant(llm: LLM) -> None:
    llm.generate("a", SamplingParams(n=2, max_tokens=1), priority=4, tenant="x")
    assert seen(llm) == [(4, "x"), (4, "x")]


def test_conversations_and_streams_take_them_too(llm: LLM) -> None:
    llm.chat(MESSAGES, PARAMS, priority=1, tenant="chat")
    list(llm.stream("a", PARAMS, priority=2, tenant="stream"))
    list(llm.stream_chat(MESSAGES, PARAMS, priority=3, tenant="stream_chat"))
    assert seen(llm) == [(1, "chat"), (2, "stream"), (3, "stream_chat")]


def test_a_policy_that_does_not_go_by_them_passes_over_them(llm: LLM) -> None:
    llm.engine.scheduler.policy = FCFSPolicy()
    outputs = llm.generate(["a", "b"], PARAMS, priority=[1, 0], tenant="x")
    assert all(output.finished for output in outputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"priority": [1]}, "2 prompts came with 1 priorities; give one, or one for each"),
        ({"tenant": ["x"] * 3}, "2 prompts came with 3 tenants; give one, or one for each"),
        ({"priority": "high"}, "A priority is an integer .* found 'high'"),
        ({"priority": [0, 1.5]}, r"A priority is an integer .* found 1\.5"),
        ({"priority": True}, "A priority is an integer .* found True"),
        ({"priority": [0, None]}, "A priority is an integer .* found None"),
        ({"priority": 2**31}, "A priority is an integer from -2147483647 to 2147483647.* found 2147483648"),
        ({"tenant": 7}, "A tenant is a text, .* found 7"),
        ({"tenant": ["x", b"y"]}, "A tenant is a text, .* found b'y'"),
    ],
)
def test_what_is_no_priority_or_tenant_is_refused_before_any_prompt_starts(
    llm: LLM, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(["a", "b"], PARAMS, **arguments)
    assert seen(llm) == []


def test_the_policy_s_numbers_are_among_the_engine_s(llm: LLM) -> None:
    llm.generate(["a", "b"], PARAMS)
    assert llm.stats().policy_metrics == {"num_seen": 2.0}


async def test_async_streams_carry_them(folder: Path) -> None:
    with AsyncLLM(str(folder), dtype="float32") as llm:
        policy = llm._assembly.engine.scheduler.policy = Listening()
        outputs = [output async for output in llm.generate("a", PARAMS, priority=5, tenant="x")]
        assert outputs[-1].finished
        assert policy.seen == [(5, "x")]
        with pytest.raises(RequestError, match="A priority is an integer"):
            await anext(llm.generate("a", PARAMS, priority=True))
