"""KV waste, the share of token slots that running requests hold and do not fill, on a workload's own lengths."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import mean

import pytest
from margin_rule import WORKLOADS, generate, read_references

from octavo import LLM, SamplingParams
from octavo.builtin.fcfs import FCFSPolicy
from octavo.config import EngineConfig
from octavo.engine.block_pool import BlockPool
from octavo.engine.engine import Engine
from octavo.engine.scheduler import Scheduler
from octavo.interfaces.executor import Executor, ExecutorReport, Step, StepOutput
from octavo.interfaces.manifest import Manifest
from octavo.request import Request

MAX_WASTE = 0.04


class ModellessExecutor(Executor):
    """Answers with token 0: how many tokens there are decides the waste, not which."""

    def start(self, manifest: Manifest, on_failure: Callable[[BaseException], None]) -> ExecutorReport:
        raise NotImplementedError

    def submit(self, step: Step) -> StepOutput:
        return StepOutput(step_id=step.step_id, token_ids={row.request_id: [0] for row in step.rows if row.samples})

    def collect(self, handle: object) -> StepOutput:
        assert isinstance(handle, StepOutput)
        return handle

    def check(self) -> None: ...

    def stop(self) -> None: ...


def run_w2(num_blocks: int, max_steps_in_flight: int = 1) -> tuple[Engine, list[Step]]:
    """The workload w2, all requests at once, with the default limits; the engine afterwards, and its steps."""
    config = EngineConfig()
    scheduler = Scheduler(
        policy=FCFSPolicy(),
        block_pool=BlockPool(num_blocks, config.block_size),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
    engine = Engine(scheduler, ModellessExecutor(), max_steps_in_flight)
    steps = list[Step]()
    engine.step_listeners.append(steps.append)
    for request in json.loads((WORKLOADS / "w2.json").read_text())["requests"]:
        engine.add(
            Request(
                request_id=str(request["id"]),
                prompt_token_ids=request["prompt"],
                params=SamplingParams(max_tokens=request["max_tokens"]),
                max_total_tokens=len(request["prompt"]) + request["max_tokens"],
            )
        )
    while engine.has_unfinished:
        engine.step()
    return engine, steps


def waste_after_each(steps: list[Step]) -> Iterator[float]:
    """The waste by its definition, from what the steps say; none of their requests is preempted."""
    block_size = EngineConfig().block_size
    block_ids: dict[str, list[int]] = {}
    num_stored: dict[str, int] = {}
    for step, next_step in pairwise([*steps, Step(step_id=-1, leaving=[row.request_id for row in steps[-1].rows])]):
        for row in step.rows:
            block_ids.setdefault(row.request_id, []).extend(row.new_block_ids)
            num_stored[row.request_id] = row.num_computed_tokens + row.num_tokens
        for request_id in next_step.leaving:
            del block_ids[request_id], num_stored[request_id]
        stored_in_block = {
            block_id: min(block_size, num_stored[request_id] - index * block_size)
            for request_id, held in block_ids.items()
            for index, block_id in enumerate(held)
        }
        if stored_in_block:
            yield 1 - sum(stored_in_block.values()) / (len(stored_in_block) * block_size)


@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
@pytest.mark.parametrize("num_blocks", [2000, 500], ids=["all at once", "in turns"])
def test_waste_is_under_four_percent(num_blocks: int, max_steps_in_flight: int) -> None:
    engine, _ = run_w2(num_blocks, max_steps_in_flight)
    assert 0 < engine.stats().kv_waste < MAX_WASTE


def test_waste_is_what_its_definition_says() -> None:
    engine, steps = run_w2(num_blocks=2000)
    assert engine.stats().kv_waste == pytest.approx(mean(waste_after_each(steps)))


@pytest.mark.full
def test_waste_is_under_four_percent_on_the_demo_model() -> None:
    with LLM("demo") as llm:
        generate(llm, read_references("w2"))
        assert 0 < llm.stats().kv_waste < MAX_WASTE
