"""What cannot be said as data in the spec, because the installed torch decides it. Asked last, when all else agrees."""

from __future__ import annotations

import torch
from torch.nn import functional

from octavo.plugins.specs import AttentionNeed


def why_not(need: AttentionNeed) -> list[str]:
    """Reasons against serving `need` here: the operator is tried once, on next to nothing."""
    dtype: torch.dtype = getattr(torch, need.dtype or "float32")
    query = torch.zeros(1, need.num_heads, 1, need.head_dim, dtype=dtype)
    key = torch.zeros(1, need.num_kv_heads, 1, need.head_dim, dtype=dtype)
    try:
        functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    except (RuntimeError, TypeError) as error:  # older ones lack a dtype on the CPU, or enable_gqa
        return [f"cannot attend in {need.dtype} with torch {torch.__version__}: {error}"]
    return []
