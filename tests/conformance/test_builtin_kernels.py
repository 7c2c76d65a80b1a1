"""The kernels in plain torch keep the contract of kernel sets."""

from __future__ import annotations

from octavo.testing import KernelsSuite


class TestTorchKernels(KernelsSuite):
    component = "builtin/torch"


class TestTorchKernelsSmall(KernelsSuite):
    """The small cases hold too."""

    component = "builtin/torch"
    small = True
