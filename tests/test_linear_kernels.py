"""Packed weights say what they mean and join; each goes to the first kernel that serves it; products lie together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.errors import UnavailableComponentError
from octavo.interfaces import (
    AffineWeight,
    LinearKernel,
    LinearKernels,
    LinearShape,
    LookupWeight,
    PackedWeight,
    ParameterSpec,
    QuantizationMethod,
    StoredLinear,
    WeightFacts,
)
from octavo.interfaces.linear_kernel import sparse_rows


class Reference(LinearKernel):
    """Dequantises what it is given, which it notes."""

    def __init__(self, refuses: tuple[int, ...] = ()) -> None:
        super().__init__(torch.float32, "cpu")
        self.refuses = refuses
        self.given: list[PackedWeight] = []

    def why_not(self, facts: WeightFacts) -> list[str]:
        return [f"has no {facts.bits} bits"] if facts.bits in self.refuses else []

    def num_bytes(self, facts: WeightFacts) -> int:
        return facts.in_features * facts.out_features

    def prepare(self, weight: PackedWeight) -> object:
        self.given.append(weight)
        return weight.dequantize()

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        assert isinstance(prepared, Tensor)
        return torch.nn.functional.linear(x, prepared, bias)


def affine(out_features: int = 2, **changes: object) -> AffineWeight:
    """4 inputs in groups of 3, so that the last is short; 3 bits."""
    weight = AffineWeight(
        bits=3,
        codes=torch.arange(4 * out_features, dtype=torch.uint8).view(out_features, 4) % 8,
        scales=torch.tensor([[0.5], [2.0]]).expand(2, out_features),
        zeros=torch.tensor([[1], [7]], dtype=torch.uint8).expand(2, out_features),
        group_size=3,
    )
    return replace(weight, **changes)  # type: ignore[arg-type]


def lookup(out_features: int = 2, outliers: Tensor | None = None, bits: int = 1) -> LookupWeight:
    table = torch.arange(out_features * 2**bits).view(out_features, -1) + 0.5
    codes = torch.arange(4 * out_features, dtype=torch.uint8).view(out_features, 4) % 2**bits
    return LookupWeight(bits=bits, codes=codes, table=table, outliers=outliers)


# ----------------------------------------------------------------------------------------------- what a weight means


def test_affine_weight_is_scales_times_codes_less_zeros() -> None:
    assert affine().dequantize().tolist() == [[-0.5, 0.0, 0.5, -8.0], [1.5, 2.0, 2.5, 0.0]]


def test_affine_weight_without_zeros_has_the_middle_code_for_zero() -> None:
    assert affine(zeros=None).dequantize()[0].tolist() == [-2.0, -1.5, -1.0, -2.0]


def test_affine_weight_takes_each_input_s_group_from_the_index() -> None:
    order = torch.tensor([1, 0, 0, 0], dtype=torch.int32)
    assert affine(group_index=order).dequantize()[0].tolist() == [-14.0, 0.0, 0.5, 1.0]


def test_codes_below_their_zero_are_negative_and_not_wrapped() -> None:
    zeros = torch.full((2, 2), 255, dtype=torch.uint8)
    weight = affine(bits=8, codes=torch.zeros(2, 4, dtype=torch.uint8), zeros=zeros)
    assert weight.dequantize()[0].tolist() == [-127.5, -127.5, -127.5, -510.0]


def test_affine_weight_is_float32_whatever_its_scales_are_stored_in() -> None:
    scales = torch.full((2, 2), 1.0 + 2**-7, dtype=torch.bfloat16)
    dense = affine(scales=scales).dequantize()
    assert dense.dtype == torch.float32
    assert dense[1, 2].item() == 5 * (1.0 + 2**-7)  # which bfloat16 would round


def test_lookup_weight_is_each_output_s_own_table() -> None:
    assert lookup().dequantize().tolist() == [[0.5, 1.5, 0.5, 1.5], [2.5, 3.5, 2.5, 3.5]]


def test_outliers_are_added_to_what_the_table_says() -> None:
    outliers = sparse_rows(torch.tensor([0, 1]), torch.tensor([3]), torch.tensor([10.0]), 4)
    assert lookup(outliers=outliers).dequantize().tolist() == [[0.5, 1.5, 0.5, 1.5], [2.5, 3.5, 2.5, 13.5]]


def test_sparse_rows_puts_values_row_by_row() -> None:
    rows = sparse_rows(torch.tensor([2, 0, 1]), torch.tensor([0, 2, 1]), torch.tensor([1.0, 2.0, 3.0]), 3)
    assert rows.to_dense().tolist() == [[1, 0, 2], [0, 0, 0], [0, 3, 0]]
    assert (rows.crow_indices().dtype, rows.col_indices().dtype) == (torch.int32, torch.int32)


# ---------------------------------------------------------------------------------------------------------- facts


def test_facts_of_an_affine_weight() -> None:
    assert affine(5).facts == WeightFacts(form="affine", bits=3, in_features=4, out_features=5, group_size=3)
    order = torch.zeros(4, dtype=torch.int32)
    facts = affine(zeros=None, group_index=order, group_size=128).facts
    assert (facts.symmetric, facts.act_order, facts.group_size) == (True, True, 4)


def test_facts_of_a_lookup_weight() -> None:
    outliers = sparse_rows(torch.tensor([0, 1]), torch.tensor([3]), torch.tensor([10.0]), 4)
    plain = WeightFacts(form="lookup", bits=1, in_features=4, out_features=2, group_size=4)
    assert lookup().facts == plain
    assert lookup(outliers=outliers).facts == replace(plain, outliers=True)


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        (affine().facts, "4 -> 2, 3 bits, groups of 3, asymmetric"),
        (affine(zeros=None, group_size=4).facts, "4 -> 2, 3 bits, no groups"),
        (
            affine(zeros=None, group_index=torch.zeros(4, dtype=torch.int32)).facts,
            "4 -> 2, 3 bits, groups of 3, act-order",
        ),
        (replace(lookup().facts, outliers=True), "4 -> 2, 1 bits, lookup, sparse"),
    ],
)
def test_facts_are_told_in_words(facts: WeightFacts, text: str) -> None:
    assert str(facts) == text


# ----------------------------------------------------------------------------------------------------- joined weights


@pytest.mark.parametrize(
    "other",
    [
        affine(bits=4),
        affine(group_size=2),
        affine(scales=torch.ones(2, 2, dtype=torch.float16)),
        affine(group_index=torch.tensor([0, 0, 0, 1], dtype=torch.int32)),
        lookup(),
    ],
    ids=["bits", "group size", "dtype of scales", "order", "form"],
)
def test_weights_that_differ_in_what_all_outputs_share_are_not_joined(other: PackedWeight) -> None:
    assert not affine().joins(other)
    assert not other.joins(affine())


def test_weights_of_two_orders_are_not_joined_and_of_one_order_are() -> None:
    first, second = torch.tensor([0, 1, 0, 1], dtype=torch.int32), torch.tensor([1, 0, 1, 0], dtype=torch.int32)
    assert not affine(group_index=first).joins(affine(group_index=second))
    assert affine(group_index=first).joins(affine(3, group_index=first.clone()))


def test_joined_affine_weights_have_their_outputs_behind_each_other() -> None:
    parts = [affine(2), affine(3, zeros=None), affine(1)]
    assert all(parts[0].joins(part) for part in parts)
    joined = AffineWeight.join(parts)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert not joined.facts.symmetric


def test_joined_symmetric_weights_stay_symmetric() -> None:
    assert AffineWeight.join([affine(zeros=None), affine(zeros=None)]).zeros is None


def test_joined_lookup_weights_keep_each_one_s_outliers() -> None:
    sparse = sparse_rows(torch.tensor([1, 0]), torch.tensor([2]), torch.tensor([7.0]), 4)
    parts = [lookup(2, sparse), lookup(3), lookup(2, sparse)]
    joined = LookupWeight.join(parts)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert LookupWeight.join([lookup(2), lookup(3)]).outliers is None


def test_lookup_weights_of_other_bits_are_not_joined() -> None:
    assert lookup().joins(lookup(3))
    assert not lookup().joins(lookup(bits=2))


# -------------------------------------------------------------------------------------------------------- the kernels


def test_first_kernel_without_a_reason_serves() -> None:
    picky, second, third = Reference(refuses=(3,)), Reference(), Reference()
    kernels = LinearKernels({"picky": picky, "second": second, "third": third})
    assert kernels.choose(affine().facts) is second
    assert kernels.choose(lookup().facts) is picky
    assert kernels.ask(affine().facts) == {"picky": ["has no 3 bits"], "second": [], "third": []}


def test_weight_that_no_kernel_serves_is_told_with_every_reason() -> None:
    kernels = LinearKernels({"one": Reference(refuses=(3,)), "two": Reference(refuses=(3, 4))})
    with pytest.raises(UnavailableComponentError) as caught:
        kernels.prepare([affine()])
    assert "4 -> 2, 3 bits, groups of 3, asymmetric" in str(caught.value)
    assert "\n  one: has no 3 bits\n  two: has no 3 bits\n" in str(caught.value)
    assert 'linear_kernel="auto"' in str(caught.value)


def test_weight_without_any_kernel_is_an_error_too() -> None:
    with pytest.raises(UnavailableComponentError, match="There are none"):
        LinearKernels({}).choose(affine().facts)


def test_neighbours_that_join_are_prepared_as_one_and_others_apart() -> None:
    kernel = Reference()
    LinearKernels({"it": kernel}).prepare([affine(1), affine(2), lookup(1), lookup(3), affine(4)])
    assert [(weight.facts.form, weight.facts.out_features) for weight in kernel.given] == [
        ("affine", 3),
        ("lookup", 4),
        ("affine", 4),
    ]


def test_pieces_of_one_linear_may_be_of_several_kernels() -> None:
    one_bit, three_bits = Reference(refuses=(3,)), Reference(refuses=(1,))
    prepared = LinearKernels({"one": one_bit, "three": three_bits}).prepare([affine(2), lookup(3), affine(1)])
    assert ([len(weight.codes) for weight in one_bit.given], [len(weight.codes) for weight in three_bits.given]) == (
        [3],
        [2, 1],
    )
    dense = torch.cat([affine(2).dequantize(), lookup(3).dequantize(), affine(1).dequantize()])
    x, bias = torch.randn(5, 4), torch.arange(6.0)
    torch.testing.assert_close(prepared(x, bias), x @ dense.T + bias)
    torch.testing.assert_close(prepared(x, None), x @ dense.T)


def test_method_that_gives_no_weight_and_multiplies_with_none_is_told_so() -> None:
    class Nothing(QuantizationMethod):
        def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
            return ()

    shape = LinearShape(in_features=4, out_features=2)
    method = Nothing({}, torch.float32, "cpu", {}, LinearKernels({}))
    assert method.facts("up", shape) is None
    with pytest.raises(NotImplementedError, match=r"Nothing has neither weight\(\) nor a product of its own"):
        method.prepare([StoredLinear(prefix="up", shape=shape, tensors={})])


@dataclass(frozen=True)
class Drawn:
    """What two parts of a stack may differ in."""

    lookup: bool
    bits: int
    out_features: int
    group_size: int
    symmetric: bool
    order: int | None
    seed: int

    def weight(self, in_features: int) -> PackedWeight:
        generator = torch.Generator().manual_seed(self.seed)
        size = (self.out_features, in_features)
        codes = torch.randint(0, 2**self.bits, size, generator=generator, dtype=torch.uint8)
        if self.lookup:
            places = torch.rand(size, generator=generator) < 0.1
            values = torch.randn(int(places.sum()), generator=generator)
            outliers = sparse_rows(places.sum(1), places.nonzero()[:, 1], values, in_features)
            table = torch.randn(self.out_features, 2**self.bits, generator=generator)
            return LookupWeight(bits=self.bits, codes=codes, table=table, outliers=None if self.symmetric else outliers)
        num_groups = -(-in_features // self.group_size)
        of_groups = (num_groups, self.out_features)
        zeros = torch.randint(0, 2**self.bits, of_groups, generator=generator, dtype=torch.uint8)
        index = None
        if self.order is not None:
            shuffled = torch.randperm(in_features, generator=torch.Generator().manual_seed(self.order))
            index = (shuffled // self.group_size).int()
        return AffineWeight(
            bits=self.bits,
            codes=codes,
            scales=torch.rand(of_groups, generator=generator),
            zeros=None if self.symmetric else zeros,
            group_size=self.group_size,
            group_index=index,
        )


drawn = st.builds(
    Drawn,
    lookup=st.booleans(),
    bits=st.integers(1, 4),
    out_features=st.integers(1, 9),
    group_size=st.sampled_from((1, 4, 5, 64)),
    symmetric=st.booleans(),
    order=st.sampled_from((None, 0, 1)),
    seed=st.integers(0, 99),
)


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(drawn, min_size=1, max_size=4), in_features=st.integers(1, 40), with_bias=st.booleans())
def test_prepared_stack_is_its_parts_one_by_one(parts: list[Drawn], in_features: int, with_bias: bool) -> None:
    weights = [part.weight(in_features) for part in parts]
    kernels = LinearKernels({"few": Reference(refuses=(1, 3)), "all": Reference()})
    dense = torch.cat([weight.dequantize() for weight in weights])
    x, bias = torch.randn(3, in_features), torch.randn(len(dense)) if with_bias else None
    y = kernels.prepare(weights)(x, bias)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dense, bias), rtol=1e-4, atol=1e-4)
