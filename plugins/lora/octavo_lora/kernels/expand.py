# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""(y + h @ B.T) * scale + shift, each row with its own adapter's, of all parts of a stacked linear in one launch."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_lora.kernels.tiles import Tiles, block_ranks
from octavo_lora.placement import Slot


@triton.jit(do_not_specialize=["num_splits", "num_rows", "table_width"])
def expand_kernel(
    shrunk_ptr,
    b_ptr,
    scale_ptr,
    shift_ptr,
    table_ptr,
    tiles_ptr,
    order_ptr,
    y_ptr,
    num_splits,
    num_rows,
    num_ranks,
    max_rank,
    out_features,
    table_width,
    stride_y,
    PRECISION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """y[order[i], n] = (y[order[i], n] + sum_r h[i, r] * b[position, r, n]) * scale[position, n] + shift[position, n].

    h[i, r] = sum_s shrunk[s, i, start + r] in the order of s. One program owns one tile of places i and BLOCK_OUTPUTS
    outputs n of one part; it ends at once where no adapter changes the part. The table says a part's start, rank r,
    whether it has a scale or a shift (else 1 and 0, not read), and its outputs, which begin and end at multiples of
    ALIGNMENT.
    """
    tile = tiles_ptr + tl.program_id(1) * 3
    position = tl.load(tile)
    if position < 0:
        return
    part = table_ptr + position * table_width + 2 + tl.program_id(2) * 5
    start = tl.load(part)
    num_part_ranks = tl.load(part + 1)
    flags = tl.load(part + 2)
    first_output = tl.multiple_of(tl.load(part + 3), ALIGNMENT)
    output = first_output + tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    is_output = output < tl.multiple_of(tl.load(part + 4), ALIGNMENT)
    if (num_part_ranks == 0) & (flags == 0):
        return
    place = tl.load(tile + 1) + tl.arange(0, BLOCK_ROWS)
    is_row = place < tl.load(tile + 2)
    row = tl.load(order_ptr + place, mask=is_row, other=0)
    mask = is_row[:, None] & is_output[None, :]
    y = y_ptr + row.to(tl.int64)[:, None] * stride_y + output[None, :]
    position = position.to(tl.int64)
    outputs = position * out_features + output
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
    for first in range(0, num_part_ranks, BLOCK_RANKS):
        rank = first + tl.arange(0, BLOCK_RANKS)
        is_rank = rank < num_part_ranks
        h = tl.zeros((BLOCK_ROWS, BLOCK_RANKS), tl.float32)
        for split in range(num_splits):
            places = (split * num_rows + place).to(tl.int64)[:, None] * num_ranks
            h += tl.load(
                shrunk_ptr + places + (start + rank)[None, :], mask=is_row[:, None] & is_rank[None, :], other=0.0
            )
        b_rows = b_ptr + (position * max_rank + rank)[:, None] * out_features
        b = tl.load(b_rows + output[None, :], mask=is_output[None, :] & is_rank[:, None], other=0.0)
        total = tl.dot(h, b.to(tl.float32), total, input_precision=PRECISION)
    total += tl.load(y, mask=mask, other=0.0).to(tl.float32)
    total *= tl.load(scale_ptr + outputs, mask=is_output & ((flags & 1) != 0), other=1.0)[None, :]
    total += tl.load(shift_ptr + outputs, mask=is_output & ((flags & 2) != 0), other=0.0)[None, :]
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=mask)


def expand(shrunk: Tensor, slot: Slot, output: Tensor, tiles: Tiles) -> None:
    """Launch it.

    Args:
        shrunk: [num_splits, num_rows, num_ranks] float32, by place; of `shrink` or `gather`.
        output: [num_rows, out_features], rows contiguous; changed in place.
    """
    num_splits, num_rows, num_ranks = shrunk.shape
    _, max_rank, out_features = slot.b.shape
    widest = max(part.out_features for part in slot.parts)
    # An adapter of 16 bits is exact in tf32, which keeps three bits more of h than bfloat16 would.
    exact = output.dtype is torch.float32
    outputs = 64 if exact else 2048 // tiles.block_rows  # the most that spill nothing
    expand_kernel[(triton.cdiv(widest, outputs), len(tiles.table), len(slot.parts))](
        shrunk,
        slot.b,
        slot.scale,
        slot.shift,
        slot.table,
        tiles.table,
        tiles.order,
        output,
        num_splits,
        num_rows,
        num_ranks,
        max_rank,
        out_features,
        slot.table.stride(0),
        output.stride(0),
        ALIGNMENT=math.gcd(16, *(part.out_features for part in slot.parts)),
        PRECISION="ieee" if exact else "tf32",
        BLOCK_ROWS=tiles.block_rows,
        BLOCK_RANKS=min(block_ranks(max_rank), 32),
        BLOCK_OUTPUTS=outputs,
        num_warps=4,
        num_stages=1,
    )
