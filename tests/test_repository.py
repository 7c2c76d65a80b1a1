"""The repository itself: documents that point somewhere, whole plugin folders, pinned versions, no file too big."""

from __future__ import annotations

import importlib.metadata
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

MAX_LINES = 450
LONG_FILES: dict[str, str] = {
    "framework/octavo/engine/scheduler.py": "one state machine; what could be parted from it is beside it",
    "tests/test_scheduler.py": "one fact each about one object, in the order of a request's life",
}
"""Python files over MAX_LINES, each with the reason why it is one idea."""

MAX_BYTES = 1_000_000
LARGE_FILES: dict[str, str] = {
    f"tests/golden/quantized/{name}/model.safetensors": "a whole checkpoint by the tool whose format it proves"
    for name in ("awq-w4-g64-gemm", "gptq-w2-g32-asym-desc_act", "gptq-w4-g64-sym")
}
"""Files over MAX_BYTES, each with the reason why it is here."""

NOT_OURS = {"build", "dist", "__pycache__"}


def repository_files() -> Iterator[Path]:
    """Every file of the repository, relative to its root; hidden folders and what is built are left out."""
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in NOT_OURS]
        for name in names:
            yield (Path(folder) / name).relative_to(ROOT)


def plugin_folders() -> list[Path]:
    return sorted(
        {ROOT.joinpath(*path.parts[:2]) for path in repository_files() if path.parts[:-2][:1] == ("plugins",)}
    )


def pins() -> dict[str, str]:
    """constraints.txt: normalised name -> version."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def installed_requirements() -> Iterator[tuple[str, Requirement]]:
    """(where, requirement) of what `make test` installs for the core and each plugin, Octavo itself apart."""
    for path in [ROOT / "pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml"))]:
        project = tomllib.loads(path.read_text())["project"]
        for text in [*project["dependencies"], *project.get("optional-dependencies", {}).get("test", [])]:
            requirement = Requirement(text)
            if not requirement.name.startswith("octavo"):
                yield str(path.relative_to(ROOT)), requirement


# ------------------------------------------------------------------------------------------------- documents


def test_every_path_named_in_the_walk_exists() -> None:
    named = re.findall(r"`([\w./-]+/[\w./-]+)`", (ROOT / "docs" / "walk.md").read_text())
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_link_between_documents_leads_somewhere() -> None:
    broken = [
        f"{document}: {target}"
        for document in repository_files()
        if document.suffix == ".md"
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / document).read_text())
        if ":" not in target and not (ROOT / document.parent / target).exists()
    ]
    assert broken == []


# ----------------------------------------------------------------------------------------------------- sizes


def test_python_files_are_short_or_listed_with_a_reason() -> None:
    long = {
        path.as_posix()
        for path in repository_files()
        if path.suffix == ".py" and len((ROOT / path).read_text().splitlines()) > MAX_LINES
    }
    assert long == set(LONG_FILES), f"more than {MAX_LINES} lines: split the file, or list it with its reason"


def test_files_are_small_or_listed_with_a_reason() -> None:
    large = {path.as_posix() for path in repository_files() if (ROOT / path).stat().st_size > MAX_BYTES}
    assert large == set(LARGE_FILES), f"more than {MAX_BYTES} bytes: generate it, or list it with its reason"


# --------------------------------------------------------------------------------------------------- plugins


def test_every_plugin_folder_is_whole() -> None:
    missing = [
        f"{folder.name}: {name}"
        for folder in plugin_folders()
        for name in ("pyproject.toml", "README.md", f"octavo_{folder.name}/__init__.py", "tests")
        if not (folder / name).exists()
    ]
    assert missing == []


def test_every_plugin_is_a_distribution_named_like_its_folder() -> None:
    for folder in plugin_folders():
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        assert canonicalize_name(project["name"]) == canonicalize_name(f"octavo-{folder.name}")
        assert f"octavo_{folder.name}" in project["entry-points"]["octavo"].values()


# -------------------------------------------------------------------------------------------------- versions


def test_every_requirement_allows_the_version_we_test_with() -> None:
    versions = pins()
    refused = [
        f"{where}: {requirement}"
        for where, requirement in installed_requirements()
        if (version := versions.get(canonicalize_name(requirement.name)))
        and not requirement.specifier.contains(version)
    ]
    assert refused == []


def test_every_package_those_requirements_bring_is_pinned() -> None:
    seen = set[tuple[str, str]]()
    waiting = [(requirement, "") for _, requirement in installed_requirements()]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in seen and name != "torch":  # its CUDA builds bring pinned libraries of their own
                seen.add((name, wanted))
                waiting += [(Requirement(text), wanted) for text in importlib.metadata.requires(name) or ()]
    assert sorted({name for name, _ in seen} - set(pins())) == []
