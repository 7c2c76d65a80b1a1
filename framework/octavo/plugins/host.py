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
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pluggy

from octavo import __version__
from octavo.errors import ConfigError, PluginError
from octavo.plugins import hookspecs
from octavo.plugins.hookspecs import (
    HOOK,
    PROJECT,
    Hooks,
    api_fault,
    check_hook,
    checked_specs,
    misspelt_hooks,
    why_incompatible,
)
from octavo.plugins.known_packages import package_of_plugin
from octavo.plugins.specs import Spec


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
        location: "file:line" of the plugin's own line that failed; of its first line when it was not imported.
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
    def faulty(self) -> bool:
        """Whether it should have loaded and did not."""
        return self.state not in (PluginState.OK, PluginState.DISABLED)

    @property
    def fault(self) -> str:
        """State, reason and place in one line; "ok" when nothing is wrong."""
        place = f" ({self.location})" if self.location else ""
        return f"{self.state}: {self.reason}{place}" if self.reason else str(self.state)


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginRules:
    """Which plugins may load. The built-ins always do.

    Attributes:
        allow: names of those that may; None is all, () the built-ins alone.
        deny: glob patterns of those that may not; they are not even imported.
        strict: refuse to start when a plugin that may load does not.
    """

    allow: tuple[str, ...] | None = None
    deny: tuple[str, ...] = ()
    strict: bool = False

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> PluginRules:
        """Read OCTAVO_PLUGINS and OCTAVO_DISABLE_PLUGINS, separated by commas, and OCTAVO_STRICT_PLUGINS, 0 or 1.

        Raises:
            ConfigError: OCTAVO_STRICT_PLUGINS is neither.
        """
        strict = environ.get("OCTAVO_STRICT_PLUGINS", "0")
        if strict.lower() not in _TRUTH:
            raise ConfigError(f"OCTAVO_STRICT_PLUGINS={strict} is neither on nor off. Write 1 or 0.")
        allow = environ.get("OCTAVO_PLUGINS")
        return cls(
            allow=None if allow is None else _words(allow),
            deny=_words(environ.get("OCTAVO_DISABLE_PLUGINS", "")),
            strict=_TRUTH[strict.lower()],
        )

    def why_disabled(self, name: str) -> str:
        """Empty when a plugin of this name may load."""
        if self.allow is not None and name not in self.allow:
            return "the allow-list (OCTAVO_PLUGINS, plugins.allow) does not name it"
        if pattern := next((pattern for pattern in self.deny if fnmatchcase(name, pattern)), ""):
            return f"the deny-list (OCTAVO_DISABLE_PLUGINS, plugins.deny) names {pattern}"
        return ""


BUILTIN = Plugin(name="builtin", module="octavo.builtin", distribution="octavo", version=__version__)


def discover(rules: PluginRules | None = None) -> tuple[Plugin, ...]:
    """Load the built-ins and every installed plugin that may load; None takes the rules from the environment.

    Raises:
        ConfigError: the environment's rules cannot be read. No plugin's fault raises.
    """
    rules = PluginRules.from_environ(os.environ) if rules is None else rules
    host = PluginHost()
    host.load(BUILTIN)
    for found in find_installed():
        host.load(found, disabled=rules.why_disabled(found.name))
    return (*host.plugins, *_allowed_but_missing(rules, {plugin.name for plugin in host.plugins}))


def find_installed() -> list[Plugin]:
    """Every entry point of group "octavo", not yet imported, ordered by name and distribution."""
    found = []
    for entry in entry_points(group=PROJECT):
        try:
            metadata = entry.dist.metadata  # type: ignore[union-attr] # read once: each `dist.name` reads it anew
            distribution, version = metadata["Name"], metadata["Version"]
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
            return _refused(found, PluginState.DISABLED, disabled, _source_line(found.module))
        if first := next((plugin for plugin in self.plugins if plugin.name == found.name), None):
            reason = f"{first.distribution} {first.version} already brings a plugin of this name; uninstall one of them"
            return _refused(found, PluginState.CONFLICT, reason, _source_line(found.module))
        module: object = None
        try:
            module = EntryPoint(found.name, found.module, PROJECT).load()
            api = getattr(module, "OCTAVO_API", None)
            if fault := api_fault(api):
                broken = _refused(found, PluginState.BROKEN, fault, _source_api(found.module)[1])
                return replace(broken, error=PluginError(fault))
            if reason := why_incompatible(str(api)):
                return _refused(found, PluginState.INCOMPATIBLE, reason, _source_api(found.module)[1])
            return replace(found, specs=self._components(found.name, module))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit() and panics of native modules are no Exceptions, and no less guarded
            return _failed(found, module, error)

    def _components(self, name: str, module: object) -> tuple[Spec, ...]:
        """Register the module, which runs its hook, and check what came back before anything of it counts."""
        if other := self._manager.get_name(module):
            raise PluginError(f"its module is already loaded as plugin {other!r}; a module is one plugin")
        check_hook(module)
        self._returned.clear()
        try:
            self._manager.register(module, name)
            # pluggy hands on nothing for None
            return checked_specs(self._returned[0] if self._returned else None)
        except BaseException as error:
            if self._manager.has_plugin(name):  # pluggy keeps a plugin whose hook raised
                self._manager.unregister(name=name)
            if isinstance(error, pluggy.PluginValidationError):
                raise PluginError(f"{HOOK}() must be a plain function: {str(error).splitlines()[-1]}") from error
            raise


def _refused(found: Plugin, state: PluginState, reason: str, location: str) -> Plugin:
    return replace(found, state=state, reason=reason, location=location)


def _failed(found: Plugin, module: object, error: BaseException) -> Plugin:
    reason = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
    reason = _missing_module(found, error) or reason
    location = _failing_line(found.module, error) or _hook_line(module)
    if module is None:
        # A plugin built for a newer API fails at importing a name this core lacks; the true reason is the version.
        api, line = _source_api(found.module)
        if not api_fault(api) and (incompatible := why_incompatible(str(api))):
            reason = f"{incompatible}; its import failed with {reason}"
            return replace(found, state=PluginState.INCOMPATIBLE, reason=reason, location=line, error=error)
    return replace(found, state=PluginState.BROKEN, reason=reason, location=location, error=error)


def _missing_module(found: Plugin, error: BaseException) -> str:
    """Tell a plugin whose own module is missing from one that needs a package which is not installed."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return ""
    own = found.module.partition(":")[0]
    if f"{own}.".startswith(f"{error.name}."):
        return (
            f"its entry point names the module {own!r}, but {error.name!r} is not there; "
            f"install it again: `pip install --force-reinstall {found.distribution}`"
        )
    package = error.name.partition(".")[0]
    if package in (own.partition(".")[0], PROJECT):
        return ""
    return (
        f"ModuleNotFoundError: {error}; install the package that holds {package!r} "
        f"(`pip install {found.distribution}` brings what the plugin declares)"
    )


# ------------------------------------------------------------------------------------------------- file:line


def _failing_line(module: str, error: BaseException) -> str:
    """The innermost line of the traceback that lies in the plugin's own package."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    spec = _find_package(module)
    if spec is None:
        return ""
    folders = tuple(os.path.join(folder, "") for folder in spec.submodule_search_locations or ())
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in (__file__, hookspecs.__file__):
            return ""
        if frame.filename == spec.origin or frame.filename.startswith(folders):
            return f"{frame.filename}:{frame.lineno}"
    return ""


def _hook_line(module: object) -> str:
    """Where a misspelt hook is defined, else the hook, else the module's first line."""
    for name in (*misspelt_hooks(module), HOOK):
        code = getattr(getattr(module, name, None), "__code__", None)
        if code is not None:
            return f"{code.co_filename}:{code.co_firstlineno}"
    file = getattr(module, "__file__", None)
    return f"{file}:1" if file else ""


def _source_line(module: str) -> str:
    """The first line of a module that is not imported."""
    file = _source_file(module)
    return f"{file}:1" if file else ""


def _source_api(module: str) -> tuple[object, str]:
    """OCTAVO_API as the module's source states it, and where; (None, its first line) when it does not."""
    try:
        tree = ast.parse(Path(_source_file(module)).read_bytes())
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OCTAVO_API":
                return ast.literal_eval(node.value), f"{_source_file(module)}:{node.lineno}"
    except (OSError, SyntaxError, ValueError):  # nothing to read, or nothing that can be read without running it
        return None, _source_line(module)
    return None, _source_line(module)


def _source_file(module: str) -> str:
    """The file of a module, found without importing it or its parents; empty when there is none."""
    package, *inner = module.partition(":")[0].split(".")
    spec = _find_package(package)
    if spec is None or not inner:
        return (spec and spec.origin) or ""
    path = Path(next(iter(spec.submodule_search_locations or ()), ""), *inner)
    return next((str(file) for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), "")


def _find_package(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(re.split(r"[.:]", module)[0])
    except ValueError:  # in sys.modules without a spec: it was put there by hand
        return None


# ---------------------------------------------------------------------------------------------------- rules


def _allowed_but_missing(rules: PluginRules, installed: set[str]) -> Iterator[Plugin]:
    """A name in the allow-list that nothing brings is a fault to be seen, like a plugin that does not load."""
    for name in rules.allow or ():
        if name not in installed:
            near = get_close_matches(name, installed, n=1)
            hint = package_of_plugin(name) or (f"Did you mean {near[0]!r}?" if near else "")
            reason = f"the allow-list names it, but no installed distribution brings it. {hint}".rstrip()
            yield Plugin(name=name, module="", distribution="", version="", state=PluginState.BROKEN, reason=reason)


_TRUTH = {"1": True, "true": True, "0": False, "false": False}


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
