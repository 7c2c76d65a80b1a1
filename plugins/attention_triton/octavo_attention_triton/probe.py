"""Whether this machine can run Triton's kernels of attention."""

from __future__ import annotations

import torch

from octavo.plugins import triton_probe
from octavo.plugins.specs import AttentionNeed

_MIN_HEAD_DIM, _MAX_HEAD_DIM = 16, 256  # what a tensor core takes at least, and what tiles in shared memory allow
_MIN_CAPABILITY_FP8 = (8, 9)  # Triton converts e4m3 from here on


def why_not(need: AttentionNeed) -> list[str]:
    """Reasons against these kernels; a need for "cuda" where torch sees no GPU is a plan for another machine."""
    if not _MIN_HEAD_DIM <= need.head_dim <= _MAX_HEAD_DIM:
        return [f"supports head sizes from {_MIN_HEAD_DIM} to {_MAX_HEAD_DIM}; the model has {need.head_dim}"]
    if reasons := triton_probe.why_not(need):
        return reasons
    if need.kv_cache_dtype == "fp8" and need.device == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < _MIN_CAPABILITY_FP8:
            needed, found = (".".join(map(str, one)) for one in (_MIN_CAPABILITY_FP8, capability))
            return [
                f"an fp8 KV cache needs a GPU of compute capability {needed} or newer; {torch.cuda.get_device_name()} "
                f"has {found}. Leave kv_cache_dtype at auto"
            ]
    return []
