"""QuantizationSuite passes methods that are right, plain and packed, and catches each planted fault by its test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conformance.quantization_mutants import FOUR_BIT_CONFIG, MUTANTS, FourBitMethod, PlainMethod, store_four_bit

from octavo.interfaces import LinearShape, QuantizationMethod
from octavo.plugins.host import Plugin
from octavo.plugins.registry import Candidate
from octavo.plugins.specs import QuantizationSpec
from octavo.testing import QuantizationCase, QuantizationSuite, run_suite

PLAIN = QuantizationSpec(
    name="method", summary="A method", target="conformance.quantization_mutants:PlainMethod", formats=("none",)
)
FOUR_BIT = replace(PLAIN, formats=("four-bit",), bits=(4,))
FOUR_BIT_CASES = [
    QuantizationCase(name="square", store=store_four_bit, config=FOUR_BIT_CONFIG),
    QuantizationCase(
        name="wide",
        store=store_four_bit,
        config=FOUR_BIT_CONFIG,
        shape=LinearShape(in_features=224, out_features=32),
    ),
]
PLUGIN = Plugin(name="test", module="octavo.builtin", distribution="test", version="0")


def run(
    method: type[PlainMethod],
    spec: QuantizationSpec | None = None,
    given: Sequence[QuantizationCase] | None = None,
) -> dict[str, str]:
    """The suite's outcomes for a method that no installed plugin brings."""
    is_four_bit = issubclass(method, FourBitMethod)
    given = FOUR_BIT_CASES if given is None and is_four_bit else given

    class SuiteOfMethod(QuantizationSuite):
        component = "test/method"

        def candidate(self) -> Candidate:
            return Candidate(plugin=PLUGIN, spec=spec or (FOUR_BIT if is_four_bit else PLAIN))

        def make(self, config: Mapping[str, object], dtype: torch.dtype) -> QuantizationMethod:
            return method(config, dtype, self.device, {})

        def cases(self) -> Sequence[QuantizationCase]:
            return given or super().cases()

    return run_suite(SuiteOfMethod, "not entry_module")  # which takes a process to look at octavo.builtin


def failed(outcomes: dict[str, str]) -> dict[str, str]:
    return {test: outcome for test, outcome in outcomes.items() if outcome.startswith("failed")}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_planted_fault_is_caught_by_the_test_that_names_it(mutant: type[PlainMethod]) -> None:
    assert f"test_{MUTANTS[mutant]}" in failed(run(mutant))


@pytest.mark.parametrize("method", [PlainMethod, FourBitMethod])
def test_method_that_is_right_passes(method: type[PlainMethod]) -> None:
    assert set(run(method).values()) == {"passed"}


def test_method_that_cannot_stack_is_not_asked_to() -> None:
    class OneAtATime(FourBitMethod):
        can_stack = False

        def prepare(self, shape: LinearShape, parts: Sequence[Mapping[str, torch.Tensor]]) -> object:
            assert len(parts) == 1
            return super().prepare(shape, parts)

    assert set(run(OneAtATime).values()) == {"passed"}


def test_method_is_asked_only_the_dtypes_that_its_spec_accepts() -> None:
    class BFloat16(FourBitMethod):
        def __init__(self, config: Mapping[str, object], dtype: torch.dtype, device: str, headers: Any) -> None:
            assert dtype == torch.bfloat16
            super().__init__(config, dtype, device, headers)

    assert set(run(BFloat16, replace(FOUR_BIT, dtypes=("bfloat16",))).values()) == {"passed"}


def test_format_that_the_suite_cannot_store_is_asked_for() -> None:
    outcomes = run(PlainMethod, FOUR_BIT)
    assert "override cases()" in outcomes["test_dequantize_gives_the_stored_weight_in_float32"]


def test_spec_that_refuses_what_its_method_reads_is_caught() -> None:
    outcomes = run(FourBitMethod, replace(FOUR_BIT, bits=(2, 3)))
    assert "its spec refuses the checkpoint" in outcomes["test_spec_accepts_the_checkpoints_it_reads"]


def test_method_that_accepts_nothing_here_fails_with_its_own_reason() -> None:
    outcomes = run(PlainMethod, replace(PLAIN, devices=("tpu",)))
    assert "runs on tpu; this engine runs on cpu" in outcomes["test_is_a_quantization_method"]
