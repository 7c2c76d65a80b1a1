"""How many KV blocks a budget gives, what the budget is, and what is said when it is too small."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.runner import kv_cache
from octavo.runner.kv_cache import (
    DeviceMemory,
    check_num_kv_blocks,
    device_memory,
    kv_cache_budget,
    kv_cache_rule,
    num_kv_blocks,
)

GIB = 2**30
BYTES_PER_BLOCK = 3000


def blocks(budget: int, *, max_model_len: int | None = None, model_len: int = 10**6, max_num_seqs: int = 256) -> int:
    config = EngineConfig(max_model_len=max_model_len, max_num_seqs=max_num_seqs)
    found = num_kv_blocks(config, max_model_len or model_len, budget, BYTES_PER_BLOCK)
    check_num_kv_blocks(config, found, budget, BYTES_PER_BLOCK)
    return found


def budget(device: str, *, free: int, total: int, activation_bytes: int = 0, **settings: Any) -> int:
    memory = DeviceMemory(free_bytes=free, total_bytes=total)
    return kv_cache_budget(EngineConfig(**settings), memory, device, activation_bytes)


# ------------------------------------------------------------------------------------------------------ budget


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_number_a_user_gives_is_the_budget(device: str) -> None:
    assert budget(device, free=1, total=1, kv_cache_memory_bytes=12345) == 12345


def test_on_a_cpu_half_of_what_is_free_and_at_most_four_gib() -> None:
    assert budget("cpu", free=6 * GIB + 3, total=64 * GIB) == 3 * GIB + 1
    assert budget("cpu", free=60 * GIB, total=64 * GIB) == 4 * GIB


def test_on_a_gpu_the_rest_of_its_share_behind_what_lies_there() -> None:
    assert budget("cuda", free=50 * GIB, total=80 * GIB) == 42 * GIB
    assert budget("cuda", free=50 * GIB, total=80 * GIB, gpu_memory_utilization=0.5) == 10 * GIB


def test_what_steps_need_of_a_gpu_is_left_to_them() -> None:
    assert budget("cuda", free=50 * GIB, total=80 * GIB, activation_bytes=2 * GIB) == 40 * GIB


def test_the_share_of_a_gpu_means_nothing_to_a_cpu() -> None:
    assert budget("cpu", free=6 * GIB, total=64 * GIB, gpu_memory_utilization=0.1) == 3 * GIB


@pytest.mark.parametrize(
    ("device", "settings", "words"),
    [
        ("cpu", {}, "half of the free memory, at most 4 GiB"),
        ("cuda", {"gpu_memory_utilization": 0.85}, "the rest of gpu_memory_utilization=0.85"),
        ("cuda", {"kv_cache_memory_bytes": 7}, "kv_cache_memory_bytes"),
    ],
)
def test_the_budget_s_rule_is_told_in_words(device: str, settings: dict[str, Any], words: str) -> None:
    assert kv_cache_rule(EngineConfig(**settings), device) == words


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_budget_is_below_zero(device: str) -> None:
    assert budget(device, free=-GIB, total=80 * GIB) == 0


def test_the_machine_s_memory_is_told_in_bytes() -> None:
    memory = device_memory("cpu")
    assert 2**20 < memory.free_bytes <= memory.total_bytes


def test_the_gpu_s_memory_is_what_cuda_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7, 8))
    assert device_memory("cuda") == DeviceMemory(free_bytes=7, total_bytes=8)


def test_a_system_that_does_not_tell_its_memory_is_taken_for_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(os, "sysconf", unknown)
    monkeypatch.setattr(kv_cache, "_available_cpu_bytes", lambda: None)
    assert device_memory("cpu") == DeviceMemory(free_bytes=8 * GIB, total_bytes=8 * GIB)


# ------------------------------------------------------------------------------------------------------ blocks


def test_a_budget_gives_the_blocks_that_it_pays() -> None:
    assert blocks(10 * BYTES_PER_BLOCK) == 10
    assert blocks(10 * BYTES_PER_BLOCK - 1) == 9


def test_no_more_blocks_than_requests_could_use() -> None:
    assert blocks(10**12, model_len=33, max_num_seqs=7) == 7 * 3


def test_a_budget_too_small_is_refused_with_numbers_that_work() -> None:
    with pytest.raises(ConfigError) as caught:
        blocks(4 * BYTES_PER_BLOCK, max_model_len=100)
    found = re.search(r"to at least ([\d,]+) or lower max_model_len to at most (\d+)\.$", str(caught.value))
    assert found is not None
    memory, length = int(found[1].replace(",", "")), int(found[2])
    assert blocks(memory, max_model_len=100) == 7
    assert blocks(4 * BYTES_PER_BLOCK, max_model_len=length) == 4
    for too_little, too_long in ((memory - 1, 100), (4 * BYTES_PER_BLOCK, length + 1)):
        with pytest.raises(ConfigError):
            blocks(too_little, max_model_len=too_long)


def test_a_budget_without_one_block_is_not_told_to_serve_no_tokens() -> None:
    with pytest.raises(ConfigError, match=rf"to at least {BYTES_PER_BLOCK:,}\.$"):
        blocks(BYTES_PER_BLOCK - 1)


def no_room(**settings: Any) -> str:
    """What is said of a GPU of 1000 blocks of 3000 bytes, of which 890 are taken and steps need 8."""
    memory = DeviceMemory(free_bytes=110 * BYTES_PER_BLOCK, total_bytes=1000 * BYTES_PER_BLOCK)
    config, needed = EngineConfig(**settings), 8 * BYTES_PER_BLOCK
    left = kv_cache_budget(config, memory, "cuda", needed)
    number = num_kv_blocks(config, 10**6, left, BYTES_PER_BLOCK)
    with pytest.raises(ConfigError) as caught:
        check_num_kv_blocks(config, number, left, BYTES_PER_BLOCK, memory, needed)
    return str(caught.value)


def test_a_gpu_without_room_is_refused_with_where_it_went_and_a_share_that_works() -> None:
    assert no_room(max_model_len=100) == (
        "The KV cache gets 6,000 bytes, which is 2 blocks of 16 tokens (3,000 bytes each), but one request of 100 "
        "tokens needs 7. gpu_memory_utilization=0.9 of the GPU is 2,700,000 bytes, of which 2,670,000 are taken, by "
        "weights and by others, and steps need 24,000. Raise gpu_memory_utilization to at least 0.91 or lower "
        "max_num_seqs and max_num_batched_tokens, so that steps need less, or lower max_model_len to at most 32."
    )
    config = EngineConfig(max_model_len=100, gpu_memory_utilization=0.91)
    memory = DeviceMemory(free_bytes=110 * BYTES_PER_BLOCK, total_bytes=1000 * BYTES_PER_BLOCK)
    assert kv_cache_budget(config, memory, "cuda", 8 * BYTES_PER_BLOCK) >= 7 * BYTES_PER_BLOCK


def test_a_gpu_that_is_too_small_is_not_told_to_be_used_beyond_its_end() -> None:
    assert "Lower max_num_seqs" in no_room(max_model_len=2000)
    assert "Raise" not in no_room(max_model_len=2000)


def test_a_length_nobody_asked_for_need_not_fit() -> None:
    assert blocks(BYTES_PER_BLOCK, model_len=1000) == 1
