"""TritonLora: two launches a linear, shrink and expand, for rows of all adapters; in CUDA graphs, too."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.interfaces import NO_ADAPTER, LoraLimits
from octavo_lora.kernels.expand import expand
from octavo_lora.kernels.gather import gather
from octavo_lora.kernels.shrink import shrink
from octavo_lora.kernels.tiles import Tiles, block_rows, num_tiles, tile_table
from octavo_lora.placement import PlacedLora, RowGroups, Slot, group_rows


class TritonLora(PlacedLora):
    """What kernels read of a plan lies where it lay in every step, and grids depend on the number of rows alone.

    Sums are in float32, and so is what is between the two launches; the output is rounded once.
    """

    def __init__(self, limits: LoraLimits) -> None:
        super().__init__(limits)
        rows = limits.max_num_rows
        most = max(num_tiles(many, limits.max_loras) for many in {rows, min(rows, 512)})
        self._max_tiles = -(-most // 4) * 4  # so that what lies behind is aligned
        # Tiles, the order of rows, and each row's position: one copy from the host writes them all.
        self._state = torch.full((3 * self._max_tiles + 2 * rows,), NO_ADAPTER, dtype=torch.int32, device=limits.device)
        self._tiles = self._view(0)
        self._rows = RowGroups(order=np.empty(0, np.int64), groups=())

    def _view(self, num_rows: int) -> Tiles:
        table = self._state[: 3 * self._max_tiles]
        order = self._state[3 * self._max_tiles :][: self.limits.max_num_rows]
        count = num_tiles(num_rows, self.limits.max_loras)
        return Tiles(table=table.view(-1, 3)[:count], order=order, num_rows=num_rows, block_rows=block_rows(num_rows))

    @property
    def _positions(self) -> Tensor:
        return self._state[-self.limits.max_num_rows :][: self._tiles.num_rows]

    def plan(self, positions: NDArray[np.int32] | None, *, captured: bool = False) -> None:
        self.active = positions is not None
        if positions is None:
            return
        self._rows = group_rows(positions)
        self.active = captured or bool(self._rows.groups)
        num_rows = len(positions)
        self._tiles = self._view(num_rows)
        state = np.full(self._state.shape, NO_ADAPTER, np.int32)
        table, order, row_positions = np.split(state, np.cumsum([3 * self._max_tiles, self.limits.max_num_rows]))
        tiles = tile_table(self._rows, num_rows, self.limits.max_loras)
        table[: tiles.size] = tiles.reshape(-1)
        order[: len(self._rows.order)] = self._rows.order
        row_positions[:num_rows] = positions
        host = torch.from_numpy(state)
        # Pinned anew in each plan: torch keeps the memory until the copy has been made.
        self._state.copy_(host.pin_memory() if self._state.is_cuda else host, non_blocking=self._state.is_cuda)

    def apply(self, slot: object, x: Tensor, output: Tensor) -> Tensor:
        assert isinstance(slot, Slot)
        if slot.saved is not None:
            self._replace(slot, x, output)
        x = x if x.stride(1) == 1 else x.contiguous()
        expand(shrink(x, slot.a, slot.table, self._tiles), slot, output, self._tiles)
        return output

    def _replace(self, slot: Slot, x: Tensor, output: Tensor) -> None:
        """By heads of adapters' own; the head is in no graph."""
        assert slot.saved is not None
        for position, start, end in self._rows.groups:
            if slot.is_saved[position]:
                rows = self._tiles.order[start:end]
                output.index_copy_(0, rows.long(), x.index_select(0, rows) @ slot.saved[position].t())

    def apply_embedding(self, slot: object, token_ids: Tensor, output: Tensor) -> Tensor:
        assert isinstance(slot, Slot)
        if slot.saved is not None:
            position = self._positions.clamp(min=0).long()
            is_saved = (self._positions >= 0) & (slot.table[:, 1][position] != 0)
            output = torch.where(is_saved[:, None], slot.saved[position, token_ids], output)
        expand(gather(token_ids, slot.a, slot.table, self._tiles), slot, output, self._tiles)
        return output
