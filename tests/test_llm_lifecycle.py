"""LLM while it runs: streams, exceptions, Ctrl-C and its end; it is ready again, or says that it is not."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_llama

from octavo import LLM, RequestOutput, SamplingParams
from octavo.errors import EngineDeadError
from octavo.interfaces import Step

PROMPT = "hello world"
SETTINGS: dict[str, Any] = {"dtype": "float32", "block_size": 8, "max_num_seqs": 4}


def greedy(max_tokens: int | None = 12, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **fields)


def is_idle(llm: LLM) -> bool:
    stats = llm.stats()
    return (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0)


def tokens(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def answer(folder: Path) -> RequestOutput:
    """12 greedy tokens after PROMPT."""
    with LLM(str(folder), **SETTINGS) as llm:
        return llm.generate(PROMPT, greedy())[0]


def test_nothing_is_left_in_flight_when_the_answers_are_there(folder: Path) -> None:
    with LLM(str(folder), max_steps_in_flight=2, **SETTINGS) as llm:
        first = tokens(llm.generate(PROMPT, greedy())[0])[0]
        llm.generate(PROMPT, greedy(stop_token_ids=[first]))  # known to be the end when the next step is on its way
        assert is_idle(llm)


# --------------------------------------------------------------------------------------------------- streaming


def test_a_stream_grows_to_what_generate_gives(llm: LLM, answer: RequestOutput) -> None:
    texts = [output.outputs[0].text for output in llm.stream(PROMPT, greedy())]
    assert len(texts) == 12
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert texts[-1] == answer.outputs[0].text


def test_leaving_a_stream_aborts_its_request(llm: LLM) -> None:
    for output in llm.stream(PROMPT, greedy(40, n=2)):
        if len(tokens(output)) == 3:
            break
    assert is_idle(llm)
    assert [completion.finish_reason for completion in output.outputs] == ["abort", "abort"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_exception_while_streaming_leaves_the_engine_ready(
    llm: LLM, answer: RequestOutput, error: type[BaseException]
) -> None:
    def read() -> None:
        for _ in llm.stream(PROMPT, greedy(40)):
            raise error

    with pytest.raises(error):
        read()
    assert is_idle(llm)
    assert tokens(llm.generate(PROMPT, greedy())[0]) == tokens(answer)


def test_streams_read_in_turns_each_get_all_of_their_own(llm: LLM) -> None:
    prompts, params = ["abc", "xyz"], [greedy(5), greedy(9)]
    wanted = [output.outputs[0].text for output in llm.generate(prompts, params)]
    streams = [llm.stream(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    last, num_yields = ["", ""], [0, 0]
    open_streams = [0, 1]
    while open_streams:
        for index in list(open_streams):
            output = next(streams[index], None)
            if output is None:
                open_streams.remove(index)
                assert last[index] == wanted[index]
            else:
                last[index] = output.outputs[0].text
                num_yields[index] += 1
    assert num_yields[0] <= 5
    assert num_yields[1] <= 9


def test_a_stream_that_ends_while_generate_runs_still_shows_its_end(llm: LLM, answer: RequestOutput) -> None:
    stream = llm.stream(PROMPT, greedy(5))
    shown = [next(stream).outputs[0].text]
    llm.generate("another", greedy(30))
    shown += [output.outputs[0].text for output in stream]
    assert shown[-1] == answer.outputs[0].text[:5]


# ---------------------------------------------------------------------------------------- interrupts and the end


def test_ctrl_c_inside_a_step_waits_for_its_end_and_leaves_the_engine_ready(llm: LLM, answer: RequestOutput) -> None:
    def press(step: Step) -> None:
        if len(pressed) < 1:
            pressed.append(step.step_id)
            os.kill(os.getpid(), signal.SIGINT)

    pressed: list[int] = []
    llm.engine.step_listeners.append(press)
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate([PROMPT, "abc"], greedy(40))
    finally:
        llm.engine.step_listeners.remove(press)
    assert is_idle(llm)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert tokens(llm.generate(PROMPT, greedy())[0]) == tokens(answer)


def test_the_second_ctrl_c_cuts_a_step_short_and_the_engine_says_so(llm: LLM) -> None:
    def press_twice(step: Step) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    llm.engine.step_listeners.append(press_twice)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPT)
    with pytest.raises(EngineDeadError) as caught:
        llm.generate(PROMPT)
    assert isinstance(caught.value.__cause__, KeyboardInterrupt)


def test_a_handler_of_the_users_own_is_left_alone(llm: LLM) -> None:
    def press(step: Step) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    llm.engine.step_listeners.append(press)
    try:
        llm.generate(PROMPT, greedy(3))
    finally:
        llm.engine.step_listeners.remove(press)
        signal.signal(signal.SIGINT, before)
    assert pressed == [signal.SIGINT] * 3


def test_a_failing_step_ends_the_engine_with_its_cause(llm: LLM) -> None:
    def fail(step: Step) -> None:
        raise ZeroDivisionError("of all things")

    llm.generate(PROMPT, greedy())
    llm.engine.step_listeners.append(fail)
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="of all things") as caught:
            llm.generate([PROMPT, "abc"])
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_after_shutdown_the_engine_takes_no_prompts(llm: LLM) -> None:
    with llm:
        llm.generate(PROMPT, greedy())
    llm.shutdown()
    with pytest.raises(EngineDeadError, match="it was shut down"):
        llm.generate(PROMPT)


def test_start_report_says_what_was_taken_and_how_long_each_phase_was(folder: Path) -> None:
    with LLM(str(folder), **SETTINGS) as llm:
        report = llm.start_report
        assert report.num_blocks == llm.stats().num_blocks
        assert report.weight_bytes > 0
        assert [name for name, _ in report.phases] == ["build model", "load weights", "allocate KV cache"]
