"""The built-in linear kernels keep the contract of linear kernels."""

from __future__ import annotations

from octavo.testing import LinearKernelSuite


class TestTorchPacked(LinearKernelSuite):
    component = "builtin/torch-packed"


class TestTorchDequantized(LinearKernelSuite):
    component = "builtin/torch-dequantized"


class TestTorchPackedWithSmallWeights(LinearKernelSuite):
    component = "builtin/torch-packed"
    small = True
