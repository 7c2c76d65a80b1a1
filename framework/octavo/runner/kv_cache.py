"""How many KV blocks there are: the runner asks when it allocates them, a plan asks beforehand."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from octavo.config import EngineConfig
from octavo.errors import ConfigError

_MOST_CPU_BYTES = 4 * 2**30
_GPU_RESERVE = 10  # one part in so many
_UNKNOWN_BYTES = 2 * _MOST_CPU_BYTES

DEFAULT_BUDGET_RULE = {
    "cpu": f"half of the free memory, at most {_MOST_CPU_BYTES >> 30} GiB",
    "cuda": f"the free memory but for 1/{_GPU_RESERVE} of the device",
}
"""What `kv_cache_budget` takes of each device when the user gives no number, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMemory:
    """Bytes of one device; `free_bytes` is what can be taken now, on a CPU without swapping."""

    free_bytes: int
    total_bytes: int


def device_memory(device: str) -> DeviceMemory:
    """Of this machine, now."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return DeviceMemory(free_bytes=free, total_bytes=total)
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # a system that does not say is taken for a small one
        total = _UNKNOWN_BYTES
    return DeviceMemory(free_bytes=min(total, _available_cpu_bytes() or total), total_bytes=total)


def kv_cache_budget(config: EngineConfig, memory: DeviceMemory, device: str) -> int:
    """Bytes the KV cache may take of a device on which the weights already lie: the user's number, or a share.

    On a CPU memory is only taken as blocks are first written; what stays free of a GPU is for activations.
    """
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if device == "cuda":
        return max(0, memory.free_bytes - memory.total_bytes // _GPU_RESERVE)
    return max(0, min(_MOST_CPU_BYTES, memory.free_bytes // 2))


def num_kv_blocks(config: EngineConfig, max_model_len: int, budget: int, bytes_per_block: int) -> int:
    """Blocks that the budget pays, but no more than `max_num_seqs` requests of `max_model_len` tokens could use.

    Args:
        bytes_per_block: of all layers.
    """
    return min(budget // bytes_per_block, config.max_num_seqs * blocks_for(config, max_model_len))


def without_draft_kv(
    served: EngineConfig, draft: EngineConfig, budget: int, served_bytes_per_block: int, draft_bytes_per_block: int
) -> int:
    """Of a budget for two models the bytes that the served one's KV cache may take; a number of the user's is kept to.

    The draft model takes what the user gives it, or as many blocks as the served one: it holds the same requests.
    """
    if served.kv_cache_memory_bytes is not None:
        return budget
    if draft.kv_cache_memory_bytes is not None:
        return max(0, budget - draft.kv_cache_memory_bytes)
    return budget // (served_bytes_per_block + draft_bytes_per_block) * served_bytes_per_block


def num_draft_kv_blocks(draft: EngineConfig, max_model_len: int, num_served_blocks: int, bytes_per_block: int) -> int:
    """Blocks of the draft model's own KV cache, at least one: requests it has no room for go without its guesses."""
    budget = draft.kv_cache_memory_bytes or num_served_blocks * bytes_per_block
    return max(1, num_kv_blocks(draft, max_model_len, budget, bytes_per_block))


def num_needed_blocks(config: EngineConfig) -> int:
    """Without which no engine starts: one request of the length the user asked for, or one block."""
    return blocks_for(config, config.max_model_len or 1)


def blocks_for(config: EngineConfig, num_tokens: int) -> int:
    """Blocks that hold one request of so many tokens."""
    return -(-num_tokens // config.block_size)


def check_num_kv_blocks(config: EngineConfig, num_blocks: int, budget: int, bytes_per_block: int) -> None:
    """Raise when an engine cannot work with so few.

    Raises:
        ConfigError: the message has the numbers, and settings that would do.
    """
    needed = num_needed_blocks(config)
    if num_blocks < needed:
        shorter = f" or lower max_model_len to at most {num_blocks * config.block_size}" if num_blocks else ""
        raise ConfigError(
            f"{too_few_blocks(config, num_blocks, budget, bytes_per_block)} Raise kv_cache_memory_bytes to at least "
            f"{needed * bytes_per_block:,}{shorter}."
        )


def too_few_blocks(config: EngineConfig, num_blocks: int, budget: int, bytes_per_block: int) -> str:
    """The sentence that says so, with the numbers."""
    return (
        f"The KV cache gets {budget:,} bytes, which is {num_blocks} blocks of {config.block_size} tokens "
        f"({bytes_per_block:,} bytes each), but one request of {config.max_model_len or 1} tokens needs "
        f"{num_needed_blocks(config)}."
    )


def _available_cpu_bytes() -> int | None:
    """What can be taken without swapping, file caches included; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return None
