"""Products with packed weights in plain torch: dequantised at every call, or once when they are loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from octavo.builtin.unquantized import Unquantized
from octavo.interfaces.linear_kernel import (
    AffineWeight,
    LinearKernel,
    LinearKernels,
    LookupWeight,
    PackedWeight,
    WeightFacts,
)
from octavo.interfaces.quantization import LinearShape, StoredLinear

_WEIGHTS_AT_ONCE = {"affine": 2**20, "lookup": 2**18}
"""Dequantised at once, by form: what a cache holds, and so little that the heap keeps its memory from call to call."""

_FLOAT32_ROWS = 2
"""Of x, up to which rounding the weights to 16 bits costs more than a product in float32."""


class TorchPacked(LinearKernel):
    """y = x @ W.T + b, where W is dequantised again for every call, some outputs at a time: the smallest in memory.

    The reference of every linear kernel. It serves any weight on any device.
    """

    def why_not(self, facts: WeightFacts) -> list[str]:
        return []

    def num_bytes(self, facts: WeightFacts) -> int:
        if facts.form == "lookup":
            at_once = _codes_at_once(facts.bits)
            codes = _packed_columns(-(-facts.in_features // at_once), at_once * facts.bits)
            return facts.out_features * (codes + (4 << facts.bits))
        codes = _packed_columns(facts.in_features, facts.bits)
        num_groups = -(-facts.in_features // facts.group_size)
        index = 4 * facts.in_features if facts.act_order else 0
        return facts.out_features * (codes + num_groups * (2 if facts.symmetric else 3)) + index

    def prepare(self, weight: PackedWeight) -> object:
        order = None
        if isinstance(weight, AffineWeight):
            weight, order = _by_group(weight, self.device)
        return _Packed(
            pieces=[_piece(weight.of_outputs(rows), self.device) for rows in _parts(weight)],
            order=order,
            out_features=weight.facts.out_features,
        )

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        assert isinstance(prepared, _Packed)
        y = x.new_empty(x.shape[0], prepared.out_features)
        dtype = torch.float32 if x.shape[0] <= _FLOAT32_ROWS else self.dtype
        x = (x if prepared.order is None else x.index_select(1, prepared.order)).to(dtype)
        start = 0
        for piece in prepared.pieces:
            weight = piece.dequantize().to(dtype)
            end = start + weight.shape[0]
            y[:, start:end] = functional.linear(x, weight, None if bias is None else bias[start:end].to(dtype))
            start = end
        return y


class TorchDequantized(LinearKernel):
    """y = x @ W.T + b, where W was dequantised into the model's dtype at load: fast, and as large as plain weights."""

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
        plain = torch.empty(out_features, in_features, dtype=self.dtype, device=weight.codes.device)
        for rows in _parts(weight):  # in float32 never whole
            plain[rows] = weight.of_outputs(rows).dequantize()
        return self._plain.prepare([StoredLinear(prefix="", shape=shape, tensors={"weight": plain})])

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._plain.apply(prepared, x, bias)


class _Piece(ABC):
    """Some outputs of a weight, packed."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """[outputs, in_features] float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Packed:
    """A weight in pieces; `order` [in_features] int32: of the inputs, None: their own."""

    pieces: Sequence[_Piece]
    order: Tensor | None
    out_features: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _AffinePiece(_Piece):
    """As AffineWeight, outputs first.

    Attributes:
        codes: [outputs, ...] uint8, of `_pack`.
        scales: [outputs, num_groups]. zeros: as they are; None: 2 ** (bits - 1).
        group_index: [in_features] int32, of groups that are no slices of the inputs.
    """

    codes: Tensor
    bits: int
    in_features: int
    scales: Tensor
    zeros: Tensor | None
    group_size: int
    group_index: Tensor | None

    def dequantize(self) -> Tensor:
        codes = _unpack(self.codes, self.bits, self.in_features)
        dtype = torch.int8 if self.bits < 8 else torch.int16  # of code - zero
        differences = codes.view(torch.int8) if dtype == torch.int8 else codes.to(dtype)
        if self.zeros is None:
            differences -= 2 ** (self.bits - 1)
        else:
            for group, zeros in self._groups(differences, self.zeros.to(dtype)):
                group -= zeros
        weight = differences.float()
        for group, scales in self._groups(weight, self.scales.float()):
            group *= scales
        return weight

    def _groups(self, of_inputs: Tensor, of_groups: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """[outputs, groups, size] and [outputs, groups, 1]: of all whole groups, then of a shorter last one."""
        size = self.group_size
        if self.group_index is not None:
            of_groups, size = of_groups.index_select(1, self.group_index), 1
        num_whole = self.in_features // size
        yield of_inputs[:, : num_whole * size].view(-1, num_whole, size), of_groups[:, :num_whole, None]
        if self.in_features % size:
            yield of_inputs[:, None, num_whole * size :], of_groups[:, num_whole:, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _LookupPiece(_Piece):
    """As LookupWeight; two codes of up to 4 bits are looked up at once, as one number.

    Attributes:
        codes: [outputs, ...] uint8, of `_pack`.
        table: [outputs, 2 ** bits] float32.
        positions: [outliers] int32, output * columns + input; columns: in_features, made even where codes are pairs.
        outliers: [outliers] float32, at these positions.
    """

    codes: Tensor
    bits: int
    in_features: int
    table: Tensor
    positions: Tensor | None
    outliers: Tensor | None

    def dequantize(self) -> Tensor:
        at_once = _codes_at_once(self.bits)
        codes = _unpack(self.codes, at_once * self.bits, -(-self.in_features // at_once)).long()
        if at_once == 1:
            weight = self.table.gather(1, codes)
        else:
            # Two floats side by side are one number to look up: twice as fast as one by one. As integers they are
            # joined fastest, as complex numbers looked up.
            first = functional.pad(self.table[:, :, None], (0, 1)).view(torch.int64)
            second = functional.pad(self.table[:, :, None], (1, 0)).view(torch.int64)
            pairs = (second | first.transpose(1, 2)).flatten(1).view(torch.complex64)
            weight = torch.view_as_real(pairs.gather(1, codes)).flatten(1)
        if self.positions is not None and self.outliers is not None:
            weight.view(-1).index_add_(0, self.positions, self.outliers)
        return weight[:, : self.in_features]


def _parts(weight: PackedWeight) -> list[slice]:
    """Outputs that are dequantised at once."""
    out_features, in_features = weight.codes.shape
    step = max(1, _WEIGHTS_AT_ONCE[weight.facts.form] // in_features)
    return [slice(start, min(start + step, out_features)) for start in range(0, out_features, step)]


def _piece(weight: PackedWeight, device: str) -> _Piece:
    codes, in_features = weight.codes.to(device), weight.codes.shape[1]
    if isinstance(weight, AffineWeight):
        return _AffinePiece(
            codes=_pack(codes, weight.bits),
            bits=weight.bits,
            in_features=in_features,
            scales=_transposed(weight.scales, device),
            zeros=None if weight.zeros is None else _transposed(weight.zeros, device),
            group_size=weight.facts.group_size,
            group_index=weight.group_index,
        )
    if _codes_at_once(weight.bits) == 2:
        codes = functional.pad(codes, (0, in_features % 2))
        codes = codes[:, 0::2] | codes[:, 1::2] << weight.bits
    positions, outliers = _outliers(weight)
    return _LookupPiece(
        codes=_pack(codes, _codes_at_once(weight.bits) * weight.bits),
        bits=weight.bits,
        in_features=in_features,
        table=weight.table.to(device, torch.float32, copy=True),
        positions=None if positions is None else positions.to(device),
        outliers=None if outliers is None else outliers.to(device),
    )


def _by_group(weight: AffineWeight, device: str) -> tuple[AffineWeight, Tensor | None]:
    """Its inputs in the order of their groups, and this order, where each group has then its whole size."""
    if weight.group_index is None:
        return weight, None
    groups = weight.group_index.long()
    order = groups.argsort(stable=True)
    in_slices = torch.arange(len(order), device=order.device) // weight.group_size
    if not torch.equal(groups[order], in_slices):
        return replace(weight, group_index=weight.group_index.to(device, copy=True)), None
    here = slice(0, int(in_slices[-1]) + 1)  # of a device's share: the scales may be of more groups
    return (
        replace(
            weight,
            codes=weight.codes[:, order],
            scales=weight.scales[here],
            zeros=None if weight.zeros is None else weight.zeros[here],
            group_index=None,
        ),
        order.int().to(device),
    )


def _transposed(matrix: Tensor, device: str) -> Tensor:
    """A contiguous copy."""
    return matrix.T.clone(memory_format=torch.contiguous_format).to(device)


def _outliers(weight: LookupWeight) -> tuple[Tensor | None, Tensor | None]:
    """Positions in the dequantised piece, and values."""
    if weight.outliers is None:
        return None, None
    starts = weight.outliers.crow_indices().long()
    outputs = torch.arange(len(starts) - 1, device=starts.device).repeat_interleave(starts.diff())
    at_once = _codes_at_once(weight.bits)
    num_columns = at_once * -(-weight.codes.shape[1] // at_once)
    positions = outputs * num_columns + weight.outliers.col_indices()
    return positions.int(), weight.outliers.values().clone()


def _codes_at_once(bits: int) -> int:
    """Of a lookup weight: two make a number of at most 8 bits."""
    return 2 if bits <= 4 else 1


def _planes(bits: int) -> list[tuple[int, int]]:
    """(width, shift) of the parts of a code that bytes hold in whole numbers: 3 bits are 2 and 1."""
    return [(width, bits & -(2 * width)) for width in (8, 4, 2, 1) if bits & width]


def _packed_columns(num_codes: int, bits: int) -> int:
    """Bytes of an output."""
    fields = 8 // _planes(bits)[-1][0]
    return -(-num_codes // fields) * fields * bits // 8


def _pack(codes: Tensor, bits: int) -> Tensor:
    """[outputs, num_codes] uint8 -> [outputs, bytes] uint8, plane after plane.

    The first field of a plane's bytes holds its first codes, the second those that follow: so unpacking writes slices.
    """
    planes = []
    num_columns = _packed_columns(codes.shape[1], bits) * 8 // bits
    codes = functional.pad(codes, (0, num_columns - codes.shape[1]))
    for width, shift in _planes(bits):
        plane = torch.zeros(codes.shape[0], num_columns * width // 8, dtype=torch.uint8, device=codes.device)
        for index, field in enumerate(codes.chunk(8 // width, dim=1)):
            plane |= (field >> shift & 2**width - 1) << (index * width)
        planes.append(plane)
    return torch.cat(planes, dim=1)


def _unpack(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """The inverse of `_pack`: [outputs, num_codes] uint8."""
    if bits == 8:
        return packed
    num_columns = packed.shape[1] * 8 // bits
    codes = torch.empty(packed.shape[0], num_columns, dtype=torch.uint8, device=packed.device)
    start = 0
    for number, (width, shift) in enumerate(_planes(bits)):
        plane = packed[:, start : start + num_columns * width // 8]
        start += plane.shape[1]
        for index, field in enumerate(codes.chunk(8 // width, dim=1)):
            part = plane >> (index * width) if index else plane
            if number == 0:
                torch.bitwise_and(part, 2**width - 1, out=field)
            else:
                field |= (part & 2**width - 1) << shift
    return codes[:, :num_codes]
