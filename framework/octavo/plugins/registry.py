"""The registry: the components of every plugin that loaded, by kind; how one is chosen, and why the others were not.

plugins -> [registry] -> ChosenComponent -> manifest. Importing this module imports neither pydantic nor torch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

from octavo.errors import ConfigError, PluginError, UnavailableComponentError, UnknownNameError
from octavo.plugins.host import Plugin, PluginState, discover
from octavo.plugins.specs import SPEC_KINDS, Need, Spec, load_target

if TYPE_CHECKING:
    from collections.abc import Callable

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

    def explain(self, kind: str, need: Need, name: str = "auto") -> list[Candidate]:
        """Every candidate with its reasons against `need`, the one that `select` would take marked as chosen.

        Raises:
            UnknownNameError, UnavailableComponentError: as `find`, for a name that is not "auto".
        """
        named = None if name == "auto" else self.find(kind, name).full_name
        asked = [replace(one, reasons=tuple(one.spec.why_not(need))) for one in self._candidates[kind]]
        chosen = next((one for one in asked if not one.reasons and named in (None, one.full_name)), None)
        return [replace(one, chosen=one is chosen) for one in asked]

    def select(
        self, kind: str, need: Need, name: str = "auto", options: Mapping[str, object] | None = None
    ) -> ChosenComponent:
        """Choose the component of a kind that serves `need`.

        Args:
            name: "auto" takes the first that can, by priority and name; "name" or "plugin/name" that one or none.
            options: the component's own settings, checked by the model its spec names.

        Raises:
            UnknownNameError: nothing installed has that name, or two have.
            UnavailableComponentError: the named one, or every one, has reasons against `need`; the message quotes them.
            ConfigError: the component does not take these options.
        """
        candidate = (
            self._first_that_serves(kind, need) if name == "auto" else self._named_if_it_serves(kind, need, name)
        )
        return _chosen(candidate, _checked_options(candidate, options or {}))

    def load(self, chosen: ChosenComponent) -> Callable[..., Any]:
        """Import the class (or module, or function) a component's target names.

        Raises:
            PluginError: it cannot be imported; the cause is chained.
        """
        try:
            return load_target(chosen.target)
        except PluginError as error:
            raise PluginError(
                f"{SPEC_KINDS[chosen.kind].noun} {chosen.plugin}/{chosen.name} ({chosen.distribution} "
                f"{chosen.version}) cannot be loaded: {error}"
            ) from error

    def _named_if_it_serves(self, kind: str, need: Need, name: str) -> Candidate:
        candidate = self.find(kind, name)
        if reasons := candidate.spec.why_not(need):
            raise UnavailableComponentError(
                f"{candidate.spec.noun} {name!r} cannot be used: {'; '.join(reasons)}. "
                'Choose another, or "auto" for the best that can.'
            )
        return candidate

    def _first_that_serves(self, kind: str, need: Need) -> Candidate:
        lines = []
        for candidate in self._candidates[kind]:
            reasons = candidate.spec.why_not(need)
            if not reasons:
                return candidate
            lines.append(f"\n  {candidate.full_name}: {'; '.join(reasons)}")
        advice = need.advice(candidate.spec for candidate in self._candidates[kind])
        failed = self.failed_plugins
        raise UnavailableComponentError(
            f"No installed {SPEC_KINDS[kind].noun} can serve this.{''.join(lines)}"
            + (f"\n{advice}" if advice else "")
            + "".join(f"\nPlugin {plugin.name!r} did not load, {plugin.fault}" for plugin in failed)
        ) from next((plugin.error for plugin in failed if len(failed) == 1), None)

    def _raise_not_found(self, kind: str, name: str) -> NoReturn:
        noun = SPEC_KINDS[kind].noun
        for plugin in self.failed_plugins:
            if _would_likely_bring(plugin, name):
                raise UnavailableComponentError(
                    f"{noun} {name!r} cannot be used: plugin {plugin.name!r}, which would likely bring it, "
                    f"did not load, {plugin.fault}"
                ) from plugin.error
        known = sorted({self.short_name(one) for one in self._candidates[kind]})
        near = get_close_matches(name, {*known, *(one.full_name for one in self._candidates[kind])}, n=1)
        raise UnknownNameError(
            f"No {noun} named {name!r}. Installed: {', '.join(known) or 'none'}. "
            + (f"Did you mean {near[0]!r}? " if near else "")
            + "`octavo plugins` lists every plugin and why one failed to load."
        )


def default_registry() -> Registry:
    """The registry of this environment, with one warning for each plugin that failed to load."""
    registry = Registry(discover())
    for plugin in registry.failed_plugins:
        if plugin.state is not PluginState.DISABLED:  # that was on purpose
            logger.warning("Plugin %s did not load, %s", plugin.name, plugin.fault)
    return registry


def _would_likely_bring(plugin: Plugin, name: str) -> bool:
    """Whether a plugin whose specs are unknown sounds like the one: 'gptq' and 'quant-gptq/gptq' name 'quant-gptq'."""
    return name.partition("/")[0] in (plugin.name, plugin.distribution) or name in re.split(r"[-_.]", plugin.name)


def _checked_options(candidate: Candidate, options: Mapping[str, object]) -> Mapping[str, object]:
    """What the component's own options model makes of `options`, defaults filled in."""
    spec = candidate.spec
    if spec.options is None:
        if options:
            raise ConfigError(f"{spec.noun} {spec.name!r} takes no options, but {', '.join(options)} was given.")
        return {}
    from pydantic import ValidationError  # here, because listing components must not import it

    model = load_target(spec.options)
    known = list(model.model_fields)  # type: ignore[attr-defined]
    for key in options:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            raise ConfigError(
                f"{spec.noun} {spec.name!r} has no option {key!r}. It takes: {', '.join(known)}."
                + (f" Did you mean {near[0]!r}?" if near else "")
            )
    try:
        return dict(model(**options).model_dump())
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ConfigError(f"Options of {spec.noun} {spec.name!r}: {faults}") from error


def _chosen(candidate: Candidate, options: Mapping[str, object]) -> ChosenComponent:
    from octavo.interfaces.manifest import ChosenComponent  # here, because it imports pydantic

    return ChosenComponent(
        kind=candidate.spec.kind,
        plugin=candidate.plugin.name,
        name=candidate.spec.name,
        target=candidate.spec.target,
        distribution=candidate.plugin.distribution,
        version=candidate.plugin.version,
        options=options,
    )
