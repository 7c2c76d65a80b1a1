"""priority: lower numbers first, as in vLLM, and waiting makes up for a higher number."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.interfaces import SchedulerPolicy
from octavo.request import Request
from octavo_scheduler_fair.options import PriorityOptions


class PriorityPolicy(SchedulerPolicy):
    """Admits the smallest rank first and preempts the largest.

    rank(request, now) = priority - (now - arrival_time) / aging_seconds

    All requests age alike, so their order never changes while they wait: now falls out, and the key is made once, as
    arrival_time + priority * aging_seconds. A request is overtaken only by those that arrive within
    (its priority - the lowest priority in use) * aging_seconds after it, so it waits for finitely many.

    Without aging the order is (priority, arrival_time).
    """

    def __init__(self, options: PriorityOptions) -> None:
        self._aging_seconds = options.aging_seconds

    def key(self, request: Request, now: float) -> tuple[float, float]:
        """Of equal ranks the lower priority number goes first."""
        if self._aging_seconds is None:
            return request.priority, request.arrival_time
        return request.arrival_time + request.priority * self._aging_seconds, request.priority

    def victim(self, running: Sequence[Request]) -> Request:
        """The one of the largest rank; of several, the one admitted last."""
        return max(reversed(running), key=lambda request: self.key(request, 0.0))
