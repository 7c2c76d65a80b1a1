"""Random weights of every form, and the product in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.interfaces import AffineWeight, LookupWeight, sparse_rows


def affine(
    bits: int,
    in_features: int = 128,
    out_features: int = 24,
    group_size: int = 64,
    *,
    symmetric: bool = False,
    group_index: Tensor | None = None,
    seed: int = 0,
) -> AffineWeight:
    generator = torch.Generator().manual_seed(seed)
    num_groups = -(-in_features // group_size)
    zeros = torch.randint(0, 2**bits, (num_groups, out_features), generator=generator, dtype=torch.uint8)
    return AffineWeight(
        bits=bits,
        codes=torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8),
        scales=(torch.rand(num_groups, out_features, generator=generator) / 2**bits).half(),
        zeros=None if symmetric else zeros,
        group_size=group_size,
        group_index=group_index,
    )


def act_order(in_features: int, group_size: int, seed: int = 0) -> Tensor:
    """Groups in a random order, each of group_size inputs but the last."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randperm(in_features, generator=generator) // group_size).int()


def lookup(
    bits: int, in_features: int = 128, out_features: int = 24, *, density: float = 0.0, seed: int = 0
) -> LookupWeight:
    generator = torch.Generator().manual_seed(seed)
    outliers = torch.randn(out_features, in_features, generator=generator)
    outliers *= torch.rand(out_features, in_features, generator=generator) < density
    rows, columns = outliers.nonzero(as_tuple=True)
    num_in_rows = torch.bincount(rows, minlength=out_features)
    return LookupWeight(
        bits=bits,
        codes=torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8),
        table=torch.randn(out_features, 2**bits, generator=generator),
        outliers=sparse_rows(num_in_rows, columns, outliers[rows, columns], in_features) if density else None,
    )


def activations(num_tokens: int, in_features: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(num_tokens, in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)


TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of the largest error relative to the largest output: a lookup table and the output are rounded to the dtype."""


def assert_is_product(y: Tensor, x: Tensor, weight: AffineWeight | LookupWeight, bias: Tensor | None = None) -> None:
    wanted = x.double() @ weight.dequantize().double().T
    wanted += 0 if bias is None else bias.double()
    assert y.dtype == x.dtype
    assert y.shape == wanted.shape
    assert (y.double() - wanted).abs().max() <= TOLERANCES[x.dtype] * wanted.abs().max()
