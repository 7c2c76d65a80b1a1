"""What the kernels cost, compiled ahead of time through both backends, for the GPUs that have a configuration.

python scripts/kernel_table.py attention_triton    # writes table.json anew
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import iter_modules

import pytest
import torch
import triton

from octavo.interfaces import AttentionBackend, AttentionParameters, BatchLimits
from octavo.plugins.specs import AttentionNeed
from octavo.testing import CompiledKernel, check_against_table, compiling
from octavo.testing.paged_scene import PagedScene, Row
from octavo_attention_triton import kernels
from octavo_attention_triton.flash import TritonFlash
from octavo_attention_triton.paged import PagedOptions, TritonPaged
from octavo_attention_triton.tuned import CONFIGS

TABLE = Path(__file__).parent / "table.json"
LIMITS = {"max_num_requests": 256, "max_num_tokens": 2048, "max_model_len": 8192}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One model on one kind of cache. `rotary_dim` 0: its positions are not rotated."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    dtype: str = "bfloat16"
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    logit_softcap: float | None = None

    @property
    def capabilities(self) -> tuple[int, ...]:
        """Of the GPUs to compile for: converting e4m3 takes 8.9, so an A100 has no fp8 cache."""
        return (90,) if self.kv_cache_dtype == "fp8" else (80, 90)

    def need(self) -> AttentionNeed:
        return AttentionNeed(
            device="cuda",
            dtype=self.dtype,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
            logit_softcap=self.logit_softcap,
            kv_cache_dtype=self.kv_cache_dtype,
        )


LLAMA_3_8B = Case(num_heads=32, num_kv_heads=8, head_dim=128, rotary_dim=128)
QWEN_2 = Case(num_heads=14, num_kv_heads=2, head_dim=64, rotary_dim=64)
GEMMA_2 = Case(num_heads=8, num_kv_heads=4, head_dim=256, rotary_dim=256, logit_softcap=50.0)

CASES = {
    "Llama-3-8B": LLAMA_3_8B,
    "Llama-3-8B, positions not rotated": replace(LLAMA_3_8B, rotary_dim=0),
    "Llama-2-7B, no groups, in float16 in blocks of 64": replace(
        LLAMA_3_8B, num_kv_heads=32, dtype="float16", block_size=64
    ),
    "Llama-3-8B in float32": replace(LLAMA_3_8B, dtype="float32"),
    "Llama-3-8B, fp8": replace(LLAMA_3_8B, kv_cache_dtype="fp8"),
    "Llama-3-70B, groups of 8 in blocks of 32": replace(LLAMA_3_8B, num_heads=64, block_size=32),
    "Qwen2-0.5B, head size 64": QWEN_2,
    "Qwen2-0.5B in float32": replace(QWEN_2, dtype="float32"),
    "Qwen2-0.5B, fp8": replace(QWEN_2, kv_cache_dtype="fp8"),
    "Phi-2, head size 80 rotated in part": Case(num_heads=32, num_kv_heads=32, head_dim=80, rotary_dim=32),
    "Gemma-2-2B, head size 256 and a cap": GEMMA_2,
    "Gemma-2-2B in float32": replace(GEMMA_2, dtype="float32"),
    "Gemma-2-2B, fp8": replace(GEMMA_2, kv_cache_dtype="fp8"),
    "Gemma-2-2B in float32, fp8": replace(GEMMA_2, dtype="float32", kv_cache_dtype="fp8"),
    "Gemma-3-1B, one KV head": Case(num_heads=4, num_kv_heads=1, head_dim=256, rotary_dim=256),
}

# (context, tokens to compute) of each request: a decode, a short prompt, a long one.
STEPS = [[(599, 1)], [(0, 8)], [(0, 600)]]


def launch(case: Case, steps: Sequence[Sequence[tuple[int, int]]] = STEPS) -> None:
    """These steps through each backend, decodes and prefills apart, as when another backend serves the others."""
    need = case.need()
    for backend in (TritonFlash(need), TritonPaged(need, options=PagedOptions())):
        state = backend.make_state(BatchLimits(**LIMITS, block_size=case.block_size, device="cpu"))
        for step in steps:
            scene = PagedScene(backend, need)
            rows = [Row(request=scene.request(start + count), start=start, end=start + count) for start, count in step]
            launch_step(case, backend, scene, state, rows)


def launch_step(case: Case, backend: AttentionBackend, scene: PagedScene, state: object, rows: list[Row]) -> None:
    batch = scene.batch(rows)
    border = batch.layout.num_decode_tokens
    # A window is an argument as any other: it changes nothing of what is compiled.
    parameters = AttentionParameters(scale=case.head_dim**-0.5, logit_softcap=case.logit_softcap)
    parts = [(batch.layout.decodes(), slice(0, border))] if border else []
    parts += [(batch.layout.prefills(), slice(border, None))] if border < batch.layout.num_tokens else []
    for layout, tokens in parts:
        backend.plan(layout, state)
        query, key, value = (tensor[tokens] for tensor in (batch.query, batch.key, batch.value))
        if case.rotary_dim:
            cos_sin = torch.zeros(2, layout.num_tokens, 1, case.rotary_dim, dtype=query.dtype).unbind()
            backend.rotate_and_forward(query, key, value, cos_sin, scene.cache, state, parameters)
        else:
            backend.forward(query, key, value, scene.cache, state, parameters)


def compile_all() -> Iterator[CompiledKernel]:
    """Every variant that the table has."""
    for capability in sorted({capability for case in CASES.values() for capability in case.capabilities}):
        with compiling(capability) as compiled:
            for case in CASES.values():
                if capability in case.capabilities:
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
    names = {one.__name__ for one in functions if isinstance(one, triton.JITFunction) and one.__name__[0] != "_"}
    assert len(names) > 3
    assert {kernel.name for kernel in compiled} == names


def test_prefill_of_16_bit_elements_uses_wgmma_on_hopper_at_every_head_size(compiled: list[CompiledKernel]) -> None:
    prefills = [kernel for kernel in compiled if kernel.name == "flash_prefill_kernel" and kernel.capability == 90]
    tensor_cores = [kernel for kernel in prefills if constants(kernel)["DOT"] != "fp32"]
    large = [kernel for kernel in tensor_cores if int(constants(kernel)["BLOCK_M"]) > 64]
    assert {constants(kernel)["HEAD_DIM"] for kernel in large} == {"64", "80", "128", "256"}
    assert [str(kernel) for kernel in large if not kernel.has_wgmma] == []


def test_attention_of_16_bit_elements_uses_tensor_cores_everywhere(compiled: list[CompiledKernel]) -> None:
    attention = [kernel for kernel in compiled if constants(kernel).get("DOT") in ("bf16", "fp16")]
    assert len(attention) > 20
    assert [str(kernel) for kernel in attention if not (kernel.has_mma or kernel.has_wgmma)] == []


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["flash_prefill", "paged_decode"])
def test_every_shipped_configuration_is_compiled(compiled: list[CompiledKernel], capability: int, name: str) -> None:
    entries = json.loads((CONFIGS / f"sm_{capability}.json").read_text())["kernels"][name]
    variants = [kernel for kernel in compiled if (kernel.name, kernel.capability) == (f"{name}_kernel", capability)]

    def tiles(kernel: CompiledKernel) -> dict[str, int]:
        sizes = {size.lower(): int(number) for size, number in constants(kernel).items() if size.startswith("BLOCK_")}
        return sizes | {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}

    def is_compiled(entry: dict[str, dict[str, int]]) -> bool:
        wanted = entry["config"] | {"block_dim": entry["when"]["head_dim"]}
        return any(wanted.items() <= tiles(kernel).items() for kernel in variants)

    assert entries
    assert [entry for entry in entries if not is_compiled(entry)] == []


def test_no_step_compiles_a_kernel_anew() -> None:
    with compiling(90) as compiled:
        launch(CASES["Llama-3-8B"])
        before = Counter(kernel.name for kernel in compiled)
        steps = [[(length, 1)] for length in (1, 15, 16, 17, 500, 1000)]
        steps += [[(0, length)] for length in (1, 2, 15, 16, 17, 33, 128, 700)]
        steps += [[(40, 1), (0, 7)], [(40, 1), (8, 1), (3, 1), (16, 33), (0, 5)], [(9, 1)] * 33]
        launch(CASES["Llama-3-8B"], steps)
    assert Counter(kernel.name for kernel in compiled) == before
    num_variants = {"write_kv": 1, "flash_prefill": 2, "paged_decode": 1, "merge_splits": 1}
    assert before == {f"{name}_kernel": number for name, number in num_variants.items()}
