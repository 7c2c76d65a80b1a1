"""run_suite runs a suite inside a running pytest and leaves no trace; Suite checks what all sockets have in common."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.plugins.host import Plugin
from octavo.plugins.registry import Candidate
from octavo.plugins.specs import SchedulerSpec
from octavo.testing import Suite, run_suite


class Sample(Suite):
    kind = "scheduler"
    component = "builtin/fcfs"

    def test_passes(self) -> None: ...

    def test_fails(self) -> None:
        assert [1, 2] == [1, 3], "the second is\nanother"

    def test_skips(self) -> None:
        pytest.skip("not here")

    @pytest.fixture
    def broken(self) -> None:
        raise ValueError("no such thing")

    def test_cannot_begin(self, broken: None) -> None: ...

    @pytest.mark.parametrize("word", ["a", "b::c"])
    def test_takes(self, word: str) -> None: ...


OURS = "passes or fails or skips or begin or takes"


def process_state() -> dict[str, object]:
    return {
        "modules": {name for name in sys.modules if not name.startswith(("_pytest.", "pytest"))},
        "warning filters": list(warnings.filters),
        "log handlers": list(logging.getLogger().handlers),
        "log level": logging.getLogger().level,
        "streams": (sys.stdout, sys.stderr),
        "meta path": list(sys.meta_path),
        "path": list(sys.path),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
    }


def test_outcomes_are_data_with_the_first_line_of_the_reason() -> None:
    assert run_suite(Sample, OURS) == {
        "test_passes": "passed",
        "test_fails": "failed: AssertionError: the second is",
        "test_skips": "skipped: not here",
        "test_cannot_begin": "failed: ValueError: no such thing",
        "test_takes[a]": "passed",
        "test_takes[b::c]": "passed",
    }


def test_run_inside_a_run_leaves_the_process_as_it_was() -> None:
    run_suite(Sample, OURS)  # once before, for what is imported at the first use
    before = process_state()
    run_suite(Sample, OURS)
    after = process_state()
    environment = before["environment"], after["environment"]
    for each in environment:
        assert isinstance(each, dict)
        each.pop("PYTEST_CURRENT_TEST", None)  # pytest's own word for what is running; set again at the next phase
    assert {name: after[name] for name in before} == before


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    run_suite(Sample, OURS)
    assert capfd.readouterr() == ("", "")


def test_wishes_for_the_outer_run_do_not_reach_the_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    monkeypatch.setenv("PYTEST_PLUGINS", "no_such_plugin")
    assert run_suite(Sample, "passes") == {"test_passes": "passed"}


def test_second_suite_is_not_taken_for_the_first() -> None:
    class Other(Sample):
        def test_fails(self) -> None: ...

    assert run_suite(Sample, "test_fails")["test_fails"].startswith("failed")
    assert run_suite(Other, "test_fails")["test_fails"] == "passed"


def test_selection_that_no_test_matches_is_an_error() -> None:
    with pytest.raises(ValueError, match="Sample has no test that matches 'no_such_test'"):
        run_suite(Sample, "no_such_test")


def test_suite_that_pytest_cannot_read_is_an_error_with_what_it_printed() -> None:
    class Unreadable(Sample):
        @pytest.mark.parametrize("nothing", 5)
        def test_unreadable(self, nothing: int) -> None: ...

    with pytest.raises(RuntimeError, match="test_unreadable"):
        run_suite(Unreadable)


# ----------------------------------------------------------------------------------------- what all sockets share


RunBrought = Callable[..., dict[str, str]]


@pytest.fixture
def run_brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunBrought:
    """Runs what all suites check over a component of a module with this source."""

    def run(source: str = "", **spec_fields: Any) -> dict[str, str]:
        (tmp_path / "brought.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "brought", raising=False)

        class Brought(Suite):
            kind = "scheduler"
            component = "test/brought"

            def candidate(self) -> Candidate:
                fields = {"name": "brought", "summary": "One", "target": "json:loads", **spec_fields}
                plugin = Plugin(name="test", module="brought", distribution="test", version="0")
                return Candidate(plugin=plugin, spec=SchedulerSpec(**fields))

        return run_suite(Brought)

    return run


def test_component_without_fault_passes(run_brought: RunBrought) -> None:
    assert set(run_brought("import json").values()) == {"passed"}


def test_options_model_without_fault_passes(run_brought: RunBrought) -> None:
    source = options_model('model_config = ConfigDict(extra="forbid"); depth: int = Field(1, description="how deep")')
    assert run_brought(source, options="brought:Options")[OPTIONS_TEST] == "passed"


OPTIONS_TEST = "test_options_model_documents_each_option_and_refuses_unknown_ones"


def options_model(fields: str) -> str:
    return f"from pydantic import BaseModel, ConfigDict, Field\nclass Options(BaseModel):\n    {fields}\n"


@pytest.mark.parametrize(
    ("test", "source", "fields", "reason"),
    [
        ("entry_module_imports_nothing_heavy", "import numpy", {}, "import brought imports these"),
        ("entry_module_imports_nothing_heavy", "import no_such_module", {}, "No module named 'no_such_module'"),
        ("target_can_be_imported", "", {"target": "brought:Missing"}, "cannot be imported"),
        ("target_can_be_imported", "Missing = 3", {"target": "brought:Missing"}, "is what constructs the component"),
        ("summary_is_one_line_that_says_what_it_is", "", {"summary": ""}, "listings show the summary; write one"),
        ("summary_is_one_line_that_says_what_it_is", "", {"summary": "a\nb"}, "listings have one line for it"),
    ],
)
def test_planted_fault_is_caught(
    run_brought: RunBrought, test: str, source: str, fields: dict[str, str], reason: str
) -> None:
    outcome = run_brought(source, **fields)[f"test_{test}"]
    assert outcome.startswith("failed: ")
    assert reason in outcome


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ('model_config = ConfigDict(extra="forbid"); depth: int = 1', "`--help` shows each option's description"),
        (
            'model_config = ConfigDict(extra="forbid"); depth: int = Field(description="how deep")',
            "`auto` chooses a component without options",
        ),
        ('depth: int = Field(1, description="how deep")', "accepts an option that it does not have"),
    ],
)
def test_fault_of_an_options_model_is_caught(run_brought: RunBrought, fields: str, reason: str) -> None:
    outcome = run_brought(options_model(fields), options="brought:Options")[OPTIONS_TEST]
    assert outcome.startswith("failed: ")
    assert reason in outcome


def test_plugin_that_is_not_installed_fails_with_the_registry_s_sentence() -> None:
    class Missing(Suite):
        kind = "scheduler"
        component = "no-such-plugin/fcfs"

    outcome = run_suite(Missing, "summary")["test_summary_is_one_line_that_says_what_it_is"]
    assert "No scheduler policy named 'no-such-plugin/fcfs'" in outcome
