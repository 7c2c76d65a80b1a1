"""Triton kernels: each file has a formula, the kernel, its launcher and its reference in float64."""

from __future__ import annotations

import torch
import triton.language as tl  # type: ignore[import-untyped]

from octavo.plugins.tuned_data import INTERPRETED

_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """What tiles are multiplied in. Triton's interpreter gets products of bfloat16 silently wrong, so there float32."""
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else _TRITON_DTYPES[dtype]
