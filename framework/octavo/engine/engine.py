"""The engine: a scheduler and an executor, one step after the other."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from octavo.engine.adapters import AdapterStore, other_path
from octavo.engine.scheduler import RequestUpdate, Scheduler
from octavo.engine.stats import EngineStats
from octavo.errors import ConfigError, EngineDeadError
from octavo.interfaces.executor import Executor, Step
from octavo.lora.adapter import Adapter, AdapterInfo, AdapterStatus
from octavo.outputs import TokenLogprobs
from octavo.request import Request

LOAD_WAIT_SECONDS = 0.01
"""How long a step that can only wait for an adapter waits; then its caller may have news."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOutput:
    """What one step gave one request: plain data for whoever waits for it.

    Attributes:
        new_token_ids: sampled and kept in this step.
        finish_reason: "stop", "length" or "abort" when it has ended; "error" when its adapter could not be loaded.
        stop_reason: the user's stop token that ended it; of "error", and of "abort" with its adapter, the reason.
        num_cached_tokens: prompt tokens taken from the prefix cache.
        first_scheduled_time: seconds of `time.monotonic()`.
        num_preemptions: how often it had to be computed again.
        logprobs: one for each new token, where they were asked for.
        prompt_logprobs: of the prompt's tokens but the first, with the first new token, where they were asked for.
    """

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
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
        """`failures` is where the executor reports, at any time, that it cannot go on.

        The scheduler's `adapters`, where it has any, are this engine's.
        """
        self.scheduler = scheduler
        self._ended: list[Request] = []  # by their adapter; the next step says so
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
        """Whether a step has something to do: a request, a late result or an adapter to load."""
        adapters = self.scheduler.adapters
        is_loading = adapters is not None and adapters.is_loading
        return self.scheduler.has_unfinished or bool(self._in_flight or self._ended) or is_loading

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it can never be served.
            AdapterError: its adapter was unloaded since it was bound to it.
        """
        self._check()
        if request.adapter is not None and request.adapter.retired:  # replaced, then: the name has another version
            adapter = self.adapter(request.adapter.name)
            for member in (request, *request.siblings):
                member.adapter = adapter
        self.scheduler.add(request)

    def abort(self, request_id: str, finish_reason: Literal["abort", "stop"] = "abort") -> None:
        """End a request now, wherever it is; an unknown or ended one is no error."""
        self.scheduler.abort(request_id, finish_reason)
        if self._ended:  # nobody waits for its end, and its id may be used again before the next step
            self._ended = [request for request in self._ended if request.request_id != request_id]

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
        """Submit as many steps as may be in flight, collect the oldest, return what it gave.

        Where all there is to do is to wait for an adapter, it waits a little and returns nothing.
        """
        with self._guard():
            outputs = self._take_adapters()
            while len(self._in_flight) < self._max_steps_in_flight and (step := self.scheduler.schedule()) is not None:
                self._in_flight.append((step, self._submit(step)))
            if self._in_flight:
                step, handle = self._in_flight.popleft()
                outputs += map(self._output, self.scheduler.apply(step, self._executor.collect(handle)))
                return outputs
        if self.scheduler.adapters is not None and not outputs:
            self.scheduler.adapters.wait(LOAD_WAIT_SECONDS)
        return outputs

    def _take_adapters(self) -> list[EngineOutput]:
        """Take in adapters that were read since the last step; returns the ends of requests that lost theirs."""
        if self.scheduler.adapters is not None:
            for adapter, error in self.scheduler.adapters.poll():
                self._ended += self.scheduler.end_adapter(adapter, "error", str(error))
        ended, self._ended = self._ended, []
        return [self._output(RequestUpdate(request=request, new_token_ids=[])) for request in ended]

    def fail(self, error: BaseException) -> None:
        """Remember why the engine cannot go on; every later call raises EngineDeadError with this cause."""
        self._failures.append(error)

    def stop(self) -> None:
        """Free the executor's memory. May be called twice."""
        if self.scheduler.adapters is not None:
            self.scheduler.adapters.stop()
        self._executor.stop()
        self.fail(RuntimeError("it was shut down"))

    # ------------------------------------------------------------------------------------------------ adapters

    def adapter(self, name: str) -> Adapter:
        """What a new request that names an adapter is bound to; AdapterError when the name is not known."""
        return self._adapters().request(name)

    def knows_adapter(self, name: str, path: str | None = None) -> bool:
        """Whether an adapter of that name is loaded, or on its way.

        Raises:
            AdapterError: one is, from another path than `path`.
        """
        adapter = self._adapters().get(name)
        if adapter is not None and path is not None and adapter.path != path:
            raise other_path(adapter, path)
        return adapter is not None

    def load_adapter(self, name: str, path: str, *, replace: bool = False) -> Future[AdapterInfo]:
        """Read an adapter beside the steps, as `AdapterStore.load`; goes on while `step` is called."""
        self._check()
        return self._adapters().load(name, path, replace)

    def unload_adapter(self, name: str, *, abort: bool = False) -> Future[None]:
        """Forget an adapter, as `AdapterStore.unload`; with `abort` its requests end in the next step's outputs."""
        self._check()
        adapters = self._adapters()
        versions = adapters.versions(name)
        unloaded = adapters.unload(name)
        if abort:
            for adapter in versions:
                self._ended += self.scheduler.end_adapter(adapter, "abort", f"Adapter {name!r} was unloaded.")
        return unloaded

    def pin_adapter(self, name: str, *, pinned: bool = True) -> None:
        """Let an adapter keep its place, as `AdapterStore.pin`, or no longer."""
        adapters = self._adapters()
        if pinned:
            adapters.pin(name)
        else:
            adapters.unpin(name)

    def adapters(self) -> list[AdapterStatus]:
        """Those that can be asked for, and how each stands; [] when none are served."""
        return [] if self.scheduler.adapters is None else self.scheduler.adapters.statuses()

    def _adapters(self) -> AdapterStore:
        if self.scheduler.adapters is None:
            raise ConfigError("This engine serves no LoRA adapters: set enable_lora=True.")
        return self.scheduler.adapters

    # ------------------------------------------------------------------------------------------------ numbers

    def stats(self) -> EngineStats:
        """How it stands now, and what it has done since start."""
        scheduler = self.scheduler
        adapters = scheduler.adapters
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
            num_adapters_in_memory=0 if adapters is None else adapters.num_in_memory,
            num_adapters_placed=0 if adapters is None else adapters.num_placed,
            num_adapter_loads=0 if adapters is None else adapters.num_loads,
            num_adapter_evictions=0 if adapters is None else adapters.num_evictions,
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
