"""The contract of a plugin's module: the one hook it implements, the marker, and the plugin API it states."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches

import pluggy

from octavo import __version__
from octavo.errors import PluginError
from octavo.plugins.specs import SPEC_KINDS, Spec

PROJECT = "octavo"
"""Name of the pluggy project and of the entry-point group."""

PLUGIN_API = (1, 0)
"""The plugin API this core publishes. A plugin states the one it was built for: `OCTAVO_API = "1.0"`.

The same major and a minor not newer loads. The minor grows with an added field, feature or optional argument,
the major with anything else.
"""

HOOK = "octavo_components"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Hooks:
    """Historic, so that registering a plugin runs its hook alone: one plugin's fault never reaches another."""

    @hookspec(historic=True)
    def octavo_components(self) -> Iterable[Spec]:  # type: ignore[empty-body]
        """Return the specs of everything this plugin brings. Cheap and pure: no torch, no numpy, no I/O."""


# -------------------------------------------------------------------------------------------------- version


def api_fault(api: object) -> str:
    """Empty when `api`, a module's OCTAVO_API, is a version at all."""
    publishes = "{}.{}".format(*PLUGIN_API)
    if api is None:
        return (
            f'it states no OCTAVO_API; write OCTAVO_API = "{publishes}", the plugin API it was built for, in its module'
        )
    if not isinstance(api, str) or not re.fullmatch(r"\d+\.\d+", api):
        return f'OCTAVO_API is {api!r}; write "major.minor" as a string, here "{publishes}"'
    return ""


def why_incompatible(api: str) -> str:
    """Empty when this core can load a plugin built for `api`, "major.minor"."""
    major, minor = map(int, api.split("."))
    if major == PLUGIN_API[0] and minor <= PLUGIN_API[1]:
        return ""
    newer = (major, minor) > PLUGIN_API
    return (
        f"it was built for plugin API {api}; octavo {__version__} publishes {PLUGIN_API[0]}.{PLUGIN_API[1]}. "
        f"Install {'a newer octavo or an older' if newer else 'a newer'} version of the plugin"
    )


# ----------------------------------------------------------------------------------------------------- hook


def check_hook(module: object) -> None:
    """See before it is run that the module's hook is spelt, marked and declared as it should be.

    Raises:
        PluginError: it is not; says what to write.
    """
    if misspelt := misspelt_hooks(module):
        raise PluginError(f"{misspelt[0]}() is marked @hookimpl, but there is no such hook; did you mean {HOOK!r}?")
    hook = getattr(module, HOOK, None)
    if hook is None:
        near = get_close_matches(HOOK, dir(module), n=1)
        raise PluginError(
            f"it defines no {HOOK}(); that hook returns the specs of what it brings"
            + (f". Did you mean it by {near[0]}?" if near else "")
        )
    if not hasattr(hook, f"{PROJECT}_impl"):
        raise PluginError(f"{HOOK}() is not marked: write @octavo.hookimpl above it")
    parameters = inspect.signature(hook).parameters.values()
    if wanted := [one.name for one in parameters if one.default is one.empty]:
        raise PluginError(
            f"{HOOK}({', '.join(wanted)}) asks for arguments, but it is called with none: write def {HOOK}():"
        )


def misspelt_hooks(module: object) -> list[str]:
    """Functions of a module that are marked as hooks and are not the hook."""
    return [
        name
        for name in dir(module)
        if name != HOOK and isinstance(getattr(getattr(module, name, None), f"{PROJECT}_impl", None), dict)
    ]


def checked_specs(returned: object) -> tuple[Spec, ...]:
    """What a hook returned, as a tuple of specs.

    Raises:
        PluginError: it is something else, of a kind this core does not know, or holds one name twice.
    """
    if not isinstance(returned, Iterable):
        raise PluginError(f"{HOOK}() returned {returned!r}, not a list of specs")
    specs = tuple(returned)
    for spec in specs:
        if not isinstance(spec, Spec) or type(spec) is Spec:
            names = ", ".join(kind.__name__ for kind in SPEC_KINDS.values())
            raise PluginError(f"{HOOK}() returned {spec!r}, which is none of {names}")
        if not isinstance(spec, SPEC_KINDS.get(spec.kind, ())):
            raise PluginError(
                f"{HOOK}() returned {type(spec).__name__}(name={spec.name!r}) of kind {spec.kind!r}; "
                f"octavo {__version__} knows the kinds {', '.join(SPEC_KINDS)}"
            )
    labels = [(spec.kind, spec.name) for spec in specs]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        kind, name = twice[0]
        raise PluginError(f"{HOOK}() returned two components of kind {kind} named {name!r}")
    return specs
