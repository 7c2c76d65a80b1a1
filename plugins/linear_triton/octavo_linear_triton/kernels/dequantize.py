# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Weights written out in the model's dtype, for a matrix product of many tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_linear_triton.kernels.codes import exponent_of, looked_up, scaled_codes, triton_dtype
from octavo_linear_triton.kernels.outliers import add_outliers
from octavo_linear_triton.layout import PackedAffine, PackedLookup, pairs_per_block

_BLOCK_OUTPUTS = 64


@triton.jit
def _store_inputs(row_ptr, order_ptr, place, in_features, mask, values):
    """Columns of SLAB places from `place` on; row_ptr, mask: [BLOCK_OUTPUTS, 1]. Places of no input are left out."""
    places = place + tl.arange(0, 16)
    inputs = places if order_ptr is None else tl.load(order_ptr + places)
    tl.store(row_ptr + inputs[None, :], values.to(row_ptr.dtype.element_ty), mask=mask & (inputs >= 0)[None, :])


@triton.jit(do_not_specialize=["num_blocks", "runs_per_row", "num_rows", "exponent"])
def dequantize_affine_kernel(
    order_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    in_features,
    out_features,
    runs_per_row,
    num_rows,
    exponent,
    BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    CODE: tl.constexpr,
    MIDDLE: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """out[n, k] = scales[r, n] * (code[n, k] - zeros[r, n]), rounded once.

    One program owns one block of inputs k and BLOCK_OUTPUTS outputs n; r are runs of inputs that share scales. Outputs
    past the last are read as the last, and not stored.
    """
    block = tl.program_id(0)
    output = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    read_output = tl.minimum(output, out_features - 1)
    mask = (output < out_features)[:, None]
    out_rows = out_ptr + output.to(tl.int64)[:, None] * in_features
    words_block = words_ptr + block.to(tl.int64) * out_features * 16
    words = tl.load(words_block + read_output[:, None] * 16 + tl.arange(0, 16)[None, :])
    zeros = tl.full((BLOCK_OUTPUTS,), MIDDLE, CODE)
    for run in tl.static_range(NUM_RUNS):
        row = tl.minimum((block * NUM_RUNS + run) // runs_per_row, num_rows - 1)
        metadata = row.to(tl.int64) * out_features + read_output
        scales = tl.load(scales_ptr + metadata).to(tl.float32)[:, None]
        if zeros_ptr is not None:
            zeros = tl.load(zeros_ptr + metadata)
        for pair in tl.static_range(run * (PAIRS // NUM_RUNS), (run + 1) * (PAIRS // NUM_RUNS)):
            place = (block * PAIRS + pair) * 32
            low, high = scaled_codes(words, zeros, exponent, BITS * pair, BITS, tl.float32)
            _store_inputs(out_rows, order_ptr, place, in_features, mask, low * scales)
            _store_inputs(out_rows, order_ptr, place + 16, in_features, mask, high * scales)


@triton.jit
def dequantize_lookup_kernel(
    order_ptr,
    words_ptr,
    table_ptr,
    out_ptr,
    in_features,
    out_features,
    BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """out[n, k] = table[n, code[n, k]].

    One program owns one block of inputs k and BLOCK_OUTPUTS outputs n. Outputs past the last are read as the last, and
    not stored.
    """
    block = tl.program_id(0)
    output = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    read_output = tl.minimum(output, out_features - 1)
    mask = (output < out_features)[:, None]
    out_rows = out_ptr + output.to(tl.int64)[:, None] * in_features
    words_block = words_ptr + block.to(tl.int64) * out_features * 16
    words = tl.load(words_block + read_output[:, None] * 16 + tl.arange(0, 16)[None, :])
    table = tl.load(table_ptr + read_output[:, None] * 2**BITS + tl.arange(0, 2**BITS)[None, :])
    for pair in tl.static_range(PAIRS):
        place = (block * PAIRS + pair) * 32
        low, high = looked_up(words, table, BITS * pair, BITS)
        _store_inputs(out_rows, order_ptr, place, in_features, mask, low)
        _store_inputs(out_rows, order_ptr, place + 16, in_features, mask, high)


def dequantize(weight: PackedAffine | PackedLookup, dtype: torch.dtype) -> Tensor:
    """[out_features, in_features]; `dtype` is the model's, which a table has already."""
    return dequantize_affine(weight, dtype) if isinstance(weight, PackedAffine) else dequantize_lookup(weight)


def dequantize_affine(weight: PackedAffine, dtype: torch.dtype) -> Tensor:
    """Launch it: [out_features, in_features]."""
    codes = weight.codes
    out = torch.empty(codes.out_features, codes.in_features, dtype=dtype, device=codes.words.device)
    dequantize_affine_kernel[(codes.num_blocks, triton.cdiv(codes.out_features, _BLOCK_OUTPUTS))](
        codes.order,
        codes.words,
        weight.scales,
        weight.zeros,
        out,
        codes.in_features,
        codes.out_features,
        weight.runs_per_row,
        len(weight.scales),
        exponent_of(weight.code_dtype),
        BITS=codes.bits,
        PAIRS=pairs_per_block(codes.bits),
        NUM_RUNS=weight.num_runs,
        CODE=triton_dtype(weight.code_dtype),
        MIDDLE=weight.middle,
        BLOCK_OUTPUTS=_BLOCK_OUTPUTS,
        num_warps=4,
    )
    return out


def dequantize_lookup(weight: PackedLookup) -> Tensor:
    """Launch it, and add the outliers: [out_features, in_features] of the table's dtype."""
    codes = weight.codes
    out = torch.empty(codes.out_features, codes.in_features, dtype=weight.table.dtype, device=codes.words.device)
    dequantize_lookup_kernel[(codes.num_blocks, triton.cdiv(codes.out_features, _BLOCK_OUTPUTS))](
        codes.order,
        codes.words,
        weight.table,
        out,
        codes.in_features,
        codes.out_features,
        BITS=codes.bits,
        PAIRS=pairs_per_block(codes.bits),
        BLOCK_OUTPUTS=_BLOCK_OUTPUTS,
        num_warps=4,
    )
    if weight.outliers is not None:
        add_outliers(weight.outliers, out)
    return out
