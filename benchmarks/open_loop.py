"""An open loop: requests reach an engine when their time has come, whether or not it is ready for them."""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy

from octavo.engine.engine import EngineOutput
from octavo.request import Request


class ServingEngine(Protocol):
    """What the loop needs of `octavo.engine.engine.Engine`."""

    @property
    def has_unfinished(self) -> bool: ...

    def add(self, request: Request) -> None: ...

    def step(self) -> list[EngineOutput]: ...


@dataclass(kw_only=True, slots=True)
class Timing:
    """When what happened to one request, in seconds of one clock.

    Attributes:
        answer_time: when its answer is complete and handed over.
    """

    arrival_time: float
    num_output_tokens: int = 0
    first_scheduled_time: float = 0.0
    first_token_time: float = 0.0
    answer_time: float = 0.0

    @property
    def queue_seconds(self) -> float:
        return self.first_scheduled_time - self.arrival_time

    @property
    def ttft_seconds(self) -> float:
        return self.first_token_time - self.arrival_time

    @property
    def latency_seconds(self) -> float:
        return self.answer_time - self.arrival_time


@dataclass(kw_only=True, slots=True)
class Served:
    """What one way of batching did with all its streams."""

    timings: list[Timing] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return sum(timing.num_output_tokens for timing in self.timings) / self.seconds

    def add(self, other: Served) -> None:
        """Take in another stream."""
        self.timings += other.timings
        self.seconds += other.seconds

    def mean(self, measure: str) -> float:
        return statistics.fmean(self.values(measure))

    def p99(self, measure: str) -> float:
        """Interpolated between the two nearest requests."""
        return float(numpy.percentile(self.values(measure), 99))

    def values(self, measure: str) -> list[float]:
        """A property of Timing, of every request."""
        return [getattr(timing, measure) for timing in self.timings]


def serve(
    engine: ServingEngine,
    stream: Sequence[Request],
    batch_size: int | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Timing]:
    """Give requests to the engine as they arrive, and step it until all are answered.

    Args:
        stream: in order of `arrival_time`, which is in the clock's seconds.
        batch_size: None for continuous batching; a number for static batches of at most so many.

    Returns:
        What happened to each request, in the stream's order.
    """
    timings = {request.request_id: Timing(arrival_time=request.arrival_time) for request in stream}
    coming, queue = deque(stream), deque[Request]()
    ended: list[Timing] = []
    while coming or queue or engine.has_unfinished:
        while coming and coming[0].arrival_time <= clock():
            queue.append(coming.popleft())
        if batch_size is None or not engine.has_unfinished:
            for _ in range(min(len(queue), batch_size or len(queue))):
                engine.add(queue.popleft())
        if not engine.has_unfinished:
            sleep(max(0.0, coming[0].arrival_time - clock()))
            continue
        outputs, now = engine.step(), clock()
        for output in outputs:
            timing = timings[output.request_id]
            timing.first_scheduled_time = output.first_scheduled_time or timing.first_scheduled_time
            timing.first_token_time = timing.first_token_time or now
            timing.num_output_tokens += len(output.new_token_ids)
            if output.finish_reason is not None:
                ended.append(timing)
        if batch_size is None or not engine.has_unfinished:
            for timing in ended:
                timing.answer_time = now
            ended.clear()
    return list(timings.values())


def poisson_seconds(rate: float, seed: int) -> Iterator[float]:
    """Arrival times, in seconds after the stream's start, of `rate` requests a second; the same for the same seed."""
    generator, now = random.Random(seed), 0.0
    while True:
        now += generator.expovariate(rate)
        yield now
