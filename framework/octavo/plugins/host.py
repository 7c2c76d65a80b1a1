"""The plugin host: finds plugins, loads each behind a guard of its own and remembers what became of it.

The first thing at start-up: entry points -> [host] -> plugins, each with a state -> registry. Never asked again.
"""

from __future__ import annotations

import ast
import enum
import importlib.util
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pluggy

from octavo import __version__
from octavo.errors import PluginError
from octavo.plugins.hookspecs import PLUGIN_API, PROJECT, Hooks
from octavo.plugins.specs import SPEC_KINDS, Spec


class PluginState(enum.StrEnum):
    """What became of a plugin. Only the components of an `OK` one can be chosen."""

    OK = "ok"
    DISABLED = "disabled"  # by the allow-list or the deny-list; never imported
    INCOMPATIBLE = "incompatible"  # built for another plugin API than this core publishes
    BROKEN = "broken"  # its import or its hook failed, or returned something else than specs
    CONFLICT = "conflict"  # another distribution's plugin has the same name; never imported


@dataclass(frozen=True, kw_only=True, slots=True)
class Plugin:
    """One installed plugin.

    Attributes:
        name: of its entry point; the first half of "plugin/component".
        module: what the entry point names.
        distribution, version: of the package that brings it.
        specs: its components; empty unless the state is OK.
        reason: why it is not OK, in a sentence.
        location: "file:line" of the plugin's own line that failed.
        error: what was raised, kept as the cause of later errors.
    """

    name: str
    module: str
    distribution: str
    version: str
    state: PluginState = PluginState.OK
    specs: tuple[Spec, ...] = ()
    reason: str = ""
    location: str = ""
    error: BaseException | None = None

    @property
    def fault(self) -> str:
        """State, reason and place in one line; "ok" when nothing is wrong."""
        place = f" ({self.location})" if self.location else ""
        return f"{self.state}: {self.reason}{place}" if self.reason else str(self.state)


BUILTIN = Plugin(name="builtin", module="octavo.builtin", distribution="octavo", version=__version__)


def discover(environ: Mapping[str, str] = os.environ) -> tuple[Plugin, ...]:
    """Load the built-ins and every installed plugin.

    Args:
        environ: OCTAVO_PLUGINS lists the plugins that may load, separated by commas ("" is the built-ins alone);
            OCTAVO_DISABLE_PLUGINS lists glob patterns of those that may not. Neither touches the built-ins.
    """
    host = PluginHost()
    host.load(BUILTIN)
    for found in find_installed():
        host.load(found, disabled=_why_disabled(found.name, environ))
    return (*host.plugins, *_allowed_but_missing(environ, {plugin.name for plugin in host.plugins}))


def find_installed() -> list[Plugin]:
    """Every entry point of group "octavo", not yet imported, ordered by name and distribution."""
    found = []
    for entry in entry_points(group=PROJECT):
        try:
            distribution, version = entry.dist.name, entry.dist.version  # type: ignore[union-attr]
        except Exception:  # METADATA is missing or unreadable; the plugin itself may be sound
            distribution, version = None, None
        found.append(
            Plugin(
                name=entry.name,
                module=entry.value,
                distribution=distribution or "unknown",
                version=version or "unknown",
            )
        )
    return sorted(found, key=lambda plugin: (plugin.name, plugin.distribution))


class PluginHost:
    """Loads plugins one at a time; `plugins` holds every one of them with its state, in the order loaded."""

    def __init__(self) -> None:
        self.plugins: list[Plugin] = []
        self._returned: list[object] = []
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(Hooks)
        # Historic: from here on, registering a plugin calls its hook, its hook alone, and hands the result over.
        self._manager.hook.octavo_components.call_historic(result_callback=self._returned.append)

    def load(self, found: Plugin, disabled: str = "") -> Plugin:
        """Import a plugin and run its hook, unless `disabled` gives a reason. Nothing it raises gets out."""
        self.plugins.append(self._load(found, disabled))
        return self.plugins[-1]

    def _load(self, found: Plugin, disabled: str) -> Plugin:
        if disabled:
            return replace(found, state=PluginState.DISABLED, reason=disabled)
        if first := next((plugin for plugin in self.plugins if plugin.name == found.name), None):
            reason = f"{first.distribution} {first.version} already brings a plugin of this name; uninstall one of them"
            return replace(found, state=PluginState.CONFLICT, reason=reason)
        module: object = None
        try:
            module = EntryPoint(found.name, found.module, PROJECT).load()
            if reason := _why_incompatible(getattr(module, "OCTAVO_API", None)):
                return replace(found, state=PluginState.INCOMPATIBLE, reason=reason)
            return replace(found, specs=self._components(found.name, module))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit() and panics of native modules are no Exceptions, and no less guarded
            return _failed(found, module, error)

    def _components(self, name: str, module: object) -> tuple[Spec, ...]:
        """Register the module, which runs its hook, and check what came back before anything of it counts."""
        if other := self._manager.get_name(module):
            raise PluginError(f"its module is already loaded as plugin {other!r}; a module is one plugin")
        self._returned.clear()
        try:
            self._manager.register(module, name)
            return _checked_specs(module, self._returned)
        except BaseException:
            if self._manager.has_plugin(name):  # pluggy keeps a plugin whose hook raised
                self._manager.unregister(name=name)
            raise


def _checked_specs(module: object, returned: list[object]) -> tuple[Spec, ...]:
    hook = getattr(module, "octavo_components", None)
    if not returned:
        if hook is None:
            raise PluginError("it defines no octavo_components(); that hook returns the specs of what it brings")
        if not hasattr(hook, f"{PROJECT}_impl"):
            raise PluginError("octavo_components() is not marked: write @octavo.hookimpl above it")
        raise PluginError("octavo_components() returned None, not a list of specs")
    try:
        specs: tuple[Spec, ...] = tuple(returned[0])  # type: ignore[arg-type]
    except TypeError as error:
        raise PluginError(f"octavo_components() returned {returned[0]!r}, not a list of specs") from error
    kinds = tuple(SPEC_KINDS.values())
    if strangers := [spec for spec in specs if not isinstance(spec, kinds)]:
        names = ", ".join(kind.__name__ for kind in kinds)
        raise PluginError(f"octavo_components() returned {strangers[0]!r}, which is none of {names}")
    labels = [(spec.kind, spec.name) for spec in specs]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        kind, name = twice[0]
        raise PluginError(f"octavo_components() returned two components of kind {kind} named {name!r}")
    return specs


def _why_incompatible(api: object) -> str:
    """Empty when this core can load a plugin built for `api`."""
    publishes = "{}.{}".format(*PLUGIN_API)
    if api is None:
        raise PluginError(
            f'it states no OCTAVO_API; write OCTAVO_API = "{publishes}", the plugin API it was built for, in its module'
        )
    if not isinstance(api, str) or not re.fullmatch(r"\d+\.\d+", api):
        raise PluginError(f'OCTAVO_API is {api!r}; write "major.minor" as a string, here "{publishes}"')
    major, minor = map(int, api.split("."))
    if major == PLUGIN_API[0] and minor <= PLUGIN_API[1]:
        return ""
    newer = (major, minor) > PLUGIN_API
    return (
        f"it was built for plugin API {api}; octavo {__version__} publishes {publishes}. "
        f"Install {'a newer octavo or an older' if newer else 'a newer'} version of the plugin"
    )


def _failed(found: Plugin, module: object, error: BaseException) -> Plugin:
    reason = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
    location = _failing_line(found.module, error) or _hook_line(module)
    state = PluginState.BROKEN
    # A plugin built for a newer API fails at importing a name this core lacks; the true reason is the version.
    if module is None and (incompatible := _why_source_incompatible(found.module)):
        state, reason = PluginState.INCOMPATIBLE, f"{incompatible}; its import failed with {reason}"
    return replace(found, state=state, reason=reason, location=location, error=error)


def _failing_line(module: str, error: BaseException) -> str:
    """The innermost line of the traceback that lies in the plugin's own package."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    try:
        spec = importlib.util.find_spec(re.split(r"[.:]", module)[0])
    except ValueError:
        spec = None
    if spec is None:
        return ""
    folders = tuple(os.path.join(folder, "") for folder in spec.submodule_search_locations or ())
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == __file__:
            return ""
        if frame.filename == spec.origin or frame.filename.startswith(folders):
            return f"{frame.filename}:{frame.lineno}"
    return ""


def _hook_line(module: object) -> str:
    """Where the hook is defined, or else the module's first line."""
    code = getattr(getattr(module, "octavo_components", None), "__code__", None)
    if code is not None:
        return f"{code.co_filename}:{code.co_firstlineno}"
    file = getattr(module, "__file__", None)
    return f"{file}:1" if file else ""


def _why_source_incompatible(module: str) -> str:
    """Read OCTAVO_API from the source of a module that does not import."""
    try:
        spec = importlib.util.find_spec(module.partition(":")[0])
        tree = ast.parse(Path(spec.origin).read_bytes())  # type: ignore[union-attr, arg-type]
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OCTAVO_API":
                return _why_incompatible(ast.literal_eval(node.value))
    except Exception:  # nothing to read, or nothing readable: the import error stands as the reason
        return ""
    return ""


def _why_disabled(name: str, environ: Mapping[str, str]) -> str:
    allowed = environ.get("OCTAVO_PLUGINS")
    if allowed is not None and name not in _words(allowed):
        return f"OCTAVO_PLUGINS={allowed} does not list it"
    for pattern in _words(environ.get("OCTAVO_DISABLE_PLUGINS", "")):
        if fnmatchcase(name, pattern):
            return f"OCTAVO_DISABLE_PLUGINS lists {pattern}"
    return ""


def _allowed_but_missing(environ: Mapping[str, str], installed: set[str]) -> Iterator[Plugin]:
    """A name in the allow-list that nothing brings is a fault to be seen, like a plugin that does not load."""
    for name in _words(environ.get("OCTAVO_PLUGINS", "")):
        if name not in installed:
            near = get_close_matches(name, installed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            reason = f"OCTAVO_PLUGINS lists it, but no installed distribution brings it{hint}"
            yield Plugin(name=name, module="", distribution="", version="", state=PluginState.BROKEN, reason=reason)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
