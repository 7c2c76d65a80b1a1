"""SchedulerPolicy socket: a policy ranks and chooses; the core's scheduler owns blocks, budgets and correctness."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.request import Request


class SchedulerPolicy(ABC):
    """Ranks waiting requests and picks preemption victims. Reads requests, never changes them.

    Attributes:
        dynamic: True asks `key` again for every waiting request at each step; False once, when it is queued.
    """

    dynamic: bool = False

    @abstractmethod
    def key(self, request: Request, now: float) -> Any:
        """A sortable key; the smallest is admitted first. `now` is seconds of the engine's clock."""

    @abstractmethod
    def victim(self, running: Sequence[Request]) -> Request:
        """Which running request gives up its blocks when memory is short; it will be computed again later."""

    def served(self, request: Request, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Told after each step what a request received."""
        return None

    def ended(self, request: Request) -> None:
        """Told once when a request finishes or is aborted, whatever had become of it."""
        return None

    def metrics(self) -> Mapping[str, float]:
        """Numbers of the policy's own, by name."""
        return {}
