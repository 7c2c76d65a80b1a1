"""Keys and values in fp8: how they are rounded, and that an engine serves from such a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_model import write_tiny_llama

from octavo import LLM, SamplingParams
from octavo.builtin.fp8_cache import LARGEST, Pages, to_fp8
from octavo.config import EngineConfig
from octavo.plan import make_plan


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------- rounding


def test_each_head_s_largest_magnitude_is_stored_as_the_largest_number() -> None:
    stored, scale = to_fp8(random(7, 3, 64) * torch.tensor([1e-3, 1.0, 1e3]).view(1, 3, 1))
    assert stored.float().abs().amax(dim=-1).unique().tolist() == [LARGEST]
    assert scale.shape == (7, 3)


def test_elements_are_rounded_to_the_nearest() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].double()
    x = random(5, 2, 64)
    stored, scale = to_fp8(x)
    wanted = x.double() / scale.double().unsqueeze(-1)
    nearest = (wanted.unsqueeze(-1) - numbers).abs().amin(dim=-1)
    torch.testing.assert_close((stored.double() - wanted).abs(), nearest, rtol=0, atol=1e-4)


@pytest.mark.parametrize("number", [0.0, 1e-30, 1e-6, 65504.0, 3e38])
def test_heads_of_any_magnitude_come_back(number: float) -> None:
    stored, scale = to_fp8(torch.full((1, 1, 4), number))
    torch.testing.assert_close(stored.float() * scale.unsqueeze(-1), torch.full((1, 1, 4), number), rtol=1e-6, atol=0.0)


def test_what_is_written_in_fp8_is_read_in_the_dtype_asked_for() -> None:
    pages = Pages(stored=torch.zeros(8, 2, 16, dtype=torch.float8_e4m3fn), scale=torch.zeros(8, 2))
    x = random(3, 2, 16)
    pages.write(torch.tensor([5, 0, 7]), x)
    found = pages.read(torch.tensor([0, 5, 7, 1]), torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found[:3].float(), x[[1, 0, 2]], rtol=0.07, atol=0.01)  # half of 2 ** -3, and bfloat16
    assert not found[3].any()


# ------------------------------------------------------------------------------------------------- in an engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


def generate(folder: Path, **settings: object) -> list[list[int]]:
    prompts = ["hello world", "x", "what is this? " * 3]
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    with LLM(str(folder), dtype="float32", kv_cache_dtype="fp8", **settings) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def test_tokens_do_not_depend_on_how_prompts_are_cut(folder: Path) -> None:
    """A prompt's own keys are read as they were rounded, in its first chunk as in later ones."""
    assert generate(folder) == generate(folder, max_num_batched_tokens=8, max_num_seqs=4)


def test_a_cached_prefix_changes_no_token(folder: Path) -> None:
    prompt = "what is this? " * 5
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    with LLM(str(folder), dtype="float32", kv_cache_dtype="fp8") as llm:
        first, second = (llm.generate([prompt], params)[0] for _ in range(2))
    assert second.num_cached_tokens
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


@pytest.mark.parametrize(("dtype", "plain_bytes"), [("bfloat16", 2), ("float32", 4)])
def test_a_plan_counts_a_byte_an_element_and_a_scale_for_each_head(folder: Path, dtype: str, plain_bytes: int) -> None:
    plain, fp8 = (
        make_plan(EngineConfig(model=str(folder), dtype=dtype, device="cpu", kv_cache_dtype=kv_cache_dtype))
        for kv_cache_dtype in ("auto", "fp8")
    )
    num_heads, head_dim = 2 * 2 * 2, 12  # keys and values, layers, KV heads
    assert plain.kv_bytes_per_token == num_heads * head_dim * plain_bytes
    assert fp8.kv_bytes_per_token == num_heads * (head_dim + 4)
