"""The registry: which component is chosen, and what is said when none can be."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel, Field

from octavo.errors import ConfigError, PluginError, UnavailableComponentError, UnknownNameError
from octavo.plugins.host import Plugin, PluginState
from octavo.plugins.registry import Registry, default_registry
from octavo.plugins.specs import ModelNeed, ModelSpec, Need, SchedulerSpec, Spec

CPU = Need(device="cpu")


class LotteryOptions(BaseModel):
    """Named by the specs below."""

    num_tickets: int = Field(default=3, ge=1)


def scheduler(name: str, **fields: Any) -> SchedulerSpec:
    return SchedulerSpec(name=name, target=f"{name}_module:Policy", **fields)


def plugin(name: str, *specs: Spec) -> Plugin:
    return Plugin(name=name, module=f"octavo_{name}", distribution=f"octavo-{name}", version="1.2", specs=specs)


def failed(name: str, error: Exception, state: PluginState = PluginState.BROKEN) -> Plugin:
    return Plugin(
        name=name,
        module=f"octavo_{name}",
        distribution=f"octavo-{name}",
        version="1.2",
        state=state,
        reason=f"{type(error).__name__}: {error}",
        location="there.py:7",
        error=error,
    )


# ------------------------------------------------------------------------------------------------------- auto


def test_auto_takes_the_highest_priority_that_can_serve() -> None:
    registry = Registry(
        [plugin("a", scheduler("slow")), plugin("b", scheduler("fast", priority=10, devices=("cuda",)))]
    )
    assert registry.select("scheduler", Need(device="cuda")).name == "fast"
    assert registry.select("scheduler", CPU).name == "slow"


def test_auto_takes_the_first_name_among_equal_priorities_whatever_the_order_of_plugins() -> None:
    plugins = [plugin("a", scheduler("zebra")), plugin("b", scheduler("ant"))]
    assert Registry(plugins).select("scheduler", CPU).name == "ant"
    assert Registry(plugins[::-1]).select("scheduler", CPU).name == "ant"


def test_auto_asks_no_further_once_one_can_serve() -> None:
    registry = Registry([plugin("a", scheduler("best", priority=1), scheduler("rest", probe="no_such_module:probe"))])
    assert registry.select("scheduler", CPU).name == "best"
    assert "no_such_module" not in sys.modules


def test_choice_is_plain_data_that_says_whose_it_is() -> None:
    chosen = Registry([plugin("a", scheduler("x"))]).select("scheduler", CPU)
    assert (chosen.kind, chosen.plugin, chosen.name, chosen.target) == ("scheduler", "a", "x", "x_module:Policy")
    assert (chosen.distribution, chosen.version, chosen.options) == ("octavo-a", "1.2", {})


def test_when_auto_finds_none_every_candidate_is_listed_with_its_reasons() -> None:
    registry = Registry(
        [
            plugin("a", scheduler("x", devices=("cuda",))),
            plugin("b", scheduler("y", devices=("tpu",), requires=("no_such",))),
        ]
    )
    with pytest.raises(UnavailableComponentError) as caught:
        registry.select("scheduler", CPU)
    assert str(caught.value).splitlines() == [
        "No installed scheduler policy can serve this.",
        "  a/x: runs on cuda; this engine runs on cpu",
        "  b/y: needs the Python package 'no_such', which is not installed; runs on tpu; this engine runs on cpu",
    ]


def test_when_auto_finds_none_the_plugins_that_failed_are_named_and_a_single_one_is_the_cause() -> None:
    error = ImportError("libgpu.so")
    registry = Registry([plugin("a", scheduler("x", devices=("cuda",))), failed("b", error)])
    with pytest.raises(UnavailableComponentError, match=r"Plugin 'b' did not load, broken: .*there.py:7") as caught:
        registry.select("scheduler", CPU)
    assert caught.value.__cause__ is error


def test_unknown_architecture_is_told_the_nearest_and_how_to_add_one() -> None:
    registry = Registry([plugin("a", ModelSpec(name="llama", target="a:B", architectures=("LlamaForCausalLM",)))])
    with pytest.raises(UnavailableComponentError, match="Nearest architectures installed: LlamaForCausalLM"):
        registry.select("model", ModelNeed(architecture="LlamoForCausalLM"))


# ----------------------------------------------------------------------------------------------------- by name


def test_named_component_is_taken_whatever_its_priority() -> None:
    registry = Registry([plugin("a", scheduler("x", priority=9), scheduler("y"))])
    assert registry.select("scheduler", CPU, "y").name == "y"
    assert registry.select("scheduler", CPU, "a/y").name == "y"


def test_named_component_that_cannot_serve_is_an_error_with_all_its_reasons_never_a_fallback() -> None:
    registry = Registry([plugin("a", scheduler("x", devices=("cuda",), requires=("no_such_library",)), scheduler("y"))])
    with pytest.raises(UnavailableComponentError, match="scheduler policy 'x' cannot be used") as caught:
        registry.select("scheduler", CPU, "x")
    assert "runs on cuda; this engine runs on cpu" in str(caught.value)
    assert "no_such_library" in str(caught.value)


def test_typo_is_told_the_near_name_and_the_installed_ones() -> None:
    registry = Registry([plugin("a", scheduler("lottery"), scheduler("fcfs"))])
    with pytest.raises(UnknownNameError) as caught:
        registry.select("scheduler", CPU, "lotery")
    assert "No scheduler policy named 'lotery'. Installed: fcfs, lottery. Did you mean 'lottery'?" in str(caught.value)


def test_name_of_another_kind_is_unknown() -> None:
    registry = Registry([plugin("a", scheduler("lottery"))])
    with pytest.raises(UnknownNameError, match="Installed: none"):
        registry.select("attention", CPU, "lottery")


def test_bare_name_that_two_plugins_bring_is_an_error_that_says_what_to_write() -> None:
    registry = Registry([plugin("a", scheduler("x")), plugin("b", scheduler("x", priority=5))])
    with pytest.raises(UnknownNameError, match=r"2 plugins bring scheduler policy 'x'\. Write b/x or a/x"):
        registry.select("scheduler", CPU, "x")
    assert registry.select("scheduler", CPU, "a/x").plugin == "a"


def test_auto_lets_two_of_one_name_compete() -> None:
    registry = Registry([plugin("a", scheduler("x")), plugin("b", scheduler("x", priority=5))])
    assert registry.select("scheduler", CPU).plugin == "b"


def test_short_name_is_the_bare_one_unless_two_bring_it() -> None:
    registry = Registry([plugin("a", scheduler("x"), scheduler("y")), plugin("b", scheduler("x"))])
    assert sorted(map(registry.short_name, registry.candidates("scheduler"))) == ["a/x", "b/x", "y"]


# ------------------------------------------------------------------------------------------------ failed plugins


@pytest.mark.parametrize("name", ["quant-gptq", "gptq", "quant-gptq/gptq", "octavo-quant-gptq"])
def test_asking_for_what_a_broken_plugin_would_bring_raises_with_its_error_as_the_cause(name: str) -> None:
    error = ImportError("libgpu.so")
    registry = Registry([plugin("a", scheduler("x")), failed("quant-gptq", error)])
    with pytest.raises(UnavailableComponentError, match=r"ImportError: libgpu.so \(there.py:7\)") as caught:
        registry.select("scheduler", CPU, name)
    assert caught.value.__cause__ is error


def test_asking_for_a_disabled_plugin_says_that_it_is_disabled() -> None:
    registry = Registry([failed("fair", PluginError("OCTAVO_PLUGINS"), PluginState.DISABLED)])
    with pytest.raises(UnavailableComponentError, match="disabled: "):
        registry.select("scheduler", CPU, "fair")


def test_failed_plugin_does_not_hide_a_component_of_its_name() -> None:
    registry = Registry([plugin("a", scheduler("fair")), failed("scheduler-fair", ImportError("x"))])
    assert registry.select("scheduler", CPU, "fair").plugin == "a"


def test_default_registry_warns_once_of_each_plugin_that_failed(
    site_packages: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    site_packages.install("broken-one", "import no_such_library")
    site_packages.install("unwanted", "import no_such_library")
    monkeypatch.setenv("OCTAVO_DISABLE_PLUGINS", "unwanted")
    with caplog.at_level(logging.WARNING):
        registry = default_registry()
    assert {"broken-one", "unwanted"} <= {one.name for one in registry.failed_plugins}
    messages = [record.getMessage() for record in caplog.records]
    assert sum("Plugin broken-one did not load, broken: " in message for message in messages) == 1
    assert not any("unwanted" in message for message in messages)


# ----------------------------------------------------------------------------------------------------- explain


def test_explain_lists_every_candidate_and_marks_the_one_select_takes() -> None:
    registry = Registry(
        [
            plugin("a", scheduler("x"), scheduler("y", priority=-1)),
            plugin("b", scheduler("z", priority=9, devices=("cuda",))),
        ]
    )
    explained = registry.choose("scheduler", CPU).candidates
    assert [(one.full_name, one.chosen) for one in explained] == [("b/z", False), ("a/x", True), ("a/y", False)]
    assert explained[0].reasons == ("runs on cuda; this engine runs on cpu",)
    assert registry.select("scheduler", CPU).name == "x"


def test_explain_marks_the_named_one() -> None:
    registry = Registry([plugin("a", scheduler("x"), scheduler("y"))])
    assert [one.spec.name for one in registry.choose("scheduler", CPU, "y").candidates if one.chosen] == ["y"]


def test_explain_marks_none_when_the_named_one_cannot_serve() -> None:
    registry = Registry([plugin("a", scheduler("x", devices=("cuda",)), scheduler("y"))])
    assert not any(one.chosen for one in registry.choose("scheduler", CPU, "x").candidates)


# ----------------------------------------------------------------------------------------------------- options


@pytest.fixture
def with_options() -> Registry:
    return Registry([plugin("a", scheduler("lottery", options=f"{__name__}:LotteryOptions"), scheduler("plain"))])


def test_options_are_checked_by_the_components_model_and_defaults_filled_in(with_options: Registry) -> None:
    assert with_options.select("scheduler", CPU, "lottery").options == {"num_tickets": 3}
    assert with_options.select("scheduler", CPU, "lottery", {"num_tickets": 5}).options == {"num_tickets": 5}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "lottery",
            {"num_ticket": 5},
            "has no option 'num_ticket'. It takes: num_tickets. Did you mean 'num_tickets'?",
        ),
        ("lottery", {"num_tickets": 0}, "num_tickets: Input should be greater than or equal to 1"),
        ("plain", {"num_tickets": 5}, "scheduler policy 'plain' takes no options, but num_tickets was given"),
    ],
)
def test_option_that_the_component_does_not_take_is_refused(
    with_options: Registry, name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        with_options.select("scheduler", CPU, name, options)
    assert message in str(caught.value)


# -------------------------------------------------------------------------------------------------------- load


def test_building_a_component_imports_its_target() -> None:
    spec = SchedulerSpec(name="x", target="octavo.errors:PluginError")
    built = Registry([plugin("a", spec)]).select("scheduler", CPU).build("as the core would")
    assert isinstance(built, PluginError)
    assert built.args == ("as the core would",)


def test_target_that_is_missing_is_an_error_that_names_plugin_and_distribution() -> None:
    registry = Registry([plugin("a", scheduler("x"))])
    with pytest.raises(PluginError, match=r"scheduler policy a/x \(octavo-a 1.2\) cannot be loaded: 'x_module:Policy'"):
        registry.select("scheduler", CPU).build()


def test_importing_the_registry_imports_nothing_heavy() -> None:
    code = (
        "import sys, octavo.plugins.registry; "
        "print([name for name in ('numpy', 'torch', 'pydantic', 'asyncio') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
