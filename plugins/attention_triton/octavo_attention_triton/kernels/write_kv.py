# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Rotates queries and keys and writes keys and values to the paged cache, in one launch.

Its launchers are in octavo_attention_triton/cache.py, its formula in plain torch is `octavo.interfaces.rotate`.
"""

from __future__ import annotations

import triton
import triton.language as tl


# What a step's size, or a slice that begins in its middle, is divisible by must not compile another kernel.
@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["slot_mapping_ptr"])
def write_kv_kernel(
    query_ptr, key_ptr, value_ptr,
    cos_ptr, sin_ptr, rotated_query_ptr,  # None: nothing is rotated
    key_cache_ptr, value_cache_ptr,
    key_scale_ptr, value_scale_ptr,  # None: the cache holds the numbers themselves
    slot_mapping_ptr,
    num_tokens, num_kv_heads,
    stride_query, stride_key, stride_value, stride_rotated_query,  # of a token; its heads are in one piece
    stride_block, stride_slot, stride_scale_block, stride_scale_slot,  # of the cache and its scales
    HEAD_DIM: tl.constexpr, HEAD_DIM_TILE: tl.constexpr, ROTARY_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """cache[slot[t]] = rotate(key[t]), value[t];  rotated_query[t] = rotate(query[t]).

    One program takes BLOCK_TOKENS tokens of one head: of the grid's second axis first the key and value heads, then the
    query heads, if they are rotated. Tokens past num_tokens are masked, those of negative slots not written.
    """
    head = tl.program_id(1)
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    dim = tl.arange(0, HEAD_DIM_TILE)[None, :]
    valid = tokens < num_tokens
    inside = valid[:, None] & (dim < HEAD_DIM)
    rows = tokens[:, None].to(tl.int64)
    if head < num_kv_heads:
        slots = tl.load(slot_mapping_ptr + tokens, mask=valid, other=-1)
        written = slots >= 0
        block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        at = (block * stride_block + offset * stride_slot + head * HEAD_DIM)[:, None] + dim
        scale_at = block * stride_scale_block + offset * stride_scale_slot + head
        key = _rotated(key_ptr + head * HEAD_DIM, cos_ptr, sin_ptr, rows, stride_key, inside, dim, ROTARY_DIM)
        _store(key, key_cache_ptr, key_scale_ptr, at, scale_at, written, inside)
        value = _rotated(value_ptr + head * HEAD_DIM, None, None, rows, stride_value, inside, dim, ROTARY_DIM)
        _store(value, value_cache_ptr, value_scale_ptr, at, scale_at, written, inside)
    elif query_ptr is not None:
        skipped = (head - num_kv_heads) * HEAD_DIM
        query = _rotated(query_ptr + skipped, cos_ptr, sin_ptr, rows, stride_query, inside, dim, ROTARY_DIM)
        out_ptr = rotated_query_ptr + skipped + rows * stride_rotated_query + dim
        tl.store(out_ptr, query.to(rotated_query_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rotated(x_ptr, cos_ptr, sin_ptr, rows, stride_row, inside, dim, ROTARY_DIM: tl.constexpr):
    """x * cos + swap_halves(x) * sin of the first ROTARY_DIM elements, x itself of those behind them; float32."""
    x = tl.load(x_ptr + rows * stride_row + dim, mask=inside, other=0.0).to(tl.float32)
    if cos_ptr is not None:
        turned = inside & (dim < ROTARY_DIM)
        swapped = tl.where(dim < ROTARY_DIM // 2, dim + ROTARY_DIM // 2, dim - ROTARY_DIM // 2)
        other_half = tl.load(x_ptr + rows * stride_row + swapped, mask=turned, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + rows * ROTARY_DIM + dim, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + rows * ROTARY_DIM + dim, mask=turned, other=0.0).to(tl.float32)
        x = x * cos + other_half * sin
    return x


@triton.jit
def _store(x, cache_ptr, scale_ptr, at, scale_at, written, inside):
    """Into the cache; with scales as x / scale, where scale = max|x| / 448, and 448 is the largest number of e4m3."""
    if scale_ptr is not None:
        scale = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-30) / 448.0
        tl.store(scale_ptr + scale_at, scale, mask=written)
        x = _rounded_to_e4m3(tl.clamp(x / scale[:, None], -448.0, 448.0))
    tl.store(cache_ptr + at, x.to(cache_ptr.dtype.element_ty), mask=inside & written[:, None])


@triton.jit
def _rounded_to_e4m3(x):
    """The nearest number with three bits of mantissa, ties to even; what is subnormal in e4m3 stays as it is.

    A GPU's conversion would do: Triton's interpreter loses the carry from the mantissa into the exponent.
    """
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    return tl.where(tl.abs(x) >= 0.015625, rounded.to(tl.float32, bitcast=True), x)
