"""The kernel-set suite, in Triton's interpreter."""

from __future__ import annotations

from octavo.testing import KernelsSuite


class TestTritonKernels(KernelsSuite):
    component = "kernels-triton/triton"
    small = True
