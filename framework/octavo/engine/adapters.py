"""AdapterStore: which LoRA adapters are known, in the host's memory and at device positions. No torch here.

Reading files is a thread's of its own; all else happens on the engine's thread, between two steps.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

from octavo.engine.adapter_loader import AdapterLoader
from octavo.errors import AdapterError, EngineDeadError
from octavo.interfaces.executor import AdapterPlacement
from octavo.lora.adapter import Adapter, AdapterInfo, AdapterStatus
from octavo.request import Request

_T = TypeVar("_T")


class FailedLoad(NamedTuple):
    """An adapter that could not be read, and why. Its requests wait in vain."""

    adapter: Adapter
    error: AdapterError


class AdapterStore:
    """Versions of adapters, by name: read when asked for, evicted from memory when others need the room.

    Memory: an adapter stays while it is pinned or a request of it has started and not ended; of the others the least
    recently used makes room, one that was just read for requests not before one of them has started. When nothing can
    be evicted, one adapter's further requests may not start until those that did have ended. So a load always comes
    to its turn, and each gives at least one request its start.

    Positions: a running request's adapter keeps its own; of the others' the least recently used is given away.

    Args:
        load, drop: the executor's `load_adapter` and `drop_adapter`.
        max_loras: device positions.
        max_cpu_loras: adapters in the host's memory, the one being read included; at least `max_loras`.

    Attributes:
        num_loads, num_evictions: of adapters into and from the host's memory, since the start.
    """

    def __init__(
        self,
        load: Callable[[int, str], AdapterInfo],
        drop: Callable[[int], None],
        *,
        max_loras: int,
        max_cpu_loras: int,
    ) -> None:
        assert 1 <= max_loras <= max_cpu_loras
        self.num_loads = 0
        self.num_evictions = 0
        self._drop = drop
        self._max_loras = max_loras
        self._max_cpu_loras = max_cpu_loras
        self._by_name: dict[str, Adapter] = {}  # what new requests are bound to
        self._versions: dict[int, Adapter] = {}  # those, and what is on its way in or out
        self._in_memory: dict[int, Adapter] = {}
        self._positions: list[Adapter | None] = [None] * max_loras
        self._wanted: deque[Adapter] = deque()  # to be read, in this order
        self._reading: Adapter | None = None
        self._leaving: Adapter | None = None  # its further requests wait until it could be evicted
        self._loads: dict[int, list[Future[AdapterInfo]]] = {}
        self._unloads: list[tuple[set[int], Future[None]]] = []
        self._ids = itertools.count()
        self._uses = itertools.count(1)
        self._loader = AdapterLoader(load)

    # ------------------------------------------------------------------------------------------------ numbers

    @property
    def is_loading(self) -> bool:
        """Whether an adapter is being read or is to be read."""
        return self._reading is not None or bool(self._wanted)

    @property
    def num_in_memory(self) -> int:
        """Adapters in the host's memory, the one being read included."""
        return len(self._in_memory) + (self._reading is not None)

    @property
    def num_placed(self) -> int:
        """Device positions that hold an adapter."""
        return sum(tenant is not None for tenant in self._positions)

    def statuses(self) -> list[AdapterStatus]:
        """Of the adapters that can be asked for, in the order they were first loaded."""
        return [adapter.status for adapter in self._by_name.values()]

    # ------------------------------------------------------------------------------------------------ by name

    def get(self, name: str) -> Adapter | None:
        """The version that new requests of a name are bound to; None when the name is not known."""
        return self._by_name.get(name)

    def request(self, name: str) -> Adapter:
        """As `get`.

        Raises:
            AdapterError: the name is not known.
        """
        adapter = self._by_name.get(name)
        if adapter is None:
            known = ", ".join(map(repr, self._by_name)) or "none"
            raise AdapterError(f"There is no adapter {name!r}. Loaded: {known}. Load it first, by name and path.")
        return adapter

    def versions(self, name: str) -> list[Adapter]:
        """All that are alive under a name: also the replaced whose requests run, and the one that is to replace."""
        return [adapter for adapter in self._versions.values() if adapter.name == name]

    def load(self, name: str, path: str, replace: bool = False) -> Future[AdapterInfo]:
        """Make an adapter known, and read it. Requests may be bound to it at once, and wait.

        Args:
            replace: read it as another version, which takes the name when it has been read; until then, and when it
                cannot be read, the name stays what it was.

        Returns:
            What is set when it is in memory, to what reading found, or AdapterError. It cannot be cancelled.

        Raises:
            AdapterError: name or path is no text, or the name is that of another path and is not to be replaced.
        """
        for field, value in (("name", name), ("path", path)):
            if not isinstance(value, str) or not value.strip():
                raise AdapterError(f"An adapter's {field} is a text that is not empty; found {value!r}.")
        adapter = self._by_name.get(name)
        if adapter is not None and not replace and adapter.path != path:
            raise other_path(adapter, path)
        future = _uncancellable(Future[AdapterInfo]())
        if adapter is None or replace:
            adapter = Adapter(name=name, path=path, adapter_id=next(self._ids))
            self._versions[adapter.adapter_id] = adapter
            self._by_name.setdefault(name, adapter)
            self._wanted.append(adapter)
        elif adapter.state == "cold":
            self._want(adapter)
        elif adapter.in_memory:
            assert adapter.info is not None
            future.set_result(adapter.info)
            return future
        self._loads.setdefault(adapter.adapter_id, []).append(future)
        self._read_next()
        return future

    def unload(self, name: str) -> Future[None]:
        """Forget a name. What is bound to it goes on; with the last of it the memory is free.

        Returns:
            What is set when the memory of all versions of the name is free. It cannot be cancelled.

        Raises:
            AdapterError: the name is not known.
        """
        del self._by_name[self.request(name).name]
        future = _uncancellable(Future[None]())
        versions = self.versions(name)
        self._unloads.append(({adapter.adapter_id for adapter in versions}, future))
        for adapter in versions:
            self._retire(adapter)
        return future

    def pin(self, name: str) -> None:
        """Let an adapter keep its place in memory, and its position once it has one; it is read if need be.

        Raises:
            AdapterError: the name is not known, or no position would be left for the others.
        """
        adapter = self.request(name)
        if adapter.pinned:
            return
        num_pinned = sum(other.pinned for other in self._by_name.values())
        if num_pinned >= self._max_loras - 1:
            raise AdapterError(
                f"Adapter {name!r} cannot be pinned: {num_pinned} are, and of max_loras={self._max_loras} positions "
                "one must be left for the others. Unpin one, or raise max_loras."
            )
        adapter.pinned = True
        if adapter is self._leaving:
            self._leaving = None
        if adapter.state == "cold":
            self._want(adapter)
            self._read_next()

    def unpin(self, name: str) -> None:
        """AdapterError when the name is not known; one that is not pinned is no error."""
        self.request(name).pinned = False

    # ------------------------------------------------------------------------------------------------ requests

    def add(self, request: Request) -> None:
        """A request was queued, with its siblings. Here and below, one without an adapter is no concern."""
        adapter = request.adapter
        if adapter is not None:
            adapter.num_hits += 1
            adapter.num_requests += 1 + len(request.siblings)
            if adapter.state == "cold":
                self._want(adapter)

    def add_fork(self, request: Request) -> None:
        """A request was forked from one that has started."""
        if request.adapter is not None:
            request.adapter.num_requests += 1
            self._hold(request, request.adapter)

    def may_enter(self, request: Request) -> bool:
        """Whether a waiting request's adapter is in memory, and the request is not to wait for others to end."""
        adapter = request.adapter
        return adapter is None or (adapter.in_memory and (request.holds_adapter or adapter is not self._leaving))

    def enter_batch(self, request: Request) -> None:
        """A request has a place in the batch, and its adapter must be at a position."""
        if (adapter := request.adapter) is not None:
            adapter.num_running += 1
            adapter.last_used = next(self._uses)
            self._hold(request, adapter)

    def leave_batch(self, request: Request) -> None:
        """A request has lost its place in the batch."""
        if request.adapter is not None:
            request.adapter.num_running -= 1

    def end(self, request: Request) -> None:
        """A request has ended, wherever it was; of the batch it was told before."""
        adapter = request.adapter
        if adapter is not None:
            adapter.num_started -= request.holds_adapter
            adapter.num_requests -= 1
            request.holds_adapter = False
            if adapter.retired and not adapter.num_requests:
                self._forget(adapter)

    def _hold(self, request: Request, adapter: Adapter) -> None:
        """From its first start to its end a request keeps its adapter in memory."""
        if not request.holds_adapter:
            request.holds_adapter = True
            adapter.num_started += 1
            adapter.awaited = False

    # ------------------------------------------------------------------------------------------------ positions

    def has_position(self, adapter: Adapter) -> bool:
        """Whether `place` can put it at a position."""
        return adapter.position is not None or any(map(_is_free, self._positions))

    def place(self, request: Request) -> AdapterPlacement | None:
        """Put the adapter of a request that enters the batch at a free position; None when it is at one already."""
        adapter = request.adapter
        if adapter is None or adapter.position is not None:
            return None
        assert adapter.in_memory, "an adapter is placed from the host's memory"
        free = [position for position, tenant in enumerate(self._positions) if _is_free(tenant)]
        position = min(free, key=lambda position: _last_used(self._positions[position]))
        self._displace(self._positions[position])
        self._positions[position] = adapter
        adapter.position = position
        adapter.state = "placed"
        return AdapterPlacement(position=position, adapter_id=adapter.adapter_id)

    def _displace(self, tenant: Adapter | None) -> None:
        if tenant is not None and tenant.position is not None:
            self._positions[tenant.position] = None
            tenant.position = None
            tenant.state = "host"

    # ------------------------------------------------------------------------------------------------ loading

    def poll(self) -> list[FailedLoad]:
        """Take in what was read, and go on reading; returns what could not be read."""
        failed = self._take_in() if self._reading is not None and self._loader.has_ended else []
        if self._wanted:
            self._read_next()
        return failed

    def wait(self, timeout: float) -> None:
        """Wait until there is something for `poll` to take in, at most so many seconds."""
        if self._reading is not None:
            self._loader.wait(timeout)

    def stop(self) -> None:
        """End the thread that reads, and everyone's waiting. May be called twice."""
        self._loader.stop()
        self._wanted.clear()
        error = EngineDeadError("The engine was shut down.")
        for loaded in itertools.chain.from_iterable(self._loads.values()):
            loaded.set_exception(error)
        for _, unloaded in self._unloads:
            unloaded.set_exception(error)
        self._loads.clear()
        self._unloads.clear()

    def _want(self, adapter: Adapter) -> None:
        adapter.state = "loading"
        self._wanted.append(adapter)

    def _read_next(self) -> None:
        """Begin to read the first that is still wanted, once there is room for it."""
        while self._wanted and self._reading is None:
            adapter = self._wanted[0]
            if not (adapter.num_requests or adapter.pinned or adapter.adapter_id in self._loads):
                adapter.state = "cold"  # who wanted it has ended
                self._wanted.popleft()
            elif len(self._in_memory) < self._max_cpu_loras or self._make_room():
                self._wanted.popleft()
                self._reading = adapter
                self._loader.read(adapter)
            else:
                return
        self._leaving = None

    def _make_room(self) -> bool:
        """Evict an adapter; or, where none can be, choose whose further requests may not start until it can."""
        held = [adapter for adapter in self._in_memory.values() if not adapter.pinned]
        idle = [adapter for adapter in held if not adapter.num_started]
        idle = [adapter for adapter in idle if not (adapter.awaited and adapter.num_requests)]
        if idle:
            adapter = min(idle, key=lambda one: (one.num_requests > 0, one.last_used))
            self._release(adapter)
            self.num_evictions += 1
            if adapter.num_requests:  # they wait for it again, behind those it makes room for
                self._want(adapter)
            return True
        if self._leaving is None:
            busy = [adapter for adapter in held if adapter.num_started]
            self._leaving = min(busy, key=lambda one: (one.num_started, one.last_used), default=None)
        return False

    def _take_in(self) -> list[FailedLoad]:
        adapter, self._reading = self._reading, None
        assert adapter is not None
        result = self._loader.take()
        if isinstance(result, AdapterError):
            adapter.state = "cold"
            if adapter.info is None:  # else its name stays: what was read once may be there again
                adapter.retired = True
                if self._by_name.get(adapter.name) is adapter:
                    self._pass_on(adapter.name)
            for future in self._loads.pop(adapter.adapter_id, []):
                future.set_exception(result)
        else:
            self.num_loads += 1
            adapter.info = result
            adapter.state = "host"
            adapter.awaited = True
            adapter.last_used = next(self._uses)
            self._in_memory[adapter.adapter_id] = adapter
            if not adapter.retired:
                self._take_name(adapter)
        if adapter.retired and not adapter.num_requests:
            self._forget(adapter)
        for future in self._loads.pop(adapter.adapter_id, []):
            assert adapter.info is not None
            future.set_result(adapter.info)
        return [FailedLoad(adapter, result)] if isinstance(result, AdapterError) else []

    def _take_name(self, adapter: Adapter) -> None:
        """Let a version that was read be the one of its name."""
        replaced = self._by_name.get(adapter.name)
        self._by_name[adapter.name] = adapter
        if replaced is not None and replaced is not adapter:
            adapter.pinned = replaced.pinned
            self._retire(replaced)

    def _pass_on(self, name: str) -> None:
        """Forget a name, unless a version is on its way that was to replace the one that could not be read."""
        del self._by_name[name]
        for successor in self.versions(name):
            if not successor.retired:
                self._by_name.setdefault(name, successor)

    def _retire(self, adapter: Adapter) -> None:
        adapter.retired = True
        adapter.pinned = False
        if not adapter.num_requests:
            self._forget(adapter)

    def _forget(self, adapter: Adapter) -> None:
        """Nobody is bound to a retired version: free its memory, now or when it has been read."""
        if adapter is self._reading:
            return
        if adapter.in_memory:
            self._release(adapter)
        elif adapter in self._wanted:
            self._wanted.remove(adapter)
        adapter.state = "cold"
        del self._versions[adapter.adapter_id]
        for future in self._loads.pop(adapter.adapter_id, []):
            future.set_exception(AdapterError(f"Adapter {adapter.name!r} was unloaded before it was read."))
        for adapter_ids, unloaded in self._unloads:
            adapter_ids.discard(adapter.adapter_id)
            if not adapter_ids:
                unloaded.set_result(None)
        self._unloads = [entry for entry in self._unloads if entry[0]]

    def _release(self, adapter: Adapter) -> None:
        """Give back its memory and its position."""
        assert not adapter.num_started, "an adapter stays in memory while requests of it run"
        self._displace(adapter)
        del self._in_memory[adapter.adapter_id]
        adapter.state = "cold"
        if adapter is self._leaving:
            self._leaving = None
        self._drop(adapter.adapter_id)


def other_path(adapter: Adapter, path: str) -> AdapterError:
    """The error of who asks for an adapter by a name that is another's."""
    return AdapterError(
        f"Adapter {adapter.name!r} is that of {adapter.path!r}; {path!r} was asked for. Give it another name, replace "
        "it in place, or unload it first."
    )


def _uncancellable(future: Future[_T]) -> Future[_T]:
    """Whoever waits for it may give up, but the engine will set it."""
    future.set_running_or_notify_cancel()
    return future


def _is_free(tenant: Adapter | None) -> bool:
    return tenant is None or not (tenant.num_running or tenant.pinned)


def _last_used(tenant: Adapter | None) -> int:
    return 0 if tenant is None else tenant.last_used
