# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Prefill: many query tokens of each request over its whole context in pages, in one launch for the step."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.errors import ShapeError
from octavo.interfaces import AttentionParameters, BatchLayout, KVCache
from octavo_attention_triton.kernels import dot_dtype
from octavo_attention_triton.tuned import FlashConfig

_LOG2_E = math.log2(math.e)
_NO_WINDOW = 2**30  # longer than any context, and its sum with a position is still an int32


@triton.jit(
    # What changes from step to step, or where a batch's slice begins, is not compiled in.
    do_not_specialize=["num_requests", "window", "stride_table_request"],
    do_not_specialize_on_alignment=["block_table_ptr", "query_start_loc_ptr", "seq_lens_ptr"],
)
def flash_prefill_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    key_scale_ptr,  # None, as is value_scale_ptr: the cache holds the numbers themselves
    value_scale_ptr,
    block_table_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    out_ptr,
    num_requests,
    window,
    scale,  # of scores, above 0; with a cap over the cap, else times log2(e)
    cap,  # times log2(e)
    stride_query_token,
    stride_query_head,
    stride_block,  # of keys and of values
    stride_slot,
    stride_scale_block,
    stride_scale_slot,
    stride_table_request,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MAX_REQUESTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    DOT: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """out[t, h] = sum_n p[n] * value[n] / sum_n p[n], p[n] = 2^(scale * (score[n] - max score)).

    score[n] = query[t, h] . key[n], and n runs over the last `window` positions up to that of token t. With a cap p[n]
    is of cap * tanh(scale * score[n]); with an 8-bit cache score[n] is times key_scale[n], and value[n] times
    value_scale[n].

    One program owns BLOCK_M // GROUP tokens of one request and the GROUP query heads of one KV head, as rows of a tile,
    the heads of a token side by side. It passes over the request's keys BLOCK_N at a time: first those that all of its
    tokens see, which need no mask, then those at the borders of what they see. Rows past the request's tokens and
    positions past its length are masked; a request of length 0 gives 0.

    Source: Dao 2023, FlashAttention-2, arXiv:2307.08691, algorithm 1; pages: Kwon et al. 2023, arXiv:2309.06180.
    """
    tokens_per_tile: tl.constexpr = BLOCK_M // GROUP
    # Of every request the last tiles have the most keys; the grid begins with them.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)

    # Request i's tiles are at most those from query_start_loc[i] // tokens_per_tile + i to where the next one's begin.
    requests = tl.arange(0, MAX_REQUESTS)
    starts = tl.load(query_start_loc_ptr + requests, mask=requests < num_requests, other=2**30)
    request = tl.sum((starts // tokens_per_tile + requests <= tile).to(tl.int32), axis=0) - 1
    start = tl.load(query_start_loc_ptr + request)
    query_len = tl.load(query_start_loc_ptr + request + 1) - start
    skipped = (tile - start // tokens_per_tile - request) * tokens_per_tile  # tokens of the request in the tiles before
    if skipped >= query_len:
        return
    seq_len = tl.load(seq_lens_ptr + request)

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_DIM)
    tokens = skipped + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    row_mask = ((rows < tokens_per_tile * GROUP) & (tokens < query_len))[:, None] & (dims < HEAD_DIM)[None, :]
    offsets = (start + tokens).to(tl.int64) * stride_query_token + heads * stride_query_head
    query = tl.load(query_ptr + offsets[:, None] + dims[None, :], mask=row_mask, other=0.0).to(DOT)

    positions = seq_len - query_len + tokens
    first = seq_len - query_len + skipped
    last = tl.minimum(first + tokens_per_tile, seq_len) - 1
    # In tiles of keys: those that any row sees, and of them those that every row sees.
    begin = tl.maximum(first - window + 1, 0) // BLOCK_N
    end = tl.cdiv(last + 1, BLOCK_N)
    full_begin = tl.minimum(tl.cdiv(tl.maximum(last - window + 1, 0), BLOCK_N), end)
    full_end = tl.maximum((first + 1) // BLOCK_N, full_begin)

    key_ptr += kv_head * HEAD_DIM
    value_ptr += kv_head * HEAD_DIM
    block_table_ptr += request.to(tl.int64) * stride_table_request
    largest = tl.full([BLOCK_M], -1e20, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    for key_tile in range(full_begin, full_end):
        largest, total, acc = _attend(
            largest, total, acc, query, positions, key_tile, seq_len, window, scale, cap, kv_head,
            key_ptr, value_ptr, key_scale_ptr, value_scale_ptr, block_table_ptr,
            stride_block, stride_slot, stride_scale_block, stride_scale_slot,
            HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_DIM, DOT, HAS_CAP, MASKED=False,
        )  # fmt: skip
    for border in range((full_begin - begin) + (end - full_end)):
        key_tile = begin + border + tl.where(border < full_begin - begin, 0, full_end - full_begin)
        largest, total, acc = _attend(
            largest, total, acc, query, positions, key_tile, seq_len, window, scale, cap, kv_head,
            key_ptr, value_ptr, key_scale_ptr, value_scale_ptr, block_table_ptr,
            stride_block, stride_slot, stride_scale_block, stride_scale_slot,
            HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_DIM, DOT, HAS_CAP, MASKED=True,
        )  # fmt: skip

    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    num_heads = tl.num_programs(1) * GROUP
    out_offsets = ((start + tokens).to(tl.int64) * num_heads + heads) * HEAD_DIM
    tl.store(out_ptr + out_offsets[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=row_mask)


@triton.jit
def _attend(
    largest, total, acc, query, positions, key_tile, seq_len, window, scale, cap, kv_head,
    key_ptr, value_ptr, key_scale_ptr, value_scale_ptr, block_table_ptr,
    stride_block, stride_slot, stride_scale_block, stride_scale_slot,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr,
    DOT: tl.constexpr, HAS_CAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One more tile of keys: (largest score, sum of weights, sum of weighted values) of each row, with theirs."""
    keys = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_DIM)
    kv_mask = (dims < HEAD_DIM)[None, :]
    if MASKED:
        kv_mask = kv_mask & (keys < seq_len)[:, None]
        blocks = tl.load(block_table_ptr + keys // BLOCK_SIZE, mask=keys < seq_len, other=0).to(tl.int64)
    else:
        blocks = tl.load(block_table_ptr + keys // BLOCK_SIZE).to(tl.int64)
    slots = keys % BLOCK_SIZE
    kv_offsets = (blocks * stride_block + slots * stride_slot)[:, None] + dims[None, :]

    key = tl.load(key_ptr + kv_offsets, mask=kv_mask, other=0.0).to(DOT)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    if key_scale_ptr is not None:
        scale_offsets = blocks * stride_scale_block + slots * stride_scale_slot + kv_head
        scores *= tl.load(key_scale_ptr + scale_offsets, mask=keys < seq_len, other=0.0)[None, :]
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (e^2x + 1), whose power may overflow to infinity or vanish: both limits are right.
        scores = cap * (1.0 - 2.0 / (tl.exp2(scores * (scale * (2 * 1.4426950408889634))) + 1.0))
        scale = 1.0
    if MASKED:
        seen = (keys[None, :] <= positions[:, None]) & (keys[None, :] > positions[:, None] - window)
        # Far below where `largest` starts: the weight is 0 even in a row that sees none of these keys.
        scores = tl.where(seen, scores, -1e30)

    new_largest = tl.maximum(largest, tl.max(scores, axis=1))
    # Scaled here, the product is part of a multiply-add.
    weights = tl.exp2(scores * scale - (new_largest * scale)[:, None])
    shrunk = tl.exp2((largest - new_largest) * scale)
    total = total * shrunk + tl.sum(weights, axis=1)
    if value_scale_ptr is not None:
        weights *= tl.load(value_scale_ptr + scale_offsets, mask=keys < seq_len, other=0.0)[None, :]
    value = tl.load(value_ptr + kv_offsets, mask=kv_mask, other=0.0).to(DOT)
    acc = tl.dot(weights.to(DOT), value, acc * shrunk[:, None], input_precision="ieee")
    return new_largest, total, acc


def flash_prefill(
    query: Tensor,
    kv_cache: KVCache,
    layout: BatchLayout,
    *,
    parameters: AttentionParameters,
    max_num_requests: int,
    config: FlashConfig,
) -> Tensor:
    """Launch it. The step's keys and values are in the cache already.

    Args:
        query: [num_tokens, num_heads, head_dim], rotated; a slice of something wider is read where it lies.
        kv_cache: of layout "torch-nhd": key, value, and with 8-bit elements key_scale, value_scale.
        layout: of its host data only the counts decide what is launched, and they are upper bounds.
        max_num_requests: of any step, so that their number is not compiled in.

    Returns:
        [num_tokens, num_heads, head_dim], contiguous.

    Raises:
        ShapeError: the cache has other heads than the query.
    """
    key, value = kv_cache[:2]
    key_scale, value_scale = kv_cache[2:] or (None, None)
    num_tokens, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, cached_head_dim = key.shape
    if cached_head_dim != head_dim or num_heads % num_kv_heads or key.stride() != value.stride():
        raise ShapeError(
            f"Wanted a query [num_tokens, num_heads, head_dim] over keys and values [num_blocks, block_size, "
            f"num_kv_heads, head_dim] that lie alike; found {list(query.shape)} over {list(key.shape)}, "
            f"{list(value.shape)}."
        )
    if query.stride(2) != 1:
        query = query.contiguous()
    group, cap = num_heads // num_kv_heads, parameters.logit_softcap
    block_m = max(config.block_m, triton.next_power_of_2(group))
    num_tiles = num_tokens // (block_m // group) + layout.num_requests
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    flash_prefill_kernel[(num_tiles, num_kv_heads)](
        query,
        key,
        value,
        key_scale,
        value_scale,
        layout.block_table,
        layout.query_start_loc,
        layout.seq_lens,
        out,
        layout.num_requests,
        _NO_WINDOW if parameters.sliding_window is None else parameters.sliding_window,
        parameters.scale * _LOG2_E if cap is None else parameters.scale / cap,
        0.0 if cap is None else cap * _LOG2_E,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        0 if key_scale is None else key_scale.stride(0),
        0 if key_scale is None else key_scale.stride(1),
        layout.block_table.stride(0),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        MAX_REQUESTS=triton.next_power_of_2(max_num_requests),
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        DOT=dot_dtype(query.dtype),
        HAS_CAP=cap is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def flash_prefill_reference(
    query: Tensor, kv_cache: KVCache, layout: BatchLayout, parameters: AttentionParameters
) -> Tensor:
    """The formula in float64 on the CPU, one request at a time: arguments and result as of `flash_prefill`."""
    key, value = (buffer.flatten(0, 1).cpu().double() for buffer in kv_cache[:2])
    if len(kv_cache) > 2:
        key_scale, value_scale = (buffer.flatten(0, 1).cpu().double() for buffer in kv_cache[2:])
        key, value = key * key_scale[..., None], value * value_scale[..., None]
    group = query.shape[1] // key.shape[1]
    bounds, seq_lens = layout.query_start_loc.tolist(), layout.seq_lens.tolist()
    out = torch.zeros(query.shape, dtype=torch.float64)
    for request, seq_len in enumerate(seq_lens):
        if seq_len == 0:
            continue
        start, end = bounds[request], bounds[request + 1]
        keys = torch.arange(seq_len)
        slots = (
            layout.block_table[request].cpu()[keys // layout.block_size] * layout.block_size + keys % layout.block_size
        )
        its_keys, its_values = (cache[slots].repeat_interleave(group, dim=1) for cache in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[start:end].cpu().double(), its_keys) * parameters.scale
        if (cap := parameters.logit_softcap) is not None:
            scores = cap * torch.tanh(scores / cap)
        behind = torch.arange(seq_len - (end - start), seq_len)[:, None] - keys  # how far each key is
        hidden = (behind < 0) | (behind >= (parameters.sliding_window or _NO_WINDOW))
        weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
        out[start:end] = torch.einsum("hqk,khd->qhd", weights, its_values)
    return out
