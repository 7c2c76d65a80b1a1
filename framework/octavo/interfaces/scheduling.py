"""SchedulerPolicy socket: a policy ranks and chooses; the core's scheduler owns blocks, budgets and correctness."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.request import Request


class SchedulerPolicy(ABC):
    """Ranks waiting requests and picks preemption victims. Reads requests, never changes them.

    What it may go by: `arrival_time`, `priority`, `tenant`, the prompt, how far the request has come. Constructed with
    no arguments, or with `options=` when its spec names an options model. Equal calls must give equal answers: a
    policy that needs chance seeds its own.

    Attributes:
        dynamic: True asks `key` again for every waiting request in each step that has room for one; False once, when
            it is queued.
    """

    dynamic: bool = False

    @abstractmethod
    def key(self, request: Request, now: float) -> Any:
        """A sortable key; the smallest is admitted first, of equal ones the request added first.

        A request is first seen here, when it is added; one that was preempted keeps its key, or is asked for again.

        Args:
            now: seconds of the engine's clock, which is also `arrival_time`'s.
        """

    @abstractmethod
    def victim(self, running: Sequence[Request]) -> Request:
        """Which running request gives up its blocks when memory is short; it will be computed again later."""

    def served(self, request: Request, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Told when a step is collected what it gave a request, each token once, before the request may end by it.

        Args:
            num_prompt_tokens: prompt tokens computed for the first time; what the prefix cache held is not told, nor
                what is computed again after a preemption.
            num_output_tokens: tokens sampled.
        """
        return None

    def ended(self, request: Request) -> None:
        """Told once when a request finishes or is aborted, whatever had become of it."""
        return None

    def metrics(self) -> Mapping[str, float]:
        """Numbers of the policy's own, by name, each finite; shown by `LLM.stats().policy_metrics`."""
        return {}
