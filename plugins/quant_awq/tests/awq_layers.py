"""Random linears as AWQ's tools store them, packed with numpy by the format's definition, not by the plugin's code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from octavo.interfaces import LinearKernels, LinearShape, TensorHeader
from octavo.testing import StoredWeight
from octavo_quant_awq.method import AWQMethod

Array = npt.NDArray[Any]

GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column, of eight, that each nibble of a gemm word holds, from the lowest bits up."""
NATURAL_ORDER = tuple(range(8))


def pack(values: Array, order: tuple[int, ...]) -> torch.Tensor:
    """[rows, columns] -> [rows, columns / 8] int32."""
    eights = values.astype(np.uint32).reshape(values.shape[0], -1, 8)
    words = sum(eights[:, :, column] << np.uint32(4 * nibble) for nibble, column in enumerate(order))
    return torch.from_numpy(np.asarray(words, dtype=np.uint32).view(np.int32))


def store(
    version: str,
    group_size: int,
    *,
    dtype: torch.dtype = torch.float16,
    zero_point: bool = True,
    bias: bool = False,
) -> Callable[[LinearShape, torch.Generator], StoredWeight]:
    """A maker of random linears of this kind."""

    def make(shape: LinearShape, generator: torch.Generator) -> StoredWeight:
        rng = np.random.default_rng(generator.initial_seed())
        size = shape.in_features if group_size == -1 else group_size
        num_groups = shape.in_features // size
        codes = rng.integers(0, 16, (shape.in_features, shape.out_features))
        zeros = rng.integers(0, 16, (num_groups, shape.out_features)) if zero_point else None
        scales = torch.from_numpy(rng.uniform(0.5, 1.5, (num_groups, shape.out_features)) / 64).to(dtype)
        tensors = store_gemm(codes, zeros, scales) if version == "gemm" else store_gemv(codes, zeros, scales, size)
        if bias:
            tensors["bias"] = torch.from_numpy(rng.standard_normal(shape.out_features)).half()
        return StoredWeight(tensors=tensors, weight=weight_of(codes, zeros, scales))

    return make


def weight_of(codes: Array, zeros: Array | None, scales: torch.Tensor) -> torch.Tensor:
    """codes [K, N], zeros and scales [G, N] -> [N, K] float32, row by row."""
    weight = np.empty(codes.shape, dtype=np.float32)
    inputs_of_a_group = codes.shape[0] // scales.shape[0]
    for k in range(codes.shape[0]):
        g = k // inputs_of_a_group
        zero = 8 if zeros is None else zeros[g]
        weight[k] = (codes[k] - zero).astype(np.float32) * scales[g].float().numpy()
    return torch.from_numpy(weight.T.copy())


def store_gemm(codes: Array, zeros: Array | None, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {"qweight": pack(codes, GEMM_ORDER), "scales": scales}
    return tensors if zeros is None else {**tensors, "qzeros": pack(zeros, GEMM_ORDER)}


def store_gemv(codes: Array, zeros: Array | None, scales: torch.Tensor, group_size: int) -> dict[str, torch.Tensor]:
    at_once = {32: 4, 64: 2}.get(group_size, 1)
    padded = -(-scales.shape[0] // (8 * at_once)) * 8 * at_once
    wide = torch.zeros(scales.shape[1], padded, dtype=scales.dtype)
    wide[:, : scales.shape[0]] = scales.T
    tensors = {"qweight": pack(codes.T, NATURAL_ORDER), "scales": wide}
    if zeros is not None:
        wide_zeros = np.zeros(wide.shape, dtype=np.int64)
        wide_zeros[:, : scales.shape[0]] = zeros.T
        tensors["qzeros"] = pack(wide_zeros, NATURAL_ORDER)
    return tensors


def make_method(config: Mapping[str, object], headers: Mapping[str, TensorHeader]) -> AWQMethod:
    return AWQMethod({"quant_method": "awq", **config}, torch.float32, "cpu", headers, LinearKernels({}))
