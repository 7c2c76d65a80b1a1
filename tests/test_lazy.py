"""Public names: imported when first used, and the same for people, for programs and for type checkers."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from types import ModuleType

import pytest

import octavo
import octavo.interfaces
from octavo._lazy import lazy_getattr

PACKAGES = [octavo, octavo.interfaces]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_type_checkers_see_the_names_that_are_public(package: ModuleType) -> None:
    assert package.__file__ is not None
    with open(package.__file__) as file:
        tree = ast.parse(file.read())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {(node.module, alias.asname) for node in imports for alias in node.names if alias.asname}
    assert seen == {
        (f"{package.__name__}.{module}", name) for module, names in package._MODULES.items() for name in names
    }


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_can_be_imported(package: ModuleType) -> None:
    assert [name for name in package.__all__ if getattr(package, name, None) is None] == []


def test_unknown_name_is_an_attribute_error_like_any_module_s() -> None:
    with pytest.raises(AttributeError, match="module 'octavo' has no attribute 'NoSuchName'"):
        octavo.NoSuchName  # noqa: B018
    with pytest.raises(ImportError):
        importlib.import_module("octavo.no_such_module")


def test_module_is_imported_when_a_name_of_it_is_first_used() -> None:
    code = "import sys, octavo; before = 'octavo.outputs' in sys.modules; octavo.RequestOutput; print(before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_names_are_listed_in_order() -> None:
    assert lazy_getattr("package", {"z": ("B",), "a": ("C", "A")})[1] == ["A", "B", "C"]
