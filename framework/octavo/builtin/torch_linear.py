"""Products with packed weights in plain torch: dequantised at every call, or once when they are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from octavo.builtin.unquantized import Unquantized
from octavo.interfaces.linear_kernel import (
    LinearKernel,
    LinearKernels,
    LookupWeight,
    PackedWeight,
    WeightFacts,
    sparse_rows,
)
from octavo.interfaces.quantization import LinearShape, StoredLinear
from octavo.packing import pack_columns, unpack_columns, words_for

_MOST_WEIGHTS_AT_ONCE = 2**20
"""Dequantised at once: what a processor's cache holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _PackedCodes:
    """A weight whose codes are packed again; `weight.codes` is empty.

    Attributes:
        words: [out_features, words_for(in_features, bits)] int32.
    """

    weight: PackedWeight
    words: Tensor
    in_features: int


class TorchPacked(LinearKernel):
    """y = x @ W.T + b, where W is dequantised again for every call, some outputs at a time: the smallest in memory.

    The reference of every linear kernel. It serves any weight on any device.
    """

    def why_not(self, facts: WeightFacts) -> list[str]:
        return []

    def num_bytes(self, facts: WeightFacts) -> int:
        return 4 * facts.out_features * words_for(facts.in_features, facts.bits) + metadata_bytes(facts)

    def prepare(self, weight: PackedWeight) -> object:
        words = pack_columns(weight.codes, weight.bits).to(self.device)
        return _PackedCodes(
            weight=_without_codes(weight, self.device), words=words, in_features=weight.codes.shape[1]
        )

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        assert isinstance(prepared, _PackedCodes)
        y = x.new_empty(x.shape[0], prepared.words.shape[0])
        for start, weight in self._pieces(prepared):
            end = start + weight.shape[0]
            y[:, start:end] = functional.linear(x, weight, None if bias is None else bias[start:end])
        return y

    def _pieces(self, prepared: _PackedCodes) -> Iterator[tuple[int, Tensor]]:
        """(first output, [outputs, in_features] in the model's dtype), one after another."""
        step = max(1, _MOST_WEIGHTS_AT_ONCE // prepared.in_features)
        for start in range(0, prepared.words.shape[0], step):
            words = prepared.words[start : start + step]
            codes = unpack_columns(words, prepared.weight.bits, prepared.in_features)
            yield start, _rows(prepared.weight, start, codes).dequantize().to(self.dtype)


class TorchDequantized(LinearKernel):
    """y = x @ W.T + b, where W was dequantised into the model's dtype when it was loaded: fast, and as large as plain weights."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        super().__init__(dtype, device)
        self._plain = Unquantized({}, dtype, device, {}, LinearKernels({}))

    def why_not(self, facts: WeightFacts) -> list[str]:
        return []

    def num_bytes(self, facts: WeightFacts) -> int:
        return facts.in_features * facts.out_features * self.dtype.itemsize

    def prepare(self, weight: PackedWeight) -> object:
        out_features, in_features = weight.codes.shape
        shape = LinearShape(in_features=in_features, out_features=out_features)
        plain = weight.dequantize().to(self.dtype)
        return self._plain.prepare([StoredLinear(prefix="", shape=shape, tensors={"weight": plain})])

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._plain.apply(prepared, x, bias)


def metadata_bytes(facts: WeightFacts) -> int:
    """Of what stands beside the codes: 16-bit scales and 8-bit zeros of groups, or 32-bit codebooks."""
    if facts.form == "lookup":
        return 4 * facts.out_features * 2**facts.bits
    num_groups = -(-facts.in_features // facts.group_size)
    index = 4 * facts.in_features if facts.act_order else 0
    return num_groups * facts.out_features * (2 if facts.symmetric else 3) + index


def _without_codes(weight: PackedWeight, device: str) -> PackedWeight:
    none = torch.empty(0, dtype=torch.uint8, device=device)
    if isinstance(weight, LookupWeight):
        outliers = None if weight.outliers is None else weight.outliers.to(device)
        return replace(weight, codes=none, table=weight.table.to(device), outliers=outliers)
    zeros = None if weight.zeros is None else weight.zeros.to(device)
    index = None if weight.group_index is None else weight.group_index.to(device)
    return replace(weight, codes=none, scales=weight.scales.to(device), zeros=zeros, group_index=index)


def _rows(weight: PackedWeight, start: int, codes: Tensor) -> PackedWeight:
    """Of these outputs only."""
    rows = slice(start, start + codes.shape[0])
    if isinstance(weight, LookupWeight):
        outliers = None if weight.outliers is None else _csr_rows(weight.outliers, rows)
        return replace(weight, codes=codes, table=weight.table[rows], outliers=outliers)
    zeros = None if weight.zeros is None else weight.zeros[:, rows]
    return replace(weight, codes=codes, scales=weight.scales[:, rows], zeros=zeros)


def _csr_rows(matrix: Tensor, rows: slice) -> Tensor:
    starts = matrix.crow_indices()[rows.start : rows.stop + 1]
    values = slice(int(starts[0]), int(starts[-1]))
    return sparse_rows(starts.diff(), matrix.col_indices()[values], matrix.values()[values], matrix.shape[1])
