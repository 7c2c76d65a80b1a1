"""Writing this step's keys and values to the paged cache: the first launch of every layer's attention."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from octavo.errors import ShapeError
from octavo.interfaces.attention import KVCache
from octavo.plugins.tuned_data import INTERPRETED
from octavo_attention_triton.kernels.write_kv import write_kv_kernel

# 8 tokens of 128 elements are 16 bytes of 16-bit elements for each of 128 threads; the interpreter pays by the program.
_BLOCK_TOKENS = 64 if INTERPRETED else 8


def write_kv(key: Tensor, value: Tensor, kv_cache: KVCache, slot_mapping: Tensor) -> None:
    """Write this step's keys and values to the cache, in place.

    Args:
        key: [num_tokens, num_kv_heads, head_dim], rotated; may be a slice of a wider tensor.
        value: like `key`.
        kv_cache: of layout "torch-nhd": (key, value), and of an fp8 cache (key_scale, value_scale) behind them.
        slot_mapping: [num_tokens] int64; block_id * block_size + offset; PAD_SLOT is skipped.

    Raises:
        ShapeError: `key` or `value` and the cache differ in num_kv_heads or head_dim.

    Source: Kwon et al. 2023, PagedAttention, arXiv:2309.06180, section 4.
    """
    _launch(None, key, value, None, kv_cache, slot_mapping)


def rotate_and_write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: tuple[Tensor, Tensor],
    kv_cache: KVCache,
    slot_mapping: Tensor,
) -> Tensor:
    """Rotate query and key, and write key and value to the cache, in one launch.

    Args:
        query: [num_tokens, num_heads, head_dim], not rotated; may be a slice of a wider tensor.
        key, value, kv_cache, slot_mapping: as for `write_kv`, the key not rotated.
        rotary: (cos, sin) of each token, [num_tokens, 1, rotary_dim] each, as `octavo.interfaces.rotate` reads them.

    Returns:
        The rotated query, a tensor of its own.

    Raises:
        ShapeError: as `write_kv`.

    Source: Su et al. 2021, arXiv:2104.09864.
    """
    rotated = _launch(query, key, value, rotary, kv_cache, slot_mapping)
    assert rotated is not None
    return rotated


def _launch(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    kv_cache: KVCache,
    slot_mapping: Tensor,
) -> Tensor | None:
    """Without a query and its rotary the keys are rotated already."""
    key_cache, value_cache = kv_cache[:2]
    key_scale, value_scale = kv_cache[2:] or (None, None)
    if key.shape[1:] != key_cache.shape[2:] or value.shape != key.shape:
        raise ShapeError(
            f"key and value must be [num_tokens, {key_cache.shape[2]}, {key_cache.shape[3]}], as the cache has "
            f"[num_kv_heads, head_dim]; they are {list(key.shape)} and {list(value.shape)}."
        )
    num_tokens, num_kv_heads, head_dim = key.shape
    key, value = _heads_together(key), _heads_together(value)
    cos = sin = rotated = None
    num_heads = num_kv_heads
    if query is not None and rotary is not None:
        query = _heads_together(query)
        cos, sin = rotary[0].contiguous(), rotary[1].contiguous()
        rotated = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        num_heads += query.shape[1]
    write_kv_kernel[(triton.cdiv(num_tokens, _BLOCK_TOKENS), num_heads)](
        query,
        key,
        value,
        cos,
        sin,
        rotated,
        key_cache,
        value_cache,
        key_scale,
        value_scale,
        slot_mapping,
        num_tokens,
        num_kv_heads,
        0 if query is None else query.stride(0),
        key.stride(0),
        value.stride(0),
        0 if rotated is None else rotated.stride(0),
        key_cache.stride(0),
        key_cache.stride(1),
        0 if key_scale is None else key_scale.stride(0),
        0 if key_scale is None else key_scale.stride(1),
        HEAD_DIM=head_dim,
        HEAD_DIM_TILE=triton.next_power_of_2(head_dim),
        ROTARY_DIM=0 if cos is None else cos.shape[-1],
        BLOCK_SIZE=key_cache.shape[1],
        BLOCK_TOKENS=_BLOCK_TOKENS,
        num_warps=4,
    )
    return rotated


def _heads_together(x: Tensor) -> Tensor:
    """x [num_tokens, heads, head_dim] with a token's heads in one piece, as views of a linear's output have them."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
