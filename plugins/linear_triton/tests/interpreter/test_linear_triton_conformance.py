"""The conformance of both kernels."""

from __future__ import annotations

import pytest

from octavo.testing import LinearKernelSuite

# The interpreter multiplies with numpy, which warns of rows that are not finite, as one test's are.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


class TestTritonAffine(LinearKernelSuite):
    component = "linear-triton/triton-affine"
    small = True


class TestTritonLookup(LinearKernelSuite):
    component = "linear-triton/triton-lookup"
    small = True
