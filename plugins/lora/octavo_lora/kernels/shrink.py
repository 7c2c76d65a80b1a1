# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""x @ A.T, each row with its own adapter's A, of all parts of a stacked linear in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_lora.kernels.tiles import Tiles, block_ranks, dot_dtype

_PROGRAMS = 512
_MOST_SPLITS = 16


@triton.jit(do_not_specialize=["num_rows", "blocks_per_split", "table_width"])
def shrink_kernel(
    x_ptr,
    a_ptr,
    table_ptr,
    tiles_ptr,
    order_ptr,
    out_ptr,
    num_rows,
    in_features,
    blocks_per_split,
    num_ranks,
    table_width,
    stride_x,
    DOT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """out[s, i, r] = sum_{k in s} x[order[i], k] * a[position, r, k], for the rows r that the position's adapter uses.

    One program owns one tile of places i, BLOCK_RANKS ranks r and one split s of the inputs k. It leaves `out` as it is
    where there is no adapter, or it has fewer ranks.
    """
    tile = tiles_ptr + tl.program_id(0) * 3
    position = tl.load(tile)
    if position < 0:
        return
    used = tl.load(table_ptr + position * table_width)
    if tl.program_id(1) * BLOCK_RANKS >= used:
        return
    place = tl.load(tile + 1) + tl.arange(0, BLOCK_ROWS)
    is_row = place < tl.load(tile + 2)
    row = tl.load(order_ptr + place, mask=is_row, other=0)
    rank = tl.program_id(1) * BLOCK_RANKS + tl.arange(0, BLOCK_RANKS)
    split = tl.program_id(2)
    first = split * blocks_per_split
    x_rows = x_ptr + row.to(tl.int64)[:, None] * stride_x
    a_rows = a_ptr + (position.to(tl.int64) * num_ranks + rank)[None, :] * in_features
    total = tl.zeros((BLOCK_ROWS, BLOCK_RANKS), tl.float32)
    for block in range(first, tl.minimum(first + blocks_per_split, tl.cdiv(in_features, BLOCK_INPUTS))):
        column = block * BLOCK_INPUTS + tl.arange(0, BLOCK_INPUTS)
        is_input = column < in_features
        x = tl.load(x_rows + column[None, :], mask=is_row[:, None] & is_input[None, :], other=0.0)
        a = tl.load(a_rows + column[:, None], mask=(rank < used)[None, :] & is_input[:, None], other=0.0)
        total = tl.dot(x.to(DOT), a.to(DOT), total, input_precision="ieee")
    out = out_ptr + (split * num_rows + place).to(tl.int64)[:, None] * num_ranks + rank[None, :]
    tl.store(out, total, mask=is_row[:, None] & (rank < used)[None, :])


def shrink(x: Tensor, a: Tensor, table: Tensor, tiles: Tiles) -> Tensor:
    """Launch it.

    Args:
        x: [num_rows, in_features], rows contiguous.
        a: [max_loras, num_ranks, in_features]. table: as in Slot.

    Returns:
        [num_splits, num_rows, num_ranks] float32, to be summed over splits; by place, and undefined where not written.
        The number of splits depends on sizes alone.
    """
    num_ranks, in_features = a.shape[1:]
    ranks = block_ranks(num_ranks)
    inputs = 32 if x.dtype is torch.float32 else 128 if tiles.block_rows * ranks <= 16 * 32 else 64
    num_blocks = triton.cdiv(num_ranks, ranks)
    most = max(min(_PROGRAMS // (len(tiles.table) * num_blocks), _MOST_SPLITS, in_features // (2 * inputs)), 1)
    input_blocks = triton.cdiv(in_features, inputs)
    blocks_per_split = triton.cdiv(input_blocks, most)
    num_splits = triton.cdiv(input_blocks, blocks_per_split)
    out = torch.empty(num_splits, tiles.num_rows, num_ranks, dtype=torch.float32, device=x.device)
    shrink_kernel[(len(tiles.table), num_blocks, num_splits)](
        x,
        a,
        table,
        tiles.table,
        tiles.order,
        out,
        tiles.num_rows,
        in_features,
        blocks_per_split,
        num_ranks,
        table.stride(0),
        x.stride(0),
        DOT=dot_dtype(x.dtype),
        BLOCK_ROWS=tiles.block_rows,
        BLOCK_RANKS=ranks,
        BLOCK_INPUTS=inputs,
        num_warps=4 if tiles.block_rows == 16 else 8,
        num_stages=3,
    )
    return out
