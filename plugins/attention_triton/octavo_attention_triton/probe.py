"""Whether this machine can run Triton's kernels."""

from __future__ import annotations

import os

import torch

from octavo.plugins.specs import AttentionNeed

_MIN_HEAD_DIM, _MAX_HEAD_DIM = 16, 256  # what a tensor core takes at least, and what tiles in shared memory allow
_MIN_CAPABILITY = (8, 0)
_MIN_CAPABILITY_FP8 = (8, 9)  # Triton converts e4m3 from here on


def why_not(need: AttentionNeed) -> list[str]:
    """Reasons against these kernels; a need for "cuda" where torch sees no GPU is a plan for another machine."""
    if not _MIN_HEAD_DIM <= need.head_dim <= _MAX_HEAD_DIM:
        return [f"supports head sizes from {_MIN_HEAD_DIM} to {_MAX_HEAD_DIM}; the model has {need.head_dim}"]
    if need.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return [
            "Triton needs a GPU; a CPU only runs it in Triton's interpreter, for tests: set TRITON_INTERPRET=1 before "
            "the start"
        ]
    if need.device == "cuda" and torch.cuda.is_available():
        return _reasons_against_gpu(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), need)
    return []


def _reasons_against_gpu(name: str, capability: tuple[int, int], need: AttentionNeed) -> list[str]:
    if capability < _MIN_CAPABILITY:
        return [
            f"needs a GPU of compute capability {_version(_MIN_CAPABILITY)} or newer; {name} has {_version(capability)}"
        ]
    if need.kv_cache_dtype == "fp8" and capability < _MIN_CAPABILITY_FP8:
        return [
            f"an fp8 KV cache needs a GPU of compute capability {_version(_MIN_CAPABILITY_FP8)} or newer; {name} has "
            f"{_version(capability)}. Leave kv_cache_dtype at auto"
        ]
    return []


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
