"""The plugin host: what is found, what each plugin's state is, and that one's fault never reaches another."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from octavo import interfaces
from octavo.errors import PluginError
from octavo.plugins import hookspecs, host
from octavo.plugins.host import BUILTIN, Plugin, PluginHost, PluginRules, PluginState, discover
from octavo.plugins.specs import SPEC_KINDS, Spec, load_target

SOCKETS = {
    "attention": "AttentionBackend",
    "checkpoint": "Checkpoint",
    "executor": "Executor",
    "kernels": "Kernels",
    "linear_kernel": "LinearKernel",
    "logits_rule": "LogitsRule",
    "model": "ModelArchitecture",
    "quantization": "QuantizationMethod",
    "scheduler": "SchedulerPolicy",
}

SOUND = """
    from octavo import SchedulerSpec, hookimpl
    OCTAVO_API = "1.0"

    @hookimpl
    def octavo_components():
        return [SchedulerSpec(name="lottery", summary="Draws lots", target="dummy_lottery.policy:Lottery")]
"""


def returning(expression: str) -> str:
    """A plugin whose hook, on line 7, returns this."""
    return SOUND.replace(
        'return [SchedulerSpec(name="lottery", summary="Draws lots", target="dummy_lottery.policy:Lottery")]',
        f"return {expression}",
    )


def plugins_named(name: str, environ: dict[str, str] | None = None) -> list[Plugin]:
    return [plugin for plugin in discover(PluginRules.from_environ(environ or {})) if plugin.name == name]


def plugin_named(name: str, environ: dict[str, str] | None = None) -> Plugin:
    (plugin,) = plugins_named(name, environ)
    return plugin


# ------------------------------------------------------------------------------------------------------- found


def test_installed_plugin_brings_its_components_with_name_distribution_and_version(site_packages: Any) -> None:
    site_packages.install("lottery", SOUND)
    plugin = plugin_named("lottery")
    assert plugin.state is PluginState.OK, plugin.fault
    assert (plugin.distribution, plugin.version, plugin.module) == ("dummy-lottery", "1.2", "dummy_lottery")
    assert [(spec.kind, spec.name) for spec in plugin.specs] == [("scheduler", "lottery")]


WITHOUT_REFERENCE = {"proposer", "lora", "adapter_resolver"}
"""Kinds that an engine does without: nothing of the core's own."""


def test_builtins_are_a_plugin_like_any_other() -> None:
    plugin = discover(PluginRules())[0]
    assert (plugin.name, plugin.distribution, plugin.state) == ("builtin", "octavo", PluginState.OK), plugin.fault
    assert {spec.kind for spec in plugin.specs} == set(SPEC_KINDS) - WITHOUT_REFERENCE


@pytest.mark.parametrize("spec", discover(PluginRules())[0].specs, ids=lambda spec: f"{spec.kind}-{spec.name}")
def test_target_of_a_builtin_is_of_its_kind(spec: Spec) -> None:
    target = load_target(spec.target)
    if spec.kind == "command":
        assert callable(target.add_arguments)
        assert callable(target.run)
    else:
        assert issubclass(target, getattr(interfaces, SOCKETS[spec.kind]))


def test_loading_the_builtins_imports_nothing_heavy() -> None:
    code = (
        "import sys; from octavo.plugins.host import discover; assert not discover()[0].reason; "
        "print([name for name in ('numpy', 'torch', 'pydantic', 'transformers', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_discovery_can_be_repeated_in_one_process(site_packages: Any) -> None:
    site_packages.install("lottery", SOUND)
    assert plugin_named("lottery") == plugin_named("lottery")


def test_hook_may_be_a_generator(site_packages: Any) -> None:
    site_packages.install("lottery", SOUND.replace("return [", "yield ").replace(")]", ")"))
    assert [spec.name for spec in plugin_named("lottery").specs] == ["lottery"]


def test_plugin_without_metadata_loads_with_version_unknown(site_packages: Any) -> None:
    site_packages.install("lottery", SOUND)
    (site_packages.path / "dummy_lottery-1.2.dist-info" / "METADATA").unlink()
    plugin = plugin_named("lottery")
    assert (plugin.state, plugin.version) == (PluginState.OK, "unknown")


# ------------------------------------------------------------------------------------------------------ broken


def test_plugin_that_does_not_import_is_broken_with_its_own_line(site_packages: Any) -> None:
    file = site_packages.install("lottery", "x = 1\nimport no_such_gpu_library\n")
    plugin = plugin_named("lottery")
    assert plugin.state is PluginState.BROKEN
    assert plugin.reason == (
        "ModuleNotFoundError: No module named 'no_such_gpu_library'; install the package that holds "
        "'no_such_gpu_library' (`pip install dummy-lottery` brings what the plugin declares)"
    )
    assert plugin.location == f"{file}:2"
    assert isinstance(plugin.error, ModuleNotFoundError)


def test_line_is_the_plugins_own_even_when_a_library_raises(site_packages: Any) -> None:
    file = site_packages.install("lottery", 'import json\n\njson.loads("{")\n')
    assert plugin_named("lottery").location == f"{file}:3"


def test_syntax_error_is_located(site_packages: Any) -> None:
    file = site_packages.install("lottery", "x = 1\n\ndef f(:\n")
    plugin = plugin_named("lottery")
    assert plugin.reason.startswith("SyntaxError: ")
    assert plugin.location == f"{file}:3"


def test_module_that_is_not_there_is_broken(site_packages: Any) -> None:
    site_packages.install("lottery", SOUND).unlink()
    site_packages.path.joinpath("dummy_lottery").rmdir()
    assert plugin_named("lottery").reason == (
        "its entry point names the module 'dummy_lottery', but 'dummy_lottery' is not there; "
        "install it again: `pip install --force-reinstall dummy-lottery`"
    )


def test_broken_plugin_does_not_stop_the_others(site_packages: Any) -> None:
    site_packages.install("aaa", "raise RuntimeError('boom')")
    site_packages.install("lottery", SOUND)
    site_packages.install("zzz", returning("1 / 0"))
    assert [plugin_named(name).state for name in ("aaa", "lottery", "zzz")] == ["broken", "ok", "broken"]


def test_plugin_that_calls_exit_does_not_end_the_process(site_packages: Any) -> None:
    site_packages.install("lottery", "import sys; sys.exit(3)")
    assert plugin_named("lottery").reason == "SystemExit: 3"


def test_ctrl_c_during_an_import_is_not_swallowed(site_packages: Any) -> None:
    site_packages.install("lottery", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        discover(PluginRules())


def test_hook_that_raises_is_broken_with_its_own_line(site_packages: Any) -> None:
    file = site_packages.install("lottery", returning("1 / 0"))
    plugin = plugin_named("lottery")
    assert (plugin.reason, plugin.location) == ("ZeroDivisionError: division by zero", f"{file}:7")


def test_spec_of_wrong_shape_is_reported_at_the_line_that_makes_it(site_packages: Any) -> None:
    file = site_packages.install("lottery", returning('[SchedulerSpec(name="lottery", target="a:B", devices="cuda")]'))
    plugin = plugin_named("lottery")
    assert plugin.reason == "SchedulerSpec(name='lottery'): devices must be a tuple, not 'cuda'"
    assert plugin.location == f"{file}:7"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (returning("None"), "octavo_components() returned None, not a list of specs"),
        (returning("3"), "octavo_components() returned 3, not a list of specs"),
        (returning("['lottery']"), "octavo_components() returned 'lottery', which is none of AttentionSpec, "),
        (SOUND.replace("@hookimpl", ""), "octavo_components() is not marked: write @octavo.hookimpl above it"),
        ('OCTAVO_API = "1.0"', "it defines no octavo_components(); that hook returns the specs of what it brings"),
        (
            SOUND.replace("components()", "components(core, x=1)"),
            "octavo_components(core) asks for arguments, but it is called with none: write def octavo_components():",
        ),
        (
            SOUND.replace("@hookimpl", "@hookimpl(wrapper=True)"),
            "octavo_components() must be a plain function: ",
        ),
        (
            returning("[SchedulerSpec(name='a', target='b:C')] * 2"),
            "octavo_components() returned two components of kind scheduler named 'a'",
        ),
    ],
)
def test_hook_that_breaks_its_contract_is_broken_with_a_sentence(site_packages: Any, source: str, reason: str) -> None:
    file = site_packages.install("lottery", source)
    plugin = plugin_named("lottery")
    assert plugin.state is PluginState.BROKEN
    assert plugin.reason.startswith(reason)
    assert plugin.location.startswith(f"{file}:")


def test_nothing_of_a_plugin_counts_when_one_of_its_specs_is_wrong(site_packages: Any) -> None:
    site_packages.install("lottery", returning("[SchedulerSpec(name='good', target='a:B'), 'bad']"))
    assert plugin_named("lottery").specs == ()


def test_base_spec_is_no_component(site_packages: Any) -> None:
    source = returning("[Spec(name='a', target='b:C')]").replace("import", "import Spec,", 1)
    site_packages.install("lottery", source)
    assert "which is none of AttentionSpec" in plugin_named("lottery").reason


# ----------------------------------------------------------------------------------------------------- version


def with_api(statement: str) -> str:
    return SOUND.replace('OCTAVO_API = "1.0"', statement)


@pytest.mark.parametrize("api", ["1.0", "1.3"])
def test_plugin_of_the_same_major_and_no_newer_minor_loads(
    site_packages: Any, monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    monkeypatch.setattr(hookspecs, "PLUGIN_API", (1, 3))
    site_packages.install("lottery", with_api(f'OCTAVO_API = "{api}"'))
    assert plugin_named("lottery").state is PluginState.OK


@pytest.mark.parametrize("api", ["1.4", "1.10", "2.0", "0.9"])
def test_other_plugin_is_incompatible_and_told_both_numbers(
    site_packages: Any, monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    monkeypatch.setattr(hookspecs, "PLUGIN_API", (1, 3))
    site_packages.install("lottery", with_api(f'OCTAVO_API = "{api}"'))
    plugin = plugin_named("lottery")
    assert plugin.state is PluginState.INCOMPATIBLE
    assert f"built for plugin API {api};" in plugin.reason
    assert "publishes 1.3" in plugin.reason
    assert plugin.specs == ()


def test_newer_plugin_that_imports_a_name_this_core_lacks_is_incompatible_not_broken(site_packages: Any) -> None:
    site_packages.install("lottery", with_api('OCTAVO_API = "1.7"\n    from octavo import SpecOfTheFuture'))
    site_packages.install("raffle", with_api('from octavo import SpecOfTheFuture\n    OCTAVO_API = "1.7"'))
    for plugin in (plugin_named("lottery"), plugin_named("raffle")):
        assert plugin.state is PluginState.INCOMPATIBLE
        assert "plugin API 1.7" in plugin.reason
        assert "SpecOfTheFuture" in plugin.reason


@pytest.mark.parametrize("statement", ["", "OCTAVO_API = 1.0", 'OCTAVO_API = "1"', "OCTAVO_API = (1, 0)"])
def test_plugin_that_states_no_proper_api_is_told_what_to_write(site_packages: Any, statement: str) -> None:
    site_packages.install("lottery", with_api(statement))
    plugin = plugin_named("lottery")
    assert plugin.state is PluginState.BROKEN
    assert '"1.0"' in plugin.reason


# ---------------------------------------------------------------------------------------------------- conflict


def test_of_two_plugins_with_one_name_the_first_by_distribution_is_kept(site_packages: Any) -> None:
    site_packages.install("lottery", SOUND, distribution="zeta", module="zeta_lottery")
    site_packages.install("lottery", SOUND, distribution="alpha", module="alpha_lottery")
    first, second = plugins_named("lottery")
    assert (first.distribution, first.state) == ("alpha", PluginState.OK)
    assert (second.distribution, second.state) == ("zeta", PluginState.CONFLICT)
    assert "alpha 1.2 already brings a plugin of this name" in second.reason
    assert "zeta_lottery" not in sys.modules


def test_nobody_takes_the_name_of_the_builtins(site_packages: Any) -> None:
    site_packages.install("builtin", SOUND)
    assert [plugin.state for plugin in plugins_named("builtin")] == [PluginState.OK, PluginState.CONFLICT]


def test_one_module_is_one_plugin(site_packages: Any) -> None:
    site_packages.install("lottery", SOUND)
    site_packages.install("raffle", SOUND, module="dummy_lottery")
    assert plugin_named("lottery").state is PluginState.OK
    assert "already loaded as plugin 'lottery'" in plugin_named("raffle").reason


# ---------------------------------------------------------------------------------------------------- disabled


def test_plugin_outside_the_allow_list_is_never_imported(site_packages: Any) -> None:
    site_packages.install("lottery", SOUND)
    site_packages.install("raffle", SOUND)
    environ = {"OCTAVO_PLUGINS": "raffle, "}
    assert plugin_named("lottery", environ).state is PluginState.DISABLED
    assert plugin_named("raffle", environ).state is PluginState.OK
    assert "dummy_lottery" not in sys.modules


def test_empty_allow_list_leaves_the_builtins_alone(site_packages: Any) -> None:
    site_packages.install("lottery", SOUND)
    plugins = discover(PluginRules.from_environ({"OCTAVO_PLUGINS": ""}))
    assert [plugin.name for plugin in plugins if plugin.state is PluginState.OK] == ["builtin"]


def test_plugin_that_a_pattern_of_the_deny_list_matches_is_never_imported(site_packages: Any) -> None:
    site_packages.install("lottery", SOUND)
    plugin = plugin_named("lottery", {"OCTAVO_DISABLE_PLUGINS": "x,lot*"})
    assert (plugin.state, plugin.reason) == (
        PluginState.DISABLED,
        "the deny-list (OCTAVO_DISABLE_PLUGINS, plugins.deny) names lot*",
    )
    assert "dummy_lottery" not in sys.modules


def test_builtins_cannot_be_disabled() -> None:
    assert plugin_named("builtin", {"OCTAVO_PLUGINS": "", "OCTAVO_DISABLE_PLUGINS": "*"}).state is PluginState.OK


def test_name_in_the_allow_list_that_nothing_brings_is_seen(site_packages: Any) -> None:
    site_packages.install("lottery", SOUND)
    plugin = plugin_named("lotery", {"OCTAVO_PLUGINS": "lotery"})
    assert plugin.state is PluginState.BROKEN
    assert "Did you mean 'lottery'?" in plugin.reason


# ---------------------------------------------------------------------------------------------- one by one


def test_plugin_can_be_loaded_late(site_packages: Any) -> None:
    site_packages.install("lottery", SOUND)
    one_host = PluginHost()
    one_host.load(BUILTIN)
    late = one_host.load(Plugin(name="late", module="dummy_lottery", distribution="notebook", version="0"))
    assert late.state is PluginState.OK
    assert one_host.plugins[1] is late


def test_line_is_never_the_hosts_own_even_for_a_module_of_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.errors.OCTAVO_API", "1.0", raising=False)
    plugin = PluginHost().load(Plugin(name="x", module="octavo.errors", distribution="octavo", version="0"))
    assert plugin.location == f"{sys.modules['octavo.errors'].__file__}:1"


def test_name_of_a_plugin_whose_hook_raised_is_not_kept_by_pluggy(site_packages: Any) -> None:
    site_packages.install("lottery", returning("1 / 0"))
    one_host = PluginHost()
    one_host.load(Plugin(name="lottery", module="dummy_lottery", distribution="d", version="0"))
    assert not one_host._manager.has_plugin("lottery")


def test_fault_is_one_line_with_state_reason_and_place() -> None:
    plugin = Plugin(
        name="x",
        module="x",
        distribution="x",
        version="1",
        state=PluginState.BROKEN,
        reason="boom",
        location="x.py:3",
        error=PluginError("boom"),
    )
    assert plugin.fault == "broken: boom (x.py:3)"


def test_entry_points_are_read_from_the_group_octavo(site_packages: Any) -> None:
    site_packages.install("lottery", SOUND)
    assert EntryPoint("lottery", "dummy_lottery", "octavo").name in {one.name for one in host.find_installed()}
