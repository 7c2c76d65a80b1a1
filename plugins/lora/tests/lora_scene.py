"""What tests of both backends share: one slot, drawn adapters, and what they shall do, a row at a time in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from octavo.interfaces import AdapterWeights, LoraLimits, LoraPart, LowRank
from octavo.lora.adapter import AdapterInfo
from octavo_lora.placement import PlacedLora, Slot

Backend = TypeVar("Backend", bound=PlacedLora)
MAX_NUM_ROWS = 1024


@dataclass(kw_only=True)
class Scene:
    """One slot of parts m0, m1, ... and the adapters at the positions."""

    in_features: int
    outs: tuple[int, ...]
    max_rank: int
    dtype: torch.dtype = torch.float32
    kind: str = "linear"
    saves: bool = False
    num_positions: int = 3
    adapters: list[AdapterWeights | None] = field(default_factory=list)

    def backend(self, kind: type[Backend]) -> Backend:
        backend = kind(
            LoraLimits(
                max_loras=self.num_positions,
                max_lora_rank=self.max_rank,
                max_num_rows=MAX_NUM_ROWS,
                dtype=self.dtype,
                device="cpu",
                modules_to_save=self.saves,
            )
        )
        parts = [
            LoraPart(module=f"m{index}", in_features=self.in_features, out_features=out)
            for index, out in enumerate(self.outs)
        ]
        is_embedding = self.kind == "embedding"
        slot = backend.embedding(parts[0]) if is_embedding else backend.linear(parts, is_head=self.kind == "head")
        backend.allocate()
        for position, adapter in enumerate(self.adapters):
            backend.place(position, adapter)
        self.slot: Slot = slot
        return backend

    def inputs(self, num_rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """x and what the base's linear made of it."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(num_rows, self.in_features, generator=generator).to(self.dtype)
        return x, torch.randn(num_rows, sum(self.outs), generator=generator).to(self.dtype)


def make_adapter(
    scene: Scene,
    ranks: Sequence[int],
    *,
    seed: int = 0,
    scale: bool = False,
    shift: bool = False,
    touch_all: bool = False,
    saved: Tensor | None = None,
) -> AdapterWeights:
    """A rank of each part; a part of rank 0 is not touched unless `touch_all`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    low_ranks = {
        f"m{index}": LowRank(
            a=draw(rank, scene.in_features).to(scene.dtype),
            b=draw(out, rank).to(scene.dtype),
            scale=draw(out) if scale else None,
            shift=draw(out) if shift else None,
        )
        for index, (rank, out) in enumerate(zip(ranks, scene.outs, strict=True))
        if rank or touch_all
    }
    info = AdapterInfo(content_hash=str(seed), rank=max(ranks), num_bytes=0, modules=tuple(low_ranks))
    return AdapterWeights(info=info, low_ranks=low_ranks, saved={} if saved is None else {"m0": saved.to(scene.dtype)})


def wanted(scene: Scene, positions: Sequence[int], x: Tensor, output: Tensor) -> Tensor:
    """[num_rows, out_features] float64."""
    rows = [
        _row(scene, position, x_row.double(), y_row.double())
        for position, x_row, y_row in zip(positions, x, output, strict=True)
    ]
    return torch.stack(rows)


def wanted_embedding(scene: Scene, positions: Sequence[int], token_ids: Tensor, output: Tensor) -> Tensor:
    """As of one-hot rows."""
    return wanted(scene, positions, torch.nn.functional.one_hot(token_ids, scene.in_features), output)


def _row(scene: Scene, position: int, x: Tensor, y: Tensor) -> Tensor:
    adapter = scene.adapters[position] if 0 <= position < len(scene.adapters) else None
    if adapter is None:
        return y
    found = []
    for index, columns in enumerate(torch.tensor_split(y, np.cumsum(scene.outs)[:-1].tolist())):
        name = f"m{index}"
        if name in adapter.saved:
            own = adapter.saved[name].double()
            columns = x @ own if scene.kind == "embedding" else own @ x
        if name in adapter.low_ranks:
            low_rank = adapter.low_ranks[name]
            columns = columns + low_rank.b.double() @ (low_rank.a.double() @ x)
            if low_rank.scale is not None:
                columns = columns * low_rank.scale.double()
            if low_rank.shift is not None:
                columns = columns + low_rank.shift.double()
        found.append(columns)
    return torch.cat(found)
