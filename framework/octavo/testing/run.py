"""run_suite: a suite run by itself, its outcomes returned as data."""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.testing.suite import Suite

_FILE = """\
from octavo.testing.run import running
TestSuite = running[-1]
"""

# A run has pytest's own plugins only, without those that change what belongs to the whole process.
_NOT_THESE = ("cacheprovider", "faulthandler", "threadexception", "unraisableexception")

running: list[type[Suite]] = []
_numbers = itertools.count()


class _Outcomes:
    """Notes what became of each test."""

    def __init__(self) -> None:
        self.of_test: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.split("::", 2)[2]
        if report.outcome != "passed":
            self.of_test[name] = f"{report.outcome}: {_reason(report)}"
        elif report.when == "call":
            self.of_test[name] = "passed"


def run_suite(suite: type[Suite], select: str = "") -> dict[str, str]:
    """Run a suite class in this process, apart from the tests that may be running around it.

    Args:
        select: as pytest's -k; empty runs all.

    Returns:
        The outcome of each test by name: "passed", or "failed: " or "skipped: " with the first line of the reason.

    Raises:
        ValueError: there was no test to run.
        RuntimeError: pytest itself failed; the message has what it printed.
    """
    outcomes, printed = _Outcomes(), io.StringIO()
    running.append(suite)
    # The folder on its own is what pytest must take for the project, and the environment's wishes are for the others.
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch, _modules_kept():
        folder = Path(name)
        file = folder / f"test_suite_{next(_numbers)}.py"
        file.write_text(_FILE)
        (folder / "pytest.ini").write_text("[pytest]\n")
        for variable in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS"):
            patch.delenv(variable, raising=False)
        arguments = ["--disable-plugin-autoload", "--capture=no", "--import-mode=importlib", "--no-header"]
        arguments += [f"--rootdir={folder}", f"--basetemp={folder / 'temporary'}", "-c", str(folder / "pytest.ini")]
        arguments += [word for plugin in _NOT_THESE for word in ("-p", f"no:{plugin}")]
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                code = pytest.main([*arguments, *(["-k", select] if select else []), str(file)], plugins=[outcomes])
        finally:
            running.pop()
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise ValueError(f"{suite.__name__} has no test that matches {select!r}")
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code!s}:\n{printed.getvalue()}")
    return outcomes.of_test


def _reason(report: pytest.TestReport) -> str:
    """The first line of why a test failed or was skipped."""
    if isinstance(report.longrepr, tuple):  # (path, line, reason) of a skip
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longreprtext).strip().partition("\n")[0]


@contextlib.contextmanager
def _modules_kept() -> Iterator[None]:
    """pytest leaves the test file in sys.modules."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.rpartition(".")[2].startswith("test_suite_"):
            del sys.modules[name]
