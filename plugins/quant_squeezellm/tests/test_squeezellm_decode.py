"""What tensors mean: against a decoder in numpy that shares nothing with the plugin, over bits, shapes, densities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from squeezellm_layers import decode, method_of, pack, random_tensors, stored_linear

from octavo.interfaces import LinearShape, LookupWeight, TensorHeader
from octavo.packing import pack_rows
from octavo.testing.stored_weight import PREFIX, headers_of

BITS = st.sampled_from([3, 4])
SHAPES = st.builds(
    lambda blocks, outputs: LinearShape(in_features=32 * blocks, out_features=outputs),
    st.integers(1, 5),
    st.integers(1, 40),
)
DENSITIES = st.none() | st.floats(0.0, 1.0)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SEEDS = st.integers(0, 2**31)


@settings(max_examples=60, deadline=None)
@given(bits=BITS, shape=SHAPES, density=DENSITIES, dtype=DTYPES, seed=SEEDS)
def test_codebooks_and_outliers_mean_what_numpy_reads(
    bits: int, shape: LinearShape, density: float | None, dtype: torch.dtype, seed: int
) -> None:
    tensors = random_tensors(shape, bits, torch.Generator().manual_seed(seed), density=density, dtype=dtype)
    method = method_of(headers_of(tensors))
    assert torch.equal(method.dequantize(stored_linear(tensors, shape)), decode(tensors, bits))


@settings(max_examples=30, deadline=None)
@given(bits=BITS, shape=SHAPES, density=DENSITIES, num_full=st.integers(1, 40), seed=SEEDS)
def test_whole_outputs_are_added_to_codebooks_and_outliers(
    bits: int, shape: LinearShape, density: float | None, num_full: int, seed: int
) -> None:
    tensors = random_tensors(shape, bits, torch.Generator().manual_seed(seed), density=density, num_full=num_full)
    found = method_of(headers_of(tensors)).dequantize(stored_linear(tensors, shape))
    assert torch.allclose(found, decode(tensors, bits), rtol=1e-6, atol=1e-5)  # three numbers, added in another order


@settings(max_examples=30, deadline=None)
@given(bits=BITS, shape=SHAPES, seed=SEEDS)
def test_any_bits_are_codes(bits: int, shape: LinearShape, seed: int) -> None:
    tensors = random_tensors(shape, bits, torch.Generator().manual_seed(seed))
    words = torch.randint(-(2**31), 2**31, tensors["qweight"].shape, generator=torch.Generator().manual_seed(seed))
    tensors["qweight"] = words.int()
    method = method_of(headers_of(tensors))
    assert torch.equal(method.dequantize(stored_linear(tensors, shape)), decode(tensors, bits))


@settings(max_examples=30, deadline=None)
@given(bits=BITS, shape=SHAPES, seed=SEEDS)
def test_tool_s_packing_is_the_core_s(bits: int, shape: LinearShape, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (shape.in_features, shape.out_features), generator=generator)
    assert torch.equal(pack_rows(codes, bits), torch.from_numpy(pack(codes.numpy(), bits)))


def test_weight_that_is_stored_twice_beside_the_codes_is_the_sum() -> None:
    shape = LinearShape(in_features=32, out_features=2)
    tensors = random_tensors(shape, 4, torch.Generator())
    tensors |= {
        "rows": torch.tensor([0, 0, 3], dtype=torch.int32),
        "cols": torch.tensor([7, 2, 7], dtype=torch.int32),
        "vals": torch.tensor([1.0, 2.0, 4.0]),
    }
    weight = method_of(headers_of(tensors)).weight(stored_linear(tensors, shape))
    assert weight.outliers is not None
    assert weight.outliers.col_indices().tolist() == [2, 7]
    assert weight.outliers.values().tolist() == [2.0, 5.0]


def test_linear_whose_sparse_matrix_is_empty_is_its_codebooks() -> None:
    shape = LinearShape(in_features=32, out_features=5)
    tensors = random_tensors(shape, 3, torch.Generator(), density=0.0)
    method = method_of(headers_of(tensors))
    prepared = method.prepare([stored_linear(tensors, shape)])
    x = torch.randn(4, 32, generator=torch.Generator())
    assert torch.allclose(method.apply(prepared, x, None), x @ decode(tensors, 3).T, atol=1e-5)


def test_startrows_change_nothing() -> None:
    shape = LinearShape(in_features=32, out_features=5)
    tensors = random_tensors(shape, 3, torch.Generator(), density=0.1, balanced=True)
    without = {name: tensor for name, tensor in tensors.items() if name != "startrows"}
    found = [method_of(headers_of(each)).dequantize(stored_linear(each, shape)) for each in (tensors, without)]
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_codebooks_and_outliers_are_kept_as_stored_whatever_the_model_s_dtype(dtype: torch.dtype) -> None:
    shape = LinearShape(in_features=32, out_features=5)
    tensors = random_tensors(shape, 4, torch.Generator(), density=0.1, num_full=1, dtype=dtype)
    declared = method_of(headers_of(tensors), dtype=torch.bfloat16).parameters(PREFIX, shape)
    kept = {spec.name: spec.dtype for spec in declared if spec.dtype != torch.int32}
    assert kept == {"lookup_table": dtype, "vals": dtype, "full_rows": dtype}


def test_bias_that_only_the_checkpoint_has_is_declared() -> None:
    shape = LinearShape(in_features=32, out_features=5)
    tensors = random_tensors(shape, 4, torch.Generator(), bias=True)
    declared = {spec.name: spec.shape for spec in method_of(headers_of(tensors)).parameters(PREFIX, shape)}
    assert declared["bias"] == (5,)


# ------------------------------------------------------------------------------------------ parts of a stacked linear


@settings(max_examples=40, deadline=None)
@given(
    bits=BITS,
    blocks=st.integers(1, 3),
    parts=st.lists(st.tuples(st.integers(1, 9), DENSITIES), min_size=1, max_size=4),
    seed=SEEDS,
)
def test_joined_weights_are_their_outputs_behind_each_other(
    bits: int, blocks: int, parts: list[tuple[int, float | None]], seed: int
) -> None:
    generator, weights = torch.Generator().manual_seed(seed), []
    for out_features, density in parts:
        shape = LinearShape(in_features=32 * blocks, out_features=out_features)
        tensors = random_tensors(shape, bits, generator, density=density)
        weights.append(method_of(headers_of(tensors)).weight(stored_linear(tensors, shape)))
    assert all(weights[0].joins(other) for other in weights[1:])
    joined = LookupWeight.join(weights)
    assert (joined.outliers is None) == all(density is None for _, density in parts)
    assert joined.facts.outliers == sum(weight.facts.outliers for weight in weights)
    assert torch.equal(joined.dequantize(), torch.cat([weight.dequantize() for weight in weights]))


def test_stacked_projections_of_other_bits_and_outliers_are_each_their_own_product() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = {"q": (4, 12, 0.1), "k": (4, 4, None), "v": (3, 4, 0.2)}
    headers: dict[str, TensorHeader] = {}
    stored, weights = [], []
    for name, (bits, out_features, density) in kinds.items():
        shape, prefix = LinearShape(in_features=64, out_features=out_features), f"layers.0.{name}_proj"
        tensors = random_tensors(shape, bits, generator, density=density)
        headers |= headers_of(tensors, prefix)
        stored.append(stored_linear(tensors, shape, prefix))
        weights.append(decode(tensors, bits))
    method = method_of(headers)
    x = torch.randn(3, 64, generator=generator)
    found = method.apply(method.prepare(stored), x, None)
    assert torch.allclose(found, x @ torch.cat(weights).T, atol=1e-4)
