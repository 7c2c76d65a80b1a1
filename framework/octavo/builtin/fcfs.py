"""FCFS: first come, first served; the reference scheduler policy."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.interfaces.scheduling import SchedulerPolicy
from octavo.request import Request


class FCFSPolicy(SchedulerPolicy):
    """The earliest arrival is admitted first and the latest gives up its blocks first.

    Of two that arrived together the one added first goes first; the scheduler breaks that tie.
    """

    def key(self, request: Request, now: float) -> float:
        """The arrival time."""
        return request.arrival_time

    def victim(self, running: Sequence[Request]) -> Request:
        """The latest arrival; of several, the one admitted last."""
        return max(reversed(running), key=lambda request: request.arrival_time)
