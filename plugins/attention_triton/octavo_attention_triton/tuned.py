"""Tile sizes of this package's kernels: data per GPU architecture in configs/, a heuristic where there is none.

Nothing is measured while serving; `python -m octavo_attention_triton.tune` does, and writes a file.

`octavo.plugins.tuned_data` says what a file holds. A case is made of numbers: bits (of an activation),
kv_bits (of a cached element), head_dim (as a tile holds it: the next power of two), and what
else the kernel's configuration depends on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from octavo.plugins import tuned_data
from octavo.plugins.tuned_data import INTERPRETER

CONFIGS = Path(__file__).parent / "configs"

# Bytes of shared memory that one program may use, by compute capability (CUDA programming guide, technical
# specifications); the smallest of them where it is not listed.
_SHARED_BYTES = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448}
_LEAST_SHARED_BYTES = 101_376


@dataclass(frozen=True, kw_only=True, slots=True)
class FlashConfig:
    """Of prefill: BLOCK_M queries and BLOCK_N keys in a tile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedConfig:
    """Of decode: BLOCK_N keys in a tile."""

    block_n: int
    num_warps: int
    num_stages: int


def num_multiprocessors(capability: int, device: str) -> int:
    """How many programs run side by side at the least."""
    return tuned_data.num_multiprocessors(CONFIGS, capability, device)


def flash_config(capability: int, dtype: torch.dtype, head_dim: int, max_query_len: int, fp8: bool) -> FlashConfig:
    """Tiles of the prefill kernel.

    Args:
        dtype: of queries. fp8: whether the cache holds 8-bit elements.
        max_query_len: rows of the step's longest request, its tokens times the query heads that share a KV head;
            rounded up to a power of two.
    """
    return _flash_config(capability, dtype.itemsize * 8, head_dim, max(max_query_len - 1, 0).bit_length(), fp8)


@lru_cache(maxsize=1024)
def paged_config(
    capability: int, dtype: torch.dtype, head_dim: int, group: int, block_size: int, fp8: bool
) -> PagedConfig:
    """Tiles of the decode kernel; `dtype` of queries, `fp8` whether the cache holds 8-bit elements."""
    if capability == INTERPRETER:
        return PagedConfig(block_n=64, num_warps=4, num_stages=1)
    bits = dtype.itemsize * 8
    case = _case(bits, head_dim, fp8) | {"group": group, "block_size": block_size}
    if (found := _nearest(capability, "paged_decode", case)) is not None:
        return PagedConfig(**found)
    return _paged_heuristic(bits, case["head_dim"], fp8)


def _nearest(capability: int, kernel: str, case: Mapping[str, int]) -> Mapping[str, int] | None:
    """An entry for other sizes of elements does not fit, nor one for a smaller head: its tiles may be too large."""
    entries = tuned_data.entries(CONFIGS, capability, kernel)
    return tuned_data.nearest(entries, case, same=["bits", "kv_bits"], at_least=["head_dim"])


@lru_cache(maxsize=1024)
def _flash_config(capability: int, bits: int, head_dim: int, log_query_len: int, fp8: bool) -> FlashConfig:
    if capability == INTERPRETER:
        return FlashConfig(block_m=32, block_n=32, num_warps=4, num_stages=1)
    case = _case(bits, head_dim, fp8) | {"max_query_len": 1 << log_query_len}
    if (found := _nearest(capability, "flash_prefill", case)) is not None:
        return FlashConfig(**found)
    return _flash_heuristic(capability, bits, case["head_dim"], case["max_query_len"], fp8)


def _case(bits: int, head_dim: int, fp8: bool) -> dict[str, int]:
    return {"bits": bits, "kv_bits": 8 if fp8 else bits, "head_dim": 1 << (head_dim - 1).bit_length()}


def _paged_heuristic(bits: int, head_dim: int, fp8: bool) -> PagedConfig:
    """8192 elements of keys in a tile; of 32 bits fewer, for their products are computed in registers."""
    if bits == 32:
        return PagedConfig(block_n=16, num_warps=4, num_stages=1 if fp8 else 2)
    return PagedConfig(block_n=min(max(8192 // head_dim, 16), 128), num_warps=4, num_stages=2)


def _flash_heuristic(capability: int, bits: int, head_dim: int, max_query_len: int, fp8: bool) -> FlashConfig:
    """Many queries a tile, so that each key read is used often; of 32-bit elements few, which no tensor core takes."""
    if bits == 32:
        return FlashConfig(block_m=16, block_n=16, num_warps=4, num_stages=1)
    itemsize = bits // 8
    block_m = 128 if head_dim <= 128 else 64
    block_m = max(min(block_m, max_query_len), 16)
    block_n = 32 if fp8 or head_dim > 128 else 64

    def shared_bytes() -> int:
        return block_m * head_dim * itemsize + 2 * 2 * block_n * head_dim * (1 if fp8 else itemsize)

    while block_n > 16 and shared_bytes() > _shared_bytes(capability):
        block_n //= 2
    num_warps = 8 if block_m >= 64 else 4  # whose registers hold the sums
    return FlashConfig(block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=2)


def _shared_bytes(capability: int) -> int:
    return _SHARED_BYTES.get(capability, _LEAST_SHARED_BYTES)
