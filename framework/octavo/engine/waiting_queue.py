"""The waiting requests in their policy's order."""

from __future__ import annotations

import heapq
from itertools import count
from typing import Any

from octavo.interfaces.scheduling import SchedulerPolicy
from octavo.request import Request, RequestStatus


class WaitingQueue:
    """Ranks requests by the policy's keys, those of one key in the order they came.

    A request keeps its place until it ends, so that a preempted one comes back before those behind it.
    """

    def __init__(self, policy: SchedulerPolicy) -> None:
        self._policy = policy
        self._places: dict[str, tuple[Any, int]] = {}  # key and sequence number
        self._sequence_numbers = count()
        self._heap: list[tuple[Any, int, Request]] = []  # ended requests are skipped when met
        self._passed_over: list[tuple[Any, int, Request]] = []

    def give_place(self, request: Request, key: Any) -> None:
        """Remember a new request's key; it does not wait yet."""
        self._places[request.request_id] = (key, next(self._sequence_numbers))

    def put(self, request: Request) -> None:
        """Let a request that has a place wait in it."""
        key, number = self._places[request.request_id]
        heapq.heappush(self._heap, (key, number, request))

    def forget(self, request: Request) -> None:
        """A request has ended, waiting or not."""
        del self._places[request.request_id]
        if len(self._heap) > 2 * len(self._places) + 64:  # mostly ended ones, which hold their prompts
            self._heap = [entry for entry in self._heap if not entry[2].finished]
            heapq.heapify(self._heap)

    def first(self) -> Request | None:
        """The waiting request that comes first."""
        while self._heap and self._heap[0][2].status is not RequestStatus.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> None:
        """Take out the request that `first` returned."""
        heapq.heappop(self._heap)

    def pass_over(self) -> None:
        """Let those behind the request that `first` returned come first, until `restore`."""
        self._passed_over.append(heapq.heappop(self._heap))

    def restore(self) -> None:
        """Put those that were passed over back into their places."""
        if self._passed_over:
            self._heap += self._passed_over
            self._passed_over = []
            heapq.heapify(self._heap)

    def rank_again(self, now: float) -> None:
        """Ask the policy for every waiting request's key again."""
        waiting = [(number, request) for _key, number, request in self._heap if not request.finished]
        self._heap = [(self._policy.key(request, now), number, request) for number, request in waiting]
        heapq.heapify(self._heap)

    def latest(self, requests: list[Request]) -> Request:
        """The one that came last."""
        return max(requests, key=lambda request: self._places[request.request_id][1])
