"""AsyncLLM samples as LLM does: the checkpoint's recommendations, the limit of logprobs, the prompt as cut."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_model import token_ids_of, write_tiny_llama

from octavo import LLM, AsyncLLM, RequestOutput, SamplingParams
from octavo.errors import RequestError

SECONDS = 20.0
MakeAsyncLLM = Callable[..., AsyncLLM]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny"))
    recommended = {"temperature": 0.0, "repetition_penalty": 1.5, "max_new_tokens": 7}
    (folder / "generation_config.json").write_text(json.dumps(recommended))
    return folder


@pytest.fixture
def make_llm(folder: Path) -> Iterator[MakeAsyncLLM]:
    made = []

    def make(**settings: Any) -> AsyncLLM:
        made.append(AsyncLLM(str(folder), dtype="float32", **settings))
        return made[-1]

    yield make
    for llm in made:
        llm.shutdown()


async def last(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
    async with asyncio.timeout(SECONDS):
        return [output async for output in stream][-1]


async def test_without_params_the_checkpoint_s_recommendations_are_followed(
    make_llm: MakeAsyncLLM, folder: Path
) -> None:
    llm = make_llm()
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, repetition_penalty=1.5, max_tokens=7)
    output = await last(llm.generate("hello world"))
    with LLM(str(folder), dtype="float32") as other:
        (wanted,) = other.generate("hello world")
    assert output.outputs[0].token_ids == wanted.outputs[0].token_ids


async def test_more_logprobs_than_the_configuration_allows_are_refused(make_llm: MakeAsyncLLM) -> None:
    llm = make_llm(max_logprobs=3)
    with pytest.raises(RequestError, match="logprobs=4 was asked for; max_logprobs allows 3"):
        await last(llm.generate("a", SamplingParams(logprobs=4)))
    output = await last(llm.generate("a", SamplingParams(logprobs=3, max_tokens=1)))
    assert len((output.outputs[0].logprobs or [])[0]) in (3, 4)  # the one drawn is told too, were it not among them


async def test_the_output_names_the_prompt_s_tokens_that_were_kept(make_llm: MakeAsyncLLM) -> None:
    output = await last(make_llm().generate("abcdef", SamplingParams(truncate_prompt_tokens=2, max_tokens=1)))
    assert output.prompt_token_ids == token_ids_of("ef")
