"""QuantizationSuite: what every quantization method must do, checked against its dequantised weight in float64.

class TestMine(QuantizationSuite):
    component = "my-plugin/mine"

    def cases(self):
        return [QuantizationCase(name="4 bits", config={"quant_method": "mine", "bits": 4}, store=store_mine)]
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.interfaces.checkpoint import TensorHeader
from octavo.interfaces.linear_kernel import AffineWeight, LinearKernels
from octavo.interfaces.quantization import ParameterSpec, QuantizationMethod, StoredLinear
from octavo.plugins.quantized_checkpoint import quantization_need
from octavo.plugins.specs import QuantizationNeed, QuantizationSpec
from octavo.testing.stored_weight import (
    PART_PREFIXES,
    PREFIX,
    LoadedLinear,
    QuantizationCase,
    StoredWeight,
    headers_of,
    store_plain,
)
from octavo.testing.suite import Suite, installed_components

DTYPES = ("float32", "bfloat16", "float16")
NUM_ROWS = (1, 3, 17, 64)

_SEEDS = ((0, 1, 2), (7, 7, 7))
"""Of a stack's parts. With one seed, groups that are drawn first are the same in all, and the parts may be joined."""


class QuantizationSuite(Suite):
    """The conformance of a quantization method.

    Where it leaves the product to linear kernels, the built-in reference multiplies.

    Attributes:
        device: where its tests run. A method that needs a GPU says "cuda", and its tests are skipped elsewhere with
            `pytestmark = pytest.mark.skipif(...)`.
        tolerances: largest error of y = x @ W.T + b, as a share of |x| @ |W|.T + |b|, by the model's dtype.
    """

    kind = "quantization"
    device: ClassVar[str] = "cpu"
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}

    # ---------------------------------------------------------------------------------------- what is under test

    def cases(self) -> Sequence[QuantizationCase]:
        """The checkpoints to read; to be given by the author unless they are plain weights."""
        assert "none" in self.spec().formats, "override cases(): the suite does not know how your format stores weights"
        return [QuantizationCase(name="plain", store=store_plain)]

    def make(
        self, config: Mapping[str, object], dtype: torch.dtype, headers: Mapping[str, TensorHeader]
    ) -> QuantizationMethod:
        """The method for a checkpoint, as the engine makes it."""
        method: QuantizationMethod = self.build(config, dtype, self.device, headers, self.kernels(dtype))
        return method

    def kernels(self, dtype: torch.dtype) -> LinearKernels:
        """The reference of every linear kernel; none for a method that multiplies itself."""
        if not self.spec().weight_form:
            return LinearKernels({})
        installed = installed_components()
        reference = installed.component(installed.find("linear_kernel", "builtin/torch-packed"), {})
        return LinearKernels({"torch-packed": reference.build(dtype, self.device)})

    def spec(self) -> QuantizationSpec:
        """What the component says of itself."""
        spec = self.candidate().spec
        assert isinstance(spec, QuantizationSpec)
        return spec

    def dtypes(self) -> list[str]:
        """The model's dtypes that it accepts here."""
        need = replace(self._need(self.cases()[0]), bits=None)
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

    def _need(self, case: QuantizationCase, dtype: str | None = None) -> QuantizationNeed:
        need = quantization_need(case.config, self.device, dtype or DTYPES[0])
        return need if dtype else replace(need, dtype=None)

    def _loaded(self) -> Iterator[LoadedLinear]:
        """A linear of each case in the first dtype that is accepted."""
        for case in self.cases():
            yield self._load(case, self.dtypes()[0])

    def _load(self, case: QuantizationCase, dtype: str, stored: StoredWeight | None = None) -> LoadedLinear:
        stored = stored or case.stored()
        method = self.make(case.config, getattr(torch, dtype), headers_of(stored.tensors))
        return LoadedLinear(case=case, stored=stored, method=method, tolerance=self.tolerances[dtype])

    def _stacks(self) -> Iterator[list[LoadedLinear]]:
        """Parts of a stack, of one method each, where it can stack."""
        dtype = self.dtypes()[0]
        for case in self.cases():
            for seeds in _SEEDS:
                parts = case.parts(seeds)
                headers: dict[str, TensorHeader] = {}
                for prefix, part in zip(PART_PREFIXES, parts, strict=True):
                    headers |= headers_of(part.tensors, prefix)
                method = self.make(case.config, getattr(torch, dtype), headers)
                if method.can_stack:
                    yield [
                        LoadedLinear(
                            case=case, stored=part, method=method, tolerance=self.tolerances[dtype], prefix=prefix
                        )
                        for prefix, part in zip(PART_PREFIXES, parts, strict=True)
                    ]

    # ------------------------------------------------------------------------------------------------- contract

    def test_is_a_quantization_method(self) -> None:
        for loaded in self._loaded():
            assert isinstance(loaded.method, QuantizationMethod), loaded.case.name

    def test_spec_accepts_the_checkpoints_it_reads(self) -> None:
        for case in self.cases():
            reasons = self.spec().why_not(self._need(case, self.dtypes()[0]))
            assert reasons == [], f"{case.name}: its spec refuses the checkpoint"

    def test_refusals_are_sentences(self) -> None:
        need = self._need(self.cases()[0], self.dtypes()[0])
        strange = [replace(need, format="no-such-format"), replace(need, dtype="float64")]
        strange += [replace(need, bits=97)] if self.spec().bits else []
        assert self.spec().why_not(strange[0]), "it accepts a format that it does not list"
        for each in strange:
            for reason in self.spec().why_not(each):
                assert len(reason.split()) > 2, f"{reason!r} does not explain why it refuses {each}"
                assert not reason.startswith("its probe"), f"{reason} (asked with {each})"

    def test_quantizes_the_linears_whose_tensors_the_checkpoint_has(self) -> None:
        for loaded in self._loaded():
            assert loaded.method.quantizes(PREFIX), f"{loaded}: not {PREFIX}, though its tensors are there"

    def test_leaves_plain_weights_to_the_core(self) -> None:
        if "none" in self.spec().formats:
            return
        plain = store_plain(self.cases()[0].shape, torch.Generator())
        for loaded in self._loaded():
            others = headers_of(loaded.stored.tensors, PART_PREFIXES[0])
            method = self.make(loaded.case.config, loaded.method.dtype, {**others, **headers_of(plain.tensors)})
            assert method.quantizes(PART_PREFIXES[0]), f"{loaded}: not the linear whose tensors are there"
            assert not method.quantizes(PREFIX), f"{loaded}: {PREFIX}.weight is there and nothing else, yet it is taken"

    # ----------------------------------------------------------------------------------------------- parameters

    def test_parameters_are_the_tensors_of_the_checkpoint(self) -> None:
        for one in (*self._loaded(), *(part for parts in self._stacks() for part in parts)):
            declared, stored = {spec.name: spec for spec in one.parameters}, one.stored.tensors
            assert set(declared) == set(stored), f"{one}: declares other names than the checkpoint has"
            for name, spec in declared.items():
                found = stored[name]
                assert spec.shape == tuple(found.shape), f"{one}: {name} has another shape for {one.stored.shape}"
                fits = found.dtype.is_floating_point if spec.dtype is None else found.dtype == spec.dtype
                assert fits, f"{one}: {name} is stored as {found.dtype}, declared as {spec.dtype}"

    def test_axes_are_those_along_which_the_shape_changes(self) -> None:
        dtype = self.dtypes()[0]
        for whole in self._loaded():
            halves = {"output_axis": whole.case.half_output}
            if _is_cut_on_input(whole.parameters):
                halves["input_axis"] = whole.case.half_input
            for axis_name, shape in halves.items():
                half = self._load(whole.case, dtype, whole.case.stored(shape))
                smaller = {spec.name: spec.shape for spec in half.parameters}
                for spec in whole.parameters:
                    if (axis := getattr(spec, axis_name)) is not None:
                        wanted = list(spec.shape)
                        wanted[axis] //= 2
                        assert list(smaller[spec.name]) == wanted, f"{whole}: {spec.name} has {axis_name}={axis}"

    def test_pack_factor_counts_the_values_of_its_elements(self) -> None:
        for loaded in self._loaded():
            shape = loaded.stored.shape
            for spec in loaded.parameters:
                sizes = {spec.output_axis: shape.out_features, spec.input_axis: shape.in_features}
                fits = [
                    axis is not None and spec.shape[axis] == -(-size * spec.pack_elements // spec.pack_factor)
                    for axis, size in sizes.items()
                ]
                values = f"{spec.pack_factor} values in {spec.pack_elements} element(s)"
                if spec.pack_factor != 1 or spec.pack_elements != 1:
                    assert any(fits), f"{loaded}: {spec.name} {spec.shape} has {values} along neither axis"
                elif spec.dtype is not None and not spec.dtype.is_floating_point and spec.output_axis is not None:
                    assert fits[0] or len(spec.shape) < 2, f"{loaded}: {spec.name} {spec.shape} says it is not packed"

    # --------------------------------------------------------------------------------------- what the tensors mean

    def test_dequantize_gives_the_stored_weight_in_float32(self) -> None:
        for dtype in self.dtypes():
            for case in self.cases():
                loaded = self._load(case, dtype)
                found = loaded.method.dequantize(loaded.linear())
                assert found.dtype == torch.float32, f"{loaded}: float32 is wanted, found {found.dtype}"
                assert found.shape == loaded.stored.weight.shape, f"{loaded}: [out_features, in_features] is wanted"
                error = (found.cpu() - loaded.stored.weight).abs().max()
                assert error <= loaded.rounding, f"{loaded}: a weight is wrong by {error:.2g}"

    def test_weight_is_of_the_form_that_its_spec_names(self) -> None:
        if form := self.spec().weight_form:
            for loaded in self._loaded():
                weight, shape = loaded.method.weight(loaded.linear()), loaded.stored.shape
                assert weight.facts.form == form, f"{loaded}: its spec says {form}"
                codes = weight.codes
                assert codes.dtype == torch.uint8, f"{loaded}: codes are {codes.dtype}, wanted is uint8"
                assert codes.shape == (shape.out_features, shape.in_features), f"{loaded}: codes {tuple(codes.shape)}"
                assert int(codes.max()) < 2**weight.bits, f"{loaded}: a code has more than {weight.bits} bits"
                if isinstance(weight, AffineWeight) and weight.zeros is not None:
                    assert weight.zeros.dtype == torch.uint8, f"{loaded}: zeros are {weight.zeros.dtype}"
                    assert weight.zeros.shape == weight.scales.shape, f"{loaded}: zeros {tuple(weight.zeros.shape)}"

    def test_facts_are_those_of_the_weight(self) -> None:
        if not self.spec().weight_form:
            return
        for loaded in self._loaded():
            facts = loaded.method.facts(PREFIX, loaded.stored.shape)
            weight = loaded.method.weight(loaded.linear()).facts
            assert facts is not None, f"{loaded}: its spec names a weight_form, so kernels are asked with its facts"
            assert facts.act_order or not weight.act_order, f"{loaded}: inputs are in an order of their own"
            assert replace(facts, act_order=weight.act_order) == weight, f"{loaded}: facts and weight disagree"

    def test_facts_are_known_before_there_are_weights(self) -> None:
        if not self.spec().weight_form:
            return
        for loaded in self._loaded():
            method = self.make(loaded.case.config, loaded.method.dtype, {})
            if method.quantizes(PREFIX):
                facts, shape = method.facts(PREFIX, loaded.stored.shape), loaded.stored.shape
                known = loaded.method.facts(PREFIX, shape)
                assert facts is not None, str(loaded)
                assert known is not None, str(loaded)
                for name in ("form", "bits", "in_features", "out_features", "group_size"):
                    assert getattr(facts, name) == getattr(known, name), f"{loaded}: {name} by the configuration alone"

    # --------------------------------------------------------------------------------------------------- product

    @pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
    def test_product_equals_the_dequantised_one(self, bias: bool) -> None:
        for dtype in self.dtypes():
            for case in self.cases():
                loaded = self._load(case, dtype)
                prepared = loaded.method.prepare([loaded.linear()])
                weight = loaded.method.dequantize(loaded.linear())
                for num_rows in NUM_ROWS:
                    loaded.check(prepared, weight, num_rows, bias=bias)

    def test_product_of_no_rows_has_no_rows(self) -> None:
        for loaded in self._loaded():
            y = loaded.apply(loaded.method.prepare([loaded.linear()]), num_rows=0)
            assert y.shape == (0, loaded.stored.shape.out_features), str(loaded)

    def test_same_product_gives_the_same_bits(self) -> None:
        for loaded in self._loaded():
            prepared = loaded.method.prepare([loaded.linear()])
            assert torch.equal(loaded.apply(prepared), loaded.apply(prepared)), str(loaded)

    def test_inputs_of_the_product_are_left_as_they_are(self) -> None:
        for loaded in self._loaded():
            prepared = loaded.method.prepare([loaded.linear()])
            x, bias = loaded.x(17), loaded.bias(loaded.stored.shape.out_features)
            before = x.clone(), bias.clone()
            loaded.method.apply(prepared, x, bias)
            assert torch.equal(x, before[0]), f"{loaded}: it changes x"
            assert torch.equal(bias, before[1]), f"{loaded}: it changes the bias"

    # ------------------------------------------------------------------------------------------ parts of a linear

    def test_stacked_parts_equal_the_parts_one_by_one(self) -> None:
        for parts in self._stacks():
            linears = [part.linear() for part in parts]
            method = parts[0].method
            weight = torch.cat([method.dequantize(linear) for linear in linears])
            together = method.prepare(linears)
            for num_rows in NUM_ROWS:
                parts[0].check(together, weight, num_rows, bias=True)

    def test_linear_cut_on_its_outputs_is_rows_of_the_whole(self) -> None:
        for loaded in self._loaded():
            for index, rows in enumerate(loaded.stored.weight.chunk(2, dim=0)):
                _check_share(loaded, "output_axis", index, rows)

    def test_linear_cut_on_its_inputs_is_columns_of_the_whole(self) -> None:
        for loaded in self._loaded():
            if _is_cut_on_input(loaded.parameters):
                for index, columns in enumerate(loaded.stored.weight.chunk(2, dim=1)):
                    _check_share(loaded, "input_axis", index, columns)

    # ---------------------------------------------------------------------------------------------------- memory

    def test_prepare_leaves_the_checkpoint_s_tensors_as_they_are(self) -> None:
        for parts in (*([loaded] for loaded in self._loaded()), *self._stacks()):
            linears = [part.linear() for part in parts]
            before = [{name: tensor.clone() for name, tensor in linear.tensors.items()} for linear in linears]
            parts[0].method.prepare(linears)
            for linear, old in zip(linears, before, strict=True):
                assert set(linear.tensors) == set(old), f"{parts[0]}: prepare takes tensors out of the mapping"
                for name, tensor in linear.tensors.items():
                    assert _same_bits(tensor, old[name]), f"{parts[0]}: prepare changes {name}"

    def test_prepare_lets_go_of_tensors_that_the_product_does_not_read(self) -> None:
        for loaded in self._loaded():
            memory, prepared = _prepare_watched(loaded)
            before = loaded.apply(prepared)
            for name, reference in memory.items():
                if (bytes_of := reference()) is not None:
                    bytes_of[:] = 0
                    assert not torch.equal(loaded.apply(prepared), before), f"{loaded}: {name} is kept and not read"

    def test_method_keeps_nothing_of_a_linear_that_is_gone(self) -> None:
        for loaded in self._loaded():
            memory, prepared = _prepare_watched(loaded)
            del prepared
            kept = [name for name, reference in memory.items() if reference() is not None]
            assert kept == [], f"{loaded}: the method itself keeps these tensors in memory"


def _check_share(loaded: LoadedLinear, axis_name: str, index: int, weight: Tensor) -> None:
    """The tensors cut along their declared axes are a linear whose weight is this part of the whole's."""
    share = loaded.share(axis_name, index)
    found = loaded.method.dequantize(share)
    assert found.shape == weight.shape, f"{loaded}: part {index} along {axis_name} is {tuple(found.shape)}"
    error = (found.cpu() - weight).abs().max()
    assert error <= loaded.rounding, f"{loaded}: part {index} along {axis_name} is not that part of the whole"
    loaded.check(loaded.method.prepare([share]), found, 3, bias=False)
    if facts := loaded.method.facts(PREFIX, share.shape):  # which the plan counts with
        sizes = (share.shape.in_features, share.shape.out_features)
        assert (facts.in_features, facts.out_features) == sizes, f"{loaded}: the facts are not the share's"


def _is_cut_on_input(specs: Sequence[ParameterSpec]) -> bool:
    return any(spec.input_axis is not None for spec in specs)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _prepare_watched(loaded: LoadedLinear) -> tuple[dict[str, weakref.ref[np.ndarray]], object]:  # type: ignore[type-arg]
    """What prepare makes of copies of the tensors, and references to their memory, dead once nobody holds it."""
    memory, copies = {}, {}
    linear = loaded.linear()
    for name, tensor in linear.tensors.items():
        bytes_of = np.array(tensor.contiguous().flatten().view(torch.uint8).numpy())
        memory[name] = weakref.ref(bytes_of)
        copies[name] = torch.from_numpy(bytes_of).view(tensor.dtype).view(tensor.shape)
    watched: StoredLinear = replace(linear, tensors=copies)
    return memory, loaded.method.prepare([watched])
