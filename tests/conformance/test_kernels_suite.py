"""KernelsSuite catches each planted fault by its test, at its full size and at the small one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conformance.kernels_mutants import MUTANTS

from octavo.builtin.torch_kernels import TorchKernels
from octavo.interfaces import Kernels
from octavo.plugins.host import Plugin
from octavo.plugins.registry import Candidate
from octavo.plugins.specs import KernelsSpec, Need
from octavo.testing import KernelsSuite, run_suite

SPEC = KernelsSpec(name="set", summary="A kernel set", target="octavo.builtin.torch_kernels:TorchKernels")
PLUGIN = Plugin(name="test", module="octavo.builtin", distribution="test", version="0")


def run(
    kernels: type[TorchKernels], *, small: bool, spec: KernelsSpec = SPEC, select: str = "not entry_module"
) -> dict[str, str]:
    """The suite's outcomes for a set that no installed plugin brings."""
    is_small = small

    class SuiteOfSet(KernelsSuite):
        component = "test/set"
        small = is_small

        def candidate(self) -> Candidate:
            return Candidate(plugin=PLUGIN, spec=spec)

        def make(self, dtype: str) -> Kernels:
            return kernels(Need(device=self.device, dtype=dtype))

    return run_suite(SuiteOfSet, select)


def named(test: str) -> str:
    """pytest's -k for the functions of a test, its parameters apart."""
    return test.partition("[")[0]


@pytest.mark.parametrize("small", [False, True], ids=["full", "small"])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_planted_fault_is_caught_by_the_test_that_names_it(mutant: type[TorchKernels], small: bool) -> None:
    outcomes = run(mutant, small=small, select=named(MUTANTS[mutant]))
    assert outcomes[f"test_{MUTANTS[mutant]}"].startswith("failed")


def test_set_is_asked_only_the_dtypes_that_its_spec_accepts() -> None:
    class BFloat16(TorchKernels):
        def __init__(self, need: Need) -> None:
            assert need.dtype == "bfloat16"
            super().__init__(need)

    spec = replace(SPEC, dtypes=("bfloat16",))
    outcomes = run(BFloat16, small=True, spec=spec, select="norm or activation or kernel_set")
    assert set(outcomes.values()) == {"passed"}


def test_set_that_accepts_nothing_here_fails_with_its_own_reason() -> None:
    spec = replace(SPEC, devices=("tpu",))
    outcomes = run(TorchKernels, small=True, spec=spec, select="is_a_kernel_set")
    assert "runs on tpu; this engine runs on cpu" in outcomes["test_is_a_kernel_set"]
