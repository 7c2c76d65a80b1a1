"""docs/hooks.md and the code say the same: every spec, field, feature, socket, member, state and layout."""

from __future__ import annotations

import importlib
import inspect
import re
import tomllib
from abc import ABC
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import interfaces
from octavo.builtin import octavo_components
from octavo.cli import main
from octavo.plugins import specs
from octavo.plugins.hookspecs import PLUGIN_API
from octavo.plugins.host import PluginRules, PluginState, discover
from octavo.plugins.specs import SPEC_KINDS, AttentionNeed, AttentionSpec, Need, Spec, load_target

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = (ROOT / "docs" / "hooks.md").read_text()

SPECS = [Spec, *SPEC_KINDS.values()]
NEEDS = [Need, *(one for one in vars(specs).values() if isinstance(one, type) and Need in one.__bases__)]
SOCKETS = [
    socket
    for name in interfaces.__all__
    if isinstance(socket := getattr(interfaces, name), type) and ABC in socket.__bases__
]


def section(title: str, document: str = DOCUMENT) -> str:
    """The text under a heading, up to the next of the same level or higher."""
    found = re.search(rf"^(#+) {re.escape(title)}$", document, re.MULTILINE)
    assert found, f"docs/hooks.md has no section {title!r}"
    rest = document[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def table(text: str, heading: str) -> list[list[str]]:
    """The rows of the table whose first column is headed so, without the backticks; [] when there is none."""
    rows: list[list[str]] = []
    inside = False
    for line in text.splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if inside and line.startswith("|"):
            rows.append(cells)
        else:
            inside = line.startswith("|") and cells[0] == heading
    return rows[1:]  # without the rule under the heading


def names(text: str, heading: str) -> list[str]:
    return [row[0] for row in table(text, heading)]


def own_fields(data: type) -> list[str]:
    """Fields that a dataclass adds to those it inherits."""
    inherited = {name for base in data.__mro__[1:] for name in getattr(base, "__dataclass_fields__", {})}
    return [field.name for field in fields(data) if field.name not in inherited]


def members(socket: type) -> list[str]:
    """Methods and attributes a component may or must give."""
    methods = [name for name, value in vars(socket).items() if inspect.isfunction(value)]
    return [*vars(socket).get("__annotations__", {}), *methods]


def code_blocks(language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    return [text for marked, text in blocks if marked == language]


# ------------------------------------------------------------------------------------------------- specs and needs


@pytest.mark.parametrize("data", [*SPECS, *NEEDS], ids=lambda data: data.__name__)
def test_table_of_a_spec_or_need_names_its_fields(data: type) -> None:
    assert sorted(names(section(data.__name__), "field")) == sorted(own_fields(data))


@pytest.mark.parametrize("spec", SPEC_KINDS.values(), ids=lambda spec: spec.__name__)
def test_section_of_a_spec_names_its_kind_and_features(spec: type[Spec]) -> None:
    text = section(spec.__name__)
    assert f"Kind `{spec.kind}`" in text
    assert sorted(names(text, "feature")) == sorted(spec.known_features)


@pytest.mark.parametrize("spec", SPEC_KINDS.values(), ids=lambda spec: spec.__name__)
def test_section_of_a_spec_names_its_socket(spec: type[Spec]) -> None:
    named = re.search(r"socket `(\w+)`", section(spec.__name__))
    assert (named is None) == (spec.kind == "command")
    assert named is None or named[1] in {socket.__name__ for socket in SOCKETS}


def test_no_section_is_of_a_spec_or_need_that_is_not_there() -> None:
    written = set(re.findall(r"^### (\w+(?:Spec|Need))$", DOCUMENT, re.MULTILINE))
    assert written == {data.__name__ for data in [*SPECS, *NEEDS] if data not in (Spec, Need)}


# --------------------------------------------------------------------------------------------------------- sockets


@pytest.mark.parametrize("socket", SOCKETS, ids=lambda socket: socket.__name__)
def test_table_of_a_socket_names_its_members_and_which_are_abstract(socket: type) -> None:
    rows = table(section(socket.__name__), "member")
    public = [name for name in members(socket) if not name.startswith("_")]
    assert sorted(row[0] for row in rows) == sorted(public)
    written = {row[0] for row in rows if row[1] == "abstract"}
    assert written == {name for name in public if name in getattr(socket, "__abstractmethods__", ())}


def test_no_section_is_of_a_socket_that_is_not_there() -> None:
    written = re.findall(r"^### (\w+)$", section("Sockets"), re.MULTILINE)
    assert sorted(written) == sorted(socket.__name__ for socket in SOCKETS)


# -------------------------------------------------------------------------------------- version, states and layouts


def test_version_told_is_the_one_published() -> None:
    version = "{}.{}".format(*PLUGIN_API)
    assert f"today {version};" in section("Version")
    assert f'OCTAVO_API = "{version}"' in DOCUMENT


def test_table_of_states_is_the_states() -> None:
    assert names(section("States"), "state") == [state.value for state in PluginState]


def test_variables_of_the_environment_are_those_read() -> None:
    rows = table(section("Which plugins may load"), "environment")
    assert PluginRules.from_environ({row[0]: "1" for row in rows}) == PluginRules(
        allow=("1",), deny=("1",), strict=True
    )
    assert [row[1] for row in rows] == [f"plugins.{field.name}" for field in fields(PluginRules)]


@pytest.mark.parametrize(("kv_cache_dtype", "heading"), [("auto", "layout"), ("fp8", "layout in fp8")])
def test_table_of_layouts_is_what_the_built_in_backends_publish(kv_cache_dtype: str, heading: str) -> None:
    sizes = {"block_size": 5, "num_kv_heads": 7, "head_dim": 11}
    need = AttentionNeed(device="cpu", dtype="float32", num_heads=14, kv_cache_dtype=kv_cache_dtype, **sizes)
    published = []
    for spec in octavo_components():
        if isinstance(spec, AttentionSpec) and spec.kv_layout:
            layout = load_target(spec.target)(need).kv_layout()
            published += [(layout.name, buffer.name, buffer.block_shape, buffer.dtype) for buffer in layout.buffers]
            assert layout.name == spec.kv_layout
    written = [
        (
            name,
            buffer,
            tuple(sizes[word] for word in shape.strip("[]").split(", ")[1:]),
            getattr(torch, "float32" if dtype == "the need's" else dtype),
        )
        for name, buffer, shape, dtype in table(section("KV layouts"), heading)
    ]
    assert written == published


def test_modules_told_as_published_are_those() -> None:
    told = re.findall(r"`(octavo\.[\w.]+)`", section("A plugin is a module"))
    assert sorted(told) == sorted(importlib.import_module("test_layering").PUBLISHED)


# ----------------------------------------------------------------------------------------------------- the examples


def test_example_of_a_plugin_loads(site_packages: Any) -> None:
    (project,) = map(tomllib.loads, code_blocks("toml"))
    ((name, module),) = project["project"]["entry-points"]["octavo"].items()
    door, options, _ = code_blocks("python")
    file = site_packages.install(name, door, distribution=project["project"]["name"], module=module)
    (file.parent / "policy.py").write_text(options)
    (plugin,) = (one for one in discover(PluginRules()) if one.name == name)
    assert (plugin.state, [spec.name for spec in plugin.specs]) == (PluginState.OK, ["lottery"]), plugin.fault
    assert load_target(f"{module}.policy:LotteryOptions")().num_tickets == 3


def test_listing_is_what_octavo_plugins_prints(
    site_packages: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    door = code_blocks("python")[0]
    for plugin, distribution, source in (
        ("fair", "acme-fair", door.replace("octavo_components", "octavo_component")),
        ("gpu", "acme-gpu", "import acme_kernels\n"),
        ("lottery", "acme-lottery", door),
        ("lottery", "zeta-lottery", door),
        ("novel", "acme-novel", door.replace('"1.0"', '"2.0"')),
        ("slow", "acme-slow", door),
    ):
        site_packages.install(plugin, source, distribution=distribution)
    monkeypatch.setenv("OCTAVO_DISABLE_PLUGINS", "sl*")
    assert main(["plugins"]) == 0
    printed = capsys.readouterr().out.replace(str(site_packages.path), "...")
    (listing,) = code_blocks("")
    shown = {block.strip() for block in printed.split("\n\n")}
    assert [block for block in listing.strip().split("\n\n") if block not in shown] == []


# ------------------------------------------------------------------------------------------- planted faults are seen


def test_row_that_is_missing_or_made_up_is_seen() -> None:
    without = DOCUMENT.replace("| `head_sizes` | of one head; empty is any |\n", "")
    made_up = DOCUMENT.replace("| `head_sizes` |", "| `head_shapes` |")
    for document in (without, made_up):
        assert document != DOCUMENT
        assert sorted(names(section("AttentionSpec", document), "field")) != sorted(own_fields(AttentionSpec))
