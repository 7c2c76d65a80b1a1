"""Every way a plugin can be kept out, with a real installed distribution: the sentence, the place, what starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from octavo.cli import main
from octavo.config import PluginsConfig
from octavo.errors import ConfigError, PluginError, UnavailableComponentError, UnknownNameError
from octavo.plugins.host import Plugin, PluginRules, PluginState, discover
from octavo.plugins.registry import Registry, default_registry
from octavo.plugins.specs import SPEC_KINDS, Need

EVERYTHING = PluginRules()

SOUND = """\
from octavo import SchedulerSpec, hookimpl

OCTAVO_API = "1.0"

@hookimpl
def octavo_components():
    return [SchedulerSpec(name="lottery", summary="Draws lots", target="dummy_lottery.policy:Lottery")]
"""


@pytest.fixture(autouse=True)
def no_rules_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OCTAVO_PLUGINS", "OCTAVO_DISABLE_PLUGINS", "OCTAVO_STRICT_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


def returning(expression: str) -> str:
    """SOUND, but its hook returns this."""
    return SOUND[: SOUND.index("return ")] + f"return {expression}\n"


def plugin_named(name: str, rules: PluginRules = EVERYTHING) -> Plugin:
    (plugin,) = (plugin for plugin in discover(rules) if plugin.name == name)
    return plugin


# ------------------------------------------------------------------------------------------------ broken: the hook


def test_misspelt_hook_is_named_with_its_line_and_the_right_name(site_packages: Any) -> None:
    file = site_packages.install("lottery", SOUND.replace("octavo_components", "octavo_component"))
    plugin = plugin_named("lottery")
    assert plugin.state is PluginState.BROKEN
    assert plugin.fault == (
        "broken: octavo_component() is marked @hookimpl, but there is no such hook; "
        f"did you mean 'octavo_components'? ({file}:5)"
    )


def test_misspelt_hook_beside_the_right_one_is_not_overlooked(site_packages: Any) -> None:
    file = site_packages.install("lottery", SOUND + "\n\n@hookimpl\ndef octavo_routes():\n    return []\n")
    plugin = plugin_named("lottery")
    assert plugin.reason.startswith("octavo_routes() is marked @hookimpl, but there is no such hook")
    assert plugin.location == f"{file}:10"


def test_misspelt_hook_without_its_marker_is_recognised(site_packages: Any) -> None:
    source = SOUND.replace("octavo_components", "octavo_componets").replace("@hookimpl\n", "")
    site_packages.install("lottery", source)
    assert plugin_named("lottery").reason == (
        "it defines no octavo_components(); that hook returns the specs of what it brings. "
        "Did you mean it by octavo_componets?"
    )


def test_error_inside_a_generator_hook_is_its_own_not_a_wrong_return_type(site_packages: Any) -> None:
    file = site_packages.install(
        "lottery", SOUND.replace("return [", "yield ").replace(")]", ")").replace("summary", "sumary")
    )
    plugin = plugin_named("lottery")
    assert "unexpected keyword argument 'sumary'" in plugin.reason
    assert plugin.location == f"{file}:7"


def test_spec_of_a_kind_this_core_does_not_know_is_named_with_the_kinds_it_knows(site_packages: Any) -> None:
    router = "from octavo import Spec\nclass RouterSpec(Spec):\n    kind = 'router'\n"
    file = site_packages.install("lottery", router + returning("[RouterSpec(name='x', target='a:B')]"))
    plugin = plugin_named("lottery")
    assert plugin.state is PluginState.BROKEN
    assert "octavo_components() returned RouterSpec(name='x') of kind 'router'; octavo " in plugin.reason
    assert plugin.reason.endswith(f"knows the kinds {', '.join(SPEC_KINDS)}")
    assert plugin.location == f"{file}:8"


def test_subclass_that_changes_a_known_kind_s_name_is_no_component(site_packages: Any) -> None:
    own = "from octavo import AttentionSpec\nclass Own(AttentionSpec):\n    kind = 'scheduler'\n"
    site_packages.install("lottery", own + returning("[Own(name='x', target='a:B')]"))
    assert "Own(name='x') of kind 'scheduler'" in plugin_named("lottery").reason


def test_misspelt_feature_is_told_the_known_ones(site_packages: Any) -> None:
    wrong = "[AttentionSpec(name='x', target='a:B', features=frozenset({'decoding'}))]"
    site_packages.install("lottery", "from octavo import AttentionSpec\n" + returning(wrong))
    assert (
        "there is no feature 'decoding' of attention backends; there are: prefill, decode, sliding_window"
        in plugin_named("lottery").reason
    )


# ---------------------------------------------------------------------------------------------- broken: the import


def test_missing_part_of_the_plugin_itself_is_not_taken_for_a_missing_package(site_packages: Any) -> None:
    site_packages.install("lottery", "import dummy_lottery.policy\n")
    assert plugin_named("lottery").reason == "ModuleNotFoundError: No module named 'dummy_lottery.policy'"


def test_entry_point_that_names_a_module_which_is_not_there_is_told_apart_from_a_missing_package(
    site_packages: Any,
) -> None:
    site_packages.install("lottery", SOUND, module="dummy_lottery")
    entry_points = site_packages.path / "dummy_lottery-1.2.dist-info" / "entry_points.txt"
    entry_points.write_text("[octavo]\nlottery = dummy_lottery.door\n")
    plugin = plugin_named("lottery")
    assert plugin.reason == (
        "its entry point names the module 'dummy_lottery.door', but 'dummy_lottery.door' is not there; "
        "install it again: `pip install --force-reinstall dummy-lottery`"
    )
    assert isinstance(plugin.error, ModuleNotFoundError)


def test_missing_package_of_the_hook_is_told_what_to_install_like_one_of_the_import(site_packages: Any) -> None:
    file = site_packages.install("lottery", returning("__import__('no_such_library')"))
    plugin = plugin_named("lottery")
    assert "`pip install dummy-lottery` brings what the plugin declares" in plugin.reason
    assert plugin.location == f"{file}:7"


# --------------------------------------------------------------------------------------------------- a requirement


def test_component_whose_requirement_is_missing_is_refused_with_the_install_hint_and_its_plugin_is_ok(
    site_packages: Any,
) -> None:
    needing = 'name="lottery", requires=("no_such_library",), install="pip install dummy-lottery[all]"'
    site_packages.install("lottery", SOUND.replace('name="lottery"', needing))
    assert plugin_named("lottery").state is PluginState.OK
    with pytest.raises(UnavailableComponentError) as caught:
        default_registry().select("scheduler", Need(), "lottery")
    assert (
        "needs the Python package 'no_such_library', which is not installed; "
        "install it with `pip install dummy-lottery[all]`" in str(caught.value)
    )


# --------------------------------------------------------------------------------------------- version and conflict


@pytest.mark.parametrize(
    ("api", "advice"),
    [
        ("1.1", "Install a newer octavo or an older version of the plugin"),
        ("2.0", "Install a newer octavo or an older version of the plugin"),
        ("0.9", "Install a newer version of the plugin"),
    ],
)
def test_plugin_of_another_api_is_told_what_to_install_at_the_line_that_states_it(
    site_packages: Any, api: str, advice: str
) -> None:
    file = site_packages.install("lottery", SOUND.replace("1.0", api))
    plugin = plugin_named("lottery")
    assert plugin.state is PluginState.INCOMPATIBLE
    assert plugin.reason.startswith(f"it was built for plugin API {api}; octavo ")
    assert f"publishes 1.0. {advice}" in plugin.reason
    assert plugin.location == f"{file}:3"


def test_hook_of_an_incompatible_plugin_is_not_run(site_packages: Any, capsys: pytest.CaptureFixture[str]) -> None:
    site_packages.install("lottery", returning("print('ran')").replace("1.0", "2.0"))
    discover(EVERYTHING)
    assert capsys.readouterr().out == ""


def test_malformed_api_is_shown_at_its_line(site_packages: Any) -> None:
    file = site_packages.install("lottery", SOUND.replace('"1.0"', "(1, 0)"))
    plugin = plugin_named("lottery")
    assert isinstance(plugin.error, PluginError)
    assert plugin.fault == (f'broken: OCTAVO_API is (1, 0); write "major.minor" as a string, here "1.0" ({file}:3)')


def test_missing_api_is_told_what_to_write(site_packages: Any) -> None:
    file = site_packages.install("lottery", SOUND.replace('OCTAVO_API = "1.0"', ""))
    plugin = plugin_named("lottery")
    assert plugin.reason.startswith('it states no OCTAVO_API; write OCTAVO_API = "1.0"')
    assert plugin.location == f"{file}:1"


def test_conflict_names_the_other_distribution_and_its_own_file(site_packages: Any) -> None:
    site_packages.install("lottery", SOUND, distribution="alpha", module="alpha_lottery")
    file = site_packages.install("lottery", SOUND, distribution="zeta", module="zeta_lottery")
    second = [plugin for plugin in discover(EVERYTHING) if plugin.name == "lottery"][1]
    assert (second.distribution, second.fault) == (
        "zeta",
        f"conflict: alpha 1.2 already brings a plugin of this name; uninstall one of them ({file}:1)",
    )
    assert "zeta_lottery" not in sys.modules


def test_same_component_of_two_plugins_is_chosen_by_its_whole_name(site_packages: Any) -> None:
    site_packages.install("alpha", SOUND)
    site_packages.install("zeta", SOUND)
    registry = default_registry()
    with pytest.raises(UnknownNameError, match="Write alpha/lottery or zeta/lottery"):
        registry.select("scheduler", Need(), "lottery")
    assert registry.select("scheduler", Need(), "zeta/lottery").distribution == "dummy-zeta"


def test_every_plugin_that_is_kept_out_tells_why_and_where(site_packages: Any) -> None:
    site_packages.install("disabled", SOUND)
    site_packages.install("incompatible", SOUND.replace("1.0", "2.0"))
    site_packages.install("broken", returning("3"))
    site_packages.install("alike", SOUND, distribution="alpha")
    site_packages.install("alike", SOUND, distribution="zeta")
    kept_out = [one for one in discover(PluginRules(deny=("disabled",))) if one.state is not PluginState.OK]
    ours = [one for one in kept_out if str(site_packages.path) in one.location]
    assert {one.state for one in ours} == set(PluginState) - {PluginState.OK}
    for one in ours:
        file, _, line = one.location.rpartition(":")
        assert one.reason
        assert Path(file).read_text().splitlines()[int(line) - 1].strip()


# ----------------------------------------------------------------------------------------------------------- rules


def test_rules_are_read_from_the_environment() -> None:
    assert PluginRules.from_environ({}) == PluginRules(allow=None, deny=(), strict=False)
    environ = {"OCTAVO_PLUGINS": "a, b,", "OCTAVO_DISABLE_PLUGINS": "quant-*", "OCTAVO_STRICT_PLUGINS": "1"}
    assert PluginRules.from_environ(environ) == PluginRules(allow=("a", "b"), deny=("quant-*",), strict=True)
    assert PluginRules.from_environ({"OCTAVO_PLUGINS": ""}).allow == ()


@pytest.mark.parametrize(("text", "strict"), [("1", True), ("True", True), ("0", False), ("false", False)])
def test_strict_is_on_or_off(text: str, strict: bool) -> None:
    assert PluginRules.from_environ({"OCTAVO_STRICT_PLUGINS": text}).strict is strict


def test_strict_that_is_neither_on_nor_off_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"OCTAVO_STRICT_PLUGINS=maybe is neither on nor off\. Write 1 or 0\."):
        PluginRules.from_environ({"OCTAVO_STRICT_PLUGINS": "maybe"})


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (PluginRules(allow=("x",)), "the allow-list (OCTAVO_PLUGINS, plugins.allow) does not name it"),
        (PluginRules(deny=("x", "lot*")), "the deny-list (OCTAVO_DISABLE_PLUGINS, plugins.deny) names lot*"),
        (
            PluginRules(allow=("lottery",), deny=("lottery",)),
            "the deny-list (OCTAVO_DISABLE_PLUGINS, plugins.deny) names lottery",
        ),
    ],
)
def test_plugin_that_the_rules_keep_out_is_told_which_and_is_not_imported(
    site_packages: Any, rules: PluginRules, reason: str
) -> None:
    file = site_packages.install("lottery", "raise RuntimeError('imported')")
    plugin = plugin_named("lottery", rules)
    assert (plugin.state, plugin.reason, plugin.location) == (PluginState.DISABLED, reason, f"{file}:1")
    assert "dummy_lottery" not in sys.modules


def test_place_of_a_plugin_in_a_package_is_found_without_importing_the_package(site_packages: Any) -> None:
    site_packages.install("lottery", "raise RuntimeError('imported')")
    door = site_packages.path / "dummy_lottery" / "door.py"
    door.write_text(SOUND)
    (site_packages.path / "dummy_lottery-1.2.dist-info" / "entry_points.txt").write_text(
        "[octavo]\nlottery = dummy_lottery.door\n"
    )
    assert plugin_named("lottery", PluginRules(allow=())).location == f"{door}:1"
    assert "dummy_lottery" not in sys.modules


def test_registry_follows_the_rules_of_the_configuration(site_packages: Any) -> None:
    site_packages.install("lottery", SOUND)
    registry = default_registry(PluginsConfig(deny=("lot*",)))
    assert [one.name for one in registry.plugins if one.state is PluginState.DISABLED] == ["lottery"]
    assert default_registry(PluginsConfig()).find("scheduler", "lottery").plugin.state is PluginState.OK


def test_without_rules_the_environment_says_which_plugins_may_load(
    site_packages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    site_packages.install("lottery", SOUND)
    monkeypatch.setenv("OCTAVO_PLUGINS", "")
    assert [one.name for one in default_registry().plugins if one.state is PluginState.OK] == ["builtin"]
    allowed = default_registry(PluginsConfig(allow=("lottery",)))
    assert [one.name for one in allowed.plugins if one.state is PluginState.OK] == ["builtin", "lottery"]


# ---------------------------------------------------------------------------------------------------------- strict


@pytest.fixture
def faulty(site_packages: Any) -> None:
    site_packages.install("bad-import", "import no_such_library")
    site_packages.install("bad-version", SOUND.replace("1.0", "2.0"))
    site_packages.install("unwanted", "import no_such_library")


def test_strict_start_up_names_every_plugin_that_did_not_load_and_chains_the_first_error(faulty: None) -> None:
    with pytest.raises(PluginError) as caught:
        default_registry(PluginRules(deny=("unwanted",), strict=True))
    message = str(caught.value)
    assert "\n  bad-import broken: ModuleNotFoundError: " in message
    assert "\n  bad-version incompatible: it was built for plugin API 2.0; " in message
    assert "unwanted" not in message
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_strict_start_up_goes_on_when_only_disabled_plugins_are_missing(faulty: None) -> None:
    assert isinstance(default_registry(PluginRules(deny=("bad-*", "unwanted"), strict=True)), Registry)


def test_start_up_goes_on_past_faulty_plugins_unless_strict(faulty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(default_registry(), Registry)
    monkeypatch.setenv("OCTAVO_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError, match="Plugins are strict"):
        default_registry()


def test_name_in_the_allow_list_that_nothing_brings_is_a_fault_in_strict_mode(site_packages: Any) -> None:
    site_packages.install("lottery", SOUND)
    with pytest.raises(PluginError, match=r"lotery broken: the allow-list names it, but no .* Did you mean 'lottery'"):
        default_registry(PluginRules(allow=("lotery",), strict=True))


# -------------------------------------------------------------------------------------------------- octavo plugins


def test_listing_always_succeeds_and_tells_by_its_status_only_when_strict(
    faulty: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OCTAVO_STRICT_PLUGINS", "1")
    assert main(["plugins"]) == 0
    assert main(["plugins", "--strict"]) == 1
    assert "bad-version  incompatible  dummy-bad-version 1.2\n" in capsys.readouterr().out


def test_strict_listing_succeeds_when_the_faulty_ones_are_disabled(
    faulty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_DISABLE_PLUGINS", "bad-*,unwanted")
    assert main(["plugins", "--strict"]) == 0


DETAILED = SOUND.replace(
    'name="lottery"',
    'name="lottery", devices=("cpu",), requires=("json",), options="dummy_lottery.options:LotteryOptions"',
)


def test_one_plugin_is_shown_with_every_field_that_says_something(
    site_packages: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = site_packages.install("lottery", DETAILED).parent
    (folder / "options.py").write_text(
        "import pydantic\n\nclass LotteryOptions(pydantic.BaseModel):\n    num_tickets: int = 3\n"
    )
    assert main(["plugins", "lottery"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "lottery  ok  dummy-lottery 1.2",
        "  scheduler  lottery  Draws lots",
        "    target        dummy_lottery.policy:Lottery",
        "    requires      json",
        "    devices       cpu",
        "    dtypes        any",
        "    priority      0",
        "    options       num_tickets=3",
    ]
    assert main(["plugins", "lottery", "--json"]) == 0
    (component,) = json.loads(capsys.readouterr().out)[0]["components"]
    assert (component["devices"], component["options"]) == (["cpu"], {"num_tickets": 3})


def test_options_that_cannot_be_imported_do_not_hide_the_rest(
    site_packages: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    site_packages.install("lottery", DETAILED)
    assert main(["plugins", "lottery"]) == 0
    assert "'dummy_lottery.options:LotteryOptions' cannot be imported" in capsys.readouterr().out


def test_unknown_plugin_is_told_the_nearest(site_packages: Any, capsys: pytest.CaptureFixture[str]) -> None:
    site_packages.install("lottery", SOUND)
    assert main(["plugins", "lotery"]) == 1
    assert "Did you mean 'lottery'?" in capsys.readouterr().err
