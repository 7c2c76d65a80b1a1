"""SchedulerSuite passes the built-in policy and catches each planted fault by the test that is about it."""

from __future__ import annotations

import pytest
from conformance.scheduler_mutants import MUTANTS, Chance, PriorityAlone
from hypothesis import Phase, settings

from octavo.builtin.fcfs import FCFSPolicy
from octavo.interfaces import SchedulerPolicy
from octavo.testing import SchedulerSuite, run_suite
from octavo.testing import scheduler as scheduler_suite


class TestFCFS(SchedulerSuite):
    component = "builtin/fcfs"
    starvation_free = True


def outcomes(policy: type[FCFSPolicy], test: str, *, starvation_free: bool = True) -> dict[str, str]:
    """What one test of the suite, in all its parameters, says of a policy that no installed plugin brings."""

    class SuiteOfPolicy(SchedulerSuite):
        component = "builtin/fcfs"

        def make(self) -> SchedulerPolicy:
            return policy()

    SuiteOfPolicy.starvation_free = starvation_free
    return run_suite(SuiteOfPolicy, test.partition("[")[0])


@pytest.fixture(autouse=True)
def in_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults need not be shrunk to the smallest traffic here, nor a slow policy be ten times slower."""
    without_shrinking = settings(scheduler_suite.SMALL, phases=[Phase.generate])
    monkeypatch.setattr(scheduler_suite, "SMALL", without_shrinking)
    monkeypatch.setattr(scheduler_suite, "MAX_CPU_SECONDS", scheduler_suite.MAX_CPU_SECONDS / 5)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_planted_fault_in_a_policy_is_caught_by_the_test_about_it(mutant: type[FCFSPolicy]) -> None:
    found = outcomes(mutant, MUTANTS[mutant])
    assert found[f"test_{MUTANTS[mutant]}"].startswith("failed"), found


@pytest.mark.parametrize("test", sorted(set(MUTANTS.values())))
def test_no_test_that_catches_a_fault_fails_without_one(test: str) -> None:
    assert set(outcomes(FCFSPolicy, test).values()) == {"passed"}


def test_a_policy_that_does_not_promise_to_starve_nobody_may() -> None:
    test = MUTANTS[PriorityAlone]
    assert set(outcomes(PriorityAlone, test, starvation_free=False).values()) == {"passed"}


def test_a_policy_that_draws_lots_still_leaks_and_loses_nothing() -> None:
    assert set(outcomes(Chance, "every_request_gets_its_own_tokens").values()) == {"passed"}
