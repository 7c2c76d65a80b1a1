"""The one hook a plugin implements, and the marker it implements it with."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from octavo.plugins.specs import Spec

PROJECT = "octavo"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Hooks:
    """Historic, so that registering a plugin runs its hook alone: one plugin's fault never reaches another."""

    @hookspec(historic=True)
    def octavo_components(self) -> Iterable[Spec]:  # type: ignore[empty-body]
        """Return the specs of everything this plugin brings. Cheap and pure: no torch, no numpy, no I/O."""
