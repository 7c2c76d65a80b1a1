"""Random packed weights of every kind that linear kernels are asked with, and what memory one takes."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from octavo.interfaces.linear_kernel import AffineWeight, LookupWeight, PackedWeight, WeightFacts, sparse_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightCase:
    """A kind of weight to multiply with.

    Attributes:
        scales: their dtype, of an affine weight.
    """

    facts: WeightFacts
    scales: torch.dtype = torch.float16

    def __str__(self) -> str:
        return f"{self.facts}, {self.scales} scales" if self.facts.form == "affine" else str(self.facts)

    def draw(self, device: str = "cpu", seed: int = 0) -> PackedWeight:
        """The same for each call."""
        generator = torch.Generator().manual_seed(seed)
        weight = _lookup(self.facts, generator) if self.facts.form == "lookup" else self._affine(generator)
        return on_device(weight, device)

    def _affine(self, generator: torch.Generator) -> AffineWeight:
        facts = self.facts
        num_groups = -(-facts.in_features // facts.group_size)
        codes = _codes(facts, generator)
        zeros = torch.randint(0, 2**facts.bits, (num_groups, facts.out_features), generator=generator).byte()
        zeros[0, 0], zeros[0, -1] = 2**facts.bits - 1, 0  # beside the codes there: the smallest and largest difference
        index = torch.arange(facts.in_features) // facts.group_size
        index = index[torch.randperm(facts.in_features, generator=generator)].int()
        scales = torch.rand(num_groups, facts.out_features, generator=generator) * 0.02 + 0.01
        return AffineWeight(
            bits=facts.bits,
            codes=codes,
            scales=scales.to(self.scales),
            zeros=None if facts.symmetric else zeros,
            group_size=facts.group_size,
            group_index=index if facts.act_order else None,
        )


def affine(
    bits: int,
    in_features: int,
    out_features: int,
    group_size: int = -1,
    *,
    symmetric: bool = False,
    act_order: bool = False,
    scales: torch.dtype = torch.float16,
) -> WeightCase:
    """A case of AffineWeight; group_size -1 is one group."""
    facts = WeightFacts(
        form="affine",
        bits=bits,
        in_features=in_features,
        out_features=out_features,
        group_size=in_features if group_size == -1 else group_size,
        act_order=act_order,
        symmetric=symmetric,
    )
    return WeightCase(facts=facts, scales=scales)


def lookup(bits: int, in_features: int, out_features: int, *, outliers: bool = False) -> WeightCase:
    """A case of LookupWeight."""
    facts = WeightFacts(
        form="lookup",
        bits=bits,
        in_features=in_features,
        out_features=out_features,
        group_size=in_features,
        outliers=outliers,
    )
    return WeightCase(facts=facts)


USUAL_CASES = (
    affine(4, 128, 96, 32),
    affine(4, 192, 64, 64, symmetric=True, scales=torch.bfloat16),
    affine(4, 256, 80, 128, act_order=True),
    affine(4, 256, 64, 64, symmetric=True, act_order=True),
    affine(4, 160, 48, scales=torch.float32),
    affine(4, 160, 64, 64),  # a short last group
    affine(4, 161, 53, 32),
    affine(3, 128, 64, 32),
    affine(3, 256, 32, 128, symmetric=True, act_order=True),
    affine(3, 99, 35, 64, scales=torch.bfloat16),
    affine(2, 128, 64, 64),
    affine(2, 192, 48, symmetric=True),
    affine(8, 256, 64, 128),
    affine(8, 128, 96, symmetric=True, scales=torch.float32),
    affine(8, 160, 40, 32, act_order=True),
    affine(8, 77, 33, 32),
    lookup(4, 128, 96),
    lookup(4, 160, 53, outliers=True),
    lookup(3, 128, 64),
    lookup(3, 99, 64, outliers=True),
)

FEW_CASES = (
    affine(4, 64, 32, 32),
    affine(4, 128, 48, 32, act_order=True, scales=torch.bfloat16),
    affine(4, 77, 21, 32, symmetric=True, scales=torch.float32),
    affine(3, 96, 32),
    affine(8, 96, 32, 64),
    affine(2, 64, 32, 32, symmetric=True),
    lookup(4, 64, 32),
    lookup(3, 96, 32, outliers=True),
)


def every_kind(small: bool) -> Iterator[WeightCase]:
    """Each number of bits with each kind of group, order and zeros; with `small`, each number of bits."""
    for bits in range(1, 9):
        if small:
            yield from (affine(bits, 64, 32, 32), lookup(bits, 64, 32))
            continue
        for act_order in (False, True):
            for symmetric in (False, True):
                yield affine(bits, 96, 40, 32, act_order=act_order, symmetric=symmetric)
                yield affine(bits, 65, 17, 48, act_order=act_order, symmetric=symmetric, scales=torch.bfloat16)
                yield affine(bits, 130, 64, symmetric=symmetric)
        for outliers in (False, True):
            yield lookup(bits, 96, 40, outliers=outliers)
            yield lookup(bits, 65, 17, outliers=outliers)


def tensors_of(weight: PackedWeight) -> dict[str, Tensor]:
    """Those that it has, by their attribute."""
    found = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def with_tensors(weight: PackedWeight, tensors: Mapping[str, Tensor]) -> PackedWeight:
    """The weight with other tensors."""
    changes = dict(tensors)
    return replace(weight, **changes)  # type: ignore[arg-type]


def on_device(weight: PackedWeight, device: str) -> PackedWeight:
    """The weight, its tensors on a device."""
    return with_tensors(weight, {name: tensor.to(device) for name, tensor in tensors_of(weight).items()})


def watched(weight: PackedWeight) -> tuple[dict[str, weakref.ref[np.ndarray]], PackedWeight]:  # type: ignore[type-arg]
    """References to the memory of its dense tensors, dead once nobody holds it, and the weight made of that memory."""
    memory, copies = {}, {}
    for name, tensor in tensors_of(weight).items():
        if tensor.layout == torch.strided:
            bytes_of = np.array(tensor.contiguous().flatten().view(torch.uint8).numpy())
            memory[name] = weakref.ref(bytes_of)
            copies[name] = torch.from_numpy(bytes_of).view(tensor.dtype).view(tensor.shape)
    return memory, with_tensors(weight, copies)


def bytes_reachable(value: object) -> int:
    """Of all tensors in a value, its fields and items; memory that several share counts once."""
    storages: dict[int, int] = {}
    _gather(value, storages, set())
    return sum(storages.values())


def _gather(value: object, storages: dict[int, int], seen: set[int]) -> None:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if value.layout == torch.strided:
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif value.is_mkldnn:  # whose memory is oneDNN's own
            storages[id(value)] = value.numel() * value.dtype.itemsize
        else:
            for part in (value.crow_indices(), value.col_indices(), value.values()):
                _gather(part, storages, seen)
    elif isinstance(value, Mapping):
        for item in value.values():
            _gather(item, storages, seen)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            _gather(item, storages, seen)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _gather(getattr(value, field.name), storages, seen)
    elif hasattr(value, "__dict__"):
        _gather(vars(value), storages, seen)


def _codes(facts: WeightFacts, generator: torch.Generator) -> Tensor:
    """[out_features, in_features] uint8; the smallest and the largest are there."""
    codes = torch.randint(0, 2**facts.bits, (facts.out_features, facts.in_features), generator=generator).byte()
    codes[0], codes[-1] = 0, 2**facts.bits - 1
    return codes


def _lookup(facts: WeightFacts, generator: torch.Generator) -> LookupWeight:
    size = (facts.out_features, facts.in_features)
    outliers = None
    if facts.outliers:
        places = torch.rand(size, generator=generator) < 0.05
        values = torch.randn(size, generator=generator)[places]
        outliers = sparse_rows(places.sum(1), places.nonzero()[:, 1], values, facts.in_features)
    table = torch.randn(facts.out_features, 2**facts.bits, generator=generator) * 0.1
    return LookupWeight(bits=facts.bits, codes=_codes(facts, generator), table=table, outliers=outliers)
