"""An engine with a fake model whose answers depend on the adapter at each row's position, and files that change."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import replace
from typing import Any

from octavo.builtin.fcfs import FCFSPolicy
from octavo.engine.adapter_loader import AdapterLoader
from octavo.engine.adapters import AdapterStore
from octavo.engine.block_pool import BlockPool
from octavo.engine.engine import Engine, EngineOutput
from octavo.engine.scheduler import Scheduler
from octavo.errors import AdapterError
from octavo.interfaces.executor import NewRow, Step, StepOutput
from octavo.lora.adapter import Adapter, AdapterInfo
from octavo.request import Request
from octavo.testing.scheduling_simulation import FakeExecutor, simulated_request, tokens_alone


class AdapterExecutor(FakeExecutor):
    """Keeps adapters as their content, and knows at compute time what every row's request is to be computed with.

    A row's keys and values, and so its samples, depend on the content at its position when it entered.

    Attributes:
        files: content by path; a path that is not here cannot be read.
        loaded: content by adapter id: the host's memory.
        positions: adapter id and content of each device position.
        bound: by request id, the adapter id and content it started with.
    """

    def __init__(self, num_blocks: int, block_size: int, max_loras: int, max_cpu_loras: int) -> None:
        super().__init__(num_blocks, block_size)
        self.files: dict[str, str] = {}
        self.loaded: dict[int, str] = {}
        self.positions: list[tuple[int, str] | None] = [None] * max_loras
        self.max_cpu_loras = max_cpu_loras
        self.requests: dict[str, Request] = {}
        self.bound: dict[str, tuple[int, str]] = {}
        self.row_positions: dict[str, int] = {}
        self.steps: list[Step] = []

    def load_adapter(self, adapter_id: int, path: str) -> AdapterInfo:
        if path not in self.files:
            raise AdapterError(f"{path} cannot be read.")
        assert adapter_id not in self.loaded
        self.loaded[adapter_id] = self.files[path]
        assert len(self.loaded) <= self.max_cpu_loras
        return AdapterInfo(content_hash=self.files[path], rank=8, num_bytes=100, modules=("q_proj",))

    def drop_adapter(self, adapter_id: int) -> None:
        del self.loaded[adapter_id]

    def submit(self, step: Step) -> StepOutput:
        self.steps.append(step)
        for request_id in step.leaving:
            self.row_positions.pop(request_id, None)
        taken = set(self.row_positions.values())
        for placement in step.placements:
            assert placement.position not in taken, "a running request's adapter was displaced"
            self.positions[placement.position] = (placement.adapter_id, self.loaded[placement.adapter_id])
        for new_row in step.entering:
            self._enter(new_row, self.requests[new_row.request_id])
        for row in step.rows:
            if row.request_id in self.row_positions:
                there = self.positions[self.row_positions[row.request_id]]
                assert there == self.bound[row.request_id], "computed with another adapter"
                assert there[0] in self.loaded, "evicted while it runs"
        return super().submit(step)

    def _enter(self, new_row: NewRow, request: Request) -> None:
        self.salts[request.request_id] = request.cache_salt
        if request.adapter is None:
            assert new_row.adapter_position is None
            return
        assert new_row.adapter_position is not None
        self.row_positions[request.request_id] = new_row.adapter_position
        there = self.positions[new_row.adapter_position]
        assert there is not None
        assert there[0] == request.adapter.adapter_id
        assert self.bound.setdefault(request.request_id, there) == there, "another content than it started with"
        self.salts[request.request_id] += b" with " + there[1].encode()

    def collect(self, output: StepOutput) -> StepOutput:
        return output

    def check(self) -> None:
        return None

    def stop(self) -> None:
        return None


class HandLoader(AdapterLoader):
    """Reads when it is told to: no thread, so a test says when a read ends."""

    def __init__(self, load: object) -> None:
        super().__init__(load)  # type: ignore[arg-type]
        self.job: Adapter | None = None
        self.result: AdapterInfo | AdapterError | None = None

    @property
    def has_ended(self) -> bool:
        return self.result is not None

    def read(self, adapter: Adapter) -> None:
        assert self.job is None
        self.job = adapter

    def finish(self) -> None:
        """Let the read end, if there is one."""
        if self.job is not None and self.result is None:
            try:
                self.result = self._load(self.job.adapter_id, self.job.path)
            except AdapterError as error:
                self.result = error

    def wait(self, timeout: float) -> None:
        return None

    def take(self) -> AdapterInfo | AdapterError:
        result, self.result, self.job = self.result, None, None
        assert result is not None
        return result


class SimulatedEngine:
    """An engine over `AdapterExecutor`, whose answers are checked as they come.

    Attributes:
        alive: unfinished requests by id.
        reasons: why each ended that has.
    """

    def __init__(
        self,
        *,
        max_loras: int = 2,
        max_cpu_loras: int = 3,
        depth: int = 1,
        num_blocks: int = 40,
        block_size: int = 2,
        max_num_seqs: int = 4,
        budget: int = 16,
        store_class: type[AdapterStore] = AdapterStore,
    ) -> None:
        self.executor = AdapterExecutor(num_blocks, block_size, max_loras, max_cpu_loras)
        self.store = store_class(
            self.executor.load_adapter,
            self.executor.drop_adapter,
            max_loras=max_loras,
            max_cpu_loras=max_cpu_loras,
        )
        self.loader = self.store._loader = HandLoader(self.executor.load_adapter)
        self.pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(
            policy=FCFSPolicy(),
            block_pool=self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            adapters=self.store,
        )
        self.engine = Engine(self.scheduler, self.executor, depth)  # type: ignore[arg-type]
        self.alive: dict[str, Request] = {}
        self.reasons: dict[str, str] = {}
        self.seen: Counter[str] = Counter()
        self._arrivals = 0

    def load(self, *names: str) -> None:
        """Make adapters known and read them, one after the other."""
        for name in names:
            self.executor.files.setdefault(f"/{name}", f"{name}1")
            self.engine.load_adapter(name, f"/{name}")
            self.read()

    def read(self) -> None:
        """Let the read that goes on end, and take it in with a step."""
        self.loader.finish()
        self.step()

    def add(
        self,
        request_id: str,
        adapter: str | None = None,
        prompt: tuple[int, ...] = (1, 2, 3, 4, 5),
        max_tokens: int = 4,
        siblings: int = 0,
        **fields: Any,
    ) -> Request:
        """Queue a request, with siblings "<id>/1" and so on."""
        self._arrivals += 1
        first, *others = (
            simulated_request(
                f"{request_id}/{index}" if index else request_id,
                prompt,
                max_tokens,
                sample_index=index,
                arrival_time=float(self._arrivals),
                adapter=None if adapter is None else self.engine.adapter(adapter),
                **fields,
            )
            for index in range(siblings + 1)
        )
        first.siblings = others
        for member in (first, *others):
            self.alive[member.request_id] = member
            self.executor.requests[member.request_id] = member
            self.executor.bound.pop(member.request_id, None)
        self.engine.add(first)
        return first

    def abort(self, request_id: str) -> None:
        """End a request; nothing is told of it."""
        self.engine.abort(request_id)
        self._end(self.alive[request_id])

    def step(self) -> list[EngineOutput]:
        """A step of the engine; what has ended must have what it would have got alone."""
        outputs = self.engine.step()
        for output in outputs:
            if output.finish_reason is not None:
                request = self.alive[output.request_id]
                if output.finish_reason in ("error", "abort"):
                    assert isinstance(output.stop_reason, str)
                    assert output.new_token_ids == []
                else:
                    assert request.output_token_ids == self._alone(request)
                self._end(request)
        return outputs

    def finish(self, max_steps: int = 2000) -> int:
        """Step until no request is left, with a read that ends every third step; returns how many steps it took."""
        for number in range(max_steps):
            if not self.alive:
                return number
            if number % 3 == 0:
                self.loader.finish()
            self.step()
        raise AssertionError(f"these never end: {sorted(self.alive)}")

    def _alone(self, request: Request) -> list[int]:
        salt = self.executor.salts[request.request_id]
        return tokens_alone(replace(request, cache_salt=salt))[0]

    def _end(self, request: Request) -> None:
        if request.output_token_ids:
            assert request.output_token_ids == self._alone(request)[: len(request.output_token_ids)]
        assert request.finish_reason is not None
        self.reasons[request.request_id] = request.finish_reason
        self.seen[request.finish_reason] += 1
        del self.alive[request.request_id]


def running(engine: SimulatedEngine) -> deque[str]:
    """Ids of the requests that have a place in the batch, in the order they got it."""
    return deque(request.request_id for request in engine.scheduler._running)
