"""Measures tile sizes on this machine's GPU and writes configs/sm_<capability>.json.

    python -m octavo_linear_triton.tune [--kernel affine_linear] [--bits 4] [--out FILE]

Every case of the file is tried with every candidate that compiles without spilling; of these the one whose time,
the geometric mean over the case's shapes, is the least takes the case's entry. Cases that are left out keep theirs.
Needs a GPU, and what the tests need (`pip install octavo-linear-triton[test] pytest`).
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo_linear_triton.layout import (
    PackedAffine,
    PackedCodes,
    PackedLookup,
    bias_of,
    block_inputs,
    code_dtype_for,
    num_blocks,
)
from octavo_linear_triton.tuned import CONFIGS, INTERPRETED, ProductConfig, most_splits

Config = dict[str, int]
Document = dict[str, Any]
Shape = tuple[int, int]

_SHAPES: tuple[Shape, ...] = ((4096, 4096), (4096, 14336), (14336, 4096))  # inputs, outputs: of Llama-3-8B
_GROUP_SIZE = 128
_COLD_BYTES = 256 * 2**20  # of weights between two uses of one: more than any L2 holds
_REPEATS = 5
_WHERE_IT_SAYS = ' where "microseconds" says so; the others: '


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One entry of a file: a kernel and the "when" it is for."""

    kernel: str
    when: Mapping[str, int]

    @property
    def dtype(self) -> torch.dtype:
        return {16: torch.bfloat16, 32: torch.float32}[self.when["dtype_bits"]]

    def candidates(self) -> list[Config]:
        """Sizes to try."""
        tokens = [size for size in (8, 16, 32, 64, 128) if size <= max(self.when["num_tokens"], 8)][-2:]
        sizes = {
            "block_outputs": (32, 64, 128, 256),
            "block_tokens": (8,) if self.when["dtype_bits"] == 32 else tokens,
            "num_warps": (4, 8),
            "num_stages": (2, 3, 4, 5),
            "programs": (1, 2, 4, 8),
        }
        return [dict(zip(sizes, values, strict=True)) for values in itertools.product(*sizes.values())]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a case's entry is to be; `seconds` of a product, the geometric mean over the shapes."""

    case: Case
    config: Config
    seconds: float


def cases_of(document: Document) -> list[Case]:
    """One for each entry."""
    return [
        Case(kernel=kernel, when=entry["when"]) for kernel, entries in document["kernels"].items() for entry in entries
    ]


def best(
    case: Case, faults: Callable[[Case, Config], list[str]], seconds: Callable[[Case, Shape, Config], float]
) -> Measured:
    """The fastest candidate of those without faults, by the geometric mean over the shapes.

    Args:
        faults: reasons against a candidate, found by compiling it.
        seconds: of one product with a weight of such inputs and outputs.

    Raises:
        ValueError: every candidate has faults; the message quotes the first one's.
    """
    candidates = case.candidates()
    reasons = [faults(case, candidate) for candidate in candidates]
    usable = [candidate for candidate, found in zip(candidates, reasons, strict=True) if not found]
    if not usable:
        raise ValueError(
            f"{case.kernel}: none of {len(candidates)} candidates can be used for {dict(case.when)}; {candidates[0]} "
            f"{'; '.join(reasons[0])}. Try smaller tiles."
        )
    logarithms = [0.0] * len(usable)
    for shape in _SHAPES:  # outermost: its weights are made once
        for index, candidate in enumerate(usable):
            logarithms[index] += math.log(seconds(case, shape, candidate))
    fastest = min(range(len(usable)), key=logarithms.__getitem__)
    return Measured(case=case, config=usable[fastest], seconds=math.exp(logarithms[fastest] / len(_SHAPES)))


def with_measured(document: Document, measured: Sequence[Measured], facts: Document) -> Document:
    """The document with what was measured in place of its entries for the same cases.

    Args:
        facts: gpu, versions, date, multiprocessors.
    """
    kernels: dict[str, list[Document]] = {}
    for kernel, entries in document["kernels"].items():
        new = {_key(one.case.when): one for one in measured if one.case.kernel == kernel}
        kernels[kernel] = [
            {"when": entry["when"], "config": one.config, "microseconds": round(one.seconds * 1e6, 2)}
            if (one := new.get(_key(entry["when"])))
            else entry
            for entry in entries
        ]
    source = "measured by octavo_linear_triton.tune"
    if not all("microseconds" in entry for entries in kernels.values() for entry in entries):
        source += f"{_WHERE_IT_SAYS}{document['source'].rpartition(_WHERE_IT_SAYS)[2]}"
    return {"source": source, **facts, "kernels": kernels}


def as_text(document: Document) -> str:
    """JSON with one entry a line."""
    text = json.dumps(document, indent=2)
    entry = re.compile(r"\{\s+\"when\": \{[^{}]*\},\s+\"config\": \{[^{}]*\}(?:,\s+\"microseconds\": [\d.e-]+)?\s+\}")
    return entry.sub(lambda found: re.sub(r"\s+", " ", found[0]).replace("{ ", "{").replace(" }", "}"), text) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m octavo_linear_triton.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", help="only this kernel's cases")
    parser.add_argument("--bits", type=int, help="only cases of codes of so many bits")
    parser.add_argument("--out", type=Path, help="the file to write; by default the one that is read")
    options = parser.parse_args(arguments)
    if INTERPRETED or not torch.cuda.is_available():
        why = "TRITON_INTERPRET is set" if INTERPRETED else "torch sees no GPU"
        print(f"Tile sizes are measured on the GPU they are for, and {why}. Run this on that GPU.", file=sys.stderr)
        return 1
    capability = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    path = CONFIGS / f"sm_{capability}.json"
    document = json.loads((path if path.exists() else CONFIGS / "sm_90.json").read_text())
    measured, gpu = [], _GPU(capability)
    for case in cases_of(document):
        if options.kernel in (None, case.kernel) and options.bits in (None, case.when["bits"]):
            measured.append(one := best(case, gpu.faults, gpu.seconds))
            print(f"{case.kernel} {dict(case.when)}: {one.config}, {one.seconds * 1e6:.1f} us", flush=True)
    out = options.out or path
    out.write_text(as_text(with_measured(document, measured, gpu.facts())))
    print(f"{len(measured)} entries measured, {out} written")
    return 0


class _GPU:
    """Compiles and times candidates."""

    def __init__(self, capability: int) -> None:
        self._capability = capability
        self._prepared: tuple[object, _Products] | None = None

    def facts(self) -> Document:
        properties = torch.cuda.get_device_properties(0)
        return {
            "gpu": properties.name,
            "versions": {name: version(name) for name in ("torch", "triton", "octavo-linear-triton")},
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "multiprocessors": properties.multi_processor_count,
        }

    def faults(self, case: Case, config: Config) -> list[str]:
        from octavo.testing import compiling  # here: what it needs is installed for tests

        try:
            with compiling(self._capability) as compiled:
                _Products(self._capability, case, (2048, 512), "cpu", num_weights=1).launch(config, 0)
        except RuntimeError as error:  # what the compiler says is the reason
            return [str(error)]
        return [fault for kernel in compiled for fault in kernel.faults()]

    def seconds(self, case: Case, shape: Shape, config: Config) -> float:
        """Of one product in a CUDA graph that goes through weights which the L2 does not hold all of."""
        if self._prepared is None or self._prepared[0] != (case, shape):
            self._prepared = None  # its memory first
            self._prepared = (case, shape), _Products(self._capability, case, shape, "cuda")
        products = self._prepared[1]
        products.launch(config, 0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for index in range(len(products.weights)):
                products.launch(config, index)
        graph.replay()
        times: list[float] = []
        for _ in range(_REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000 / len(products.weights))
        return sorted(times)[len(times) // 2]


class _Products:
    """Activations, and enough weights of random codes that each product finds its own out of the L2."""

    def __init__(self, capability: int, case: Case, shape: Shape, device: str, num_weights: int | None = None) -> None:
        inputs, outputs = shape
        self._capability = capability
        self._x = torch.randn(case.when["num_tokens"], inputs, device=device).to(case.dtype)
        size = 4 * inputs * outputs * case.when["bits"] // 32
        count = num_weights or -(-_COLD_BYTES // size) + 1
        self.weights = [random_weight(case, shape, device) for _ in range(count)]

    def launch(self, config: Config, index: int) -> Tensor:
        """One product with this configuration in place of the one that was read."""
        from octavo_linear_triton.kernels.affine_linear import affine_linear
        from octavo_linear_triton.kernels.lookup_linear import lookup_linear
        from octavo_linear_triton.kernels.partials import add_partials, make_partials

        weight, made = self.weights[index], ProductConfig(**config)
        codes = weight.codes
        splits = most_splits(self._capability, made, self._x, codes.out_features)
        partials = make_partials(self._x, codes.out_features, codes.num_blocks, splits, num_others=0)
        if isinstance(weight, PackedAffine):
            affine_linear(self._x, weight, partials, made)
        else:
            lookup_linear(self._x, weight, partials, made)
        return add_partials(partials, None, self._x.dtype)


def random_weight(case: Case, shape: Shape, device: str) -> PackedAffine | PackedLookup:
    """Of random codes, packed as they are made: unpacked ones would take eight times the memory."""
    inputs, outputs = shape
    bits = case.when["bits"]
    blocks = num_blocks(bits, inputs)
    places = blocks * block_inputs(bits)
    order = None
    if places != inputs:
        order = torch.arange(places, dtype=torch.int32, device=device)
        order[inputs:] = -1
    words = torch.randint(-(2**31), 2**31, (blocks, outputs, 16), dtype=torch.int64, device=device).int()
    codes = PackedCodes(bits=bits, in_features=inputs, words=words, order=order)
    if case.kernel == "lookup_linear":
        return PackedLookup(
            codes=codes, table=torch.randn(outputs, 2**bits, device=device).to(case.dtype), outliers=None
        )
    run = math.gcd(block_inputs(bits), _GROUP_SIZE)
    rows, code_dtype = inputs // _GROUP_SIZE, code_dtype_for(bits, case.dtype, interpreted=False)
    return PackedAffine(
        codes=codes,
        scales=torch.rand(rows, outputs, device=device).half(),
        zeros=torch.full((rows, outputs), float(bias_of(code_dtype)), device=device).to(code_dtype),
        num_runs=block_inputs(bits) // run,
        runs_per_row=_GROUP_SIZE // run,
        code_dtype=code_dtype,
    )


def _key(when: Mapping[str, int]) -> frozenset[tuple[str, int]]:
    return frozenset(when.items())


if __name__ == "__main__":
    sys.exit(main())
