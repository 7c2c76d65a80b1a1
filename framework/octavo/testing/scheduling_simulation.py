"""The scheduler with a fake model in place of an executor: days of traffic in seconds, and every token checked.

The fake model's next token depends on every token before it, and its KV cache remembers what each slot was given, so
a block that is wrongly shared, freed too early or written twice shows as a wrong slot or a wrong token. No torch.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

from octavo.engine.block_pool import BlockPool
from octavo.engine.scheduler import RequestUpdate, Scheduler
from octavo.interfaces.executor import NewRow, ScheduledRow, Step, StepOutput
from octavo.interfaces.scheduling import SchedulerPolicy
from octavo.request import Request
from octavo.sampling_params import SamplingParams

VOCABULARY = 6
MAX_STEPS = 20_000
"""After so many steps without an end, requests run for ever."""

# ------------------------------------------------------------------------------------------------ the fake model


def initial_state(salt: bytes) -> int:
    """What the fake model knows before the first token."""
    return int.from_bytes(blake2b(salt, digest_size=6).digest(), "little")


def next_state(state: int, token_id: int) -> int:
    """What the model knows after one more token: a stand-in for the keys and values of its position."""
    return (state * 1_000_003 + token_id + 7) % (2**61 - 1)


def sample(state: int, sample_index: int = 0) -> int:
    """The token the fake model continues with, another for each completion of a prompt."""
    return (state // 1009 + sample_index) % VOCABULARY


def tokens_alone(request: Request) -> tuple[list[int], str]:
    """What the fake model gives a request that has the engine to itself, and why it ends."""
    state = initial_state(request.cache_salt)
    for token_id in request.prompt_token_ids:
        state = next_state(state, token_id)
    token_ids: list[int] = []
    while True:
        token_ids.append(sample(state, request.sample_index))
        state = next_state(state, token_ids[-1])
        ends = request.stop_token_ids | request.eos_token_ids
        if token_ids[-1] in ends and len(token_ids) > request.params.min_tokens:
            return token_ids, "stop"
        if len(request.prompt_token_ids) + len(token_ids) == request.max_total_tokens:
            return token_ids, "length"


class FakeRow:
    """One request in the fake runner: its tokens, the runner's own samples included, and its block table."""

    def __init__(self, new_row: NewRow, salt: bytes) -> None:
        self.sample_index = new_row.sample_index
        self.token_ids = list(new_row.token_ids)
        self.states = [initial_state(salt)]
        self.block_table: list[int] = []
        self.next_position: int | None = None

    def state_after(self, position: int) -> int:
        """What the model knows after the token at `position`."""
        while len(self.states) <= position + 1:
            self.states.append(next_state(self.states[-1], self.token_ids[len(self.states) - 1]))
        return self.states[position + 1]

    def replace_from(self, position: int, token_ids: Sequence[int]) -> None:
        """Let its tokens from `position` on be these."""
        self.token_ids[position:] = token_ids
        del self.states[position + 1 :]


class FakeExecutor:
    """Runs steps when they are submitted, as a device's queue does: every row writes, then every row reads.

    Attributes:
        salts: by request id, told before its first step: the model's answers depend on it.
        slots: (position, state) written last to each token slot of the KV cache.
        max_drafts: it guesses up to so many tokens to follow each sample, some of them wrong.
    """

    def __init__(self, num_blocks: int, block_size: int, max_drafts: int = 0) -> None:
        self.block_size = block_size
        self.max_drafts = max_drafts
        self.rows: dict[str, FakeRow] = {}
        self.salts: dict[str, bytes] = {}
        self.slots: list[tuple[int, int] | None] = [None] * (num_blocks * block_size)

    def submit(self, step: Step) -> StepOutput:
        """Carry out a step."""
        for request_id in step.leaving:
            del self.rows[request_id]
        for new_row in step.entering:
            assert new_row.request_id not in self.rows
            self.rows[new_row.request_id] = FakeRow(new_row, self.salts[new_row.request_id])
        self._copy_blocks(step)
        written: set[int] = set()
        for scheduled in step.rows:
            self._write(scheduled, written)
        token_ids = {scheduled.request_id: self._read(scheduled) for scheduled in step.rows if scheduled.samples}
        return StepOutput(
            step_id=step.step_id,
            token_ids=token_ids,
            draft_token_ids={request_id: self._guess(request_id) for request_id in token_ids},
        )

    def _copy_blocks(self, step: Step) -> None:
        """All are read before any is written: a block may be a source here and be given away in the same step."""
        size = self.block_size
        copies = [copy for scheduled in step.rows for copy in scheduled.copied_blocks]
        contents = [self.slots[copy.source * size : (copy.source + 1) * size] for copy in copies]
        assert len({copy.target for copy in copies}) == len(copies), "two blocks are copied to one"
        for copy, content in zip(copies, contents, strict=True):
            self.slots[copy.target * size : (copy.target + 1) * size] = content

    def _slot(self, row: FakeRow, position: int) -> int:
        return row.block_table[position // self.block_size] * self.block_size + position % self.block_size

    def _write(self, scheduled: ScheduledRow, written: set[int]) -> None:
        row = self.rows[scheduled.request_id]
        row.block_table += scheduled.new_block_ids
        for copy in scheduled.copied_blocks:
            row.block_table[copy.index] = copy.target
        start, end = scheduled.num_computed_tokens, scheduled.num_computed_tokens + scheduled.num_tokens
        assert row.next_position in (None, start), "a request's positions follow each other"
        row.next_position = end
        assert (scheduled.num_tokens == 0) == (scheduled.forked_from is not None)
        if scheduled.token_ids:
            row.replace_from(end - len(scheduled.token_ids), scheduled.token_ids)
        assert end <= len(row.token_ids), "a token was scheduled before the step that samples it"
        assert scheduled.samples == (end == len(row.token_ids))
        num_blocks = -(-end // self.block_size)
        most = -(-(end + self.max_drafts) // self.block_size)  # those of drafts that were wrong are kept
        assert num_blocks <= len(row.block_table) <= most, "blocks are allocated only for what is scheduled"
        for position in range(start, end):
            slot = self._slot(row, position)
            assert slot not in written, "two rows write one slot"
            written.add(slot)
            self.slots[slot] = (position, row.state_after(position))

    def _read(self, scheduled: ScheduledRow) -> list[int]:
        """Sample after the last token, and before that as long as the drafts were right."""
        row = self.rows[scheduled.request_id]
        end = scheduled.num_computed_tokens + scheduled.num_tokens
        for position in range(end):
            assert self.slots[self._slot(row, position)] == (position, row.state_after(position)), (
                f"{scheduled.request_id} reads another request's keys at position {position}"
            )
        first = end - scheduled.num_drafts
        sampled: list[int] = []
        while not sampled or (first + len(sampled) <= end and row.token_ids[first + len(sampled) - 1] == sampled[-1]):
            sampled.append(sample(row.state_after(first + len(sampled) - 1), row.sample_index))
        row.replace_from(first, sampled)
        row.next_position = first + len(sampled) - 1
        return sampled

    def _guess(self, request_id: str) -> list[int]:
        """The next tokens, of which every third or so is wrong."""
        row = self.rows[request_id]
        state, drafts = row.state_after(len(row.token_ids) - 1), []
        for _ in range(state % (self.max_drafts + 1)):
            drafts.append((sample(state, row.sample_index) + (state % 3 == 0)) % VOCABULARY)
            state = next_state(state, drafts[-1])
        return drafts


# ------------------------------------------------------------------------------------------------ the simulation


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInFlight:
    """A step that was submitted, and what its rows' block tables were then."""

    step: Step
    output: StepOutput
    block_tables: list[list[int]]


class Simulation:
    """One engine's life: add and abort requests, submit and collect steps; each is checked as it happens.

    Attributes:
        now: the engine's clock in seconds; `step` moves it by `seconds_per_step`.
        alive, finished: requests by id; an id that was used again is only the last one's.
        in_flight: steps submitted and not yet collected.
        seen: how often something happened that a test of many traffics wants to have met.
    """

    def __init__(
        self,
        policy: SchedulerPolicy,
        *,
        num_blocks: int,
        block_size: int = 4,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
        depth: int = 1,
        enable_prefix_caching: bool = True,
        max_drafts: int = 0,
        seconds_per_step: float = 1.0,
        seen: Counter[str] | None = None,
        scheduler_class: type[Scheduler] = Scheduler,
        pool_class: type[BlockPool] = BlockPool,
    ) -> None:
        """`depth` is how many steps may be in flight; the classes may be planted with faults."""
        self.now = 0.0
        self.depth = depth
        self.pool = pool_class(num_blocks, block_size, enable_prefix_caching)
        self.scheduler = scheduler_class(
            policy=policy,
            block_pool=self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            clock=lambda: self.now,
        )
        self.executor = FakeExecutor(num_blocks, block_size, max_drafts)
        self.alive: dict[str, Request] = {}
        self.finished: dict[str, Request] = {}
        self.in_flight: deque[StepInFlight] = deque()
        self.seen = Counter[str]() if seen is None else seen
        self._seconds_per_step = seconds_per_step

    @property
    def capacity(self) -> int:
        """Tokens one request may have in all, prompt and output: the last is sampled and never stored."""
        return self.pool.num_blocks * self.pool.block_size + 1

    def add(self, request: Request) -> None:
        """Queue a request, with its siblings, that the scheduler must take."""
        self.scheduler.add(request)
        for member in (request, *request.siblings):
            self.executor.salts[member.request_id] = member.cache_salt
            self.finished.pop(member.request_id, None)
            self.alive[member.request_id] = member

    def abort(self, request_id: str, finish_reason: Literal["abort", "stop"] = "abort") -> Request:
        """End a request that is alive; its tokens so far must be right."""
        request = self.alive.pop(request_id)
        self.seen["aborted in flight"] += request.num_in_flight_tokens > 0
        assert self.scheduler.abort(request_id, finish_reason) is request
        assert request.finish_reason == finish_reason
        expected, _reason = tokens_alone(request)
        assert request.output_token_ids == expected[: len(request.output_token_ids)]
        self.finished[request_id] = request
        return request

    def submit(self) -> Step | None:
        """Make a step and carry it out; None when there is nothing to do now, which must have a reason."""
        num_preemptions = self.scheduler.num_preemptions
        known_to_runner = set(self.executor.rows)
        step = self.scheduler.schedule()
        self.seen["preempted"] += self.scheduler.num_preemptions - num_preemptions
        if step is None:
            assert self.in_flight or not self.alive, "nothing to do, nothing on its way, yet requests are unfinished"
            self.seen["waited"] += bool(self.in_flight and self.alive)
            return None
        row_ids = [row.request_id for row in step.rows]
        assert len(row_ids) == len(set(row_ids)), "a request has two rows in one step"
        assert 1 <= step.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len(row_ids) <= self.scheduler.num_running <= self.scheduler.max_num_seqs
        assert set(step.leaving) <= known_to_runner
        assert {new_row.request_id for new_row in step.entering} <= set(row_ids)
        output = self.executor.submit(step)
        block_tables = []
        for row in step.rows:
            assert row.num_computed_tokens + row.num_tokens < self.alive[row.request_id].max_total_tokens
            table = self.executor.rows[row.request_id].block_table
            assert table == self.alive[row.request_id].block_ids
            block_tables.append(list(table))
        for new_row in step.entering:
            self.seen["hit"] += self.alive[new_row.request_id].num_computed_tokens > 0
        for row in step.rows:
            self.seen["forked"] += row.forked_from is not None
            self.seen["copied"] += len(row.copied_blocks)
            self.seen["verified"] += row.num_drafts
        self.in_flight.append(StepInFlight(step=step, output=output, block_tables=block_tables))
        return step

    def collect(self) -> list[RequestUpdate]:
        """Collect the oldest step in flight; a request that ends by it must have the tokens it would get alone."""
        oldest = self.in_flight.popleft()
        updates = self.scheduler.apply(oldest.step, oldest.output)
        for update in updates:
            request = update.request
            assert self.alive[request.request_id] is request
            assert request.output_token_ids[-len(update.new_token_ids) :] == update.new_token_ids
            self.seen["accepted"] += len(update.new_token_ids) - 1
            if request.finished:
                self.finished[request.request_id] = self.alive.pop(request.request_id)
                _check_result(request)
        self.seen["dropped"] += len(oldest.output.token_ids) - len(updates)
        return updates

    def step(self) -> list[RequestUpdate]:
        """Submit as many steps as may be in flight and collect the oldest, as the engine does."""
        self.now += self._seconds_per_step
        while len(self.in_flight) < self.depth and self.submit() is not None:
            pass
        return self.collect() if self.in_flight else []

    def drain(self, max_steps: int = MAX_STEPS) -> None:
        """Step until all requests have ended; nothing may be left behind."""
        for _ in range(max_steps):
            if not (self.alive or self.in_flight):
                break
            self.step()
        assert not self.alive, f"after {max_steps} steps these have not ended: {sorted(self.alive)}"
        assert not self.scheduler.has_unfinished
        assert self.scheduler.schedule() is None
        assert self.pool.num_free == self.pool.num_blocks
        assert 0.0 <= self.scheduler.kv_waste < 1.0


def simulated_request(
    request_id: str, prompt_token_ids: Sequence[int], max_tokens: int, capacity: int = 2**31, **fields: Any
) -> Request:
    """A request with room for `max_tokens` outputs, or for what `capacity` leaves; `fields` are Request's others."""
    return Request(
        request_id=request_id,
        prompt_token_ids=list(prompt_token_ids),
        params=SamplingParams(max_tokens=max_tokens, min_tokens=fields.pop("min_tokens", 0)),
        max_total_tokens=min(len(prompt_token_ids) + max_tokens, capacity),
        **fields,
    )


def _check_result(request: Request) -> None:
    expected, reason = tokens_alone(request)
    assert request.output_token_ids == expected
    assert request.finish_reason == reason
    by_user = reason == "stop" and expected[-1] not in request.eos_token_ids
    assert request.stop_reason == (expected[-1] if by_user else None)
