"""The whole engine over the Triton backends, in Triton's interpreter: plain torch's tokens."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from captured import capture_on_cpu
from tiny_model import write_tiny_llama

from octavo import LLM, SamplingParams, explain
from octavo.engine.stats import EngineStats

BACKENDS = ("torch", "triton-flash", "triton-paged")
BLOCK_BYTES = 16 * 2 * 16 * 4 * 2 * 2  # tokens, KV heads, head_dim, float32, keys and values, layers

# The first two begin alike for two blocks; the third is longer than a step may be.
SHARED = list(range(5, 42))
PROMPTS = [[0, *SHARED, 50], [0, *SHARED, 60, 61, 62], [0, *range(99, 30, -1)], [0, 70, 12]]
SHORT = [[0, *range(20, 44)], [0, *range(80, 70, -1)], [0, 70, 12]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, four query heads over two KV heads of 16 elements."""
    return write_tiny_llama(tmp_path_factory.mktemp("llama"), hidden_size=64)


def generate(
    folder: Path, prefill: str, decode: str, prompts: list[list[int]], max_tokens: int, **settings: Any
) -> tuple[list[list[int]], EngineStats]:
    """Greedy tokens of each prompt, and what the engine counted."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    common = {"dtype": "float32", "device": "cpu", "kernels": "torch", "max_num_seqs": 4}
    with LLM(str(folder), attention={"prefill": prefill, "decode": decode}, **(common | settings)) as llm:
        outputs = llm.generate(prompts, params)
        return [output.outputs[0].token_ids for output in outputs], llm.stats()


def test_chunks_decodes_a_shared_prefix_and_a_preemption_give_plain_torchs_tokens(folder: Path) -> None:
    scarce = {"kv_cache_memory_bytes": 10 * BLOCK_BYTES, "max_num_batched_tokens": 32}
    wanted, _ = generate(folder, "torch", "torch", PROMPTS, 12)
    found, stats = generate(folder, "triton-flash", "triton-paged", PROMPTS, 12, **scarce)
    assert found == wanted
    assert stats.num_prefix_cache_hits >= 32
    assert stats.num_preemptions >= 1
    assert len({tuple(token_ids) for token_ids in found}) == len(PROMPTS)


@pytest.fixture(scope="module")
def torchs_tokens(folder: Path) -> list[list[int]]:
    """As plain torch answers one prompt after the other, each in one step."""
    return [generate(folder, "torch", "torch", [prompt], 4)[0][0] for prompt in SHORT]


@pytest.mark.parametrize(("prefill", "decode"), list(itertools.product(BACKENDS, repeat=2)))
def test_every_pair_of_backends_gives_the_same_tokens(
    folder: Path, prefill: str, decode: str, torchs_tokens: list[list[int]]
) -> None:
    assert generate(folder, prefill, decode, SHORT, 4, max_num_batched_tokens=20)[0] == torchs_tokens


@pytest.mark.parametrize(("prefill", "decode"), [("triton-flash", "triton-flash"), ("triton-flash", "triton-paged")])
def test_captured_decodes_and_two_steps_in_flight_give_the_same_tokens(
    folder: Path, prefill: str, decode: str, torchs_tokens: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    capture_on_cpu(monkeypatch, (1, 4))  # three decodes and a request that is padding
    assert generate(folder, prefill, decode, SHORT, 4, max_steps_in_flight=2)[0] == torchs_tokens


@pytest.mark.parametrize(("prefill", "decode"), [("triton-flash", "triton-paged"), ("torch", "triton-flash")])
def test_fp8_cache_gives_the_tokens_of_plain_torchs_fp8_cache(folder: Path, prefill: str, decode: str) -> None:
    wanted, found = (
        generate(folder, *pair, SHORT, 4, kv_cache_dtype="fp8", max_num_batched_tokens=20)[0]
        for pair in (("torch", "torch"), (prefill, decode))
    )
    assert found == wanted


@pytest.mark.parametrize(("phase", "chosen"), [("prefill", "triton-flash"), ("decode", "triton-paged")])
def test_auto_takes_flash_for_prefill_and_paged_for_decode(folder: Path, phase: str, chosen: str) -> None:
    (socket,) = (one for one in explain(str(folder), device="cpu").sockets if one.name == f"attention.{phase}")
    assert [one.name for one in socket.candidates if one.chosen] == [chosen]
