"""Whether this machine can run Triton's kernels: the probe of every plugin that has some. It imports no Triton."""

from __future__ import annotations

import os

import torch

from octavo.plugins.specs import Need

_MIN_CAPABILITY = (8, 0)


def why_not(need: Need) -> list[str]:
    """Reasons against Triton; none for "cuda" where torch sees no GPU, for then the plan is for another machine."""
    if need.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return [
            "Triton needs a GPU; a CPU only runs it in Triton's interpreter, for tests: set TRITON_INTERPRET=1 before "
            "the start"
        ]
    if need.device == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < _MIN_CAPABILITY:
            needed, found = (".".join(map(str, one)) for one in (_MIN_CAPABILITY, capability))
            return [f"needs a GPU of compute capability {needed} or newer; {torch.cuda.get_device_name()} has {found}"]
    return []
