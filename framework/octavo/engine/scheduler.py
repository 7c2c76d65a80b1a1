"""Scheduler: which requests compute which tokens in the next step, and in which blocks.

Second stop of a request's way: request -> scheduler -> batch -> model -> sampler -> output. There are no phases: a
request has tokens to schedule, and each step takes some. The policy ranks; blocks, budgets and correctness are here.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from octavo.engine.block_pool import BlockPool, DeferredReleases, extend_hash_chain
from octavo.errors import PluginError, RequestError
from octavo.interfaces.executor import NewRow, ScheduledRow, Step, StepOutput
from octavo.interfaces.scheduling import SchedulerPolicy
from octavo.request import Request, RequestStatus

MAX_PREEMPTIONS_BY_POLICY = 8
"""How often a policy may choose one request as its victim before it must choose another. With several steps in flight
even "the longest running" as victim makes two requests take turns for ever, each losing its samples in flight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestUpdate:
    """What one collected step gave a request; `request` is already up to date and may have finished."""

    request: Request
    new_token_ids: list[int]


_Row = tuple[Request, int, ScheduledRow]  # its epoch when the row was made: late results are told by it


@dataclass(kw_only=True, slots=True)
class _Draft:
    """One call of `schedule`: the rows so far, what is left to give, who waits for blocks on their way back."""

    now: float
    budget: int
    rows: dict[str, _Row] = field(default_factory=dict)
    entering: list[NewRow] = field(default_factory=list)
    num_awaited_blocks: dict[str, int] = field(default_factory=dict)
    preempted: bool = False


class Scheduler:
    """Owns the waiting and running requests and hands out steps.

    `schedule` may be called again before earlier steps are applied; `apply` takes them in the order they were made.
    A step returned by `schedule` must be submitted, in that order too.

    Args:
        policy: ranks waiting requests and picks preemption victims.
        block_pool: the KV cache's blocks.
        max_num_seqs: at most this many requests run at once.
        max_num_batched_tokens: the token budget of one step.
        clock: seconds; for `first_scheduled_time` and the policy's keys.
    """

    def __init__(
        self,
        *,
        policy: SchedulerPolicy,
        block_pool: BlockPool,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.policy = policy
        self.block_pool = block_pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self._clock = clock
        self._tell_served = type(policy).served is not SchedulerPolicy.served
        self._requests: dict[str, Request] = {}  # unfinished
        self._places: dict[str, tuple[Any, int]] = {}  # key and sequence number, kept when preempted
        self._num_told_tokens: dict[str, int] = {}  # prompt tokens the policy was told of
        self._sequence_numbers = count()
        self._waiting: list[tuple[Any, int, Request]] = []  # a heap; finished requests are skipped when met
        self._running: list[Request] = []  # in order of admission
        self._leaving: list[str] = []  # news the runner has not had yet
        self._in_runner: set[str] = set()
        self._in_flight: deque[tuple[int, list[_Row]]] = deque()  # step ids and rows
        self._next_step_id = 0
        self._releases = DeferredReleases(block_pool)
        self._num_preemptions = 0
        self._waste_sum, self._waste_steps = 0.0, 0

    # ------------------------------------------------------------------------------------------------ numbers

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._requests)

    @property
    def num_waiting(self) -> int:
        """Requests without a place in the batch, the preempted ones included."""
        return len(self._requests) - len(self._running)

    @property
    def num_running(self) -> int:
        """Requests with a place in the batch."""
        return len(self._running)

    @property
    def num_steps_in_flight(self) -> int:
        """Steps made and not yet applied."""
        return len(self._in_flight)

    @property
    def num_preemptions(self) -> int:
        """How often any request gave up its blocks, since the start."""
        return self._num_preemptions

    @property
    def kv_usage(self) -> float:
        """Share of the blocks that are held: by running requests, or by ended ones until their last step is in."""
        return self.block_pool.num_referenced / self.block_pool.num_blocks

    @property
    def kv_waste(self) -> float:
        """1 - tokens stored / token slots over the distinct blocks running requests hold, mean over applied steps."""
        return self._waste_sum / self._waste_steps if self._waste_steps else 0.0

    # ------------------------------------------------------------------------------------------------ in and out

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it is empty, can never fit, or its id is taken.
        """
        num_prompt_tokens = len(request.prompt_token_ids)
        if request.request_id in self._requests:
            raise RequestError(f"Request id {request.request_id!r} is already in use; ids must be unique.")
        if not num_prompt_tokens:
            raise RequestError(f"Request {request.request_id!r} has an empty prompt; at least 1 token is needed.")
        if num_prompt_tokens >= request.max_total_tokens:
            raise RequestError(
                f"Request {request.request_id!r} has a prompt of {num_prompt_tokens} tokens and may have "
                f"{request.max_total_tokens} in all, which leaves no room for output; shorten the prompt."
            )
        num_needed = self.block_pool.blocks_for(request.max_total_tokens - 1)  # the last token is never computed
        if num_needed > self.block_pool.num_blocks:
            raise RequestError(
                f"Request {request.request_id!r} may grow to {request.max_total_tokens} tokens, {num_needed} blocks of "
                f"{self.block_pool.block_size}; the KV cache has {self.block_pool.num_blocks}. Lower max_tokens, "
                f"shorten the prompt or give the KV cache more memory."
            )
        place = self.policy.key(request, self._clock()), next(self._sequence_numbers)  # first: a policy may raise
        self._requests[request.request_id] = request
        self._places[request.request_id] = place
        self._queue(request)

    def abort(self, request_id: str, finish_reason: Literal["abort", "stop"] = "abort") -> Request | None:
        """End a request at any moment, also with steps in flight; None when no such request is unfinished."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        if request.status is RequestStatus.RUNNING:
            self._running.remove(request)
        self._end(request, finish_reason)
        if len(self._waiting) > 2 * self.num_waiting + 64:  # mostly aborted ones, which hold their prompts
            self._waiting = [entry for entry in self._waiting if not entry[2].finished]
            heapq.heapify(self._waiting)
        return request

    # ------------------------------------------------------------------------------------------------ schedule

    def schedule(self) -> Step | None:
        """The next step, or None when there is nothing to compute now."""
        draft = _Draft(now=self._clock(), budget=self.max_num_batched_tokens)
        self._schedule_running(draft)
        for request, _epoch, row in draft.rows.values():  # only now: until here a preemption could take back a row
            if (row.num_computed_tokens + row.num_tokens) // self.block_pool.block_size > request.num_registered_blocks:
                self._register_full_blocks(request)
        if not draft.preempted and not draft.num_awaited_blocks:
            self._admit(draft)
        if not draft.rows:
            return None
        step_id = self._next_step_id
        self._next_step_id += 1
        rows = list(draft.rows.values())
        for request, _epoch, _row in rows:
            request.last_step_id = step_id
        self._in_flight.append((step_id, rows))
        leaving, self._leaving = self._leaving, []
        return Step(step_id=step_id, leaving=leaving, entering=draft.entering, rows=[row for _, _, row in rows])

    def _schedule_running(self, draft: _Draft) -> None:
        block_size = self.block_pool.block_size
        for request in list(self._running):
            if not draft.budget:
                return
            num_tokens = request.num_tokens + request.num_placeholder_tokens
            if request.status is not RequestStatus.RUNNING or num_tokens >= request.max_total_tokens:
                continue  # preempted a moment ago, or its last sample is in flight
            start = request.num_computed_tokens + request.num_in_flight_tokens
            end = min(num_tokens, start + draft.budget)
            num_needed = -(-end // block_size) - len(request.block_ids)
            block_ids = self._find_blocks(request, num_needed, draft) if num_needed > 0 else []
            if block_ids is not None:
                request.block_ids += block_ids
                self._add_row(request, start, end, num_tokens, block_ids, draft)

    def _find_blocks(self, request: Request, num_needed: int, draft: _Draft) -> list[int] | None:
        """Blocks for a running request, preempting others if need be; None when it must wait or was itself chosen."""
        pool = self.block_pool
        if num_needed <= pool.num_free and not draft.num_awaited_blocks:
            return pool.allocate(num_needed)
        while True:
            awaited = sum(draft.num_awaited_blocks.values())
            returning = self._releases.num_references  # at most: a shared block does not return with its first holder
            returning += sum(len(other.block_ids) for other in self._running if _is_ending(other))
            if num_needed <= pool.num_free + returning - awaited:
                if num_needed <= pool.num_free:
                    return pool.allocate(num_needed)
                draft.num_awaited_blocks[request.request_id] = num_needed
                return None
            victim = self._choose_victim()
            self._preempt(victim, draft)
            if victim is request:
                return None

    def _choose_victim(self) -> Request:
        # One whose last sample is in flight ends by itself before its blocks could be had: sparing it costs nothing.
        candidates = [request for request in self._running if not _is_ending(request)]
        offered = [request for request in candidates if request.epoch < MAX_PREEMPTIONS_BY_POLICY]
        if not offered:
            return max(candidates, key=lambda request: self._places[request.request_id][1])
        victim = self.policy.victim(offered)
        if not any(victim is request for request in offered):
            raise PluginError(f"{type(self.policy).__name__}.victim must return one of the requests it was given.")
        return victim

    def _preempt(self, victim: Request, draft: _Draft) -> None:
        """Take a running request's blocks; it waits in its old place and is computed again."""
        taken_back = draft.rows.pop(victim.request_id, None)
        if taken_back is not None:
            draft.budget += taken_back[2].num_tokens
        draft.num_awaited_blocks.pop(victim.request_id, None)
        draft.preempted = True
        self._running.remove(victim)
        self._leave_batch(victim)
        victim.num_computed_tokens = 0
        victim.epoch += 1
        victim.status = RequestStatus.WAITING
        self._num_preemptions += 1
        self._queue(victim)

    def _admit(self, draft: _Draft) -> None:
        """Admit waiting requests in the policy's order until the first that does not fit."""
        pool = self.block_pool
        # Whoever enters computes a token, in a block of its own: without one free, the order needs no second look.
        if self.policy.dynamic and draft.budget and len(self._running) < self.max_num_seqs and pool.num_free:
            self._rank_again(draft.now)
        while self._waiting and draft.budget and len(self._running) < self.max_num_seqs:
            request = self._waiting[0][2]
            if request.finished:
                heapq.heappop(self._waiting)
                continue
            self._extend_block_hashes(request)
            num_tokens = request.num_tokens
            hits = pool.lookup(request.block_hashes[: (num_tokens - 1) // pool.block_size])
            # Room for all its known tokens, not only the first chunk: else it would soon be preempted for its own rest.
            if pool.blocks_for(num_tokens) - len(hits) > pool.num_free - pool.num_free_among(hits):
                return
            heapq.heappop(self._waiting)
            start = len(hits) * pool.block_size
            end = min(num_tokens, start + draft.budget)
            pool.acquire(hits)
            new_block_ids = pool.allocate(pool.blocks_for(end) - len(hits))
            assert new_block_ids is not None
            request.block_ids = hits + new_block_ids
            request.num_computed_tokens = start
            request.num_registered_blocks = len(hits)
            request.status = RequestStatus.RUNNING
            if request.first_scheduled_time is None:
                request.first_scheduled_time = draft.now
                request.num_cached_tokens = start
            self._running.append(request)
            self._in_runner.add(request.request_id)
            draft.entering.append(_new_row(request))
            self._add_row(request, start, end, num_tokens, list(request.block_ids), draft)
            self._register_full_blocks(request)

    def _add_row(
        self, request: Request, start: int, end: int, num_tokens: int, new_block_ids: list[int], draft: _Draft
    ) -> None:
        """Let the request compute its tokens from `start` to `end`, of `num_tokens` known or placeholders."""
        samples = end == num_tokens
        if samples:
            request.num_placeholder_tokens += 1
        request.num_in_flight_tokens += end - start
        draft.budget -= end - start
        row = ScheduledRow(
            request_id=request.request_id,
            num_computed_tokens=start,
            num_tokens=end - start,
            new_block_ids=new_block_ids,
            samples=samples,
        )
        draft.rows[request.request_id] = (request, request.epoch, row)

    # ------------------------------------------------------------------------------------------------ apply

    def apply(self, step: Step, output: StepOutput) -> list[RequestUpdate]:
        """Collect the oldest step in flight; results for requests that ended or were preempted since are dropped.

        Raises:
            PluginError: the executor did not return one token for a row that samples.
        """
        step_id, rows = self._in_flight.popleft()
        assert step_id == step.step_id == output.step_id, "steps are applied in the order they were made"
        self._releases.collect(step_id)
        updates = []
        running = RequestStatus.RUNNING
        for request, epoch, row in rows:
            if request.epoch != epoch or request.status is not running:
                continue
            request.num_computed_tokens += row.num_tokens
            request.num_in_flight_tokens -= row.num_tokens
            if self._tell_served:  # before the sample is kept, which may end the request
                self._tell_policy(request, row)
            if row.samples:
                new_token_ids = output.token_ids.get(request.request_id, [])
                self._append_sample(request, new_token_ids)
                updates.append(RequestUpdate(request=request, new_token_ids=new_token_ids))
        self._running = [request for request in self._running if request.status is running]
        self._measure_waste()
        return updates

    def _tell_policy(self, request: Request, row: ScheduledRow) -> None:
        """Each prompt token once: one that is computed again after a preemption was served the first time."""
        end = min(row.num_computed_tokens + row.num_tokens, len(request.prompt_token_ids))
        start = max(row.num_computed_tokens, self._num_told_tokens.get(request.request_id, 0))
        self._num_told_tokens[request.request_id] = max(start, end)
        self.policy.served(request, max(0, end - start), int(row.samples))

    def _append_sample(self, request: Request, new_token_ids: list[int]) -> None:
        if len(new_token_ids) != 1:
            raise PluginError(f"The executor returned {new_token_ids} for request {request.request_id!r}, not 1 token.")
        token_id = new_token_ids[0]
        request.num_placeholder_tokens -= 1
        request.output_token_ids.append(token_id)
        if request.num_in_flight_tokens:  # a later step has computed this token while it was a placeholder
            self._register_full_blocks(request)
        may_stop = len(request.output_token_ids) > request.params.min_tokens
        if may_stop and token_id in request.eos_token_ids:
            self._end(request, "stop")
        elif may_stop and token_id in request.stop_token_ids:
            request.stop_reason = token_id
            self._end(request, "stop")
        elif request.num_tokens >= request.max_total_tokens:
            self._end(request, "length")

    def _measure_waste(self) -> None:
        pool = self.block_pool
        num_blocks = self._releases.num_blocks_held_by_others()
        if num_blocks:
            num_stored = sum([request.num_computed_tokens + request.num_in_flight_tokens for request in self._running])
            num_repeats = pool.num_references - self._releases.num_references - num_blocks
            num_stored -= num_repeats * pool.block_size  # only full blocks are shared
            self._waste_sum += 1 - num_stored / (num_blocks * pool.block_size)
            self._waste_steps += 1

    # ------------------------------------------------------------------------------------------------ shared

    def _queue(self, request: Request) -> None:
        key, sequence_number = self._places[request.request_id]
        heapq.heappush(self._waiting, (key, sequence_number, request))

    def _rank_again(self, now: float) -> None:
        unfinished = [(number, request) for _key, number, request in self._waiting if not request.finished]
        self._waiting = [(self.policy.key(request, now), number, request) for number, request in unfinished]
        heapq.heapify(self._waiting)

    def _end(self, request: Request, finish_reason: str) -> None:
        """Finish a request; the caller takes it out of `_running`."""
        self._leave_batch(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = finish_reason
        del self._requests[request.request_id]
        del self._places[request.request_id]
        self._num_told_tokens.pop(request.request_id, None)
        self.policy.ended(request)

    def _leave_batch(self, request: Request) -> None:
        """Give up the blocks, but not before the last step that writes to them is collected; tell the runner."""
        if request.request_id in self._in_runner:
            self._in_runner.remove(request.request_id)
            self._leaving.append(request.request_id)
        self._releases.release(request.block_ids, request.last_step_id)
        request.block_ids = []
        request.num_in_flight_tokens = 0
        request.num_placeholder_tokens = 0

    def _extend_block_hashes(self, request: Request) -> None:
        pool = self.block_pool
        if pool.enable_prefix_caching and request.num_tokens >= (len(request.block_hashes) + 1) * pool.block_size:
            token_ids = request.token_ids_from(len(request.block_hashes) * pool.block_size)
            extend_hash_chain(request.block_hashes, token_ids, pool.block_size, request.cache_salt)

    def _register_full_blocks(self, request: Request) -> None:
        """Offer the blocks that steps made so far fill with known tokens; a placeholder's block waits for its token."""
        num_full = min(request.num_scheduled_tokens, request.num_tokens) // self.block_pool.block_size
        if num_full > request.num_registered_blocks and self.block_pool.enable_prefix_caching:
            self._extend_block_hashes(request)
            for index in range(request.num_registered_blocks, num_full):
                self.block_pool.register(request.block_ids[index], request.block_hashes[index])
            request.num_registered_blocks = num_full


def _is_ending(request: Request) -> bool:
    """Its last sample is in flight: there is nothing left to schedule."""
    return request.num_tokens + request.num_placeholder_tokens >= request.max_total_tokens


def _new_row(request: Request) -> NewRow:
    params = request.params
    return NewRow(
        request_id=request.request_id,
        token_ids=request.all_token_ids(),
        num_prompt_tokens=len(request.prompt_token_ids),
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=max(0, params.top_k),
        seed=request.seed,
        sample_index=request.sample_index,
        min_tokens=params.min_tokens,
        stop_token_ids=tuple(sorted(request.stop_token_ids | request.eos_token_ids)),
    )
