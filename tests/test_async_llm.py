"""AsyncLLM: many streams in one batch, each of which ends, whatever happens to the others or to the engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_model import BOS, VOCAB_SIZE, token_ids_of, write_tiny_llama

from octavo import LLM, AsyncLLM, RequestOutput, SamplingParams
from octavo.errors import EngineDeadError, RequestError
from octavo.interfaces import Step

SETTINGS: dict[str, Any] = {"dtype": "float32", "block_size": 8, "max_num_seqs": 4}
PROMPTS = ["hello world", "a", "some other prompt", "x" * 30, "yy", "zzz"]
SECONDS = 20.0  # a test that waits longer hangs


def greedy(max_tokens: int | None = 12, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **fields)


ENDLESS = greedy(None)  # some hundred steps, in tests that do not mean to wait for the last

MakeAsyncLLM = Callable[..., AsyncLLM]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"), max_position_embeddings=2048)


@pytest.fixture
def make_llm(folder: Path) -> Iterator[MakeAsyncLLM]:
    made = []

    def make(**settings: Any) -> AsyncLLM:
        made.append(AsyncLLM(str(folder), **{**SETTINGS, **settings}))
        return made[-1]

    yield make
    for llm in made:
        llm.shutdown()
        assert not llm._thread.is_alive()


@pytest.fixture
def llm(make_llm: MakeAsyncLLM) -> AsyncLLM:
    return make_llm()


async def last(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
    async with asyncio.timeout(SECONDS):
        return [output async for output in stream][-1]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.002)


async def is_idle(llm: AsyncLLM) -> None:
    """Wait until nothing runs and no block is held."""
    engine = llm._assembly.engine
    await until(lambda: not (llm.num_unfinished or engine.has_unfinished or engine.stats().kv_usage))


def fail(step: Step) -> None:
    raise ZeroDivisionError("of all things")


# ----------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
async def test_streams_side_by_side_give_what_llm_gives(
    folder: Path, make_llm: MakeAsyncLLM, max_steps_in_flight: int
) -> None:
    params = [greedy(3 + 5 * index) for index in range(len(PROMPTS))]
    with LLM(str(folder), **SETTINGS) as reference:
        wanted = [output.outputs for output in reference.generate(PROMPTS, params)]
    llm = make_llm(max_steps_in_flight=max_steps_in_flight)
    pairs = zip(PROMPTS, params, strict=True)
    outputs = await asyncio.gather(*(last(llm.generate(prompt, each)) for prompt, each in pairs))
    assert [output.outputs for output in outputs] == wanted
    assert [output.prompt for output in outputs] == PROMPTS
    await is_idle(llm)


async def test_a_stream_yields_snapshots_that_grow_and_finish(llm: AsyncLLM) -> None:
    outputs = [output async for output in llm.generate([BOS, *token_ids_of("hello world")], greedy(n=2))]
    lengths = [sum(len(completion.token_ids) for completion in output.outputs) for output in outputs]
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == 24
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert {completion.finish_reason for completion in outputs[-1].outputs} == {"length"}


async def test_a_stop_string_ends_a_stream(llm: AsyncLLM) -> None:
    text = (await last(llm.generate(PROMPTS[0], greedy()))).outputs[0].text
    output = await last(llm.generate(PROMPTS[0], greedy(stop=text[4:7])))
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == (text[:4], "stop")
    await is_idle(llm)


async def test_an_engine_that_waited_takes_new_prompts(llm: AsyncLLM) -> None:
    for _ in range(2):
        assert (await last(llm.generate("a", greedy(2)))).finished
        await is_idle(llm)


# ---------------------------------------------------------------------------------------------- ends before time


async def test_cancelling_a_task_aborts_its_request_and_no_other(llm: AsyncLLM) -> None:
    other = asyncio.create_task(last(llm.generate("other", greedy(200))))
    task = asyncio.create_task(last(llm.generate("hello", ENDLESS)))
    await until(lambda: llm._assembly.engine.scheduler.num_running == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len((await other).outputs[0].token_ids) == 200
    await is_idle(llm)


async def test_closing_a_stream_aborts_its_request(llm: AsyncLLM) -> None:
    stream = llm.generate("hello", ENDLESS)
    assert not (await anext(stream)).finished
    await stream.aclose()
    await is_idle(llm)


async def test_abort_ends_a_stream_with_all_it_has(llm: AsyncLLM) -> None:
    stream = llm.generate("hello", greedy(None, n=2), request_id="mine")
    before = await anext(stream)
    await llm.abort("mine")
    after = await last(stream)
    assert {completion.finish_reason for completion in after.outputs} == {"abort"}
    assert after.outputs[0].text.startswith(before.outputs[0].text)
    await is_idle(llm)


async def test_aborting_an_unknown_id_is_no_error(llm: AsyncLLM) -> None:
    await llm.abort("nobody")
    assert (await last(llm.generate("a", greedy(2)))).finished


# --------------------------------------------------------------------------------------------------- ids in use


@pytest.mark.parametrize(("first", "n", "second"), [("mine", 1, "mine"), ("mine", 2, "mine/0"), ("mine/1", 1, "mine")])
async def test_an_id_in_use_is_refused_and_its_holder_goes_on(llm: AsyncLLM, first: str, n: int, second: str) -> None:
    stream = llm.generate("hello", greedy(300, n=n), request_id=first)
    await anext(stream)
    with pytest.raises(RequestError, match=r"Request id '.*' is in use"):
        await last(llm.generate("other", greedy(5, n=2 if n == 1 else 1), request_id=second))
    assert len((await last(stream)).outputs[0].token_ids) == 300
    assert (await last(llm.generate("again", greedy(5), request_id=first))).finished


async def test_cancelling_a_refused_duplicate_leaves_the_holder_of_the_id_alone(llm: AsyncLLM) -> None:
    stream = llm.generate("hello", greedy(300), request_id="mine")
    await anext(stream)
    duplicate = asyncio.create_task(last(llm.generate("other", greedy(5), request_id="mine")))
    await asyncio.sleep(0)  # it has asked and not been answered
    duplicate.cancel()
    with pytest.raises(asyncio.CancelledError):
        await duplicate
    assert (await last(stream)).outputs[0].finish_reason == "length"


# ------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", greedy(), None),
        ([], greedy(), "The prompt is empty"),
        ([VOCAB_SIZE], greedy(), "Token ids must be in"),
        ([5] * 2048, greedy(), "max_model_len is 2048"),
        ({"text": "x"}, greedy(), "A prompt is a text"),
        (7, greedy(), "found int"),
        ("x", {"temperature": 0}, "found dict"),
        ("x", greedy(stop_token_ids=[10**6]), "stop_token_ids must be in"),
    ],
)
async def test_a_bad_prompt_is_refused_and_the_others_go_on(
    llm: AsyncLLM, prompt: Any, params: Any, message: str | None
) -> None:
    other = asyncio.create_task(last(llm.generate("other", greedy(50))))
    if message is None:  # only the token that begins every text
        assert (await last(llm.generate(prompt, params))).prompt_token_ids == [BOS]
    else:
        with pytest.raises(RequestError, match=message):
            await last(llm.generate(prompt, params))
    assert len((await other).outputs[0].token_ids) == 50
    await is_idle(llm)


async def test_any_fault_of_one_request_is_its_own(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise ZeroDivisionError("a fault in us")

    other = asyncio.create_task(last(llm.generate("other", greedy(50))))
    await until(lambda: llm.num_unfinished == 1)
    with monkeypatch.context() as patch:
        patch.setattr("octavo.output_processor.IncrementalDetokenizer", refuse)
        with pytest.raises(ZeroDivisionError, match="a fault in us"):
            await last(llm.generate("mine"))
    assert (await other).finished


# ---------------------------------------------------------------------------------------------- the engine's end


async def test_shutdown_ends_open_streams_and_refuses_new_ones(llm: AsyncLLM) -> None:
    tasks = [asyncio.create_task(last(llm.generate(prompt, ENDLESS))) for prompt in PROMPTS]
    await until(lambda: llm.num_unfinished == len(PROMPTS))
    llm.shutdown()
    llm.shutdown()
    assert llm.num_unfinished == 0
    for answer in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(answer, EngineDeadError)
        assert "it was shut down" in str(answer)
    with pytest.raises(EngineDeadError, match="it was shut down"):
        await last(llm.generate("late"))


async def test_a_failing_step_reaches_every_open_stream_with_its_cause(llm: AsyncLLM) -> None:
    tasks = [asyncio.create_task(last(llm.generate(prompt, ENDLESS))) for prompt in PROMPTS]
    await until(lambda: llm.num_unfinished == len(PROMPTS))
    llm._assembly.engine.step_listeners.append(fail)
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    with pytest.raises(EngineDeadError) as caught:
        await last(llm.generate("late"))
    for error in (*answers, caught.value):
        assert isinstance(error, EngineDeadError)
        assert "of all things" in str(error)
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ZeroDivisionError):
            cause = cause.__cause__
        assert cause is not None


async def test_a_prompt_that_comes_while_the_engine_ends_is_answered(llm: AsyncLLM) -> None:
    class SlowEvent(threading.Event):
        def set(self) -> None:
            ending.set()
            go_on.wait(SECONDS)
            super().set()

    ending, go_on, llm._ended = threading.Event(), threading.Event(), SlowEvent()
    llm._commands.put(llm._stop)
    await asyncio.to_thread(ending.wait, SECONDS)
    late = asyncio.create_task(last(llm.generate("late")))
    await asyncio.sleep(0)  # it is in the queue, behind the last command
    go_on.set()
    with pytest.raises(EngineDeadError, match="it was shut down"):
        await late


def test_streams_of_an_event_loop_that_is_gone_do_not_disturb_the_next(llm: AsyncLLM) -> None:
    async def leave_open() -> None:
        await anext(llm.generate("hello", ENDLESS))

    async def ask() -> RequestOutput:
        output = await last(llm.generate("a", greedy(20)))
        await is_idle(llm)
        return output

    asyncio.run(leave_open())
    assert len(asyncio.run(ask()).outputs[0].token_ids) == 20


async def test_answers_to_an_event_loop_that_is_closed_do_not_end_the_engine(llm: AsyncLLM) -> None:
    loop = asyncio.new_event_loop()
    stream = llm.generate("hello", ENDLESS)
    await asyncio.to_thread(loop.run_until_complete, anext(stream))
    loop.close()
    steps = llm._assembly.engine.stats().num_steps
    await until(lambda: llm._assembly.engine.stats().num_steps > steps + 3)
    assert (await last(llm.generate("a", greedy(5)))).finished


async def test_the_event_loop_is_free_while_the_engine_steps(llm: AsyncLLM) -> None:
    def wait(step: Step) -> None:
        stepping.set()
        assert go_on.wait(SECONDS)

    stepping, go_on = threading.Event(), threading.Event()
    llm._assembly.engine.step_listeners.append(wait)
    task = asyncio.create_task(last(llm.generate("hello", greedy(4))))
    assert await asyncio.to_thread(stepping.wait, SECONDS)
    await asyncio.sleep(0)
    go_on.set()
    assert (await task).finished


def test_as_a_context_manager_it_shuts_down(folder: Path) -> None:
    with AsyncLLM(str(folder), **SETTINGS) as llm:
        thread = llm._thread
        assert thread.is_alive()
    assert not thread.is_alive()


def test_the_tokenizer_is_the_models(llm: AsyncLLM) -> None:
    assert llm.get_tokenizer().encode("hi") == [BOS, *token_ids_of("hi")]
