"""Random linears as GPTQ's tools store them, packed with numpy by the format's definition, not by the plugin's code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from octavo.interfaces import LinearKernels, LinearShape, TensorHeader
from octavo.testing import StoredWeight
from octavo_quant_gptq.method import GPTQMethod

Array = npt.NDArray[Any]

_PLANES = {3: ((2, 0), (1, 2)), 5: ((4, 0), (1, 4)), 6: ((4, 0), (2, 4)), 7: ((4, 0), (2, 4), (1, 6))}
"""(bits, first bit) of each plane."""


def pack(codes: Array, bits: int, planar: bool = False) -> Array:
    """[n, columns] -> [words, columns] uint32, along the first axis."""
    if not planar or bits not in _PLANES:
        return _stream(codes, bits)
    padded = np.pad(codes, ((0, -len(codes) % 32), (0, 0)))
    words = [
        _stream((block >> first) % 2**width, width)
        for block in padded.reshape(-1, 32, codes.shape[1])
        for width, first in _PLANES[bits]
    ]
    return np.concatenate(words)


def _stream(codes: Array, bits: int) -> Array:
    """One stream of bits, the lowest first."""
    ones = (codes[:, None, :] >> np.arange(bits)[None, :, None]) & 1
    stream = ones.reshape(-1, codes.shape[1])
    stream = np.pad(stream, ((0, -len(stream) % 32), (0, 0))).astype(np.uint8)
    in_bytes = np.packbits(stream, axis=0, bitorder="little")
    return np.ascontiguousarray(in_bytes.T).view(np.uint32).T.copy()


def pack_zeros(zeros: Array, bits: int, format: str) -> Array:
    """[groups, outputs] -> [groups, words] uint32, as GPTQModel makes format gptq of gptq_v2."""
    planar = format == "gptq_p" or bits in (5, 6, 7)
    if format != "gptq":
        return pack(zeros.T, bits, planar).T
    if bits in (2, 4, 8):
        one_in_every_field = sum(1 << (bits * field) for field in range(32 // bits))
        return pack(zeros.T, bits).T - np.uint32(one_in_every_field)
    return pack((zeros.T - 1) % 2**bits, bits, planar).T


def words(packed: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(packed).view(np.int32))


@dataclass(frozen=True)
class Kind:
    """How a linear is quantized."""

    bits: int
    group_size: int
    format: str = "gptq"
    symmetric: bool = False
    act_order: bool = False
    dtype: torch.dtype = torch.float16
    bias: bool = False

    def __str__(self) -> str:
        words = [f"{self.bits} bits", self.format, f"groups of {self.group_size}", str(self.dtype)]
        named = {"symmetric": self.symmetric, "act-order": self.act_order, "bias": self.bias}
        return ", ".join([*words, *(name for name, has in named.items() if has)])

    @property
    def config(self) -> dict[str, object]:
        """Its quantization_config."""
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "checkpoint_format": self.format,
            "sym": self.symmetric,
            "desc_act": self.act_order,
        }

    def store(self, shape: LinearShape, generator: torch.Generator | None = None) -> StoredWeight:
        """A random linear of this kind."""
        rng = np.random.default_rng(0 if generator is None else generator.initial_seed())
        size = shape.in_features if self.group_size == -1 else self.group_size
        group_of: Array = np.arange(shape.in_features) // size
        groups = (group_of[-1] + 1, shape.out_features)
        if self.act_order:
            group_of = rng.permutation(group_of)
        zeros = np.full(groups, 2 ** (self.bits - 1)) if self.symmetric else rng.integers(0, 2**self.bits, groups)
        scales = torch.from_numpy(rng.uniform(0.5, 1.5, groups) / 2 ** (self.bits + 2)).to(self.dtype)
        codes = rng.integers(0, 2**self.bits, (shape.in_features, shape.out_features))
        planar = self.format == "gptq_p" or self.bits in (5, 6, 7)
        tensors = {
            "qweight": words(pack(codes, self.bits, planar)),
            "qzeros": words(pack_zeros(zeros, self.bits, self.format)),
            "scales": scales,
            "g_idx": torch.from_numpy(group_of.astype(np.int32)),
        }
        if self.bias:
            tensors["bias"] = torch.from_numpy(rng.standard_normal(shape.out_features)).half()
        weight = (codes - zeros[group_of]).astype(np.float32) * scales.float().numpy()[group_of]
        return StoredWeight(tensors=tensors, weight=torch.from_numpy(weight.T.copy()))


def make_method(config: Mapping[str, object], headers: Mapping[str, TensorHeader]) -> GPTQMethod:
    return GPTQMethod(config, torch.float32, "cpu", headers, LinearKernels({}))
