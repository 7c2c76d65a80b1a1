"""A small LoRA backend that is right, what can go wrong in one, and the test of LoraSuite that names it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.interfaces import NO_ADAPTER, AdapterWeights, LoraBackend, LoraBase, LoraLimits, LoraPart, LowRank


@dataclass(frozen=True, kw_only=True)
class Slot:
    parts: tuple[LoraPart, ...]
    kind: str


class SmallLora(LoraBackend):
    """Keeps a copy of what is placed, and goes through the rows one by one."""

    def __init__(self, limits: LoraLimits) -> None:
        super().__init__(limits)
        self.slots: list[Slot] = []
        self.placed: dict[int, AdapterWeights] = {}
        self.positions: NDArray[np.int32] = np.zeros(0, np.int32)

    def linear(self, parts: Sequence[LoraPart], *, is_head: bool = False) -> Slot:
        self.slots.append(Slot(parts=tuple(parts), kind="head" if is_head else "linear"))
        return self.slots[-1]

    def embedding(self, part: LoraPart) -> Slot:
        self.slots.append(Slot(parts=(part,), kind="embedding"))
        return self.slots[-1]

    @property
    def num_bytes(self) -> int:
        features = sum(part.in_features + part.out_features for slot in self.slots for part in slot.parts)
        return self.limits.max_loras * self.limits.max_lora_rank * features * self.limits.dtype.itemsize

    def allocate(self) -> None:
        return None

    def load(self, path: str, base: LoraBase) -> AdapterWeights:
        raise NotImplementedError

    def place(self, position: int, adapter: AdapterWeights | None) -> None:
        self.placed.pop(position, None)
        if adapter is not None:
            low_ranks = {name: copied(low_rank) for name, low_rank in adapter.low_ranks.items()}
            self.placed[position] = replace(adapter, low_ranks=low_ranks)
        self.acts_on_head = any("lm_head" in {*one.low_ranks, *one.saved} for one in self.placed.values())

    def plan(self, positions: NDArray[np.int32] | None, *, captured: bool = False) -> None:
        self.active = positions is not None
        if positions is not None:
            self.positions = positions

    def apply(self, slot: object, x: Tensor, output: Tensor) -> Tensor:
        assert isinstance(slot, Slot)
        for row, position in enumerate(self.positions.tolist()):
            start = 0
            for part in slot.parts:
                columns = slice(start, start + part.out_features)
                start += part.out_features
                if (adapter := self.adapter(position)) is not None:
                    output[row, columns] = self.changed(adapter, part, slot.kind, x[row], output[row, columns].float())
        return output

    def apply_embedding(self, slot: object, token_ids: Tensor, output: Tensor) -> Tensor:
        return self.apply(slot, token_ids, output)

    def adapter(self, position: int) -> AdapterWeights | None:
        return self.placed.get(position)

    def changed(self, adapter: AdapterWeights, part: LoraPart, kind: str, x: Tensor, y: Tensor) -> Tensor:
        if (whole := adapter.saved.get(part.module)) is not None:
            y = whole[x].float() if kind == "embedding" else whole[self.rows(part)].float() @ x.float()
        if (low_rank := adapter.low_ranks.get(part.module)) is None:
            return y
        rows = self.rows(part)
        a = low_rank.a[:, part.input_start : part.input_start + part.in_features].float()
        y = self.sum(y, low_rank.b[rows].float() @ (a[:, x] if kind == "embedding" else a @ x.float()))
        return self.finish(y, low_rank, rows)

    def rows(self, part: LoraPart) -> slice:
        return slice(part.output_start, part.output_start + part.out_features)

    def sum(self, y: Tensor, delta: Tensor) -> Tensor:
        return y + delta

    def finish(self, y: Tensor, low_rank: LowRank, rows: slice) -> Tensor:
        y = y if low_rank.scale is None else y * low_rank.scale[rows]
        return y if low_rank.shift is None else y + low_rank.shift[rows]


def copied(low_rank: LowRank) -> LowRank:
    return replace(low_rank, a=low_rank.a.clone(), b=low_rank.b.clone())


# ------------------------------------------------------------------------------------------------------- the rows


class TakesTheNextRowsAdapter(SmallLora):
    def plan(self, positions: NDArray[np.int32] | None, *, captured: bool = False) -> None:
        super().plan(None if positions is None else np.roll(positions, -1), captured=captured)


class GivesTheFirstRowsAdapterToAll(SmallLora):
    def plan(self, positions: NDArray[np.int32] | None, *, captured: bool = False) -> None:
        super().plan(None if positions is None else np.where(positions >= 0, positions.max(), positions))


class DropsTheLastRow(SmallLora):
    def plan(self, positions: NDArray[np.int32] | None, *, captured: bool = False) -> None:
        if positions is not None and len(positions) > 1:
            positions = np.append(positions[:-1], NO_ADAPTER)
        super().plan(positions, captured=captured)


class TakesNoAdapterForTheLastPosition(SmallLora):
    def adapter(self, position: int) -> AdapterWeights | None:
        return self.placed.get(position % self.limits.max_loras)


class RoundsRowsWithoutAnAdapter(SmallLora):
    def apply(self, slot: object, x: Tensor, output: Tensor) -> Tensor:
        return super().apply(slot, x, output) + 1e-6


class StaysActive(SmallLora):
    def plan(self, positions: NDArray[np.int32] | None, *, captured: bool = False) -> None:
        super().plan(positions, captured=captured)
        self.active = True


class ForgetsCapturedPlans(SmallLora):
    def plan(self, positions: NDArray[np.int32] | None, *, captured: bool = False) -> None:
        before = self.positions
        super().plan(positions, captured=captured)
        if captured and len(before) == len(self.positions):
            self.positions = before


class ForgetsThePlanWhenItIsCalled(SmallLora):
    def apply(self, slot: object, x: Tensor, output: Tensor) -> Tensor:
        applied = super().apply(slot, x, output)
        self.positions = np.full_like(self.positions, NO_ADAPTER)
        return applied


class ForgetsTheLastRowOfFour(SmallLora):
    def plan(self, positions: NDArray[np.int32] | None, *, captured: bool = False) -> None:
        if positions is not None and len(positions) % 4 == 0:
            positions = np.append(positions[:-1], NO_ADAPTER)
        super().plan(positions, captured=captured)


class SpreadsNaN(SmallLora):
    def apply(self, slot: object, x: Tensor, output: Tensor) -> Tensor:
        applied = super().apply(slot, x, output)
        return applied + 0 * x.sum() if x.is_floating_point() else applied


# ---------------------------------------------------------------------------------------------------- the formula


class ForgetsScale(SmallLora):
    def finish(self, y: Tensor, low_rank: LowRank, rows: slice) -> Tensor:
        return super().finish(y, replace(low_rank, scale=None), rows)


class ForgetsShift(SmallLora):
    def finish(self, y: Tensor, low_rank: LowRank, rows: slice) -> Tensor:
        return super().finish(y, replace(low_rank, shift=None), rows)


class ShiftsBeforeItScales(SmallLora):
    def finish(self, y: Tensor, low_rank: LowRank, rows: slice) -> Tensor:
        y = y if low_rank.shift is None else y + low_rank.shift[rows]
        return y if low_rank.scale is None else y * low_rank.scale[rows]


class SumsInBfloat16(SmallLora):
    def changed(self, adapter: AdapterWeights, part: LoraPart, kind: str, x: Tensor, y: Tensor) -> Tensor:
        low_rank = adapter.low_ranks.get(part.module)
        if low_rank is None or kind == "embedding" or x.dtype == torch.float32 or len(low_rank.a) > 1:
            return super().changed(adapter, part, kind, x, y)
        total = torch.zeros((), dtype=torch.bfloat16)
        for product in (low_rank.a[0] * x).bfloat16():
            total = total + product
        return y + low_rank.b[:, 0].float() * total.float()


class PassesOverModulesOfNoRank(SmallLora):
    def finish(self, y: Tensor, low_rank: LowRank, rows: slice) -> Tensor:
        return super().finish(y, low_rank, rows) if len(low_rank.a) else y


class TakesTheFirstPartsRankForAll(SmallLora):
    def apply(self, slot: object, x: Tensor, output: Tensor) -> Tensor:
        assert isinstance(slot, Slot)
        self.first = slot.parts[0].module
        return super().apply(slot, x, output)

    def changed(self, adapter: AdapterWeights, part: LoraPart, kind: str, x: Tensor, y: Tensor) -> Tensor:
        if self.first in adapter.low_ranks and part.module in adapter.low_ranks:
            rank, own = len(adapter.low_ranks[self.first].a), adapter.low_ranks[part.module]
            cut = replace(own, a=own.a.flip(0)[:rank], b=own.b.flip(1)[:, :rank])
            adapter = replace(adapter, low_ranks={part.module: cut})
        return super().changed(adapter, part, kind, x, y)


# ------------------------------------------------------------------------------------------------ parts and shares


class IgnoresOutputStart(SmallLora):
    def changed(self, adapter: AdapterWeights, part: LoraPart, kind: str, x: Tensor, y: Tensor) -> Tensor:
        return super().changed(adapter, replace(part, output_start=0), kind, x, y)


class IgnoresInputStart(SmallLora):
    def changed(self, adapter: AdapterWeights, part: LoraPart, kind: str, x: Tensor, y: Tensor) -> Tensor:
        return super().changed(adapter, replace(part, input_start=0), kind, x, y)


class TakesTheFirstRowsOfASavedHead(SmallLora):
    def changed(self, adapter: AdapterWeights, part: LoraPart, kind: str, x: Tensor, y: Tensor) -> Tensor:
        return super().changed(adapter, replace(part, output_start=0) if kind == "head" else part, kind, x, y)


class ChangesPartsThatAreLeftOut(SmallLora):
    def changed(self, adapter: AdapterWeights, part: LoraPart, kind: str, x: Tensor, y: Tensor) -> Tensor:
        return super().changed(adapter, part, kind, x, y) + 1e-6


class IgnoresSavedWeights(SmallLora):
    def changed(self, adapter: AdapterWeights, part: LoraPart, kind: str, x: Tensor, y: Tensor) -> Tensor:
        return super().changed(replace(adapter, saved={}), part, kind, x, y)


# ------------------------------------------------------------------------------------------------------ positions


class KeepsModulesOfTheTenantBefore(SmallLora):
    def place(self, position: int, adapter: AdapterWeights | None) -> None:
        before = self.placed.get(position)
        if before is not None and adapter is not None:
            adapter = replace(adapter, low_ranks={**before.low_ranks, **adapter.low_ranks})
        super().place(position, adapter)


class KeepsTheRankOfTheTenantBefore(SmallLora):
    def place(self, position: int, adapter: AdapterWeights | None) -> None:
        before = self.placed.get(position)
        super().place(position, adapter)
        if before is not None and adapter is not None:
            placed = self.placed[position]
            low_ranks = dict(placed.low_ranks)
            for name in low_ranks.keys() & before.low_ranks.keys():
                own, old = low_ranks[name], before.low_ranks[name]
                rest = len(own.a)
                a, b = torch.cat([own.a, old.a[rest:]]), torch.cat([own.b, old.b[:, rest:]], dim=1)
                low_ranks[name] = replace(own, a=a, b=b)
            self.placed[position] = replace(placed, low_ranks=low_ranks)


class KeepsTheShiftOfTheTenantBefore(SmallLora):
    def place(self, position: int, adapter: AdapterWeights | None) -> None:
        before = self.placed.get(position)
        super().place(position, adapter)
        if before is not None and adapter is not None:
            placed = self.placed[position]
            kept = {
                name: replace(
                    low_rank, shift=low_rank.shift if name not in before.low_ranks else before.low_ranks[name].shift
                )
                for name, low_rank in placed.low_ranks.items()
            }
            self.placed[position] = replace(placed, low_ranks=kept)


class KeepsWhatWasTakenAway(SmallLora):
    def place(self, position: int, adapter: AdapterWeights | None) -> None:
        if adapter is not None:
            super().place(position, adapter)


class KeepsTheHostsTensors(SmallLora):
    def place(self, position: int, adapter: AdapterWeights | None) -> None:
        super().place(position, adapter)
        if adapter is not None:
            self.placed[position] = adapter


class NeverActsOnTheHead(SmallLora):
    def place(self, position: int, adapter: AdapterWeights | None) -> None:
        super().place(position, adapter)
        self.acts_on_head = False


class AlwaysActsOnTheHead(SmallLora):
    def place(self, position: int, adapter: AdapterWeights | None) -> None:
        before = self.acts_on_head
        super().place(position, adapter)
        self.acts_on_head = self.acts_on_head or before


# --------------------------------------------------------------------------------------------------------- memory


class CountsOnePosition(SmallLora):
    @property
    def num_bytes(self) -> int:
        return super().num_bytes // self.limits.max_loras


class CountsWhatItTookOnly(SmallLora):
    allocated = False

    def allocate(self) -> None:
        self.allocated = True

    @property
    def num_bytes(self) -> int:
        return super().num_bytes * (1 + self.allocated)


class TakesMoreThanItCounts(SmallLora):
    def allocate(self) -> None:
        self.scratch = torch.zeros(self.num_bytes // self.limits.dtype.itemsize, dtype=self.limits.dtype)


MUTANTS: dict[type[LoraBackend], str] = {
    TakesTheNextRowsAdapter: "each_row_gets_its_own_adapter",
    GivesTheFirstRowsAdapterToAll: "each_row_gets_its_own_adapter",
    DropsTheLastRow: "each_row_gets_its_own_adapter",
    TakesNoAdapterForTheLastPosition: "rows_without_an_adapter_keep_their_bits",
    RoundsRowsWithoutAnAdapter: "rows_without_an_adapter_keep_their_bits",
    StaysActive: "a_plan_says_whether_it_is_to_be_called",
    ForgetsCapturedPlans: "a_plan_of_a_captured_step_gives_what_another_gives",
    ForgetsThePlanWhenItIsCalled: "a_plan_serves_every_slot_of_a_step",
    ForgetsTheLastRowOfFour: "each_row_gets_its_own_adapter_in_any_mix",
    SpreadsNaN: "other_rows_that_are_not_numbers_leave_a_row_alone",
    ForgetsScale: "each_row_gets_its_own_adapter",
    ForgetsShift: "each_row_gets_its_own_adapter",
    ShiftsBeforeItScales: "each_row_gets_its_own_adapter",
    SumsInBfloat16: "products_are_summed_in_float32",
    PassesOverModulesOfNoRank: "each_row_gets_its_own_adapter",
    TakesTheFirstPartsRankForAll: "each_row_gets_its_own_adapter",
    IgnoresOutputStart: "shares_of_the_outputs_stand_beside_each_other",
    IgnoresInputStart: "shares_of_the_inputs_add_up",
    TakesTheFirstRowsOfASavedHead: "shares_of_the_outputs_stand_beside_each_other",
    ChangesPartsThatAreLeftOut: "parts_that_an_adapter_leaves_out_keep_their_bits",
    IgnoresSavedWeights: "an_adapters_own_embedding_and_head_replace_the_bases",
    KeepsModulesOfTheTenantBefore: "a_position_has_nothing_of_who_had_it_before",
    KeepsTheRankOfTheTenantBefore: "a_position_has_nothing_of_who_had_it_before",
    KeepsTheShiftOfTheTenantBefore: "a_position_has_nothing_of_who_had_it_before",
    KeepsWhatWasTakenAway: "an_emptied_position_changes_nothing",
    KeepsTheHostsTensors: "what_is_placed_is_a_copy",
    NeverActsOnTheHead: "it_says_whether_an_adapter_changes_the_head",
    AlwaysActsOnTheHead: "it_says_whether_an_adapter_changes_the_head",
    CountsOnePosition: "memory_is_counted_before_it_is_taken",
    CountsWhatItTookOnly: "memory_is_counted_before_it_is_taken",
    TakesMoreThanItCounts: "no_more_memory_is_taken_than_is_counted",
}
