# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""What a shrink is of one-hot rows: an embedding's row of A, each token with its own adapter's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_lora.kernels.tiles import Tiles, block_ranks


@triton.jit(do_not_specialize=["table_width"])
def gather_kernel(
    token_ids_ptr,
    a_ptr,
    table_ptr,
    tiles_ptr,
    order_ptr,
    out_ptr,
    vocab_size,
    max_rank,
    table_width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
):
    """out[i, r] = a[position, token_ids[order[i]], r], for the ranks r of the position's adapter.

    One program owns one tile of places i and BLOCK_RANKS ranks r, and leaves `out` as it is where there is no adapter.
    """
    tile = tiles_ptr + tl.program_id(0) * 3
    position = tl.load(tile)
    if position < 0:
        return
    rank = tl.program_id(1) * BLOCK_RANKS + tl.arange(0, BLOCK_RANKS)
    place = tl.load(tile + 1) + tl.arange(0, BLOCK_ROWS)
    is_row = place < tl.load(tile + 2)
    token = tl.load(token_ids_ptr + tl.load(order_ptr + place, mask=is_row, other=0), mask=is_row, other=0)
    mask = is_row[:, None] & (rank < tl.load(table_ptr + position * table_width))[None, :]
    a = a_ptr + (position.to(tl.int64) * vocab_size + token)[:, None] * max_rank + rank[None, :]
    tl.store(
        out_ptr + place.to(tl.int64)[:, None] * max_rank + rank[None, :], tl.load(a, mask=mask, other=0.0), mask=mask
    )


def gather(token_ids: Tensor, a: Tensor, table: Tensor, tiles: Tiles) -> Tensor:
    """Launch it: token_ids [num_rows] int64, a [max_loras, vocab_size, max_rank] -> as `shrink`, in one split."""
    vocab_size, max_rank = a.shape[1:]
    out = torch.empty(1, tiles.num_rows, max_rank, dtype=torch.float32, device=a.device)
    ranks = block_ranks(max_rank)
    gather_kernel[(len(tiles.table), triton.cdiv(max_rank, ranks))](
        token_ids,
        a,
        table,
        tiles.table,
        tiles.order,
        out,
        vocab_size,
        max_rank,
        table.stride(0),
        BLOCK_ROWS=tiles.block_rows,
        BLOCK_RANKS=ranks,
        num_warps=4,
    )
    return out
