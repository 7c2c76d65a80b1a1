"""QuantizationSuite passes methods that are right, plain and packed, and catches each planted fault by its test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conformance.quantization_methods import CASES, PlainMethod, SmallMethod
from conformance.quantization_mutants import MUTANTS

from octavo.interfaces import QuantizationMethod, StoredLinear, TensorHeader
from octavo.plugins.host import Plugin
from octavo.plugins.registry import Candidate
from octavo.plugins.specs import QuantizationSpec
from octavo.testing import QuantizationCase, QuantizationSuite, run_suite

PLAIN = QuantizationSpec(
    name="method", summary="A method", target="conformance.quantization_methods:PlainMethod", formats=("none",)
)
SMALL = replace(PLAIN, formats=("small",), bits=(3, 4), weight_form="affine")
PLUGIN = Plugin(name="test", module="octavo.builtin", distribution="test", version="0")
NOT_OF_THE_BUILT_INS = "not entry_module"  # which takes a process to look at octavo.builtin


def run(
    method: type[QuantizationMethod],
    spec: QuantizationSpec | None = None,
    given: Sequence[QuantizationCase] | None = None,
    select: str = NOT_OF_THE_BUILT_INS,
) -> dict[str, str]:
    """The suite's outcomes for a method that no installed plugin brings."""
    is_small = issubclass(method, SmallMethod)
    given = CASES if given is None and is_small else given

    class SuiteOfMethod(QuantizationSuite):
        component = "test/method"

        def candidate(self) -> Candidate:
            return Candidate(plugin=PLUGIN, spec=spec or (SMALL if is_small else PLAIN))

        def make(
            self, config: Mapping[str, object], dtype: torch.dtype, headers: Mapping[str, TensorHeader]
        ) -> QuantizationMethod:
            return method(config, dtype, self.device, headers, self.kernels(dtype))

        def cases(self) -> Sequence[QuantizationCase]:
            return given or super().cases()

    return run_suite(SuiteOfMethod, select)


def failed(outcomes: dict[str, str]) -> dict[str, str]:
    return {test: outcome for test, outcome in outcomes.items() if outcome.startswith("failed")}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_planted_fault_is_caught_by_the_test_that_names_it(mutant: type[QuantizationMethod]) -> None:
    test = f"test_{MUTANTS[mutant]}"
    assert test in failed(run(mutant, select=test.partition("[")[0]))


@pytest.mark.parametrize("method", [PlainMethod, SmallMethod])
def test_method_that_is_right_passes(method: type[QuantizationMethod]) -> None:
    assert set(run(method).values()) == {"passed"}


def test_method_that_cannot_stack_is_not_asked_to() -> None:
    class OneAtATime(SmallMethod):
        can_stack = False

        def prepare(self, parts: Sequence[StoredLinear]) -> object:
            assert len(parts) == 1
            return super().prepare(parts)

    assert set(run(OneAtATime).values()) == {"passed"}


def test_method_is_asked_only_the_dtypes_that_its_spec_accepts() -> None:
    class BFloat16(SmallMethod):
        def __init__(self, config: Mapping[str, object], dtype: torch.dtype, *others: Any) -> None:
            assert dtype == torch.bfloat16
            super().__init__(config, dtype, *others)

    assert set(run(BFloat16, replace(SMALL, dtypes=("bfloat16",))).values()) == {"passed"}


def test_format_that_the_suite_cannot_store_is_asked_for() -> None:
    outcomes = run(PlainMethod, SMALL)
    assert "override cases()" in outcomes["test_dequantize_gives_the_stored_weight_in_float32"]


def test_spec_that_refuses_what_its_method_reads_is_caught() -> None:
    outcomes = run(SmallMethod, replace(SMALL, bits=(2, 8)), select="spec_accepts")
    assert "its spec refuses the checkpoint" in outcomes["test_spec_accepts_the_checkpoints_it_reads"]


def test_method_that_accepts_nothing_here_fails_with_its_own_reason() -> None:
    outcomes = run(PlainMethod, replace(PLAIN, devices=("tpu",)), select="is_a_quantization_method")
    assert "runs on tpu; this engine runs on cpu" in outcomes["test_is_a_quantization_method"]


def test_shape_whose_halves_cannot_be_cut_is_named() -> None:
    uneven = replace(CASES[0], shape=replace(CASES[0].shape, in_features=72))
    outcomes = run(SmallMethod, given=[uneven], select="cut_on_its_inputs")
    assert "give the case another shape" in outcomes["test_linear_cut_on_its_inputs_is_columns_of_the_whole"]
