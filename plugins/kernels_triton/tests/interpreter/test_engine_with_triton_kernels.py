"""The whole engine with the Triton kernels, in Triton's interpreter: the tokens of plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_model import write_tiny_llama

from octavo import LLM, SamplingParams

PROMPTS = [[0, 40, 41, 42, 43, 44], [0, 70, 12], [0, 33, 34, 35, 36, 37, 38, 39, 60, 61]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, heads of 12, sizes that are no powers of two."""
    return write_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llms(folder: Path) -> Iterator[tuple[LLM, LLM]]:
    """Plain torch, and Triton's kernels around plain torch's attention."""
    torch_llm, triton_llm = (serve(folder, kernels) for kernels in ("torch", "triton"))
    yield torch_llm, triton_llm
    torch_llm.shutdown()
    triton_llm.shutdown()


def serve(folder: Path, kernels: str) -> LLM:
    return LLM(str(folder), kernels=kernels, attention="torch", dtype="float32", device="cpu", max_num_seqs=4)


def tokens(llm: LLM, params: list[SamplingParams]) -> list[list[list[int]]]:
    outputs = llm.generate(PROMPTS, params)
    return [[each.token_ids for each in output.outputs] for output in outputs]


def test_greedy_tokens_are_those_of_plain_torch(llms: tuple[LLM, LLM]) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)] * 3
    wanted, found = (tokens(llm, params) for llm in llms)
    assert found == wanted
    assert len({tuple(each[0]) for each in found}) == 3


def test_sampled_tokens_are_those_of_plain_torch(llms: tuple[LLM, LLM]) -> None:
    common = {"max_tokens": 8, "ignore_eos": True}
    params = [
        SamplingParams(seed=1, temperature=1.0, top_p=0.8, **common),
        SamplingParams(seed=2, temperature=0.7, top_k=10, min_p=0.01, n=2, **common),
        SamplingParams(temperature=0.0, **common),
    ]
    wanted, found = (tokens(llm, params) for llm in llms)
    assert found == wanted
    assert found[1][0] != found[1][1]
