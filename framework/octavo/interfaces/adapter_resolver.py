"""AdapterResolver socket: where the LoRA adapter of a name lies that the engine does not know yet."""

from __future__ import annotations

from abc import ABC, abstractmethod


class AdapterResolver(ABC):
    """Asked when a request names an unknown adapter. Constructed once, with `options=` when its spec names a model."""

    @abstractmethod
    def resolve(self, base_model: str, name: str) -> str | None:
        """The folder of the adapter `name`, on this machine; None: it knows of none.

        Called off the step's path, possibly in several threads. `name` comes from whoever sends requests: it is never
        a path, and a resolver must not let it lead out of what it serves.

        Args:
            base_model: the setting `model`.

        Raises:
            AdapterError: there is one, but it cannot be had; says why.
        """
