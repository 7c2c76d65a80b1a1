"""Any linear, stored by the format's definition, is read as the weight that was stored."""

from __future__ import annotations

import torch
from gptq_layers import Kind, make_method
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.interfaces import LinearShape, StoredLinear
from octavo.testing.stored_weight import PREFIX, headers_of


@settings(deadline=None)
@given(
    bits=st.integers(2, 8),
    format=st.sampled_from(["gptq", "gptq_v2", "gptq_p"]),
    group_size=st.one_of(st.just(-1), st.integers(1, 70)),
    in_features=st.integers(1, 130),
    out_features=st.integers(1, 70),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_linear_is_read_as_it_was_stored(
    *,
    bits: int,
    format: str,
    group_size: int,
    in_features: int,
    out_features: int,
    symmetric: bool,
    act_order: bool,
    seed: int,
) -> None:
    shape = LinearShape(in_features=in_features, out_features=out_features)
    kind = Kind(bits, group_size, format, symmetric=symmetric, act_order=act_order)
    stored = kind.store(shape, torch.Generator().manual_seed(seed))
    method = make_method(kind.config, headers_of(stored.tensors))
    declared = {spec.name: spec.shape for spec in method.parameters(PREFIX, shape)}
    assert declared == {name: tuple(tensor.shape) for name, tensor in stored.tensors.items()}
    found = method.dequantize(StoredLinear(prefix=PREFIX, shape=shape, tensors=stored.tensors))
    assert torch.equal(found, stored.weight)
