"""A LoRA backend in plain loops, for tests of what calls it; its adapters are drawn from their paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.interfaces import AdapterWeights, LoraBackend, LoraBase, LoraLimits, LoraModule, LoraPart, LowRank
from octavo.lora.adapter import AdapterInfo

PLUGIN = """
    from octavo import LoraSpec, hookimpl
    OCTAVO_API = "1.0"

    @hookimpl
    def octavo_components():
        return [LoraSpec(name="plain", target="plain_lora:PlainLora")]
"""
RANK = 3


@dataclass(frozen=True, kw_only=True)
class Slot:
    parts: tuple[LoraPart, ...]
    is_head: bool = False


class PlainLora(LoraBackend):
    """`load` draws an adapter for every module but the embedding; a path that ends in "head" is for the head alone.

    Attributes:
        plans: what `plan` was told, in order.
    """

    def __init__(self, limits: LoraLimits) -> None:
        super().__init__(limits)
        self.plans: list[tuple[list[int] | None, bool]] = []
        self._positions: NDArray[np.int32] = np.zeros(0, np.int32)
        self._placed: dict[int, AdapterWeights] = {}

    def linear(self, parts: Sequence[LoraPart], *, is_head: bool = False) -> Slot:
        return Slot(parts=tuple(parts), is_head=is_head)

    def embedding(self, part: LoraPart) -> Slot:
        return Slot(parts=(part,))

    @property
    def num_bytes(self) -> int:
        return 1000 * self.limits.max_loras

    def allocate(self) -> None:
        return None

    def load(self, path: str, base: LoraBase) -> AdapterWeights:
        kinds = ("head",) if path.endswith("head") else ("linear",)
        low_ranks = {
            name: drawn(f"{path} {name}", module) for name, module in base.modules.items() if module.kind in kinds
        }
        info = AdapterInfo(content_hash=f"{crc32(path.encode()):064x}", rank=RANK, num_bytes=1, modules=(*low_ranks,))
        return AdapterWeights(info=info, low_ranks=low_ranks)

    def place(self, position: int, adapter: AdapterWeights | None) -> None:
        self._placed.pop(position, None)
        if adapter is not None:
            self._placed[position] = adapter
        self.acts_on_head = any("lm_head" in one.low_ranks for one in self._placed.values())

    def plan(self, positions: NDArray[np.int32] | None, *, captured: bool = False) -> None:
        self.plans.append((None if positions is None else positions.tolist(), captured))
        self.active = positions is not None
        if positions is not None:
            self._positions = positions

    def apply(self, slot: object, x: Tensor, output: Tensor) -> Tensor:
        assert isinstance(slot, Slot)
        assert len(x) == len(self._positions), "the plan is of other rows"
        for row, position in enumerate(self._positions.tolist()):
            start = 0
            for part in slot.parts:
                end = start + part.out_features
                adapter = self._placed.get(position)
                if adapter is not None and (low_rank := adapter.low_ranks.get(part.module)) is not None:
                    b = low_rank.b[part.output_start : part.output_start + part.out_features]
                    output[row, start:end] += (b @ (low_rank.a @ x[row].float())).to(output.dtype)
                start = end
        return output

    def apply_embedding(self, slot: object, token_ids: Tensor, output: Tensor) -> Tensor:
        return output


def drawn(text: str, module: LoraModule) -> LowRank:
    """Always the same for a text."""
    generator = torch.Generator().manual_seed(crc32(text.encode()))
    return LowRank(
        a=torch.randn(RANK, module.in_features, generator=generator) / 4,
        b=torch.randn(module.out_features, RANK, generator=generator) / 4,
    )


def install_plain_lora(site_packages: Any) -> Path:
    """Component "plain"."""
    path: Path = site_packages.install("plain", PLUGIN)
    return path
