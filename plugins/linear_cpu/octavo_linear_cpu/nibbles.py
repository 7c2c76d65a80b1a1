"""How torch's int4 product has its weight: groups of the sizes it knows, and nibbles in an order of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

GROUP_SIZES = (32, 64, 128, 256)
"""That the operator knows."""

BLOCK = 64
"""Outputs are padded to whole blocks: the operator packs these by themselves and all alike."""

_LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F

_PACKED_AT_ONCE = 2**22
"""Codes: torch's packing wants them as 32-bit integers, eight times what they take packed."""


def choose_group_size(sizes: Sequence[int]) -> int:
    """The operator's group size with which groups of these sizes take the least memory, each padded to whole ones."""
    return min(GROUP_SIZES, key=lambda size: (num_packed_inputs(sizes, size) * (1 + 8 / size), -size))


def num_packed_inputs(sizes: Sequence[int], group_size: int) -> int:
    """Inputs when each group is padded to whole groups of the operator."""
    return sum(-(-size // group_size) * group_size for size in sizes)


def order_by_group(groups: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Bring inputs of one group together, and pad each group to whole groups of the operator.

    Args:
        groups: [in_features] int64, the group of every input.
        group_size: the operator's.

    Returns:
        [num_packed_inputs] int64, the input at each place, `in_features` where there is none;
        [num_packed_inputs / group_size] int64, the group of each of the operator's groups.
    """
    sizes = groups.bincount()
    padded_sizes = (sizes + group_size - 1) // group_size * group_size
    by_group = groups.argsort(stable=True)
    padding_before = (padded_sizes - sizes).cumsum(0) - (padded_sizes - sizes)
    places = torch.arange(len(groups)) + padding_before[groups[by_group]]
    order = torch.full((int(padded_sizes.sum()),), len(groups))
    order[places] = by_group
    return order, torch.arange(len(sizes)).repeat_interleave(padded_sizes // group_size)


def pack(codes: Tensor) -> Tensor:
    """[out_features, in_features] uint8 below 16, both padded -> uint8 [out_features, in_features / 2], opaque."""
    out_features, in_features = codes.shape
    packed = torch.empty(out_features, in_features // 2, dtype=torch.uint8)
    step = max(1, _PACKED_AT_ONCE // (BLOCK * in_features)) * BLOCK
    for start in range(0, out_features, step):
        some = codes[start : start + step].int()
        packed[start : start + step] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(some, 1).view(len(some), -1)
    return packed


@cache
def outputs_interleaved() -> int | None:
    """Outputs whose nibbles `unpack` finds side by side; None: torch packs in an order that `unpack` does not know.

    The order is torch's own affair, so that it is tried: 64 outputs with AVX-512, 32 with AVX2.
    """
    codes = torch.randint(16, (2 * BLOCK, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack(codes)
    for outputs in (64, 32):
        if torch.equal(in_order(unpack(packed, outputs), outputs).T, codes):
            return outputs
    return None


def unpack(packed: Tensor, outputs: int) -> Tensor:
    """The codes of whole blocks, their outputs in the order that comes without moving single bytes.

    Args:
        packed: [out_features, in_features / 2], some rows of `pack`.
        outputs: of `outputs_interleaved`.

    Returns:
        [in_features, out_features] uint8; `in_order` brings the outputs into theirs.
    """
    in_features = 2 * packed.shape[1]
    # Bytes lie as [blocks, in_features, outputs / 2]: the low nibbles are a block's first outputs, the high its last.
    words = packed.view(torch.int64).view(-1, in_features, outputs // 16).transpose(0, 1).reshape(in_features, -1)
    nibbles = words.new_empty(in_features, 2, words.shape[1])
    torch.bitwise_and(words, _LOW_NIBBLES, out=nibbles[:, 0])
    torch.bitwise_and(words >> 4, _LOW_NIBBLES, out=nibbles[:, 1])
    return nibbles.view(torch.uint8).flatten(1)


def as_unpacked(of_outputs: Tensor, outputs: int) -> Tensor:
    """[..., out_features] in the order of outputs that `unpack` gives."""
    return of_outputs.reshape(*of_outputs.shape[:-1], -1, 2, outputs // 2).transpose(-3, -2).flatten(-3)


def in_order(of_outputs: Tensor, outputs: int) -> Tensor:
    """The inverse of `as_unpacked`."""
    return of_outputs.reshape(*of_outputs.shape[:-1], 2, -1, outputs // 2).transpose(-3, -2).flatten(-3)
