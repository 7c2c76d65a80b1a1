"""The one hook a plugin implements, and the marker it implements it with."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from octavo.plugins.specs import Spec

PROJECT = "octavo"
"""Name of the pluggy project and of the entry-point group."""

PLUGIN_API = (1, 0)
"""The plugin API this core publishes. A plugin states the one it was built for: `OCTAVO_API = "1.0"`.

The same major and a minor not newer loads. The minor grows with an added field, feature or optional argument,
the major with anything else.
"""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Hooks:
    """Historic, so that registering a plugin runs its hook alone: one plugin's fault never reaches another."""

    @hookspec(historic=True)
    def octavo_components(self) -> Iterable[Spec]:  # type: ignore[empty-body]
        """Return the specs of everything this plugin brings. Cheap and pure: no torch, no numpy, no I/O."""
