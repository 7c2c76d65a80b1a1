"""The registry: the components of every plugin that loaded, by kind; how one is chosen, and why the others were not.

plugins -> [registry] -> ChosenComponent -> manifest. Importing this module imports neither pydantic nor torch.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, NoReturn

from octavo.errors import OctavoError, PluginError, UnavailableComponentError, UnknownNameError
from octavo.plugins.host import Plugin, PluginRules, PluginState, discover
from octavo.plugins.known_packages import KNOWN_PACKAGES, packages_to_install
from octavo.plugins.options import checked_options
from octavo.plugins.specs import SPEC_KINDS, Need, Spec

if TYPE_CHECKING:
    from octavo.config import PluginsConfig
    from octavo.interfaces.manifest import ChosenComponent

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One component and, once a need was stated, why it was refused.

    Attributes:
        reasons: sentences; empty when it can serve (or was not asked).
        chosen: whether the selection took it.
    """

    plugin: Plugin
    spec: Spec
    reasons: tuple[str, ...] = ()
    chosen: bool = False

    @property
    def full_name(self) -> str:
        return f"{self.plugin.name}/{self.spec.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What came of choosing one component: every candidate with its reasons, and the component or the error."""

    kind: str
    candidates: tuple[Candidate, ...]
    component: ChosenComponent | None = None
    error: OctavoError | None = None

    def get(self) -> ChosenComponent:
        """The component; raises the error that says why there is none."""
        if self.error is not None:
            raise self.error
        assert self.component is not None
        return self.component


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """What came of choosing any number of one kind; as Choice."""

    kind: str
    candidates: tuple[Candidate, ...]
    components: tuple[ChosenComponent, ...] = ()
    error: OctavoError | None = None

    def get(self) -> tuple[ChosenComponent, ...]:
        """The components; raises the error that says why one that was named cannot be had."""
        if self.error is not None:
            raise self.error
        return self.components


class Registry:
    """Holds what is installed; reads nothing and imports nothing until a component is loaded."""

    def __init__(self, plugins: Iterable[Plugin]) -> None:
        self.plugins = tuple(plugins)
        self._candidates: dict[str, list[Candidate]] = {kind: [] for kind in SPEC_KINDS}
        for plugin in self.plugins:
            for spec in plugin.specs:
                self._candidates[spec.kind].append(Candidate(plugin=plugin, spec=spec))
        for candidates in self._candidates.values():
            candidates.sort(
                key=lambda candidate: (-candidate.spec.priority, candidate.spec.name, candidate.plugin.name)
            )

    @property
    def failed_plugins(self) -> list[Plugin]:
        """Those that are not OK, disabled ones included."""
        return [plugin for plugin in self.plugins if plugin.state is not PluginState.OK]

    def candidates(self, kind: str) -> list[Candidate]:
        """Every component of a kind, in the order `auto` asks them."""
        return list(self._candidates[kind])

    def short_name(self, candidate: Candidate) -> str:
        """The shortest name that finds it: "name", or "plugin/name" where two plugins bring that name."""
        same = [other for other in self._candidates[candidate.spec.kind] if other.spec.name == candidate.spec.name]
        return candidate.spec.name if len(same) == 1 else candidate.full_name

    def find(self, kind: str, name: str) -> Candidate:
        """The component a user's "name" or "plugin/name" means.

        Raises:
            UnknownNameError: nothing installed is called so, or two are.
            UnavailableComponentError: the plugin that would bring it did not load; its error is chained.
        """
        found = [one for one in self._candidates[kind] if name in (one.spec.name, one.full_name)]
        if not found:
            self._raise_not_found(kind, name)
        if len(found) > 1:
            names = [one.full_name for one in found]
            raise UnknownNameError(
                f"{len(found)} plugins bring {SPEC_KINDS[kind].noun} {name!r}. Write {' or '.join(names)}."
            )
        return found[0]

    def ask(self, kind: str, need: Need) -> list[Candidate]:
        """Every candidate with its reasons against `need`, in the order `auto` prefers them."""
        return [replace(one, reasons=tuple(one.spec.why_not(need))) for one in self._candidates[kind]]

    def choose(self, kind: str, need: Need, name: str = "auto", options: Mapping[str, object] | None = None) -> Choice:
        """Ask every candidate and take one, or keep the error that says why none.

        Args:
            name: "auto" takes the first that can, by priority and name; "name" or "plugin/name" that one or none.
            options: the component's own settings, checked by the model its spec names.
        """
        asked = self.ask(kind, need)
        try:
            taken = self._best(kind, asked, need) if name == "auto" else self._named(kind, asked, name)
            component = self.component(taken, options or {})
        except OctavoError as error:
            return Choice(kind=kind, candidates=tuple(asked), error=error)
        marked = tuple(replace(one, chosen=one is taken) for one in asked)
        return Choice(kind=kind, candidates=marked, component=component)

    def choose_several(
        self,
        kind: str,
        need: Need,
        is_default: Callable[[Spec], bool],
        wishes: Sequence[tuple[str, Mapping[str, object]]],
    ) -> Choices:
        """Ask every candidate and take those that serve by default, then those named; or keep the first error.

        Args:
            wishes: names with options, in the order they are to be taken; one taken by default may be named too.
        """
        asked = self.ask(kind, need)
        try:
            named = [(self._named(kind, asked, name), options) for name, options in wishes]
            defaults: list[tuple[Candidate, Mapping[str, object]]] = [
                (one, {}) for one in asked if is_default(one.spec) and not one.reasons
            ]
            taken = [pair for pair in defaults if not any(pair[0] is one for one, _ in named)] + named
            components = tuple(self.component(one, options) for one, options in taken)
        except OctavoError as error:
            return Choices(kind=kind, candidates=tuple(asked), error=error)
        marked = tuple(replace(one, chosen=any(one is other for other, _ in taken)) for one in asked)
        return Choices(kind=kind, candidates=marked, components=components)

    def select(
        self, kind: str, need: Need, name: str = "auto", options: Mapping[str, object] | None = None
    ) -> ChosenComponent:
        """As `choose`, but raises.

        Raises:
            UnknownNameError: nothing installed has that name, or two have.
            UnavailableComponentError: the named one, or every one, has reasons against `need`; the message quotes them.
            ConfigError: the component does not take these options.
        """
        return self.choose(kind, need, name, options).get()

    def component(self, candidate: Candidate, options: Mapping[str, object]) -> ChosenComponent:
        """A candidate as what a manifest holds: plain data, its options checked and its defaults filled in.

        Raises:
            ConfigError: it does not take these options.
        """
        from octavo.interfaces.manifest import ChosenComponent  # here, because it imports pydantic

        spec, plugin = candidate.spec, candidate.plugin
        return ChosenComponent(
            kind=spec.kind,
            plugin=plugin.name,
            name=spec.name,
            target=spec.target,
            distribution=plugin.distribution,
            version=plugin.version,
            options_model=spec.options,
            options=checked_options(spec, options),
        )

    def _named(self, kind: str, asked: list[Candidate], name: str) -> Candidate:
        full_name = self.find(kind, name).full_name
        candidate = next(one for one in asked if one.full_name == full_name)
        if candidate.reasons:
            raise UnavailableComponentError(
                f"{candidate.spec.noun} {name!r} cannot be used: {'; '.join(candidate.reasons)}. "
                'Choose another, or "auto" for the best that can.'
            )
        return candidate

    def _best(self, kind: str, asked: list[Candidate], need: Need) -> Candidate:
        for candidate in asked:
            if not candidate.reasons:
                return candidate
        lines = [f"\n  {one.full_name}: {'; '.join(one.reasons)}" for one in asked]
        advice = self._package_to_install(kind, need) or need.advice(one.spec for one in asked)
        failed = self.failed_plugins
        raise UnavailableComponentError(
            f"No installed {SPEC_KINDS[kind].noun} can serve this.{''.join(lines)}"
            + (f"\n{advice}" if advice else "")
            + "".join(f"\nPlugin {plugin.name!r} did not load, {plugin.fault}" for plugin in failed)
        ) from next((plugin.error for plugin in failed if len(failed) == 1), None)

    def _raise_not_found(self, kind: str, name: str) -> NoReturn:
        noun = SPEC_KINDS[kind].noun
        for plugin in self.failed_plugins:
            if _would_likely_bring(plugin, kind, name):
                raise UnavailableComponentError(
                    f"{noun} {name!r} cannot be used: plugin {plugin.name!r}, which would likely bring it, "
                    f"did not load, {plugin.fault}"
                ) from plugin.error
        known = sorted({self.short_name(one) for one in self._candidates[kind]})
        near = get_close_matches(name, {*known, *(one.full_name for one in self._candidates[kind])}, n=1)
        hint = self._package_to_install(kind, name) or (f"Did you mean {near[0]!r}?" if near else "")
        raise UnknownNameError(
            f"No {noun} named {name!r}. Installed: {', '.join(known) or 'none'}. "
            + (f"{hint} " if hint else "")
            + "`octavo plugins` lists every plugin and why one failed to load."
        )

    def _package_to_install(self, kind: str, wanted: str | Need) -> str:
        return packages_to_install(kind, wanted, (plugin.distribution for plugin in self.plugins))


def default_registry(rules: PluginRules | PluginsConfig | None = None) -> Registry:
    """The registry of this environment, with one warning for each plugin that failed to load.

    Args:
        rules: which plugins may load; without them the environment says so.

    Raises:
        PluginError: in strict mode, one that names every plugin that failed.
    """
    if rules is None:
        rules = PluginRules.from_environ(os.environ)
    given = PluginRules(allow=rules.allow, deny=rules.deny, strict=rules.strict)
    registry = Registry(discover(given))
    faulty = [plugin for plugin in registry.plugins if plugin.faulty]
    if given.strict and faulty:
        lines = [f"\n  {plugin.name} {plugin.fault}" for plugin in faulty]
        raise PluginError(
            f"Plugins are strict (OCTAVO_STRICT_PLUGINS, plugins.strict), and these did not load:{''.join(lines)}\n"
            "Repair or uninstall them, or name them in the deny-list (OCTAVO_DISABLE_PLUGINS, plugins.deny)."
        ) from next((plugin.error for plugin in faulty if plugin.error), None)
    for plugin in faulty:
        logger.warning("Plugin %s did not load, %s", plugin.name, plugin.fault)
    return registry


def _would_likely_bring(plugin: Plugin, kind: str, name: str) -> bool:
    """Whether a plugin whose specs are unknown is known to bring it, or sounds so: 'gptq' names 'quant-gptq'."""
    return (
        any(
            known.distribution == plugin.distribution and known.kind == kind and known.brings(name)
            for known in KNOWN_PACKAGES
        )
        or name.partition("/")[0] in (plugin.name, plugin.distribution)
        or name in re.split(r"[-_.]", plugin.name)
    )
