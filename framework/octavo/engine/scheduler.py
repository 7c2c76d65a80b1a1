"""Scheduler: which requests compute which tokens in the next step, and in which blocks.

Second stop of a request's way: request -> scheduler -> batch -> model -> sampler -> output. There are no phases: a
request has tokens to schedule, and each step takes some. The policy ranks; blocks, budgets and correctness are here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from octavo.engine.adapters import AdapterStore
from octavo.engine.block_pool import BlockPool, DeferredReleases
from octavo.engine.kv_waste import KVWaste
from octavo.engine.prefix_cache import find_prefix, register_full_blocks
from octavo.engine.waiting_queue import WaitingQueue
from octavo.errors import PluginError, RequestError
from octavo.interfaces.executor import AdapterPlacement, BlockCopy, NewRow, ScheduledRow, Step, StepOutput
from octavo.interfaces.scheduling import SchedulerPolicy
from octavo.lora.adapter import Adapter
from octavo.outputs import TokenLogprobs
from octavo.request import Request, RequestStatus

MAX_PREEMPTIONS_BY_POLICY = 8
"""How often a policy may choose one request as its victim before it must choose another. With several steps in flight
even "the longest running" as victim makes two requests take turns for ever, each losing its samples in flight."""


@dataclass(kw_only=True, slots=True)
class RequestUpdate:
    """What one collected step gave a request; `request` is already up to date and may have finished.

    Attributes:
        logprobs: one for each new token, of requests that ask for them; of those whose tokens are chosen outside, of
            the token that was drawn and is not kept.
        prompt_logprobs: of the whole prompt, with the first token.
    """

    request: Request
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


_Row = tuple[Request, int, ScheduledRow]  # its epoch when the row was made: late results are told by it


@dataclass(kw_only=True, slots=True)
class _Plan:
    """One call of `schedule`: the rows so far, what is left to give, who waits for blocks on their way back.

    `adapters_wait`: a request waits for a device position, so none with an adapter may go before it.
    """

    now: float
    budget: int
    rows: dict[str, _Row] = field(default_factory=dict)
    num_awaited_blocks: dict[str, int] = field(default_factory=dict)
    preempted: bool = False
    placements: list[AdapterPlacement] = field(default_factory=list)
    adapters_wait: bool = False


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
        adapters: LoRA adapters that requests may have; None: none has one.

    Attributes:
        num_drafts, num_accepted_drafts: guesses verified and kept, since the start.
        num_prefix_cache_queries, num_prefix_cache_hits: tokens looked for in the prefix cache and found, since the
            start, when requests entered for the first time.
    """

    def __init__(
        self,
        *,
        policy: SchedulerPolicy,
        block_pool: BlockPool,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        adapters: AdapterStore | None = None,
    ) -> None:
        self.policy = policy
        self.block_pool = block_pool
        self.adapters = adapters
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_drafts = 0
        self.num_accepted_drafts = 0
        self.num_prefix_cache_queries = 0
        self.num_prefix_cache_hits = 0
        self._clock = clock
        self._tell_served = type(policy).served is not SchedulerPolicy.served
        self._requests: dict[str, Request] = {}  # unfinished
        self._num_told_tokens: dict[str, int] = {}  # prompt tokens the policy was told of
        self._waiting = WaitingQueue(policy)
        self._running: list[Request] = []  # in order of admission
        self._leaving: list[str] = []  # news the runner has not had yet
        self._in_runner: set[str] = set()
        self._in_flight: deque[tuple[int, list[_Row]]] = deque()  # step ids and rows
        self._next_step_id = 0
        self._releases = DeferredReleases(block_pool)
        self._num_preemptions = 0
        self._waste = KVWaste(block_pool, self._releases)

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
        return self._waste.mean

    # ------------------------------------------------------------------------------------------------ in and out

    def add(self, request: Request) -> None:
        """Queue a request. Its siblings, if any, share its prompt's blocks: they start when its prompt is computed.

        Raises:
            RequestError: it is empty, can never fit, or its id is taken.
        """
        family = [request, *request.siblings]
        for member in family:
            self._check(member)
        now = self._clock()
        keys = [self.policy.key(member, now) for member in family]  # first: a policy may raise
        for member, key in zip(family, keys, strict=True):
            self._requests[member.request_id] = member
            self._waiting.give_place(member, key)
        self._waiting.put(request)
        if self.adapters is not None:
            self.adapters.add(request)

    def _check(self, request: Request) -> None:
        num_prompt_tokens = len(request.prompt_token_ids)
        if request.request_id in self._requests:
            raise RequestError(f"Request id {request.request_id!r} is already in use; ids must be unique.")
        if request.adapter is not None and self.adapters is None:
            raise RequestError(f"Request {request.request_id!r} has an adapter; this engine serves none.")
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

    def abort(self, request_id: str, finish_reason: Literal["abort", "stop"] = "abort") -> Request | None:
        """End a request at any moment, also with steps in flight; None when no such request is unfinished."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._cut(request, finish_reason)
        return request

    def end_adapter(self, adapter: Adapter, finish_reason: str, stop_reason: str) -> list[Request]:
        """End all requests of an adapter; returns them."""
        ended = [request for request in self._requests.values() if request.adapter is adapter]
        for request in ended:
            request.stop_reason = stop_reason
            self._cut(request, finish_reason)
        return ended

    def _cut(self, request: Request, finish_reason: str) -> None:
        if request.status is RequestStatus.RUNNING:
            self._running.remove(request)
        self._end(request, finish_reason)

    def fork(self, origin_id: str, request: Request) -> None:
        """Add a request that has all the tokens of another and is then extended: it shares the blocks that hold them.

        Nothing is computed again, unless the origin was preempted or no place in the batch is free.
        The origin must have no step in flight: its tokens are chosen outside, and its last step was applied.
        """
        origin = self._requests[origin_id]
        assert not origin.num_in_flight_tokens, "a request is forked between its steps"
        self._check(request)
        self._waiting.give_place(request, self.policy.key(request, self._clock()))
        self._requests[request.request_id] = request
        if self.adapters is not None:
            assert request.adapter is origin.adapter, "a fork has its origin's adapter"
            self.adapters.add_fork(request)
        if origin.status is RequestStatus.RUNNING and len(self._running) < self.max_num_seqs:
            self._share(origin, request, origin.num_computed_tokens)
            request.num_computed_tokens = origin.num_computed_tokens

    def extend(self, request_id: str, token_id: int) -> None:
        """Give a request whose tokens are chosen outside its next one; it must have been waiting for it."""
        request = self._requests[request_id]
        request.output_token_ids.append(token_id)
        if request.status is RequestStatus.RUNNING:
            request.num_unsent_tokens += 1
        else:  # it was preempted before its token was chosen, or is a fork that had no place
            self._waiting.put(request)

    # ------------------------------------------------------------------------------------------------ schedule

    def schedule(self) -> Step | None:
        """The next step, or None when there is nothing to compute now."""
        plan = _Plan(now=self._clock(), budget=self.max_num_batched_tokens)
        self._schedule_running(plan)
        for request, _epoch, row in list(plan.rows.values()):  # only now: until here a preemption could take back a row
            if (row.num_computed_tokens + row.num_tokens) // self.block_pool.block_size > request.num_registered_blocks:
                register_full_blocks(self.block_pool, request)
            if request.siblings:
                self._fork_siblings(request, row, plan)
        # Who was preempted is not admitted in the same step, unless nothing else is left to run.
        if not plan.num_awaited_blocks and not (plan.preempted and plan.rows):
            self._admit(plan)
            self._waiting.restore()
        if not plan.rows:
            return None
        step_id = self._next_step_id
        self._next_step_id += 1
        rows = list(plan.rows.values())
        entering = []
        for request, _epoch, _row in rows:
            request.last_step_id = step_id
            if request.request_id not in self._in_runner:
                self._in_runner.add(request.request_id)
                entering.append(_new_row(request))
        self._in_flight.append((step_id, rows))
        leaving, self._leaving = self._leaving, []
        return Step(
            step_id=step_id,
            leaving=leaving,
            placements=plan.placements,
            entering=entering,
            rows=[row for _, _, row in rows],
        )

    def _schedule_running(self, plan: _Plan) -> None:
        pool, block_size = self.block_pool, self.block_pool.block_size
        for request in list(self._running):
            if not plan.budget:
                return
            num_tokens = request.num_tokens + request.num_placeholder_tokens
            start = request.num_computed_tokens + request.num_in_flight_tokens
            if request.status is not RequestStatus.RUNNING or num_tokens >= request.max_total_tokens:
                continue  # preempted a moment ago, or its last sample is in flight
            if start >= num_tokens:
                continue  # waits for what becomes of its drafts, or for a token that is chosen outside
            end = min(num_tokens, start + plan.budget)
            num_drafts = self._num_drafts(request, end, num_tokens, plan) if request.draft_token_ids else 0
            end += num_drafts
            num_new = max(0, -(-end // block_size) - len(request.block_ids))
            first = start // block_size
            copies = first < len(request.block_ids) and pool.reference_count(request.block_ids[first]) > 1
            num_needed = num_new + copies
            shared = request.block_ids[first] if copies else None
            block_ids = self._find_blocks(request, num_needed, plan, shared) if num_needed > 0 else []
            if block_ids is not None:
                copies = len(block_ids) > num_new  # a preemption may have left it the only holder
                copied = (self._copy_on_write(request, first, block_ids.pop()),) if copies else ()
                request.block_ids += block_ids
                self._add_row(request, start, end, num_tokens + num_drafts, plan, num_drafts, copied)

    def _num_drafts(self, request: Request, end: int, num_tokens: int, plan: _Plan) -> int:
        """How many of its drafts a request that reaches its last token has room for; none is worth a preemption."""
        if end < num_tokens or request.num_placeholder_tokens or plan.num_awaited_blocks:
            return 0
        pool = self.block_pool
        room = (len(request.block_ids) + pool.num_free - 1) * pool.block_size - num_tokens  # one may be for a copy
        left = plan.budget - (end - request.num_scheduled_tokens)
        return max(0, min(len(request.draft_token_ids), request.max_total_tokens - num_tokens - 1, left, room))

    def _copy_on_write(self, request: Request, index: int, target: int) -> BlockCopy:
        """Give the request a block of its own in place of one it shares and is about to write to."""
        source = request.block_ids[index]
        request.block_ids[index] = target
        self.block_pool.release([source])  # not the last reference; the copy is made before this step's first write
        return BlockCopy(index=index, source=source, target=target)

    def _find_blocks(
        self, request: Request, num_needed: int, plan: _Plan, shared: int | None = None
    ) -> list[int] | None:
        """Blocks for a running request, preempting others if need be; None when it must wait or was itself chosen.

        One of them is for a copy of the block `shared`; it is not needed once nobody else holds that.
        """
        pool = self.block_pool
        if num_needed <= pool.num_free and not plan.num_awaited_blocks:
            return pool.allocate(num_needed)
        while True:
            awaited = sum(plan.num_awaited_blocks.values())
            returning = self._releases.num_references  # at most: a shared block does not return with its first holder
            returning += sum(len(other.block_ids) for other in self._running if _is_ending(other))
            if num_needed <= pool.num_free + returning - awaited:
                if num_needed <= pool.num_free:
                    return pool.allocate(num_needed)
                plan.num_awaited_blocks[request.request_id] = num_needed
                return None
            victim = self._choose_victim()
            self._preempt(victim, plan)
            if victim is request:
                return None
            if shared is not None and pool.reference_count(shared) == 1:
                num_needed, shared = num_needed - 1, None

    def _choose_victim(self) -> Request:
        # One whose last sample is in flight ends by itself before its blocks could be had: sparing it costs nothing.
        candidates = [request for request in self._running if not _is_ending(request)]
        offered = [request for request in candidates if request.epoch < MAX_PREEMPTIONS_BY_POLICY]
        if not offered:
            return self._waiting.latest(candidates)
        victim = self.policy.victim(offered)
        if not any(victim is request for request in offered):
            raise PluginError(f"{type(self.policy).__name__}.victim must return one of the requests it was given.")
        return victim

    def _preempt(self, victim: Request, plan: _Plan) -> None:
        """Take a running request's blocks; it waits in its old place and is computed again."""
        taken_back = plan.rows.pop(victim.request_id, None)
        if taken_back is not None:
            plan.budget += taken_back[2].num_tokens
        plan.num_awaited_blocks.pop(victim.request_id, None)
        plan.preempted = True
        self._running.remove(victim)
        is_idle = _is_idle(victim)
        self._leave_batch(victim)
        victim.num_computed_tokens = 0
        victim.epoch += 1
        victim.status = RequestStatus.WAITING
        self._num_preemptions += 1
        if not is_idle:  # else there is nothing to compute before it is extended
            self._waiting.put(victim)

    def _admit(self, plan: _Plan) -> None:
        """Admit waiting requests in the policy's order until the first that does not fit; those whose adapter is not
        there are passed over."""
        pool = self.block_pool
        # Whoever enters computes a token, in a block of its own: without one free, the order needs no second look.
        if self.policy.dynamic and plan.budget and len(self._running) < self.max_num_seqs and pool.num_free:
            self._waiting.rank_again(plan.now)
        while plan.budget and (request := self._waiting.first()) is not None:
            if len(self._running) >= self.max_num_seqs:
                if self._preempt_idle(plan):
                    continue
                return
            if request.adapter is not None and not self._has_adapter(request, request.adapter, plan):
                continue
            hits = find_prefix(pool, request)
            num_tokens = request.num_tokens
            # Room for all its known tokens, not only the first chunk: else it would soon be preempted for its own rest.
            if pool.blocks_for(num_tokens) - len(hits) > pool.num_free - pool.num_free_among(hits):
                if self._preempt_idle(plan):
                    continue
                return
            self._waiting.pop()
            if request.first_scheduled_time is None and request.params.prompt_logprobs is None:
                self.num_prefix_cache_queries += num_tokens
                self.num_prefix_cache_hits += len(hits) * pool.block_size
            start = len(hits) * pool.block_size
            end = min(num_tokens, start + plan.budget)
            pool.acquire(hits)
            new_block_ids = pool.allocate(pool.blocks_for(end) - len(hits))
            assert new_block_ids is not None
            request.block_ids = hits + new_block_ids
            request.num_computed_tokens = start
            request.num_registered_blocks = len(hits)
            self._start_running(request, plan.now, start)
            if self.adapters is not None and (placement := self.adapters.place(request)) is not None:
                plan.placements.append(placement)
            row = self._add_row(request, start, end, num_tokens, plan)
            register_full_blocks(pool, request)
            if request.siblings:
                self._fork_siblings(request, row, plan)

    def _has_adapter(self, request: Request, adapter: Adapter, plan: _Plan) -> bool:
        """Whether the first waiting request can be given its adapter; if not, another comes first now.

        Adapters that are read take nothing from each other. Positions they do: once a request waits for one, those
        behind it may not take the next that is free.
        """
        adapters = self.adapters
        assert adapters is not None
        if not plan.adapters_wait and adapters.may_enter(request):
            if adapters.has_position(adapter):
                return True
            if self._preempt_idle(plan):
                return False
            plan.adapters_wait = True
        self._waiting.pass_over()
        return False

    def _preempt_idle(self, plan: _Plan) -> bool:
        """Let a request that awaits a choice give way, when nothing else can go on.

        The choice may be among several requests, of which one still waits for what this one holds.
        """
        if plan.rows or self._in_flight:
            return False
        idle = next((request for request in reversed(self._running) if _is_idle(request)), None)
        if idle is not None:
            self._preempt(idle, plan)
        return idle is not None

    def _start_running(self, request: Request, now: float, num_cached_tokens: int) -> None:
        request.status = RequestStatus.RUNNING
        if request.first_scheduled_time is None:
            request.first_scheduled_time = now
            request.num_cached_tokens = num_cached_tokens
        self._running.append(request)
        if self.adapters is not None:
            self.adapters.enter_batch(request)

    def _fork_siblings(self, origin: Request, row: ScheduledRow, plan: _Plan) -> None:
        """With the step that computes the last of a prompt, the others that have this prompt draw from it too."""
        if not row.samples:
            return
        siblings, origin.siblings = origin.siblings, []
        num_tokens = row.num_computed_tokens + row.num_tokens
        for sibling in siblings:
            if sibling.finished:
                continue
            if len(self._running) >= self.max_num_seqs:
                self._waiting.put(sibling)  # and computes the prompt itself, or finds it in the prefix cache
                continue
            self._share(origin, sibling, num_tokens)
            sibling.num_in_flight_tokens = num_tokens
            self._add_row(sibling, num_tokens, num_tokens, num_tokens, plan, forked_from=origin.request_id)

    def _share(self, origin: Request, request: Request, num_tokens: int) -> None:
        """Let a request hold the blocks of another's first tokens; the last may be partly filled."""
        pool = self.block_pool
        request.block_ids = origin.block_ids[: pool.blocks_for(num_tokens)]
        pool.acquire(request.block_ids)
        num_full = num_tokens // pool.block_size
        request.block_hashes = origin.block_hashes[:num_full]
        request.hashed_adapter = origin.hashed_adapter
        request.num_registered_blocks = min(origin.num_registered_blocks, num_full)
        self._start_running(request, self._clock(), origin.num_cached_tokens)
        self._waste.watch(request, origin)

    def _add_row(
        self,
        request: Request,
        start: int,
        end: int,
        num_tokens: int,
        plan: _Plan,
        num_drafts: int = 0,
        copied_blocks: tuple[BlockCopy, ...] = (),
        forked_from: str | None = None,
    ) -> ScheduledRow:
        """Let the request compute its tokens from `start` to `end`, of `num_tokens` known, placeholders or drafts."""
        samples = end == num_tokens
        if samples and not request.chosen_outside:
            request.num_placeholder_tokens += 1
        request.num_in_flight_tokens += end - start
        plan.budget -= end - start
        token_ids: tuple[int, ...] = ()
        if request.num_unsent_tokens or num_drafts:
            chosen = request.output_token_ids[len(request.output_token_ids) - request.num_unsent_tokens :]
            token_ids = (*chosen, *request.draft_token_ids[:num_drafts])
            request.num_unsent_tokens = 0
        request.draft_token_ids = []
        row = ScheduledRow(
            request_id=request.request_id,
            num_computed_tokens=start,
            num_tokens=end - start,
            new_block_ids=request.block_ids[request.num_sent_blocks :],
            samples=samples,
            token_ids=token_ids,
            num_drafts=num_drafts,
            copied_blocks=copied_blocks,
            forked_from=forked_from,
        )
        request.num_sent_blocks = len(request.block_ids)
        plan.rows[request.request_id] = (request, request.epoch, row)
        return row

    # ------------------------------------------------------------------------------------------------ apply

    def apply(self, step: Step, output: StepOutput) -> list[RequestUpdate]:
        """Collect the oldest step in flight; results for requests that ended or were preempted since are dropped.

        Raises:
            PluginError: the executor did not return tokens for a row that samples, or more than it was asked for.
        """
        step_id, rows = self._in_flight.popleft()
        assert step_id == step.step_id == output.step_id, "steps are applied in the order they were made"
        self._releases.collect(step_id)
        updates = []
        running = RequestStatus.RUNNING
        for request, epoch, row in rows:
            if request.epoch != epoch or request.status is not running:
                continue
            request_id = request.request_id
            new_token_ids = output.token_ids.get(request_id, []) if row.samples else []
            if row.samples and not 0 < len(new_token_ids) <= row.num_drafts + 1:
                raise PluginError(
                    f"The executor returned {new_token_ids} for request {request_id!r}, which sampled after "
                    f"{row.num_drafts} drafts: 1 to {row.num_drafts + 1} tokens are wanted."
                )
            num_tokens = row.num_tokens if row.forked_from is None else row.num_computed_tokens
            request.num_in_flight_tokens -= num_tokens
            request.num_computed_tokens += num_tokens
            if row.num_drafts:
                request.num_computed_tokens -= row.num_drafts - (len(new_token_ids) - 1)
                self.num_drafts += row.num_drafts
                self.num_accepted_drafts += len(new_token_ids) - 1
            if self._tell_served:  # before the samples are kept, which may end the request
                self._tell_policy(request, row, len(new_token_ids))
            if output.prompt_logprobs and (prompt_logprobs := output.prompt_logprobs.get(request_id)):
                known = max(0, len(request.prompt_logprobs) - row.num_computed_tokens)  # of before a preemption
                request.prompt_logprobs += prompt_logprobs[known:]
            if row.samples:
                updates.append(self._sampled(request, new_token_ids, output))
        self._running = [request for request in self._running if request.status is running]
        self._waste.measure(self._running)
        return updates

    def _sampled(self, request: Request, new_token_ids: list[int], output: StepOutput) -> RequestUpdate:
        """Keep what a request sampled, up to the token that ends it."""
        kept = new_token_ids
        if request.chosen_outside:
            kept = []
        else:
            request.num_placeholder_tokens -= 1
        for index, token_id in enumerate(kept):
            self._append(request, token_id)
            if request.status is RequestStatus.FINISHED:
                kept = kept[: index + 1]
                break
        else:
            if output.draft_token_ids and kept:
                request.draft_token_ids = output.draft_token_ids.get(request.request_id, [])
        update = RequestUpdate(request=request, new_token_ids=kept)
        if output.logprobs:
            update.logprobs = output.logprobs.get(request.request_id, [])[: len(kept) or 1]
        if request.prompt_logprobs:
            update.prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, []
        return update

    def _tell_policy(self, request: Request, row: ScheduledRow, num_output_tokens: int) -> None:
        """Each prompt token once: one that is computed again after a preemption was served the first time."""
        end = min(row.num_computed_tokens + row.num_tokens, len(request.prompt_token_ids))
        start = max(row.num_computed_tokens, self._num_told_tokens.get(request.request_id, 0))
        self._num_told_tokens[request.request_id] = max(start, end)
        self.policy.served(request, max(0, end - start), num_output_tokens)

    def _append(self, request: Request, token_id: int) -> None:
        request.output_token_ids.append(token_id)
        if request.num_in_flight_tokens and request.num_tokens % self.block_pool.block_size == 0:
            register_full_blocks(self.block_pool, request)  # a later step computes this token, a placeholder until now
        may_stop = len(request.output_token_ids) > request.params.min_tokens
        if may_stop and token_id in request.eos_token_ids:
            self._end(request, "stop")
        elif may_stop and token_id in request.stop_token_ids:
            request.stop_reason = token_id
            self._end(request, "stop")
        elif request.num_tokens >= request.max_total_tokens:
            self._end(request, "length")

    # ------------------------------------------------------------------------------------------------ shared

    def _end(self, request: Request, finish_reason: str) -> None:
        """Finish a request; the caller takes it out of `_running`."""
        self._leave_batch(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = finish_reason
        siblings = [sibling for sibling in request.siblings if not sibling.finished]
        request.siblings = []
        if siblings:  # their prompt is not computed yet: the next of them does it
            siblings[0].siblings = siblings[1:]
            self._waiting.put(siblings[0])
        del self._requests[request.request_id]
        self._waiting.forget(request)
        self._num_told_tokens.pop(request.request_id, None)
        if self.adapters is not None:
            self.adapters.end(request)
        self.policy.ended(request)

    def _leave_batch(self, request: Request) -> None:
        """Give up the blocks, but not before the last step that writes to them is collected; tell the runner."""
        if request.request_id in self._in_runner:
            self._in_runner.remove(request.request_id)
            self._leaving.append(request.request_id)
        if self.adapters is not None and request.status is RequestStatus.RUNNING:
            self.adapters.leave_batch(request)
        self._releases.release(request.block_ids, request.last_step_id)
        request.block_ids = []
        request.num_in_flight_tokens = 0
        request.num_placeholder_tokens = 0
        request.num_sent_blocks = 0
        request.num_unsent_tokens = 0
        request.draft_token_ids = []


def _is_ending(request: Request) -> bool:
    """Its last sample is in flight: there is nothing left to schedule."""
    return request.num_tokens + request.num_placeholder_tokens >= request.max_total_tokens


def _is_idle(request: Request) -> bool:
    """All its tokens are computed, and its next one is still to be chosen outside."""
    return request.chosen_outside and request.num_computed_tokens == request.num_tokens


def _new_row(request: Request) -> NewRow:
    return NewRow(
        request_id=request.request_id,
        token_ids=request.all_token_ids(),
        num_prompt_tokens=len(request.prompt_token_ids),
        params=request.params,
        seed=request.seed,
        sample_index=request.sample_index,
        stop_token_ids=tuple(sorted(request.stop_token_ids | request.eos_token_ids)),
        bad_words_token_ids=request.bad_words_token_ids,
        chosen_outside=request.chosen_outside,
        adapter_position=None if request.adapter is None else request.adapter.position,
    )
