"""Measures tile sizes on this machine's GPU and writes configs/sm_<capability>.json.

    python -m octavo_linear_triton.tune [--kernel affine_linear] [--bits 4] [--out FILE]

Every case of the file is tried with every candidate that compiles without spilling; of these the one whose time,
the geometric mean over the case's shapes, is the least takes the case's entry. Cases that are left out keep theirs.
Needs a GPU, and what the tests need (`pip install octavo-linear-triton[test] pytest`).
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from octavo.plugins import tuned_data
from octavo.plugins.tuned_data import Config, TunedCase, Tuner, graph_seconds
from octavo_linear_triton.layout import (
    PackedAffine,
    PackedCodes,
    PackedLookup,
    bias_of,
    block_inputs,
    code_dtype_for,
    num_blocks,
)
from octavo_linear_triton.tuned import CONFIGS, ProductConfig, most_splits

Shape = tuple[int, int]

_SHAPES: tuple[Shape, ...] = ((4096, 4096), (4096, 14336), (14336, 4096))  # inputs, outputs: of Llama-3-8B
_GROUP_SIZE = 128
_COLD_BYTES = 256 * 2**20  # of weights between two uses of one: more than any L2 holds


@dataclass(frozen=True, kw_only=True, slots=True)
class Case(TunedCase[Shape]):
    """One entry of a file: a kernel and the "when" it is for."""

    @property
    def dtype(self) -> torch.dtype:
        return {16: torch.bfloat16, 32: torch.float32}[self.when["dtype_bits"]]

    def workloads(self) -> Sequence[Shape]:
        """Inputs and outputs of weights."""
        return _SHAPES

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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m octavo_linear_triton.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", help="only this kernel's cases")
    parser.add_argument("--bits", type=int, help="only cases of codes of so many bits")
    parser.add_argument("--out", type=Path, help="the file to write; by default the one that is read")
    options = parser.parse_args(arguments)

    def is_wanted(case: Case) -> bool:
        return options.kernel in (None, case.kernel) and options.bits in (None, case.when["bits"])

    return tuned_data.tune(CONFIGS, Case, _GPU, is_wanted, distribution="octavo-linear-triton", out=options.out)


class _GPU(Tuner[Case, Shape]):
    """Compiles and times candidates."""

    def __init__(self, capability: int) -> None:
        super().__init__(capability)
        self._prepared: tuple[object, _Products] | None = None

    def faults(self, case: Case, config: Config) -> list[str]:
        from octavo.testing import compiling  # here: what it needs is installed for tests

        try:
            with compiling(self.capability) as compiled:
                _Products(self.capability, case, (2048, 512), "cpu", num_weights=1).launch(config, 0)
        except RuntimeError as error:  # what the compiler says is the reason
            return [str(error)]
        return [fault for kernel in compiled for fault in kernel.faults()]

    def seconds(self, case: Case, shape: Shape, config: Config) -> float:
        """Of one product in a CUDA graph that goes through weights which the L2 does not hold all of."""
        if self._prepared is None or self._prepared[0] != (case, shape):
            self._prepared = None  # its memory first
            self._prepared = (case, shape), _Products(self.capability, case, shape, "cuda")
        products = self._prepared[1]
        return graph_seconds(lambda index: products.launch(config, index), len(products.weights))


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


if __name__ == "__main__":
    sys.exit(main())
