"""fair: what a tenant is charged, where it stands after an absence, who is preempted, what is remembered."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from octavo.request import Request
from octavo.testing.scheduling_simulation import Simulation, simulated_request
from octavo_scheduler_fair import fair
from octavo_scheduler_fair.fair import FairPolicy
from octavo_scheduler_fair.options import FairOptions


def request(request_id: str, tenant: str | None = "a", num_prompt_tokens: int = 4, **fields: Any) -> Request:
    """The prompts of no two ids begin alike."""
    first = sum(ord(character) * 256**index for index, character in enumerate(request_id))
    prompt = [first] + [1] * (num_prompt_tokens - 1)
    return simulated_request(request_id, prompt, fields.pop("max_tokens", 3), tenant=tenant, **fields)


def simulation(*requests: Request, policy: FairPolicy | None = None, **engine: Any) -> Simulation:
    simulation = Simulation(policy or FairPolicy(FairOptions()), **{"num_blocks": 100, **engine})
    for each in requests:
        simulation.add(each)
    return simulation


def counters(engine: Simulation) -> tuple[float, float]:
    metrics = engine.scheduler.policy.metrics()
    return metrics["min_counter"], metrics["max_counter"]


def order_of_entry(engine: Simulation) -> list[str]:
    entered: list[str] = []
    while engine.alive:
        if (step := engine.submit()) is not None:
            entered += [new_row.request_id for new_row in step.entering]
        engine.collect()
    return entered


# ----------------------------------------------------------------------------------------------------- charges


def test_a_prompt_token_costs_1_and_an_output_token_2() -> None:
    engine = simulation(request("r", num_prompt_tokens=5))
    engine.step()
    assert counters(engine) == (7.0, 7.0)
    engine.step()
    assert counters(engine) == (9.0, 9.0)


def test_weights_of_tokens_can_be_chosen() -> None:
    policy = FairPolicy(FairOptions(input_weight=3, output_weight=0.5))
    engine = simulation(request("r", num_prompt_tokens=5), policy=policy)
    engine.step()
    assert counters(engine) == (15.5, 15.5)


def test_a_tenant_of_weight_4_is_charged_a_quarter() -> None:
    policy = FairPolicy(FairOptions(tenant_weights={"a": 4}))
    engine = simulation(request("r", num_prompt_tokens=6), request("s", "b", num_prompt_tokens=6), policy=policy)
    engine.step()
    assert counters(engine) == (2.0, 8.0)


def test_a_prompt_in_chunks_is_charged_chunk_by_chunk() -> None:
    engine = simulation(request("r", num_prompt_tokens=10), max_num_batched_tokens=4)
    charged = []
    for _ in range(3):
        engine.step()
        charged.append(counters(engine)[0])
    assert charged == [4.0, 8.0, 12.0]


def test_prompt_tokens_from_the_prefix_cache_are_free() -> None:
    engine = simulation(request("r", num_prompt_tokens=9))
    engine.step()
    before = counters(engine)[0]
    again = request("r", num_prompt_tokens=9)
    again.request_id = "again"
    engine.add(again)
    engine.step()
    assert again.num_cached_tokens == 8
    assert counters(engine)[0] - before == 2 + (1 + 2)  # an output of the first; one prompt token and an output


def test_what_the_cache_saved_moves_those_behind_up() -> None:
    policy = FairPolicy(FairOptions())
    first, second = request("r", num_prompt_tokens=9), request("s")
    policy.key(first, 0.0)
    assert policy.key(second, 0.0) == 9.0
    policy.served(first, 1, 1)
    assert policy.key(second, 0.0) == 1.0 + 2.0


def test_computing_again_after_a_preemption_is_free() -> None:
    engine = simulation(
        *(request(name, max_tokens=12, arrival_time=number) for number, name in enumerate("rs")),
        num_blocks=5,
        enable_prefix_caching=False,
    )
    while engine.finished.keys() != {"r", "s"}:
        before = counters(engine)[0]
        updates = engine.step()
        if engine.alive:
            assert counters(engine)[0] - before in (2.0 * len(updates), 2.0 * len(updates) + 8)
    assert engine.scheduler.num_preemptions > 0


def test_a_request_that_waits_again_after_a_preemption_stands_where_its_prompt_has_brought_its_tenant() -> None:
    policy = FairPolicy(FairOptions())
    preempted = request("r", num_prompt_tokens=6)
    policy.key(preempted, 0.0)
    policy.served(preempted, 6, 1)
    assert policy.key(preempted, 0.0) == 6.0 + 2.0


def test_a_request_that_is_aborted_while_it_waits_costs_nothing_and_moves_nobody_before_it() -> None:
    policy = FairPolicy(FairOptions())
    requests = [request(name) for name in "abcd"]
    keys = [policy.key(each, 0.0) for each in requests]
    assert keys == [0.0, 4.0, 8.0, 12.0]
    policy.ended(requests[1])
    assert [policy.key(each, 0.0) for each in (requests[0], *requests[2:])] == [0.0, 4.0, 8.0]


# ----------------------------------------------------------------------------------------------------- order


def test_one_step_admits_tenants_in_turn_although_nothing_is_served_yet() -> None:
    many, few = [request(f"a{number}") for number in range(4)], [request(f"b{number}", "b") for number in range(2)]
    engine = simulation(*many, *few, max_num_seqs=4)
    step = engine.submit()
    assert step is not None
    assert [new_row.request_id for new_row in step.entering] == ["a0", "b0", "a1", "b1"]
    engine.collect()
    engine.drain()


def test_within_a_tenant_the_first_to_come_is_the_first_to_enter() -> None:
    engine = simulation(*(request(f"r{number}", num_prompt_tokens=9 - number) for number in range(5)), max_num_seqs=1)
    assert order_of_entry(engine) == [f"r{number}" for number in range(5)]


def test_requests_without_a_tenant_are_one_tenant() -> None:
    nobody = [request(f"n{number}", None) for number in range(3)]
    engine = simulation(*nobody, *(request(f"a{number}") for number in range(3)), max_num_seqs=1)
    assert order_of_entry(engine) == ["n0", "a0", "n1", "a1", "n2", "a2"]


def test_a_tenant_of_weight_2_enters_twice_as_often() -> None:
    policy = FairPolicy(FairOptions(tenant_weights={"a": 2}))
    requests = [request(f"{tenant}{number}", tenant) for tenant in "ab" for number in range(8)]
    engine = simulation(*requests, policy=policy, max_num_seqs=1)
    assert sorted(order_of_entry(engine)[:9]) == [*(f"a{number}" for number in range(6)), "b0", "b1", "b2"]


def test_a_tenant_that_was_away_has_saved_nothing_up() -> None:
    engine = simulation(*(request(f"a{number}") for number in range(20)), max_num_seqs=1)
    for _ in range(15):
        engine.step()
    for number in range(20):
        engine.add(request(f"b{number}", "b"))
    entered = order_of_entry(engine)[:8]
    assert sum(request_id.startswith("a") for request_id in entered) == 4


def test_a_tenant_is_lifted_as_well_when_it_comes_back_while_it_is_still_being_served() -> None:
    slow = request("b", "b", num_prompt_tokens=1, max_tokens=60)
    engine = simulation(slow, *(request(f"a{number}") for number in range(60)), max_num_seqs=3)
    for _ in range(30):
        engine.step()
    assert not slow.finished
    for number in range(60):
        engine.add(request(f"b{number}", "b"))
    entered = order_of_entry(engine)[:8]
    assert sum(request_id.startswith("a") for request_id in entered) >= 3


def test_nothing_is_owed_when_all_requests_have_ended() -> None:
    engine = simulation(*(request(f"a{number}") for number in range(5)))
    engine.drain()
    assert counters(engine) == (0.0, 0.0)
    assert engine.scheduler.policy.key(request("r"), 0.0) == 0.0


# ----------------------------------------------------------------------------------------------------- victims


def test_the_latest_request_of_the_tenant_that_was_served_most_is_preempted() -> None:
    policy = FairPolicy(FairOptions())
    requests = [request("a1"), request("b1", "b"), request("a2"), request("b2", "b"), request("c1", "c")]
    for each in requests:
        policy.key(each, 0.0)
    policy.served(requests[1], 4, 5)
    policy.served(requests[0], 4, 1)
    assert policy.victim(requests) is requests[3]
    assert policy.victim([requests[1], requests[0]]) is requests[1]


# ----------------------------------------------------------------------------------------------------- memory, numbers


def test_a_tenant_that_left_with_no_more_than_others_is_forgotten_at_once() -> None:
    policy = FairPolicy(FairOptions())
    stays, leaves = request("a"), request("b", "b")
    policy.key(stays, 0.0), policy.key(leaves, 0.0)
    policy.served(stays, 4, 0)
    policy.ended(leaves)
    assert set(policy._tenants) == {"a"}


def test_a_tenant_that_left_with_more_than_others_is_remembered() -> None:
    policy = FairPolicy(FairOptions())
    stays, leaves = request("a"), request("b", "b")
    policy.key(stays, 0.0), policy.key(leaves, 0.0)
    policy.served(leaves, 4, 50)
    policy.ended(leaves)
    assert policy.key(request("c", "b"), 0.0) == 104.0


def test_however_many_tenants_come_and_go_few_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair, "MAX_ABSENT_TENANTS", 10)
    policy = FairPolicy(FairOptions())
    policy.key(request("stays"), 0.0)
    for number in range(200):
        once = request(f"r{number}", f"tenant {number}")
        policy.key(once, 0.0)
        policy.served(once, 4, number)
        policy.ended(once)
        assert len(policy._tenants) <= 2 * (10 + 1) + 1
    remembered = sorted(int(name.split()[1]) for name in policy._tenants if name and name.startswith("tenant"))
    assert remembered[-5:] == list(range(195, 200)), "those furthest ahead are the ones to remember"


def test_numbers_tell_how_far_apart_the_tenants_are() -> None:
    engine = simulation(request("r", num_prompt_tokens=6), request("s", "b"), request("t", None))
    engine.step()
    assert engine.scheduler.policy.metrics() == {
        "num_active_tenants": 3.0,
        "min_counter": 6.0,
        "max_counter": 8.0,
        "counter_difference": 2.0,
    }


@pytest.mark.parametrize(
    "options", [{"input_weight": 0}, {"output_weight": -1}, {"tenant_weights": {"a": 0}}, {"output_weight": "inf"}]
)
def test_weights_that_would_make_service_free_or_endless_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        FairOptions(**options)
