"""LinearKernelSuite passes a kernel that is right, and catches each planted fault by its test."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conformance.linear_kernel_mutants import MUTANTS, OF_THE_SMALL_SUITE, SmallKernel

from octavo.interfaces import LinearKernel, LookupWeight, PackedWeight, WeightFacts
from octavo.plugins.host import Plugin
from octavo.plugins.registry import Candidate
from octavo.plugins.specs import LinearKernelSpec
from octavo.testing import LinearKernelSuite, run_suite
from octavo.testing.drawn_weights import affine, bytes_reachable

SPEC = LinearKernelSpec(
    name="kernel",
    summary="A kernel",
    target="conformance.linear_kernel_mutants:SmallKernel",
    forms=("affine", "lookup"),
)
PLUGIN = Plugin(name="test", module="octavo.builtin", distribution="test", version="0")
NOT_OF_THE_BUILT_INS = "not entry_module"  # which takes a process to look at octavo.builtin


def run(
    kernel: type[LinearKernel], spec: LinearKernelSpec = SPEC, select: str = NOT_OF_THE_BUILT_INS, few: bool = False
) -> dict[str, str]:
    """The suite's outcomes for a kernel that no installed plugin brings."""

    class SuiteOfKernel(LinearKernelSuite):
        component = "test/kernel"
        small = few

        def candidate(self) -> Candidate:
            return Candidate(plugin=PLUGIN, spec=spec)

        def make(self, dtype: torch.dtype) -> LinearKernel:
            return kernel(dtype, self.device)

    return run_suite(SuiteOfKernel, select)


def is_caught(mutant: type[LinearKernel], few: bool = False) -> bool:
    test = f"test_{MUTANTS[mutant]}"
    return run(mutant, select=test.partition("[")[0], few=few)[test].startswith("failed")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_planted_fault_is_caught_by_the_test_that_names_it(mutant: type[LinearKernel]) -> None:
    assert is_caught(mutant)


@pytest.mark.parametrize("mutant", OF_THE_SMALL_SUITE, ids=lambda mutant: mutant.__name__)
def test_planted_fault_is_caught_with_few_and_small_weights_too(mutant: type[LinearKernel]) -> None:
    assert is_caught(mutant, few=True)


@pytest.mark.parametrize("few", [False, True], ids=["usual", "small"])
def test_kernel_that_is_right_passes(few: bool) -> None:
    assert set(run(SmallKernel, few=few).values()) == {"passed"}


def test_kernel_is_not_given_what_it_refuses() -> None:
    class FourBits(SmallKernel):
        def why_not(self, facts: WeightFacts) -> list[str]:
            refused = facts.bits != 4 or facts.in_features % 32 or facts.outliers or facts.act_order
            return ["multiplies with 4 bits in whole blocks of 32 inputs only"] if refused else []

        def prepare(self, weight: PackedWeight) -> object:
            assert not self.why_not(weight.facts)
            return weight

    assert set(run(FourBits).values()) == {"passed"}


def test_kernel_is_given_the_forms_and_dtypes_of_its_spec_only() -> None:
    class Lookup(SmallKernel):
        def __init__(self, dtype: torch.dtype, device: str) -> None:
            assert dtype == torch.bfloat16
            super().__init__(dtype, device)

        def prepare(self, weight: PackedWeight) -> object:
            assert isinstance(weight, LookupWeight)
            return weight

    assert set(run(Lookup, replace(SPEC, forms=("lookup",), dtypes=("bfloat16",))).values()) == {"passed"}


def test_memory_is_counted_through_fields_items_and_views_once() -> None:
    tensor = torch.zeros(10, 10)
    weight = affine(8, 32, 16).draw()
    assert bytes_reachable((tensor, [tensor[2:], {"a": tensor.T}], 3)) == 400
    assert bytes_reachable(weight) == 32 * 16 + 16 * 2 + 16
