"""AdapterLoader: reads adapters beside the engine's thread, so that no step waits for a disk. No torch here."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from octavo.errors import AdapterError
from octavo.lora.adapter import Adapter, AdapterInfo

logger = logging.getLogger(__name__)

STOP_SECONDS = 10.0
"""How long `stop` waits for a read to end; the thread does not keep the process alive."""


class AdapterLoader:
    """One thread that reads one adapter after the other, by the executor's `load_adapter`; started with the first."""

    def __init__(self, load: Callable[[int, str], AdapterInfo]) -> None:
        self._load = load
        self._jobs: queue.SimpleQueue[tuple[int, str, str] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[AdapterInfo | AdapterError] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the read that was begun has ended."""
        return self._ended.is_set()

    def read(self, adapter: Adapter) -> None:
        """Begin; the one before has ended and was taken."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="octavo-adapters", daemon=True)
            self._thread.start()
        self._jobs.put((adapter.adapter_id, adapter.name, adapter.path))

    def wait(self, timeout: float) -> None:
        """Until the read has ended, at most so many seconds."""
        self._ended.wait(timeout)

    def take(self) -> AdapterInfo | AdapterError:
        """What the read that has ended gave."""
        self._ended.clear()
        return self._results.get()

    def stop(self) -> None:
        """End the thread, after the read that goes on. May be called twice."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            adapter_id, name, path = job
            result: AdapterInfo | AdapterError
            try:
                result = self._load(adapter_id, path)
            except AdapterError as error:
                result = AdapterError(str(error))  # anew: a traceback holds what was read so far
            except BaseException as error:  # whatever a file makes a reader do, it is this adapter's fault alone
                logger.exception("Adapter %r could not be read from %s", name, path)
                result = AdapterError(
                    f"Adapter {name!r} could not be read from {path!r}: {type(error).__name__}: {error}"
                )
            self._results.put(result)
            del result
            self._ended.set()
