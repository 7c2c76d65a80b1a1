"""How a weight lies in memory for the kernels: tiles of 32-bit words, used up by one matrix instruction after another.

Inputs are cut into blocks of 32 * (16 // bits). Of one output, a block is 16 words. Each half of word j, 16 bits,
holds 16 // bits codes: code p of the low half belongs to input 32 * p + j of the block, that of the high half to the
input 16 further. So a mask on 16 words gives the codes of 32 inputs, two 16-bit numbers a register, and the words of
neighbouring outputs are one contiguous piece of memory. 3 bits take 3.2, 4 bits 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.interfaces import AffineWeight, LookupWeight, WeightFacts

SLAB = 16
"""Inputs of one tensor core instruction; words of a block of one output."""
PAIR = 2 * SLAB
"""Inputs whose codes one mask gives. A group's inputs are whole pairs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedCodes:
    """The codes of a weight.

    Attributes:
        words: [num_blocks, out_features, SLAB] int32.
        order: [num_blocks * inputs of a block] int32, the input that each place stands for, -1 for none; None: place i
            is input i, and there are no others.
    """

    bits: int
    in_features: int
    words: Tensor
    order: Tensor | None

    @property
    def num_blocks(self) -> int:
        return self.words.shape[0]

    @property
    def out_features(self) -> int:
        return self.words.shape[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedAffine:
    """An AffineWeight.

    Attributes:
        scales: [num_rows, out_features], of the dtype they were stored in.
        zeros: like scales, of `code_dtype`, as much too large as codes are there; None: every one is `middle`.
        num_runs: equal runs of inputs that a block is cut into, each of one group.
        runs_per_row: runs, through all blocks, that share a row of scales.
        code_dtype: in which codes are made numbers, see `code_dtype_for`.
    """

    codes: PackedCodes
    scales: Tensor
    zeros: Tensor | None
    num_runs: int
    runs_per_row: int
    code_dtype: torch.dtype

    @property
    def middle(self) -> int:
        return bias_of(self.code_dtype) + (1 << self.codes.bits - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outliers:
    """A sparse matrix by rows.

    Attributes:
        starts: [out_features + 1] int32, where each output's begin. columns: [num] int32. values: [num] float32.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedLookup:
    """A LookupWeight. table: [out_features, 2 ** bits], of the model's dtype."""

    codes: PackedCodes
    table: Tensor
    outliers: Outliers | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where inputs lie so that groups are whole pairs.

    Attributes:
        order: as in PackedCodes, never None; the places are whole blocks.
        num_runs, runs_per_row: as in PackedAffine.
        rows: [num_rows] int64, the group whose scales a row is.
    """

    order: Tensor
    num_runs: int
    runs_per_row: int
    rows: Tensor


def pairs_per_block(bits: int) -> int:
    return 16 // bits


def block_inputs(bits: int) -> int:
    """Inputs of one block."""
    return PAIR * pairs_per_block(bits)


def num_blocks(bits: int, num_places: int) -> int:
    return -(-num_places // block_inputs(bits))


def code_dtype_for(bits: int, dtype: torch.dtype, interpreted: bool) -> torch.dtype:
    """In which codes are made numbers for activations of `dtype`.

    bfloat16 spares bfloat16 activations a conversion, but takes 7 bits, and Triton's interpreter cannot subtract in it.
    """
    return torch.bfloat16 if dtype is torch.bfloat16 and bits <= 7 and not interpreted else torch.float16


def bias_of(code_dtype: torch.dtype) -> int:
    """By how much codes are too large there: what a number's exponent says when its mantissa counts by ones."""
    return 1024 if code_dtype is torch.float16 else 128


def pack_affine(weight: AffineWeight, code_dtype: torch.dtype) -> PackedAffine:
    places = places_of(weight)
    zeros = None
    if weight.zeros is not None:
        zeros = (weight.zeros[places.rows].float() + bias_of(code_dtype)).to(code_dtype)
    return PackedAffine(
        codes=pack(weight.codes, weight.bits, places.order),
        scales=weight.scales[places.rows],
        zeros=zeros,
        num_runs=places.num_runs,
        runs_per_row=places.runs_per_row,
        code_dtype=code_dtype,
    )


def pack_lookup(weight: LookupWeight, dtype: torch.dtype) -> PackedLookup:
    order = torch.arange(weight.codes.shape[1], device=weight.codes.device)
    outliers = None
    if weight.outliers is not None:
        outliers = Outliers(
            starts=weight.outliers.crow_indices().int(),
            columns=weight.outliers.col_indices().int(),
            values=weight.outliers.values().float(),
        )
    codes = pack(weight.codes, weight.bits, filled(order, weight.bits))
    return PackedLookup(codes=codes, table=weight.table.to(dtype).contiguous(), outliers=outliers)


def num_affine_bytes(facts: WeightFacts) -> int:
    """Of what `pack_affine` makes, scales of 16 bits, groups of one size."""
    size = facts.group_size
    num_rows = -(-facts.in_features // size)
    places = facts.in_features
    if num_rows > 1 and size % PAIR:
        places = num_rows * PAIR * -(-size // PAIR)
        num_rows = num_blocks(facts.bits, places) * pairs_per_block(facts.bits)
    return _num_code_bytes(facts, places, facts.act_order) + num_rows * facts.out_features * (
        2 if facts.symmetric else 4
    )


def num_lookup_bytes(facts: WeightFacts, dtype: torch.dtype) -> int:
    """Of what `pack_lookup` makes, outliers not counted."""
    return _num_code_bytes(facts, facts.in_features, False) + (facts.out_features << facts.bits) * dtype.itemsize


def places_of(weight: AffineWeight) -> Places:
    """Inputs sorted by group; groups that are no whole pairs, or of several sizes, are filled up to pairs."""
    groups = weight.groups()
    sizes = torch.bincount(groups, minlength=len(weight.scales))
    order = torch.argsort(groups, stable=True)
    size = int(sizes.max())
    if len(sizes) == 1:
        return _even(weight.bits, order, 1, num_blocks(weight.bits, len(order)), 1)
    if size % PAIR == 0 and bool((sizes[:-1] == size).all()):
        pairs = max(n for n in _divisors(pairs_per_block(weight.bits)) if size % (PAIR * n) == 0)
        return _even(weight.bits, order, pairs_per_block(weight.bits) // pairs, size // (PAIR * pairs), len(sizes))
    return _filled(weight.bits, order, sizes)


def pack(codes: Tensor, bits: int, order: Tensor) -> PackedCodes:
    """Codes [out_features, in_features] uint8 in these places."""
    out_features, in_features = codes.shape
    identity = len(order) == in_features and bool((order == torch.arange(in_features, device=order.device)).all())
    placed = codes[:, order.clamp(min=0)].view(out_features, -1, pairs_per_block(bits), 2, SLAB)
    words = torch.zeros(out_features, placed.shape[1], SLAB, dtype=torch.int32, device=codes.device)
    for pair in range(pairs_per_block(bits)):
        words |= placed[:, :, pair, 0].int() << (bits * pair)
        words |= placed[:, :, pair, 1].int() << (bits * pair + 16)
    return PackedCodes(
        bits=bits,
        in_features=in_features,
        words=words.transpose(0, 1).contiguous(),
        order=None if identity else order.int(),
    )


def filled(order: Tensor, bits: int) -> Tensor:
    """The order with -1 in the places that are left of the last block."""
    missing = num_blocks(bits, len(order)) * block_inputs(bits) - len(order)
    return torch.nn.functional.pad(order, (0, missing), value=-1)


def _num_code_bytes(facts: WeightFacts, num_places: int, has_order: bool) -> int:
    blocks = num_blocks(facts.bits, num_places)
    has_order = has_order or blocks * block_inputs(facts.bits) != facts.in_features
    order = 4 * blocks * block_inputs(facts.bits) if has_order else 0
    return 4 * SLAB * blocks * facts.out_features + order


def _even(bits: int, order: Tensor, num_runs: int, runs_per_row: int, num_rows: int) -> Places:
    rows = torch.arange(num_rows, device=order.device)
    return Places(order=filled(order, bits), num_runs=num_runs, runs_per_row=runs_per_row, rows=rows)


def _filled(bits: int, order: Tensor, sizes: Tensor) -> Places:
    """Each group filled up to whole pairs, a row of scales for every pair."""
    pairs = (sizes + PAIR - 1) // PAIR
    places = torch.full((int(pairs.sum()) * PAIR,), -1, dtype=torch.int64, device=order.device)
    starts, firsts = pairs.cumsum(0) - pairs, sizes.cumsum(0) - sizes
    groups = torch.repeat_interleave(torch.arange(len(sizes), device=order.device), sizes)
    places[(starts * PAIR - firsts)[groups] + torch.arange(len(order), device=order.device)] = order
    places = filled(places, bits)
    rows = torch.repeat_interleave(torch.arange(len(sizes), device=order.device), pairs)
    rows = torch.nn.functional.pad(rows, (0, len(places) // PAIR - len(rows)))
    return Places(order=places, num_runs=pairs_per_block(bits), runs_per_row=1, rows=rows)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
