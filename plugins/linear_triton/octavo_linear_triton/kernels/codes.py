# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""What the kernels share: codes out of words, as layout.py puts them there, and inputs out of activations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.plugins.tuned_data import INTERPRETED


@triton.jit
def scaled_codes(words, biased_zeros, exponent, SHIFT: tl.constexpr, BITS: tl.constexpr, DOT: tl.constexpr):
    """(code - zero) of the low and of the high halves of words, each [BLOCK_OUTPUTS, SLAB] of DOT.

    A code in the low bits of a floating point number of exponent 10 (float16) or 7 (bfloat16) is 1024 or 128 more than
    itself: no conversion, which would be four times slower, and the difference from a zero as much too large is exact.
    `exponent` is an argument, not a constant, so that mask and exponent are one instruction: it takes one constant.
    """
    mask: tl.constexpr = (2**BITS - 1) * 0x10001
    pairs = ((words >> SHIFT) & mask) | exponent
    code_dtype: tl.constexpr = biased_zeros.dtype
    low = pairs.to(tl.int16).to(code_dtype, bitcast=True) - biased_zeros[:, None]
    high = (pairs >> 16).to(tl.int16).to(code_dtype, bitcast=True) - biased_zeros[:, None]
    return low.to(DOT), high.to(DOT)


@triton.jit
def looked_up(words, table, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """table[output, code] of the low and of the high halves of words, [BLOCK_OUTPUTS, SLAB] each, as the table is."""
    mask: tl.constexpr = 2**BITS - 1
    low = tl.gather(table, (words >> SHIFT) & mask, 1)
    high = tl.gather(table, (words >> (SHIFT + 16)) & mask, 1)
    return low, high


@triton.jit
def load_inputs(x_rows_ptr, order_ptr, place, DOT: tl.constexpr):
    """x of SLAB places from `place` on, [SLAB, BLOCK_TOKENS]: 0 where no input is; x_rows_ptr [1, BLOCK_TOKENS]."""
    places = place + tl.arange(0, 16)
    if order_ptr is None:
        x = tl.load(x_rows_ptr + places[:, None])
    else:
        inputs = tl.load(order_ptr + places)
        x = tl.load(x_rows_ptr + inputs[:, None], mask=(inputs >= 0)[:, None], other=0.0)
    return x.to(DOT)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Of the operands of a product; the interpreter's arithmetic in bfloat16 is wrong."""
    return tl.float32 if INTERPRETED and dtype is torch.bfloat16 else triton_dtype(dtype)


def exponent_of(code_dtype: torch.dtype) -> int:
    """The bits of two numbers that stand for code 0, in one word."""
    return 0x64006400 if code_dtype is torch.float16 else 0x43004300
