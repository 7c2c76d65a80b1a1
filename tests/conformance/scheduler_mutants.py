"""Scheduler policies that each get one thing wrong, and the test of SchedulerSuite that must say so."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.builtin.fcfs import FCFSPolicy
from octavo.request import Request


class KeysWithoutOrder(FCFSPolicy):
    """Keys of requests with a tenant cannot be compared with keys of those without."""

    def key(self, request: Request, now: float) -> Any:
        return request.arrival_time if request.tenant is None else (request.tenant, request.arrival_time)


class KeyIsNoNumber(FCFSPolicy):
    """A NaN is neither before nor behind anything."""

    def key(self, request: Request, now: float) -> float:
        return float("nan") if request.priority < 0 else request.arrival_time


class AgesButIsNotDynamic(FCFSPolicy):
    """Its keys change with time, yet it has itself asked only once."""

    def key(self, request: Request, now: float) -> float:
        return request.priority - (now - request.arrival_time) / 60


class ChangesRequests(FCFSPolicy):
    """Raises the priority of those who wait in the request itself."""

    def key(self, request: Request, now: float) -> float:
        request.priority -= 1
        return request.priority


class ChangesRequestsWhenServed(FCFSPolicy):
    """Counts on the request what it received."""

    def served(self, request: Request, num_prompt_tokens: int, num_output_tokens: int) -> None:
        request.num_cached_tokens += num_prompt_tokens


class StrangerAsVictim(FCFSPolicy):
    """Preempts whoever was added first, although that one may have ended."""

    first: Request | None = None

    def key(self, request: Request, now: float) -> float:
        self.first = self.first or request
        return super().key(request, now)

    def victim(self, running: Sequence[Request]) -> Request:
        return self.first or running[0]


class TakesVictimFromTheList(FCFSPolicy):
    """Removes its victim from what it was only shown."""

    def victim(self, running: Sequence[Request]) -> Request:
        assert isinstance(running, list)
        return running.pop()


class CannotEndWhoWasNotServed(FCFSPolicy):
    """Forgets that a request may be aborted while it waits."""

    def __init__(self) -> None:
        self._output_tokens: dict[str, int] = {}

    def served(self, request: Request, num_prompt_tokens: int, num_output_tokens: int) -> None:
        self._output_tokens[request.request_id] = num_output_tokens

    def ended(self, request: Request) -> None:
        del self._output_tokens[request.request_id]


class Chance(FCFSPolicy):
    """Draws lots."""

    def key(self, request: Request, now: float) -> float:
        return random.random()


class MetricsAreWords(FCFSPolicy):
    """Its numbers are texts."""

    def metrics(self) -> Mapping[str, Any]:
        return {"state": "fine"}


class MetricsDivideByNothing(FCFSPolicy):
    """A mean of nothing, as long as nothing was served."""

    def __init__(self) -> None:
        self._num_served = 0.0

    def served(self, request: Request, num_prompt_tokens: int, num_output_tokens: int) -> None:
        self._num_served += 1

    def metrics(self) -> Mapping[str, float]:
        return {"mean": 1.0 / self._num_served if self._num_served else float("inf")}


class RemembersEverybody(FCFSPolicy):
    """Counts by request id and never forgets one."""

    def __init__(self) -> None:
        self._output_tokens: dict[str, int] = {}

    def served(self, request: Request, num_prompt_tokens: int, num_output_tokens: int) -> None:
        self._output_tokens[request.request_id] = num_output_tokens


class LastComeFirstServed(FCFSPolicy):
    """Those who came early wait while others keep coming."""

    def key(self, request: Request, now: float) -> float:
        return -request.arrival_time


class PriorityAlone(FCFSPolicy):
    """Waiting does not make up for a higher priority number."""

    def key(self, request: Request, now: float) -> Any:
        return request.priority, request.arrival_time


class Slow(FCFSPolicy):
    """Thinks for milliseconds about each request."""

    def key(self, request: Request, now: float) -> float:
        end = time.process_time() + 0.004
        while time.process_time() < end:
            pass
        return super().key(request, now)


CROWD = "every_request_gets_its_own_tokens_in_a_crowd[1]"
TRAFFIC = "every_request_gets_its_own_tokens_in_any_traffic[1]"

MUTANTS: dict[type[FCFSPolicy], str] = {
    KeysWithoutOrder: "keys_of_all_kinds_of_requests_have_an_order",
    KeyIsNoNumber: "keys_of_all_kinds_of_requests_have_an_order",
    AgesButIsNotDynamic: "a_key_depends_on_when_it_is_asked_for_only_if_the_policy_is_dynamic",
    ChangesRequests: "a_request_is_left_as_it_was",
    ChangesRequestsWhenServed: "a_request_is_left_as_it_was",
    StrangerAsVictim: CROWD,
    TakesVictimFromTheList: CROWD,
    CannotEndWhoWasNotServed: TRAFFIC,
    Chance: "equal_traffic_is_served_equally",
    MetricsAreWords: TRAFFIC,
    MetricsDivideByNothing: TRAFFIC,
    RemembersEverybody: "nothing_is_kept_of_requests_that_ended",
    LastComeFirstServed: "nobody_waits_for_ever_while_others_keep_coming",
    PriorityAlone: "nobody_waits_for_ever_while_others_keep_coming",
    Slow: "a_thousand_requests_at_once_are_no_burden",
}
"""Each with the test that must fail."""
