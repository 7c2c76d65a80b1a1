"""Positions: the tensors of every slot, taken once from maximal sizes, and what of an adapter goes where in them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.interfaces import NO_ADAPTER, AdapterWeights, LoraBackend, LoraBase, LoraLimits, LoraPart, LowRank

SCALED, SHIFTED = 1, 2
"""Bits of a PartAtPosition's flags."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartAtPosition:
    """What one position's adapter does to one part of a slot.

    Attributes:
        part: its index. outputs: its columns of the slot's output.
        start: its first row in the position's A. rank: its own; 0 where there is but a scale or a shift.
        flags: SCALED, SHIFTED, both or neither.
    """

    part: int
    outputs: slice
    start: int
    rank: int
    flags: int


@dataclass(kw_only=True, slots=True)
class Slot:
    """One linear, or one embedding, of this device.

    Attributes:
        parts: their outputs lie one behind the other.
        kind: "embedding" reads token ids; adapters may bring a whole "head" or "embedding" of their own.
        a: [max_loras, num_parts * max_rank, in_features]; at a position, the rows of the parts that its adapter changes
            are packed one behind the other. Of an embedding [max_loras, in_features, max_rank]: a token's row.
        b: [max_loras, max_rank, out_features], B transposed, the parts' one beside the other; undefined from a part's
            rank on.
        scale, shift: [max_loras, out_features] float32; undefined where a part's flags are not set.
        saved: [max_loras, out_features, in_features], of an embedding [max_loras, in_features, out_features]; None
            unless adapters may bring such.
        changes: by position, the parts that its adapter changes. is_saved: by position, whether `saved` has its own.
        table: [max_loras, 2 + 5 * num_parts] int32, for kernels: rows of `a` in use, is_saved, then of each part start,
            rank and flags, and the first and the last but one of its columns.
    """

    parts: Sequence[LoraPart]
    kind: str
    changes: list[tuple[PartAtPosition, ...]]
    is_saved: list[bool]
    a: Tensor = field(init=False)
    b: Tensor = field(init=False)
    scale: Tensor = field(init=False)
    shift: Tensor = field(init=False)
    saved: Tensor | None = None
    table: Tensor = field(init=False)

    @property
    def in_features(self) -> int:
        return self.parts[0].in_features

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    @property
    def outputs(self) -> list[slice]:
        """Of each part, its columns of the output."""
        ends = np.cumsum([part.out_features for part in self.parts]).tolist()
        return [slice(end - part.out_features, end) for end, part in zip(ends, self.parts, strict=True)]

    def num_rows(self, position: int) -> int:
        """Rows of `a` that a position's adapter uses."""
        return sum(change.rank for change in self.changes[position])


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroups:
    """Rows of a batch that have an adapter, sorted by position.

    Attributes:
        order: [number of such rows] int64, their indices; of one position in order.
        groups: position, and the first and last but one place in `order`; none is empty.
    """

    order: NDArray[np.int64]
    groups: Sequence[tuple[int, int, int]]


def group_rows(positions: NDArray[np.int32]) -> RowGroups:
    """positions [num_rows] int32, NO_ADAPTER where a row has none."""
    order = np.argsort(positions, kind="stable")
    order = order[np.searchsorted(positions[order], NO_ADAPTER, side="right") :]
    found, starts = np.unique(positions[order], return_index=True)
    bounds = [*starts.tolist(), len(order)]
    return RowGroups(order=order, groups=list(zip(found.tolist(), bounds, bounds[1:], strict=False)))


class PlacedLora(LoraBackend):
    """What a backend is but for its computing: slots, their memory, and adapters that come and go."""

    def __init__(self, limits: LoraLimits) -> None:
        super().__init__(limits)
        self._slots: list[Slot] = []

    def linear(self, parts: Sequence[LoraPart], *, is_head: bool = False) -> Slot:
        return self._add(parts, "head" if is_head else "linear")

    def embedding(self, part: LoraPart) -> Slot:
        return self._add([part], "embedding")

    def _add(self, parts: Sequence[LoraPart], kind: str) -> Slot:
        num = self.limits.max_loras
        slot = Slot(parts=tuple(parts), kind=kind, changes=[()] * num, is_saved=[False] * num)
        self._slots.append(slot)
        return slot

    @property
    def num_bytes(self) -> int:
        return sum(_tensor_bytes(shape, dtype) for slot in self._slots for shape, dtype in self._shapes(slot).values())

    def allocate(self) -> None:
        for slot in self._slots:
            for name, (shape, dtype) in self._shapes(slot).items():
                setattr(slot, name, torch.zeros(shape, dtype=dtype, device=self.limits.device))

    def _shapes(self, slot: Slot) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        num, rank, dtype = self.limits.max_loras, self.limits.max_lora_rank, self.limits.dtype
        ins, outs, parts = slot.in_features, slot.out_features, len(slot.parts)
        embeds = slot.kind == "embedding"
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "a": ((num, ins, rank) if embeds else (num, parts * rank, ins), dtype),
            "b": ((num, rank, outs), dtype),
            "scale": ((num, outs), torch.float32),
            "shift": ((num, outs), torch.float32),
            "table": ((num, 2 + 5 * parts), torch.int32),
        }
        if self.limits.modules_to_save and slot.kind != "linear":
            shapes["saved"] = ((num, ins, outs) if embeds else (num, outs, ins), dtype)
        return shapes

    def load(self, path: str, base: LoraBase) -> AdapterWeights:
        from octavo_lora.reader import read_adapter  # brings peft, which placing and computing do without

        return read_adapter(path, base, self.limits)

    def place(self, position: int, adapter: AdapterWeights | None) -> None:
        for slot in self._slots:
            self._place(slot, position, adapter)
        heads = [slot for slot in self._slots if slot.kind == "head"]
        self.acts_on_head = any(
            slot.is_saved[at] or slot.changes[at] for slot in heads for at in range(len(slot.changes))
        )

    def _place(self, slot: Slot, position: int, adapter: AdapterWeights | None) -> None:
        changes: list[PartAtPosition] = []
        start = 0
        for index, (part, outputs) in enumerate(zip(slot.parts, slot.outputs, strict=True)):
            low_rank = None if adapter is None else adapter.low_ranks.get(part.module)
            if low_rank is None:
                continue
            rank = len(low_rank.a)
            flags = SCALED * (low_rank.scale is not None) | SHIFTED * (low_rank.shift is not None)
            change = PartAtPosition(part=index, outputs=outputs, start=start, rank=rank, flags=flags)
            self._copy(slot, position, change, low_rank)
            changes.append(change)
            start += rank
        slot.changes[position] = tuple(changes)
        slot.is_saved[position] = self._save(slot, position, adapter)
        row = [start, int(slot.is_saved[position])] + [0] * (5 * len(slot.parts))
        for change in changes:
            columns = change.outputs.start, change.outputs.stop
            row[2 + 5 * change.part : 7 + 5 * change.part] = change.start, change.rank, change.flags, *columns
        _copy(slot.table[position], torch.tensor(row, dtype=torch.int32))

    def _copy(self, slot: Slot, position: int, change: PartAtPosition, low_rank: LowRank) -> None:
        part, rank = slot.parts[change.part], change.rank
        a = low_rank.a[:, part.input_start : part.input_start + part.in_features]
        if slot.kind == "embedding":
            _copy(slot.a[position, :, :rank], a.t())
        else:
            _copy(slot.a[position, change.start : change.start + rank], a)
        rows = slice(part.output_start, part.output_start + part.out_features)
        _copy(slot.b[position, :rank, change.outputs], low_rank.b[rows].t())
        for target, values in ((slot.scale, low_rank.scale), (slot.shift, low_rank.shift)):
            if values is not None:
                _copy(target[position, change.outputs], values[rows])

    def _save(self, slot: Slot, position: int, adapter: AdapterWeights | None) -> bool:
        if adapter is None or slot.saved is None:
            return False
        saved = slot.saved[position]
        found = False
        first = slot.kind == "embedding"  # whose weight is [vocab_size, hidden_size], inputs first
        for part, outputs in zip(slot.parts, slot.outputs, strict=True):
            if (weight := adapter.saved.get(part.module)) is None:
                continue
            ins = slice(part.input_start, part.input_start + part.in_features)
            outs = slice(part.output_start, part.output_start + part.out_features)
            _copy(saved[:, outputs] if first else saved[outputs], weight[ins, outs] if first else weight[outs, ins])
            found = True
        return found

    @abstractmethod
    def apply(self, slot: object, x: Tensor, output: Tensor) -> Tensor: ...


def _copy(target: Tensor, source: Tensor) -> None:
    """Out of pinned memory it is queued behind the steps made so far; else the copy is complete on return."""
    target.copy_(source, non_blocking=source.is_pinned() if target.is_cuda else False)


def _tensor_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
