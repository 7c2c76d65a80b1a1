"""Two plain quantization methods that are right, one of floats and one of packed integers, and what can go wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from octavo.interfaces import LinearShape, ParameterSpec, QuantizationMethod
from octavo.testing import StoredLinear


class PlainMethod(QuantizationMethod):
    """Dense float weights."""

    can_stack = True

    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        return (
            ParameterSpec(name="weight", shape=(shape.out_features, shape.in_features), output_axis=0, input_axis=1),
        )

    def prepare(self, shape: LinearShape, parts: Sequence[Mapping[str, Tensor]]) -> object:
        return torch.cat([part["weight"] for part in parts])

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        assert isinstance(prepared, Tensor)
        y = x @ prepared.T
        return y if bias is None else y + bias

    def dequantize(self, shape: LinearShape, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight"].float()


# Four bits: eight values of a row in one int32, from the lowest bits up; a float16 scale for each 16 values.
BITS, PER_ELEMENT, GROUP_SIZE = 4, 8, 16
FOUR_BIT_CONFIG = {"quant_method": "four-bit", "bits": BITS}


def store_four_bit(shape: LinearShape, generator: torch.Generator) -> StoredLinear:
    rows, columns = shape.out_features, shape.in_features
    values = torch.randint(0, 16, (rows, columns), generator=generator)
    scales = (torch.rand(rows, columns // GROUP_SIZE, generator=generator) + 0.1).half()
    shifts = BITS * torch.arange(PER_ELEMENT)
    packed = (values.view(rows, -1, PER_ELEMENT) << shifts).sum(dim=-1).to(torch.int32)
    weight = (values - 8) * scales.float().repeat_interleave(GROUP_SIZE, dim=1)
    return StoredLinear(tensors={"qweight": packed, "scales": scales}, weight=weight)


class FourBitMethod(PlainMethod):
    """weight[r, c] = (q[r, c] - 8) * scales[r, c // 16]."""

    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        rows, columns = shape.out_features, shape.in_features
        axes = {"output_axis": 0, "input_axis": 1}
        return (
            ParameterSpec(
                name="qweight",
                shape=(rows, columns // PER_ELEMENT),
                dtype=torch.int32,
                pack_factor=PER_ELEMENT,
                **axes,
            ),
            ParameterSpec(name="scales", shape=(rows, columns // GROUP_SIZE), dtype=torch.float16, **axes),
        )

    def prepare(self, shape: LinearShape, parts: Sequence[Mapping[str, Tensor]]) -> object:
        sizes = [part["qweight"].shape[0] for part in parts]
        shapes = [dataclasses.replace(shape, out_features=size) for size in sizes]
        return torch.cat([self.dequantize(*part) for part in zip(shapes, parts, strict=True)]).to(self.dtype)

    def dequantize(self, shape: LinearShape, tensors: Mapping[str, Tensor]) -> Tensor:
        values = (tensors["qweight"].unsqueeze(-1) >> (BITS * torch.arange(PER_ELEMENT))) & 15
        return (values.flatten(1) - 8) * tensors["scales"].float().repeat_interleave(GROUP_SIZE, dim=1)


# ---------------------------------------------------------------------------------------------------- the product


class TransposesWeight(PlainMethod):
    def prepare(self, shape: LinearShape, parts: Sequence[Mapping[str, Tensor]]) -> object:
        weight = torch.cat([part["weight"] for part in parts])
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
    def prepare(self, shape: LinearShape, parts: Sequence[Mapping[str, Tensor]]) -> object:
        return super().prepare(shape, parts[::-1])


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


class ForgetsScales(FourBitMethod):
    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        return super().parameters(prefix, shape)[:1]


class DeclaresNarrowIntegers(FourBitMethod):
    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        qweight, scales = super().parameters(prefix, shape)
        return dataclasses.replace(qweight, dtype=torch.int16), scales


class MiscountsPacking(FourBitMethod):
    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        qweight, scales = super().parameters(prefix, shape)
        return dataclasses.replace(qweight, pack_factor=4), scales


class KeepsAllScalesWhenCut(FourBitMethod):
    """Declares that scales do not run over the inputs, though their groups count from the first column."""

    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        qweight, scales = super().parameters(prefix, shape)
        return qweight, dataclasses.replace(scales, input_axis=None)


class UnpacksHighBitsFirst(FourBitMethod):
    def dequantize(self, shape: LinearShape, tensors: Mapping[str, Tensor]) -> Tensor:
        values = (tensors["qweight"].unsqueeze(-1) >> (BITS * torch.arange(PER_ELEMENT).flip(0))) & 15
        return (values.flatten(1) - 8) * tensors["scales"].float().repeat_interleave(GROUP_SIZE, dim=1)


class ForgetsZeroPoint(FourBitMethod):
    def dequantize(self, shape: LinearShape, tensors: Mapping[str, Tensor]) -> Tensor:
        return super().dequantize(shape, tensors) + 8 * tensors["scales"].float().repeat_interleave(GROUP_SIZE, dim=1)


class DequantizesToTheModelsDtype(FourBitMethod):
    def dequantize(self, shape: LinearShape, tensors: Mapping[str, Tensor]) -> Tensor:
        return super().dequantize(shape, tensors).half()


# -------------------------------------------------------------------------------------------------------- memory


class ChangesSource(PlainMethod):
    def prepare(self, shape: LinearShape, parts: Sequence[Mapping[str, Tensor]]) -> object:
        prepared = super().prepare(shape, parts)
        for part in parts:
            part["weight"].zero_()
        return prepared


class EmptiesMapping(PlainMethod):
    def prepare(self, shape: LinearShape, parts: Sequence[Mapping[str, Tensor]]) -> object:
        return torch.cat([part.pop("weight") for part in parts])  # type: ignore[attr-defined]


class KeepsSourceBesideIts(FourBitMethod):
    """Keeps the packed tensors beside what it makes of them."""

    def prepare(self, shape: LinearShape, parts: Sequence[Mapping[str, Tensor]]) -> object:
        return super().prepare(shape, parts), [dict(part) for part in parts]

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        assert isinstance(prepared, tuple)
        return super().apply(prepared[0], x, bias)


class KeepsEveryLinear(FourBitMethod):
    """A cache in the method that nothing ever empties."""

    kept: ClassVar[list[object]] = []

    def prepare(self, shape: LinearShape, parts: Sequence[Mapping[str, Tensor]]) -> object:
        self.kept.append([dict(part) for part in parts])
        return super().prepare(shape, parts)


MUTANTS: dict[type[PlainMethod], str] = {
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
    DeclaresWrongAxes: "axes_are_those_along_which_the_shape_changes",
    DeclaresInputsFirst: "parameters_are_the_tensors_of_the_checkpoint",
    ForgetsScales: "parameters_are_the_tensors_of_the_checkpoint",
    DeclaresNarrowIntegers: "parameters_are_the_tensors_of_the_checkpoint",
    MiscountsPacking: "pack_factor_counts_the_values_of_an_element",
    KeepsAllScalesWhenCut: "linear_cut_on_its_inputs_is_columns_of_the_whole",
    UnpacksHighBitsFirst: "dequantize_gives_the_stored_weight_in_float32",
    ForgetsZeroPoint: "dequantize_gives_the_stored_weight_in_float32",
    DequantizesToTheModelsDtype: "dequantize_gives_the_stored_weight_in_float32",
    ChangesSource: "prepare_leaves_the_checkpoint_s_tensors_as_they_are",
    EmptiesMapping: "prepare_leaves_the_checkpoint_s_tensors_as_they_are",
    KeepsSourceBesideIts: "prepare_lets_go_of_tensors_that_the_product_does_not_read",
    KeepsEveryLinear: "method_keeps_nothing_of_a_linear_that_is_gone",
}
"""Each mutant, and the test of the suite that names its fault (others may fail too)."""
