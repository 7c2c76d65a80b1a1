"""Which tile sizes are nearest, which candidate is taken, and what is written of it; the GPU is played by numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from octavo.plugins.tuned_data import Config, Measured, TunedCase, as_text, best, cases_of, nearest, with_measured

FACTS = {"gpu": "Imagined", "versions": {"triton": "3"}, "date": "2026-01-02", "multiprocessors": 7}
DOCUMENT: dict[str, Any] = {
    "source": "not measured: guessed",
    "gpu": None,
    "kernels": {
        "one": [{"when": {"rows": 8}, "config": {"tile": 1}}, {"when": {"rows": 64}, "config": {"tile": 2}}],
        "two": [{"when": {"rows": 8}, "config": {"tile": 4}}],
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case(TunedCase[str]):
    def workloads(self) -> Sequence[str]:
        return ("short", "long")

    def candidates(self) -> list[Config]:
        return [{"tile": 1}, {"tile": 2}, {"tile": 4}]


CASE = Case(kernel="one", when={"rows": 8})


def no_faults(case: Case, config: Config) -> list[str]:
    return []


def entry(number: int, **when: int) -> dict[str, Any]:
    return {"when": when, "config": {"number": number}}


def measured(case: Case = CASE) -> Measured:
    return Measured(case=case, config={"tile": 3}, seconds=1.5e-5)


@pytest.mark.parametrize(("rows", "number"), [(30, 1), (34, 2)])
def test_nearest_size_is_taken_by_its_logarithm(rows: int, number: int) -> None:
    assert nearest([entry(1, rows=16), entry(2, rows=64)], {"rows": rows}, same=[]) == {"number": number}


def test_entry_does_not_fit_where_a_number_that_must_be_the_same_differs() -> None:
    assert nearest([entry(1, bits=16)], {"bits": 32}, same=["bits"]) is None


def test_entry_does_not_fit_where_a_number_is_smaller_than_it_may_be() -> None:
    entries = [entry(1, size=64), entry(2, size=256)]
    found = [nearest(entries, {"size": size}, same=[], at_least=["size"]) for size in (65, 512)]
    assert found == [{"number": 2}, None]


def test_what_an_entry_does_not_name_does_not_matter() -> None:
    assert nearest([entry(1)], {"rows": 7}, same=["bits"], at_least=["size"]) == {"number": 1}


def test_fastest_candidate_is_taken() -> None:
    found = best(CASE, no_faults, lambda case, workload, config: 1.0 if config["tile"] == 2 else 2.0)
    assert found == Measured(case=CASE, config={"tile": 2}, seconds=1.0)


def test_candidate_with_faults_is_neither_timed_nor_taken() -> None:
    timed: set[int] = set()

    def seconds(case: Case, workload: str, config: Config) -> float:
        timed.add(config["tile"])
        return float(config["tile"])

    found = best(CASE, lambda case, config: ["spills"] if config["tile"] == 1 else [], seconds)
    assert (found.config["tile"], timed) == (2, {2, 4})


def test_workloads_count_alike_whatever_they_take() -> None:
    def seconds(case: Case, workload: str, config: Config) -> float:
        if config["tile"] == 1:  # a little faster on the long one, much slower on the other
            return 0.9 if workload == "long" else 2e-3
        return 1.0 if workload == "long" else 1e-3

    found = best(CASE, no_faults, seconds)
    assert found.config == {"tile": 2}
    assert found.seconds == pytest.approx(math.sqrt(1e-3))


def test_case_that_no_candidate_serves_is_an_error_that_says_why() -> None:
    with pytest.raises(ValueError, match=r"one: none of 3 .* spills a lot.*smaller tiles"):
        best(CASE, lambda case, config: ["spills a lot"], lambda *_: 1.0)


def test_measured_entry_takes_its_cases_place_and_the_others_stay() -> None:
    kernels = with_measured(DOCUMENT, [measured()], FACTS, "mine.tune")["kernels"]
    new = {"when": {"rows": 8}, "config": {"tile": 3}, "microseconds": 15.0}
    assert kernels == {"one": [new, DOCUMENT["kernels"]["one"][1]], "two": DOCUMENT["kernels"]["two"]}


def test_file_says_what_was_measured_and_what_was_not() -> None:
    once = with_measured(DOCUMENT, [measured()], FACTS, "mine.tune")
    twice = with_measured(once, [measured(Case(kernel="two", when={"rows": 8}))], FACTS, "mine.tune")
    assert once["source"] == 'measured by mine.tune where "microseconds" says so; the others: not measured: guessed'
    assert (once["gpu"], twice["source"]) == ("Imagined", once["source"])


def test_file_whose_every_entry_was_measured_says_only_that() -> None:
    every = [measured(case) for case in cases_of(DOCUMENT, Case)]
    assert with_measured(DOCUMENT, every, FACTS, "mine.tune")["source"] == "measured by mine.tune"


def test_text_has_an_entry_a_line_and_reads_back_as_the_document() -> None:
    document = with_measured(DOCUMENT, [measured()], FACTS, "mine.tune")
    text = as_text(document)
    assert json.loads(text) == document
    assert [line.count('"when"') for line in text.splitlines() if '"when"' in line] == [1, 1, 1]
