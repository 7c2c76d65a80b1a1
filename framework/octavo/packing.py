"""Packed integers: how small codes lie in 32-bit words, and back. Published: what every format of packed weights needs.

Codes of b bits are one little-endian stream of bits through consecutive words: code i is bits [b * i, b * (i + 1)).
For 2, 4 and 8 bits a word holds 32 / b whole codes; 3 bits run over word boundaries, 32 codes in 3 words. In the planar
variant each group of 32 codes is parted into planes of 4, 2 and 1 bits, each a stream of its own.

Source: the layouts of AutoGPTQ and GPTQModel ("gptq", "gptq_v2"; planar: "gptq_p").
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

WORD_BITS = 32
CODES_PER_BLOCK = 32
"""Codes that fill whole words, whatever their bits: as many words as a code has bits."""


def words_for(num_codes: int, bits: int, *, planar: bool = False) -> int:
    """32-bit words that so many codes take."""
    if planar and len(_planes(bits)) > 1:
        return -(-num_codes // CODES_PER_BLOCK) * bits
    return -(-num_codes * bits // WORD_BITS)


def whole_words(bits: int, *, planar: bool = False) -> tuple[int, int]:
    """(codes, words): the fewest codes that fill whole words, between which packed codes may be cut."""
    if planar and len(_planes(bits)) > 1:
        return CODES_PER_BLOCK, bits
    divisor = gcd(bits, WORD_BITS)
    return WORD_BITS // divisor, bits // divisor


def unpack_columns(words: Tensor, bits: int, num_columns: int, *, planar: bool = False) -> Tensor:
    """Codes that are packed along the last axis.

    Args:
        words: [rows, words_for(num_columns, bits, planar=planar)] int32, read as unsigned.
        bits: of a code, 1 to 8.

    Returns:
        [rows, num_columns] uint8.
    """
    planes = _planes(bits) if planar else [(bits, 0)]
    num_blocks = -(-num_columns // CODES_PER_BLOCK)
    padded = words.new_zeros(words.shape[0], num_blocks * bits)
    padded[:, : words.shape[1]] = words
    blocks = padded.view(-1, num_blocks, bits)
    codes = torch.zeros(words.shape[0], num_blocks, CODES_PER_BLOCK, dtype=torch.uint8, device=words.device)
    first = 0
    for width, shift in planes:
        codes |= _unpack_blocks(blocks[:, :, first : first + width], width) << shift
        first += width
    return codes.flatten(1)[:, :num_columns].contiguous()


def pack_columns(codes: Tensor, bits: int, *, planar: bool = False) -> Tensor:
    """The inverse of `unpack_columns`.

    Args:
        codes: [rows, columns] of any integer dtype, each below 2 ** bits.

    Returns:
        [rows, words_for(columns, bits, planar=planar)] int32; what is left of the last word is zero.
    """
    rows, columns = codes.shape
    num_blocks = -(-columns // CODES_PER_BLOCK)
    padded = codes.new_zeros(rows, num_blocks * CODES_PER_BLOCK, dtype=torch.uint8)
    padded[:, :columns] = codes
    blocks = padded.view(rows, num_blocks, CODES_PER_BLOCK)
    planes = _planes(bits) if planar else [(bits, 0)]
    words = torch.cat([_pack_blocks((blocks >> shift) & (2**width - 1), width) for width, shift in planes], dim=-1)
    return words.flatten(1)[:, : words_for(columns, bits, planar=planar)].contiguous()


def unpack_rows(words: Tensor, bits: int, num_rows: int, *, planar: bool = False) -> Tensor:
    """Codes that are packed along the first axis: [words, columns] int32 -> [num_rows, columns] uint8."""
    return unpack_columns(words.T, bits, num_rows, planar=planar).T


def pack_rows(codes: Tensor, bits: int, *, planar: bool = False) -> Tensor:
    """The inverse of `unpack_rows`."""
    return pack_columns(codes.T, bits, planar=planar).T.contiguous()


def _planes(bits: int) -> list[tuple[int, int]]:
    """(width, shift) of each plane of a planar code, the lowest first: 7 bits are 4, 2 and 1."""
    planes, shift = [], 0
    for width in (8, 4, 2, 1):
        if bits - shift >= width:
            planes.append((width, shift))
            shift += width
    return planes


def _unpack_blocks(words: Tensor, bits: int) -> Tensor:
    """[rows, blocks, bits] int32 -> [rows, blocks, 32] uint8."""
    in_bytes = words.contiguous().view(torch.uint8)
    mask = 2**bits - 1
    if WORD_BITS % bits == 0:  # through bytes: eight times less memory than whole words
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        return torch.flatten((in_bytes.unsqueeze(-1) >> shifts) & mask, -2)
    starts = torch.arange(0, CODES_PER_BLOCK * bits, bits, device=words.device)
    in_bytes = torch.nn.functional.pad(in_bytes, (0, 1))
    low, high = in_bytes[..., starts // 8].int(), in_bytes[..., starts // 8 + 1].int()
    return torch.bitwise_and((low | (high << 8)) >> (starts % 8).int(), mask).to(torch.uint8)


def _pack_blocks(codes: Tensor, bits: int) -> Tensor:
    """[rows, blocks, 32] uint8 -> [rows, blocks, bits] int32."""
    if WORD_BITS % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
        in_bytes = (codes.view(*codes.shape[:-1], 4 * bits, 8 // bits) << shifts).sum(-1, dtype=torch.uint8)
        return in_bytes.view(torch.int32)
    starts = torch.arange(0, 8 * bits, bits, device=codes.device)
    # 8 codes are `bits` whole bytes.
    of_eight = (codes.view(*codes.shape[:-1], 4, 8).long() << starts).sum(-1, keepdim=True)
    in_bytes = (of_eight >> torch.arange(0, 8 * bits, 8, device=codes.device)).to(torch.uint8)
    return torch.flatten(in_bytes, -2).view(torch.int32)
