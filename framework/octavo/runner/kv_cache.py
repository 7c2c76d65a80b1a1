"""How many KV blocks there are: the runner asks when it allocates them, a plan asks beforehand."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from octavo.config import EngineConfig
from octavo.errors import ConfigError

_MOST_CPU_BYTES = 4 * 2**30
_UNKNOWN_BYTES = 2 * _MOST_CPU_BYTES

MOST_HUNDREDTHS = 98
"""Of a GPU's memory that we advise to use: the driver and CUDA graphs take some, too."""


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


def kv_cache_budget(config: EngineConfig, memory: DeviceMemory, device: str, activation_bytes: int = 0) -> int:
    """Bytes the KV cache may take of a device on which the weights already lie: the user's number, or a share.

    On a CPU memory is only taken as blocks are first written. Of a GPU the engine takes gpu_memory_utilization in all,
    what others have taken of it included: the weights that lie there, what steps need, and the rest for the KV cache.

    Args:
        activation_bytes: what a step may need of a GPU beside weights and KV cache.
    """
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if device == "cuda":
        return max(0, _usable_bytes(config, memory) - (memory.total_bytes - memory.free_bytes) - activation_bytes)
    return max(0, min(_MOST_CPU_BYTES, memory.free_bytes // 2))


def kv_cache_rule(config: EngineConfig, device: str) -> str:
    """How `kv_cache_budget` comes to its number, in words."""
    if config.kv_cache_memory_bytes is not None:
        return "kv_cache_memory_bytes"
    if device == "cuda":
        return f"the rest of gpu_memory_utilization={config.gpu_memory_utilization:g}"
    return f"half of the free memory, at most {_MOST_CPU_BYTES >> 30} GiB"


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


def check_num_kv_blocks(
    config: EngineConfig,
    num_blocks: int,
    budget: int,
    bytes_per_block: int,
    gpu_memory: DeviceMemory | None = None,
    activation_bytes: int = 0,
) -> None:
    """Raise when an engine cannot work with so few.

    Args:
        gpu_memory, activation_bytes: what the budget was made from, on a GPU.

    Raises:
        ConfigError: the message has the numbers, and settings that would do.
    """
    needed = num_needed_blocks(config)
    if num_blocks >= needed:
        return
    sentences = [too_few_blocks(config, num_blocks, budget, bytes_per_block)]
    if gpu_memory is None or config.kv_cache_memory_bytes is not None:
        ways = [f"raise kv_cache_memory_bytes to at least {needed * bytes_per_block:,}"]
    else:
        taken = gpu_memory.total_bytes - gpu_memory.free_bytes
        sentences.append(
            f"gpu_memory_utilization={config.gpu_memory_utilization:g} of the GPU is "
            f"{_usable_bytes(config, gpu_memory):,} bytes, of which {taken:,} are taken, by weights and by others, and "
            f"steps need {activation_bytes:,}."
        )
        least = _utilization_for(taken + activation_bytes + needed * bytes_per_block, gpu_memory.total_bytes)
        ways = [] if least is None else [f"raise gpu_memory_utilization to at least {least:g}"]
        ways.append("lower max_num_seqs and max_num_batched_tokens, so that steps need less,")
    if num_blocks:
        ways.append(f"lower max_model_len to at most {num_blocks * config.block_size}")
    sentences.append(" or ".join(ways).removesuffix(",").capitalize() + ".")
    raise ConfigError(" ".join(sentences))


def _utilization_for(num_bytes: int, total_bytes: int) -> float | None:
    """The least gpu_memory_utilization, in hundredths, that is so many bytes; None when that is too much to ask for."""
    hundredths = 100 * num_bytes // total_bytes + 1  # more than enough by a byte, which rounding may take
    return hundredths / 100 if hundredths <= MOST_HUNDREDTHS else None


def _usable_bytes(config: EngineConfig, memory: DeviceMemory) -> int:
    return int(memory.total_bytes * config.gpu_memory_utilization)


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
