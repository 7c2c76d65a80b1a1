"""What the kernels cost, compiled ahead of time through both linear kernels, for the GPUs that have a configuration.

python scripts/kernel_table.py linear_triton    # writes table.json anew
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import iter_modules

import pytest
import torch
import triton

from octavo.interfaces import AffineWeight, LookupWeight, sparse_rows
from octavo.testing import CompiledKernel, check_against_table, compiling
from octavo_linear_triton import kernels
from octavo_linear_triton.affine import TritonAffine
from octavo_linear_triton.lookup import TritonLookup
from octavo_linear_triton.tuned import CONFIGS, NUM_TOKENS

TABLE = Path(__file__).parent / "table.json"
CAPABILITIES = (80, 90)
DECODE = ("affine_linear_kernel", "lookup_linear_kernel", "outliers_linear_kernel", "add_partials_kernel")
EVERY_NUMBER = (*NUM_TOKENS, 2 * NUM_TOKENS[-1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One linear of a format. `group_size` None: a lookup weight; `act_order`: inputs are gathered."""

    bits: int
    group_size: int | None = None
    symmetric: bool = False
    act_order: bool = False
    dtype: torch.dtype = torch.bfloat16
    in_features: int = 4096
    out_features: int = 512
    with_bias: bool = False

    def weight(self) -> AffineWeight | LookupWeight:
        shape = self.out_features, self.in_features
        codes = torch.zeros(shape, dtype=torch.uint8)
        if self.group_size is None:
            columns = torch.arange(len(codes))
            outliers = sparse_rows(torch.ones_like(columns), columns, torch.ones(len(codes)), self.in_features)
            return LookupWeight(
                bits=self.bits, codes=codes, table=torch.zeros(len(codes), 2**self.bits), outliers=outliers
            )
        num_groups = -(-self.in_features // self.group_size)
        index = torch.arange(self.in_features, dtype=torch.int32).flip(0) // self.group_size
        return AffineWeight(
            bits=self.bits,
            codes=codes,
            scales=torch.zeros(num_groups, len(codes), dtype=torch.float16),
            zeros=None if self.symmetric else torch.zeros(num_groups, len(codes), dtype=torch.uint8),
            group_size=self.group_size,
            group_index=index if self.act_order else None,
        )


CASES = {
    "GPTQ, 4 bits, groups of 128": Case(bits=4, group_size=128, symmetric=True),
    "AWQ, 4 bits, groups of 128": Case(bits=4, group_size=128),
    "AWQ, 4 bits in float16": Case(bits=4, group_size=128, dtype=torch.float16),
    "AWQ, 4 bits in float32": Case(bits=4, group_size=128, dtype=torch.float32),
    "4 bits, groups of 64": Case(bits=4, group_size=64),
    "4 bits, groups of 32, act-order": Case(bits=4, group_size=32, act_order=True),
    "4 bits, groups of 128, act-order, a bias": Case(bits=4, group_size=128, act_order=True, with_bias=True),
    "8 bits, no groups": Case(bits=8, group_size=4096, symmetric=True),
    "8 bits, groups of 32 in float16": Case(bits=8, group_size=32, dtype=torch.float16),
    "3 bits, groups of 128": Case(bits=3, group_size=128),
    "2 bits, groups of 64": Case(bits=2, group_size=64),
    "4 bits, odd sizes": Case(bits=4, group_size=128, in_features=4100, out_features=333),
    "SqueezeLLM, 4 bits": Case(bits=4),
    "SqueezeLLM, 3 bits": Case(bits=3),
    "SqueezeLLM, 4 bits in float16": Case(bits=4, dtype=torch.float16),
    "SqueezeLLM, 4 bits in float32": Case(bits=4, dtype=torch.float32),
}


def launch(case: Case, numbers_of_tokens: Sequence[int] = EVERY_NUMBER) -> None:
    """Products with each number of tokens."""
    weight = case.weight()
    kind = TritonAffine if isinstance(weight, AffineWeight) else TritonLookup
    kernel = kind(case.dtype, "cuda")
    prepared = kernel.prepare(weight)
    bias = torch.zeros(case.out_features, dtype=case.dtype) if case.with_bias else None
    for num_tokens in numbers_of_tokens:
        kernel.apply(prepared, torch.zeros(num_tokens, case.in_features, dtype=case.dtype), bias)


def compile_all() -> Iterator[CompiledKernel]:
    """Every variant that the table has."""
    for capability in CAPABILITIES:
        with compiling(capability) as compiled:
            for case in CASES.values():
                launch(case)
        yield from compiled


def constants(kernel: CompiledKernel) -> dict[str, str]:
    return dict(constant.split("=") for constant in kernel.constants.split())


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
    assert len(names) > 6
    assert {kernel.name for kernel in compiled} == names


def test_decode_spills_nothing(compiled: list[CompiledKernel]) -> None:
    decodes = [kernel for kernel in compiled if kernel.name in DECODE]
    assert {kernel.name for kernel in decodes} == set(DECODE)
    assert [str(kernel) for kernel in decodes if kernel.stack_bytes or kernel.spill_loads or kernel.spill_stores] == []


def test_products_of_16_bit_activations_use_tensor_cores(compiled: list[CompiledKernel]) -> None:
    products = [kernel for kernel in compiled if constants(kernel).get("DOT") in ("bf16", "fp16")]
    assert len(products) > 40
    assert [str(kernel) for kernel in products if not (kernel.has_mma or kernel.has_wgmma)] == []


def test_products_of_16_tokens_and_more_use_wgmma_on_hopper(compiled: list[CompiledKernel]) -> None:
    products = [kernel for kernel in compiled if kernel.capability == 90 and kernel.name == "affine_linear_kernel"]
    batches = [
        kernel
        for kernel in products
        if constants(kernel)["DOT"] != "fp32" and int(constants(kernel)["BLOCK_TOKENS"]) >= 16
    ]
    assert len(batches) > 10
    assert [str(kernel) for kernel in batches if not kernel.has_wgmma] == []


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["affine_linear", "lookup_linear"])
def test_every_shipped_configuration_is_compiled(compiled: list[CompiledKernel], capability: int, name: str) -> None:
    entries = json.loads((CONFIGS / f"sm_{capability}.json").read_text())["kernels"][name]
    variants = [kernel for kernel in compiled if (kernel.name, kernel.capability) == (f"{name}_kernel", capability)]

    def is_compiled(entry: dict[str, dict[str, int]]) -> bool:
        wanted = {key: value for key, value in entry["config"].items() if key != "programs"}
        return any(wanted.items() <= sizes(kernel).items() for kernel in variants)

    def sizes(kernel: CompiledKernel) -> dict[str, int]:
        tiles = {key.lower(): int(value) for key, value in constants(kernel).items() if key.startswith("BLOCK_")}
        return tiles | {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}

    assert entries
    assert [entry for entry in entries if not is_compiled(entry)] == []


@pytest.mark.parametrize("name", ["AWQ, 4 bits, groups of 128", "SqueezeLLM, 4 bits"])
def test_no_number_of_tokens_compiles_a_kernel_that_a_power_of_two_did_not(name: str) -> None:
    with compiling(90) as compiled:
        launch(CASES[name], (1, 2, 4, *EVERY_NUMBER))
        before = Counter(kernel.name for kernel in compiled)
        launch(CASES[name], (3, 5, 7, 9, 15, 17, 31, 33, 48, 65, 100, 129, 500))
    assert Counter(kernel.name for kernel in compiled) == before
