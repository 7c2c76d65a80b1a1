"""TorchLora: grouped products of torch, on any device; what other backends are compared with."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.interfaces import LoraLimits
from octavo_lora.placement import SCALED, SHIFTED, PlacedLora, RowGroups, Slot, group_rows

_NO_ROWS = RowGroups(order=np.empty(0, np.int64), groups=())


class TorchLora(PlacedLora):
    """Rows are sorted by position once a step; each position's are then two products, by its own ranks.

    torch sums the products in float32. What is between the two, x @ A.T, is rounded to the model's dtype; the second is
    added to the output before that is rounded, once. Where there is a scale or a shift, the second is all in float32.
    """

    def __init__(self, limits: LoraLimits) -> None:
        super().__init__(limits)
        self._rows = _NO_ROWS
        self._order: Tensor | None = None  # None: rows lie as they should

    def plan(self, positions: NDArray[np.int32] | None, *, captured: bool = False) -> None:
        assert not captured, "what is launched depends on which rows have an adapter, so no CUDA graph can hold it"
        self._rows = _NO_ROWS if positions is None else group_rows(positions)
        self.active = bool(self._rows.groups)
        if positions is None:
            return
        order = self._rows.order
        in_order = len(order) == len(positions) and bool((order[1:] > order[:-1]).all())
        self._order = None if in_order else torch.from_numpy(order).to(self.limits.device)

    def apply(self, slot: object, x: Tensor, output: Tensor) -> Tensor:
        assert isinstance(slot, Slot)
        if not any(slot.changes[position] or slot.is_saved[position] for position, _, _ in self._rows.groups):
            return output
        if self._order is None:
            self._apply_sorted(slot, x, output)
            return output
        changed = output.index_select(0, self._order)
        self._apply_sorted(slot, x.index_select(0, self._order), changed)
        return output.index_copy_(0, self._order, changed)

    def _apply_sorted(self, slot: Slot, x: Tensor, output: Tensor) -> None:
        for position, start, end in self._rows.groups:
            rows, changed = x[start:end], output[start:end]
            if slot.is_saved[position]:
                assert slot.saved is not None
                torch.mm(rows, slot.saved[position].t(), out=changed)
            if slot.changes[position]:
                expand(slot, position, rows @ slot.a[position, : slot.num_rows(position)].t(), changed)

    def apply_embedding(self, slot: object, token_ids: Tensor, output: Tensor) -> Tensor:
        assert isinstance(slot, Slot)
        order = self._order
        if order is None:
            order = torch.arange(len(token_ids), device=token_ids.device)
        for position, start, end in self._rows.groups:
            rows = order[start:end]
            changed = output.index_select(0, rows)
            tokens = token_ids.index_select(0, rows)
            if slot.is_saved[position]:
                assert slot.saved is not None
                changed = slot.saved[position].index_select(0, tokens)
            if slot.changes[position]:
                shrunk = slot.a[position].index_select(0, tokens)
                expand(slot, position, shrunk[:, : slot.num_rows(position)], changed)
            output.index_copy_(0, rows, changed)
        return output


def expand(slot: Slot, position: int, shrunk: Tensor, output: Tensor) -> None:
    """output = (output + shrunk @ B.T) * scale + shift in place, for rows of one position.

    Args:
        shrunk: [num_rows, ranks of the position's parts, one behind the other].
        output: [num_rows, out_features].
    """
    for change in slot.changes[position]:
        columns = output[:, change.outputs]
        part = shrunk[:, change.start : change.start + change.rank]
        b = slot.b[position, change.outputs, : change.rank].t()
        if not change.flags:
            columns.addmm_(part, b)
            continue
        total = torch.addmm(columns.float(), part.float(), b.float())
        if change.flags & SCALED:
            total *= slot.scale[position, change.outputs]
        if change.flags & SHIFTED:
            total += slot.shift[position, change.outputs]
        columns.copy_(total)
