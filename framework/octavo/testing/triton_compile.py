"""Triton kernels compiled ahead of time, through their own launchers, on a machine without a GPU.

    with compiling(capability=90) as compiled:
        write_kv(key, value, kv_cache, slot_mapping)  # CPU tensors; nothing runs
    check_against_table(Path(__file__).parent / "table.json", compiled)

It finds what Triton's interpreter cannot: a kernel that does not compile, spills registers, asks for more shared memory
than a block may have (which Triton itself says only at the launch), or lost its tensor core instructions. Triton is
imported when it is used, and the tools that read a binary are those in Triton's own wheel.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class _Limits:
    """What one multiprocessor has, and how much of it a block may take."""

    shared_bytes_per_block: int
    shared_bytes: int
    warps: int
    blocks: int


_DATACENTER = 227 * 1024
_CONSUMER = _Limits(shared_bytes_per_block=99 * 1024, shared_bytes=100 * 1024, warps=48, blocks=24)

# Source: CUDA C++ Programming Guide, "Compute Capabilities", technical specifications per compute capability.
_LIMITS = {
    80: _Limits(shared_bytes_per_block=163 * 1024, shared_bytes=164 * 1024, warps=64, blocks=32),
    86: dataclasses.replace(_CONSUMER, blocks=16),
    89: _CONSUMER,
    90: _Limits(shared_bytes_per_block=_DATACENTER, shared_bytes=228 * 1024, warps=64, blocks=32),
    100: _Limits(shared_bytes_per_block=_DATACENTER, shared_bytes=228 * 1024, warps=64, blocks=32),
    120: _CONSUMER,
}
_REGISTERS = 65536
"""32-bit registers of one multiprocessor, on all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledKernel:
    """One variant of a kernel, compiled for one GPU: what it is, and what it costs.

    Attributes:
        name: the kernel function's name.
        capability: the GPU's compute capability, 10 * major + minor: 80 is an A100, 90 an H100 or H200.
        constants: the compile-time constants, as "BLOCK=64 DOT=bf16"; an integer argument that is 1 is one too.
        arguments: the other arguments by type, as "*bf16%16(key value) i32(num_tokens)"; %16 says that the compiler
            counts on a multiple of 16 (bytes of an address).
        num_warps: warps of one block; a warp is 32 threads.
        num_stages: of software pipelining.
        registers: 32-bit registers of each thread.
        stack_bytes: of each thread, in local memory: not 0 when registers spill or an array is indexed at run time.
        spill_loads, spill_stores: instructions that read and write local memory.
        shared_bytes: shared memory of one block.
        has_wgmma: uses Hopper's asynchronous warp group matrix instructions; a tile of fewer than 64 rows cannot.
        has_mma: uses the tensor core instructions of one warp.
        has_async_copy: copies from global to shared memory without passing through registers.
    """

    name: str
    capability: int
    constants: str
    arguments: str
    num_warps: int
    num_stages: int
    registers: int
    stack_bytes: int
    spill_loads: int
    spill_stores: int
    shared_bytes: int
    has_wgmma: bool
    has_mma: bool
    has_async_copy: bool

    def __str__(self) -> str:
        launched = f"{self.num_warps} warps, {self.num_stages} stages"
        return f"{self.name} for sm_{self.capability} [{self.constants}; {launched}; {self.arguments}]"

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that fit on a multiprocessor at once; 0 when one does not."""
        limits = _LIMITS[self.capability]
        if self.shared_bytes > limits.shared_bytes_per_block:
            return 0
        # Registers are given to a warp in units of 256, and warps to a block in fours; a block costs 1 KiB for itself.
        registers = _round_up(self.registers * 32, 256) * _round_up(self.num_warps, 4)
        shared_bytes = self.shared_bytes + 1024
        fitting = (_REGISTERS // registers, limits.shared_bytes // shared_bytes, limits.warps // self.num_warps)
        return min(limits.blocks, *fitting)

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's warps that this kernel can keep there, 0..1."""
        return self.blocks_per_sm * self.num_warps / _LIMITS[self.capability].warps

    def faults(self) -> list[str]:
        """What no kernel may do, in sentences: use a stack, or more shared memory than a block may have."""
        limit = _LIMITS[self.capability].shared_bytes_per_block
        found = []
        if self.stack_bytes:
            spills = f"{self.spill_loads} loads, {self.spill_stores} stores"
            found.append(f"has a stack of {self.stack_bytes} bytes a thread, and spills: {spills}")
        if self.shared_bytes > limit:
            found.append(f"wants {self.shared_bytes} bytes of shared memory, a block may have {limit}")
        return found


# -------------------------------------------------------------------------------------------------- compiling


@contextmanager
def compiling(capability: int) -> Iterator[list[CompiledKernel]]:
    """Inside, every launch of a Triton kernel compiles it for a GPU of this capability, and does not run it.

    Launchers are called as always, with tensors of any device: what a kernel is specialised on (constants, dtypes,
    arguments that are 1 or multiples of 16) comes out as on the GPU. Outputs stay as they were allocated. A launcher
    must not ask torch.cuda for anything; `triton.runtime.driver.active.get_current_target().arch` is the capability.
    Compiled kernels are kept in Triton's cache on disk. It changes Triton for the whole process until it ends, so
    blocks neither nest nor run in several threads.

    Args:
        capability: compute capability, 10 * major + minor, such as 80 or 90.

    Yields:
        A list that grows with each new variant, in the order of the launches.

    Raises:
        ValueError: this module does not know a GPU of that capability.
        ModuleNotFoundError: Triton is not installed.
        RuntimeError: TRITON_INTERPRET is set; or, at a launch, the kernel does not compile, with its name and why.
    """
    if capability not in _LIMITS:
        raise ValueError(f"No GPU of capability {capability} is known here; known: {', '.join(map(str, _LIMITS))}.")
    jit_function, driver = _triton()
    run, drivers = jit_function.run, dict(vars(driver))
    compiled: list[CompiledKernel] = []

    @functools.wraps(run)
    def compile_only(kernel: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> Any:
        try:
            result = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        # Whatever the compiler raises, from a type error to a failed pass: its cause is chained, the name is added.
        except Exception as error:
            message = f"Kernel {kernel.__name__} does not compile for sm_{capability}: {error}"
            raise RuntimeError(message) from error
        variant = _describe(result, capability)
        if variant not in compiled:
            compiled.append(variant)
        return result

    jit_function.run = compile_only
    driver.set_active(_NoDevice(capability))
    try:
        yield compiled
    finally:
        jit_function.run = run
        vars(driver).update(drivers)


class _NoDevice:
    """What Triton asks of a driver in order to compile, answered for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> object:
        return self.target

    def get_current_device(self) -> str:
        """Not a number: Triton keeps compiled kernels by device, and they must not meet those of a real one."""
        return f"sm_{self.target.arch}, compile only"

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        """For kernels that are autotuned: compiles each configuration, and finds all equally fast."""

        def compile_once(kernel_call: Any, *, quantiles: list[float], **kwargs: object) -> list[float]:
            kernel_call()
            return [0.0 for _ in quantiles]

        return compile_once


def _triton() -> tuple[Any, Any]:
    """Triton's class of compiled functions and its choice of a driver."""
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes"):
        raise RuntimeError(
            f"TRITON_INTERPRET is {os.environ['TRITON_INTERPRET']!r}: kernels of this process are interpreted, and "
            f"cannot be compiled as well. Unset it, and run the interpreter's tests in a process of their own."
        )
    try:
        runtime = importlib.import_module("triton.runtime")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Kernels are compiled with Triton, and importing it failed: {error}. `pip install triton` brings it, "
            f"on Linux without a GPU too."
        ) from error
    return runtime.JITFunction, runtime.driver


# --------------------------------------------------------------------------------------- reading what came out


def _describe(kernel: Any, capability: int) -> CompiledKernel:
    source, metadata, ptx = kernel.src, kernel.metadata, kernel.asm["ptx"]
    constants, arguments = _specialisation(source)
    return CompiledKernel(
        name=source.fn.__name__,
        capability=capability,
        constants=constants,
        arguments=arguments,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        shared_bytes=metadata.shared,
        has_wgmma="wgmma.mma_async" in ptx,
        has_mma=re.search(r"(?<![\w.])mma\.sync", ptx) is not None,
        has_async_copy="cp.async" in ptx,
        **_resources(kernel.asm["cubin"]),
    )


def _specialisation(source: Any) -> tuple[str, str]:
    """A variant's compile-time constants and its other arguments, as text."""
    names = source.fn.arg_names
    # Both are by the argument's place, and a place within it for what is inside a tuple.
    constants = {
        ".".join([names[path[0]], *map(str, path[1:])]): value for path, value in sorted(source.constants.items())
    }
    divisible = {names[path[0]] for path, attributes in source.attrs.items() if attributes}
    by_type = defaultdict[str, list[str]](list)
    for name, type_name in source.signature.items():
        if type_name != "constexpr":
            by_type[f"{type_name}{'%16' if name in divisible else ''}"].append(name)
    return (
        " ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in constants.items()),
        " ".join(f"{type_name}({' '.join(arguments)})" for type_name, arguments in by_type.items()),
    )


@functools.cache
def _resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and spills of a compiled kernel, read from its binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = dict(re.findall(r"(\w+):(\d+)", _tool("cuobjdump", "-res-usage", file.name)))
        stack_bytes = int(usage["STACK"]) + int(usage["LOCAL"])
        # Disassembling takes as long as compiling, and what has no stack has nowhere to spill to.
        code = _tool("nvdisasm", file.name) if stack_bytes else ""
    return {
        "registers": int(usage["REG"]),
        "stack_bytes": stack_bytes,
        "spill_loads": len(re.findall(r"\bLDL\b", code)),
        "spill_stores": len(re.findall(r"\bSTL\b", code)),
    }


def _tool(name: str, *arguments: str) -> str:
    """What one of the CUDA tools of Triton's wheel prints."""
    folder = Path(importlib.import_module("triton").__path__[0]) / "backends" / "nvidia" / "bin"
    return subprocess.run([folder / name, *arguments], check=True, capture_output=True, text=True).stdout


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


# -------------------------------------------------------------------------------------------------- the table

_IDENTITY = ("name", "capability", "constants", "arguments", "num_warps", "num_stages")


def check_against_table(path: Path, compiled: Iterable[CompiledKernel]) -> None:
    """Hold kernels to the hard limits, and to the numbers that were committed for them.

    A number that got better is a difference too: whoever changes a kernel writes the table anew and commits it. Other
    versions of Triton give other numbers, so under another one than the table's only the hard limits are checked.

    Args:
        path: of a table that `write_table` wrote.
        compiled: every variant that the table should have, of all capabilities.

    Raises:
        AssertionError: a kernel has faults, its numbers are not the table's, or the table has more or fewer variants;
            the message lists all of it, numbers as old -> new.
        FileNotFoundError: there is no table yet.
    """
    rows = _rows(compiled)
    faults = _faults(rows)
    table = json.loads(path.read_text())
    if table["triton"] == importlib.import_module("triton").__version__:
        faults += _differences({_key(row): row for row in table["kernels"]}, rows)
    if faults:
        raise AssertionError(f"{len(faults)} faults against {path}:\n" + "\n".join(faults))


def write_table(path: Path, compiled: Iterable[CompiledKernel]) -> None:
    """Write a table of kernels, one variant a line, sorted: JSON to be committed.

    Args:
        path: the file; an older table is replaced.
        compiled: every variant, of all capabilities; the same one twice is one row.

    Raises:
        ValueError: a kernel has faults, so that no table could allow it; the message lists all of them.
    """
    rows = _rows(compiled)
    if faults := _faults(rows):
        raise ValueError("These kernels cannot be used, and so are in no table:\n" + "\n".join(faults))
    version = importlib.import_module("triton").__version__
    lines = ",\n".join(f"  {json.dumps(_row(kernel))}" for _, kernel in sorted(rows.items()))
    path.write_text(f'{{\n"triton": {json.dumps(version)},\n"kernels": [\n{lines}\n]\n}}\n')


def _row(kernel: CompiledKernel) -> dict[str, object]:
    return dataclasses.asdict(kernel) | {
        "blocks_per_sm": kernel.blocks_per_sm,
        "occupancy": round(kernel.occupancy, 3),
    }


def _key(row: dict[str, object]) -> tuple[object, ...]:
    return tuple(row[field] for field in _IDENTITY)


def _rows(compiled: Iterable[CompiledKernel]) -> dict[tuple[object, ...], CompiledKernel]:
    """Kernels by what identifies them."""
    rows = dict[tuple[object, ...], CompiledKernel]()
    for kernel in compiled:
        if rows.setdefault(_key(_row(kernel)), kernel) != kernel:
            raise ValueError(f"Two different kernels are {kernel}; give one of them another name.")
    return rows


def _faults(rows: dict[tuple[object, ...], CompiledKernel]) -> list[str]:
    return [f"{kernel} {fault}" for kernel in rows.values() for fault in kernel.faults()]


def _differences(
    old: dict[tuple[object, ...], dict[str, object]], new: dict[tuple[object, ...], CompiledKernel]
) -> Iterator[str]:
    for key, kernel in new.items():
        if key not in old:
            yield f"{kernel}: not in the table"
            continue
        row, was = _row(kernel), old[key]
        if changed := [f"{field} {was.get(field)} -> {row[field]}" for field in row if row[field] != was.get(field)]:
            yield f"{kernel}: {', '.join(changed)}"
    yield from (f"in the table, but not compiled: {key}" for key in old.keys() - new.keys())
