"""Suite: what every socket's suite checks of a component, before its own facts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import pytest

from octavo.plugins.host import discover
from octavo.plugins.registry import Candidate, Registry
from octavo.plugins.specs import load_target

HEAVY_MODULES = ("numpy", "torch", "triton", "transformers", "peft", "fastapi", "pydantic")
"""What a plugin's entry module must not import: every `octavo` command imports that module."""


class Suite:
    """Base of the suites; a socket's suite sets `kind`, a plugin's test class sets `component`.

    Attributes:
        component: "plugin/name" of the installed component under test.
        options: its options, as a user would give them; {} takes the defaults.
    """

    kind: ClassVar[str]
    component: ClassVar[str]
    options: ClassVar[Mapping[str, object]] = {}

    def candidate(self) -> Candidate:
        """The installed component; the suite fails with the plugin's own fault when it did not load."""
        return installed_components().find(self.kind, self.component)

    def build(self, *arguments: object) -> Any:
        """The component, constructed as the engine constructs it."""
        return installed_components().component(self.candidate(), self.options).build(*arguments)

    def test_entry_module_imports_nothing_heavy(self) -> None:
        module = self.candidate().plugin.module.partition(":")[0]
        code = f"import sys; import {module}; print(*[name for name in {HEAVY_MODULES!r} if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"import {module} failed: {done.stderr.strip().rpartition(chr(10))[2]}"
        assert done.stdout.split() == [], f"import {module} imports these; move them behind the spec's target"

    def test_target_can_be_imported(self) -> None:
        assert callable(load_target(self.candidate().spec.target)), "the target is what constructs the component"

    def test_summary_is_one_line_that_says_what_it_is(self) -> None:
        summary = self.candidate().spec.summary
        assert summary.strip(), "listings show the summary; write one"
        assert "\n" not in summary, "listings have one line for it"

    def test_options_model_documents_each_option_and_refuses_unknown_ones(self) -> None:
        if (options := self.candidate().spec.options) is None:
            return
        model: Any = load_target(options)
        undocumented = [name for name, field in model.model_fields.items() if not field.description]
        assert undocumented == [], "`--help` shows each option's description"
        required = [name for name, field in model.model_fields.items() if field.is_required()]
        assert required == [], "`auto` chooses a component without options: give every option a default"
        try:
            model(no_such_option=1)
        except ValueError:
            return
        pytest.fail('it accepts an option that it does not have; write model_config = ConfigDict(extra="forbid")')


@cache
def installed_components() -> Registry:
    """The registry of this environment, read once."""
    return Registry(discover())
