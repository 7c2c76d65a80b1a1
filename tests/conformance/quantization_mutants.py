"""What can go wrong in a quantization method, and the test of QuantizationSuite that names it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from conformance.quantization_methods import PlainMethod, SmallMethod
from torch import Tensor

from octavo.interfaces import AffineWeight, LinearShape, ParameterSpec, QuantizationMethod, StoredLinear, WeightFacts

# ---------------------------------------------------------------------------------------------------- the product


class TransposesWeight(PlainMethod):
    def prepare(self, parts: Sequence[StoredLinear]) -> object:
        weight = torch.cat([part.tensors["weight"] for part in parts])
        return weight.T.reshape(weight.shape)


class ForgetsBias(PlainMethod):
    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        return super().apply(prepared, x, None)


class AddsBiasToFirstRow(PlainMethod):
    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        y = super().apply(prepared, x, None)
        if bias is not None:
            y[0] += bias
        return y


class LowPrecisionProduct(PlainMethod):
    """Multiplies in bfloat16 whatever the model's dtype."""

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        assert isinstance(prepared, Tensor)
        y = (x.bfloat16() @ prepared.bfloat16().T).to(self.dtype)
        return y if bias is None else y + bias


class LeavesRemainder(PlainMethod):
    """Computes whole tiles of 16 rows, or a single row."""

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        y = super().apply(prepared, x, bias)
        if len(x) > 16:
            y[len(x) // 16 * 16 :] = 0
        return y


class AnswersInFloat32(PlainMethod):
    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        return super().apply(prepared, x, bias).float()


class WantsRows(PlainMethod):
    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        x.abs().max()  # of nothing, torch raises
        return super().apply(prepared, x, bias)


class NeverTheSame(PlainMethod):
    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        return super().apply(prepared, x, bias) + 1e-6 * torch.rand(1).to(self.dtype)


class ScalesInputInPlace(PlainMethod):
    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        y = super().apply(prepared, x.mul_(2), None) / 2
        return y if bias is None else y + bias


class StacksBackwards(PlainMethod):
    def prepare(self, parts: Sequence[StoredLinear]) -> object:
        return super().prepare(parts[::-1])


# ------------------------------------------------------------------------------------------------ what is declared


class DeclaresWrongAxes(PlainMethod):
    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        return tuple(
            dataclasses.replace(spec, output_axis=spec.input_axis, input_axis=spec.output_axis)
            for spec in super().parameters(prefix, shape)
        )


class DeclaresInputsFirst(PlainMethod):
    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        return tuple(
            dataclasses.replace(spec, shape=spec.shape[::-1], output_axis=1, input_axis=0)
            for spec in super().parameters(prefix, shape)
        )


class ForgetsScales(SmallMethod):
    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        return tuple(spec for spec in super().parameters(prefix, shape) if spec.name != "scales")


class ForgetsStoredBias(SmallMethod):
    """The model has no bias, the checkpoint has one."""

    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        return tuple(spec for spec in super().parameters(prefix, shape) if spec.name != "bias")


class DeclaresNarrowIntegers(SmallMethod):
    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        qweight, *others = super().parameters(prefix, shape)
        return dataclasses.replace(qweight, dtype=torch.int16), *others


class MiscountsPacking(SmallMethod):
    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        qweight, *others = super().parameters(prefix, shape)
        return dataclasses.replace(qweight, pack_factor=4), *others


class MiscountsElements(SmallMethod):
    """32 codes of 3 bits in one word, so that the core would cut between a block's three."""

    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        return tuple(dataclasses.replace(spec, pack_elements=1) for spec in super().parameters(prefix, shape))


class KeepsAllScalesWhenCut(SmallMethod):
    """Declares that scales do not run over the inputs, and counts their groups from the share's first input."""

    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        return tuple(
            dataclasses.replace(spec, input_axis=None) if spec.name in ("scales", "qzeros") else spec
            for spec in super().parameters(prefix, shape)
        )

    def groups(self, stored: StoredLinear) -> Tensor | None:
        return stored.tensors["g_idx"] if self.act_order else None


class CutsGroupsOfAnOrder(SmallMethod):
    """Gives a device its half of the scales, though its inputs are of all groups."""

    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        return tuple(
            dataclasses.replace(spec, input_axis=0) if spec.name in ("scales", "qzeros") and self.act_order else spec
            for spec in super().parameters(prefix, shape)
        )

    def groups(self, stored: StoredLinear) -> Tensor | None:
        groups = super().groups(stored)
        return None if groups is None else groups % len(stored.tensors["scales"])


class QuantizesWhateverIsAsked(SmallMethod):
    """Does not look at the headers."""

    def quantizes(self, prefix: str) -> bool:
        return True


class LooksForAnotherTensor(SmallMethod):
    def quantizes(self, prefix: str) -> bool:
        return f"{prefix}.weight_packed" in self.headers


# ------------------------------------------------------------------------------------------- what the tensors mean


class ZerosOffByOne(SmallMethod):
    """Takes stored zeros, which are one too small, for the zeros."""

    def zeros(self, stored: StoredLinear) -> Tensor | None:
        zeros = super().zeros(stored)
        return None if zeros is None else zeros - 1


class UnpacksHighBitsFirst(SmallMethod):
    def codes(self, stored: StoredLinear) -> Tensor:
        per_word = 32 // self.bits
        return super().codes(stored).unflatten(0, (-1, per_word)).flip(1).flatten(0, 1)


class InterleavesNibbles(SmallMethod):
    """The order that AWQ's words have."""

    def codes(self, stored: StoredLinear) -> Tensor:
        codes = super().codes(stored)
        return codes.unflatten(0, (-1, 8))[:, [0, 4, 1, 5, 2, 6, 3, 7]].flatten(0, 1)


class SmearsTheSign(SmallMethod):
    """Shifts words as signed, and does not mask the code of the highest bits."""

    def codes(self, stored: StoredLinear) -> Tensor:
        codes = super().codes(stored)
        if 32 % self.bits == 0:
            highest = slice(32 // self.bits - 1, None, 32 // self.bits)
            codes[highest] = (stored.tensors["qweight"] >> (32 - self.bits)).to(torch.uint8)
        return codes


class GroupOfTheWrongRow(SmallMethod):
    """Deals inputs out to groups in turn."""

    def groups(self, stored: StoredLinear) -> Tensor | None:
        if self.act_order:
            return super().groups(stored)
        return (torch.arange(stored.shape.in_features) % len(stored.tensors["scales"])).int()


class IgnoresTheOrder(SmallMethod):
    def groups(self, stored: StoredLinear) -> Tensor | None:
        return None if self.act_order else super().groups(stored)


class CountsGroupsFromTheShare(SmallMethod):
    """Ignores where a share begins, whose scales are whole."""

    def groups_of_a_share(self, stored: StoredLinear) -> Tensor:
        return (torch.arange(stored.shape.in_features) // self.group_size).int()


class CastsScalesToTheModelsDtype(SmallMethod):
    def weight(self, stored: StoredLinear) -> AffineWeight:
        weight = super().weight(stored)
        return dataclasses.replace(weight, scales=weight.scales.to(self.dtype))


class DequantizesToTheModelsDtype(SmallMethod):
    def dequantize(self, stored: StoredLinear) -> Tensor:
        return super().dequantize(stored).half()


class WideCodes(SmallMethod):
    def codes(self, stored: StoredLinear) -> Tensor:
        return super().codes(stored).int()


class HidesTheOrderFromKernels(SmallMethod):
    def facts(self, prefix: str, shape: LinearShape) -> WeightFacts | None:
        facts = super().facts(prefix, shape)
        assert facts is not None
        return dataclasses.replace(facts, act_order=False)


class TellsFactsOfTheWhole(SmallMethod):
    """By the headers, where a device's share is asked for."""

    def facts(self, prefix: str, shape: LinearShape) -> WeightFacts | None:
        facts, scales = super().facts(prefix, shape), self.headers.get(f"{prefix}.scales")
        assert facts is not None
        return facts if scales is None else dataclasses.replace(facts, out_features=scales.shape[1])


class PromisesSymmetry(SmallMethod):
    def facts(self, prefix: str, shape: LinearShape) -> WeightFacts | None:
        facts = super().facts(prefix, shape)
        assert facts is not None
        return dataclasses.replace(facts, symmetric=True)


class GuessesBitsWithoutHeaders(SmallMethod):
    @property
    def bits(self) -> int:
        return super().bits if self.headers else 8


class StacksByTheFirstOrder(SmallMethod):
    """Joins parts whose inputs are in orders of their own."""

    def prepare(self, parts: Sequence[StoredLinear]) -> object:
        weights = [self.weight(part) for part in parts]
        order = weights[0].group_index
        return self.kernels.prepare([dataclasses.replace(weight, group_index=order) for weight in weights])


# -------------------------------------------------------------------------------------------------------- memory


class ChangesSource(PlainMethod):
    def prepare(self, parts: Sequence[StoredLinear]) -> object:
        prepared = super().prepare(parts)
        for part in parts:
            part.tensors["weight"].zero_()
        return prepared


class EmptiesMapping(PlainMethod):
    def prepare(self, parts: Sequence[StoredLinear]) -> object:
        return torch.cat([part.tensors.pop("weight") for part in parts])  # type: ignore[attr-defined]


class KeepsSourceBesideIts(SmallMethod):
    """Keeps the packed tensors beside what it makes of them."""

    def prepare(self, parts: Sequence[StoredLinear]) -> object:
        return super().prepare(parts), list(parts)

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        assert isinstance(prepared, tuple)
        return super().apply(prepared[0], x, bias)


class KeepsEveryLinear(SmallMethod):
    """A cache in the method that nothing ever empties."""

    kept: ClassVar[list[object]] = []

    def prepare(self, parts: Sequence[StoredLinear]) -> object:
        self.kept.append(list(parts))
        return super().prepare(parts)


MUTANTS: dict[type[QuantizationMethod], str] = {
    TransposesWeight: "product_equals_the_dequantised_one[without bias]",
    ForgetsBias: "product_equals_the_dequantised_one[with bias]",
    AddsBiasToFirstRow: "product_equals_the_dequantised_one[with bias]",
    LowPrecisionProduct: "product_equals_the_dequantised_one[without bias]",
    LeavesRemainder: "product_equals_the_dequantised_one[without bias]",
    AnswersInFloat32: "product_equals_the_dequantised_one[without bias]",
    WantsRows: "product_of_no_rows_has_no_rows",
    NeverTheSame: "same_product_gives_the_same_bits",
    ScalesInputInPlace: "inputs_of_the_product_are_left_as_they_are",
    StacksBackwards: "stacked_parts_equal_the_parts_one_by_one",
    StacksByTheFirstOrder: "stacked_parts_equal_the_parts_one_by_one",
    DeclaresWrongAxes: "axes_are_those_along_which_the_shape_changes",
    DeclaresInputsFirst: "parameters_are_the_tensors_of_the_checkpoint",
    ForgetsScales: "parameters_are_the_tensors_of_the_checkpoint",
    ForgetsStoredBias: "parameters_are_the_tensors_of_the_checkpoint",
    DeclaresNarrowIntegers: "parameters_are_the_tensors_of_the_checkpoint",
    MiscountsPacking: "pack_factor_counts_the_values_of_its_elements",
    MiscountsElements: "pack_factor_counts_the_values_of_its_elements",
    KeepsAllScalesWhenCut: "linear_cut_on_its_inputs_is_columns_of_the_whole",
    CutsGroupsOfAnOrder: "linear_cut_on_its_inputs_is_columns_of_the_whole",
    CountsGroupsFromTheShare: "linear_cut_on_its_inputs_is_columns_of_the_whole",
    QuantizesWhateverIsAsked: "leaves_plain_weights_to_the_core",
    LooksForAnotherTensor: "quantizes_the_linears_whose_tensors_the_checkpoint_has",
    ZerosOffByOne: "dequantize_gives_the_stored_weight_in_float32",
    UnpacksHighBitsFirst: "dequantize_gives_the_stored_weight_in_float32",
    InterleavesNibbles: "dequantize_gives_the_stored_weight_in_float32",
    SmearsTheSign: "dequantize_gives_the_stored_weight_in_float32",
    GroupOfTheWrongRow: "dequantize_gives_the_stored_weight_in_float32",
    IgnoresTheOrder: "dequantize_gives_the_stored_weight_in_float32",
    CastsScalesToTheModelsDtype: "dequantize_gives_the_stored_weight_in_float32",
    DequantizesToTheModelsDtype: "dequantize_gives_the_stored_weight_in_float32",
    WideCodes: "weight_is_of_the_form_that_its_spec_names",
    HidesTheOrderFromKernels: "facts_are_those_of_the_weight",
    TellsFactsOfTheWhole: "linear_cut_on_its_outputs_is_rows_of_the_whole",
    PromisesSymmetry: "facts_are_those_of_the_weight",
    GuessesBitsWithoutHeaders: "facts_are_known_before_there_are_weights",
    ChangesSource: "prepare_leaves_the_checkpoint_s_tensors_as_they_are",
    EmptiesMapping: "prepare_leaves_the_checkpoint_s_tensors_as_they_are",
    KeepsSourceBesideIts: "prepare_lets_go_of_tensors_that_the_product_does_not_read",
    KeepsEveryLinear: "method_keeps_nothing_of_a_linear_that_is_gone",
}
"""Each mutant, and the test of the suite that names its fault (others may fail too)."""
