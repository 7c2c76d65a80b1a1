"""How many KV blocks there are, and their memory."""

from __future__ import annotations

import os

import torch

from octavo.errors import ConfigError
from octavo.interfaces.attention import KVLayout

# Without a number from the user: at most this much on a CPU (memory is taken as blocks are first written), and
# at most this share of what is free.
_DEFAULT_CPU_BYTES = 4 * 2**30
_CPU_SHARE = 0.5
_GPU_SHARE = 0.9


def num_kv_blocks(
    layout: KVLayout,
    num_layers: int,
    *,
    kv_cache_memory_bytes: int | None,
    max_useful_blocks: int,
    min_tokens: int,
    block_size: int,
    device: str,
) -> int:
    """Blocks that the memory allows, but no more than `max_useful_blocks`.

    Raises:
        ConfigError: not even `min_tokens` fit; the message has the numbers.
    """
    bytes_per_block = layout.bytes_per_block * num_layers
    budget = kv_cache_memory_bytes or _free_bytes(device)
    num_blocks = min(budget // bytes_per_block, max_useful_blocks)
    needed = -(-min_tokens // block_size)
    if num_blocks < needed:
        shorter = f" or lower max_model_len to at most {num_blocks * block_size}" if num_blocks else ""
        raise ConfigError(
            f"The KV cache gets {budget:,} bytes, which is {num_blocks} blocks of {block_size} tokens "
            f"({bytes_per_block:,} bytes each), but one request of {min_tokens} tokens needs {needed}. Raise "
            f"kv_cache_memory_bytes to at least {needed * bytes_per_block:,}{shorter}."
        )
    return num_blocks


def _free_bytes(device: str) -> int:
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return max(0, int(free - (1 - _GPU_SHARE) * total))
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # macOS does not say
        return _DEFAULT_CPU_BYTES
    return min(_DEFAULT_CPU_BYTES, int(free * _CPU_SHARE))
