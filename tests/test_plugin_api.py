"""The plugin API is the one that was recorded for its version, and versions follow the rule."""

from __future__ import annotations

import difflib
import importlib
import itertools
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_layering import PUBLISHED

from octavo.builtin.torch_attention import TorchAttention
from octavo.interfaces import KVLayout
from octavo.plugins.hookspecs import PLUGIN_API
from octavo.plugins.specs import AttentionSpec

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))  # they are scripts, not a package

plugin_api = importlib.import_module("plugin_api")

GOLDEN = {
    (int(match[1]), int(match[2])): path
    for path in (ROOT / "tests" / "golden").glob("plugin-api-*.txt")
    if (match := re.fullmatch(r"plugin-api-(\d+)\.(\d+)\.txt", path.name))
}

RULE = """
The plugin API is not what tests/golden/plugin-api-{version}.txt records:

{difference}

Was it meant? An added optional argument, field or feature makes a new minor version; anything else a new major one.
Raise PLUGIN_API in framework/octavo/plugins/hookspecs.py, write the new version's entry in CHANGELOG-plugin-api.md, and
record it: python scripts/plugin_api.py > tests/golden/plugin-api-MAJOR.MINOR.txt
A version that is still in work, as its entry says, is recorded again under its own number.
"""


def recorded(version: tuple[int, int]) -> list[str]:
    return GOLDEN[version].read_text().splitlines()


def difference(older: list[str], newer: list[str]) -> str:
    lines = difflib.unified_diff(older, newer, "recorded", "now", n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith("@@"))


def faults_of_versions(golden: dict[tuple[int, int], list[str]]) -> list[str]:
    """Minor versions that broke something of the one before."""
    return [
        f"{newer[0]}.{newer[1]}: {change}"
        for older, newer in itertools.pairwise(sorted(golden))
        if older[0] == newer[0]
        for change in plugin_api.breaking_changes(golden[older], golden[newer])
    ]


# ------------------------------------------------------------------------------------------------------ the version


def test_plugin_api_is_the_one_recorded_for_its_version() -> None:
    now, version = plugin_api.dump(), "{}.{}".format(*PLUGIN_API)
    assert PLUGIN_API in GOLDEN, f"record it: python scripts/plugin_api.py > tests/golden/plugin-api-{version}.txt"
    changed = difference(recorded(PLUGIN_API), now)
    assert not changed, RULE.format(version=version, difference=changed)


def test_current_version_is_the_newest_recorded() -> None:
    assert max(GOLDEN) == PLUGIN_API


def test_no_minor_version_broke_the_one_before() -> None:
    assert faults_of_versions({version: recorded(version) for version in GOLDEN}) == []


def test_changelog_has_an_entry_for_every_version() -> None:
    headings = re.findall(r"^## (\d+)\.(\d+)$", (ROOT / "CHANGELOG-plugin-api.md").read_text(), re.MULTILINE)
    assert [(int(major), int(minor)) for major, minor in headings] == sorted(GOLDEN, reverse=True)


def test_everything_published_is_in_the_dump() -> None:
    assert set(plugin_api.SIGNATURES + plugin_api.NAMES_ONLY) == {*PUBLISHED, "octavo"}
    subjects = [line.split(" ")[0] for line in recorded(PLUGIN_API)]
    assert [module for module in PUBLISHED if not any(one.startswith(f"{module}.") for one in subjects)] == []


# --------------------------------------------------------------------------------------- planted changes are noticed


@pytest.fixture
def framework(tmp_path: Path) -> Path:
    """A copy of the core's source, to be changed."""
    return Path(shutil.copytree(plugin_api.FRAMEWORK, tmp_path / "octavo", ignore=shutil.ignore_patterns("*.pyc")))


def plant(framework: Path, file: str, old: str, new: str) -> tuple[list[str], list[str]]:
    """The dumps before and after one change of the source."""
    path = framework / file
    text = path.read_text()
    assert text.count(old) >= 1, f"{file} no longer holds {old!r}"
    before = plugin_api.dump(framework)
    path.write_text(text.replace(old, new, 1))
    return before, plugin_api.dump(framework)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("interfaces/attention.py", "        parameters: AttentionParameters,", "        layer: AttentionParameters,"),
        ("interfaces/attention.py", "        parameters: AttentionParameters,", "        parameters: float,"),
        (
            "interfaces/attention.py",
            "        parameters: AttentionParameters,",
            "        parameters: AttentionParameters, mask: Tensor,",
        ),
        ("interfaces/attention.py", "PAD_SLOT = -1", "PAD_SLOT = -2"),
        ("interfaces/attention.py", "max_num_requests: int\n", "max_num_requests: int\n    extra: int\n"),
        ("interfaces/attention.py", "kv_layout(self) -> KVLayout", "kv_layout(self) -> tuple[KVLayout, ...]"),
        ("interfaces/checkpoint.py", "class Checkpoint(ABC)", "class Checkpoint"),
        ("interfaces/checkpoint.py", "    def tokenizer(self)", "    def words(self)"),
        ("interfaces/model.py", "*, bias: bool = False", "*, bias: bool = True"),
        ("interfaces/model.py", "*, bias: bool = False", "*, name: str, bias: bool = False"),
        (
            "interfaces/model.py",
            "    def ignored_names",
            "    @abstractmethod\n    def more(self) -> int: ...\n\n    def ignored_names",
        ),
        ("interfaces/__init__.py", '        "KVLayout",\n', ""),
        ("plugins/specs.py", "    head_sizes: tuple[int, ...] = ()  # empty: any\n", ""),
        ("plugins/specs.py", 'summary: str = ""', "summary: str"),
        ("plugins/hookspecs.py", "def octavo_components(self)", "def octavo_components(self, core: object)"),
        ("errors.py", "class UnknownNameError(ConfigError)", "class UnknownNameError(OctavoError)"),
        ("request.py", 'RUNNING = "running"', 'RUNNING = "active"'),
        ("sampling_params.py", "top_p: float = 1.0", "top_p: float = 0.9"),
        ("testing/__init__.py", '"scheduler": ("SchedulerSuite",),', ""),
        ("__init__.py", '"plugins.hookspecs": ("hookimpl",),', ""),
    ],
)
def test_change_that_breaks_plugins_is_told_from_one_that_does_not(
    framework: Path, file: str, old: str, new: str
) -> None:
    before, after = plant(framework, file, old, new)
    assert difference(before, after)
    assert plugin_api.breaking_changes(before, after)
    assert faults_of_versions({(1, 0): before, (1, 1): after})
    assert not faults_of_versions({(1, 0): before, (2, 0): after})


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        (
            "interfaces/attention.py",
            "        parameters: AttentionParameters,",
            "        parameters: AttentionParameters, cap: float = 0.0,",
        ),
        (
            "interfaces/scheduling.py",
            "    def metrics",
            "    def share(self, budget: int) -> int:\n        return budget\n\n    def metrics",
        ),
        ("plugins/specs.py", 'summary: str = ""', 'summary: str = ""\n    homepage: str = ""'),
        ("errors.py", "class ShapeError", "class NewError(OctavoError):\n    code: int\n\n\nclass ShapeError"),
    ],
)
def test_optional_addition_is_noticed_and_breaks_nothing(framework: Path, file: str, old: str, new: str) -> None:
    before, after = plant(framework, file, old, new)
    assert set(before) < set(after)
    assert plugin_api.breaking_changes(before, after) == []


def test_private_names_and_bodies_are_no_part_of_the_api(framework: Path) -> None:
    before, after = plant(framework, "errors.py", "class OctavoError", "def _helper(): ...\n\n\nclass OctavoError")
    assert before == after


def test_new_feature_is_noticed_and_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = plugin_api.dump()
    monkeypatch.setattr(AttentionSpec, "known_features", (*AttentionSpec.known_features, "alibi"))
    assert set(plugin_api.dump()) - set(before) == {"kind attention feature: alibi"}
    assert plugin_api.breaking_changes(before, plugin_api.dump()) == []


def test_other_kv_layout_under_the_same_name_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    before, layout = plugin_api.dump(), TorchAttention.kv_layout

    def turned(self: TorchAttention) -> KVLayout:
        ours = layout(self)
        return replace(ours, buffers=ours.buffers[::-1])

    monkeypatch.setattr(TorchAttention, "kv_layout", turned)
    assert plugin_api.breaking_changes(before, plugin_api.dump())


def test_message_of_a_change_shows_it_with_the_rule_and_the_command() -> None:
    message = RULE.format(version="1.0", difference=difference(["a", "b"], ["a", "c"]))
    assert "\n-b\n+c\n" in message
    assert "python scripts/plugin_api.py > tests/golden/" in message
