"""priority: the order, what waiting does to it, who is preempted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from octavo.request import Request
from octavo.testing.scheduling_simulation import Simulation, simulated_request
from octavo_scheduler_fair.options import PriorityOptions
from octavo_scheduler_fair.priority import PriorityPolicy

WITHOUT_AGING = PriorityOptions(aging_seconds=None)
AGING = PriorityOptions(aging_seconds=5.0)


def simulation(options: PriorityOptions, **engine: Any) -> Simulation:
    return Simulation(PriorityPolicy(options), **{"num_blocks": 40, "max_num_seqs": 2, **engine})


def add(engine: Simulation, request_id: str, priority: int = 0, **fields: Any) -> Request:
    fields.setdefault("arrival_time", engine.now)
    request = simulated_request(request_id, [1, 2, 3], 2, engine.capacity, priority=priority, **fields)
    engine.add(request)
    return request


def order_of_entry(engine: Simulation) -> list[str]:
    engine.drain()
    requests = engine.finished.values()
    return [request.request_id for request in sorted(requests, key=lambda request: request.first_scheduled_time or 0)]


@settings(max_examples=50, derandomize=True, database=None, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 9)), min_size=1, max_size=12),
    depth=st.sampled_from([1, 2, 4]),
)
def test_without_aging_requests_enter_by_priority_then_arrival(requests: list[tuple[int, int]], depth: int) -> None:
    engine = simulation(WITHOUT_AGING, max_num_seqs=1, depth=depth)
    for number, (priority, arrival) in enumerate(requests):
        add(engine, f"{number}", priority, arrival_time=arrival)
    entered = [requests[int(request_id)] for request_id in order_of_entry(engine)]
    assert entered == sorted(requests)


def test_without_aging_a_request_waits_as_long_as_better_ones_come() -> None:
    engine = simulation(WITHOUT_AGING)
    patient = add(engine, "patient", 1)
    for number in range(300):
        add(engine, f"{number} a")
        add(engine, f"{number} b")
        engine.step()
    assert patient.first_scheduled_time is None


def test_a_step_of_priority_is_made_up_for_by_so_many_seconds_of_waiting() -> None:
    policy = PriorityPolicy(AGING)

    def key(priority: int, arrival_time: float) -> tuple[float, float]:
        return policy.key(simulated_request("r", [1], 1, priority=priority, arrival_time=arrival_time), 99.0)

    assert key(1, 0.0) < key(0, 5.1)
    assert key(0, 4.9) < key(1, 0.0)
    assert key(0, 5.0) < key(1, 0.0), "of equal ranks the better priority goes first"


@settings(max_examples=30, derandomize=True, database=None, deadline=None)
@given(
    priority=st.integers(0, 4),
    backlog=st.integers(0, 10),
    arrivals=st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=6),
    depth=st.sampled_from([1, 2, 4]),
)
def test_with_aging_only_those_who_come_within_its_time_overtake(
    priority: int, backlog: int, arrivals: list[list[int]], depth: int
) -> None:
    """Whatever keeps coming, for ever: a second is a step, two requests a step is more than the engine can do."""
    engine = simulation(AGING, depth=depth)
    for number in range(backlog):
        add(engine, f"before {number}")
    patient = add(engine, "patient", priority)
    may_overtake = backlog
    for number in range(1000):
        if patient.first_scheduled_time is not None:
            break
        for each, other in enumerate(arrivals[number % len(arrivals)]):
            add(engine, f"{number} {each}", other)
            may_overtake += engine.now <= patient.arrival_time + priority * 5.0
        engine.step()
    assert patient.first_scheduled_time is not None
    others = [one for one in [*engine.alive.values(), *engine.finished.values()] if one is not patient]
    entered = [one.first_scheduled_time for one in others if one.first_scheduled_time is not None]
    entered_before = sum(seconds < patient.first_scheduled_time for seconds in entered)
    assert entered_before <= may_overtake


@pytest.mark.parametrize(("options", "victim"), [(WITHOUT_AGING, "worst"), (AGING, "late")])
def test_the_worst_rank_is_preempted(options: PriorityOptions, victim: str) -> None:
    requests = [
        simulated_request("worst", [1], 1, priority=2, arrival_time=0.0),
        simulated_request("late", [1], 1, priority=1, arrival_time=20.0),
        simulated_request("best", [1], 1, priority=0, arrival_time=1.0),
    ]
    assert PriorityPolicy(options).victim(requests).request_id == victim


def test_of_equals_the_one_admitted_last_is_preempted() -> None:
    requests = [simulated_request(name, [1], 1) for name in "ab"]
    assert PriorityPolicy(AGING).victim(requests).request_id == "b"


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), "soon"])
def test_seconds_that_are_no_time_are_refused(seconds: Any) -> None:
    with pytest.raises(ValidationError, match="aging_seconds"):
        PriorityOptions(aging_seconds=seconds)
