"""Where the LoRA adapter of a name lies that the engine does not know yet: the configured resolvers, in their order."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from octavo.errors import AdapterError
from octavo.interfaces.adapter_resolver import AdapterResolver
from octavo.interfaces.manifest import Manifest

logger = logging.getLogger(__name__)


class AdapterFinder:
    """Asks each resolver until one knows the name. Any thread may ask; it may take as long as a download."""

    def __init__(self, resolvers: Sequence[tuple[str, AdapterResolver]], base_model: str) -> None:
        """`resolvers` with their full names, "plugin/name"; of one name there may be several, differently set."""
        self._resolvers = resolvers
        self._base_model = base_model

    @classmethod
    def of(cls, manifest: Manifest) -> AdapterFinder:
        """With the resolvers that were chosen."""
        resolvers = [(chosen.full_name, chosen.build()) for chosen in manifest.adapter_resolvers]
        return cls(resolvers, manifest.config.model)

    def find(self, name: str) -> str:
        """The folder of the adapter.

        Raises:
            AdapterError: nobody knows it, or it cannot be had.
        """
        for full_name, resolver in self._resolvers:
            try:
                path = resolver.resolve(self._base_model, name)
            except AdapterError:
                raise
            except Exception as error:  # a resolver may be anybody's, and ask anything over a network
                logger.exception("Adapter resolver %s failed to look for %r", full_name, name)
                raise AdapterError(
                    f"The adapter {name!r} could not be looked for: {full_name} raised {type(error).__name__}."
                ) from error
            if path is not None:
                return path
        hint = (
            f"{', '.join(full_name for full_name, _ in self._resolvers)} found none of that name."
            if self._resolvers
            else "Load it first: llm.load_adapter(name, path); or set lora_root to a folder of adapters."
        )
        raise AdapterError(f"There is no adapter {name!r}. {hint}")
