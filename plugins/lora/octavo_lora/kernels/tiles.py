# mypy: disable-error-code="import-untyped"
"""How a batch's rows are cut into tiles, each of one position: on the host, written where kernels read it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from octavo.interfaces import NO_ADAPTER
from octavo.plugins.tuned_data import INTERPRETED
from octavo_lora.placement import RowGroups

_FEW_ROWS, _MANY_ROWS = 16, 32
_FEW = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """Places are those of the rows sorted by position.

    Attributes:
        table: [num_tiles, 3] int32: position, or NO_ADAPTER for a tile without rows; first and last but one place.
        order: [num_rows or more] int32, the row at each place.
        num_rows: of the batch. block_rows: the most that a tile has.
    """

    table: Tensor
    order: Tensor
    num_rows: int
    block_rows: int


def block_rows(num_rows: int) -> int:
    return _FEW_ROWS if num_rows <= _FEW else _MANY_ROWS


def num_tiles(num_rows: int, max_loras: int) -> int:
    """The most there can be: each position may have one that is not full."""
    return max(min(num_rows, -(-num_rows // block_rows(num_rows)) + min(max_loras, num_rows) - 1), 0)


def tile_table(rows: RowGroups, num_rows: int, max_loras: int) -> NDArray[np.int32]:
    """[num_tiles, 3], as in Tiles."""
    size = block_rows(num_rows)
    table = np.full((num_tiles(num_rows, max_loras), 3), NO_ADAPTER, np.int32)
    found = [
        (position, first, min(first + size, end))
        for position, start, end in rows.groups
        for first in range(start, end, size)
    ]
    if found:
        table[: len(found)] = found
    return table


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Of the operands of a product; the interpreter's arithmetic in bfloat16 is wrong."""
    if INTERPRETED and dtype is torch.bfloat16:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def block_ranks(num_ranks: int) -> int:
    """A power of two, as tensor cores take it."""
    return min(max(int(triton.next_power_of_2(num_ranks)), 16), 64)
