"""The layers: linears alone and stacked, the norm and the rotation against transformers' own, the factory's names."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any

import pytest
import torch
from linear_methods import NO_KERNELS, ScaledMethod, factory
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from octavo.builtin.torch_attention import TorchAttention
from octavo.builtin.torch_kernels import TorchKernels
from octavo.builtin.unquantized import Unquantized
from octavo.errors import CheckpointError, PluginError
from octavo.interfaces import (
    AttentionParameters,
    ForwardContext,
    LinearShape,
    ParameterSpec,
    QuantizationMethod,
    StoredLinear,
)
from octavo.interfaces.attention import rotate
from octavo.model_config import RopeConfig
from octavo.nn.factory import DeviceLayerFactory
from octavo.nn.linear import Linear, LinearPart
from octavo.nn.rotary import RotaryTable
from octavo.nn.weights import WeightLoader
from octavo.plugins.specs import AttentionNeed


class Unstackable(Unquantized):
    can_stack = False


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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", [Unquantized, Unstackable], ids=lambda method: method.__name__)
def test_linears_that_are_stored_as_one_equal_separate_ones(method: type[QuantizationMethod], bias: bool) -> None:
    sizes = {"q_proj": 8, "k_proj": 4, "v_proj": 4}
    tensors = {"attn.qkv_proj.weight": torch.randn(16, 12)}
    if bias:
        tensors |= {"attn.qkv_proj.bias": torch.randn(16)}
    layers, loader = factory(method)
    stacked = layers.qkv_linear("attn", 12, 2, 1, 4, bias=bias, stored_as="qkv_proj")
    loader.load(tensors.items())
    x = torch.randn(5, 12)
    wanted = functional.linear(x, tensors["attn.qkv_proj.weight"], tensors.get("attn.qkv_proj.bias"))
    torch.testing.assert_close(list(stacked(x)), list(wanted.split(list(sizes.values()), dim=-1)))
    assert loader.num_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_tensors_whose_outputs_are_packed_are_parted_in_their_own_elements() -> None:
    class PackedOutputs(ScaledMethod):
        """Four outputs in one element, and a tensor that is not parted at all."""

        def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
            return (
                ParameterSpec(name="qweight", shape=(shape.in_features, shape.out_features // 4), output_axis=1),
                ParameterSpec(name="order", shape=(shape.in_features,)),
            )

        def prepare(self, parts: Sequence[StoredLinear]) -> Any:
            found.append([(part.tensors["qweight"].tolist(), part.tensors["order"].tolist()) for part in parts])
            return None

    found: list[Any] = []
    layers, loader = factory(PackedOutputs)
    layers.stacked_linear("mlp", 2, {"gate": 8, "up": 4}, stored_as="gate_up")
    loader.load(
        [("mlp.gate_up.qweight", torch.tensor([[1.0, 2, 3], [4, 5, 6]])), ("mlp.gate_up.order", torch.tensor([1.0, 0]))]
    )
    assert found == [[([[1, 2], [4, 5]], [1, 0])], [([[3], [6]], [1, 0])]]


def test_a_stack_of_the_wrong_size_is_named_once() -> None:
    layers, loader = factory()
    layers.stacked_linear("mlp", 3, {"gate": 4, "up": 4}, stored_as="gate_up")
    with pytest.raises(CheckpointError) as caught:
        loader.load([("mlp.gate_up.weight", torch.zeros(6, 3))])
    assert "1 tensors have the wrong shape: mlp.gate_up.weight is [6, 3], the configuration makes it [8, 3]." in str(
        caught.value
    )


def test_each_rank_has_its_part_of_every_linear_of_a_stack() -> None:
    layers, loader = factory(num_ranks=4)
    layers.qkv_linear("attn", 40, num_heads=8, num_kv_heads=2, head_dim=8, stored_as="qkv")
    of_one = [one.num_bytes_on_device for one in loader.expected["attn.qkv.weight"]]
    assert of_one == [2 * 8 * 40 * 4, 8 * 40 * 4, 8 * 40 * 4]  # two query heads, and one KV head that two ranks share


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
        def prepare(self, parts: Sequence[StoredLinear]) -> Tensor:
            prepared.extend((part.prefix, part.shape, sorted(part.tensors)) for part in parts)
            sources.extend(weakref.ref(tensor) for part in parts for tensor in part.tensors.values())
            return super().prepare(parts)

    loader = WeightLoader()
    part = LinearPart(prefix="down", in_features=3, out_features=2)
    linear = Linear(Watched({}, torch.float32, "cpu", {}, NO_KERNELS), loader, [part], bias=True)
    loader.expect("other", (1,), torch.float32, lambda tensor: None)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "down.bias", torch.ones(2)
        yield "down.scale", torch.ones(2, 1)
        assert not prepared
        yield "down.qweight", torch.zeros(2, 3, dtype=torch.int8)
        assert prepared == [("down", LinearShape(in_features=3, out_features=2), ["qweight", "scale"])]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_with_an_offset_equals_gemmas(dtype: torch.dtype) -> None:
    theirs = Gemma2RMSNorm(32, eps=1e-6)
    theirs.weight.data = 0.01 * torch.randn(32)  # in bfloat16 all but lost beside one
    loader = WeightLoader()
    method = Unquantized({}, dtype, "cpu", {}, NO_KERNELS)
    backend = TorchAttention(AttentionNeed(num_heads=2, num_kv_heads=2, head_dim=4, block_size=4))
    ours = DeviceLayerFactory(method, backend, TorchKernels(backend.need), loader).norm(
        "norm", 32, 1e-6, weight_offset=1.0
    )
    loader.load([("norm.weight", theirs.weight.data)])
    hidden = torch.randn(7, 32).to(dtype)
    found, residual = ours(hidden, None)
    assert (found.dtype, residual.dtype) == (dtype, dtype)
    torch.testing.assert_close(found, theirs(hidden), rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6)


def test_a_tied_head_multiplies_with_the_embedding_table() -> None:
    layers, loader = factory()
    embed = layers.embedding("model.embed_tokens", 10, 4)
    head = layers.head("lm_head", 10, 4, tied_to="model.embed_tokens")
    table = torch.randn(10, 4)
    loader.load([("model.embed_tokens.weight", table)])
    assert embed(torch.tensor([3, 3, 9])).tolist() == table[[3, 3, 9]].tolist()
    torch.testing.assert_close(head(table[:2]), table[:2] @ table.T)


# ---------------------------------------------------------------------------------------------------- attention


class Recorder(TorchAttention):
    """Says what it was given instead of attending."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Any:
        return query, key, others[-1]


def attention_of(**need: Any) -> DeviceLayerFactory:
    needed = AttentionNeed(num_heads=2, num_kv_heads=2, head_dim=4, block_size=4, **need)
    return DeviceLayerFactory(
        Unquantized({}, torch.float32, "cpu", {}, NO_KERNELS), Recorder(needed), TorchKernels(needed), WeightLoader()
    )


def called(layer: Any, layers: DeviceLayerFactory) -> Any:
    """What the backend gets of ones at position 3."""
    positions, ones = torch.tensor([3]), torch.ones(1, 8)
    rotary = [table(positions) for table in layers.rotary_tables(16)]
    context = ForwardContext(positions=positions, rotary=rotary, kv_caches=[()] * 3, attention_state=None)
    return layer(ones, ones, ones, context)


def test_layers_of_one_rotation_share_a_table_and_others_have_their_own() -> None:
    layers, ropes = attention_of(), (RopeConfig(theta=10.0), RopeConfig(theta=10.0), RopeConfig(theta=500.0))
    first, second, third = (layers.attention(i, 2, 2, 4, 0.5, rope=rope) for i, rope in enumerate(ropes))
    assert layers.rotations == [(ropes[0], 4), (ropes[2], 4)]
    assert layers.rotary_bytes_per_position == 2 * 2 * 4 * 4
    for layer, theta in ((first, 10.0), (second, 10.0), (third, 500.0)):
        query, key, _ = called(layer, layers)
        table = RotaryTable(RopeConfig(theta=theta), 4, 16, torch.float32, "cpu")
        wanted = rotate(torch.ones(1, 2, 4), table(torch.tensor([3])))
        assert torch.equal(query, wanted)
        assert torch.equal(key, wanted)


def test_a_layer_without_a_rope_is_not_rotated() -> None:
    layers = attention_of()
    query, key, _ = called(layers.attention(0, 2, 2, 4, 0.5, rope=None), layers)
    assert torch.equal(query, torch.ones(1, 2, 4))
    assert torch.equal(key, torch.ones(1, 2, 4))
    assert layers.rotary_tables(16) == []


def test_a_layer_hands_its_backend_scale_window_and_cap() -> None:
    layers = attention_of(features=frozenset({"sliding_window"}), sliding_window=7, logit_softcap=30.0)
    layer = layers.attention(0, 2, 2, 4, 0.5, rope=None, sliding_window=7, logit_softcap=30.0)
    assert called(layer, layers)[2] == AttentionParameters(scale=0.5, sliding_window=7, logit_softcap=30.0)
    assert called(layers.attention(0, 2, 2, 4, 0.5, rope=None), layers)[2] == AttentionParameters(scale=0.5)


def test_a_window_that_no_context_outgrows_is_none() -> None:
    layers = attention_of(sliding_window=7)
    layer = layers.attention(0, 2, 2, 4, 0.5, rope=None, sliding_window=7)
    assert called(layer, layers)[2].sliding_window is None


@pytest.mark.parametrize("asked", [{"sliding_window": 8}, {"logit_softcap": 50.0}], ids=str)
def test_a_window_or_cap_that_no_backend_was_asked_for_is_refused(asked: dict[str, Any]) -> None:
    layers = attention_of(features=frozenset({"sliding_window"}), sliding_window=7)
    ((name, value),) = asked.items()
    with pytest.raises(PluginError, match=f"Layer 2 of the model asks for {name}={value}, but the attention backend"):
        layers.attention(2, 2, 2, 4, 0.5, rope=None, **asked)


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
