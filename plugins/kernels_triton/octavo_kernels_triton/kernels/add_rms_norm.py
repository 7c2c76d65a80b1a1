# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Residual addition and RMSNorm in one pass over the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.errors import ShapeError

# Elements of a program's tile, which short rows share; and how many of them a thread holds: 16 bytes of bfloat16.
_MIN_TILE = 1024
_ELEMENTS_PER_THREAD = 8
_MAX_WARPS = 16


@triton.jit(do_not_specialize=["num_rows"])
def add_rms_norm_kernel(
    hidden_ptr,
    residual_ptr,  # None: the total is hidden itself
    weight_ptr,
    total_ptr,  # None with residual_ptr
    out_ptr,
    num_rows,  # num_tokens * num_inner
    num_inner,  # rows of one token: heads, or 1
    size,
    eps,
    stride_hidden_token,
    stride_hidden_inner,
    stride_residual_token,
    stride_residual_inner,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """total[r] = hidden[r] + residual[r]; out[r] = total[r] / sqrt(mean(total[r]^2) + eps) * weight.

    One program owns BLOCK_ROWS whole rows; BLOCK_SIZE >= size, so a row is read once. Rows past num_rows and columns
    past size are masked; masked zeros add nothing to the sum of squares. The outputs are contiguous.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_SIZE)
    mask = (rows < num_rows)[:, None] & (columns < size)[None, :]
    tokens, inner = (rows // num_inner).to(tl.int64), rows % num_inner

    offsets = (tokens * stride_hidden_token + inner * stride_hidden_inner)[:, None] + columns[None, :]
    total = tl.load(hidden_ptr + offsets, mask, other=0.0).to(tl.float32)
    out_offsets = rows.to(tl.int64)[:, None] * size + columns[None, :]
    if residual_ptr is not None:
        offsets = (tokens * stride_residual_token + inner * stride_residual_inner)[:, None] + columns[None, :]
        total += tl.load(residual_ptr + offsets, mask, other=0.0).to(tl.float32)
        rounded = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + out_offsets, rounded, mask)
        total = rounded.to(tl.float32)  # what the next layer adds to is what is normalised here
    mean = tl.sum(total * total, axis=1) / size
    weight = tl.load(weight_ptr + columns, columns < size, other=0.0).to(tl.float32)
    out = total * tl.rsqrt(mean + eps)[:, None] * weight[None, :]
    tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask)


def add_rms_norm(hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launch it: (out, total), both contiguous unless the total is `hidden` itself, which it is without a residual.

    Args:
        hidden, residual: [..., size], the same dtype. Two or three dimensions are read where they lie as long as the
            last is contiguous; anything else is copied first.
        weight: [size], any float dtype.

    Raises:
        ShapeError: the shapes do not fit together.
    """
    if weight.shape != hidden.shape[-1:] or (residual is not None and residual.shape != hidden.shape):
        raise ShapeError(
            f"A norm wants hidden and residual of one shape [..., size] and a weight [size]; found hidden "
            f"{list(hidden.shape)}, residual {None if residual is None else list(residual.shape)}, "
            f"weight {list(weight.shape)}."
        )
    size = hidden.shape[-1]
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    total = hidden if residual is None else torch.empty_like(out)
    num_rows = hidden.numel() // size
    if num_rows == 0:
        return out, total
    hidden_rows = _rows(hidden)
    residual_rows = hidden_rows if residual is None else _rows(residual)
    block_size = triton.next_power_of_2(size)
    block_rows = max(1, _MIN_TILE // block_size)
    num_warps = min(max(block_rows * block_size // (32 * _ELEMENTS_PER_THREAD), 1), _MAX_WARPS)
    add_rms_norm_kernel[(triton.cdiv(num_rows, block_rows),)](
        hidden_rows,
        None if residual is None else residual_rows,
        weight.contiguous(),
        None if residual is None else total,
        out,
        num_rows,
        hidden_rows.shape[1],
        size,
        eps,
        hidden_rows.stride(0),
        hidden_rows.stride(1),
        residual_rows.stride(0),
        residual_rows.stride(1),
        BLOCK_ROWS=block_rows,
        BLOCK_SIZE=block_size,
        num_warps=num_warps,
    )
    return out, total


def add_rms_norm_reference(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(out, total): out in float64, of the total as the model's dtype rounds it."""
    total = hidden if residual is None else hidden + residual
    exact = total.double()
    return exact / (exact.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double(), total


def _rows(x: Tensor) -> Tensor:
    """[num_tokens, num_inner, size] with a contiguous last dimension."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x if x.dim() == 3 else x.reshape(-1, 1, x.shape[-1])
