"""Several completions of one prompt: on the same blocks until they differ, and each as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_llama

from octavo import LLM, RequestOutput, SamplingParams
from octavo.interfaces import Step
from octavo.output_processor import OutputProcessor

BLOCK_SIZE = 16
BYTES_PER_BLOCK = 2 * 2 * BLOCK_SIZE * 2 * 12 * 4  # layers, keys and values, tokens, KV heads, head_dim, float32
MAX_MODEL_LEN = 512

MakeLLM = Callable[..., LLM]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"), max_position_embeddings=MAX_MODEL_LEN)


@pytest.fixture
def make_llm(folder: Path) -> Iterator[MakeLLM]:
    """Loads the tiny model without the prefix cache; every test leaves all of its blocks free."""
    made = []

    def make(**settings: Any) -> LLM:
        defaults = {"dtype": "float32", "block_size": BLOCK_SIZE, "max_num_seqs": 8, "enable_prefix_caching": False}
        made.append(LLM(str(folder), **{**defaults, **settings}))
        return made[-1]

    yield make
    for llm in made:
        stats, pool = llm.stats(), llm.engine.scheduler.block_pool
        assert (stats.num_running, stats.num_waiting, pool.num_free) == (0, 0, pool.num_blocks)
        assert 0 <= stats.kv_waste < 1
        llm.shutdown()


def prompt_of(num_tokens: int) -> list[int]:
    return [5 + (index * 7 + index * index) % 90 for index in range(num_tokens)]


def params(n: int = 4, max_tokens: int = 20, **fields: Any) -> SamplingParams:
    return SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=True, seed=11, **fields)


def completions(output: RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


def alone(llm: LLM, prompt: list[int], asked: SamplingParams) -> list[list[int]]:
    """What each completion is when it has the engine to itself: a request of its own, with its sample index."""
    found = []
    for index in range(asked.n):
        request = llm._assembly.inputs.request(f"alone-{index}", prompt, asked)
        request = [request, *request.siblings][index]
        request.siblings = []
        llm.engine.add(request)
        while llm.engine.has_unfinished:
            llm.engine.step()
        found.append(request.output_token_ids)
    return found


def peak_blocks(llm: LLM, work: Callable[[], Any]) -> int:
    """The most distinct blocks held in any step of some work."""
    pool, numbers = llm.engine.scheduler.block_pool, list[int]()
    llm.engine.step_listeners.append(lambda step: numbers.append(pool.num_referenced))
    work()
    llm.engine.step_listeners.clear()
    return max(numbers)


# ------------------------------------------------------------------------------------------------ memory


def test_eight_completions_take_under_a_quarter_of_the_blocks_of_eight_requests(make_llm: MakeLLM) -> None:
    llm, prompt = make_llm(), prompt_of(256)
    forked = peak_blocks(llm, lambda: llm.generate([prompt], params(8, 32)))
    apart = peak_blocks(llm, lambda: llm.generate([prompt] * 8, params(1, 32)))
    assert (forked, apart) == (16 + 8 * 2, 8 * 18)  # blocks of the prompt, and of 31 tokens after it
    assert forked / apart < 0.25


def test_a_shared_block_that_is_partly_filled_is_copied_by_all_but_the_last(make_llm: MakeLLM) -> None:
    llm = make_llm()
    steps = list[Step]()
    llm.engine.step_listeners.append(steps.append)
    pool = llm.engine.scheduler.block_pool
    numbers = list[int]()
    llm.engine.step_listeners.append(lambda step: numbers.append(pool.num_referenced))
    llm.generate([prompt_of(20)], params(4, 3))
    copies = [len(row.copied_blocks) for step in steps for row in step.rows]
    assert [sum(copies[index : index + 4]) for index in (0, 4, 8)] == [0, 3, 0]
    assert numbers == [2, 5, 5]


def test_completions_compute_their_prompt_once(make_llm: MakeLLM) -> None:
    llm = make_llm()
    steps = list[Step]()
    llm.engine.step_listeners.append(steps.append)
    llm.generate([prompt_of(40)], params(4, 5))
    assert [step.num_tokens for step in steps] == [40, 4, 4, 4, 4]


def test_waste_counts_a_shared_block_once(make_llm: MakeLLM) -> None:
    llm = make_llm()
    llm.generate([prompt_of(256)], params(8, 32))
    # 256 + 8 x the tokens after them, in 16 + 8 blocks for 16 steps and then in 16 + 16; not when all have ended
    first = [1 - (256 + 8 * tokens) / (24 * 16) for tokens in range(1, 17)]
    second = [1 - (256 + 8 * tokens) / (32 * 16) for tokens in range(17, 31)]
    assert llm.stats().kv_waste == pytest.approx(sum([0.0, *first, *second]) / 31)


# ------------------------------------------------------------------------------------------------ tokens

LIMITS: dict[str, dict[str, Any]] = {
    "alone": {},
    "depth 2": {"max_steps_in_flight": 2},
    "in chunks": {"max_num_batched_tokens": 10},
    "cached": {"enable_prefix_caching": True},
    "fewer places": {"max_num_seqs": 3},
    "fewer places, cached, depth 2": {"max_num_seqs": 3, "enable_prefix_caching": True, "max_steps_in_flight": 2},
}


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("num_prompt_tokens", [1, 15, 16, 17, 31, 32, 33])
def test_each_completion_is_the_one_it_would_be_alone(
    make_llm: MakeLLM, num_prompt_tokens: int, limits: dict[str, Any]
) -> None:
    llm, prompt, asked = make_llm(**limits), prompt_of(num_prompt_tokens), params(4)
    (output,) = llm.generate([prompt], asked)
    assert completions(output) == alone(llm, prompt, asked)
    assert len({tuple(token_ids) for token_ids in completions(output)}) == 4
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]


@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
@pytest.mark.parametrize("num_prompt_tokens", [15, 16, 17, 33])
def test_completions_that_are_preempted_are_the_same(
    make_llm: MakeLLM, num_prompt_tokens: int, max_steps_in_flight: int
) -> None:
    llm = make_llm(kv_cache_memory_bytes=6 * BYTES_PER_BLOCK, max_steps_in_flight=max_steps_in_flight)
    prompt, asked = prompt_of(num_prompt_tokens), params(5, 30)
    (output,) = llm.generate([prompt], asked)
    assert llm.stats().num_preemptions > 0
    assert completions(output) == alone(llm, prompt, asked)


@pytest.mark.parametrize("penalised", [{"presence_penalty": 1.0}, {"temperature": 0.0}], ids=str)
def test_other_parameters_hold_for_each_completion(make_llm: MakeLLM, penalised: dict[str, Any]) -> None:
    llm, prompt, asked = make_llm(), prompt_of(20), params(3, **penalised)
    (output,) = llm.generate([prompt], asked)
    assert completions(output) == alone(llm, prompt, asked)


# ------------------------------------------------------------------------------------------------ ends


def run(llm: LLM, outputs: OutputProcessor, num_steps: int) -> None:
    for _ in range(num_steps):
        outputs.process(llm.engine.step(), 0.0)


@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 7])
@pytest.mark.parametrize("which", [0, 2])
def test_aborting_one_completion_leaves_the_others_as_they_are(
    make_llm: MakeLLM, which: int, num_steps: int, max_steps_in_flight: int
) -> None:
    llm = make_llm(max_steps_in_flight=max_steps_in_flight, max_num_batched_tokens=16)
    prompt, asked = prompt_of(20), params(4)
    wanted = alone(llm, prompt, asked)
    outputs = OutputProcessor(llm.get_tokenizer())
    output = outputs.add("r", None, prompt, asked, 0.0)
    llm.engine.add(llm._assembly.inputs.request("r", prompt, asked))
    run(llm, outputs, num_steps)
    llm.engine.abort(f"r/{which}")
    while llm.engine.has_unfinished:
        run(llm, outputs, 1)
    found = completions(output)
    assert [token_ids for index, token_ids in enumerate(found) if index != which] == [
        token_ids for index, token_ids in enumerate(wanted) if index != which
    ]
    assert found[which] == wanted[which][: len(found[which])]
    assert len(found[which]) < asked.max_tokens  # type: ignore[operator]


@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
def test_leaving_a_stream_ends_all_of_its_completions(make_llm: MakeLLM, max_steps_in_flight: int) -> None:
    llm = make_llm(max_steps_in_flight=max_steps_in_flight, max_num_seqs=3)
    for output in llm.stream(prompt_of(33), params(4, 30)):
        if len(output.outputs[0].token_ids) >= 3:
            break
    while llm.engine.is_draining:
        llm.engine.step()
    assert llm.engine.scheduler.block_pool.num_referenced == 0


def test_a_stop_string_ends_only_the_completion_that_said_it(make_llm: MakeLLM) -> None:
    llm = make_llm()
    (free,) = llm.generate([prompt_of(20)], params(4, 30))
    stop = free.outputs[1].text[10]
    (output,) = llm.generate([prompt_of(20)], params(4, 30, stop=[stop]))
    for completion, unstopped in zip(output.outputs, free.outputs, strict=True):
        found = stop in unstopped.text
        assert completion.text == (unstopped.text.split(stop)[0] if found else unstopped.text)
        assert completion.finish_reason == ("stop" if found else "length")
    assert output.outputs[1].finish_reason == "stop"
