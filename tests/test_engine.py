"""The engine: steps submitted and collected in order, and a failure that is said for ever after."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from octavo.builtin.fcfs import FCFSPolicy
from octavo.engine.block_pool import BlockPool
from octavo.engine.engine import Engine
from octavo.engine.scheduler import Scheduler
from octavo.errors import EngineDeadError, RequestError
from octavo.interfaces import Executor, ExecutorReport, Manifest, Step, StepOutput
from octavo.request import Request
from octavo.sampling_params import SamplingParams


class Recorder(Executor):
    """Every sample of step n is token n. Remembers what it was asked, and fails where it is told to."""

    def __init__(self, fails_at: str | None = None) -> None:
        self.calls: list[str] = []
        self._fails_at = fails_at

    def start(self, manifest: Manifest, on_failure: Callable[[BaseException], None]) -> ExecutorReport:
        raise NotImplementedError

    def submit(self, step: Step) -> object:
        self._note(f"submit {step.step_id}")
        return step

    def collect(self, handle: object) -> StepOutput:
        assert isinstance(handle, Step)
        self._note(f"collect {handle.step_id}")
        return StepOutput(
            step_id=handle.step_id,
            token_ids={row.request_id: [handle.step_id] for row in handle.rows if row.samples},
        )

    def check(self) -> None:
        return None

    def stop(self) -> None:
        self.calls.append("stop")

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call == self._fails_at:
            raise ZeroDivisionError("of all things")


def engine(executor: Executor, *, max_steps_in_flight: int = 1) -> Engine:
    scheduler = Scheduler(
        policy=FCFSPolicy(), block_pool=BlockPool(8, block_size=4), max_num_seqs=4, max_num_batched_tokens=16
    )
    return Engine(scheduler, executor, max_steps_in_flight)


def request(request_id: str = "a", max_tokens: int = 3) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=[1, 2],
        params=SamplingParams(),
        max_total_tokens=2 + max_tokens,
        arrival_time=0.0,
    )


def test_a_request_gets_one_token_a_step_until_it_ends() -> None:
    running = engine(Recorder())
    running.add(request(max_tokens=3))
    outputs = []
    while running.has_unfinished:
        outputs += running.step()
    assert [(output.request_id, output.new_token_ids, output.finish_reason) for output in outputs] == [
        ("a", [0], None),
        ("a", [1], None),
        ("a", [2], "length"),
    ]


def test_a_step_with_nothing_to_do_gives_nothing() -> None:
    executor = Recorder()
    assert engine(executor).step() == []
    assert executor.calls == []


def test_two_steps_in_flight_are_submitted_before_the_first_is_collected() -> None:
    executor = Recorder()
    running = engine(executor, max_steps_in_flight=2)
    running.add(request(max_tokens=3))
    while running.has_unfinished:
        running.step()
    assert executor.calls == ["submit 0", "submit 1", "collect 0", "submit 2", "collect 1", "collect 2"]


def test_an_aborted_request_gives_no_more_and_its_step_in_flight_is_still_collected() -> None:
    executor = Recorder()
    running = engine(executor, max_steps_in_flight=2)
    running.add(request(max_tokens=5))
    running.step()
    running.abort("a")
    assert running.has_unfinished  # a step is in flight
    assert [running.step() for _ in range(2)] == [[], []]
    assert not running.has_unfinished
    assert executor.calls == ["submit 0", "submit 1", "collect 0", "collect 1"]
    assert running.stats().kv_usage == 0


def test_aborting_an_unknown_request_is_no_error() -> None:
    engine(Recorder()).abort("nobody")


def test_listeners_hear_of_every_step_as_it_is_submitted() -> None:
    executor, heard = Recorder(), list[tuple[int, list[str]]]()
    running = engine(executor)
    running.step_listeners.append(lambda step: heard.append((step.step_id, list(executor.calls))))
    running.add(request(max_tokens=2))
    running.step()
    running.step()
    assert heard == [(0, []), (1, ["submit 0", "collect 0"])]


def test_stats_count_steps_and_tokens() -> None:
    running = engine(Recorder())
    running.add(request("a", max_tokens=2))
    running.add(request("b", max_tokens=3))
    running.step()
    now = running.stats()
    assert (now.num_running, now.num_waiting, now.num_steps, now.num_output_tokens) == (2, 0, 1, 2)
    assert (now.num_blocks, now.block_size, now.kv_usage) == (8, 4, 2 / 8)
    while running.has_unfinished:
        running.step()
    then = running.stats()
    assert (then.num_running, then.num_steps, then.num_output_tokens, then.kv_usage) == (0, 3, 5, 0)
    assert then.kv_usage_peak >= now.kv_usage
    assert then.busy_seconds > now.busy_seconds > 0


@pytest.mark.parametrize("fails_at", ["submit 1", "collect 1"])
def test_a_failure_in_a_step_ends_the_engine_with_its_cause(fails_at: str) -> None:
    running = engine(Recorder(fails_at=fails_at))
    running.add(request())
    running.step()
    with pytest.raises(EngineDeadError, match="stopped in a step: ZeroDivisionError: of all things") as caught:
        running.step()
    cause = caught.value.__cause__
    assert isinstance(cause, ZeroDivisionError)
    for call in (running.step, lambda: running.add(request("b"))):
        with pytest.raises(EngineDeadError, match="of all things") as caught:
            call()
        assert caught.value.__cause__ is cause


def test_a_step_that_is_interrupted_ends_the_engine_too() -> None:
    def interrupt(step: Step) -> None:
        raise KeyboardInterrupt

    running = engine(Recorder())
    running.add(request())
    running.step_listeners.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        running.step()
    with pytest.raises(EngineDeadError, match="takes no more requests: KeyboardInterrupt"):
        running.step()


def test_stopping_frees_the_executor_and_ends_the_engine() -> None:
    executor = Recorder()
    running = engine(executor)
    running.stop()
    running.stop()
    assert set(executor.calls) == {"stop"}
    with pytest.raises(EngineDeadError, match="it was shut down"):
        running.add(request())


def test_the_first_failure_is_the_one_that_is_told() -> None:
    running = engine(Recorder(fails_at="submit 0"))
    running.add(request())
    with pytest.raises(EngineDeadError):
        running.step()
    running.stop()
    with pytest.raises(EngineDeadError, match="of all things"):
        running.step()


def test_a_request_that_can_never_be_served_does_not_end_the_engine() -> None:
    running = engine(Recorder())
    with pytest.raises(RequestError):
        running.add(request(max_tokens=1000))
    running.add(request())
    assert running.step()
