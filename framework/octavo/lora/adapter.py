"""What is known of an adapter: what loading found, and how it stands in a running engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AdapterState = Literal["loading", "cold", "host", "placed"]
"""Being read; known, but to be read again when a request wants it; in the host's memory; at a device position too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterInfo:
    """What loading found in an adapter's files.

    Attributes:
        content_hash: hexadecimal blake2b-256 of all that its outputs depend on: equal files have equal hashes, in any
            folder and under any name. Keys the prefix cache.
        rank: the largest of its modules'.
        num_bytes: that it takes of the host's memory.
        modules: of the base that it changes, by name, sorted.
        warnings: sentences on what its files say and loading passed over.
    """

    content_hash: str
    rank: int
    num_bytes: int
    modules: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterStatus:
    """How an adapter stands in the engine.

    Attributes:
        info: None until it has been loaded once.
        position: of the device, while it is placed.
        num_requests: unfinished ones that use it.
        num_hits: requests that have asked for it since it was loaded under this name.
        pinned: whether it keeps its place.
    """

    name: str
    path: str
    state: AdapterState
    info: AdapterInfo | None
    position: int | None
    num_requests: int
    num_hits: int
    pinned: bool


@dataclass(kw_only=True, slots=True, eq=False)
class Adapter:
    """One version of an adapter in the engine: what requests are bound to."""

    name: str
    path: str
    adapter_id: int
    info: AdapterInfo | None = None
    position: int | None = None
