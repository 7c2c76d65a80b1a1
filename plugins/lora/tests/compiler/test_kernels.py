"""What the kernels cost, compiled ahead of time through the backend as layers call it.

python scripts/kernel_table.py lora    # writes table.json anew
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import iter_modules

import numpy as np
import pytest
import torch
import triton

from octavo.interfaces import LoraLimits, LoraPart
from octavo.testing import CompiledKernel, check_against_table, compiling
from octavo_lora import kernels
from octavo_lora.triton_backend import TritonLora

TABLE = Path(__file__).parent / "table.json"
CAPABILITIES = (80, 90)
EVERY_NUMBER = (16, 64, 512, 528, 2048)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One stacked linear and one embedding, and the positions."""

    in_features: int = 4096
    out_features: tuple[int, ...] = (4096,)
    max_lora_rank: int = 16
    dtype: torch.dtype = torch.bfloat16


CASES = {
    "one linear": Case(),
    "one linear in float16": Case(dtype=torch.float16),
    "one linear in float32": Case(dtype=torch.float32),
    "queries, keys and values": Case(out_features=(4096, 1024, 1024)),
    "queries, keys and values of rank 64": Case(out_features=(4096, 1024, 1024), max_lora_rank=64),
    "queries, keys and values in float32 of rank 64": Case(
        out_features=(4096, 1024, 1024), max_lora_rank=64, dtype=torch.float32
    ),
    "rank 8": Case(max_lora_rank=8),
    "rank 32": Case(max_lora_rank=32),
    "rank 256": Case(max_lora_rank=256),
    "odd sizes": Case(in_features=1001, out_features=(333, 77), max_lora_rank=5),
}


def launch(case: Case, numbers_of_rows: Sequence[int] = EVERY_NUMBER) -> None:
    """Each number of rows, all of one adapter."""
    backend = TritonLora(
        LoraLimits(
            max_loras=32,
            max_lora_rank=case.max_lora_rank,
            max_num_rows=max(EVERY_NUMBER),
            dtype=case.dtype,
            device="cpu",
        )
    )
    parts = [LoraPart(module="any", in_features=case.in_features, out_features=outs) for outs in case.out_features]
    linear = backend.linear(parts)
    embedding = backend.embedding(LoraPart(module="any", in_features=128, out_features=case.in_features))
    backend.allocate()
    for num_rows in numbers_of_rows:
        backend.plan(np.zeros(num_rows, np.int32))
        x = torch.zeros(num_rows, case.in_features, dtype=case.dtype)
        backend.apply(linear, x, x.new_zeros(num_rows, sum(case.out_features)))
        backend.apply_embedding(embedding, torch.zeros(num_rows, dtype=torch.int64), x)


def compile_all() -> Iterator[CompiledKernel]:
    """Every variant that the table has."""
    for capability in CAPABILITIES:
        with compiling(capability) as compiled:
            for case in CASES.values():
                launch(case)
        yield from compiled


@pytest.fixture(scope="module")
def compiled() -> list[CompiledKernel]:
    return list(compile_all())


def test_kernels_neither_spill_nor_cost_more_than_the_table_says(compiled: list[CompiledKernel]) -> None:
    check_against_table(TABLE, compiled)


def test_every_kernel_of_the_package_is_compiled(compiled: list[CompiledKernel]) -> None:
    modules = [importlib.import_module(f"{kernels.__name__}.{one.name}") for one in iter_modules(kernels.__path__)]
    functions = [function for module in modules for function in vars(module).values()]
    launched = [one for one in functions if isinstance(one, triton.JITFunction) and one.__name__.endswith("_kernel")]
    names = {one.__name__ for one in launched}
    assert names == {"shrink_kernel", "gather_kernel", "expand_kernel"}
    assert {kernel.name for kernel in compiled} == names


def test_products_of_16_bit_activations_use_tensor_cores(compiled: list[CompiledKernel]) -> None:
    sixteen = ("DOT=bf16", "DOT=fp16", "PRECISION=tf32")
    products = [kernel for kernel in compiled if any(constant in kernel.constants.split() for constant in sixteen)]
    assert len(products) > 20
    assert [str(kernel) for kernel in products if not (kernel.has_mma or kernel.has_wgmma)] == []


@pytest.mark.parametrize("name", ["queries, keys and values", "odd sizes"])
def test_no_number_of_rows_compiles_a_kernel_that_others_did_not(name: str) -> None:
    with compiling(90) as compiled:
        launch(CASES[name], (16, 2048))
        before = Counter(kernel.name for kernel in compiled)
        launch(CASES[name], (2, 3, 17, 100, 511, 513, 1000))
    assert before
    assert Counter(kernel.name for kernel in compiled) == before
