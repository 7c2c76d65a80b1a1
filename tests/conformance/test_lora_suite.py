"""LoraSuite passes a backend that is right, and catches each planted fault by its test."""

from __future__ import annotations

import pytest
from conformance.lora_mutants import MUTANTS, SmallLora

from octavo.interfaces import LoraBackend, LoraLimits
from octavo.plugins.host import Plugin
from octavo.plugins.registry import Candidate
from octavo.plugins.specs import LoraSpec
from octavo.testing import LoraSuite, run_suite

SPEC = LoraSpec(name="small", summary="A backend", target="conformance.lora_mutants:SmallLora")
PLUGIN = Plugin(name="test", module="octavo.builtin", distribution="test", version="0")
NOT_OF_THE_BUILT_INS = "not entry_module"  # which takes a process to look at octavo.builtin


def run(backend: type[LoraBackend], select: str = NOT_OF_THE_BUILT_INS, few: bool = False) -> dict[str, str]:
    """The suite's outcomes for a backend that no installed plugin brings."""

    class SuiteOfBackend(LoraSuite):
        component = "test/small"
        small = few

        def candidate(self) -> Candidate:
            return Candidate(plugin=PLUGIN, spec=SPEC)

        def make(self, limits: LoraLimits) -> LoraBackend:
            return backend(limits)

    return run_suite(SuiteOfBackend, select)


@pytest.mark.parametrize("few", [False, True], ids=["usual", "small"])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_planted_fault_is_caught_by_the_test_that_names_it(mutant: type[LoraBackend], few: bool) -> None:
    test = f"test_{MUTANTS[mutant]}"
    assert run(mutant, select=test, few=few)[test].startswith("failed")


@pytest.mark.parametrize("few", [False, True], ids=["usual", "small"])
def test_backend_that_is_right_passes(few: bool) -> None:
    assert set(run(SmallLora, few=few).values()) == {"passed"}
