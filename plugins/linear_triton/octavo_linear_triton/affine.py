"""TritonAffine: products with codes that have scales and zeros."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor
from torch.nn import functional

from octavo.interfaces import AffineWeight, LinearKernel, PackedWeight, WeightFacts
from octavo.plugins.tuned_data import INTERPRETED, target_capability
from octavo_linear_triton import layout
from octavo_linear_triton.kernels.affine_linear import affine_linear
from octavo_linear_triton.kernels.dequantize import dequantize_affine
from octavo_linear_triton.kernels.partials import add_partials, make_partials
from octavo_linear_triton.tuned import most_splits, product_config


class TritonAffine(LinearKernel):
    """Few tokens: codes become numbers in registers. Many: the whole weight does for a moment, and torch multiplies."""

    @cached_property
    def _capability(self) -> int:  # only once there is something to launch: a plan may be for another machine
        return target_capability()

    def why_not(self, facts: WeightFacts) -> list[str]:
        return []

    def num_bytes(self, facts: WeightFacts) -> int:
        return layout.num_affine_bytes(facts)

    def prepare(self, weight: PackedWeight) -> object:
        assert isinstance(weight, AffineWeight)
        return layout.pack_affine(weight, layout.code_dtype_for(weight.bits, self.dtype, INTERPRETED))

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        assert isinstance(prepared, layout.PackedAffine)
        codes = prepared.codes
        if len(x) == 0:
            return x.new_empty(0, codes.out_features)
        x = x if x.stride(1) == 1 else x.contiguous()
        config = product_config(self._capability, "affine_linear", codes.bits, x.dtype, len(x))
        if config is None:
            return functional.linear(x, dequantize_affine(prepared, x.dtype), bias)
        splits = most_splits(self._capability, config, x, codes.out_features)
        partials = make_partials(x, codes.out_features, codes.num_blocks, splits, num_others=0)
        affine_linear(x, prepared, partials, config)
        return add_partials(partials, bias, x.dtype)
