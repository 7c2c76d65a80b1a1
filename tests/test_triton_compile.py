# ruff: noqa: N803 - compile-time constants of kernels are upper case
"""Kernels compiled ahead of time: what is found in them, what is refused, and how a table's differences are told."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from octavo.testing import CompiledKernel, check_against_table, compiling, write_table

triton = pytest.importorskip("triton", reason="Triton is published for Linux only")
tl = pytest.importorskip("triton.language", reason="Triton is published for Linux only")


@triton.jit
def scale_kernel(x_ptr, out_ptr, factor, num_elements, BLOCK: tl.constexpr):
    """out[i] = factor * x[i]."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < num_elements).to(tl.float32)
    tl.store(out_ptr + index, x * factor, mask=index < num_elements)


@triton.jit
def matmul_kernel(a_ptr, b_ptr, out_ptr, k_size, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr):
    """out[r, c] = sum over k of a[r, k] * b[k, c], one tile."""
    rows, cols, inner = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, INNER)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, k_size, INNER):
        a = tl.load(a_ptr + rows[:, None] * k_size + start + inner[None, :])
        b = tl.load(b_ptr + (start + inner)[:, None] * COLS + cols[None, :])
        total += tl.dot(a, b)
    tl.store(out_ptr + rows[:, None] * COLS + cols[None, :], total)


@triton.jit
def misshapen_kernel(x_ptr, BLOCK: tl.constexpr):
    """Adds tiles that do not fit together."""
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32) + tl.zeros((2 * BLOCK,), tl.float32))


@triton.autotune([triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128})], key=["num_elements"])
@triton.jit
def tuned_kernel(x_ptr, num_elements, BLOCK: tl.constexpr):
    """x[i] = 0."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + index, tl.zeros((BLOCK,), tl.float32), mask=index < num_elements)


def scale(x: torch.Tensor, *, block: int = 128, num_warps: int = 4) -> torch.Tensor:
    """The launcher of scale_kernel, as a package would have it."""
    out = torch.zeros_like(x)
    scale_kernel[(triton.cdiv(x.numel(), block),)](x, out, 2.0, x.numel(), BLOCK=block, num_warps=num_warps)
    return out


def matmul(rows: int, cols: int, inner: int, *, num_warps: int, num_stages: int = 3) -> None:
    a, b = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((rows, 4 * inner), (4 * inner, cols)))
    out = torch.zeros(rows, cols)
    shape = {"ROWS": rows, "COLS": cols, "INNER": inner}
    matmul_kernel[(1,)](a, b, out, 4 * inner, **shape, num_warps=num_warps, num_stages=num_stages)


def compiled_scale(capability: int = 90) -> CompiledKernel:
    with compiling(capability) as compiled:
        scale(torch.ones(256))
    return compiled[0]


# -------------------------------------------------------------------------------------------------- compiling


def test_launcher_compiles_and_does_not_run() -> None:
    with compiling(90) as compiled:
        out = scale(torch.ones(256))
    assert [kernel.name for kernel in compiled] == ["scale_kernel"]
    assert out.tolist() == [0.0] * 256


@pytest.mark.parametrize("capability", [80, 90])
def test_simple_kernel_has_registers_and_no_faults(capability: int) -> None:
    kernel = compiled_scale(capability)
    assert kernel.capability == capability
    assert 0 < kernel.registers < 64
    assert (kernel.stack_bytes, kernel.spill_loads, kernel.spill_stores, kernel.shared_bytes) == (0, 0, 0, 0)
    assert kernel.faults() == []


def test_same_launch_is_one_variant_and_another_dtype_is_another() -> None:
    with compiling(90) as compiled:
        scale(torch.ones(256))
        scale(torch.ones(512))
        scale(torch.ones(256, dtype=torch.bfloat16))
    assert [kernel.arguments.partition(" ")[0] for kernel in compiled] == ["*fp32%16(x_ptr", "*bf16%16(x_ptr"]


def test_argument_off_alignment_is_a_variant_of_its_own_as_on_a_gpu() -> None:
    with compiling(90) as compiled:
        scale(torch.ones(256))
        scale(torch.ones(257)[1:])
    assert [kernel.arguments for kernel in compiled] == [
        "*fp32%16(x_ptr out_ptr) fp32(factor) i32%16(num_elements)",
        "*fp32(x_ptr) *fp32%16(out_ptr) fp32(factor) i32%16(num_elements)",
    ]


def test_integer_argument_of_one_is_a_constant_as_on_a_gpu() -> None:
    with compiling(90) as compiled:
        scale(torch.ones(1))
    assert compiled[0].constants == "num_elements=1 BLOCK=128"


def test_tile_of_64_rows_uses_wgmma_on_hopper_and_a_smaller_one_does_not() -> None:
    with compiling(90) as compiled:
        matmul(128, 64, 64, num_warps=8)
        matmul(16, 64, 64, num_warps=4)
    assert [(kernel.has_wgmma, kernel.has_mma) for kernel in compiled] == [(True, False), (False, True)]


def test_ampere_uses_the_tensor_cores_and_copies_asynchronously() -> None:
    with compiling(80) as compiled:
        matmul(64, 64, 32, num_warps=4)
    assert (compiled[0].has_wgmma, compiled[0].has_mma, compiled[0].has_async_copy) == (False, True, True)


def test_every_configuration_of_an_autotuned_kernel_is_compiled() -> None:
    with compiling(90) as compiled:
        tuned_kernel[(1,)](torch.ones(256), 256)
    assert [kernel.constants for kernel in compiled] == ["BLOCK=64", "BLOCK=128"]


# ----------------------------------------------------------------------------------------- what is out of bounds


def test_kernel_that_spills_is_reported_with_its_loads_and_stores() -> None:
    with compiling(90) as compiled:
        matmul(128, 256, 16, num_warps=1)
    assert compiled[0].stack_bytes > 0
    assert compiled[0].spill_loads > 0
    assert f"spills: {compiled[0].spill_loads} loads, {compiled[0].spill_stores} stores" in compiled[0].faults()[0]


def test_kernel_that_wants_too_much_shared_memory_is_reported_for_the_gpu_that_has_less() -> None:
    faults = dict[int, list[str]]()
    for capability in (80, 90):
        with compiling(capability) as compiled:
            matmul(128, 128, 64, num_warps=8, num_stages=7)
        faults[capability] = compiled[0].faults()
    assert faults[90] == []
    assert "shared memory, a block may have 166912" in faults[80][0]


def test_kernel_that_does_not_compile_raises_with_its_name() -> None:
    with compiling(90), pytest.raises(RuntimeError, match=r"Kernel misshapen_kernel does not compile for sm_90: "):
        misshapen_kernel[(1,)](torch.zeros(64), BLOCK=64)


def test_unknown_capability_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="capability 91 is known here; known: 80, 86, 89, 90"), compiling(91):
        pass


# ---------------------------------------------------------------------------------------------- what is left behind


def test_driver_is_restored_also_after_an_error() -> None:
    before = dict(vars(triton.runtime.driver)), triton.runtime.JITFunction.run
    with compiling(90):
        assert triton.runtime.driver.active.get_current_target().arch == 90
    with pytest.raises(RuntimeError), compiling(90):
        misshapen_kernel[(1,)](torch.zeros(64), BLOCK=64)
    assert (dict(vars(triton.runtime.driver)), triton.runtime.JITFunction.run) == before


def test_interpreter_is_refused_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET is '1'.*a process of their own"), compiling(90):
        pass


def test_missing_triton_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.runtime", None)
    with pytest.raises(ModuleNotFoundError, match="pip install triton"), compiling(90):
        pass


# -------------------------------------------------------------------------------------------------- occupancy

PLAIN = CompiledKernel(
    name="plain_kernel",
    capability=90,
    constants="BLOCK=64",
    arguments="*bf16%16(x_ptr)",
    num_warps=8,
    num_stages=3,
    registers=128,
    stack_bytes=0,
    spill_loads=0,
    spill_stores=0,
    shared_bytes=0,
    has_wgmma=False,
    has_mma=False,
    has_async_copy=False,
)


@pytest.mark.parametrize(
    ("changes", "blocks_per_sm"),
    [
        ({}, 2),  # 8 warps * 32 threads * 128 registers = 32768 of 65536
        ({"registers": 129}, 1),  # a warp's registers come in units of 256, that is, 136 a thread
        ({"registers": 16}, 8),  # 64 warps
        ({"registers": 16, "num_warps": 1}, 32),  # blocks
        ({"shared_bytes": 116 * 1024}, 1),  # 228 KiB, and 1 KiB of each block for itself
        ({"shared_bytes": 113 * 1024}, 2),
        ({"shared_bytes": 228 * 1024}, 0),
        ({"registers": 16, "capability": 89}, 6),  # 48 warps
    ],
)
def test_blocks_of_a_multiprocessor_are_limited_by_what_runs_out_first(
    changes: dict[str, int], blocks_per_sm: int
) -> None:
    kernel = dataclasses.replace(PLAIN, **changes)  # type: ignore[arg-type]
    assert kernel.blocks_per_sm == blocks_per_sm


def test_occupancy_is_the_share_of_warps() -> None:
    assert PLAIN.occupancy == 2 * 8 / 64


# -------------------------------------------------------------------------------------------------- the table


def test_table_that_was_just_written_agrees(tmp_path: Path) -> None:
    write_table(tmp_path / "table.json", [compiled_scale(90), compiled_scale(80), compiled_scale(90)])
    check_against_table(tmp_path / "table.json", [compiled_scale(80), compiled_scale(90)])


def test_table_has_a_line_for_each_variant_in_order(tmp_path: Path) -> None:
    kernels = [dataclasses.replace(PLAIN, name=name) for name in ("c", "a", "b")]
    write_table(tmp_path / "table.json", kernels)
    lines = (tmp_path / "table.json").read_text().splitlines()
    assert [line[:14] for line in lines if "name" in line] == ['  {"name": "a"', '  {"name": "b"', '  {"name": "c"']


def test_changed_numbers_are_told_with_the_old_and_the_new(tmp_path: Path) -> None:
    write_table(tmp_path / "table.json", [PLAIN])
    with pytest.raises(AssertionError, match=r"plain_kernel for sm_90 .*: registers 128 -> 96, shared_bytes 0 -> 512"):
        check_against_table(tmp_path / "table.json", [dataclasses.replace(PLAIN, registers=96, shared_bytes=512)])


def test_lost_tensor_core_instructions_are_a_difference(tmp_path: Path) -> None:
    write_table(tmp_path / "table.json", [dataclasses.replace(PLAIN, has_wgmma=True)])
    with pytest.raises(AssertionError, match="has_wgmma True -> False"):
        check_against_table(tmp_path / "table.json", [PLAIN])


def test_new_and_vanished_variants_are_told(tmp_path: Path) -> None:
    write_table(tmp_path / "table.json", [PLAIN])
    with pytest.raises(AssertionError) as caught:
        check_against_table(tmp_path / "table.json", [dataclasses.replace(PLAIN, num_warps=4)])
    assert "[BLOCK=64; 4 warps, 3 stages; *bf16%16(x_ptr)]: not in the table" in str(caught.value)
    assert "in the table, but not compiled: ('plain_kernel', 90" in str(caught.value)


def test_faults_are_told_also_when_the_table_has_them(tmp_path: Path) -> None:
    write_table(tmp_path / "table.json", [PLAIN])
    spilling = dataclasses.replace(PLAIN, stack_bytes=64, spill_loads=3, spill_stores=2)
    table = (tmp_path / "table.json").read_text().replace('"stack_bytes": 0', '"stack_bytes": 64')
    table = table.replace('"spill_loads": 0', '"spill_loads": 3').replace('"spill_stores": 0', '"spill_stores": 2')
    (tmp_path / "table.json").write_text(table)
    with pytest.raises(AssertionError, match=r"1 faults against .*\n.*spills: 3 loads, 2 stores"):
        check_against_table(tmp_path / "table.json", [spilling])


def test_kernel_with_faults_gets_no_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has a stack of 64 bytes"):
        write_table(tmp_path / "table.json", [dataclasses.replace(PLAIN, stack_bytes=64)])
    assert not (tmp_path / "table.json").exists()


def test_table_of_another_triton_checks_the_limits_only(tmp_path: Path) -> None:
    write_table(tmp_path / "table.json", [PLAIN])
    table = (tmp_path / "table.json").read_text().replace(triton.__version__, "0.0")
    (tmp_path / "table.json").write_text(table)
    check_against_table(tmp_path / "table.json", [dataclasses.replace(PLAIN, registers=96)])
    with pytest.raises(AssertionError, match="1 faults"):
        check_against_table(tmp_path / "table.json", [dataclasses.replace(PLAIN, stack_bytes=8)])


def test_two_kernels_that_the_table_could_not_tell_apart_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Two different kernels are plain_kernel"):
        write_table(tmp_path / "table.json", [PLAIN, dataclasses.replace(PLAIN, registers=96)])
