"""The demo model's plan: to the byte what is worked out by hand, and what an engine that runs it reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.assemble import assemble
from octavo.config import EngineConfig
from octavo.plan import make_plan

# SmolLM2-135M: 30 layers of hidden size 576, 9 heads and 3 KV heads of 64, 1536 in the middle, 49152 tokens.
LAYER = (9 * 64 + 3 * 64 + 3 * 64) * 576 + 576 * (9 * 64) + 3 * 1536 * 576 + 2 * 576
TABLE = 49152 * 576
NUM_WEIGHTS = 30 * LAYER + 576 + 2 * TABLE  # the tied head keeps a table of its own
KV_NUMBERS_PER_TOKEN = 2 * 30 * 3 * 64


@pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 2), ("float32", 4)])
def test_numbers_equal_those_by_hand(dtype: str, itemsize: int) -> None:
    config = EngineConfig.create(dtype=dtype, device="cpu", kv_cache_memory_bytes=10**9)
    plan = make_plan(config, memory_bytes=2**33)
    num_blocks = 10**9 // (16 * KV_NUMBERS_PER_TOKEN * itemsize)
    assert NUM_WEIGHTS - TABLE == 134_515_008  # as published
    assert plan.weight_bytes == itemsize * NUM_WEIGHTS
    assert plan.rotary_bytes == itemsize * 2 * 8192 * 64
    assert plan.kv_bytes_per_token == itemsize * KV_NUMBERS_PER_TOKEN
    assert plan.num_blocks == num_blocks
    assert plan.num_tokens == 16 * num_blocks
    assert plan.longest_context == 8192
    assert plan.max_concurrent_requests == num_blocks // 512


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_nine_heads_are_not_shared_by_two_or_eight(num_ranks: int) -> None:
    with pytest.raises(ValueError, match=r"9 query heads and 3 KV heads.* that work: 1, 3\.$"):
        make_plan(EngineConfig(tensor_parallel_size=num_ranks))


def test_three_devices_share_the_model_by_hand() -> None:
    plan = make_plan(EngineConfig(tensor_parallel_size=3, dtype="bfloat16", device="cpu"), memory_bytes=2**33)
    layer = (3 * 64 + 64 + 64) * 576 + 576 * (3 * 64) + 3 * 512 * 576 + 2 * 576
    assert plan.weight_bytes == 2 * (30 * layer + 576 + 2 * 16384 * 576)
    assert plan.kv_bytes_per_token == 2 * (2 * 30 * 1 * 64)


def test_bytes_on_disk_are_nearly_the_file(demo_model: Path) -> None:
    size = demo_model.stat().st_size
    found = make_plan(EngineConfig()).checkpoint_bytes
    assert found is not None
    assert 0 < size - found < 3_000_000  # the rest is the tokenizer


def test_plan_equals_what_a_running_engine_reports() -> None:
    config = EngineConfig(kv_cache_memory_bytes=2**26)
    plan, assembly = make_plan(config), assemble(config)
    assembly.engine.stop()
    assert (plan.weight_bytes, plan.kv_cache_bytes, plan.num_blocks) == (
        assembly.report.weight_bytes,
        assembly.report.kv_cache_bytes,
        assembly.report.num_blocks,
    )
