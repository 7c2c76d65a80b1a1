"""LinearKernelSuite: what every linear kernel must do, checked against the dequantised weight in float64.

class TestMine(LinearKernelSuite):
    component = "my-plugin/mine"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from octavo.interfaces.linear_kernel import AffineWeight, LinearKernel, LinearKernels, PackedWeight
from octavo.plugins.specs import LinearKernelNeed, LinearKernelSpec
from octavo.testing.drawn_weights import (
    FEW_CASES,
    USUAL_CASES,
    WeightCase,
    affine,
    bytes_reachable,
    every_kind,
    lookup,
    on_device,
    tensors_of,
    watched,
    with_tensors,
)
from octavo.testing.stored_weight import check_product
from octavo.testing.suite import Suite

DTYPES = ("float32", "bfloat16", "float16")

_SEEDS = ((0, 1, 2), (7, 7, 7))
"""Of a stack's parts: with orders of their own, which keep them apart, and with one order, by which they are joined."""
_SPARE_BYTES = 4096
"""That a prepared weight may take beside what it says."""


class LinearKernelSuite(Suite):
    """The conformance of a linear kernel: with every kind of weight that its `why_not` accepts.

    Attributes:
        device: where its tests run. A kernel that needs a GPU says "cuda", and its tests are skipped elsewhere with
            `pytestmark = pytest.mark.skipif(...)`.
        small: few and small weights, each in one dtype, for kernels that an interpreter runs.
        num_rows: of x; empty takes those that are usual.
        tolerances: largest error of y = x @ W.T + b, as a share of |x| @ |W|.T + |b|, by the model's dtype.
    """

    kind = "linear_kernel"
    device: ClassVar[str] = "cpu"
    small: ClassVar[bool] = False
    num_rows: ClassVar[tuple[int, ...]] = ()
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}

    # ---------------------------------------------------------------------------------------- what is under test

    def cases(self) -> Sequence[WeightCase]:
        """The weights to multiply with; those that it refuses are left out."""
        return FEW_CASES if self.small else USUAL_CASES

    def make(self, dtype: torch.dtype) -> LinearKernel:
        """The kernel for a model, as the engine makes it."""
        kernel: LinearKernel = self.build(dtype, self.device)
        return kernel

    def spec(self) -> LinearKernelSpec:
        """What the component says of itself."""
        spec = self.candidate().spec
        assert isinstance(spec, LinearKernelSpec)
        return spec

    def dtypes(self) -> list[str]:
        """The model's dtypes that it accepts here, with a form that it lists."""
        assert self.spec().forms, "its spec lists no forms of weights, so it would never be chosen"
        need = LinearKernelNeed(device=self.device, form=self.spec().forms[0])
        accepted = [dtype for dtype in DTYPES if not self.spec().why_not(replace(need, dtype=dtype))]
        assert accepted, f"it refuses every dtype on {self.device!r}: {'; '.join(self.spec().why_not(need))}"
        return accepted

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        """Threads of many small products wait for each other longer than they compute."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)

    def _kernel(self, dtype: str | None = None) -> LinearKernel:
        return self.make(getattr(torch, dtype or self.dtypes()[0]))

    def _served(self, kernel: LinearKernel, cases: Sequence[WeightCase] | None = None) -> list[WeightCase]:
        """Those that it accepts."""
        forms = self.spec().forms
        cases = self.cases() if cases is None else cases
        return [case for case in cases if case.facts.form in forms and not kernel.why_not(case.facts)]

    def _one_of_each_form(self, kernel: LinearKernel) -> list[WeightCase]:
        return list({case.facts.form: case for case in reversed(self._served(kernel))}.values())

    def _each(self) -> Iterator[tuple[LinearKernel, WeightCase]]:
        """Every case in every dtype; in one of them, in turn, when they are to be few."""
        kernels = [self._kernel(dtype) for dtype in self.dtypes()]
        for index, case in enumerate(self.cases()):
            for kernel in [kernels[index % len(kernels)]] if self.small else kernels:
                if case in self._served(kernel):
                    yield kernel, case

    def _rows(self) -> tuple[int, ...]:
        return self.num_rows or ((1, 3, 17) if self.small else (1, 3, 16, 17, 64, 200))

    def _check(self, kernel: LinearKernel, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, of: str) -> None:
        where = f"{of}, {kernel.dtype}, {len(x)} row(s)"
        assert y.dtype == kernel.dtype, f"{where}: the product is {y.dtype}"
        assert y.shape == (len(x), len(weight)), f"{where}: [num_tokens, out_features] is wanted, not {tuple(y.shape)}"
        check_product(y, x, weight, bias, self.tolerances[str(kernel.dtype).removeprefix("torch.")], where)

    def _check_product(self, kernel: LinearKernel, case: WeightCase, num_rows: Sequence[int], bias: bool) -> None:
        weight = case.draw(self.device)
        prepared = kernel.prepare(case.draw(self.device))
        for rows in num_rows:
            x, b = _x(kernel, rows, case.facts.in_features), _bias(kernel, case.facts.out_features) if bias else None
            self._check(kernel, kernel.apply(prepared, x, b), x, weight.dequantize(), b, str(case))

    # ------------------------------------------------------------------------------------------------- contract

    def test_is_a_linear_kernel(self) -> None:
        assert isinstance(self._kernel(), LinearKernel)

    def test_serves_weights_of_every_form_that_its_spec_lists(self) -> None:
        kernel = self._kernel()
        served = {case.facts.form for case in self._served(kernel)}
        for form in self.spec().forms:
            assert form in LinearKernels.form_names, f"there is no form {form!r} of weights"
            refused = {
                reason for case in self.cases() if case.facts.form == form for reason in kernel.why_not(case.facts)
            }
            assert form in served, f"it serves no {form} weight of the suite's ({'; '.join(refused)}); override cases()"

    def test_refusals_are_sentences(self) -> None:
        kernel = self._kernel()
        need = LinearKernelNeed(device=self.device, dtype=self.dtypes()[0], form="no-such-form")
        assert self.spec().why_not(need), "it accepts a form of weights that it does not list"
        strange = [replace(case.facts, in_features=1, out_features=1) for case in self.cases()]
        for facts in (*(case.facts for case in every_kind(small=False)), *strange):
            for reason in (*kernel.why_not(facts), *self.spec().why_not(need)):
                assert len(reason.split()) > 2, f"{reason!r} does not explain why it refuses {facts}"
                assert not reason.startswith("its probe"), f"{reason} (asked with {need})"

    # --------------------------------------------------------------------------------------------------- product

    @pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
    def test_product_equals_the_dequantised_one(self, bias: bool) -> None:
        for kernel, case in self._each():
            self._check_product(kernel, case, self._rows(), bias)

    def test_serves_what_it_accepts(self) -> None:
        kernel = self._kernel(self.dtypes()[-1])
        for case in self._served(kernel, list(every_kind(self.small))):
            self._check_product(kernel, case, (3,), bias=False)

    def test_sums_are_float32(self) -> None:
        """All of one sign: a sum in 16 bits stops growing at a few hundred times its terms."""
        in_features = 1024 if self.small else 4096
        cases = [affine(4, in_features, 16, 128, symmetric=True), lookup(4, in_features, 16)]
        for kernel in [self._kernel(dtype) for dtype in self.dtypes() if dtype != "float32"]:
            for case in self._served(kernel, cases):
                weight = case.draw(self.device)
                codes = torch.full_like(weight.codes, 2**weight.bits - 1)
                weight = with_tensors(weight, {"codes": codes})
                x = torch.ones(3, in_features, dtype=kernel.dtype, device=kernel.device)
                dense = weight.dequantize()
                self._check(kernel, kernel.apply(kernel.prepare(weight), x, None), x, dense, None, str(case))

    def test_product_of_no_rows_has_no_rows(self) -> None:
        kernel = self._kernel()
        for case in self._one_of_each_form(kernel):
            y = kernel.apply(kernel.prepare(case.draw(self.device)), _x(kernel, 0, case.facts.in_features), None)
            assert y.shape == (0, case.facts.out_features), str(case)

    def test_same_product_gives_the_same_bits(self) -> None:
        kernel = self._kernel()
        for case in self._one_of_each_form(kernel):
            prepared = kernel.prepare(case.draw(self.device))
            for rows in self._rows():
                x = _x(kernel, rows, case.facts.in_features)
                first, second = (kernel.apply(prepared, x, None) for _ in range(2))
                assert torch.equal(first, second), f"{case}, {rows} row(s)"

    def test_row_does_not_depend_on_the_others(self) -> None:
        """Not even on infinite ones, as a request's may become."""
        kernel = self._kernel()
        for case in self._one_of_each_form(kernel):
            weight = case.draw(self.device)
            prepared = kernel.prepare(case.draw(self.device))
            x = _x(kernel, 17, case.facts.in_features)
            x[3], x[16] = torch.inf, torch.nan
            y = kernel.apply(prepared, x, None)
            finite = [row for row in range(17) if row not in (3, 16)]
            self._check(kernel, y[finite], x[finite], weight.dequantize(), None, f"{case}, beside infinite rows")

    def test_inputs_of_the_product_are_left_as_they_are(self) -> None:
        kernel = self._kernel()
        for case in self._one_of_each_form(kernel):
            x, bias = _x(kernel, 17, case.facts.in_features), _bias(kernel, case.facts.out_features)
            before = x.clone(), bias.clone()
            kernel.apply(kernel.prepare(case.draw(self.device)), x, bias)
            assert torch.equal(x, before[0]), f"{case}: it changes x"
            assert torch.equal(bias, before[1]), f"{case}: it changes the bias"

    # ------------------------------------------------------------------------------------------------- weights

    def test_weights_may_be_views(self) -> None:
        kernel = self._kernel()
        for case in self._one_of_each_form(kernel):
            weight = case.draw(self.device)
            views = {
                name: tensor.T.contiguous().T if tensor.layout == torch.strided and tensor.ndim == 2 else tensor
                for name, tensor in tensors_of(weight).items()
            }
            prepared, x = kernel.prepare(with_tensors(weight, views)), _x(kernel, 3, case.facts.in_features)
            self._check(kernel, kernel.apply(prepared, x, None), x, weight.dequantize(), None, f"{case}, transposed")

    @pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
    def test_scales_may_be_of_more_groups_than_the_inputs_are_in(self, shuffled: bool) -> None:
        """As of a device's share, whose inputs belong to any of the whole linear's groups."""
        kernel = self._kernel()
        shares = [affine(bits, half, 48, 32, act_order=True) for bits in (2, 3, 4, 8) for half in (64, 80)]
        for case in self._served(kernel, shares):
            half = case.facts.in_features
            whole = replace(case, facts=replace(case.facts, in_features=2 * half, act_order=shuffled)).draw(self.device)
            assert isinstance(whole, AffineWeight)
            for inputs in (slice(0, half), slice(half, 2 * half)):
                share = replace(whole, codes=whole.codes[:, inputs], group_index=whole.groups().int()[inputs])
                x = _x(kernel, 3, half)
                y = kernel.apply(kernel.prepare(share), x, None)
                self._check(kernel, y, x, share.dequantize(), None, f"{case}, inputs {inputs.start} to {inputs.stop}")

    @pytest.mark.parametrize("seeds", _SEEDS, ids=["kept apart", "joined"])
    def test_stacked_weights_equal_the_weights_one_by_one(self, seeds: tuple[int, ...]) -> None:
        kernel = self._kernel()
        ordered = next((case for case in self._served(kernel) if case.facts.act_order), None)
        for case in (*self._one_of_each_form(kernel), *([ordered] if ordered else [])):
            facts = [replace(case.facts, out_features=times * case.facts.out_features) for times in (1, 2, 3)]
            if any(kernel.why_not(each) for each in facts):
                continue
            parts = [replace(case, facts=each).draw(self.device, seed) for each, seed in zip(facts, seeds, strict=True)]
            if case.facts.act_order and len(set(seeds)) == 1:  # drawn after the codes, so not yet the same
                parts = [_in_the_order_of(part, parts[0]) for part in parts]
            dense = torch.cat([part.dequantize() for part in parts])
            together = LinearKernels({"it": kernel}).prepare(parts)
            for rows in (1, 17):
                x, bias = _x(kernel, rows, case.facts.in_features), _bias(kernel, len(dense))
                self._check(kernel, together(x, bias), x, dense, bias, f"{case}, stacked")

    # ---------------------------------------------------------------------------------------------------- memory

    def test_num_bytes_is_what_a_prepared_weight_takes(self) -> None:
        for dtype in self.dtypes():
            kernel = self._kernel(dtype)
            large = [affine(bits, 512, 384, 128, act_order=order) for bits in (2, 3, 4, 8) for order in (False, True)]
            large += [affine(4, 512, 384, 64, symmetric=True), lookup(4, 512, 384), lookup(3, 512, 384)]
            for case in self._served(kernel, large):
                said, found = kernel.num_bytes(case.facts), bytes_reachable(kernel.prepare(case.draw(self.device)))
                assert abs(said - found) <= 0.1 * found + _SPARE_BYTES, (
                    f"{case}, {dtype}: num_bytes says {said}, what prepare returns takes {found}"
                )

    def test_prepare_leaves_the_weight_as_it_is(self) -> None:
        kernel = self._kernel()
        for case in self._served(kernel):
            weight, before = case.draw(self.device), case.draw(self.device)
            kernel.prepare(weight)
            assert torch.equal(weight.codes, before.codes), f"{case}: prepare changes codes"
            assert torch.equal(weight.dequantize(), before.dequantize()), f"{case}: prepare changes the weight"

    def test_prepare_lets_go_of_tensors_that_the_product_does_not_read(self) -> None:
        kernel = self._kernel()
        for case in self._one_of_each_form(kernel):
            memory, weight = watched(case.draw())
            prepared, x = kernel.prepare(on_device(weight, self.device)), _x(kernel, 3, case.facts.in_features)
            del weight
            before = kernel.apply(prepared, x, None)
            for name, reference in memory.items():
                if (bytes_of := reference()) is not None:
                    bytes_of[:] = 0
                    assert not torch.equal(kernel.apply(prepared, x, None), before), f"{case}: {name} is kept, not read"

    def test_kernel_keeps_nothing_of_a_weight_that_is_gone(self) -> None:
        kernel = self._kernel()
        for case in self._one_of_each_form(kernel):
            memory, weight = watched(case.draw())
            prepared = kernel.prepare(on_device(weight, self.device))
            del weight, prepared
            kept = [name for name, reference in memory.items() if reference() is not None]
            assert kept == [], f"{case}: the kernel itself keeps these tensors in memory"


def _x(kernel: LinearKernel, num_rows: int, in_features: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, in_features, generator=generator).to(kernel.device, kernel.dtype)


def _bias(kernel: LinearKernel, out_features: int) -> Tensor:
    return torch.linspace(-2, 2, out_features).to(kernel.device, kernel.dtype)


def _in_the_order_of(weight: PackedWeight, first: PackedWeight) -> PackedWeight:
    return with_tensors(weight, {"group_index": tensors_of(first)["group_index"]})
