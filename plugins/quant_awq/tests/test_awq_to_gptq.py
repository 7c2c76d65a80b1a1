"""An AWQ checkpoint says in GPTQ's layout what it says in its own: one family of kernels serves both."""

from __future__ import annotations

import numpy as np
import torch
from awq_layers import GEMM_ORDER, Array, make_method, pack
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.interfaces import AffineWeight, LinearShape, StoredLinear
from octavo.packing import pack_columns, pack_rows


def read_gptq(words: Array, along: int) -> Array:
    """4-bit fields of unsigned words along an axis, the lowest first, as GPTQ's tools define them."""
    fields = [(words.view(np.uint32) >> np.uint32(4 * i)) & np.uint32(15) for i in range(8)]
    stacked = np.stack(fields, axis=along + 1)
    shape = list(words.shape)
    shape[along] *= 8
    return stacked.reshape(shape)


def read_awq(codes: Array, zeros: Array, group_size: int) -> AffineWeight:
    (in_features, out_features), num_groups = codes.shape, zeros.shape[0]
    method = make_method({"group_size": group_size, "version": "gemm"}, {})
    return method.weight(
        StoredLinear(
            prefix="",
            shape=LinearShape(in_features=in_features, out_features=out_features),
            tensors={
                "qweight": pack(codes, GEMM_ORDER),
                "qzeros": pack(zeros, GEMM_ORDER),
                "scales": torch.ones(num_groups, out_features, dtype=torch.float16),
            },
        )
    )


@settings(max_examples=40, deadline=None)
@given(
    group_size=st.sampled_from([8, 16, 32, 64]),
    num_groups=st.integers(1, 5),
    words=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_gemm_becomes_gptq_v2_without_loss(group_size: int, num_groups: int, words: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (group_size * num_groups, 8 * words))
    zeros = rng.integers(0, 16, (num_groups, 8 * words))
    weight = read_awq(codes, zeros, group_size)
    assert weight.zeros is not None
    qweight, qzeros = pack_rows(weight.codes.T, 4), pack_columns(weight.zeros, 4)
    assert np.array_equal(read_gptq(qweight.numpy(), along=0), codes)
    assert np.array_equal(read_gptq(qzeros.numpy(), along=1), zeros)


def test_gemm_zero_of_0_is_kept() -> None:
    codes, zeros = np.full((8, 8), 15), np.zeros((1, 8), dtype=np.int64)
    weight = read_awq(codes, zeros, 8)
    assert weight.zeros is not None
    assert read_gptq(pack_columns(weight.zeros, 4).numpy(), along=1).max() == 0
    assert torch.equal(weight.dequantize(), torch.full((8, 8), 15.0))
