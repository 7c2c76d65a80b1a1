"""Which device and dtype "auto" means."""

from __future__ import annotations

import torch

from octavo.errors import ConfigError

_DTYPES = ("float32", "bfloat16", "float16")


def resolve_device(device: str) -> str:
    """ "auto" is CUDA when there is one.

    Raises:
        ConfigError: CUDA was asked for and there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda' was asked for, but torch sees no CUDA device. Use device='cpu' or 'auto'.")
    return device


def resolve_dtype(dtype: str, checkpoint_dtype: str, device: str) -> str:
    """ "auto" is the checkpoint's dtype, or the one of the same size or larger that the device is fast in.

    A float32 checkpoint is computed in bfloat16 where the device is fast in it, as the field does; float16 on a
    CPU becomes bfloat16; a CPU without bfloat16 instructions computes in float32.
    """
    if dtype != "auto":
        return dtype
    if checkpoint_dtype not in _DTYPES:
        raise ConfigError(f"The checkpoint's dtype is {checkpoint_dtype!r}; choose dtype from {', '.join(_DTYPES)}.")
    if device == "cuda":
        return checkpoint_dtype if checkpoint_dtype != "float32" else "bfloat16"
    return "bfloat16" if _cpu_has_bfloat16() else "float32"


def _cpu_has_bfloat16() -> bool:
    """Whether bfloat16 products are done by the processor, not emulated."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private: a torch without them says no
    in_processor = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return in_processor and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
