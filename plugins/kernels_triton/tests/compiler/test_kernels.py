"""What the kernels cost, compiled ahead of time through the kernel set as the engine calls it.

python scripts/kernel_table.py kernels_triton    # writes table.json anew
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import iter_modules

import pytest
import torch
import triton

from octavo.interfaces import Activation, SamplingInputs
from octavo.plugins.specs import Need
from octavo.testing import CompiledKernel, check_against_table, compiling
from octavo_kernels_triton import kernels
from octavo_kernels_triton.kernel_set import TritonKernels

TABLE = Path(__file__).parent / "table.json"
CAPABILITIES = (80, 90)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One model: the sizes that its small operations have. `head_norm`: queries are normalised, a head at a time."""

    hidden_size: int
    intermediate_size: int
    vocab_size: int
    activation: Activation = "silu"
    dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype = torch.bfloat16
    head_norm: tuple[int, int] | None = None


CASES = {
    "Llama-3-8B": Case(hidden_size=4096, intermediate_size=14336, vocab_size=128256),
    "Llama-3-8B in float16": Case(
        hidden_size=4096,
        intermediate_size=14336,
        vocab_size=128256,
        dtype=torch.float16,
        weight_dtype=torch.float16,
    ),
    "Llama-3-8B in float32": Case(
        hidden_size=4096,
        intermediate_size=14336,
        vocab_size=128256,
        dtype=torch.float32,
        weight_dtype=torch.float32,
    ),
    "Llama-3-70B": Case(hidden_size=8192, intermediate_size=28672, vocab_size=128256),
    "Qwen3-0.6B, heads normalised": Case(
        hidden_size=1024, intermediate_size=3072, vocab_size=151936, head_norm=(16, 128)
    ),
    "Gemma-2-2B, weights of norms in float32": Case(
        hidden_size=2304, intermediate_size=9216, vocab_size=256000, activation="gelu_tanh", weight_dtype=torch.float32
    ),
    "a vocabulary of odd size": Case(hidden_size=768, intermediate_size=3072, vocab_size=50257),
}


def launch(case: Case, numbers_of_tokens: Sequence[int] = (3,)) -> None:
    """What a model of these sizes launches in a step, for each number of tokens."""
    kernel_set = TritonKernels(Need(device="cuda", dtype=str(case.dtype).removeprefix("torch.")))
    weight = torch.ones(case.hidden_size, dtype=case.weight_dtype)
    for num_tokens in numbers_of_tokens:
        hidden = torch.zeros(num_tokens, case.hidden_size, dtype=case.dtype)
        kernel_set.add_rms_norm(hidden, None, weight, 1e-5)
        kernel_set.add_rms_norm(hidden, hidden, weight, 1e-5)
        if case.head_norm is not None:
            num_heads, head_dim = case.head_norm
            stacked = torch.zeros(num_tokens, 3 * num_heads, head_dim, dtype=case.dtype)
            kernel_set.add_rms_norm(stacked[:, :num_heads], None, weight[:head_dim], 1e-5)
        stacked = torch.zeros(num_tokens, 2 * case.intermediate_size, dtype=case.dtype)
        kernel_set.gated_activation(case.activation, *stacked.chunk(2, dim=1))
        logits = torch.zeros(num_tokens, case.vocab_size, dtype=case.dtype)
        for is_greedy, is_limited in ((True, False), (False, False), (False, True)):
            kernel_set.sample(logits, sampling_inputs(num_tokens, is_greedy=is_greedy, is_limited=is_limited))


def sampling_inputs(num_samples: int, *, is_greedy: bool, is_limited: bool) -> SamplingInputs:
    def column(dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(num_samples + 1, dtype=dtype)[1:]  # where a batch's slice begins is nowhere in particular

    return SamplingInputs(
        temperature=column(torch.float32),
        top_p=column(torch.float32),
        min_p=column(torch.float32),
        top_k=column(torch.int32),
        seed=column(torch.int64),
        sample_index=column(torch.int32),
        position=column(torch.int32),
        all_greedy=is_greedy,
        any_top_k=is_limited,
        any_top_p=is_limited,
        any_min_p=is_limited,
    )


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
    assert len(names) > 3
    assert {kernel.name for kernel in compiled} == names


def test_no_step_compiles_a_kernel_anew() -> None:
    with compiling(90) as compiled:
        launch(CASES["Qwen3-0.6B, heads normalised"])
        before = Counter(kernel.name for kernel in compiled)
        launch(CASES["Qwen3-0.6B, heads normalised"], (1, 2, 15, 16, 17, 33, 48))
    assert Counter(kernel.name for kernel in compiled) == before


def test_norms_and_activations_leave_room_for_most_warps_of_a_multiprocessor(compiled: list[CompiledKernel]) -> None:
    """They wait for memory and nothing else, and other warps are what hides that."""
    memory_bound = [kernel for kernel in compiled if kernel.name in ("add_rms_norm_kernel", "gated_activation_kernel")]
    assert len(memory_bound) > 10
    assert [f"{kernel}: {kernel.occupancy}" for kernel in memory_bound if kernel.occupancy < 0.5] == []
