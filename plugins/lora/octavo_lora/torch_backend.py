"""TorchLora: grouped products of torch, on any device; on a CPU, groups of few rows in compiled C++ where it can be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.interfaces import LoraLimits
from octavo_lora.native import NativeLora
from octavo_lora.placement import SCALED, SHIFTED, PlacedLora, RowGroups, Slot, group_rows

_FEW_ROWS = 64
"""Of one adapter, up to which the compiled loops beat torch's two products."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sorted:
    """RowGroups on the device; `order` is None where the batch's rows lie in it."""

    order: Tensor | None
    groups: list[tuple[int, int, int]]


class TorchLora(PlacedLora):
    """Rows are sorted by position once a step; each position's are then two products, by its own ranks.

    torch sums the products in float32. What is between the two, x @ A.T, is rounded to the model's dtype; the second is
    added to the output before that is rounded, once. Where there is a scale or a shift, the second is all in float32.
    The compiled loops round nothing but the output.
    """

    can_be_captured = False  # what is launched depends on which rows have an adapter

    def __init__(self, limits: LoraLimits) -> None:
        super().__init__(limits)
        self._all = _Sorted(order=None, groups=[])
        self._long = self._all  # what is not left to compiled loops
        self._native: NativeLora | None = None

    def allocate(self) -> None:
        super().allocate()
        if self.limits.device == "cpu" and self.limits.dtype is torch.bfloat16:
            self._native = NativeLora.of(slot for slot in self._slots if slot.kind == "linear")

    def plan(self, positions: NDArray[np.int32] | None, *, captured: bool = False) -> None:
        assert not captured, "no CUDA graph can hold it"
        self.active = False
        if positions is None:
            return
        rows = group_rows(positions)
        self.active = bool(rows.groups)
        self._all = self._sorted(rows, len(positions))
        if self._native is not None:
            few = [(at, start, end) for at, start, end in rows.groups if end - start <= _FEW_ROWS]
            self._native.plan(rows.order, few)
            many = np.where(np.isin(positions, [at for at, _, _ in few]), -1, positions)
            self._long = self._sorted(group_rows(many), len(positions)) if few else self._all

    def _sorted(self, rows: RowGroups, num_rows: int) -> _Sorted:
        in_order = len(rows.order) == num_rows and bool((rows.order[1:] > rows.order[:-1]).all())
        order = None if in_order else torch.from_numpy(rows.order).to(self.limits.device)
        return _Sorted(order=order, groups=list(rows.groups))

    def apply(self, slot: object, x: Tensor, output: Tensor) -> Tensor:
        assert isinstance(slot, Slot)
        rows = self._all
        if self._native is not None and slot.kind == "linear":
            self._native.apply(slot, x, output)
            rows = self._long
        if not any(slot.changes[position] or slot.is_saved[position] for position, _, _ in rows.groups):
            return output
        if rows.order is None:
            _apply_sorted(slot, rows.groups, x, output)
            return output
        changed = output.index_select(0, rows.order)
        _apply_sorted(slot, rows.groups, x.index_select(0, rows.order), changed)
        return output.index_copy_(0, rows.order, changed)

    def apply_embedding(self, slot: object, token_ids: Tensor, output: Tensor) -> Tensor:
        assert isinstance(slot, Slot)
        order = self._all.order
        if order is None:
            order = torch.arange(len(token_ids), device=token_ids.device)
        for position, start, end in self._all.groups:
            rows = order[start:end]
            changed = output.index_select(0, rows)
            tokens = token_ids.index_select(0, rows)
            if slot.is_saved[position]:
                assert slot.saved is not None
                changed = slot.saved[position].index_select(0, tokens)
            if slot.changes[position]:
                shrunk = slot.a[position].index_select(0, tokens)
                _expand(slot, position, shrunk[:, : slot.num_rows(position)], changed)
            output.index_copy_(0, rows, changed)
        return output


def _apply_sorted(slot: Slot, groups: list[tuple[int, int, int]], x: Tensor, output: Tensor) -> None:
    for position, start, end in groups:
        rows, changed = x[start:end], output[start:end]
        if slot.is_saved[position]:
            assert slot.saved is not None
            changed.copy_(rows @ slot.saved[position].t())
        if slot.changes[position]:
            _expand(slot, position, rows @ slot.a[position, : slot.num_rows(position)].t(), changed)


def _expand(slot: Slot, position: int, shrunk: Tensor, output: Tensor) -> None:
    """output = (output + shrunk @ B.T) * scale + shift in place, for rows of one position.

    Args:
        shrunk: [num_rows, ranks of the position's parts, one behind the other].
        output: [num_rows, out_features].
    """
    for change in slot.changes[position]:
        columns = output[:, change.outputs]
        part = shrunk[:, change.start : change.start + change.rank]
        b = slot.b[position, : change.rank, change.outputs]
        if not change.flags:
            columns.addmm_(part, b)
            continue
        total = torch.addmm(columns.float(), part.float(), b.float())
        if change.flags & SCALED:
            total *= slot.scale[position, change.outputs]
        if change.flags & SHIFTED:
            total += slot.shift[position, change.outputs]
        columns.copy_(total)
