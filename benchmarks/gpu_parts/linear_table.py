"""Products with packed weights: against float64 first, then their time, and that of the same with plain weights.

A packed-byte roofline is the time in which the bytes of the packed weight are copied. Methods are what GPTQ, AWQ and
SqueezeLLM checkpoints ask of a linear kernel, with random codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from gpu_parts.kernel_table import time_copy
from gpu_parts.part import Part
from gpu_parts.scene import registry
from gpu_parts.timing import num_copies, seconds_of
from octavo.interfaces import AffineWeight, LinearKernel, LookupWeight, PackedWeight, sparse_rows
from octavo.plugins.specs import LinearKernelNeed

TOLERANCE = 8e-3
"""Largest error of y in bfloat16, as a share of |x| @ |W|.T; that of the conformance suite."""
ROOFLINE_TARGET = 0.6
"""Share of the roofline up to 16 tokens, of weights of 50 M elements or more."""
LARGE_TARGET, SMALL_TARGET = 2.5, 1.5
"""Times as fast as a plain linear at one token: of such weights, and of others."""
_LARGE = 50_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """What a checkpoint asks for. `group_size` None: codebooks, with outliers where `density` is not 0."""

    name: str
    bits: int
    group_size: int | None = None
    symmetric: bool = False
    act_order: bool = False
    density: float = 0.0

    @property
    def form(self) -> str:
        return "lookup" if self.group_size is None else "affine"

    def weight(self, inputs: int, outputs: int, device: str) -> PackedWeight:
        """Of random codes; a dequantised one is about 1 / sqrt(inputs)."""
        codes = torch.randint(0, 2**self.bits, (outputs, inputs), dtype=torch.uint8, device=device)
        if self.group_size is None:
            table = torch.randn(outputs, 2**self.bits, device=device) / inputs**0.5
            return LookupWeight(
                bits=self.bits, codes=codes, table=table, outliers=self._outliers(inputs, outputs, device)
            )
        num_groups = -(-inputs // self.group_size)
        scales = (torch.rand(num_groups, outputs, device=device) + 0.5) / (2**self.bits * inputs**0.5)
        zeros = torch.randint(0, 2**self.bits, (num_groups, outputs), dtype=torch.uint8, device=device)
        order = torch.randperm(inputs, device=device)
        return AffineWeight(
            bits=self.bits,
            codes=codes,
            scales=scales.half(),
            zeros=None if self.symmetric else zeros,
            group_size=self.group_size,
            group_index=(order // self.group_size).int() if self.act_order else None,
        )

    def _outliers(self, inputs: int, outputs: int, device: str) -> Tensor | None:
        if not self.density:
            return None
        per_row = max(int(self.density * inputs), 1)
        columns = torch.rand(outputs, inputs, device=device).topk(per_row, dim=1).indices.sort(dim=1).values.flatten()
        num_in_rows = torch.full((outputs,), per_row, device=device)
        return sparse_rows(num_in_rows, columns, torch.randn(len(columns), device=device) / inputs**0.5, inputs)


METHODS = (
    Method(name="GPTQ g128", bits=4, group_size=128, symmetric=True),
    Method(name="AWQ g128", bits=4, group_size=128),
    Method(name="SqueezeLLM 0.45 %", bits=4, density=0.0045),
    Method(name="GPTQ g128 act-order", bits=4, group_size=128, symmetric=True, act_order=True),
    Method(name="GPTQ g128", bits=8, group_size=128, symmetric=True),
    Method(name="GPTQ g128", bits=3, group_size=128, symmetric=True),
    Method(name="GPTQ g64 asymmetric", bits=2, group_size=64),
    Method(name="SqueezeLLM", bits=4),
    Method(name="SqueezeLLM 0.45 %", bits=3, density=0.0045),
)


def run(part: Part) -> None:
    size, seconds, _ = time_copy(part)
    bytes_per_second = 2 * size / seconds
    for (inputs, outputs), method in cases(part):
        what = f"{method.name}, {method.bits} bits, {inputs} x {outputs}"
        work = partial(_check_and_time, part, bytes_per_second, method, inputs, outputs)
        part.attempt(what, work, seconds=0 if part.tiny else 4)


def cases(part: Part) -> Iterator[tuple[tuple[int, int], Method]]:
    """Each method on a large and on a small weight, those most used first."""
    for method in METHODS[: part.choose(len(METHODS), 3, 3)]:
        for shape in part.choose(((4096, 14336), (4096, 4096)), ((4096, 14336), (4096, 4096)), ((128, 32),)):
            yield shape, method


def _check_and_time(part: Part, bytes_per_second: float, method: Method, inputs: int, outputs: int) -> None:
    need = LinearKernelNeed(device=part.device, dtype="bfloat16", form=method.form)
    spec = registry().select("linear_kernel", need, f"triton-{method.form}")
    kernel: LinearKernel = spec.build(torch.bfloat16, part.device)
    weight = method.weight(inputs, outputs, part.device)
    if reasons := kernel.why_not(weight.facts):
        part.not_run(f"{spec.name}: {method.name}", "; ".join(reasons))
        return
    plain = weight.dequantize().bfloat16()
    prepared = [kernel.prepare(weight) for _ in range(num_copies(kernel.num_bytes(weight.facts), part.tiny))]
    plains = [plain.clone() for _ in range(num_copies(plain.nbytes, part.tiny))]
    for num_tokens in part.choose((1, 4, 16, 64, 512), (1, 16, 512), (1, 17)):
        x = torch.randn(num_tokens, inputs, device=part.device).bfloat16()
        _check(part, spec.name, method, kernel.apply(prepared[0], x, None), x, weight)
        _time(part, bytes_per_second, spec.name, method, kernel, prepared, plains, weight, x)


def _check(part: Part, kernel: str, method: Method, y: Tensor, x: Tensor, weight: PackedWeight) -> None:
    """A row of the table of correctness; some tokens, for float64 is slow on a GPU."""
    x, y = x[:32].double(), y[:32].double()
    exact = weight.dequantize().double()
    error = float(((y - x @ exact.T).abs() / (x.abs() @ exact.abs().T)).max())
    case = f"{method.name}, {method.bits} bits, {len(x)} x {weight.facts.in_features} x {weight.facts.out_features}"
    part.add(
        "correctness",
        kernel=kernel,
        case=case,
        dtype="bfloat16",
        error=error,
        tolerance=TOLERANCE,
        ok=error <= TOLERANCE,
        fault="",
    )


def _time(
    part: Part,
    bytes_per_second: float,
    name: str,
    method: Method,
    kernel: LinearKernel,
    prepared: list[object],
    plains: list[Tensor],
    weight: PackedWeight,
    x: Tensor,
) -> None:
    facts = weight.facts
    seconds, how = seconds_of([partial(kernel.apply, one, x, None) for one in prepared], part.on_gpu)
    plain_seconds, _ = seconds_of([partial(functional.linear, x, one) for one in plains], part.on_gpu)
    dequantizes = [partial(_dequantize_and_multiply, one, x) for one in prepared]
    dequantize_seconds, _ = seconds_of(dequantizes, part.on_gpu)
    num_bytes = kernel.num_bytes(facts) + 2 * x.numel() + 2 * len(x) * facts.out_features
    share = num_bytes / (bytes_per_second * seconds)
    is_large = facts.in_features * facts.out_features >= _LARGE
    goals = [seconds <= 1.02 * dequantize_seconds]  # where it is what is done, they differ by noise
    if len(x) <= 16 and is_large:
        goals.append(share >= ROOFLINE_TARGET)
    if len(x) == 1:
        goals.append(plain_seconds / seconds >= (LARGE_TARGET if is_large else SMALL_TARGET))
    part.add(
        "linears",
        kernel=name,
        method=method.name,
        bits=method.bits,
        shape=f"{facts.in_features} x {facts.out_features}",
        tokens=len(x),
        us=seconds * 1e6,
        roofline_share=share,
        over_plain=plain_seconds / seconds,
        over_dequantize=dequantize_seconds / seconds,
        met=all(goals) if part.on_gpu else None,
        method_of_timing=how,
    )


def _dequantize_and_multiply(prepared: object, x: Tensor) -> Tensor:
    """What is done of many tokens, whatever their number."""
    from octavo_linear_triton.kernels.dequantize import dequantize  # here: it imports Triton

    return functional.linear(x, dequantize(prepared, x.dtype))
