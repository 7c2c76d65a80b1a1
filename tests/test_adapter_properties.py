"""State machines: adapters that come, go, change and are evicted while requests run, more of them than positions."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
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
from simulated_adapters import SimulatedEngine

from octavo.engine import adapters as adapters_module
from octavo.engine import prefix_cache
from octavo.engine.adapters import AdapterStore
from octavo.engine.block_pool import BlockPool
from octavo.errors import AdapterError, EngineDeadError
from octavo.lora.adapter import Adapter
from octavo.request import Request, RequestStatus

NAMES = ["a", "b", "c", "d", "e"]
ENGINES: dict[str, list[Any]] = {
    "sizes": [(2, 3), (2, 2), (1, 1), (3, 4), (1, 2)],
    "num_blocks": [40, 24, 16],
    "max_num_seqs": [4, 2, 6],
    "budget": [8, 16, 4],
}
REQUESTS: dict[str, list[Any]] = {
    "adapter": [*NAMES, *NAMES, None],
    "prompt": [(1, 2, 3, 4, 5, 0), (1, 2, 3, 4), (1, 1, 1), (1, 2, 3, 4, 5, 0, 2, 2, 2)],
    "max_tokens": [4, 8, 1, 12],
    "siblings": [0, 0, 0, 2],
}
ENGINE, REQUEST = (
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in options.items()})
    for options in (ENGINES, REQUESTS)
)
NAME = st.sampled_from(NAMES)

QUIET = settings(
    max_examples=30,
    stateful_step_count=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class AdapterMachine(RuleBasedStateMachine):
    """Random adapters, requests and steps at one depth; subclasses set the depth and plant faults."""

    depth = 1
    store_class: type[AdapterStore] = AdapterStore
    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.num_requests = 0
        self.num_edits = 0
        self.futures: list[Future[Any]] = []
        self.pinned_positions: dict[int, int] = {}

    @initialize(engine=ENGINE)
    def build(self, engine: dict[str, Any]) -> None:
        max_loras, max_cpu_loras = engine["sizes"]
        self.engine = SimulatedEngine(
            max_loras=max_loras,
            max_cpu_loras=max_cpu_loras,
            num_blocks=engine["num_blocks"],
            max_num_seqs=engine["max_num_seqs"],
            budget=engine["budget"],
            depth=self.depth,
            store_class=self.store_class,
        )
        self.files = self.engine.executor.files
        self.files |= {f"/{name}": f"{name}0" for name in NAMES}
        for name in NAMES:
            self.load(name, False)

    @rule(name=NAME, replace=st.booleans())
    def load(self, name: str, replace: bool) -> None:
        self.seen["replaced"] += replace and self.engine.store.get(name) is not None
        self.futures.append(self.engine.engine.load_adapter(name, f"/{name}", replace=replace))

    @rule(name=NAME, abort=st.booleans())
    def unload(self, name: str, abort: bool) -> None:
        if self.engine.engine.knows_adapter(name):
            self.futures.append(self.engine.engine.unload_adapter(name, abort=abort))

    @rule(name=NAME)
    def edit(self, name: str) -> None:
        """Other files lie there from now on."""
        self.num_edits += 1
        self.files[f"/{name}"] = f"{name}{self.num_edits}"

    @rule(name=NAME)
    def remove_files(self, name: str) -> None:
        self.files.pop(f"/{name}", None)

    @rule(name=NAME, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        if self.engine.engine.knows_adapter(name):
            try:
                self.engine.engine.pin_adapter(name, pinned=pinned)
                self.seen["pinned"] += pinned
            except AdapterError:
                assert sum(status.pinned for status in self.engine.engine.adapters()) == self.num_positions - 1

    @rule(options=REQUEST)
    def add(self, options: dict[str, Any]) -> None:
        name = options["adapter"]
        if name is None or self.engine.engine.knows_adapter(name):
            self.num_requests += 1
            self.engine.add(f"r{self.num_requests}", **options)

    @precondition(lambda self: self.engine.alive)
    @rule(pick=st.integers(0, 999))
    def abort(self, pick: int) -> None:
        self.engine.abort(sorted(self.engine.alive)[pick % len(self.engine.alive)])

    @rule(rounds=st.integers(1, 6))
    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            num_reads = self.engine.store.num_loads
            self.engine.step()
            self.seen["read"] += self.engine.store.num_loads - num_reads
            self.check()

    @precondition(lambda self: self.engine.loader.job is not None)
    @rule()
    def finish_read(self) -> None:
        self.engine.loader.finish()

    @property
    def num_positions(self) -> int:
        return len(self.engine.executor.positions)

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "engine"):
            return
        store, executor = self.engine.store, self.engine.executor
        being_read = store._reading is not None
        in_memory = {adapter_id for adapter_id, one in store._versions.items() if one.in_memory}
        unread = {self.engine.loader.job.adapter_id} if self.engine.loader.job is not None else set()
        assert in_memory == set(executor.loaded) - unread
        assert len(in_memory) + being_read == store.num_in_memory <= executor.max_cpu_loras
        alive = list(self.engine.alive.values())
        for adapter in store._versions.values():
            assert (adapter.position is not None) == (adapter.state == "placed")
            requests = [request for request in alive if request.adapter is adapter]
            self.check_counts(adapter, requests)
        self.check_pins(store)
        self.seen["evicted"] += store.num_evictions > 0

    def check_counts(self, adapter: Adapter, requests: list[Request]) -> None:
        told = [request for request in requests if not request.finished]  # who was aborted with it is told next step
        num_running = sum(request.status is RequestStatus.RUNNING for request in told)
        assert adapter.num_requests == len(told)
        assert adapter.num_running == num_running
        assert adapter.num_started >= num_running
        assert adapter.in_memory or not adapter.num_started
        assert adapter.position is not None or not num_running

    def check_pins(self, store: AdapterStore) -> None:
        pinned = {one.adapter_id: one for one in store._versions.values() if one.pinned}
        for adapter_id, position in self.pinned_positions.items():
            if adapter_id in pinned:
                assert pinned[adapter_id].position == position, "a pinned adapter has lost its position"
        self.pinned_positions = {
            adapter_id: adapter.position for adapter_id, adapter in pinned.items() if adapter.position is not None
        }

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine, store = self.engine, self.engine.store
        engine.finish()
        self.seen.update(engine.seen)
        for status in store.statuses():
            self.futures.append(engine.engine.unload_adapter(status.name))
        for _ in range(200):
            if engine.engine.has_unfinished:
                engine.read()
        assert not engine.engine.has_unfinished
        assert all(future.done() for future in self.futures)
        assert engine.executor.loaded == {}
        assert store.num_in_memory == store.num_placed == 0
        assert store._versions == {}
        assert engine.pool.num_free == engine.pool.num_blocks


class AdaptersAtDepth2(AdapterMachine):
    depth = 2
    seen: ClassVar[Counter[str]] = Counter()


class AdaptersAtDepth4(AdapterMachine):
    depth = 4
    seen: ClassVar[Counter[str]] = Counter()


MACHINES = [AdapterMachine, AdaptersAtDepth2, AdaptersAtDepth4]


@pytest.mark.parametrize("machine", MACHINES)
def test_every_request_is_computed_with_its_own_adapter(machine: type[AdapterMachine]) -> None:
    run_state_machine_as_test(machine, settings=QUIET)


def walk(machine: AdapterMachine, seed: int) -> None:
    """The same rules at random, evenly: hypothesis looks for small examples, this for crowded ones."""
    random = Random(seed)

    def draw(options: dict[str, list[Any]]) -> dict[str, Any]:
        return {name: random.choice(values) for name, values in options.items()}

    machine.build(draw(ENGINES))
    for _ in range(60):
        kind, name = random.random(), random.choice(NAMES)
        if kind < 0.3:
            machine.add(draw(REQUESTS))
        elif kind < 0.6:
            machine.run(random.randint(1, 4))
        elif kind < 0.8:
            machine.engine.loader.finish()
        elif kind < 0.85:
            machine.load(name, random.random() < 0.5)
        elif kind < 0.88:
            machine.unload(name, random.random() < 0.5)
        elif kind < 0.92:
            machine.edit(name)
        elif kind < 0.94:
            machine.remove_files(name)
        elif kind < 0.97:
            machine.pin(name, random.random() < 0.6)
        elif machine.engine.alive:
            machine.abort(random.randrange(1000))
        machine.check()
    machine.teardown()


def walk_often(machine: type[AdapterMachine], num_walks: int = 100) -> None:
    for seed in range(num_walks):
        walk(machine(), seed)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_crowd_is_computed_with_the_adapters_each_is_bound_to(machine: type[AdapterMachine]) -> None:
    machine.seen.clear()
    walk_often(machine)
    expected = {"replaced", "read", "evicted", "pinned", "length", "error", "abort"}
    assert all(machine.seen[event] >= 20 for event in expected), f"the walks no longer meet everything: {machine.seen}"


# ------------------------------------------------------------------------------------------------ planted faults


class NeverDrops(AdapterStore):
    """What is unloaded stays in the host's memory."""

    def _release(self, adapter: Adapter) -> None:
        drop, self._drop = self._drop, lambda adapter_id: None
        super()._release(adapter)
        self._drop = drop


class ForgetsPlacement(AdapterStore):
    """An adapter that was evicted and read again is thought to be where it was."""

    def _displace(self, tenant: Adapter | None) -> None:
        position = None if tenant is None else tenant.position
        super()._displace(tenant)
        if tenant is not None and position is not None:
            tenant.position = position


class ReplacesAtOnce(AdapterStore):
    """A version that is read takes the requests of the one before it along."""

    def _take_name(self, adapter: Adapter) -> None:
        replaced = self._by_name.get(adapter.name)
        super()._take_name(adapter)
        if replaced is not None and replaced.in_memory and replaced is not adapter and replaced.position is not None:
            self._positions[replaced.position] = adapter
            adapter.position, replaced.position = replaced.position, None


class EvictsWhatRuns(AdapterStore):
    """The least recently used is evicted, whoever runs with it."""

    def _make_room(self) -> bool:
        counts = {adapter_id: adapter.num_started for adapter_id, adapter in self._in_memory.items()}
        for adapter in self._in_memory.values():
            adapter.num_started = 0
        made = super()._make_room()
        for adapter_id, count in counts.items():
            self._versions[adapter_id].num_started = count
        return made


STORES = [NeverDrops, ForgetsPlacement, ReplacesAtOnce, EvictsWhatRuns]


@pytest.mark.parametrize("store_class", STORES)
def test_the_machine_catches_a_planted_fault(store_class: type[AdapterStore]) -> None:
    machine = type(store_class.__name__, (AdapterMachine,), {"store_class": store_class, "seen": Counter()})
    with pytest.raises((AssertionError, KeyError, EngineDeadError)):
        walk_often(machine)


def no_adapter(pool: BlockPool, request: Request) -> None:
    """Requests of different adapters share blocks."""
    adapter, request.adapter = request.adapter, None
    EXTEND_HASHES(pool, request)
    request.adapter = adapter


def only_by_name(cache_salt: bytes, content_hash: str) -> bytes:
    """Versions of one name share blocks."""
    return ADAPTER_ROOT(cache_salt, content_hash[0])


EXTEND_HASHES, ADAPTER_ROOT = prefix_cache._extend_hashes, prefix_cache._adapter_root

FAULTS = [
    (prefix_cache, "_extend_hashes", no_adapter),
    (prefix_cache, "_adapter_root", only_by_name),
    (adapters_module, "_is_free", lambda tenant: tenant is None or not tenant.pinned),
    (adapters_module, "_is_free", lambda tenant: tenant is None or not tenant.num_running),
]


@pytest.mark.parametrize(
    ("module", "name", "fault"), FAULTS, ids=["no adapter", "by name", "displaces", "moves pinned"]
)
def test_the_machine_catches_a_fault_of_a_part(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, fault: Any
) -> None:
    monkeypatch.setattr(module, name, fault)
    machine = type("Faulty", (AdapterMachine,), {"seen": Counter()})
    with pytest.raises((AssertionError, EngineDeadError)):
        walk_often(machine, 300)
