"""CpuInt8: y = x @ W.T for symmetric 8-bit weights with one scale an output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from octavo.interfaces import AffineWeight, LinearKernel, PackedWeight, WeightFacts

_IN_FEATURES_STEP = 16
"""The operator reads past the weight where in_features is no multiple of it."""

_OPERATOR_ROWS = 12
"""Of x, up to which the operator is faster than multiplying with the codes as bfloat16."""

_MOST_CODES_AT_ONCE = 2**20
"""In bfloat16: what a processor's cache holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Int8Weight:
    """codes: [out_features, in_features] int8, minus the zero. scales: [out_features] bfloat16."""

    codes: Tensor
    scales: Tensor


class CpuInt8(LinearKernel):
    """y[m, n] = scales[n] * sum_k x[m, k] * (codes[n, k] - 128), by torch's operator or, for many rows, oneDNN."""

    def why_not(self, facts: WeightFacts) -> list[str]:
        reasons = []
        if facts.bits != 8:
            reasons.append(f"multiplies with 8-bit weights; this one has {facts.bits}")
        if facts.group_size < facts.in_features:
            reasons.append(f"needs one scale for all inputs of an output; this weight has groups of {facts.group_size}")
        if not facts.symmetric:
            reasons.append("needs symmetric weights, whose zeros are all 128; this one is asymmetric")
        if facts.in_features % _IN_FEATURES_STEP:
            reasons.append(f"needs a multiple of {_IN_FEATURES_STEP} inputs; this weight has {facts.in_features}")
        return reasons

    def num_bytes(self, facts: WeightFacts) -> int:
        return facts.out_features * (facts.in_features + self.dtype.itemsize)

    def prepare(self, weight: PackedWeight) -> object:
        assert isinstance(weight, AffineWeight)
        codes = (weight.codes.contiguous() ^ 128).view(torch.int8)  # minus 128: the sign's bit turned
        return _Int8Weight(codes=codes, scales=weight.scales[0].to(self.dtype, copy=True))

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        assert isinstance(prepared, _Int8Weight)
        y: Tensor
        if x.shape[0] <= _OPERATOR_ROWS:
            y = torch.ops.aten._weight_int8pack_mm(x.contiguous(), prepared.codes, prepared.scales)
        else:
            y = _product_of_codes(prepared.codes, x) * prepared.scales
        return y if bias is None else y + bias


def _product_of_codes(codes: Tensor, x: Tensor) -> Tensor:
    """x @ codes.T; bfloat16 holds every code exactly."""
    y = x.new_empty(x.shape[0], codes.shape[0])
    step = max(1, _MOST_CODES_AT_ONCE // codes.shape[1])
    for start in range(0, codes.shape[0], step):
        y[:, start : start + step] = functional.linear(x, codes[start : start + step].to(x.dtype))
    return y
