# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Sums over parts of the inputs, and their sum: in a fixed order, so that the same product has the same bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Partials:
    """Room for the sums.

    Attributes:
        sums: [num_splits or more, num_tokens, out_features] float32; what is behind the splits, others fill.
        blocks_per_split: blocks of inputs that one split sums over.
    """

    sums: Tensor
    num_splits: int
    blocks_per_split: int


def make_partials(x: Tensor, out_features: int, num_blocks: int, most_splits: int, num_others: int) -> Partials:
    """At most `most_splits` splits, none of them empty, and room for `num_others` sums more; uninitialised."""
    blocks_per_split = triton.cdiv(num_blocks, max(min(most_splits, num_blocks), 1))
    num_splits = triton.cdiv(num_blocks, blocks_per_split)
    shape = (num_splits + num_others, len(x), out_features)
    sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    return Partials(sums=sums, num_splits=num_splits, blocks_per_split=blocks_per_split)


@triton.jit(do_not_specialize=["num_sums", "num_tokens"])
def add_partials_kernel(sums_ptr, bias_ptr, out_ptr, num_sums, num_tokens, out_features, BLOCK: tl.constexpr):
    """out[t, n] = sum_s sums[s, t, n] + bias[n], in the order of s. One program owns BLOCK outputs of one token."""
    token = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = output < out_features
    total = tl.zeros((BLOCK,), tl.float32)
    for index in range(num_sums):
        total += tl.load(sums_ptr + (index * num_tokens + token) * out_features + output, mask=mask, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + output, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * out_features + output, total.to(out_ptr.dtype.element_ty), mask=mask)


def add_partials(partials: Partials, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Launch it: [num_tokens, out_features] of `dtype`."""
    num_sums, num_tokens, out_features = partials.sums.shape
    out = torch.empty(num_tokens, out_features, dtype=dtype, device=partials.sums.device)
    grid = (num_tokens, triton.cdiv(out_features, _BLOCK))
    add_partials_kernel[grid](partials.sums, bias, out, num_sums, num_tokens, out_features, BLOCK=_BLOCK, num_warps=4)
    return out


def add_partials_reference(sums: Tensor, bias: Tensor | None) -> Tensor:
    """In float64."""
    total = sums.double().sum(dim=0)
    return total if bias is None else total + bias.double()
