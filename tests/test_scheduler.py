"""The scheduler, one fact at a time; test_scheduler_properties.py checks that the facts hold together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from octavo.builtin.fcfs import FCFSPolicy
from octavo.engine import scheduler as scheduler_module
from octavo.engine.block_pool import BlockPool
from octavo.engine.scheduler import RequestUpdate, Scheduler
from octavo.errors import PluginError, RequestError
from octavo.interfaces.executor import Step, StepOutput
from octavo.interfaces.scheduling import SchedulerPolicy
from octavo.request import Request, RequestStatus
from octavo.sampling_params import SamplingParams


def make_scheduler(
    num_blocks: int = 100,
    *,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 64,
    policy: SchedulerPolicy | None = None,
    caching: bool = True,
) -> Scheduler:
    return Scheduler(
        policy=policy or FCFSPolicy(),
        block_pool=BlockPool(num_blocks, block_size, caching),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        clock=lambda: 5.0,
    )


def make_request(request_id: str, prompt: int | list[int] = 4, max_tokens: int = 8, **fields: Any) -> Request:
    """`prompt` is token ids, or how many; those of different ids differ."""
    token_ids = [ord(request_id[0]) * 1000 + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    params = SamplingParams(max_tokens=max_tokens, min_tokens=fields.pop("min_tokens", 0))
    fields.setdefault("max_total_tokens", len(token_ids) + max_tokens)
    return Request(request_id=request_id, prompt_token_ids=token_ids, params=params, **fields)


def add(scheduler: Scheduler, *requests: Request) -> None:
    for request in requests:
        scheduler.add(request)


def submit(scheduler: Scheduler) -> Step:
    step = scheduler.schedule()
    assert step is not None
    return step


def collect(scheduler: Scheduler, step: Step, token_id: int = 7) -> list[RequestUpdate]:
    token_ids = {row.request_id: [token_id] for row in step.rows if row.samples}
    return scheduler.apply(step, StepOutput(step_id=step.step_id, token_ids=token_ids))


def run(scheduler: Scheduler, num_steps: int = 1, token_id: int = 7) -> list[Step]:
    steps = []
    for _ in range(num_steps):
        steps.append(submit(scheduler))
        collect(scheduler, steps[-1], token_id)
    return steps


def drain(scheduler: Scheduler, depth: int = 1, max_steps: int = 1000) -> None:
    in_flight: list[Step] = []
    for _ in range(max_steps):
        while len(in_flight) < depth and (step := scheduler.schedule()) is not None:
            in_flight.append(step)
        if not in_flight:
            return
        collect(scheduler, in_flight.pop(0))
    pytest.fail("requests run for ever")


def rows(step: Step) -> dict[str, int]:
    return {row.request_id: row.num_tokens for row in step.rows}


class FirstAsVictim(FCFSPolicy):
    def victim(self, running: Sequence[Request]) -> Request:
        return running[0]


# ------------------------------------------------------------------------------------------------ add


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="empty prompt"):
        make_scheduler().add(make_request("a", []))


def test_a_prompt_without_room_for_output_is_refused_with_both_numbers() -> None:
    with pytest.raises(RequestError, match=r"prompt of 10 tokens and may have 10 in all"):
        make_scheduler().add(make_request("a", 10, max_total_tokens=10))


def test_a_request_larger_than_the_cache_is_refused_with_its_numbers() -> None:
    with pytest.raises(RequestError, match=r"18 tokens, 5 blocks of 4; the KV cache has 4"):
        make_scheduler(4).add(make_request("a", 10, max_total_tokens=18))


def test_a_request_whose_last_token_has_no_slot_is_served() -> None:
    scheduler = make_scheduler(4)
    request = make_request("a", 10, max_total_tokens=17)
    scheduler.add(request)
    drain(scheduler)
    assert len(request.output_token_ids) == 7


def test_a_taken_request_id_is_refused() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    with pytest.raises(RequestError, match="'a' is already in use"):
        scheduler.add(make_request("a"))


def test_the_id_of_an_aborted_request_can_be_used_while_its_step_is_in_flight() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    first = submit(scheduler)
    scheduler.abort("a")
    again = make_request("a")
    scheduler.add(again)
    second = submit(scheduler)
    assert (second.leaving, [new_row.request_id for new_row in second.entering]) == (["a"], ["a"])
    assert collect(scheduler, first) == []
    assert [update.request for update in collect(scheduler, second)] == [again]


# ------------------------------------------------------------------------------------------------ rows and budget


def test_nothing_to_do_is_no_step() -> None:
    assert make_scheduler().schedule() is None


def test_a_long_prompt_is_computed_in_chunks_and_samples_after_the_last() -> None:
    scheduler = make_scheduler(budget=4)
    scheduler.add(make_request("a", 10))
    steps = run(scheduler, 4)
    assert [rows(step)["a"] for step in steps] == [4, 4, 2, 1]
    assert [step.rows[0].samples for step in steps] == [False, False, True, True]
    assert [step.rows[0].num_computed_tokens for step in steps] == [0, 4, 8, 10]


def test_running_requests_are_served_before_new_ones() -> None:
    scheduler = make_scheduler(budget=5)
    scheduler.add(make_request("b", 4, arrival_time=1.0))
    run(scheduler)
    scheduler.add(make_request("a", 9, arrival_time=0.0))
    assert rows(submit(scheduler)) == {"b": 1, "a": 4}


def test_the_earliest_arrival_is_admitted_first() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, make_request("a", arrival_time=2.0), make_request("b", arrival_time=1.0))
    assert rows(submit(scheduler)) == {"b": 4}


def test_of_two_that_arrive_together_the_one_added_first_is_admitted_first() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, make_request("b"), make_request("a"))
    assert rows(submit(scheduler)) == {"b": 4}


def test_no_more_than_max_num_seqs_run_at_once() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    add(scheduler, *(make_request(name) for name in "abc"))
    assert rows(submit(scheduler)) == {"a": 4, "b": 4}
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


def test_a_request_that_does_not_fit_is_not_overtaken() -> None:
    scheduler = make_scheduler(4)
    add(scheduler, make_request("a", 8, max_tokens=1), make_request("b", 12, max_tokens=1), make_request("c", 4))
    assert rows(submit(scheduler)) == {"a": 8}


def test_a_request_is_admitted_only_with_room_for_all_its_known_tokens() -> None:
    scheduler = make_scheduler(4, budget=4)
    add(scheduler, make_request("a", 4), make_request("b", 14, max_tokens=1))
    assert rows(submit(scheduler)) == {"a": 4}


def test_blocks_are_allocated_only_for_what_is_scheduled() -> None:
    scheduler = make_scheduler(budget=5)
    request = make_request("a", 16)
    scheduler.add(request)
    steps = run(scheduler, 2)
    assert [len(step.rows[0].new_block_ids) for step in steps] == [2, 1]
    assert request.block_ids == steps[0].rows[0].new_block_ids + steps[1].rows[0].new_block_ids


def test_a_new_row_tells_the_runner_all_it_must_know() -> None:
    scheduler = make_scheduler()
    request = make_request("a", [3, 4], stop_token_ids=frozenset({9}), eos_token_ids=frozenset({2}), seed=11)
    request.params = SamplingParams(top_k=-1, top_p=0.5, min_tokens=3)
    scheduler.add(request)
    (new_row,) = submit(scheduler).entering
    assert (new_row.token_ids, new_row.num_prompt_tokens) == ([3, 4], 2)
    assert (new_row.params, new_row.seed) == (request.params, 11)
    assert new_row.stop_token_ids == (2, 9)


def test_the_first_schedule_time_is_kept() -> None:
    scheduler = make_scheduler()
    request = make_request("a")
    scheduler.add(request)
    run(scheduler)
    assert request.first_scheduled_time == 5.0


# ------------------------------------------------------------------------------------------------ prefix cache


def test_a_repeated_prompt_is_computed_from_its_last_token_on() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", list(range(8)), max_tokens=1))
    run(scheduler)
    repeated = make_request("b", list(range(8)))
    scheduler.add(repeated)
    assert rows(submit(scheduler)) == {"b": 4}  # the last block holds the token that must be computed
    assert repeated.num_cached_tokens == 4


def test_requests_of_one_step_share_the_prefix_it_computes() -> None:
    scheduler = make_scheduler()
    add(scheduler, *(make_request(name, list(range(9))) for name in "ab"))
    step = submit(scheduler)
    assert rows(step) == {"a": 9, "b": 1}
    assert step.rows[0].new_block_ids[:2] == step.rows[1].new_block_ids[:2]


def test_requests_of_different_salt_share_nothing() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", list(range(9))), make_request("b", list(range(9)), cache_salt=b"other"))
    assert rows(submit(scheduler)) == {"a": 9, "b": 9}


def test_output_tokens_are_found_by_a_later_prompt() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", [1, 2, 3], max_tokens=6))
    drain(scheduler)
    follow_up = make_request("b", [1, 2, 3, *[7] * 6, 5])
    scheduler.add(follow_up)
    submit(scheduler)
    assert follow_up.num_cached_tokens == 8


@pytest.mark.parametrize("depth", [2, 4])
def test_tokens_that_were_placeholders_are_found_by_a_later_prompt(depth: int) -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", [1, 2, 3], max_tokens=7))
    drain(scheduler, depth)
    follow_up = make_request("b", [1, 2, 3, *[7] * 6, 5])
    scheduler.add(follow_up)
    submit(scheduler)
    assert follow_up.num_cached_tokens == 8


def test_a_block_with_a_placeholder_is_not_shared_before_its_token_is_known() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", [1, 2, 3]))
    first, _second = submit(scheduler), submit(scheduler)
    assert scheduler.block_pool.num_cached == 0
    collect(scheduler, first)
    assert scheduler.block_pool.num_cached == 1


def test_cached_tokens_are_those_of_the_first_admission() -> None:
    scheduler = make_scheduler(4, policy=FirstAsVictim())
    preempted = make_request("a", 8)
    add(scheduler, preempted, make_request("b", 8, max_tokens=2))
    run(scheduler, 2)  # in the second step each wants a third block and b takes one of a's
    again = submit(scheduler)
    assert again.rows[0].num_computed_tokens == 4
    assert preempted.num_cached_tokens == 0


# ------------------------------------------------------------------------------------------------ ends


def test_a_request_ends_at_its_length() -> None:
    scheduler = make_scheduler()
    request = make_request("a", max_tokens=3)
    scheduler.add(request)
    run(scheduler, 3)
    assert (request.finish_reason, request.output_token_ids, request.finished) == ("length", [7, 7, 7], True)
    assert not scheduler.has_unfinished


def test_a_stop_token_of_the_user_ends_it_and_is_its_stop_reason() -> None:
    scheduler = make_scheduler()
    request = make_request("a", stop_token_ids=frozenset({7}))
    scheduler.add(request)
    run(scheduler)
    assert (request.finish_reason, request.stop_reason, request.output_token_ids) == ("stop", 7, [7])


def test_the_end_token_of_the_model_ends_it_without_a_stop_reason() -> None:
    scheduler = make_scheduler()
    request = make_request("a", eos_token_ids=frozenset({7}), stop_token_ids=frozenset({7}))
    scheduler.add(request)
    run(scheduler)
    assert (request.finish_reason, request.stop_reason) == ("stop", None)


def test_a_stop_token_before_min_tokens_does_not_end_it() -> None:
    scheduler = make_scheduler()
    request = make_request("a", min_tokens=2, stop_token_ids=frozenset({7}))
    scheduler.add(request)
    drain(scheduler)
    assert request.output_token_ids == [7, 7, 7]


def test_a_request_that_ends_returns_its_blocks() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", 10, max_tokens=1))
    run(scheduler)
    assert scheduler.block_pool.num_free == 100


def test_the_runner_is_told_who_left_with_the_next_step() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", max_tokens=1), make_request("b", max_tokens=2))
    run(scheduler)
    assert submit(scheduler).leaving == ["a"]


def test_news_of_who_left_waits_for_a_step_with_rows() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", max_tokens=1))
    run(scheduler)
    assert scheduler.schedule() is None
    scheduler.add(make_request("b"))
    assert submit(scheduler).leaving == ["a"]


def test_a_request_the_runner_never_saw_does_not_leave_it() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, make_request("a"), make_request("b"))
    run(scheduler)
    scheduler.abort("b")
    assert submit(scheduler).leaving == []


def test_an_executor_that_returns_no_token_is_named() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    step = submit(scheduler)
    with pytest.raises(PluginError, match=r"returned \[\] for request 'a'.*1 to 1 tokens are wanted"):
        scheduler.apply(step, StepOutput(step_id=step.step_id, token_ids={}))


# ------------------------------------------------------------------------------------------------ abort


def test_a_waiting_request_can_be_aborted() -> None:
    scheduler = make_scheduler()
    request = make_request("a")
    scheduler.add(request)
    assert scheduler.abort("a") is request
    assert (request.finish_reason, scheduler.has_unfinished) == ("abort", False)
    assert scheduler.schedule() is None


def test_aborting_an_unknown_request_is_no_error() -> None:
    assert make_scheduler().abort("a") is None


def test_a_front_end_can_end_a_request_at_a_stop_string() -> None:
    scheduler = make_scheduler()
    request = make_request("a")
    scheduler.add(request)
    run(scheduler)
    scheduler.abort("a", "stop")
    assert request.finish_reason == "stop"


def test_blocks_of_a_request_aborted_in_flight_are_freed_when_its_step_is_collected() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 10))
    step = submit(scheduler)
    scheduler.abort("a")
    assert scheduler.block_pool.num_free == 97
    assert collect(scheduler, step) == []
    assert scheduler.block_pool.num_free == 100


def test_aborted_requests_do_not_pile_up_in_the_queue() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_request("keep"))
    run(scheduler)
    for number in range(1000):
        scheduler.add(make_request(f"x{number}"))
        scheduler.abort(f"x{number}")
    assert len(scheduler._waiting._heap) < 100


# ------------------------------------------------------------------------------------------------ preemption


def two_that_grow(policy: SchedulerPolicy | None = None) -> tuple[Scheduler, Request, Request]:
    """Two requests that fill the cache; at the next step each wants a block more."""
    scheduler = make_scheduler(4, policy=policy)
    first, second = make_request("a", 8, arrival_time=0.0), make_request("b", 8, arrival_time=1.0)
    add(scheduler, first, second)
    run(scheduler)
    return scheduler, first, second


def test_a_preempted_request_returns_its_blocks_and_waits() -> None:
    scheduler, first, second = two_that_grow()
    assert rows(submit(scheduler)) == {"a": 1}
    assert (second.status, second.block_ids, second.epoch) == (RequestStatus.WAITING, [], 1)
    assert (second.num_computed_tokens, second.num_in_flight_tokens, second.num_placeholder_tokens) == (0, 0, 0)
    assert (scheduler.num_preemptions, scheduler.block_pool.num_referenced) == (1, len(first.block_ids))


def test_a_preempted_request_keeps_its_tokens_and_ends() -> None:
    scheduler, _first, second = two_that_grow()
    assert second.output_token_ids == [7]
    drain(scheduler)
    assert second.output_token_ids == [7] * 8


def test_a_preempted_request_enters_again_with_all_its_tokens() -> None:
    scheduler, _first, second = two_that_grow()
    run(scheduler)
    scheduler.abort("a")
    step = submit(scheduler)
    assert step.leaving == ["a"]
    assert step.entering[0].token_ids == second.all_token_ids()
    assert step.rows[0].new_block_ids == second.block_ids


def test_the_runner_is_told_of_a_preemption_by_the_step_that_made_it() -> None:
    scheduler, _first, _second = two_that_grow()
    assert submit(scheduler).leaving == ["b"]


def test_nobody_is_admitted_in_a_call_that_preempted() -> None:
    scheduler, _first, _second = two_that_grow()
    scheduler.add(make_request("c", 1, arrival_time=-1.0))
    assert rows(submit(scheduler)) == {"a": 1}


def test_the_policy_chooses_the_victim() -> None:
    scheduler, first, second = two_that_grow(FirstAsVictim())
    assert rows(submit(scheduler)) == {"b": 1}
    assert (first.epoch, second.epoch) == (1, 0)


def test_a_victim_that_had_a_row_loses_it_and_gives_its_budget_back() -> None:
    scheduler = make_scheduler(4, block_size=2, policy=FirstAsVictim())
    add(scheduler, *(make_request(name, 2 if name == "b" else 1, max_tokens=4) for name in "abcd"))
    run(scheduler)
    scheduler.max_num_batched_tokens = 2
    assert rows(submit(scheduler)) == {"b": 1, "c": 1}  # a's token went to c; d still comes too late


def test_a_policy_may_not_choose_a_request_that_does_not_run() -> None:
    class Stranger(FCFSPolicy):
        def victim(self, running: Sequence[Request]) -> Request:
            return make_request("z")

    scheduler, _first, _second = two_that_grow(Stranger())
    with pytest.raises(PluginError, match=r"Stranger\.victim must return one of the requests"):
        scheduler.schedule()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_policy_that_goes_in_circles_does_not_keep_requests_from_ending(depth: int) -> None:
    scheduler = make_scheduler(10, block_size=1, budget=4, policy=FirstAsVictim(), caching=False)
    requests = [make_request(name, 2, max_tokens=9) for name in "ab"]
    add(scheduler, *requests)
    drain(scheduler, depth)
    assert max(request.epoch for request in requests) <= scheduler_module.MAX_PREEMPTIONS_BY_POLICY + 1


# ------------------------------------------------------------------------------------------------ several in flight


def test_a_second_step_computes_the_token_the_first_will_sample() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 4)
    scheduler.add(request)
    _first, second = submit(scheduler), submit(scheduler)
    assert (second.rows[0].num_computed_tokens, second.rows[0].num_tokens, second.rows[0].samples) == (4, 1, True)
    assert (request.num_in_flight_tokens, request.num_placeholder_tokens, request.num_computed_tokens) == (5, 2, 0)


def test_a_request_whose_last_sample_is_in_flight_gets_no_row() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", max_tokens=2))
    submit(scheduler), submit(scheduler)
    assert scheduler.schedule() is None


def test_results_that_come_after_the_end_are_dropped() -> None:
    scheduler = make_scheduler()
    request = make_request("a", stop_token_ids=frozenset({7}))
    scheduler.add(request)
    first, second = submit(scheduler), submit(scheduler)
    assert len(collect(scheduler, first)) == 1
    assert scheduler.block_pool.num_referenced == 2  # the second step still writes to them
    assert collect(scheduler, second) == []
    assert (request.output_token_ids, scheduler.block_pool.num_referenced) == ([7], 0)


def test_results_from_before_a_preemption_are_dropped_although_it_runs_again() -> None:
    scheduler = make_scheduler(2)
    request = make_request("b", 2, max_tokens=6, arrival_time=1.0)
    scheduler.add(request)
    run(scheduler)
    scheduler.add(make_request("a", 4, max_tokens=4))
    run(scheduler)
    scheduler.max_num_batched_tokens = 1
    before = submit(scheduler)
    assert scheduler.schedule() is None  # b wants a second block and is itself the victim
    scheduler.abort("a")
    again = submit(scheduler)
    assert (rows(before), rows(again), request.epoch) == ({"b": 1}, {"b": 1}, 1)
    assert collect(scheduler, before) == []
    assert (request.num_computed_tokens, request.num_in_flight_tokens, request.num_tokens) == (0, 1, 4)


def test_a_request_waits_for_blocks_on_their_way_back_instead_of_preempting() -> None:
    scheduler = make_scheduler(4)
    leaver, first, second = make_request("a", 8), make_request("b", 4), make_request("c", 4)
    add(scheduler, leaver, first, second)
    step = submit(scheduler)
    scheduler.abort("a")
    assert scheduler.schedule() is None
    assert scheduler.num_preemptions == 0
    collect(scheduler, step)
    assert rows(submit(scheduler)) == {"b": 1, "c": 1}


def test_nobody_is_admitted_while_a_running_request_waits_for_blocks() -> None:
    scheduler = make_scheduler(6, budget=16)
    add(scheduler, make_request("a", 4), make_request("b", 8), make_request("c", 12))
    submit(scheduler)
    scheduler.abort("a")
    scheduler.add(make_request("d", 1))
    assert rows(submit(scheduler)) == {"b": 1}  # c wants two blocks: one is free, one on its way back
    assert scheduler.block_pool.num_free == 1
    assert scheduler.num_waiting == 1


def test_blocks_awaited_by_one_request_are_not_promised_to_another() -> None:
    scheduler = make_scheduler(3)
    first, second = make_request("b", 4), make_request("c", 4, arrival_time=1.0)
    add(scheduler, make_request("a", 4), first, second)
    submit(scheduler)
    scheduler.abort("a")
    assert scheduler.schedule() is None
    assert (first.epoch, second.epoch) == (0, 1)


def test_a_preempted_request_awaits_no_blocks() -> None:
    scheduler = make_scheduler(4, policy=FirstAsVictim())
    first, second, third = (make_request(name, 4) for name in "bcd")
    add(scheduler, make_request("a", 4), first, second, third)
    submit(scheduler)
    scheduler.abort("a")
    assert scheduler.schedule() is None  # b waits for a's block, c takes b's, and a's is there for d again
    assert (first.epoch, second.epoch, third.epoch) == (1, 0, 0)


def test_blocks_of_a_request_about_to_end_are_on_their_way_back() -> None:
    scheduler = make_scheduler(3, policy=FirstAsVictim())
    add(scheduler, make_request("a", 4, max_tokens=1), make_request("b", 8, max_tokens=4))
    step = submit(scheduler)
    assert scheduler.schedule() is None
    assert scheduler.num_preemptions == 0
    collect(scheduler, step)
    assert rows(submit(scheduler)) == {"b": 1}


def test_a_request_about_to_end_is_not_offered_as_a_victim() -> None:
    scheduler = make_scheduler(3, policy=FirstAsVictim())
    ending, first, second = make_request("a", 4, max_tokens=1), make_request("b", 4), make_request("c", 4)
    add(scheduler, ending, first, second)
    submit(scheduler)
    assert scheduler.schedule() is None
    assert (ending.epoch, first.epoch, second.epoch) == (0, 1, 0)


# ------------------------------------------------------------------------------------------------ policy


class CountingPolicy(FCFSPolicy):
    def __init__(self) -> None:
        self.received: list[tuple[str, int, int]] = []

    def served(self, request: Request, num_prompt_tokens: int, num_output_tokens: int) -> None:
        self.received.append((request.request_id, num_prompt_tokens, num_output_tokens))


def test_the_policy_is_told_what_each_request_received() -> None:
    policy = CountingPolicy()
    scheduler = make_scheduler(budget=4, policy=policy)
    scheduler.add(make_request("a", 6))
    run(scheduler, 3)
    assert policy.received == [("a", 4, 0), ("a", 2, 1), ("a", 0, 1)]


def test_the_policy_is_not_told_of_prompt_tokens_that_were_found_in_the_prefix_cache() -> None:
    policy = CountingPolicy()
    scheduler = make_scheduler(policy=policy)
    add(scheduler, *(make_request(name, list(range(9))) for name in "ab"))
    run(scheduler)
    assert policy.received == [("a", 9, 1), ("b", 1, 1)]


def test_the_policy_is_told_of_a_prompt_token_once_although_it_is_computed_twice() -> None:
    policy = CountingPolicy()
    scheduler = make_scheduler(4, budget=16, policy=policy, caching=False)
    add(scheduler, make_request("a", 8, arrival_time=0.0), make_request("b", 8, arrival_time=1.0))
    drain(scheduler)
    assert scheduler.num_preemptions > 0
    assert [sum(tokens for name, tokens, _ in policy.received if name == each) for each in "ab"] == [8, 8]
    assert [sum(tokens for name, _, tokens in policy.received if name == each) for each in "ab"] == [8, 8]


def test_the_policy_is_told_of_a_sample_before_the_end_it_brings() -> None:
    class Diary(CountingPolicy):
        def ended(self, request: Request) -> None:
            self.received.append((f"{request.request_id} ended", 0, 0))

    policy = Diary()
    scheduler = make_scheduler(policy=policy)
    scheduler.add(make_request("a", max_tokens=1))
    run(scheduler)
    assert policy.received == [("a", 4, 1), ("a ended", 0, 0)]


def test_a_request_whose_key_cannot_be_made_is_not_queued() -> None:
    class Refusing(FCFSPolicy):
        def key(self, request: Request, now: float) -> float:
            raise ZeroDivisionError

    scheduler = make_scheduler(policy=Refusing())
    with pytest.raises(ZeroDivisionError):
        scheduler.add(make_request("a"))
    assert not scheduler.has_unfinished
    assert scheduler.abort("a") is None


@pytest.mark.parametrize(("num_blocks", "max_num_seqs"), [(100, 1), (1, 8)])
def test_a_dynamic_policy_is_not_asked_again_while_there_is_room_for_nobody(num_blocks: int, max_num_seqs: int) -> None:
    class Counting(FCFSPolicy):
        dynamic = True
        num_asked = 0

        def key(self, request: Request, now: float) -> float:
            self.num_asked += 1
            return request.arrival_time

    policy = Counting()
    scheduler = make_scheduler(num_blocks, max_num_seqs=max_num_seqs, policy=policy)
    add(scheduler, make_request("a", 1, max_tokens=3), make_request("b", 1, max_tokens=3))
    run(scheduler)
    num_asked = policy.num_asked
    run(scheduler)
    assert policy.num_asked == num_asked


@pytest.mark.parametrize(("dynamic", "first"), [(False, "a"), (True, "b")])
def test_a_dynamic_policy_is_asked_again_for_those_who_wait(dynamic: bool, first: str) -> None:
    class ByPriority(FCFSPolicy):
        def key(self, request: Request, now: float) -> float:
            return request.priority

    policy = ByPriority()
    policy.dynamic = dynamic
    scheduler = make_scheduler(max_num_seqs=1, policy=policy)
    requests = {name: make_request(name, priority=number) for number, name in enumerate("ab")}
    add(scheduler, *requests.values())
    requests["a"].priority = 5
    assert rows(submit(scheduler)) == {first: 4}


# ------------------------------------------------------------------------------------------------ numbers


def test_kv_usage_is_the_share_of_blocks_held() -> None:
    scheduler = make_scheduler(4)
    scheduler.add(make_request("a", 5))
    run(scheduler)
    assert scheduler.kv_usage == 0.5


def test_kv_waste_is_the_share_of_empty_slots_in_held_blocks() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 5))
    run(scheduler)
    assert scheduler.kv_waste == pytest.approx(1 - 5 / 8)
    run(scheduler)
    assert scheduler.kv_waste == pytest.approx((1 - 5 / 8 + 1 - 6 / 8) / 2)


def test_kv_waste_counts_a_shared_block_once() -> None:
    scheduler = make_scheduler()
    add(scheduler, *(make_request(name, [1, 2, 3, 4, 5]) for name in "ab"))
    run(scheduler)
    assert scheduler.kv_waste == pytest.approx(1 - 6 / 12)


def test_kv_waste_leaves_out_requests_that_have_left() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", 5, stop_token_ids=frozenset({7}), max_tokens=9), make_request("b", 8))
    first, _second = submit(scheduler), submit(scheduler)
    collect(scheduler, first)
    assert scheduler.block_pool.num_referenced == 5  # two of them held until the second step is collected
    assert scheduler.kv_waste == pytest.approx(1 - 9 / 12)
