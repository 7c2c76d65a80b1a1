"""The conformance kit: one suite class for each socket, for the authors of plugins.

    from octavo.testing import AttentionSuite

    class TestMine(AttentionSuite):
        component = "my-plugin/mine"

Nothing is imported until a suite is named, so tests of a scheduler policy do without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo._lazy import lazy_getattr

try:
    import pytest
except ModuleNotFoundError:  # Triton kernels are compiled without it, too
    pytest = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from octavo.testing.attention import AttentionSuite as AttentionSuite
    from octavo.testing.kernels import KernelsSuite as KernelsSuite
    from octavo.testing.linear_kernel import LinearKernelSuite as LinearKernelSuite
    from octavo.testing.lora import LoraSuite as LoraSuite
    from octavo.testing.model import ModelSuite as ModelSuite
    from octavo.testing.quantization import QuantizationSuite as QuantizationSuite
    from octavo.testing.run import run_suite as run_suite
    from octavo.testing.scheduler import SchedulerSuite as SchedulerSuite
    from octavo.testing.stored_weight import QuantizationCase as QuantizationCase
    from octavo.testing.stored_weight import StoredWeight as StoredWeight
    from octavo.testing.suite import Suite as Suite
    from octavo.testing.triton_compile import CompiledKernel as CompiledKernel
    from octavo.testing.triton_compile import check_against_table as check_against_table
    from octavo.testing.triton_compile import compiling as compiling
    from octavo.testing.triton_compile import write_table as write_table

_MODULES = {
    "attention": ("AttentionSuite",),
    "kernels": ("KernelsSuite",),
    "linear_kernel": ("LinearKernelSuite",),
    "lora": ("LoraSuite",),
    "model": ("ModelSuite",),
    "quantization": ("QuantizationSuite",),
    "run": ("run_suite",),
    "scheduler": ("SchedulerSuite",),
    "stored_weight": ("QuantizationCase", "StoredWeight"),
    "suite": ("Suite",),
    "triton_compile": ("CompiledKernel", "check_against_table", "compiling", "write_table"),
}

# A failed assert of a suite shows its values, as one in the author's own test file does. Before anything imports them.
if pytest is not None:
    pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in _MODULES))

if not TYPE_CHECKING:  # type checkers read the imports above, and so find a misspelt name
    __getattr__, __all__ = lazy_getattr(__name__, _MODULES)
