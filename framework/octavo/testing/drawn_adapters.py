"""Adapters, slots and rows drawn for LoraSuite, and what each row is to become, in float64."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from octavo.interfaces.lora import NO_ADAPTER, AdapterWeights, LoraBackend, LoraPart, LowRank
from octavo.lora.adapter import AdapterInfo

HIDDEN = 48
WIDE = 80
VOCAB = 61
MAX_RANK = 8
MAX_ROWS = 80


@dataclass(frozen=True, kw_only=True)
class DrawnSlot:
    """A linear or an embedding of the suite's model."""

    name: str
    parts: tuple[LoraPart, ...]
    kind: Literal["linear", "embedding", "head"] = "linear"

    @property
    def in_features(self) -> int:
        return self.parts[0].in_features

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    def make(self, backend: LoraBackend) -> object:
        """Ask the backend for it."""
        if self.kind == "embedding":
            return backend.embedding(self.parts[0])
        return backend.linear(self.parts, is_head=self.kind == "head")

    def columns_of(self, whole: DrawnSlot) -> list[slice]:
        """Of a slot that this is a share of: the columns of its output that are this one's."""
        columns, start = [], 0
        for part, own in zip(whole.parts, self.parts, strict=True):
            first = start + own.output_start - part.output_start
            columns.append(slice(first, first + own.out_features))
            start += part.out_features
        return columns


def _part(module: str, in_features: int, out_features: int, output_start: int = 0) -> LoraPart:
    return LoraPart(module=module, in_features=in_features, out_features=out_features, output_start=output_start)


SLOTS = (
    DrawnSlot(name="qkv", parts=(_part("q", HIDDEN, HIDDEN), _part("k", HIDDEN, 16), _part("v", HIDDEN, 16))),
    DrawnSlot(name="o", parts=(_part("o", HIDDEN, HIDDEN),)),
    DrawnSlot(name="gate_up", parts=(_part("gate", HIDDEN, WIDE), _part("up", HIDDEN, WIDE))),
    DrawnSlot(name="down", parts=(_part("down", WIDE, HIDDEN),)),
    # One linear of the checkpoint that is computed as two of other sizes.
    DrawnSlot(name="fused", parts=(_part("fused", HIDDEN, 18), _part("fused", HIDDEN, 30, output_start=18))),
    DrawnSlot(name="embed", parts=(_part("model.embed_tokens", VOCAB, HIDDEN),), kind="embedding"),
    DrawnSlot(name="head", parts=(_part("lm_head", HIDDEN, VOCAB),), kind="head"),
)

_SHORT = {"model.embed_tokens": "embed", "lm_head": "head"}


def modules() -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of each whole module."""
    found: dict[str, tuple[int, int]] = {}
    for slot in SLOTS:
        for part in slot.parts:
            found[part.module] = (part.in_features, part.output_start + part.out_features)
    return found


def adapter_of(
    seed: int,
    rank: int,
    *,
    dtype: torch.dtype,
    scaled: bool = False,
    shifted: bool = False,
    varied: bool = False,
    leave_out: Collection[str] = (),
    saved: Collection[str] = (),
) -> AdapterWeights:
    """Drawn from the seed, for every module but those left out ("embed" and "head" for short).

    Args:
        rank: of every module; where they are varied, the largest, and they go up to it from 0 in turn.
        scaled, shifted: every module; where they are varied, some of them.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    low_ranks = {}
    for index, (name, (ins, outs)) in enumerate(modules().items()):
        own = index % (rank + 1) if varied else rank
        low_rank = LowRank(
            a=draw(own, ins).to(dtype),
            b=(draw(outs, own) / rank**0.5 / 4).to(dtype),
            scale=draw(outs) + 2 if scaled and not (varied and index % 2) else None,
            shift=draw(outs) if shifted and (not varied or index % 3) else None,
        )
        if _SHORT.get(name, name) not in leave_out:
            low_ranks[name] = low_rank
    wholes = {
        name: (draw(ins, outs) if name == "model.embed_tokens" else draw(outs, ins)).to(dtype)
        for name, (ins, outs) in modules().items()
        if name in saved
    }
    info = AdapterInfo(content_hash=f"{seed:064x}", rank=rank, num_bytes=0, modules=tuple(sorted(low_ranks)))
    return AdapterWeights(info=info, low_ranks=low_ranks, saved=wholes)


def share(slot: DrawnSlot, *, outputs: int | None = None, inputs: int | None = None, of: int) -> DrawnSlot:
    """What one of so many devices has of a slot: some of each part's outputs, or some of the inputs."""
    parts = []
    for part in slot.parts:
        if outputs is not None:
            size = part.out_features // of
            part = replace(part, out_features=size, output_start=part.output_start + outputs * size)
        if inputs is not None:
            size = part.in_features // of
            part = replace(part, in_features=size, input_start=inputs * size)
        parts.append(part)
    return replace(slot, parts=tuple(parts))


def reference(
    slot: DrawnSlot,
    placed: Mapping[int, AdapterWeights],
    positions: Sequence[int],
    x: Tensor,
    output: Tensor,
) -> tuple[Tensor, Tensor]:
    """(what each row is to become, the sum of the magnitudes it is made of), [num_rows, out_features] float64."""
    wanted, sizes = output.double().clone(), output.double().abs()
    for row, position in enumerate(positions):
        adapter = placed.get(position) if position != NO_ADAPTER else None
        start = 0
        for part in slot.parts:
            columns = slice(start, start + part.out_features)
            start += part.out_features
            if adapter is None:
                continue
            if (whole := adapter.saved.get(part.module)) is not None:
                weight = whole.double().to(x.device)
                wanted[row, columns] = weight[x[row]] if slot.kind == "embedding" else weight @ x[row].double()
                sizes[row, columns] = (
                    weight[x[row]].abs() if slot.kind == "embedding" else weight.abs() @ x[row].double().abs()
                )
            if (low_rank := adapter.low_ranks.get(part.module)) is not None:
                _add(low_rank, part, slot.kind == "embedding", x[row], wanted[row, columns], sizes[row, columns])
    return wanted, sizes


def _add(low_rank: LowRank, part: LoraPart, embeds: bool, x: Tensor, wanted: Tensor, sizes: Tensor) -> None:
    rows = slice(part.output_start, part.output_start + part.out_features)
    a, b = low_rank.a.double().to(x.device), low_rank.b.double().to(x.device)[rows]
    a = a[:, part.input_start : part.input_start + part.in_features]
    shrunk, shrunk_size = (a[:, x], a[:, x].abs()) if embeds else (a @ x.double(), a.abs() @ x.double().abs())
    wanted += b @ shrunk
    sizes += b.abs() @ shrunk_size
    if low_rank.scale is not None:
        scale = low_rank.scale.double().to(x.device)[rows]
        wanted *= scale
        sizes *= scale.abs()
    if low_rank.shift is not None:
        shift = low_rank.shift.double().to(x.device)[rows]
        wanted += shift
        sizes += shift.abs()


class Scene:
    """A backend with the suite's slots, and what is at its positions."""

    def __init__(self, backend: LoraBackend, tolerance: float, slots: Sequence[DrawnSlot] = SLOTS) -> None:
        self.backend = backend
        self.tolerance = tolerance
        self.placed: dict[int, AdapterWeights] = {}
        self._slots = {slot.name: slot.make(backend) for slot in slots}
        backend.allocate()

    def place(self, position: int, adapter: AdapterWeights) -> None:
        self.placed[position] = adapter
        self.backend.place(position, adapter)

    def inputs(self, slot: DrawnSlot, num_rows: int) -> tuple[Tensor, Tensor]:
        """(x or token ids, output) of so many rows; those of fewer are the first of them."""
        limits, generator = self.backend.limits, torch.Generator().manual_seed(3)
        many = max(num_rows, MAX_ROWS)
        output = torch.randn(many, slot.out_features, generator=generator).to(limits.device, limits.dtype)
        if slot.kind == "embedding":
            x = torch.randint(0, VOCAB, (many,), generator=generator).to(limits.device)
        else:
            x = torch.randn(many, slot.in_features, generator=generator).to(limits.device, limits.dtype)
        return x[:num_rows].clone(), output[:num_rows].clone()

    def apply(self, slot: DrawnSlot, positions: Sequence[int], x: Tensor, output: Tensor) -> Tensor:
        self.backend.plan(np.array(positions, np.int32))
        return self.apply_again(slot, x, output)

    def apply_again(self, slot: DrawnSlot, x: Tensor, output: Tensor) -> Tensor:
        """By the plan there is."""
        if not self.backend.active:
            return output
        made = self._slots[slot.name]
        if slot.kind == "embedding":
            return self.backend.apply_embedding(made, x, output)
        return self.backend.apply(made, x, output)

    def compute(self, slot: DrawnSlot, positions: Sequence[int], first_row: int = 0) -> tuple[Tensor, Tensor]:
        """(output as it was, what became of it), of rows from the first."""
        x, output = self.inputs(slot, first_row + len(positions))
        x, output = x[first_row:], output[first_row:]
        return output.clone(), self.apply(slot, positions, x, output)

    def size(self, slot: DrawnSlot, positions: Sequence[int], first_row: int = 0, zero_output: bool = False) -> Tensor:
        """Sums of the magnitudes that each number is made of, float64."""
        x, output = self.inputs(slot, first_row + len(positions))
        output = output * 0 if zero_output else output
        return reference(slot, self.placed, positions, x[first_row:], output[first_row:])[1]

    def check(self, slot: DrawnSlot, positions: Sequence[int], captured: bool = False) -> None:
        self.backend.plan(np.array(positions, np.int32), captured=captured)
        self.check_again(slot, positions)

    def check_again(self, slot: DrawnSlot, positions: Sequence[int]) -> None:
        """By the plan there is, which was made of these positions."""
        x, output = self.inputs(slot, len(positions))
        wanted, size = reference(slot, self.placed, positions, x, output)
        found = self.apply_again(slot, x, output)
        where = f"{slot.name}, rows of positions {list(positions)}, {output.dtype}"
        assert found.dtype == output.dtype, f"{where}: it gives {found.dtype}"
        assert found.shape == wanted.shape, f"{where}: it gives {tuple(found.shape)}, {tuple(wanted.shape)} is wanted"
        excess = (found.double() - wanted).abs() - self.tolerance * size
        row = int(excess.max(dim=1).values.argmax())
        error = (found[row].double() - wanted[row]).abs().max()
        assert excess.max() <= 0, f"{where}: row {row}, of position {positions[row]}, is off by {error}"


class TensorsMade(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the tensors that are made while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        self._made += [weakref.ref(one) for one in tree_leaves(made) if isinstance(one, Tensor)]
        return made

    def num_bytes(self, device: str) -> int:
        """Of those on a device that are still there, each storage once."""
        kept = [one for made in self._made if (one := made()) is not None and one.device.type == device]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in kept}
        return sum(storages.values())
