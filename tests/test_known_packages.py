"""A name that a package outside the core brings turns into an error that names the package to install."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path

import pytest

from octavo.cli import main
from octavo.errors import UnavailableComponentError, UnknownNameError
from octavo.plugins import host
from octavo.plugins.host import BUILTIN, Plugin, PluginHost, PluginRules, PluginState, discover
from octavo.plugins.known_packages import KNOWN_PACKAGES, KnownPackage
from octavo.plugins.registry import Registry
from octavo.plugins.specs import (
    SPEC_KINDS,
    CheckpointNeed,
    CheckpointSpec,
    ModelNeed,
    ModelSpec,
    Need,
    QuantizationNeed,
    QuantizationSpec,
    Spec,
)

ROOT = Path(__file__).resolve().parent.parent
DOORS = sorted(ROOT.glob("plugins/*/octavo_*/__init__.py"))
NAMES = [(package, name) for package in KNOWN_PACKAGES for name in sorted(package.names)]
SERVED = [(package, served) for package in KNOWN_PACKAGES for served in sorted(package.serves)]


def id_of(value: object) -> str:
    return value.distribution if isinstance(value, KnownPackage) else str(value)


def served_by(spec: Spec) -> tuple[str, ...]:
    """What a need of the spec's kind is matched with when no name is given."""
    match spec:
        case ModelSpec():
            return spec.architectures
        case CheckpointSpec():
            return spec.suffixes
        case QuantizationSpec():
            return spec.formats
    return ()


def need_for(package: KnownPackage, served: str) -> Need:
    match package.kind:
        case "model":
            return ModelNeed(architecture=served)
        case "checkpoint":
            return CheckpointNeed(path=f"/models/tiny{served}", filenames=(f"tiny{served}",))
        case "quantization":
            return QuantizationNeed(format=served)
    raise AssertionError(f"{package.kind} is chosen by name alone")


def only_builtins(*others: Plugin) -> Registry:
    """What is left when no package outside the core is installed."""
    return Registry([PluginHost().load(BUILTIN), *others])


# ------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.parent.name)
def test_table_holds_what_the_package_brings(door: Path) -> None:
    project = tomllib.loads((door.parent.parent / "pyproject.toml").read_text())["project"]
    assert project["name"].removeprefix("octavo-") in project["entry-points"]["octavo"], "plugin/name is told by it"
    source = importlib.util.spec_from_file_location(f"door_of_{door.parent.name}", door)
    assert source is not None
    assert source.loader is not None
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    brought: dict[str, list[Spec]] = {}
    for spec in module.octavo_components():
        brought.setdefault(spec.kind, []).append(spec)
    assert {
        KnownPackage(
            distribution=project["name"],
            kind=kind,
            names=frozenset(spec.name for spec in specs),
            serves=frozenset(served for spec in specs for served in served_by(spec)),
        )
        for kind, specs in brought.items()
    } == {package for package in KNOWN_PACKAGES if package.distribution == project["name"]}


def test_table_holds_no_name_of_the_core() -> None:
    registry = only_builtins()
    of_the_core = {(kind, one.spec.name) for kind in SPEC_KINDS for one in registry.candidates(kind)}
    assert {(package.kind, name) for package, name in NAMES} & of_the_core == set()


# ------------------------------------------------------------------------------------------------------- the error


@pytest.mark.parametrize(("package", "name"), NAMES, ids=id_of)
def test_name_of_a_package_that_is_not_installed_names_the_package(package: KnownPackage, name: str) -> None:
    plugin = package.distribution.removeprefix("octavo-")
    for asked in (name, f"{plugin}/{name}"):
        with pytest.raises(UnknownNameError) as caught:
            only_builtins().find(package.kind, asked)
        assert f"{package.distribution} brings it: `pip install {package.distribution}`." in str(caught.value)


@pytest.mark.parametrize(("package", "served"), SERVED, ids=id_of)
def test_model_that_only_a_package_serves_which_is_not_installed_names_the_package(
    package: KnownPackage, served: str
) -> None:
    error = only_builtins().choose(package.kind, need_for(package, served)).error
    assert isinstance(error, UnavailableComponentError)
    assert f"{package.distribution} brings it: `pip install {package.distribution}`." in str(error)


def kept_out(package: KnownPackage) -> Plugin:
    return Plugin(
        name="renamed",
        module="m",
        distribution=package.distribution,
        version="1",
        state=PluginState.DISABLED,
        reason="the deny-list names it",
    )


@pytest.mark.parametrize(("package", "name"), NAMES, ids=id_of)
def test_name_of_a_package_that_is_installed_and_did_not_load_is_told_its_fault_instead(
    package: KnownPackage, name: str
) -> None:
    with pytest.raises(UnavailableComponentError, match="disabled: the deny-list names it") as caught:
        only_builtins(kept_out(package)).find(package.kind, name)
    assert "pip install" not in str(caught.value)


@pytest.mark.parametrize(("package", "served"), SERVED, ids=id_of)
def test_model_of_a_package_that_is_installed_and_did_not_load_is_told_its_fault_instead(
    package: KnownPackage, served: str
) -> None:
    error = only_builtins(kept_out(package)).choose(package.kind, need_for(package, served)).error
    assert "disabled: the deny-list names it" in str(error)
    assert "pip install" not in str(error)


@pytest.mark.parametrize("package", KNOWN_PACKAGES, ids=id_of)
def test_plugin_that_is_asked_for_and_not_installed_names_the_package(
    package: KnownPackage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "entry_points", lambda group: [])
    advice = f"{package.distribution} brings it: `pip install {package.distribution}`."
    plugin = package.distribution.removeprefix("octavo-")
    (missing,) = (one for one in discover(PluginRules(allow=(plugin,))) if one.faulty)
    assert missing.reason.endswith(advice)
    assert main(["plugins", plugin]) == 1
    assert advice in capsys.readouterr().err


def test_name_that_no_package_brings_is_told_none() -> None:
    with pytest.raises(UnknownNameError) as caught:
        only_builtins().find("scheduler", "fare")
    assert "pip install" not in str(caught.value)


def test_name_of_another_kind_or_plugin_is_not_promised() -> None:
    registry = only_builtins()
    for kind, name in (("attention", "gguf"), ("scheduler", "somebody/fair")):
        with pytest.raises(UnknownNameError) as caught:
            registry.find(kind, name)
        assert "pip install" not in str(caught.value)


def test_model_that_no_package_serves_is_told_how_to_add_it() -> None:
    error = only_builtins().choose("model", ModelNeed(architecture="NoSuchForCausalLM")).error
    assert "A plugin adds this one with ModelSpec(" in str(error)
    assert "pip install" not in str(error)
