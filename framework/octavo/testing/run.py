"""run_suite: a suite run by itself, its outcomes returned as data."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from octavo.testing.suite import Suite

_FILE = """\
from octavo.testing.run import running
TestSuite = running[-1]
"""

running: list[type[Suite]] = []


class _Outcomes:
    def __init__(self) -> None:
        self.of_test: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[2]
        if report.when == "call" or report.outcome != "passed":
            message = report.longreprtext.strip().rpartition("\nE ")[2].partition("\n")[0].strip()
            self.of_test[name] = "passed" if report.outcome == "passed" else f"{report.outcome}: {message}"


def run_suite(suite: type[Suite], select: str = "") -> dict[str, str]:
    """Run a suite class in this process, apart from the tests that may be running around it.

    Args:
        select: as pytest's -k; empty runs all.

    Returns:
        The outcome of each test by name: "passed", or "failed: " with the first line of the reason.
    """
    outcomes = _Outcomes()
    running.append(suite)
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "test_suite.py"
            file.write_text(_FILE)
            (Path(folder) / "pytest.ini").write_text("[pytest]\n")
            pytest.main(
                ["-q", "--no-header", "--no-summary", "-p", "no:cacheprovider", "--capture=no"]
                + ["--import-mode=importlib", "-c", str(file.with_name("pytest.ini"))]
                + (["-k", select] if select else [])
                + [str(file)],
                plugins=[outcomes],
            )
    finally:
        running.pop()
    return outcomes.of_test
