"""SchedulerSuite: what every scheduler policy must do, with the real scheduler and a fake model around it.

    class TestMine(SchedulerSuite):
        component = "my-plugin/mine"
        starvation_free = True  # if it promises that everybody is served in the end

The scheduler sees to blocks and budgets whatever a policy says, and the simulation checks that it does. A policy can
still raise, change what it should only read, answer differently each time, hoard, or make requests wait for ever.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from octavo.interfaces.scheduling import SchedulerPolicy
from octavo.request import Request
from octavo.testing.scheduling_policy import CheckedPolicy, num_entries_kept, request_fields
from octavo.testing.scheduling_simulation import VOCABULARY, Simulation, simulated_request
from octavo.testing.suite import Suite

TENANTS = (None, "a", "b", "c")
PRIORITIES = (0, 0, 1, 2, 9, -1)
ENGINES: dict[str, Sequence[Any]] = {
    "num_blocks": (6, 4, 8, 40),
    "max_num_seqs": (4, 2, 8),
    "max_num_batched_tokens": (8, 4, 32),
    "enable_prefix_caching": (True, False),
}
REQUESTS: dict[str, Sequence[Any]] = {
    "num_prompt_tokens": (4, 1, 7, 12, 2),
    "max_tokens": (6, 1, 3, 12),
    "eos_token_ids": (frozenset(), frozenset({VOCABULARY - 1})),
    "priority": PRIORITIES,
    "tenant": TENANTS,
    "delay": (0.0, 1.0, -3.0),
}
SMALL = settings(
    max_examples=20,
    stateful_step_count=30,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
NUM_CROWDS = 40
CROWDED = 6
"""KV blocks of four tokens, for up to four requests of up to six blocks."""
MAX_CPU_SECONDS = 10.0
MAX_STEPS_WAITING = 1000


class SchedulerSuite(Suite):
    """A test class sets `component`, `options` and what follows.

    Attributes:
        starvation_free: whether each request is served however many others keep coming, of finitely many tenants and
            priorities; checked by 10,000 seconds of arrivals at twice what the engine can do.
    """

    kind = "scheduler"
    starvation_free: ClassVar[bool] = False

    def make(self) -> SchedulerPolicy:
        """A new policy, as the engine makes it."""
        policy = self.build()
        assert isinstance(policy, SchedulerPolicy), f"the spec's target makes {policy!r}, which is no SchedulerPolicy"
        return policy

    # ---------------------------------------------------------------------------------------------- each answer

    def test_keys_of_all_kinds_of_requests_have_an_order(self) -> None:
        policy = self.make()
        requests = [
            simulated_request(f"{priority} {tenant} {length}", [0] * length, 3, priority=priority, tenant=tenant)
            for priority in (-(2**31), -1, 0, 3, 2**31 - 1)
            for tenant in TENANTS
            for length in (1, 30)
        ]
        keys = [policy.key(request, 5.0) for request in requests]
        for one in keys:
            for other in keys:
                assert (one < other) + (other < one) + (one == other) == 1, f"{one!r} and {other!r} have no order"

    def test_a_key_depends_on_when_it_is_asked_for_only_if_the_policy_is_dynamic(self) -> None:
        policy = self.make()
        requests = [simulated_request(f"r{number}", [0], 3, arrival_time=number) for number in range(3)]
        keys = [policy.key(request, 5.0) for request in requests]
        assert policy.dynamic or [policy.key(request, 500.0) for request in requests] == keys, "set dynamic = True"

    def test_a_request_is_left_as_it_was(self) -> None:
        policy = self.make()
        request = simulated_request("r", [0] * 4, 3, tenant="a", priority=2)
        before = request_fields(request)
        policy.key(request, 0.0)
        assert policy.victim([request]) is request
        policy.served(request, 4, 1)
        policy.ended(request)
        assert request_fields(request) == before

    # ---------------------------------------------------------------------------------------------- in traffic

    @pytest.mark.parametrize("depth", [1, 2, 4])
    def test_every_request_gets_its_own_tokens_in_any_traffic(self, depth: int) -> None:
        run_state_machine_as_test(lambda: _Machine(self.make(), depth), settings=SMALL)  # type: ignore[arg-type]

    @pytest.mark.parametrize("depth", [1, 2, 4])
    def test_every_request_gets_its_own_tokens_in_a_crowd(self, depth: int) -> None:
        seen = Counter[str]()
        for seed in range(NUM_CROWDS):
            simulation = Simulation(CheckedPolicy(self.make()), num_blocks=CROWDED, depth=depth, seen=seen)
            _send_crowd(simulation, Random(seed))
            simulation.drain()
        assert seen["preempted"] >= NUM_CROWDS, "these crowds are meant to be short of memory"

    def test_equal_traffic_is_served_equally(self) -> None:
        lives = []
        for _ in range(2):
            simulation = Simulation(self.make(), num_blocks=CROWDED, depth=2)
            for seed in range(5):
                _send_crowd(simulation, Random(seed), prefix=f"{seed} ")
            simulation.drain()
            lives.append([(r.request_id, r.first_scheduled_time, r.epoch) for r in simulation.finished.values()])
        assert lives[0] == lives[1], "the policy answers differently when it is asked the same"

    def test_nothing_is_kept_of_requests_that_ended(self) -> None:
        policy = self.make()
        simulation = Simulation(policy, num_blocks=CROWDED)
        kept = []
        for turn in range(5):
            for seed in range(5):
                _send_crowd(simulation, Random(seed), prefix=f"{turn} {seed} ")
            simulation.drain()
            kept.append(num_entries_kept(policy))
        num_requests = len(simulation.finished) * 3 // 5
        assert kept[4] - kept[1] < num_requests // 2, f"{num_requests} requests later it holds more: {kept} entries"

    def test_a_thousand_requests_at_once_are_no_burden(self) -> None:
        simulation = Simulation(self.make(), num_blocks=1000, max_num_seqs=64, max_num_batched_tokens=256)
        random = Random(0)
        start = time.process_time()
        for number in range(1000):
            simulation.add(_request(simulation, f"r{number}", _draw(random, num_prompt_tokens=4, max_tokens=4)))
        simulation.drain()
        seconds = time.process_time() - start
        assert seconds < MAX_CPU_SECONDS, f"1000 small requests took {seconds:.1f} s of CPU time"

    def test_nobody_waits_for_ever_while_others_keep_coming(self) -> None:
        if not self.starvation_free:
            return
        random = Random(0)
        simulation = Simulation(self.make(), num_blocks=40, max_num_seqs=2, seconds_per_step=10.0)
        small: dict[str, Any] = {"num_prompt_tokens": 4, "max_tokens": 2, "eos_token_ids": frozenset(), "delay": 0.0}
        for number in range(MAX_STEPS_WAITING):
            if number == 20:
                for tenant in TENANTS:
                    patient = _draw(random, **small, tenant=tenant, priority=max(PRIORITIES))
                    simulation.add(_request(simulation, f"patient {tenant}", patient))
            for each in range(2):
                simulation.add(_request(simulation, f"{number} {each}", _draw(random, **small)))
            simulation.step()
        waiting = [request_id for request_id in simulation.alive if request_id.startswith("patient")]
        assert waiting == [], f"{simulation.now:.0f} s after they arrived these have not ended"


class _Machine(RuleBasedStateMachine):
    """Random requests, steps and aborts; hypothesis looks for the smallest traffic that shows a fault."""

    def __init__(self, policy: SchedulerPolicy, depth: int) -> None:
        super().__init__()
        self.policy = CheckedPolicy(policy)
        self.depth = depth
        self.simulation: Simulation | None = None
        self.num_requests = 0

    @initialize(engine=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in ENGINES.items()}))
    def start(self, engine: dict[str, Any]) -> None:
        """An empty engine."""
        self.simulation = Simulation(self.policy, depth=self.depth, **engine)
        assert self.simulation.submit() is None

    @rule(options=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in REQUESTS.items()}))
    def add(self, options: dict[str, Any]) -> None:
        """One more request."""
        assert self.simulation is not None
        self.simulation.add(_request(self.simulation, f"r{self.num_requests}", options))
        self.num_requests += 1

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps: int) -> None:
        """Steps, with as many in flight as may be."""
        assert self.simulation is not None
        for _ in range(num_steps):
            self.simulation.step()

    @precondition(lambda self: self.simulation and self.simulation.alive)
    @rule(pick=st.integers(0, 99))
    def abort(self, pick: int) -> None:
        """One of those alive ends now."""
        assert self.simulation is not None
        self.simulation.abort(sorted(self.simulation.alive)[pick % len(self.simulation.alive)])

    def teardown(self) -> None:
        """The rest ends too."""
        if self.simulation is not None:
            self.simulation.drain()


def _draw(random: Random, **chosen: Any) -> dict[str, Any]:
    return {name: random.choice(values) for name, values in REQUESTS.items()} | chosen


def _request(simulation: Simulation, request_id: str, options: dict[str, Any]) -> Request:
    """One of four prompts of that length, so that some are found in the prefix cache."""
    options = dict(options)
    length, delay = options.pop("num_prompt_tokens"), options.pop("delay")
    prompt = [len(request_id) % 4] + [1] * (length - 1)
    return simulated_request(
        request_id,
        prompt,
        options.pop("max_tokens"),
        simulation.capacity,
        arrival_time=simulation.now + delay,
        **options,
    )


def _send_crowd(simulation: Simulation, random: Random, prefix: str = "") -> None:
    """Requests, steps and aborts at random, more requests than the engine can take at once."""
    for number in range(60):
        kind = random.random()
        if kind < 0.4:
            simulation.add(_request(simulation, f"{prefix}{number}", _draw(random)))
        elif kind < 0.9:
            simulation.step()
        elif simulation.alive:
            simulation.abort(random.choice(sorted(simulation.alive)))
