"""fair, whatever comes: shares within their bound, nobody starves, nothing idles, equal traffic is served equally.

The real scheduler runs, with the kit's fake model in place of an executor. README.md derives the bound.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.builtin.fcfs import FCFSPolicy
from octavo.interfaces import SchedulerPolicy
from octavo.request import Request
from octavo.testing.scheduling_simulation import Simulation, simulated_request
from octavo_scheduler_fair.fair import FairPolicy
from octavo_scheduler_fair.options import FairOptions

QUIET = settings(max_examples=40, derandomize=True, database=None, deadline=None)
L, O, N, B = 10, 8, 4, 12  # longest prompt and output, requests and tokens in a step  # noqa: E741
NUM_BLOCKS = 12  # of four tokens: four requests fit only while they are small, so some are preempted


def bound(depth: int, options: FairOptions) -> float:
    """U of README.md, for the tenant of the smallest weight."""
    virtual = options.input_weight * (3 * L + 2 * depth * B) + options.output_weight * N * (O + depth)
    return virtual / min([1.0, *options.tenant_weights.values()])


REQUEST = st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(1, L), st.integers(1, O))
ARRIVALS = st.lists(st.lists(REQUEST, max_size=4), min_size=1, max_size=6)  # of steps that repeat for ever
OPTIONS = st.builds(
    FairOptions,
    input_weight=st.sampled_from([1.0, 2.0]),
    output_weight=st.sampled_from([2.0, 0.0, 1.0]),
    tenant_weights=st.sampled_from([{}, {"a": 2.0}, {"a": 3.0, "b": 0.5}]),
)


@dataclass
class Ledger:
    """An engine under repeated arrivals, and what each tenant was served, in virtual tokens of weight 1."""

    policy: SchedulerPolicy
    options: FairOptions
    depth: int = 1
    served: dict[str | None, float] = field(default_factory=lambda: defaultdict(float))

    def __post_init__(self) -> None:
        self.engine = Simulation(
            self.policy,
            num_blocks=NUM_BLOCKS,
            max_num_seqs=N,
            max_num_batched_tokens=B,
            depth=self.depth,
            enable_prefix_caching=False,
        )
        told, self._numbers = self.policy.served, count()

        def served(request: Request, num_prompt_tokens: int, num_output_tokens: int) -> None:
            told(request, num_prompt_tokens, num_output_tokens)
            virtual = self.options.input_weight * num_prompt_tokens + self.options.output_weight * num_output_tokens
            self.served[request.tenant] += virtual / self.options.tenant_weights.get(request.tenant or "", 1.0)

        self.policy.served = served
        self.engine.scheduler._tell_served = True

    def add(self, tenant: str | None, num_prompt_tokens: int, max_tokens: int) -> Request:
        request = simulated_request(
            f"r{next(self._numbers)}",
            [1] * num_prompt_tokens,
            max_tokens,
            tenant=tenant,
            arrival_time=self.engine.now,
        )
        self.engine.add(request)
        return request

    def is_backlogged(self, tenant: str | None) -> bool:
        return any(one.tenant == tenant and one.status.value == "waiting" for one in self.engine.alive.values())


def largest_difference(ledger: Ledger, prompts: dict[str, tuple[int, int, int]], num_steps: int) -> float:
    """How far the tenants' service drifts apart between any two moments of a time in which all have requests waiting.

    `prompts` has for each tenant how many requests it keeps waiting, of which prompt length and output length.
    """
    differences: list[float] = []
    for _ in range(num_steps):
        for tenant, (num_waiting, num_prompt_tokens, max_tokens) in prompts.items():
            waiting = sum(one.tenant == tenant and not one.num_scheduled_tokens for one in ledger.engine.alive.values())
            for _ in range(num_waiting - waiting):
                ledger.add(tenant, num_prompt_tokens, max_tokens)
        ledger.engine.step()
        assert all(map(ledger.is_backlogged, prompts)), "the bound is about tenants that always have requests waiting"
        values = [ledger.served[tenant] for tenant in prompts]
        differences.append(values[0] - values[1])
    return max(differences) - min(differences)


BACKLOG = st.tuples(st.integers(6, 12), st.integers(1, L), st.integers(1, O))


@QUIET
@given(a=BACKLOG, b=BACKLOG, depth=st.sampled_from([1, 2, 4]), options=OPTIONS)
def test_tenants_who_always_wait_are_served_alike_up_to_the_bound(
    a: tuple[int, int, int], b: tuple[int, int, int], depth: int, options: FairOptions
) -> None:
    ledger = Ledger(FairPolicy(options), options, depth)
    assert largest_difference(ledger, {"a": a, "b": b}, 250) <= 2 * bound(depth, options)


def test_first_come_first_served_drifts_past_that_bound() -> None:
    options = FairOptions()
    ledger = Ledger(FCFSPolicy(), options)
    assert largest_difference(ledger, {"a": (12, L, O), "b": (6, 1, 1)}, 250) > 2 * bound(1, options)


@QUIET
@given(arrivals=ARRIVALS, depth=st.sampled_from([1, 2, 4]), options=OPTIONS, pick=st.integers(0, 30))
def test_nobody_waits_for_more_than_a_bounded_service_to_others(
    arrivals: list[list[tuple[Any, int, int]]], depth: int, options: FairOptions, pick: int
) -> None:
    """Whatever keeps coming, for ever, from four tenants."""
    ledger = Ledger(FairPolicy(options), options, depth)
    patient: Request | None = None
    allowed: dict[str | None, float] = {}
    for number in range(1500):
        for tenant, num_prompt_tokens, max_tokens in arrivals[number % len(arrivals)]:
            request = ledger.add(tenant, num_prompt_tokens, max_tokens)
            if patient is None and number >= pick:
                patient = request
                same = [one for one in ledger.engine.alive.values() if one.tenant == tenant]
                weight = options.tenant_weights.get(tenant or "", 1.0)
                before = sum(
                    options.input_weight * len(one.prompt_token_ids) + options.output_weight * one.params.max_tokens
                    for one in same
                )
                # Nobody is served further ahead of its tenant than the bound, while that tenant is served all before.
                limit = before / weight + 2 * bound(depth, options)
                allowed = {name: ledger.served[name] + limit for name in ("a", "b", "c", None)}
        ledger.engine.step()
        if patient is not None:
            if patient.first_scheduled_time is not None:
                return
            assert all(ledger.served[name] <= allowed[name] for name in allowed)
    assert patient is None, "it has not been served at all"


@QUIET
@given(arrivals=ARRIVALS, depth=st.sampled_from([1, 2, 4]))
def test_no_step_leaves_a_place_empty_that_a_waiting_request_could_take(
    arrivals: list[list[tuple[Any, int, int]]], depth: int
) -> None:
    """Without a shortage of blocks; the engine itself checks that a step with nothing in it has a reason."""
    engine = Simulation(
        FairPolicy(FairOptions()), num_blocks=1000, max_num_seqs=N, max_num_batched_tokens=B, depth=depth
    )
    numbers = count()
    for number in range(60):
        for tenant, num_prompt_tokens, max_tokens in arrivals[number % len(arrivals)]:
            prompt = [next(numbers)] * num_prompt_tokens
            engine.add(simulated_request(f"r{next(numbers)}", prompt, max_tokens, tenant=tenant))
        step = engine.submit()
        waiting = engine.scheduler.num_waiting
        assert not waiting or engine.scheduler.num_running == N or (step is not None and step.num_tokens == B)
        if len(engine.in_flight) == depth or step is None:
            engine.step()
    engine.drain()


@QUIET
@given(arrivals=ARRIVALS, depth=st.sampled_from([1, 2, 4]))
def test_equal_arrivals_are_served_equally(arrivals: list[list[tuple[Any, int, int]]], depth: int) -> None:
    lives = []
    for _ in range(2):
        ledger = Ledger(FairPolicy(FairOptions()), FairOptions(), depth)
        for number in range(40):
            for each in arrivals[number % len(arrivals)]:
                ledger.add(*each)
            ledger.engine.step()
        ledger.engine.drain()
        lives.append([(one.request_id, one.first_scheduled_time, one.epoch) for one in ledger.engine.finished.values()])
    assert lives[0] == lives[1]


@pytest.mark.parametrize("depth", [1, 2])
def test_tenants_who_come_once_do_not_keep_another_waiting(depth: int) -> None:
    """As many as the engine can serve, each with a counter that starts where others are being served."""
    ledger = Ledger(FairPolicy(FairOptions()), FairOptions(), depth)
    patient = [ledger.add("a", L, O) for _ in range(10)]
    for number in range(600):
        unfinished = sum(one.tenant != "a" for one in ledger.engine.alive.values())
        for each in range(2 * N - unfinished):
            ledger.add(f"once {number} {each}", L, 2)
        ledger.engine.step()
    assert all(request.finished for request in patient)
