"""Part: what a worker process is told, and the rows it writes, each as soon as it is known."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")

Value = str | float | int | bool | None


@dataclass(kw_only=True)
class Part:
    """One part of a run.

    Attributes:
        device: "cuda", or "cpu": Triton's interpreter.
        tiny: the smallest shapes there are; every time is then meaningless.
        quick: fewer cases.
        num_layers: of the Llama-3-8B shape.
        scratch: a folder in memory, shared by the parts of a run.
        seconds: it may take.
        output: file of its rows, one JSON object a line; complete up to now, whatever happens next.
    """

    name: str
    device: str
    tiny: bool
    quick: bool
    num_layers: int
    scratch: Path
    seconds: float
    output: Path
    start: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def choose(self, full: _T, quick: _T, tiny: _T) -> _T:
        """The one of three sizes that this run asks for."""
        return tiny if self.tiny else quick if self.quick else full

    @property
    def seconds_left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def add(self, table: str, **row: Value) -> None:
        """A row of a table of the report."""
        self._write({"table": table, "row": row})

    def not_run(self, what: str, reason: str, *, failed: bool = False) -> None:
        """A line of the report; `failed` makes the whole run one that failed."""
        self._write({"not_run": what, "reason": reason, "failed": failed})

    def attempt(self, what: str, work: Callable[[], object], *, seconds: float = 0.0) -> None:
        """Do one case: what goes wrong in it is a line of the report, and the next case has its turn.

        Args:
            seconds: about what it takes; it is not begun with fewer left.
        """
        if self.seconds_left < seconds:
            left = max(self.seconds_left, 0.0)
            self.not_run(what, f"{left:.0f} of the part's {self.seconds:.0f} seconds were left")
            return
        try:
            work()
        except Exception as error:  # a kernel that does not compile shall not hide what the others do
            traceback.print_exc()
            message = " ".join(str(error).split())[:300]
            self.not_run(what, f"{type(error).__name__}: {message}", failed=True)
            if "CUDA error" in message:  # nothing after it in this process would work
                raise

    def _write(self, line: dict[str, object]) -> None:
        with self.output.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_lines(output: Path) -> list[dict[str, Any]]:
    """What a part wrote; a last line that was cut short is left out."""
    lines = output.read_text().splitlines(keepends=True) if output.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
