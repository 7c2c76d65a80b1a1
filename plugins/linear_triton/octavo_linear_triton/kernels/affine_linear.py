# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""x @ W.T for codes with scales and zeros, dequantised in registers: decode and small batches."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo_linear_triton.kernels.codes import dot_dtype, exponent_of, load_inputs, scaled_codes, triton_dtype
from octavo_linear_triton.kernels.partials import Partials
from octavo_linear_triton.layout import PackedAffine, pairs_per_block
from octavo_linear_triton.tuned import ProductConfig


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "blocks_per_split", "runs_per_row", "num_rows", "exponent"])
def affine_linear_kernel(
    x_ptr,
    order_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    num_tokens,
    out_features,
    num_blocks,
    blocks_per_split,
    runs_per_row,
    num_rows,
    exponent,
    stride_x,
    BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    CODE: tl.constexpr,
    MIDDLE: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """out[s, t, n] = sum_r scales[r, n] * sum_{k in r, k in s} (code[n, k] - zeros[r, n]) * x[t, k].

    One program owns BLOCK_OUTPUTS outputs n, BLOCK_TOKENS tokens t and one split s of the blocks of inputs k; r are
    runs of inputs that share scales. Outputs stand where a matrix instruction has its rows: weights then come out of
    registers, on Hopper too. Outputs and tokens past the last are read as the last, and not stored. Zeros are as much
    too large as codes are (codes.py), MIDDLE is the one of all where there are none.
    """
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    split = tl.program_id(2)
    read_output = tl.minimum(output, out_features - 1)
    x_rows = x_ptr + tl.minimum(token, num_tokens - 1).to(tl.int64)[None, :] * stride_x
    words_rows = words_ptr + read_output[:, None] * 16 + tl.arange(0, 16)[None, :]
    total = tl.zeros((BLOCK_OUTPUTS, BLOCK_TOKENS), tl.float32)
    zeros = tl.full((BLOCK_OUTPUTS,), MIDDLE, CODE)
    first = split * blocks_per_split
    for step in range(tl.minimum(blocks_per_split, num_blocks - first)):
        block = first + step
        words = tl.load(words_rows + block.to(tl.int64) * out_features * 16)
        for run in tl.static_range(NUM_RUNS):
            row = tl.minimum((block * NUM_RUNS + run) // runs_per_row, num_rows - 1)
            metadata = row.to(tl.int64) * out_features + read_output
            scales = tl.load(scales_ptr + metadata).to(tl.float32)
            if zeros_ptr is not None:
                zeros = tl.load(zeros_ptr + metadata)
            sums = tl.zeros((BLOCK_OUTPUTS, BLOCK_TOKENS), tl.float32)
            for pair in tl.static_range(run * (PAIRS // NUM_RUNS), (run + 1) * (PAIRS // NUM_RUNS)):
                place = (block * PAIRS + pair) * 32
                low, high = scaled_codes(words, zeros, exponent, BITS * pair, BITS, DOT)
                sums = tl.dot(low, load_inputs(x_rows, order_ptr, place, DOT), sums, input_precision="ieee")
                sums = tl.dot(high, load_inputs(x_rows, order_ptr, place + 16, DOT), sums, input_precision="ieee")
            total += sums * scales[:, None]
    out = out_ptr + (split * num_tokens + token).to(tl.int64)[None, :] * out_features + output[:, None]
    tl.store(out, total, mask=(token < num_tokens)[None, :] & (output < out_features)[:, None])


def affine_linear(x: Tensor, weight: PackedAffine, partials: Partials, config: ProductConfig) -> None:
    """Launch it.

    Args:
        x: [num_tokens, in_features], rows contiguous.
        partials: of num_tokens rows, one slice for each split; written.
    """
    codes = weight.codes
    grid = (
        triton.cdiv(codes.out_features, config.block_outputs),
        triton.cdiv(len(x), config.block_tokens),
        partials.num_splits,
    )
    affine_linear_kernel[grid](
        x,
        codes.order,
        codes.words,
        weight.scales,
        weight.zeros,
        partials.sums,
        len(x),
        codes.out_features,
        codes.num_blocks,
        partials.blocks_per_split,
        weight.runs_per_row,
        len(weight.scales),
        exponent_of(weight.code_dtype),
        x.stride(0),
        BITS=codes.bits,
        PAIRS=pairs_per_block(codes.bits),
        NUM_RUNS=weight.num_runs,
        CODE=triton_dtype(weight.code_dtype),
        MIDDLE=weight.middle,
        DOT=dot_dtype(x.dtype),
        BLOCK_TOKENS=config.block_tokens,
        BLOCK_OUTPUTS=config.block_outputs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
