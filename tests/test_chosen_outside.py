"""Requests whose tokens are chosen outside, forked and extended at random: the right keys, and always a next step."""

from __future__ import annotations

from collections import Counter, deque
from random import Random

import pytest

from octavo.builtin.fcfs import FCFSPolicy
from octavo.engine.block_pool import BlockPool
from octavo.engine.scheduler import Scheduler
from octavo.interfaces.executor import Step, StepOutput
from octavo.request import Request
from octavo.sampling_params import SamplingParams
from octavo.testing.scheduling_simulation import VOCABULARY, FakeExecutor

MAX_STEPS = 2000


class Search:
    """Like a beam search whose probabilities are dice: after each round some requests go on, some fork, some die."""

    def __init__(self, name: str, random: Random, width: int, num_rounds: int, num_prompt_tokens: int) -> None:
        self.name, self.random, self.width, self.num_rounds = name, random, width, num_rounds
        self.max_total_tokens = num_prompt_tokens + num_rounds
        self.prompt = [random.randrange(VOCABULARY) for _ in range(num_prompt_tokens)]
        self.live = {f"{name}-0": self.request(f"{name}-0", [])}
        self.answered: set[str] = set()
        self.num_requests = 1

    def request(self, request_id: str, output_token_ids: list[int]) -> Request:
        return Request(
            request_id=request_id,
            prompt_token_ids=self.prompt,
            params=SamplingParams(),
            max_total_tokens=self.max_total_tokens,
            chosen_outside=True,
            output_token_ids=output_token_ids,
        )

    def choose(self, engine: Walk) -> None:
        """All have been computed: whose tokens go on, and with what."""
        self.answered.clear()
        self.num_rounds -= 1
        parents = [self.random.choice(list(self.live)) for _ in range(self.width)] if self.num_rounds else []
        for request_id in set(self.live) - set(parents):
            engine.scheduler.abort(request_id)
            del self.live[request_id]
        going_on = list(dict.fromkeys(parents))
        for origin_id in (Counter(parents) - Counter(going_on)).elements():
            fork = self.request(f"{self.name}-{self.num_requests}", list(self.live[origin_id].output_token_ids))
            self.num_requests += 1
            engine.executor.salts[fork.request_id] = b""
            engine.scheduler.fork(origin_id, fork)
            self.live[fork.request_id] = fork
        for request_id in self.live:
            engine.scheduler.extend(request_id, self.random.randrange(VOCABULARY))


class Walk:
    """Some searches on one random engine, whose executor checks every key that is read."""

    def __init__(self, seed: int, scheduler_class: type[Scheduler] = Scheduler) -> None:
        random = Random(seed)
        block_size = random.choice([1, 2, 4])
        self.pool = BlockPool(random.choice([16, 24, 40]) // block_size, block_size, random.random() < 0.5)
        self.scheduler = scheduler_class(
            policy=FCFSPolicy(),
            block_pool=self.pool,
            max_num_seqs=random.choice([3, 4, 8]),
            max_num_batched_tokens=random.choice([2, 5, 64]),
        )
        self.executor = FakeExecutor(self.pool.num_blocks, block_size)
        self.depth = random.choice([1, 2, 3])
        self.in_flight: deque[tuple[Step, StepOutput]] = deque()
        self.searches = [
            Search(str(number), random, random.randint(1, 3), random.randint(2, 7), random.randint(1, 9))
            for number in range(random.randint(1, 3))
        ]

    def run(self) -> None:
        for search in self.searches:
            for request_id, request in search.live.items():
                self.executor.salts[request_id] = b""
                self.scheduler.add(request)
        for _ in range(MAX_STEPS):
            while len(self.in_flight) < self.depth and (step := self.scheduler.schedule()) is not None:
                self.submit(step)
            if not self.scheduler.has_unfinished and not self.in_flight:
                break
            assert self.in_flight, "nothing to do, nothing on its way, yet requests are unfinished"
            for update in self.scheduler.apply(*self.in_flight.popleft()):
                self.answer(update.request)
        assert not self.scheduler.has_unfinished
        assert self.pool.num_free == self.pool.num_blocks
        assert 0 <= self.scheduler.kv_waste < 1

    def submit(self, step: Step) -> None:
        live = {request_id: request for search in self.searches for request_id, request in search.live.items()}
        output = self.executor.submit(step)
        for row in step.rows:
            known = self.executor.rows[row.request_id].token_ids[: row.num_computed_tokens + row.num_tokens]
            assert known == live[row.request_id].all_token_ids()[: len(known)], "the runner has other tokens"
            assert self.executor.rows[row.request_id].block_table == live[row.request_id].block_ids
        self.in_flight.append((step, output))

    def answer(self, request: Request) -> None:
        (search,) = (search for search in self.searches if request.request_id in search.live)
        assert request.request_id not in search.answered, "it was computed twice for one choice"
        search.answered.add(request.request_id)
        if len(search.answered) == len(search.live):
            search.choose(self)


def walk_often(scheduler_class: type[Scheduler] = Scheduler) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in range(400):
        walk = Walk(seed, scheduler_class)
        walk.run()
        seen["preempted"] += walk.scheduler.num_preemptions
        seen["forked"] += sum(search.num_requests - 1 for search in walk.searches)
        seen["undisturbed"] += not walk.scheduler.num_preemptions
    return seen


def test_every_request_reads_its_own_keys_and_every_search_comes_to_its_end() -> None:
    seen = walk_often()
    assert all(seen[event] >= 100 for event in ("preempted", "forked", "undisturbed")), seen


class NobodyGivesWay(Scheduler):
    """Who waits for a choice keeps its blocks, also from those the choice waits for."""

    def _preempt_idle(self, plan: object) -> bool:
        return False


class ComputesAgainAtOnce(Scheduler):
    """Who is preempted while it waits for a choice is queued before it has one."""

    def _preempt(self, victim: Request, plan: object) -> None:
        super()._preempt(victim, plan)  # type: ignore[arg-type]
        self._waiting.put(victim)


class GoesOnWithItsOwnSample(Scheduler):
    """A later step takes the runner's sample before another token is chosen."""

    def _add_row(self, request: Request, *arguments: object, **more: object) -> object:  # type: ignore[override]
        row = super()._add_row(request, *arguments, **more)  # type: ignore[arg-type]
        request.num_placeholder_tokens += row.samples
        return row


@pytest.mark.parametrize("fault", [NobodyGivesWay, ComputesAgainAtOnce, GoesOnWithItsOwnSample])
def test_the_walks_catch_a_planted_fault(fault: type[Scheduler]) -> None:
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError)):
        walk_often(fault)
