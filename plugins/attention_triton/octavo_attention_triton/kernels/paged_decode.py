# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Decode: one query token each, over a context in pages, cut into splits that are computed side by side."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.errors import ShapeError
from octavo.interfaces import AttentionParameters, KVCache
from octavo_attention_triton.kernels import dot_dtype
from octavo_attention_triton.kernels.merge_splits import SplitStates, merge_splits
from octavo_attention_triton.tuned import PagedConfig

_LOG2_E = math.log2(math.e)
_TWICE_LOG2_E = tl.constexpr(2 * _LOG2_E)
_NO_WINDOW = 2**31 - 1
_MIN_DOT_ROWS = 16  # of a tensor core's product


# What changes from step to step, or with where a slice of a batch begins, is not compiled in.
_NOT_COMPILED_IN = ["block_table_ptr", "row_requests_ptr", "row_lens_ptr", "num_splits", "window", "stride_table"]


@triton.jit(do_not_specialize=_NOT_COMPILED_IN)
def paged_decode_kernel(
    query_ptr, key_ptr, value_ptr, key_scale_ptr, value_scale_ptr,  # no scales: None
    block_table_ptr, row_requests_ptr, row_lens_ptr,
    out_ptr, acc_ptr, max_ptr, sum_ptr,
    num_kv_heads, num_splits, window,
    scale,  # of scores: log2(e) included, or with a cap divided by it
    cap,  # log2(e) included
    stride_query_row, stride_query_head,
    stride_block, stride_slot, stride_kv_head,  # of keys and of values
    stride_scale_block, stride_scale_slot, stride_table,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """out[r, h] = sum_n p[n] * value[n] / sum_n p[n];  p[n] = 2^(score[n] - max), score[n] = scale * (query . key[n]).

    n runs over the last `window` of row r's row_lens[r] positions, which lie in the blocks of request row_requests[r].
    With a cap the scores are cap * tanh(score). In an 8-bit cache key[n] is to be multiplied with key_scale[n], and
    value[n] with value_scale[n]; the scores and the p[n] are, which are fewer.

    One program owns the GROUP query heads of one KV head of one row, as rows of one tile, and one split of the tiles of
    BLOCK_N positions that the row sees: as many tiles as every other, but for the last ones, which may have none. With
    one split it writes `out`; with more it writes acc, max and sum, to be merged. Positions that the row does not see
    are not read. A row of length 0 gives 0.

    Source: Dao et al. 2023, flash-decoding; Kwon et al. 2023, arXiv:2309.06180, section 4.
    """
    row = tl.program_id(0) // num_kv_heads
    kv_head = tl.program_id(0) % num_kv_heads
    split = tl.program_id(1)
    length = tl.load(row_lens_ptr + row)
    request = tl.load(row_requests_ptr + row).to(tl.int64)

    first = tl.maximum(length - window, 0)
    first_tile = first // BLOCK_N
    last_tile = (length + BLOCK_N - 1) // BLOCK_N
    tiles_per_split = (last_tile - first_tile + num_splits - 1) // num_splits
    begin = tl.minimum(first_tile + split * tiles_per_split, last_tile)
    end = tl.minimum(begin + tiles_per_split, last_tile)

    heads = tl.arange(0, BLOCK_HEADS)
    dims = tl.arange(0, BLOCK_DIM)
    # Rows of the tile that are no heads repeat the last head, and are not stored.
    query_heads = kv_head * GROUP + tl.minimum(heads, GROUP - 1)
    query_ptr += row.to(tl.int64) * stride_query_row
    query_offsets = query_heads[:, None] * stride_query_head + dims[None, :]
    query = tl.load(query_ptr + query_offsets, mask=(dims < HEAD_DIM)[None, :], other=0.0).to(DOT)

    key_ptr += kv_head * stride_kv_head
    value_ptr += kv_head * stride_kv_head
    block_table_ptr += request * stride_table
    largest = tl.full([BLOCK_HEADS], -1e30, tl.float32)
    total = tl.full([BLOCK_HEADS], 0.0, tl.float32)
    acc = tl.full([BLOCK_HEADS, BLOCK_DIM], 0.0, tl.float32)
    for tile in range(begin, end):
        positions = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        seen = (positions >= first) & (positions < length)
        blocks = tl.load(block_table_ptr + positions // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        slots = positions % BLOCK_SIZE
        kv_offsets = (blocks * stride_block + slots * stride_slot)[:, None] + dims[None, :]
        kv_mask = seen[:, None] & (dims < HEAD_DIM)[None, :]

        key = tl.load(key_ptr + kv_offsets, mask=kv_mask, other=0.0).to(DOT)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if key_scale_ptr is not None:
            scale_offsets = blocks * stride_scale_block + slots * stride_scale_slot + kv_head
            scores *= tl.load(key_scale_ptr + scale_offsets, mask=seen, other=0.0)[None, :]
        if HAS_CAP:
            # tanh(|x|) = (1 - t) / (1 + t), t = e^(-2|x|) <= 1: nothing overflows.
            power = tl.exp2(tl.abs(scores) * -_TWICE_LOG2_E)
            scores = tl.where(scores < 0, -cap, cap) * (1.0 - power) / (1.0 + power)
        scores = tl.where(seen[None, :], scores, float("-inf"))

        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_largest[:, None])
        shrunk = tl.exp2(largest - new_largest)
        total = total * shrunk + tl.sum(weights, axis=1)
        if value_scale_ptr is not None:
            scale_offsets = blocks * stride_scale_block + slots * stride_scale_slot + kv_head
            weights *= tl.load(value_scale_ptr + scale_offsets, mask=seen, other=0.0)[None, :]
        value = tl.load(value_ptr + kv_offsets, mask=kv_mask, other=0.0).to(DOT)
        acc = tl.dot(weights.to(DOT), value, acc * shrunk[:, None], input_precision="ieee")
        largest = new_largest

    entries = ((row * num_kv_heads + kv_head) * GROUP + heads).to(tl.int64)
    tile_mask = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    if num_splits == 1:
        out = acc / tl.where(total > 0, total, 1.0)[:, None]
        out_offsets = entries[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=tile_mask)
    else:
        entries = entries * num_splits + split
        tl.store(max_ptr + entries, largest, mask=heads < GROUP)
        tl.store(sum_ptr + entries, total, mask=heads < GROUP)
        tl.store(acc_ptr + entries[:, None] * HEAD_DIM + dims[None, :], acc, mask=tile_mask & (begin < end))


def paged_decode(
    query: Tensor,
    kv_cache: KVCache,
    block_table: Tensor,
    row_requests: Tensor,
    row_lens: Tensor,
    *,
    parameters: AttentionParameters,
    states: SplitStates,
    num_splits: int,
    config: PagedConfig,
) -> Tensor:
    """Launch it, and the merge when there is more than one split.

    Args:
        query: [num_rows, num_heads, head_dim]; a slice of something wider is read where it lies.
        kv_cache: of layout "torch-nhd": key, value, and with 8-bit elements key_scale, value_scale.
        block_table: [num_requests, max_num_blocks] int32.
        row_requests: [num_rows] int32, the row's line of the block table.
        row_lens: [num_rows] int32, the positions before and with the row's own; 0: padding.
        states: written when there is more than one split.

    Returns:
        [num_rows, num_heads, head_dim], contiguous.

    Raises:
        ShapeError: the cache has other heads than the query, or `states` has no room.
    """
    key, value = kv_cache[:2]
    key_scale, value_scale = kv_cache[2:] or (None, None)
    num_rows, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, cached_head_dim = key.shape
    if cached_head_dim != head_dim or num_heads % num_kv_heads or key.stride() != value.stride():
        raise ShapeError(
            "Wanted a query [num_rows, num_heads, head_dim], keys and values [num_blocks, block_size, num_kv_heads, "
            f"head_dim] that lie alike; found {list(query.shape)}, {list(key.shape)} and {list(value.shape)}."
        )
    if query.stride(2) != 1:
        query = query.contiguous()
    group, cap = num_heads // num_kv_heads, parameters.logit_softcap
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    paged_decode_kernel[(num_rows * num_kv_heads, num_splits)](
        query,
        key,
        value,
        key_scale,
        value_scale,
        block_table,
        row_requests,
        row_lens,
        out,
        states.acc,
        states.max,
        states.sum,
        num_kv_heads,
        num_splits,
        _NO_WINDOW if parameters.sliding_window is None else parameters.sliding_window,
        parameters.scale * _LOG2_E if cap is None else parameters.scale / cap,
        0.0 if cap is None else cap * _LOG2_E,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        key.stride(2),
        0 if key_scale is None else key_scale.stride(0),
        0 if key_scale is None else key_scale.stride(1),
        block_table.stride(0),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_HEADS=max(triton.next_power_of_2(group), _MIN_DOT_ROWS),
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        BLOCK_N=config.block_n,
        DOT=dot_dtype(query.dtype),
        HAS_CAP=cap is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if num_splits > 1:
        merge_splits(states, num_splits, out)
    return out


def paged_decode_reference(
    query: Tensor,
    kv_cache: KVCache,
    block_table: Tensor,
    row_requests: Tensor,
    row_lens: Tensor,
    parameters: AttentionParameters,
) -> Tensor:
    """The formula in float64, row by row; arguments as of `paged_decode`."""
    key, value = (cache.double().flatten(0, 1) for cache in kv_cache[:2])  # [slots, num_kv_heads, head_dim]
    if kv_cache[2:]:
        key_scale, value_scale = (scale.double().flatten(0, 1).unsqueeze(-1) for scale in kv_cache[2:])
        key, value = key * key_scale, value * value_scale
    block_size, group = kv_cache[0].shape[1], query.shape[1] // key.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    for row, (request, length) in enumerate(zip(row_requests.tolist(), row_lens.tolist(), strict=True)):
        if length == 0:
            continue
        first = max(length - (parameters.sliding_window or length), 0)
        positions = torch.arange(first, length, device=query.device)
        slots = block_table[request, positions // block_size].long() * block_size + positions % block_size
        keys, values = (cache[slots].repeat_interleave(group, dim=1) for cache in (key, value))
        scores = torch.einsum("hd,nhd->hn", query[row].double(), keys) * parameters.scale
        if (cap := parameters.logit_softcap) is not None:
            scores = cap * torch.tanh(scores / cap)
        out[row] = torch.einsum("hn,nhd->hd", scores.softmax(dim=-1), values)
    return out
