"""Continuous batching, seen: requests join and leave a running batch from one step to the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from octavo import LLM, SamplingParams
from octavo.engine.engine import Engine
from octavo.interfaces.executor import Step
from octavo.request import Request

PROMPT = [504, 3575, 282, 4649, 314]  # "The capital of France is"
MAX_NUM_SEQS = 2


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", max_num_seqs=MAX_NUM_SEQS, max_model_len=256, enable_prefix_caching=False) as llm:
        yield llm


@pytest.fixture
def steps(llm: LLM) -> Iterator[list[Step]]:
    """Every step of the engine as it is submitted."""
    steps = list[Step]()
    llm.engine.step_listeners.append(steps.append)
    yield steps
    llm.engine.step_listeners.remove(steps.append)
    while llm.engine.has_unfinished:
        llm.engine.step()


def add(engine: Engine, request_id: str, max_tokens: int) -> None:
    """Queue a greedy request for exactly `max_tokens` tokens."""
    engine.add(
        Request(
            request_id=request_id,
            prompt_token_ids=PROMPT,
            params=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
            max_total_tokens=len(PROMPT) + max_tokens,
        )
    )


def request_ids(step: Step) -> list[str]:
    return [row.request_id for row in step.rows]


def test_a_request_added_while_another_decodes_is_in_the_very_next_step(llm: LLM, steps: list[Step]) -> None:
    add(llm.engine, "first", max_tokens=8)
    for _ in range(3):
        llm.engine.step()
    add(llm.engine, "second", max_tokens=8)
    llm.engine.step()
    assert [request_ids(step) for step in steps] == [["first"]] * 3 + [["first", "second"]]
    assert [row.num_tokens for row in steps[-1].rows] == [1, len(PROMPT)]  # one decodes, the other begins


def test_a_finished_request_leaves_its_place_to_the_next_in_the_following_step(llm: LLM, steps: list[Step]) -> None:
    add(llm.engine, "long", max_tokens=6)
    add(llm.engine, "short", max_tokens=3)
    add(llm.engine, "waiting", max_tokens=2)
    while llm.engine.has_unfinished:
        llm.engine.step()
    assert [request_ids(step) for step in steps] == [
        ["long", "short"],
        ["long", "short"],
        ["long", "short"],
        ["long", "waiting"],
        ["long", "waiting"],
        ["long"],
    ]
    assert steps[3].leaving == ["short"]
    assert [row.request_id for row in steps[3].entering] == ["waiting"]


def test_every_step_gives_each_running_request_a_token(llm: LLM, steps: list[Step]) -> None:
    add(llm.engine, "one", max_tokens=3)
    add(llm.engine, "other", max_tokens=3)
    found = [[output.request_id for output in llm.engine.step() if output.new_token_ids] for _ in range(3)]
    assert found == [["one", "other"]] * 3
