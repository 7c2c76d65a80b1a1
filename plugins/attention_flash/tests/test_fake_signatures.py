"""The fakes take the arguments of the real functions, as their sources have them (names in signatures.json)."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytest

RECORDED = json.loads((Path(__file__).parent / "fake_libraries" / "signatures.json").read_text())
PREFIX = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}

Install = Callable[..., None]


def arguments_of(dotted: str) -> list[str]:
    module, _, name = dotted.partition(":")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    parameters = inspect.signature(found).parameters.values()
    return [PREFIX.get(parameter.kind, "") + parameter.name for parameter in parameters]


@pytest.mark.parametrize(
    ("library", "function"), [(library, function) for library, functions in RECORDED.items() for function in functions]
)
def test_fake_takes_the_arguments_of_the_real_function(install: Install, library: str, function: str) -> None:
    install(library.partition(" ")[0])
    assert arguments_of(function) == RECORDED[library][function]
