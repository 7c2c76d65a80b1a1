"""How long GPU work takes when none of its data is in the L2 cache: one CUDA graph over many copies of the data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

COLD_BYTES = 200 * 2**20
"""What the copies of the data hold together at least; an H200's L2 cache holds 60 MB."""
MAX_COPIES = 64
REPEATS = 5

Launch = Callable[[], object]


def num_copies(num_bytes: int, tiny: bool) -> int:
    """How many copies of data of this size make the L2 cache cold."""
    return 1 if tiny else max(2, min(MAX_COPIES, -(-COLD_BYTES // max(num_bytes, 1))))


def seconds_of(launches: Sequence[Launch], on_gpu: bool) -> tuple[float, str]:
    """(median seconds of one launch, how it was measured).

    Args:
        launches: the same work, each on its own copy of the data. They are captured one after the other in one graph,
            which is replayed: the time between launches that a host needs is not in it.
    """
    if not on_gpu:
        start = time.perf_counter()
        launches[0]()
        return time.perf_counter() - start, "interpreter, no measurement"
    for launch in launches:  # what is compiled is compiled now
        launch()
    torch.cuda.synchronize()
    try:
        graph, method = captured(launches), "graph"
    except RuntimeError as error:  # work that waits for the device cannot be captured
        torch.cuda.synchronize()
        graph, method = None, f"no graph ({str(error).partition(chr(10))[0][:60]})"

    def replay() -> None:
        if graph is not None:
            graph.replay()
        else:
            for launch in launches:
                launch()

    return statistics.median(_event_seconds(replay) for _ in range(REPEATS)) / len(launches), method


def captured(launches: Sequence[Launch]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _event_seconds(work: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
