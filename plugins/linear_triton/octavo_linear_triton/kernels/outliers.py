# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Sparse weights beside the codes: their product, and adding them to dequantised weights."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.errors import ShapeError
from octavo_linear_triton.layout import Outliers

_BLOCK = 32
"""Of an output's outliers, at once: less than half a percent of some thousand inputs."""


@triton.jit
def outliers_linear_kernel(
    x_ptr, starts_ptr, columns_ptr, values_ptr, out_ptr, out_features, stride_x, BLOCK: tl.constexpr
):
    """out[t, n] = sum_i values[i] * x[t, columns[i]], where starts[n] <= i < starts[n + 1].

    One program owns output n of token t.
    """
    output = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    end = tl.load(starts_ptr + output + 1)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.load(starts_ptr + output), end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        columns = tl.load(columns_ptr + index, mask=index < end, other=0)
        values = tl.load(values_ptr + index, mask=index < end, other=0.0)
        sums += values * tl.load(x_ptr + token * stride_x + columns).to(tl.float32)
    tl.store(out_ptr + token * out_features + output, tl.sum(sums, axis=0))


@triton.jit
def add_outliers_kernel(starts_ptr, columns_ptr, values_ptr, weight_ptr, in_features, BLOCK: tl.constexpr):
    """weight[n, columns[i]] += values[i], where starts[n] <= i < starts[n + 1]. One program owns one output n."""
    output = tl.program_id(0)
    end = tl.load(starts_ptr + output + 1)
    row = weight_ptr + output.to(tl.int64) * in_features
    for start in range(tl.load(starts_ptr + output), end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < end
        columns = tl.load(columns_ptr + index, mask=mask, other=0)
        values = tl.load(values_ptr + index, mask=mask, other=0.0)
        sums = tl.load(row + columns, mask=mask, other=0.0).to(tl.float32) + values
        tl.store(row + columns, sums.to(weight_ptr.dtype.element_ty), mask=mask)


def outliers_linear(x: Tensor, outliers: Outliers, out: Tensor) -> None:
    """Launch it.

    Args:
        x: [num_tokens, in_features], rows contiguous.
        out: [num_tokens, out_features] float32, contiguous; written.

    Raises:
        ShapeError: `out` is not of so many tokens and outputs.
    """
    num_outputs = len(outliers.starts) - 1
    if out.shape != (len(x), num_outputs):
        raise ShapeError(f"Sums over outliers are [{len(x)}, {num_outputs}]; found room for {list(out.shape)}.")
    outliers_linear_kernel[(num_outputs, len(x))](
        x, outliers.starts, outliers.columns, outliers.values, out, num_outputs, x.stride(0), BLOCK=_BLOCK, num_warps=1
    )


def add_outliers(outliers: Outliers, weight: Tensor) -> None:
    """Launch it. weight: [out_features, in_features], contiguous; changed."""
    add_outliers_kernel[(len(weight),)](
        outliers.starts, outliers.columns, outliers.values, weight, weight.shape[1], BLOCK=_BLOCK, num_warps=1
    )
