"""StepTimes: when each step was submitted and what was in it, so that a run's steady part can be told from its ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from octavo import LLM
from octavo.interfaces.executor import Step


class StepTimes:
    """Listens to an engine's steps.

    Attributes:
        times: seconds of `time.perf_counter()` at which each step was submitted. With several in flight the engine
            submits one for each that it collects, so that in a steady run these are as far apart as results are.
        rows, tokens: requests and tokens of each step.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.rows: list[int] = []
        self.tokens: list[int] = []

    def __call__(self, step: Step) -> None:
        self.times.append(time.perf_counter())
        self.rows.append(len(step.rows))
        self.tokens.append(step.num_tokens)

    def decode_speed(self, num_requests: int) -> tuple[float, int]:
        """(output tokens a second, steps) over the longest stretch of steps in which just these requests decode.

        Its first steps are left out: they may wait for the prefills before them.
        """
        best = range(0)
        start = 0
        for index in range(len(self.times) + 1):
            pair = (num_requests, num_requests)
            if index == len(self.times) or (self.rows[index], self.tokens[index]) != pair:
                best = max(best, range(start, index), key=len)
                start = index + 1
        best = best[min(4, len(best) // 4) :]
        if len(best) < 2:
            return 0.0, 0
        seconds = self.times[best[-1]] - self.times[best[0]]
        return num_requests * (len(best) - 1) / seconds, len(best) - 1


@contextmanager
def step_times(llm: LLM) -> Iterator[StepTimes]:
    """Of the steps that an LLM makes inside."""
    times = StepTimes()
    llm.engine.step_listeners.append(times)
    try:
        yield times
    finally:
        llm.engine.step_listeners.remove(times)
