"""What is installed of FlashAttention and FlashInfer, and whether it can serve; nothing of them is imported here.

The facts were read in flash-attn 2.8.3.post2 (FlashAttention-2, and in its folder hopper FlashAttention-3 3.0.0b1),
flash-attn-4 4.0.0b36 and flashinfer-python 0.7.2.post1.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from octavo.plugins.specs import AttentionNeed

Capability = tuple[int, int]

_PAGE_MULTIPLE = 256  # FlashAttention-2: "Paged KV cache block size must be divisible by 256"
_OLDEST_CUDA = 8  # capability of Ampere, the first that computes in bfloat16


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """One generation of FlashAttention.

    Attributes:
        title: what its authors call it.
        distribution: the package that brings it, whose version decides.
        function: "module:name" of what computes attention over pages.
        oldest: major and minor version with everything that is asked of it.
        why_not: its own reasons, without a subject, against a need on a GPU of a capability; None is one unknown.
    """

    title: str
    distribution: str
    function: str
    oldest: tuple[int, int]
    why_not: Callable[[AttentionNeed, Capability | None], list[str]]

    def version(self) -> str | None:
        """Of what is installed; None when it is not."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return None

    def reasons(self, need: AttentionNeed, capability: Capability | None) -> list[str]:
        """Sentences why it cannot serve; empty means it can."""
        found = self.version()
        if found is None:
            return [f"{self.title} ({self.distribution}) is not installed"]
        subject = f"{self.title} ({self.distribution} {found})"
        if tuple(map(int, re.findall(r"\d+", found)[:2])) < self.oldest:
            return [f"{subject} is too old; {'.'.join(map(str, self.oldest))} is the oldest that can serve"]
        return [f"{subject} {reason}" for reason in self.why_not(need, capability)]


def _why_not_2(need: AttentionNeed, capability: Capability | None) -> list[str]:
    reasons = []
    if capability is not None and capability[0] < _OLDEST_CUDA:
        reasons.append(f"runs from compute capability 8.0 (Ampere) on; this GPU has {_dotted(capability)}")
    if need.head_dim % 8 or need.head_dim > 256:
        reasons.append(f"supports head sizes up to 256 that are multiples of 8; the model has {need.head_dim}")
    if need.block_size % _PAGE_MULTIPLE:
        reasons.append(
            f"reads pages of a multiple of {_PAGE_MULTIPLE} tokens only; block_size is {need.block_size}: set "
            f"block_size={_PAGE_MULTIPLE}, or install FlashAttention-3 or FlashInfer, which take any"
        )
    return reasons


def _why_not_3(need: AttentionNeed, capability: Capability | None) -> list[str]:
    reasons = []
    if capability is not None and capability[0] != 9:
        reasons.append(f"is made for compute capability 9.0 (Hopper); this GPU has {_dotted(capability)}")
    if need.head_dim % 8 or need.head_dim > 256:
        reasons.append(f"supports head sizes up to 256 that are multiples of 8; the model has {need.head_dim}")
    return reasons


def _why_not_4(need: AttentionNeed, capability: Capability | None) -> list[str]:
    reasons = []
    if capability is not None and capability[0] not in (9, 10, 11):
        reasons.append(
            "reads pages on compute capabilities 9, 10 and 11 (Hopper, data-centre Blackwell) only; "
            f"this GPU has {_dotted(capability)}"
        )
    largest = 256 if capability is None or capability[0] == 9 else 128
    if need.head_dim != 256 and (need.head_dim % 16 or need.head_dim > largest):
        reasons.append(
            f"reads pages of head sizes up to {largest} that are multiples of 16, and of 256; "
            f"the model has {need.head_dim}"
        )
    return reasons


# In the order in which they are taken: 3 is the one tuned for Hopper, 4 is a pre-release, 2 needs large pages.
LIBRARIES = (
    Library(
        title="FlashAttention-3",
        distribution="flash-attn-3",
        function="flash_attn_interface:flash_attn_with_kvcache",
        oldest=(3, 0),
        why_not=_why_not_3,
    ),
    Library(
        title="FlashAttention-4",
        distribution="flash-attn-4",
        function="flash_attn.cute:flash_attn_varlen_func",
        oldest=(4, 0),
        why_not=_why_not_4,
    ),
    Library(
        title="FlashAttention-2",
        distribution="flash-attn",
        function="flash_attn:flash_attn_varlen_func",
        oldest=(2, 6),  # the first with soft-caps; pages came with 2.5
        why_not=_why_not_2,
    ),
)


def find_library(need: AttentionNeed) -> Library | None:
    """The first installed generation that can serve the need on this machine's GPU."""
    capability = _capability(need)
    return next((one for one in LIBRARIES if not one.reasons(need, capability)), None)


def why_not_flash_attention(need: AttentionNeed) -> list[str]:
    """Probe of `flash-attn`."""
    if find_library(need) is not None:
        return []
    installed = [one for one in LIBRARIES if one.version() is not None]
    if not installed:
        return [
            "needs FlashAttention, of which no generation is installed. `pip install --pre flash-attn-4` brings "
            "FlashAttention-4 for Hopper and data-centre Blackwell GPUs; FlashAttention-3 for Hopper is built from the "
            "folder hopper of https://github.com/Dao-AILab/flash-attention; `pip install flash-attn` brings "
            f"FlashAttention-2, which needs a block_size that is a multiple of {_PAGE_MULTIPLE}"
        ]
    capability = _capability(need)
    return [reason for one in installed for reason in one.reasons(need, capability)]


def why_not_flashinfer(need: AttentionNeed) -> list[str]:
    """Probe of `flashinfer`."""
    reasons = []
    capability = _capability(need)
    if capability is not None and capability[0] < _OLDEST_CUDA:
        reasons.append(f"serves compute capability 8.0 (Ampere) and later; this GPU has {_dotted(capability)}")
    if capability is not None and not _has_flashinfer_kernels():
        reasons.append(
            "builds its kernels when they are first used, and there is no CUDA compiler (nvcc) here to build them; "
            "install the CUDA toolkit and set CUDA_HOME, or bring built kernels with "
            "`flashinfer install-jit-cache-wheel`"
        )
    return reasons


def _capability(need: AttentionNeed) -> Capability | None:
    """Of this machine's GPU; None when torch sees none, and the need is then a plan for another machine."""
    return torch.cuda.get_device_capability() if need.device == "cuda" and torch.cuda.is_available() else None


def _has_flashinfer_kernels() -> bool:
    """Whether they are built already, or can be: flashinfer looks for nvcc in these places."""
    if importlib.util.find_spec("flashinfer_jit_cache") is not None or shutil.which("nvcc") is not None:
        return True
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return os.path.exists(os.path.join(home, "bin", "nvcc"))


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))
