"""Layers that several devices share: what of each tensor one device holds, and what cannot be cut."""

from __future__ import annotations

import pytest
from linear_methods import PackedMethod, ScaledMethod, ThreeBits, factory

from octavo.errors import ConfigError
from octavo.interfaces import ParameterSpec
from octavo.nn.factory import heads_of_one_rank
from octavo.nn.linear import LinearPart
from octavo.nn.weights import WeightLoader


def shapes_on_device(loader: WeightLoader) -> dict[str, tuple[int, ...]]:
    """By name, of what one device holds; the first asker's, where several ask."""
    return {name: one.shard.shape(one.shape) if one.shard else one.shape for name, (one, *_) in loader.expected.items()}


def test_a_linear_that_ends_a_block_is_cut_along_its_inputs_and_its_bias_is_whole() -> None:
    layers, loader = factory(num_ranks=4)
    layers.linear("down", 64, 40, bias=True)
    assert shapes_on_device(loader) == {"down.weight": (40, 16), "down.bias": (40,)}


def test_stacked_linears_and_their_biases_are_cut_along_their_outputs() -> None:
    layers, loader = factory(num_ranks=4)
    layers.stacked_linear("mlp", 40, {"gate": 64, "up": 32}, bias=True)
    assert shapes_on_device(loader) == {
        "mlp.gate.weight": (16, 40),
        "mlp.gate.bias": (16,),
        "mlp.up.weight": (8, 40),
        "mlp.up.bias": (8,),
    }


@pytest.mark.parametrize(("num_ranks", "rows"), [(2, (32, 16, 16)), (4, (16, 8, 8)), (8, (8, 8, 8))])
def test_heads_are_dealt_out_whole_and_few_kv_heads_repeated(num_ranks: int, rows: tuple[int, int, int]) -> None:
    layers, loader = factory(num_ranks=num_ranks)
    layers.qkv_linear("attn", 40, num_heads=8, num_kv_heads=4, head_dim=8)
    assert tuple(shapes_on_device(loader).values()) == tuple((size, 40) for size in rows)


@pytest.mark.parametrize("num_ranks", [2, 6, 9, 16])
def test_heads_that_cannot_be_dealt_out_evenly_are_refused(num_ranks: int) -> None:
    with pytest.raises(ConfigError, match=rf"tensor_parallel_size={num_ranks} does not part 12 query heads and 9 KV"):
        heads_of_one_rank(12, 9, num_ranks)


def test_head_counts_of_one_rank() -> None:
    assert [heads_of_one_rank(64, 8, num_ranks) for num_ranks in (1, 8, 16)] == [(64, 8), (8, 1), (4, 1)]


def test_embedding_and_head_are_cut_along_the_vocabulary_which_is_padded() -> None:
    layers, loader = factory(num_ranks=4)
    layers.embedding("embed", 101, 8)
    layers.head("head", 101, 8, tied_to=None)
    assert shapes_on_device(loader) == {"embed.weight": (26, 8), "head.weight": (26, 8)}


def test_norms_are_whole_on_every_device() -> None:
    layers, loader = factory(num_ranks=4)
    layers.norm("norm", 64, 1e-5)
    assert shapes_on_device(loader) == {"norm.weight": (64,)}


def test_packed_tensors_are_cut_where_they_are_stored() -> None:
    layers, loader = factory(PackedMethod, num_ranks=2)
    layers.linear("down", 128, 40)
    layers.stacked_linear("mlp", 128, {"up": 40})
    assert shapes_on_device(loader) == {
        "down.qweight": (40, 8),
        "down.scales": (40, 2),
        "mlp.up.qweight": (20, 16),
        "mlp.up.scales": (20, 4),
    }
    assert loader.expected_bytes == 40 * 8 * 4 + 40 * 2 * 2 + 20 * 16 * 4 + 20 * 4 * 2


def test_a_tensor_that_cannot_be_cut_evenly_is_refused_by_name_with_its_packing() -> None:
    layers, _ = factory(PackedMethod, num_ranks=8)
    with pytest.raises(
        ConfigError, match=r"down\.qweight cannot be cut into 8 .* 96 inputs .* 12 elements, 8 values in"
    ):
        layers.linear("down", 96, 40)


def test_words_that_hold_codes_together_are_not_parted() -> None:
    layers, loader = factory(ThreeBits, num_ranks=2)
    layers.linear("down", 128, 40)
    assert shapes_on_device(loader) == {"down.qweight": (6, 40)}
    with pytest.raises(ConfigError, match=r"64 inputs are stored as 6 elements, 32 values in every 3") as caught:
        factory(ThreeBits, num_ranks=3)[0].linear("down", 64, 40)
    assert "cannot be cut into 3 equal parts" in str(caught.value)


def test_features_that_share_a_word_are_not_parted_though_the_words_divide() -> None:
    part = LinearPart(prefix="up", in_features=8, out_features=12, num_shards=2)
    zeros = ParameterSpec(name="qzeros", shape=(1, 2), output_axis=1, pack_factor=8)
    with pytest.raises(ConfigError, match=r"up\.qzeros cannot be cut into 2 equal parts: its 12 outputs"):
        part.shard(zeros)


def test_an_axis_that_is_not_packed_is_cut_between_any_elements() -> None:
    layers, loader = factory(ThreeBits, num_ranks=2)
    layers.stacked_linear("mlp", 128, {"up": 40})
    assert shapes_on_device(loader) == {"mlp.up.qweight": (12, 20)}


def test_a_tensor_without_the_axis_is_whole_on_every_device() -> None:
    layers, loader = factory(ScaledMethod, num_ranks=2)
    layers.linear("down", 64, 40)
    assert shapes_on_device(loader) == {"down.qweight": (40, 64), "down.scale": (40, 1)}


def test_the_factory_tells_its_linears_and_counts_their_weights() -> None:
    layers, _ = factory(PackedMethod, num_ranks=2)
    layers.embedding("embed", 10, 64)
    layers.qkv_linear("attn", 64, num_heads=4, num_kv_heads=1, head_dim=16, bias=True)
    layers.linear("o_proj", 64, 64)
    layers.norm("norm", 64, 1e-5)
    layers.head("head", 10, 64, tied_to="embed")
    assert [
        (one.prefix, one.in_features, one.out_features, one.parallel, one.num_shards) for one in layers.linears
    ] == [
        ("attn.q_proj", 64, 64, "column", 2),
        ("attn.k_proj", 64, 16, "column", 1),
        ("attn.v_proj", 64, 16, "column", 1),
        ("o_proj", 64, 64, "row", 2),
    ]
    assert layers.num_weights == 10 * 64 + (64 + 16 + 16) * (64 + 1) + 64 * 64 + 64 + 10 * 64
