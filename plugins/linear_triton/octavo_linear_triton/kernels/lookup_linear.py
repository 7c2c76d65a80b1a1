# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""x @ W.T for codes into a codebook of each output, looked up in shared memory: decode and small batches."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo_linear_triton.kernels.codes import dot_dtype, load_inputs, looked_up
from octavo_linear_triton.kernels.partials import Partials
from octavo_linear_triton.layout import PackedLookup, pairs_per_block
from octavo_linear_triton.tuned import ProductConfig


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "blocks_per_split"])
def lookup_linear_kernel(
    x_ptr,
    order_ptr,
    words_ptr,
    table_ptr,
    out_ptr,
    num_tokens,
    out_features,
    num_blocks,
    blocks_per_split,
    stride_x,
    BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """out[s, t, n] = sum_{k in s} table[n, code[n, k]] * x[t, k].

    One program owns BLOCK_OUTPUTS outputs n, BLOCK_TOKENS tokens t and one split s of the blocks of inputs k. Outputs
    and tokens past the last are read as the last, and not stored.
    """
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    split = tl.program_id(2)
    read_output = tl.minimum(output, out_features - 1)
    x_rows = x_ptr + tl.minimum(token, num_tokens - 1).to(tl.int64)[None, :] * stride_x
    words_rows = words_ptr + read_output[:, None] * 16 + tl.arange(0, 16)[None, :]
    table = tl.load(table_ptr + read_output[:, None] * 2**BITS + tl.arange(0, 2**BITS)[None, :]).to(DOT)
    sums = tl.zeros((BLOCK_OUTPUTS, BLOCK_TOKENS), tl.float32)
    first = split * blocks_per_split
    for step in range(tl.minimum(blocks_per_split, num_blocks - first)):
        block = first + step
        words = tl.load(words_rows + block.to(tl.int64) * out_features * 16)
        for pair in tl.static_range(PAIRS):
            place = (block * PAIRS + pair) * 32
            low, high = looked_up(words, table, BITS * pair, BITS)
            sums = tl.dot(low, load_inputs(x_rows, order_ptr, place, DOT), sums, input_precision="ieee")
            sums = tl.dot(high, load_inputs(x_rows, order_ptr, place + 16, DOT), sums, input_precision="ieee")
    out = out_ptr + (split * num_tokens + token).to(tl.int64)[None, :] * out_features + output[:, None]
    tl.store(out, sums, mask=(token < num_tokens)[None, :] & (output < out_features)[:, None])


def lookup_linear(x: Tensor, weight: PackedLookup, partials: Partials, config: ProductConfig) -> None:
    """Launch it; the outliers are not in it.

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
    lookup_linear_kernel[grid](
        x,
        codes.order,
        codes.words,
        weight.table,
        partials.sums,
        len(x),
        codes.out_features,
        codes.num_blocks,
        partials.blocks_per_split,
        x.stride(0),
        BITS=codes.bits,
        PAIRS=pairs_per_block(codes.bits),
        DOT=dot_dtype(x.dtype),
        BLOCK_TOKENS=config.block_tokens,
        BLOCK_OUTPUTS=config.block_outputs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
