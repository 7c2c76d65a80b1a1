"""A package under plugins/ is uninstalled for real: the core's tests stay green, and its names say what to install."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Callable, Sequence
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    tomllib.loads(path.read_text())["project"]["name"]: path.parent
    for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))
}
Without = Callable[..., str]


@pytest.fixture
def python_without(tmp_path: Path) -> Without:
    """Make an environment like this one, but for some distributions; returns its Python."""

    def make(*uninstalled: str) -> str:
        folder = tmp_path / "environment"
        venv.create(folder, symlinks=True)
        ours = Path(sysconfig.get_path("purelib"))
        theirs = next(folder.glob("lib/python*/site-packages"))
        gone = {entry for name in uninstalled for entry in _entries(name, ours)}
        for entry in ours.iterdir():
            if entry.name not in gone:
                (theirs / entry.name).symlink_to(entry)
        return str(folder / "bin" / "python")

    return make


def _entries(name: str, site_packages: Path) -> set[str]:
    """Names in site-packages that belong to a distribution: its package, its .pth file, its dist-info."""
    files = distribution(name).files or []
    found = {file.parts[0] for file in files if file.parts[0] != ".."}
    assert any(canonicalize_name(entry).startswith(canonicalize_name(name)) for entry in found)
    return found


def run(python: str, *words: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([python, *words], cwd=ROOT, env=environ, capture_output=True, text=True, check=False)


SLOW = ("tests/conformance", "tests/test_example_plugin.py")
"""Of the core's tests, those that take longest; with one package uninstalled at a time (`full`) they run too."""


def core_s_tests(python: str, without: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    ignored = [f"--ignore={path}" for path in ("tests/test_uninstall.py", *without)]
    return run(python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests", *ignored)


def names_of(package: Path) -> list[tuple[str, str]]:
    """(kind, name) of every component the package brings."""
    module = next(package.glob("octavo_*/__init__.py")).parent.name
    code = (
        f"import json, sys; sys.path.insert(0, {str(package)!r}); import {module}; "
        f"print(json.dumps([(spec.kind, spec.name) for spec in {module}.octavo_components()]))"
    )
    return [(kind, name) for kind, name in json.loads(run(sys.executable, "-c", code).stdout)]


def test_core_s_tests_pass_with_every_plugin_uninstalled(python_without: Without) -> None:
    done = core_s_tests(python_without(*PACKAGES), without=SLOW)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.full
@pytest.mark.parametrize("name", PACKAGES)
def test_core_s_tests_pass_with_one_plugin_uninstalled(python_without: Without, name: str) -> None:
    done = core_s_tests(python_without(name))
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("name", PACKAGES)
def test_names_of_an_uninstalled_package_are_errors_that_name_it(python_without: Without, name: str) -> None:
    python = python_without(name)
    for kind, component in names_of(PACKAGES[name]):
        code = f"from octavo.plugins.registry import default_registry\ndefault_registry().find({kind!r}, {component!r})"
        done = run(python, "-c", code)
        assert done.returncode == 1
        assert f"pip install {name}" in done.stderr.splitlines()[-1]
