"""State machines: the block pool against a plain model, and the scheduler against a fake model with a real KV cache.

The fake model and the engine around it are those of the conformance kit, octavo.testing.scheduling_simulation.
"""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from itertools import count
from random import Random
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from octavo.builtin.fcfs import FCFSPolicy
from octavo.engine import prefix_cache
from octavo.engine import scheduler as scheduler_module
from octavo.engine.block_pool import BlockPool, extend_hash_chain
from octavo.engine.scheduler import RequestUpdate, Scheduler
from octavo.interfaces.executor import BlockCopy, ScheduledRow, Step, StepOutput
from octavo.interfaces.scheduling import SchedulerPolicy
from octavo.request import Request, RequestStatus
from octavo.testing.scheduling_simulation import (
    MAX_STEPS,
    Simulation,
    initial_state,
    next_state,
    simulated_request,
    tokens_alone,
)

EOS = 5
ENGINES: dict[str, list[Any]] = {
    "num_slots": [24, 32, 16, 20, 48, 12],
    "block_size": [2, 1, 4],
    "max_num_seqs": [5, 3, 2, 8],
    "budget": [8, 4, 16, 32, 2],
    "caching": [True, True, True, False],
    "max_drafts": [0, 0, 3],
    "policy": ["fcfs", "circling", "oldest"],
}
REQUESTS: dict[str, list[Any]] = {
    "prefix": [[1, 2, 3, 4] * 4, [1, 2, 3, 4, 4, 3, 2, 1, 0, 0, 0, 0, 1], [1] * 12],
    "cut": [4, 0, 1, 3, 6, 8, 9, 12, 16],
    "suffix": [[0], [1], [5, 5], [0, 1, 2]],
    "copies": [2, 1, 3],
    "siblings": [0, 0, 0, 1, 3],
    "max_tokens": [12, 20, 30, 8, 3, 1],
    "min_tokens": [0, 0, 2, 4],
    "stop": [set(), set(), set(), set(), set(), {2}, {3, EOS}],
    "eos": [set(), set(), set(), set(), {EOS}],
    "salt": [b"", b"", b"other"],
    "delay": [0.0, 1.0, -3.0],
}
ENGINE, REQUEST = (
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in options.items()})
    for options in (ENGINES, REQUESTS)
)

QUIET = settings(
    max_examples=30,
    stateful_step_count=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


# ------------------------------------------------------------------------------------------------ policies


class CirclingPolicy(SchedulerPolicy):
    """Ranks and chooses by a hash of the id and how often it was asked: unfair, and in circles if let."""

    dynamic = True

    def __init__(self) -> None:
        self.num_asked = 0

    def _draw(self, request: Request) -> bytes:
        self.num_asked += 1
        return blake2b(f"{request.request_id} {self.num_asked}".encode()).digest()

    def key(self, request: Request, now: float) -> bytes:
        return self._draw(request)

    def victim(self, running: Any) -> Request:
        return max(running, key=self._draw)


class OldestFirstVictim(FCFSPolicy):
    """Preempts whoever has been there longest: two requests that need the whole cache would take turns for ever."""

    def victim(self, running: Any) -> Request:
        return running[0]


POLICIES = {"fcfs": FCFSPolicy, "circling": CirclingPolicy, "oldest": OldestFirstVictim}


# ------------------------------------------------------------------------------------------------ the machine


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests, steps and aborts at one depth; subclasses set the depth and plant faults."""

    depth = 1
    scheduler_class: type[Scheduler] = Scheduler
    pool_class: type[BlockPool] = BlockPool
    seen: ClassVar[Counter[str]] = Counter()  # what the examples have met, over all of them

    def __init__(self) -> None:
        super().__init__()
        self.contents: dict[bytes, list[tuple[int, int]]] = {}  # what a block of that hash must hold
        self.wastes: list[float] = []

    @initialize(engine=ENGINE, requests=st.lists(REQUEST, min_size=2, max_size=5))
    def build(self, engine: dict[str, Any], requests: list[dict[str, Any]]) -> None:
        self.simulation = Simulation(
            POLICIES[engine["policy"]](),
            num_blocks=engine["num_slots"] // engine["block_size"],
            block_size=engine["block_size"],
            max_num_seqs=engine["max_num_seqs"],
            max_num_batched_tokens=engine["budget"],
            depth=self.depth,
            enable_prefix_caching=engine["caching"],
            max_drafts=engine["max_drafts"],
            seen=self.seen,
            scheduler_class=self.scheduler_class,
            pool_class=self.pool_class,
        )
        self.pool, self.scheduler = self.simulation.pool, self.simulation.scheduler
        self.alive, self.finished = self.simulation.alive, self.simulation.finished
        self.in_flight = self.simulation.in_flight
        for options in requests:
            self.add(options)

    @rule(options=REQUEST)
    def add(self, options: dict[str, Any]) -> None:
        capacity = self.simulation.capacity
        prompt = (options["prefix"][: options["cut"]] + options["suffix"])[: capacity - 1]
        for _ in range(options["copies"]):
            free_ids = (f"r{number}" for number in count() if f"r{number}" not in self.alive)
            request, *siblings = (
                simulated_request(
                    next(free_ids),
                    prompt,
                    max(options["max_tokens"], options["min_tokens"]),
                    capacity,
                    min_tokens=options["min_tokens"],
                    arrival_time=self.simulation.now + options["delay"],
                    stop_token_ids=frozenset(options["stop"]),
                    eos_token_ids=frozenset(options["eos"]),
                    cache_salt=options["salt"],
                    sample_index=index,
                )
                for index in range(1 + options["siblings"])
            )
            request.siblings = siblings
            self.simulation.now += 0.5
            self.simulation.add(request)
            for member in (request, *siblings):
                self.learn_contents(member)

    @precondition(lambda self: len(self.in_flight) < self.depth)
    @rule()
    def submit(self) -> None:
        self.simulation.submit()

    @precondition(lambda self: self.in_flight)
    @rule()
    def collect(self) -> None:
        self.simulation.collect()
        self.measure_waste()

    @rule(rounds=st.integers(1, 12))
    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            while len(self.in_flight) < self.depth and self.alive and self.simulation.submit() is not None:
                self.check()
            if self.in_flight:
                self.collect()
                self.check()

    @precondition(lambda self: self.alive)
    @rule(pick=st.integers(0, 999), finish_reason=st.sampled_from(["abort", "stop"]))
    def abort(self, pick: int, finish_reason: Any) -> None:
        self.simulation.abort(sorted(self.alive)[pick % len(self.alive)], finish_reason)

    @precondition(lambda self: self.finished)
    @rule()
    def abort_one_that_ended(self) -> None:
        assert self.scheduler.abort(next(iter(self.finished))) is None

    @rule()
    def reset_prefix_cache(self) -> None:
        assert self.pool.reset_prefix_cache() == (self.pool.num_referenced == 0)

    def learn_contents(self, request: Request) -> None:
        token_ids = request.prompt_token_ids + tokens_alone(request)[0]
        block_size = self.pool.block_size
        state, held = initial_state(request.cache_salt), []
        for position, token_id in enumerate(token_ids):
            state = next_state(state, token_id)
            held.append((position, state))
        for index, block_hash in enumerate(extend_hash_chain([], token_ids, block_size, request.cache_salt)):
            self.contents[block_hash] = held[index * block_size : (index + 1) * block_size]

    def measure_waste(self) -> None:
        """The definition, block by block."""
        stored: dict[int, int] = {}
        for request in self.alive.values():
            for index, block_id in enumerate(request.block_ids):
                num_stored = request.num_scheduled_tokens - index * self.pool.block_size
                stored[block_id] = max(0, min(num_stored, self.pool.block_size))  # 0: of drafts that were wrong
        if stored:
            self.wastes.append(1 - sum(stored.values()) / (len(stored) * self.pool.block_size))
        assert self.scheduler.kv_waste == pytest.approx(sum(self.wastes) / max(1, len(self.wastes)), abs=1e-9)

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        owners: Counter[int] = Counter()
        for request in self.alive.values():
            assert len(set(request.block_ids)) == len(request.block_ids)
            assert bool(request.block_ids) == (request.status is RequestStatus.RUNNING)
            owners.update(request.block_ids)
        for entry in self.scheduler._releases._waiting.values():
            for block_ids in entry:
                owners.update(block_ids)
        pool = self.pool
        for block_id in range(pool.num_blocks):
            assert pool.reference_count(block_id) == owners[block_id]
            assert (block_id in pool._free) == (owners[block_id] == 0)
        assert pool.num_references == owners.total()
        assert pool.num_free + pool.num_referenced == pool.num_blocks
        for block_hash, block_id in pool._block_of_hash.items():
            first_slot = block_id * pool.block_size
            assert self.simulation.executor.slots[first_slot : first_slot + pool.block_size] == self.contents.get(
                block_hash
            )
        self.seen["shared"] += any(number > 1 for number in owners.values())
        for step in self.in_flight:
            for table in step.block_tables:
                assert all(owners[block_id] for block_id in table), "a block was freed while a step in flight uses it"
        statuses = Counter(request.status for request in self.alive.values())
        assert self.scheduler.num_running == statuses[RequestStatus.RUNNING]
        assert self.scheduler.num_waiting == statuses[RequestStatus.WAITING]
        assert self.scheduler.num_steps_in_flight == len(self.in_flight)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        num_steps = 0
        while self.alive or self.in_flight:
            self.run(1)
            num_steps += 1
            assert num_steps < MAX_STEPS, "requests run for ever"
        self.simulation.drain()


class MachineAtDepth2(SchedulerMachine):
    depth = 2
    seen: ClassVar[Counter[str]] = Counter()


class MachineAtDepth4(SchedulerMachine):
    depth = 4
    seen: ClassVar[Counter[str]] = Counter()


@pytest.mark.parametrize("machine", [SchedulerMachine, MachineAtDepth2, MachineAtDepth4])
def test_every_request_gets_the_tokens_it_would_get_alone(machine: type[SchedulerMachine]) -> None:
    run_state_machine_as_test(machine, settings=QUIET)


def walk(machine: SchedulerMachine, seed: int) -> None:
    """The same rules at random, evenly: hypothesis looks for small examples, this for crowded ones."""
    random = Random(seed)

    def draw(options: dict[str, list[Any]]) -> dict[str, Any]:
        return {name: random.choice(values) for name, values in options.items()}

    machine.build(draw(ENGINES), [draw(REQUESTS) for _ in range(random.randint(2, 5))])
    for _ in range(40):
        kind = random.random()
        if kind < 0.45 and len(machine.in_flight) < machine.depth:
            machine.submit()
        elif kind < 0.8 and machine.in_flight:
            machine.collect()
        elif kind < 0.88 and machine.alive:
            machine.abort(random.randrange(1000), "abort")
        elif kind < 0.95:
            machine.add(draw(REQUESTS))
        else:
            machine.run(random.randint(1, 12))
        machine.check()
    machine.teardown()


def walk_often(machine: type[SchedulerMachine]) -> None:
    for seed in range(200):
        walk(machine(), seed)


@pytest.mark.parametrize("machine", [SchedulerMachine, MachineAtDepth2, MachineAtDepth4])
def test_a_crowd_gets_the_tokens_each_would_get_alone(machine: type[SchedulerMachine]) -> None:
    machine.seen.clear()
    walk_often(machine)
    expected = {"preempted", "hit", "shared", "dropped", "aborted in flight", "waited"}
    expected |= {"forked", "copied", "verified", "accepted"}
    if machine.depth == 1:
        expected -= {"waited"}
    assert all(machine.seen[event] >= 20 for event in expected), f"the walks no longer meet everything: {machine.seen}"


# ------------------------------------------------------------------------------------------------ planted faults


class FreesAtOnce(Scheduler):
    """A request's blocks are free although a step in flight still writes to them."""

    def _leave_batch(self, request: Request) -> None:
        request.last_step_id = -1
        super()._leave_batch(request)


class RegistersEarly(Scheduler):
    """Blocks are offered to others before it is sure that their row stays in the step."""

    def _add_row(self, request: Request, *args: Any, **more: Any) -> ScheduledRow:
        row = super()._add_row(request, *args, **more)
        prefix_cache.register_full_blocks(self.block_pool, request)
        return row


class WritesToSharedBlocks(Scheduler):
    """A request that shares a partly filled block writes to it without a copy of its own."""

    def _copy_on_write(self, request: Request, index: int, target: int) -> BlockCopy:
        self.block_pool.release([target])
        source = request.block_ids[index]
        return BlockCopy(index=index, source=source, target=source)


class CopiesNothing(Scheduler):
    """A request gets a block of its own, but not what the shared one held."""

    def _copy_on_write(self, request: Request, index: int, target: int) -> BlockCopy:
        super()._copy_on_write(request, index, target)
        return BlockCopy(index=index, source=target, target=target)


class KeepsWrongDrafts(Scheduler):
    """Drafts count as computed whether they were right or not."""

    def apply(self, step: Step, output: StepOutput) -> list[RequestUpdate]:
        updates = super().apply(step, output)
        num_drafts = {row.request_id: row.num_drafts for row in step.rows}
        for update in updates:
            wrong = num_drafts[update.request.request_id] - (len(update.new_token_ids) - 1)
            update.request.num_computed_tokens += max(0, wrong)
        return updates


class KeepsEvictedHashes(BlockPool):
    """A block that is given new content is still found under its old hash."""

    def allocate(self, num_blocks: int) -> list[int] | None:
        cached = dict(self._block_of_hash)
        block_ids = super().allocate(num_blocks)
        self._block_of_hash.update(cached)
        return block_ids


FAULTS = [FreesAtOnce, RegistersEarly, WritesToSharedBlocks, CopiesNothing, KeepsWrongDrafts, KeepsEvictedHashes]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_machine_catches_a_planted_fault(fault: type[Any]) -> None:
    kind = "pool_class" if issubclass(fault, BlockPool) else "scheduler_class"
    machine = type(fault.__name__, (SchedulerMachine,), {kind: fault, "seen": Counter()})
    with pytest.raises((AssertionError, IndexError)):
        walk_often(machine)


def hashes_without_salt(pool: BlockPool, request: Request) -> None:
    """Requests of different salts share blocks."""
    request.cache_salt, salt = b"", request.cache_salt
    EXTEND_HASHES(pool, request)
    request.cache_salt = salt


def registers_one_token_too_many(pool: BlockPool, request: Request) -> None:
    """A block is offered as full one token early."""
    request.num_computed_tokens += 1
    REGISTER_FULL_BLOCKS(pool, request)
    request.num_computed_tokens -= 1


EXTEND_HASHES, REGISTER_FULL_BLOCKS = prefix_cache._extend_hashes, prefix_cache.register_full_blocks


@pytest.mark.parametrize(
    ("module", "name", "fault"),
    [
        (prefix_cache, "_extend_hashes", hashes_without_salt),
        (scheduler_module, "register_full_blocks", registers_one_token_too_many),
    ],
    ids=["forgets salt", "counts one token too many"],
)
def test_the_machine_catches_a_fault_of_the_prefix_cache(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, fault: Any
) -> None:
    monkeypatch.setattr(module, name, fault)
    machine = type("Faulty", (SchedulerMachine,), {"seen": Counter()})
    with pytest.raises((AssertionError, IndexError)):
        walk_often(machine)
