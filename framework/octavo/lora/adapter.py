"""What is known of an adapter: what loading found, and how it stands in a running engine. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

AdapterState = Literal["loading", "cold", "host", "placed"]
"""Being read, or soon to be; known, but to be read again when a request wants it; in the host's memory; at a device
position too."""


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
    modules: tuple[str, ...] = field(repr=False)
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


@dataclass(eq=False, kw_only=True, slots=True)
class Adapter:
    """One version of an adapter in the engine: what a request is bound to. Loading other files under its name makes
    another version. Scheduler policies may read it; `AdapterStore` changes it.

    Attributes:
        adapter_id: the executor's; unique, also among versions of one name.
        info: None until it has been loaded once; after an eviction it is that of the last time.
        position: of the device, while it is placed.
        num_requests: unfinished ones bound to it.
        num_started: those of them that have computed something; it stays in memory until they have ended.
        num_running: those of them with a place in the batch; it stays at its position while there are any.
        num_hits: requests that asked for it.
        last_used: grows with each load and each start of a request, over all versions.
        awaited: no request has started since it was loaded.
        pinned: whether it keeps its place.
        retired: no new request is bound to it: it was unloaded, replaced, or could not be loaded.
    """

    name: str
    path: str
    adapter_id: int
    info: AdapterInfo | None = None
    state: AdapterState = "loading"
    position: int | None = None
    num_requests: int = 0
    num_started: int = 0
    num_running: int = 0
    num_hits: int = 0
    last_used: int = 0
    awaited: bool = True
    pinned: bool = False
    retired: bool = False

    @property
    def in_memory(self) -> bool:
        """Whether its weights are in the host's memory."""
        return self.state in ("host", "placed")

    @property
    def status(self) -> AdapterStatus:
        return AdapterStatus(
            name=self.name,
            path=self.path,
            state=self.state,
            info=self.info,
            position=self.position,
            num_requests=self.num_requests,
            num_hits=self.num_hits,
            pinned=self.pinned,
        )
