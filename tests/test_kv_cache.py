"""How many KV blocks a budget gives, what the budget is, and what is said when it is too small."""

from __future__ import annotations

import os
import re

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
    num_kv_blocks,
)

GIB = 2**30
BYTES_PER_BLOCK = 3000


def blocks(budget: int, *, max_model_len: int | None = None, model_len: int = 10**6, max_num_seqs: int = 256) -> int:
    config = EngineConfig(max_model_len=max_model_len, max_num_seqs=max_num_seqs)
    found = num_kv_blocks(config, max_model_len or model_len, budget, BYTES_PER_BLOCK)
    check_num_kv_blocks(config, found, budget, BYTES_PER_BLOCK)
    return found


def budget(device: str, *, free: int, total: int, kv_cache_memory_bytes: int | None = None) -> int:
    config = EngineConfig(kv_cache_memory_bytes=kv_cache_memory_bytes)
    return kv_cache_budget(config, DeviceMemory(free_bytes=free, total_bytes=total), device)


# ------------------------------------------------------------------------------------------------------ budget


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_number_a_user_gives_is_the_budget(device: str) -> None:
    assert budget(device, free=1, total=1, kv_cache_memory_bytes=12345) == 12345


def test_on_a_cpu_half_of_what_is_free_and_at_most_four_gib() -> None:
    assert budget("cpu", free=6 * GIB + 3, total=64 * GIB) == 3 * GIB + 1
    assert budget("cpu", free=60 * GIB, total=64 * GIB) == 4 * GIB


def test_on_a_gpu_what_is_free_but_for_a_tenth_of_the_device() -> None:
    assert budget("cuda", free=50 * GIB, total=80 * GIB) == 42 * GIB


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


def test_a_length_nobody_asked_for_need_not_fit() -> None:
    assert blocks(BYTES_PER_BLOCK, model_len=1000) == 1
