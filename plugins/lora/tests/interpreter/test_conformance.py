"""The conformance of the kernels, small, in Triton's interpreter."""

from __future__ import annotations

from octavo.testing import LoraSuite


class TestTriton(LoraSuite):
    component = "lora/triton"
    small = True
