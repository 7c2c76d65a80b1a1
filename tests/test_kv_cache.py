"""How many KV blocks a budget gives, and what is said when it is too small."""

from __future__ import annotations

import re

import pytest
import torch

from octavo.errors import ConfigError
from octavo.interfaces import KVBuffer, KVLayout
from octavo.runner import kv_cache
from octavo.runner.kv_cache import num_kv_blocks

BLOCK_SIZE, NUM_LAYERS = 16, 3
LAYOUT = KVLayout(
    name="two buffers",
    buffers=tuple(
        KVBuffer(name=name, block_shape=(BLOCK_SIZE, 2, 8), dtype=torch.float16) for name in ("key", "value")
    ),
)
BYTES_PER_BLOCK = 2 * (16 * 2 * 8) * 2 * NUM_LAYERS


def blocks(
    kv_cache_memory_bytes: int | None, *, min_tokens: int = 1, max_useful_blocks: int = 10**6, device: str = "cpu"
) -> int:
    return num_kv_blocks(
        LAYOUT,
        NUM_LAYERS,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        max_useful_blocks=max_useful_blocks,
        min_tokens=min_tokens,
        block_size=BLOCK_SIZE,
        device=device,
    )


def test_a_budget_gives_the_blocks_that_fit_in_all_layers() -> None:
    assert blocks(10 * BYTES_PER_BLOCK) == 10
    assert blocks(10 * BYTES_PER_BLOCK - 1) == 9


def test_no_more_blocks_than_requests_could_use() -> None:
    assert blocks(10**12, max_useful_blocks=7) == 7


def test_without_a_budget_memory_that_is_free_sizes_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_free_bytes", lambda device: {"cpu": 4, "cuda": 5}[device] * BYTES_PER_BLOCK)
    assert (blocks(None), blocks(None, device="cuda")) == (4, 5)


def test_a_budget_too_small_is_refused_with_numbers_that_work() -> None:
    with pytest.raises(ConfigError) as caught:
        blocks(4 * BYTES_PER_BLOCK, min_tokens=100)
    found = re.search(r"to at least ([\d,]+) or lower max_model_len to at most (\d+)\.$", str(caught.value))
    assert found is not None
    memory, length = int(found[1].replace(",", "")), int(found[2])
    assert blocks(memory, min_tokens=100) == 7
    assert blocks(4 * BYTES_PER_BLOCK, min_tokens=length) == 4
    for too_little, too_long in ((memory - 1, 100), (4 * BYTES_PER_BLOCK, length + 1)):
        with pytest.raises(ConfigError):
            blocks(too_little, min_tokens=too_long)


def test_a_budget_without_one_block_is_not_told_to_serve_no_tokens() -> None:
    with pytest.raises(ConfigError, match=rf"to at least {BYTES_PER_BLOCK:,}\.$"):
        blocks(BYTES_PER_BLOCK - 1)
