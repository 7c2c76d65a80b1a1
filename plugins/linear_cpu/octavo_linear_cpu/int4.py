"""CpuInt4: y = x @ W.T for affine weights, by torch's int4 product or, for many rows, dequantised for oneDNN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from octavo.interfaces import AffineWeight, LinearKernel, PackedWeight, WeightFacts
from octavo_linear_cpu import nibbles

_OPERATOR_ROWS = 40
"""Of x and for one product, up to which the operator is faster than dequantising."""

_MOST_WEIGHTS_AT_ONCE = 2**20
"""Dequantised at once: what a processor's cache holds."""

_MIDDLE = 8
"""The code that the operator takes for zero."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Product:
    """One call of the operator: W = (codes - 8) * scale + zero.

    Attributes:
        packed: of `nibbles.pack`, outputs and inputs padded.
        scales_and_zeros: [groups of the operator, padded outputs, 2] bfloat16.
    """

    packed: Tensor
    scales_and_zeros: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class _Int4Weight:
    """A weight as a sum of products.

    Attributes:
        products: one; two for codes of more than 4 bits, the high nibbles' and the low ones'.
        group_size: the operator's.
        order: [padded inputs] int32, the input at each place, in_features where there is none; None: they are in order.
    """

    products: Sequence[_Product]
    group_size: int
    order: Tensor | None
    out_features: int


class CpuInt4(LinearKernel):
    """y = x @ W.T + b in bfloat16, summed in float32.

    Codes of up to 4 bits are one product of the operator `_weight_int4pack_mm_for_cpu`, others the sum of two, of their
    high and their low nibbles. Scales and zeros * scales are rounded to bfloat16, as the operator wants them.
    """

    def why_not(self, facts: WeightFacts) -> list[str]:
        least = nibbles.GROUP_SIZES[0]
        if facts.group_size < facts.in_features and facts.group_size % least:
            return [f"needs groups of a multiple of {least} inputs; this weight has groups of {facts.group_size}"]
        return []

    def num_bytes(self, facts: WeightFacts) -> int:
        whole, rest = divmod(facts.in_features, facts.group_size)
        sizes = [facts.group_size] * whole + [rest]
        group_size = nibbles.choose_group_size(sizes)
        num_inputs = nibbles.num_packed_inputs(sizes, group_size)
        order = 4 * num_inputs if facts.act_order or num_inputs != facts.in_features else 0
        in_each = num_inputs // 2 + num_inputs // group_size * 2 * self.dtype.itemsize
        return _num_products(facts.bits) * _padded(facts.out_features) * in_each + order

    def prepare(self, weight: PackedWeight) -> object:
        assert isinstance(weight, AffineWeight)
        out_features, in_features = weight.codes.shape
        groups = weight.groups().cpu()
        group_size = nibbles.choose_group_size(groups.bincount().tolist())
        order, group_of = nibbles.order_by_group(groups, group_size)
        num_added = _padded(out_features) - out_features
        codes = functional.pad(weight.codes.cpu(), (0, 1, 0, num_added))[:, order]
        scales = functional.pad(weight.scales.cpu().float(), (0, num_added))[group_of]
        zeros = torch.full_like(scales, 2 ** (weight.bits - 1))
        if weight.zeros is not None:
            zeros = functional.pad(weight.zeros.cpu().float(), (0, num_added))[group_of]
        # Middle on middle: what the operator adds is rounded, and shall be small where the weights are.
        middle = 2 ** (weight.bits - 1)
        if _num_products(weight.bits) == 1:
            products = [self._product(codes + (_MIDDLE - middle), scales, (middle - zeros) * scales)]
        else:
            # code - middle = 16 * (high - 8) + (low - 8) + 8
            codes += 16 * _MIDDLE - middle
            products = [
                self._product(codes >> 4, 16 * scales, torch.zeros_like(scales)),
                self._product(codes & 15, scales, (_MIDDLE + middle - zeros) * scales),
            ]
        is_in_order = torch.equal(order, torch.arange(in_features))
        return _Int4Weight(
            products=products,
            group_size=group_size,
            order=None if is_in_order else order.int(),
            out_features=out_features,
        )

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        assert isinstance(prepared, _Int4Weight)
        x = x.contiguous() if prepared.order is None else functional.pad(x, (0, 1)).index_select(1, prepared.order)
        outputs = nibbles.outputs_interleaved()
        if outputs is None or x.shape[0] * len(prepared.products) <= _OPERATOR_ROWS:
            y = _by_operator(prepared, x)
        else:
            y = _dequantised(prepared, x, outputs)
        if y.shape[1] > prepared.out_features:
            y = y[:, : prepared.out_features].contiguous()
        return y if bias is None else y + bias

    def _product(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> _Product:
        """zeros: what the code 8 stands for."""
        return _Product(
            packed=nibbles.pack(codes), scales_and_zeros=torch.stack([scales, zeros], dim=-1).to(self.dtype)
        )


def _by_operator(weight: _Int4Weight, x: Tensor) -> Tensor:
    first, *others = (
        torch.ops.aten._weight_int4pack_mm_for_cpu(x, one.packed, weight.group_size, one.scales_and_zeros)
        for one in weight.products
    )
    for other in others:
        first += other
    y: Tensor = first
    return y


def _dequantised(weight: _Int4Weight, x: Tensor, outputs: int) -> Tensor:
    """Some blocks of outputs at a time, so that what is dequantised stays in the cache."""
    num_tokens, num_inputs = x.shape
    num_outputs = weight.products[0].packed.shape[0]
    y = x.new_empty(num_tokens, num_outputs)
    step = max(1, _MOST_WEIGHTS_AT_ONCE // (nibbles.BLOCK * num_inputs)) * nibbles.BLOCK
    for start in range(0, num_outputs, step):
        rows = slice(start, start + step)
        y[:, rows] = nibbles.in_order(x @ _dequantised_rows(weight, rows, outputs).to(x.dtype), outputs)
    return y


def _dequantised_rows(weight: _Int4Weight, rows: slice, outputs: int) -> Tensor:
    """[inputs, rows] float32, the outputs as `nibbles.unpack` orders them."""
    last, middle = weight.products[-1], _MIDDLE
    codes = nibbles.unpack(last.packed[rows], outputs)
    if len(weight.products) == 2:
        codes |= nibbles.unpack(weight.products[0].packed[rows], outputs) << 4
        middle = 17 * _MIDDLE  # of 16 * high + low, whose scale is the low ones'
    scales, zeros = nibbles.as_unpacked(last.scales_and_zeros[:, rows].float().movedim(-1, 0), outputs)
    dequantised = codes.float()
    # In place, and not as one addcmul: a cache's worth of new memory costs more than reading it twice.
    grouped = dequantised.view(-1, weight.group_size, codes.shape[1])
    grouped *= scales[:, None]
    grouped += (zeros - middle * scales)[:, None]
    return dequantised


def _num_products(bits: int) -> int:
    return 1 if bits <= 4 else 2


def _padded(out_features: int) -> int:
    return -(-out_features // nibbles.BLOCK) * nibbles.BLOCK
