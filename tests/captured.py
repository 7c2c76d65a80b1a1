"""The GPU runner's way on a CPU: in place of a CUDA graph a captured step is computed again."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import Tensor

from octavo.builtin.torch_attention import TorchAttention
from octavo.runner import worker
from octavo.runner.graphs import Forward, GraphPlan


def run_again(forward: Forward) -> Forward:
    """A captured step that computes again, its outputs always in the same memory, as a CUDA graph's are."""
    outputs = tuple(tensor.clone() for tensor in forward())

    def replay() -> tuple[Tensor, Tensor]:
        for kept, new in zip(outputs, forward(), strict=True):
            kept.copy_(new)
        return outputs[0], outputs[1]

    return replay


def plan_of(sizes: Sequence[int], *, max_seconds: float = 60.0, max_share: float = 1.0) -> GraphPlan:
    return GraphPlan(device="cpu", sizes=sizes, capture=run_again, max_seconds=max_seconds, max_share=max_share)


def capture_on_cpu(monkeypatch: pytest.MonkeyPatch, sizes: Sequence[int]) -> None:
    """Engines that are made from now on capture steps of so many requests."""
    monkeypatch.setattr(TorchAttention, "graph_mode", "decode")
    monkeypatch.setattr(worker, "graph_plan", lambda *_: plan_of(sizes))
