"""The conformance of both kernels."""

from __future__ import annotations

from octavo.testing import LinearKernelSuite


class TestCpuInt4(LinearKernelSuite):
    component = "linear-cpu/cpu-int4"


class TestCpuInt8(LinearKernelSuite):
    component = "linear-cpu/cpu-int8"
