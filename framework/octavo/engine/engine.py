"""The engine: a scheduler and an executor, one step after the other."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from octavo.engine.scheduler import RequestUpdate, Scheduler
from octavo.engine.stats import EngineStats
from octavo.errors import EngineDeadError
from octavo.interfaces.executor import Executor, Step
from octavo.outputs import TokenLogprobs
from octavo.request import Request


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOutput:
    """What one step gave one request: plain data for whoever waits for it.

    Attributes:
        new_token_ids: sampled and kept in this step.
        finish_reason: "stop", "length" or "abort" when it has ended.
        stop_reason: the user's stop token that ended it.
        num_cached_tokens: prompt tokens taken from the prefix cache.
        first_scheduled_time: seconds of `time.monotonic()`.
        num_preemptions: how often it had to be computed again.
        logprobs: one for each new token, where they were asked for.
        prompt_logprobs: of the prompt's tokens but the first, with the first new token, where they were asked for.
    """

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | None
    num_cached_tokens: int
    first_scheduled_time: float | None
    num_preemptions: int
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


class Engine:
    """Not thread-safe: one thread adds, aborts and steps.

    Attributes:
        step_listeners: called with every step as it is submitted.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        max_steps_in_flight: int,
        failures: list[BaseException] | None = None,
    ) -> None:
        """`failures` is where the executor reports, at any time, that it cannot go on."""
        self.scheduler = scheduler
        self._executor = executor
        self._max_steps_in_flight = max_steps_in_flight
        self._in_flight: deque[tuple[Step, object]] = deque()
        self._failures = failures if failures is not None else []
        self._num_steps = 0
        self._num_output_tokens = 0
        self._busy_seconds = 0.0
        self._kv_usage_peak = 0.0
        self.step_listeners: list[Callable[[Step], None]] = []

    @property
    def is_draining(self) -> bool:
        """Whether all requests have ended and only steps whose results are late are left to collect."""
        return bool(self._in_flight) and not self.scheduler.has_unfinished

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished or bool(self._in_flight)

    def add(self, request: Request) -> None:
        """Queue a request; RequestError when it can never be served."""
        self._check()
        self.scheduler.add(request)

    def abort(self, request_id: str, finish_reason: Literal["abort", "stop"] = "abort") -> None:
        """End a request now, wherever it is; an unknown or ended one is no error."""
        self.scheduler.abort(request_id, finish_reason)

    def fork(self, origin_id: str, request: Request) -> None:
        """Add a request that begins with all the tokens of another, on the same blocks; `extend` both before a step."""
        self._check()
        self.scheduler.fork(origin_id, request)

    def extend(self, request_id: str, token_id: int) -> None:
        """Give a request whose tokens are chosen outside its next one, after the step that gave its logprobs."""
        self._check()
        self.scheduler.extend(request_id, token_id)
        self._num_output_tokens += 1

    def step(self) -> list[EngineOutput]:
        """Submit as many steps as may be in flight, collect the oldest, return what it gave."""
        with self._guard():
            while len(self._in_flight) < self._max_steps_in_flight and (step := self.scheduler.schedule()) is not None:
                self._in_flight.append((step, self._submit(step)))
            if not self._in_flight:
                return []
            step, handle = self._in_flight.popleft()
            return [self._output(update) for update in self.scheduler.apply(step, self._executor.collect(handle))]

    def fail(self, error: BaseException) -> None:
        """Remember why the engine cannot go on; every later call raises EngineDeadError with this cause."""
        self._failures.append(error)

    def stop(self) -> None:
        """Free the executor's memory. May be called twice."""
        self._executor.stop()
        self.fail(RuntimeError("it was shut down"))

    def stats(self) -> EngineStats:
        """How it stands now, and what it has done since start."""
        scheduler = self.scheduler
        return EngineStats(
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            num_steps=self._num_steps,
            busy_seconds=self._busy_seconds,
            num_output_tokens=self._num_output_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_drafts=scheduler.num_drafts,
            num_accepted_drafts=scheduler.num_accepted_drafts,
            num_blocks=scheduler.block_pool.num_blocks,
            block_size=scheduler.block_pool.block_size,
            kv_usage=scheduler.kv_usage,
            kv_usage_peak=self._kv_usage_peak,
            kv_waste=scheduler.kv_waste,
            num_prefix_cache_queries=scheduler.num_prefix_cache_queries,
            num_prefix_cache_hits=scheduler.num_prefix_cache_hits,
            policy_metrics=dict(scheduler.policy.metrics()),
        )

    def _submit(self, step: Step) -> object:
        self._num_steps += 1
        self._kv_usage_peak = max(self._kv_usage_peak, self.scheduler.kv_usage)
        for listener in self.step_listeners:
            listener(step)
        return self._executor.submit(step)

    def _output(self, update: RequestUpdate) -> EngineOutput:
        self._num_output_tokens += len(update.new_token_ids)
        request = update.request
        return EngineOutput(
            request_id=request.request_id,
            new_token_ids=update.new_token_ids,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            num_cached_tokens=request.num_cached_tokens,
            first_scheduled_time=request.first_scheduled_time,
            num_preemptions=request.epoch,
            logprobs=update.logprobs,
            prompt_logprobs=update.prompt_logprobs,
        )

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Around a step: whatever goes wrong inside ends the engine, for scheduler and executor may be at odds."""
        self._check()
        start = time.monotonic()
        try:
            yield
        except BaseException as error:
            self.fail(error)
            if not isinstance(error, Exception):  # Ctrl-C is still Ctrl-C
                raise
            raise EngineDeadError(f"The engine stopped in a step: {type(error).__name__}: {error}") from error
        finally:
            self._busy_seconds += time.monotonic() - start

    def _check(self) -> None:
        if self._failures:
            cause = self._failures[0]
            reason = str(cause) or type(cause).__name__
            raise EngineDeadError(f"The engine takes no more requests: {reason}") from cause
