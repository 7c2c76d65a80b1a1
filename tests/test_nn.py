"""The layers: linears alone and stacked, the norm and the rotation against transformers' own, the factory's names."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from octavo.builtin.torch_attention import TorchAttention
from octavo.builtin.unquantized import Unquantized
from octavo.errors import CheckpointError
from octavo.interfaces import LinearShape, ParameterSpec, QuantizationMethod
from octavo.model_config import RopeConfig
from octavo.nn.factory import DeviceLayerFactory
from octavo.nn.linear import Linear
from octavo.nn.rotary import RotaryTable, frequencies, rotate
from octavo.nn.weights import WeightLoader
from octavo.plugins.specs import AttentionNeed

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class ScaledMethod(QuantizationMethod):
    """Weights in int8 with a scale each row: two tensors a linear, and no stacking."""

    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        return (
            ParameterSpec(name="qweight", shape=(shape.out_features, shape.in_features), dtype=torch.int8),
            ParameterSpec(name="scale", shape=(shape.out_features, 1)),
        )

    def prepare(self, shape: LinearShape, parts: Sequence[Mapping[str, Tensor]]) -> Tensor:
        (tensors,) = parts
        return self.dequantize(shape, tensors)

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        assert isinstance(prepared, Tensor)
        return functional.linear(x, prepared, bias)

    def dequantize(self, shape: LinearShape, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["qweight"].float() * tensors["scale"]


def factory(method_class: type[QuantizationMethod] = Unquantized) -> tuple[DeviceLayerFactory, WeightLoader]:
    loader = WeightLoader()
    need = AttentionNeed(num_heads=2, num_kv_heads=2, head_dim=4, block_size=4)
    return DeviceLayerFactory(method_class({}, torch.float32, "cpu"), TorchAttention(need), loader), loader


# ------------------------------------------------------------------------------------------------------ linears


@pytest.mark.parametrize("bias", [False, True])
def test_stacked_linears_equal_separate_ones_in_whatever_order_tensors_come(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"q_proj": 8, "k_proj": 4, "v_proj": 4}
    tensors = {f"attn.{part}.weight": torch.randn(size, 16, generator=generator) for part, size in sizes.items()}
    if bias:
        tensors |= {f"attn.{part}.bias": torch.randn(size, generator=generator) for part, size in sizes.items()}
    x = torch.randn(5, 16, generator=generator)
    wanted = [functional.linear(x, tensors[f"attn.{part}.weight"], tensors.get(f"attn.{part}.bias")) for part in sizes]
    for order in list(permutations(tensors))[::37]:
        layers, loader = factory()
        stacked = layers.stacked_linear("attn", 16, sizes, bias=bias)
        loader.load((name, tensors[name]) for name in order)
        torch.testing.assert_close(list(stacked(x)), wanted)


def test_a_method_that_cannot_stack_gets_its_linears_one_by_one() -> None:
    layers, loader = factory(ScaledMethod)
    stacked = layers.stacked_linear("mlp", 3, {"gate_proj": 2, "up_proj": 1})
    loader.load(
        [
            ("mlp.up_proj.scale", torch.tensor([[0.5]])),
            ("mlp.gate_proj.qweight", torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int8)),
            ("mlp.up_proj.qweight", torch.tensor([[-2, 0, 2]], dtype=torch.int8)),
            ("mlp.gate_proj.scale", torch.tensor([[1.0], [10.0]])),
        ]
    )
    gate, up = stacked(torch.tensor([[1.0, 1.0, 2.0]]))
    assert gate.tolist() == [[9.0, 210.0]]
    assert up.tolist() == [[1.0]]


def test_a_linear_is_prepared_with_its_last_tensor_and_keeps_none_of_the_checkpoints() -> None:
    prepared: list[Any] = []
    sources: list[weakref.ref[Tensor]] = []

    class Watched(ScaledMethod):
        def prepare(self, shape: LinearShape, parts: Sequence[Mapping[str, Tensor]]) -> Tensor:
            prepared.append((shape, [sorted(part) for part in parts]))
            sources.extend(weakref.ref(tensor) for part in parts for tensor in part.values())
            return super().prepare(shape, parts)

    loader = WeightLoader()
    linear = Linear(Watched({}, torch.float32, "cpu"), loader, ["down"], 3, [2], bias=True)
    loader.expect("other", (1,), torch.float32, lambda tensor: None)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "down.bias", torch.ones(2)
        yield "down.scale", torch.ones(2, 1)
        assert not prepared
        yield "down.qweight", torch.zeros(2, 3, dtype=torch.int8)
        assert prepared == [(LinearShape(in_features=3, out_features=2), [["qweight", "scale"]])]
        yield "other", torch.ones(1)
        gc.collect()
        assert [source() for source in sources] == [None, None]

    loader.load(tensors())
    assert linear(torch.ones(1, 3)).tolist() == [[1.0, 1.0]]


# ------------------------------------------------------------------------------------- norm, embedding and head


def test_norm_equals_transformers_and_adds_the_residual_first() -> None:
    theirs = LlamaRMSNorm(32, eps=1e-5)
    theirs.weight.data.normal_()
    layers, loader = factory()
    ours = layers.norm("norm", 32, 1e-5)
    loader.load([("norm.weight", theirs.weight.data)])
    hidden, residual = torch.randn(7, 32), torch.randn(7, 32)
    torch.testing.assert_close(ours(hidden, None), (theirs(hidden), hidden))
    torch.testing.assert_close(ours(hidden, residual), (theirs(hidden + residual), hidden + residual))


def test_a_tied_head_multiplies_with_the_embedding_table() -> None:
    layers, loader = factory()
    embed = layers.embedding("model.embed_tokens", 10, 4)
    head = layers.head("lm_head", 10, 4, tied_to="model.embed_tokens")
    table = torch.randn(10, 4)
    loader.load([("model.embed_tokens.weight", table)])
    assert embed(torch.tensor([3, 3, 9])).tolist() == table[[3, 3, 9]].tolist()
    torch.testing.assert_close(head(table[:2]), table[:2] @ table.T)


# ------------------------------------------------------------------------------------------------------- rotary


def llama_config(head_dim: int, rope_parameters: Mapping[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=dict(rope_parameters),
    )


@pytest.mark.parametrize("head_dim", [64, 24])
def test_rotation_equals_transformers(head_dim: int) -> None:
    theirs = LlamaRotaryEmbedding(llama_config(head_dim, {"rope_type": "default", "rope_theta": 50_000.0}))
    table = RotaryTable(RopeConfig(theta=50_000.0), head_dim, 5000, torch.float32, "cpu")
    positions = torch.tensor([0, 1, 2, 77, 4999])
    query, key = torch.randn(5, 4, head_dim), torch.randn(5, 2, head_dim)
    cos, sin = theirs(query, positions.unsqueeze(0))
    wanted = apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)
    for x, rotated in zip((query, key), wanted, strict=True):
        torch.testing.assert_close(rotate(x, table(positions)), rotated[0].transpose(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequencies_equal_transformers(head_dim: int, factor: float) -> None:
    parameters = {**LLAMA3, "factor": factor}
    config = llama_config(head_dim, {**parameters, "rope_theta": 500_000.0})
    wanted, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    found = frequencies(RopeConfig(theta=500_000.0, rope_type="llama3", parameters=parameters), head_dim)
    assert attention_factor == 1.0
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_given_factors_divide_the_plain_frequencies() -> None:
    found = frequencies(RopeConfig(rope_type="factors", parameters={"factors": [1.0, 4.0]}), 4)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.01 / 4]))


def test_an_unknown_rope_type_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"'spiral' is not supported; known: default, llama3, factors"):
        frequencies(RopeConfig(rope_type="spiral"), 64)


def test_a_rope_type_without_its_numbers_is_refused_by_their_name() -> None:
    parameters = {name: value for name, value in LLAMA3.items() if name != "low_freq_factor"}
    with pytest.raises(CheckpointError, match=r"'llama3' lacks the parameter 'low_freq_factor'"):
        frequencies(RopeConfig(rope_type="llama3", parameters=parameters), 64)
