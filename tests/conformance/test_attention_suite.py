"""AttentionSuite passes backends that are right, whatever they serve, and catches each planted fault by its test."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conformance.attention_mutants import MUTANTS, IgnoresCap, WindowWithoutItself
from conformance.plain_attention import OneBufferAttention, PlainAttention

from octavo.interfaces import AttentionBackend
from octavo.plugins.host import Plugin
from octavo.plugins.registry import Candidate
from octavo.plugins.specs import AttentionNeed, AttentionSpec
from octavo.testing import AttentionSuite, run_suite

SPEC = AttentionSpec(
    name="plain",
    summary="One request after the other",
    target="conformance.attention_mutants:PlainAttention",
    features=frozenset({"prefill", "decode", "sliding_window", "logit_softcap", "fp8_kv_cache"}),
    kv_layout="torch-nhd",
)
OF_ITS_OWN = replace(SPEC, kv_layout="", features=SPEC.features - {"fp8_kv_cache"})
PLUGIN = Plugin(name="test", module="octavo.builtin", distribution="test", version="0")


def run(
    backend: type[PlainAttention] = PlainAttention,
    spec: AttentionSpec = SPEC,
    select: str = "not entry_module",  # which takes a process to look at octavo.builtin
    is_small: bool = False,
) -> dict[str, str]:
    """The suite's outcomes for a backend that no installed plugin brings."""

    class SuiteOfBackend(AttentionSuite):
        component = "test/plain"
        small = is_small

        def candidate(self) -> Candidate:
            return Candidate(plugin=PLUGIN, spec=spec)

        def make(self, need: AttentionNeed) -> AttentionBackend:
            return backend(need)

    return run_suite(SuiteOfBackend, select)


def failed(outcomes: dict[str, str]) -> dict[str, str]:
    return {test: outcome for test, outcome in outcomes.items() if outcome.startswith("failed")}


@pytest.mark.parametrize("is_small", [False, True], ids=["many", "few"])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_planted_fault_is_caught_by_the_test_that_names_it(mutant: type[PlainAttention], is_small: bool) -> None:
    name = f"test_{MUTANTS[mutant]}"
    assert name in failed(run(mutant, select=name, is_small=is_small))


@pytest.mark.parametrize("is_small", [False, True], ids=["many", "few"])
def test_backend_that_is_right_passes(is_small: bool) -> None:
    assert set(run(is_small=is_small).values()) == {"passed"}


def test_backend_with_a_layout_of_its_own_passes() -> None:
    assert set(run(OneBufferAttention, OF_ITS_OWN).values()) == {"passed"}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_backend_that_serves_one_phase_passes_and_skips_the_other_s_tests(phase: str) -> None:
    class ServesOnePhase(PlainAttention):
        def plan(self, layout: object, state: object) -> None:
            assert layout.num_decode_requests in (0 if phase == "prefill" else layout.num_requests,)
            super().plan(layout, state)

    others = {"prefill", "decode"} - {phase}
    outcomes = run(ServesOnePhase, replace(SPEC, features=SPEC.features - others))
    assert failed(outcomes) == {}
    assert len([outcome for outcome in outcomes.values() if outcome == "passed"]) > 20
    assert {outcome for outcome in outcomes.values() if outcome != "passed"} == {
        f"skipped: test/plain serves {phase} only"
    }


@pytest.mark.parametrize(
    ("feature", "mutant"), [("sliding_window", WindowWithoutItself), ("logit_softcap", IgnoresCap)]
)
def test_what_a_backend_does_not_declare_it_is_not_asked_for(feature: str, mutant: type[PlainAttention]) -> None:
    spec = replace(SPEC, features=SPEC.features - {feature})
    assert set(run(mutant, spec).values()) == {"passed"}


def test_declaring_windows_and_refusing_them_all_is_a_fault() -> None:
    spec = replace(SPEC, probe="conformance.attention_mutants:refuses_windows")
    outcome = run(spec=spec)["test_a_window_shows_the_last_tokens_and_no_other"]
    assert "its spec declares sliding_window and it refuses all of" in outcome


def test_backend_of_decode_alone_is_told_that_it_needs_a_partner() -> None:
    spec = replace(SPEC, features=frozenset({"decode"}), kv_layout="unheard-of")
    outcome = run(spec=spec)["test_decodes_equal_the_formula"]
    assert "no installed backend serves prefill over its KV layout 'unheard-of'" in outcome


def test_backend_is_asked_only_what_its_spec_accepts() -> None:
    class OneSize(PlainAttention):
        def __init__(self, need: AttentionNeed) -> None:
            assert (need.head_dim, need.block_size, need.dtype) == (80, 48, "bfloat16")
            super().__init__(need)

    spec = replace(SPEC, head_sizes=(80,), block_sizes=(48,), dtypes=("bfloat16",))
    assert set(run(OneSize, spec).values()) == {"passed"}


def test_backend_that_accepts_nothing_here_fails_with_its_own_reason() -> None:
    outcomes = run(spec=replace(SPEC, devices=("tpu",)))
    assert "because it runs on tpu; this engine runs on cpu" in outcomes["test_decodes_equal_the_formula"]


def test_refusal_that_explains_nothing_is_caught() -> None:
    spec = replace(SPEC, probe="conformance.attention_mutants:refuses_without_a_word")
    assert "does not explain why" in run(spec=spec)["test_refusals_are_sentences"]


def test_probe_that_raises_is_caught() -> None:
    spec = replace(SPEC, probe="conformance.attention_mutants:raises_on_odd_head_sizes")
    assert "raised ZeroDivisionError" in run(spec=spec)["test_refusals_are_sentences"]
