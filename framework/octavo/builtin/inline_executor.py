"""The executor that runs in the engine's own process and thread: the reference, and the one to debug with."""

from __future__ import annotations

from collections.abc import Callable

from octavo.errors import EngineDeadError
from octavo.interfaces.executor import Executor, ExecutorReport, Step, StepOutput
from octavo.interfaces.manifest import Manifest
from octavo.lora.adapter import AdapterInfo
from octavo.runner.model_runner import StepInFlight
from octavo.runner.worker import Worker


class InlineExecutor(Executor):
    """`submit` computes the step, or queues its work on a GPU; `collect` waits for it and hands its tokens over."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def start(self, manifest: Manifest, on_failure: Callable[[BaseException], None]) -> ExecutorReport:
        self._worker = Worker(manifest)
        return self._worker.report

    def submit(self, step: Step) -> object:
        self.check()
        assert self._worker is not None
        return self._worker.submit(step)

    def collect(self, handle: object) -> StepOutput:
        assert isinstance(handle, StepInFlight)
        self.check()
        assert self._worker is not None
        return self._worker.collect(handle)

    def load_adapter(self, adapter_id: int, path: str) -> AdapterInfo:
        self.check()
        assert self._worker is not None
        return self._worker.load_adapter(adapter_id, path)

    def drop_adapter(self, adapter_id: int) -> None:
        if self._worker is not None:
            self._worker.drop_adapter(adapter_id)

    def check(self) -> None:
        if self._worker is None:
            raise EngineDeadError("The executor is not running: it was stopped or never started.")

    def stop(self) -> None:
        self._worker = None
