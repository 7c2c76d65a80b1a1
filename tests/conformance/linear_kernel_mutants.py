"""A small linear kernel that is right, what can go wrong in one, and the test of LinearKernelSuite that names it."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from octavo.interfaces import AffineWeight, LinearKernel, LookupWeight, PackedWeight, WeightFacts


class SmallKernel(LinearKernel):
    """Keeps the weight as it is, a byte for each code, and dequantises it in every call."""

    def why_not(self, facts: WeightFacts) -> list[str]:
        return []

    def num_bytes(self, facts: WeightFacts) -> int:
        codes = facts.in_features * facts.out_features
        if facts.form == "lookup":
            return codes + 4 * facts.out_features * 2**facts.bits
        num_groups = -(-facts.in_features // facts.group_size)
        index = 4 * facts.in_features if facts.act_order else 0
        return codes + num_groups * facts.out_features * (2 if facts.symmetric else 3) + index

    def prepare(self, weight: PackedWeight) -> object:
        return weight

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        y = self.product(x.float(), self.dense(prepared))
        return (y if bias is None else y + bias.float()).to(self.dtype)

    def dense(self, prepared: object) -> Tensor:
        assert isinstance(prepared, AffineWeight | LookupWeight)
        return prepared.dequantize()

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T


# ----------------------------------------------------------------------------------------------------- the weight


class ForgetsOutliers(SmallKernel):
    def prepare(self, weight: PackedWeight) -> object:
        return replace(weight, outliers=None) if isinstance(weight, LookupWeight) else weight


class IgnoresTheOrder(SmallKernel):
    def prepare(self, weight: PackedWeight) -> object:
        return replace(weight, group_index=None) if isinstance(weight, AffineWeight) else weight


class SortsInputsIntoAllGroups(SmallKernel):
    """Takes it that every group has as many inputs as the others, also of a share."""

    def prepare(self, weight: PackedWeight) -> object:
        if isinstance(weight, LookupWeight) or weight.group_index is None:
            return weight
        order = weight.group_index.argsort(stable=True)
        in_slices = torch.arange(len(order)) // weight.group_size
        return replace(weight, group_index=torch.empty_like(weight.group_index).scatter_(0, order, in_slices.int()))


class GroupOfTheWrongRow(SmallKernel):
    """Spreads the inputs evenly over the groups, so that none is shorter than the others."""

    def prepare(self, weight: PackedWeight) -> object:
        if isinstance(weight, LookupWeight) or weight.group_index is not None:
            return weight
        in_features, num_groups = weight.codes.shape[1], len(weight.scales)
        return replace(weight, group_index=(torch.arange(in_features) * num_groups // in_features).int())


class TakesSymmetricForZero(SmallKernel):
    """A weight without zeros has the middle code for zero, not 0."""

    def prepare(self, weight: PackedWeight) -> object:
        if isinstance(weight, AffineWeight) and weight.zeros is None:
            return replace(weight, zeros=torch.zeros_like(weight.scales, dtype=torch.uint8))
        return weight


class ZerosOffByOne(SmallKernel):
    def prepare(self, weight: PackedWeight) -> object:
        if isinstance(weight, AffineWeight) and weight.zeros is not None:
            return replace(weight, zeros=weight.zeros + 1)
        return weight


class OverflowsBytes(SmallKernel):
    """Subtracts zeros from codes in int8, where 255 - 0 is -1."""

    def dense(self, prepared: object) -> Tensor:
        if isinstance(prepared, LookupWeight):
            return prepared.dequantize()
        assert isinstance(prepared, AffineWeight)
        groups = prepared.groups()
        zeros = 2 ** (prepared.bits - 1) if prepared.zeros is None else prepared.zeros[groups].T
        return (prepared.codes - zeros).view(torch.int8).float() * prepared.scales.float()[groups].T


class RoundsScales(SmallKernel):
    """To float16, which is less than float32 scales and tables have."""

    def prepare(self, weight: PackedWeight) -> object:
        if isinstance(weight, LookupWeight):
            return replace(weight, table=weight.table.half())
        return replace(weight, scales=weight.scales.half())


class WantsContiguousCodes(SmallKernel):
    """Reads memory row by row, however the tensor lies in it."""

    def prepare(self, weight: PackedWeight) -> object:
        out_features, in_features = weight.codes.shape
        return replace(weight, codes=weight.codes.as_strided((out_features, in_features), (in_features, 1)))


class AcceptsWhatItCannotRead(SmallKernel):
    """Has the codes that divide a word, and 3 bits; its why_not does not say so."""

    def prepare(self, weight: PackedWeight) -> object:
        return weight if weight.bits in (1, 2, 3, 4, 8) else replace(weight, codes=weight.codes & 0xF)


class ServesNothing(SmallKernel):
    def why_not(self, facts: WeightFacts) -> list[str]:
        return ["serves nothing that anybody has"]


class RefusesWithoutAReason(SmallKernel):
    def why_not(self, facts: WeightFacts) -> list[str]:
        return ["no"] if facts.bits == 7 else []


# ---------------------------------------------------------------------------------------------------- the product


class ForgetsBias(SmallKernel):
    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        return super().apply(prepared, x, None)


class AnswersInFloat32(SmallKernel):
    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        return super().apply(prepared, x, bias).float()


class LeavesRemainder(SmallKernel):
    """Computes whole tiles of 16 rows, or fewer than a tile."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        y = super().product(x, weight)
        if len(x) > 16:
            y[len(x) // 16 * 16 :] = 0
        return y


class SumsInTheModelsDtype(SmallKernel):
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        y = torch.zeros(len(x), len(weight), dtype=self.dtype)
        for start in range(0, x.shape[1], 8):
            y += (x[:, start : start + 8] @ weight[:, start : start + 8].T).to(self.dtype)
        return y.float()


class ScalesByTheLargestOfAllRows(SmallKernel):
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        largest = x.abs().max() if len(x) else torch.tensor(1.0)
        return super().product(x / largest, weight) * largest


class WantsRows(SmallKernel):
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        x.abs().max()  # of nothing, torch raises
        return super().product(x, weight)


class NeverTheSame(SmallKernel):
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return super().product(x, weight) + 1e-6 * torch.rand(1)


class ScalesInputInPlace(SmallKernel):
    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        return super().apply(prepared, x.mul_(0.5).mul(2), bias)


class AddsToTheBias(SmallKernel):
    """Computes into the bias, where it has the product's shape: with one row."""

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        y = super().apply(prepared, x, bias)
        if bias is not None:
            bias.copy_(y[0])
        return y


# --------------------------------------------------------------------------------------------------------- memory


class CountsBitsOnly(SmallKernel):
    """Says what the codes would take if they were packed."""

    def num_bytes(self, facts: WeightFacts) -> int:
        return super().num_bytes(facts) - facts.in_features * facts.out_features * (8 - facts.bits) // 8


class ChangesTheWeight(SmallKernel):
    """Brings codes around zero, in place."""

    def prepare(self, weight: PackedWeight) -> object:
        mine = replace(weight, codes=weight.codes.clone())
        weight.codes.sub_(2 ** (weight.bits - 1))
        return mine


class KeepsCodesBesideItsOwn(SmallKernel):
    def prepare(self, weight: PackedWeight) -> object:
        return weight.dequantize(), weight.codes

    def dense(self, prepared: object) -> Tensor:
        assert isinstance(prepared, tuple)
        dense: Tensor = prepared[0]
        return dense


class KeepsEveryWeight(SmallKernel):
    """A cache in the kernel that nothing ever empties."""

    kept: ClassVar[list[object]] = []

    def prepare(self, weight: PackedWeight) -> object:
        self.kept.append(weight)
        return weight


class PreparesTheFirstOnly(SmallKernel):
    """Takes every weight of a number of bits for the one that came first."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        super().__init__(dtype, device)
        self._first: dict[tuple[str, int, int], PackedWeight] = {}

    def prepare(self, weight: PackedWeight) -> object:
        facts = weight.facts
        return self._first.setdefault((facts.form, facts.bits, facts.in_features), weight)


MUTANTS: dict[type[LinearKernel], str] = {
    ForgetsOutliers: "product_equals_the_dequantised_one[without bias]",
    IgnoresTheOrder: "product_equals_the_dequantised_one[without bias]",
    GroupOfTheWrongRow: "product_equals_the_dequantised_one[without bias]",
    TakesSymmetricForZero: "product_equals_the_dequantised_one[without bias]",
    ZerosOffByOne: "product_equals_the_dequantised_one[without bias]",
    OverflowsBytes: "product_equals_the_dequantised_one[without bias]",
    RoundsScales: "product_equals_the_dequantised_one[without bias]",
    AnswersInFloat32: "product_equals_the_dequantised_one[without bias]",
    LeavesRemainder: "product_equals_the_dequantised_one[without bias]",
    ForgetsBias: "product_equals_the_dequantised_one[with bias]",
    SortsInputsIntoAllGroups: "scales_may_be_of_more_groups_than_the_inputs_are_in[shuffled]",
    WantsContiguousCodes: "weights_may_be_views",
    AcceptsWhatItCannotRead: "serves_what_it_accepts",
    ServesNothing: "serves_weights_of_every_form_that_its_spec_lists",
    RefusesWithoutAReason: "refusals_are_sentences",
    SumsInTheModelsDtype: "sums_are_float32",
    ScalesByTheLargestOfAllRows: "row_does_not_depend_on_the_others",
    WantsRows: "product_of_no_rows_has_no_rows",
    NeverTheSame: "same_product_gives_the_same_bits",
    ScalesInputInPlace: "inputs_of_the_product_are_left_as_they_are",
    AddsToTheBias: "inputs_of_the_product_are_left_as_they_are",
    PreparesTheFirstOnly: "stacked_weights_equal_the_weights_one_by_one[kept apart]",
    CountsBitsOnly: "num_bytes_is_what_a_prepared_weight_takes",
    ChangesTheWeight: "prepare_leaves_the_weight_as_it_is",
    KeepsCodesBesideItsOwn: "prepare_lets_go_of_tensors_that_the_product_does_not_read",
    KeepsEveryWeight: "kernel_keeps_nothing_of_a_weight_that_is_gone",
}
"""Each mutant, and the test of the suite that names its fault (others may fail too)."""

OF_THE_SMALL_SUITE = (
    ForgetsOutliers,
    IgnoresTheOrder,
    GroupOfTheWrongRow,
    TakesSymmetricForZero,
    ZerosOffByOne,
    OverflowsBytes,
    LeavesRemainder,
    SumsInTheModelsDtype,
)
"""Those that few and small weights must show as well."""
