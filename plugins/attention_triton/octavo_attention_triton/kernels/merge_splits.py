# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Attention over parts of a context, each with a softmax of its own, put together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.errors import ShapeError


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitStates:
    """Room for what attention over each split of each context leaves, float32.

    A step takes the first num_rows * num_heads * num_splits entries, the split changing fastest, then the head.

    Attributes:
        acc: [capacity, head_dim], sum over the split's keys of 2^(score - max) * value; not written of an empty split.
        max: [capacity], the largest score, in units of log 2; finite, of an empty split too.
        sum: [capacity], sum over the split's keys of 2^(score - max); 0 of an empty split.
        max_splits: the most that any step is cut into.
    """

    acc: Tensor
    max: Tensor
    sum: Tensor
    max_splits: int

    @classmethod
    def allocate(cls, capacity: int, head_dim: int, max_splits: int, device: str) -> SplitStates:
        """Uninitialised; with `max_splits` 1 nothing is ever written."""
        acc = torch.empty(capacity, head_dim, dtype=torch.float32, device=device)
        largest, total = torch.empty(2, capacity, dtype=torch.float32, device=device).unbind()
        return cls(acc=acc, max=largest, sum=total, max_splits=max_splits)


@triton.jit(do_not_specialize=["num_splits"])
def merge_splits_kernel(
    acc_ptr,
    max_ptr,
    sum_ptr,
    out_ptr,
    num_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """out[i] = sum_s w[i, s] * acc[i, s] / sum_s w[i, s] * sum[i, s], where w[i, s] = 2^(max[i, s] - max_s max[i, s]).

    One program owns one i, a head of a row. Splits past num_splits, and empty ones, weigh nothing and are not read;
    without any other the result is 0.
    """
    index = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, BLOCK_SPLITS)
    dims = tl.arange(0, BLOCK_DIM)
    entries = index * num_splits + splits
    sums = tl.load(sum_ptr + entries, mask=splits < num_splits, other=0.0)
    maxima = tl.load(max_ptr + entries, mask=splits < num_splits, other=-1e30)
    weights = tl.where(sums > 0, tl.exp2(maxima - tl.max(maxima, axis=0)), 0.0)
    read = (sums > 0)[:, None] & (dims < HEAD_DIM)[None, :]
    acc = tl.load(acc_ptr + entries[:, None] * HEAD_DIM + dims[None, :], mask=read, other=0.0)
    total = tl.sum(weights * sums, axis=0)
    out = tl.sum(weights[:, None] * acc, axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + index * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def merge_splits(states: SplitStates, num_splits: int, out: Tensor) -> None:
    """Launch it.

    Args:
        states: the first out.shape[0] * out.shape[1] * num_splits entries are filled.
        out: [num_rows, num_heads, head_dim], contiguous; written.

    Raises:
        ShapeError: `states` has no room for so many splits.
    """
    num_rows, num_heads, head_dim = out.shape
    if num_splits > states.max_splits or num_rows * num_heads * num_splits > len(states.max):
        raise ShapeError(
            f"{num_rows} rows of {num_heads} heads in {num_splits} splits: the states hold at most {states.max_splits} "
            f"splits and {len(states.max)} entries. Allocate larger ones or take fewer splits."
        )
    merge_splits_kernel[(num_rows * num_heads,)](
        states.acc,
        states.max,
        states.sum,
        out,
        num_splits,
        HEAD_DIM=head_dim,
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        BLOCK_SPLITS=triton.next_power_of_2(states.max_splits),  # not of num_splits: one variant for all steps
        num_warps=4,
    )


def merge_splits_reference(acc: Tensor, largest: Tensor, total: Tensor) -> Tensor:
    """The formula in float64: acc [..., num_splits, head_dim], the others [..., num_splits] -> [..., head_dim]."""
    empty = total == 0
    weights = torch.exp2((largest - largest.amax(dim=-1, keepdim=True)).double()).masked_fill(empty, 0.0)
    parts = acc.double().masked_fill(empty.unsqueeze(-1), 0.0) * weights.unsqueeze(-1)
    sums = (weights * total.double()).sum(dim=-1, keepdim=True)
    return parts.sum(dim=-2) / sums.where(sums > 0, 1.0)
