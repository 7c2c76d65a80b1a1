"""Captured decode steps: the hundreds of launches of a step are recorded once for each batch size, then replayed.

A step of decodes alone is padded to the next captured size; its inputs lie where the recorded work reads them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.runner.kv_cache import device_memory

logger = logging.getLogger(__name__)

Forward = Callable[[], tuple[Tensor, Tensor]]
"""Computes one step from tensors that stay where they are; its outputs stay where they are too."""

Capture = Callable[[Forward], Forward]
"""Runs a forward once and returns what repeats its work on what its inputs hold by then."""

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_MAX_SECONDS = 20.0
_MAX_SHARE = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphPlan:
    """Which steps to capture, how, and at what cost at most.

    Attributes:
        sizes: numbers of requests.
        max_seconds: after which no further size is begun.
        max_share: of the memory that is free when capturing begins, after which no further size is begun.
    """

    device: str
    sizes: Sequence[int]
    capture: Capture
    max_seconds: float
    max_share: float


class DecodeGraphs:
    """The captured steps by their number of requests, each without LoRA adapters and, where asked for, with."""

    def __init__(self, plan: GraphPlan, with_adapters: bool) -> None:
        self._plan = plan
        self.variants = (False, True) if with_adapters else (False,)
        self._replays: dict[tuple[int, bool], Forward] = {}

    @property
    def max_size(self) -> int:
        """The largest that may be captured."""
        return max(self._plan.sizes)

    def capture(self, prepare: Callable[[int, bool], Forward]) -> list[int]:
        """Capture within the plan's time and memory: the largest, whose memory all share, then the small ones first.

        Args:
            prepare: makes the forward of a padded step of that size, with adapters or without.

        Returns:
            the sizes that were captured; a step takes the next larger one, so those left out cost speed alone.
        """
        plan, largest = self._plan, self.max_size
        order = [largest, *sorted(size for size in set(plan.sizes) if size != largest)]
        start, free_bytes, taken_bytes = time.monotonic(), device_memory(plan.device).free_bytes, 0
        max_bytes = int(plan.max_share * free_bytes)
        for size in order:
            spent = time.monotonic() - start > plan.max_seconds or taken_bytes > max_bytes
            if self._replays and spent:
                break
            for with_adapters in self.variants:
                self._replays[size, with_adapters] = plan.capture(prepare(size, with_adapters))
            taken_bytes = free_bytes - device_memory(plan.device).free_bytes
        captured = sorted({size for size, _ in self._replays})
        left_out = sorted(set(order) - set(captured))
        logger.info(
            "Captured decode steps of %s requests in %.2f s (of %.0f s allowed), %.0f MiB (of %.0f MiB)%s",
            *(", ".join(map(str, captured)), time.monotonic() - start, plan.max_seconds),
            *(taken_bytes / 2**20, max_bytes / 2**20),
            f"; left out: {', '.join(map(str, left_out))}" if left_out else "",
        )
        return captured

    def replay(self, size: int, with_adapters: bool) -> tuple[Tensor, Tensor]:
        """What a captured step computes of what its inputs hold now."""
        return self._replays[size, with_adapters]()


def graph_plan(device: str, max_num_requests: int, enforce_eager: bool) -> GraphPlan | None:
    """What to capture on a device; None: nothing."""
    if device != "cuda" or enforce_eager:
        return None
    return GraphPlan(
        device=device,
        sizes=graph_sizes(max_num_requests),
        capture=CudaCapture(),
        max_seconds=_MAX_SECONDS,
        max_share=_MAX_SHARE,
    )


def graph_sizes(max_num_requests: int) -> tuple[int, ...]:
    """Few where a step's time hardly depends on its size; the largest step is always among them."""
    most = min(max_num_requests, _SIZES[-1])
    return (*(size for size in _SIZES if size < most), most)


class CudaCapture:
    """Records into CUDA graphs that share one memory pool: no two of them run at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # one: libraries keep memory for each

    def __call__(self, forward: Forward) -> Forward:
        # Once outside of the capture: kernels are compiled and libraries set up when they first run.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            forward()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            outputs = forward()

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return outputs

        return replay
