"""QuantizationSuite: what every quantization method must do, checked against its dequantised weight in float64.

class TestMine(QuantizationSuite):
    component = "my-plugin/mine"

    def cases(self):
        return [QuantizationCase(name="4 bits", config={"quant_method": "mine", "bits": 4}, ...)]
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.interfaces.quantization import LinearShape, ParameterSpec, QuantizationMethod
from octavo.plugins.specs import QuantizationNeed, QuantizationSpec
from octavo.testing.suite import Suite

DTYPES = ("float32", "bfloat16", "float16")
NUM_ROWS = (1, 3, 17, 64)
PREFIX = "model.layers.0.mlp.up_proj"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredLinear:
    """A linear as a checkpoint stores it.

    Attributes:
        tensors: by the suffix of their names: "weight", "qweight", "scales".
        weight: [out_features, in_features], what they mean by the format's definition; worked out by the test, not by
            the method under test.
    """

    tensors: Mapping[str, Tensor]
    weight: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationCase:
    """One kind of checkpoint that the method reads.

    Attributes:
        config: the checkpoint's quantization_config; {} for plain weights.
        store: makes a random linear of a shape. It is also asked for multiples and halves of `shape`.
        shape: in_features and out_features differ, and their halves can be stored too.
    """

    name: str
    store: Callable[[LinearShape, torch.Generator], StoredLinear]
    config: Mapping[str, object] = field(default_factory=dict)
    shape: LinearShape = LinearShape(in_features=128, out_features=96)  # noqa: RUF009


def store_plain(shape: LinearShape, generator: torch.Generator) -> StoredLinear:
    """Weights as floats, in format "none"."""
    weight = torch.randn(shape.out_features, shape.in_features, generator=generator)
    return StoredLinear(tensors={"weight": weight}, weight=weight)


class QuantizationSuite(Suite):
    """The conformance of a quantization method.

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

    def make(self, config: Mapping[str, object], dtype: torch.dtype) -> QuantizationMethod:
        """The method for a checkpoint, as the engine makes it."""
        method: QuantizationMethod = self.build(config, dtype, self.device, {})
        return method

    def spec(self) -> QuantizationSpec:
        """What the component says of itself."""
        spec = self.candidate().spec
        assert isinstance(spec, QuantizationSpec)
        return spec

    def dtypes(self) -> list[str]:
        """The model's dtypes that it accepts here."""
        need = QuantizationNeed(device=self.device, format=self.spec().formats[0])
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

    def _subjects(self) -> Iterator[_Subject]:
        """Each case in the first dtype that is accepted."""
        dtype = self.dtypes()[0]
        for case in self.cases():
            yield self._subject(case, dtype)

    def _subject(self, case: QuantizationCase, dtype: str) -> _Subject:
        torch_dtype: torch.dtype = getattr(torch, dtype)
        method = self.make(case.config, torch_dtype)
        return _Subject(case=case, method=method, tolerance=self.tolerances[dtype], device=self.device)

    # ------------------------------------------------------------------------------------------------- contract

    def test_is_a_quantization_method(self) -> None:
        for subject in self._subjects():
            assert isinstance(subject.method, QuantizationMethod), subject.case.name

    def test_spec_accepts_the_checkpoints_it_reads(self) -> None:
        for case in self.cases():
            reasons = self.spec().why_not(_need_of(case, self.device, self.dtypes()[0]))
            assert reasons == [], f"{case.name}: its spec refuses the checkpoint"

    def test_refusals_are_sentences(self) -> None:
        need = _need_of(self.cases()[0], self.device, self.dtypes()[0])
        strange = [replace(need, format="no-such-format"), replace(need, dtype="float64")]
        strange += [replace(need, bits=97)] if self.spec().bits else []
        assert self.spec().why_not(strange[0]), "it accepts a format that it does not list"
        for each in strange:
            for reason in self.spec().why_not(each):
                assert len(reason.split()) > 2, f"{reason!r} does not explain why it refuses {each}"
                assert not reason.startswith("its probe"), f"{reason} (asked with {each})"

    # ----------------------------------------------------------------------------------------------- parameters

    def test_parameters_are_the_tensors_of_the_checkpoint(self) -> None:
        for subject in self._subjects():
            for shape in subject.part_shapes:
                declared = {spec.name: spec for spec in subject.method.parameters(PREFIX, shape)}
                stored = subject.stored(shape).tensors
                assert set(declared) == set(stored), f"{subject}: declares other names than the checkpoint has"
                for name, spec in declared.items():
                    found = stored[name]
                    assert spec.shape == tuple(found.shape), f"{subject}: {name} has another shape for {shape}"
                    fits = found.dtype.is_floating_point if spec.dtype is None else found.dtype == spec.dtype
                    assert fits, f"{subject}: {name} is stored as {found.dtype}, declared as {spec.dtype}"

    def test_axes_are_those_along_which_the_shape_changes(self) -> None:
        for subject in self._subjects():
            whole = subject.method.parameters(PREFIX, subject.shape)
            halves = {"output_axis": subject.half_output}
            if _is_cut_on_input(whole):
                halves["input_axis"] = subject.half_input
            for axis_name, half in halves.items():
                for spec, smaller in zip(whole, subject.method.parameters(PREFIX, half), strict=True):
                    wanted, axis = list(spec.shape), getattr(spec, axis_name)
                    if axis is not None:
                        wanted[axis] //= 2
                    assert list(smaller.shape) == wanted, f"{subject}: {spec.name} has {axis_name}={axis}"

    def test_pack_factor_counts_the_values_of_an_element(self) -> None:
        for subject in self._subjects():
            for spec in subject.method.parameters(PREFIX, subject.shape):
                if spec.pack_factor != 1:
                    features = (subject.shape.out_features, subject.shape.in_features)
                    unpacked = [
                        axis is not None and spec.shape[axis] * spec.pack_factor == size
                        for axis, size in zip((spec.output_axis, spec.input_axis), features, strict=True)
                    ]
                    assert any(unpacked), f"{subject}: {spec.name} packs {spec.pack_factor} values along neither axis"

    # --------------------------------------------------------------------------------------------------- product

    def test_dequantize_gives_the_stored_weight_in_float32(self) -> None:
        for subject in self._subjects():
            stored = subject.stored()
            found = subject.method.dequantize(subject.shape, subject.tensors(stored))
            assert found.dtype == torch.float32, f"{subject}: float32 is wanted, found {found.dtype}"
            assert found.shape == stored.weight.shape, f"{subject}: [out_features, in_features] is wanted"
            allowed = torch.finfo(subject.method.dtype).eps * stored.weight.abs().max()
            error = (found.cpu() - stored.weight).abs().max()
            assert error <= allowed, f"{subject}: a weight is wrong by {error:.2g}"

    @pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
    def test_product_equals_the_dequantised_one(self, bias: bool) -> None:
        for dtype in self.dtypes():
            for case in self.cases():
                subject = self._subject(case, dtype)
                stored = subject.stored()
                prepared = subject.prepare(stored)
                weight = subject.method.dequantize(subject.shape, subject.tensors(stored))
                for num_rows in NUM_ROWS:
                    subject.check(prepared, weight, num_rows, bias=bias)

    def test_product_of_no_rows_has_no_rows(self) -> None:
        for subject in self._subjects():
            y = subject.apply(subject.prepare(subject.stored()), num_rows=0)
            assert y.shape == (0, subject.shape.out_features), str(subject)

    def test_same_product_gives_the_same_bits(self) -> None:
        for subject in self._subjects():
            prepared = subject.prepare(subject.stored())
            assert torch.equal(subject.apply(prepared), subject.apply(prepared)), str(subject)

    def test_inputs_of_the_product_are_left_as_they_are(self) -> None:
        for subject in self._subjects():
            prepared, x, bias = subject.prepare(subject.stored()), subject.x(17), subject.bias(subject.shape)
            before = x.clone(), bias.clone()
            subject.method.apply(prepared, x, bias)
            assert torch.equal(x, before[0]), f"{subject}: it changes x"
            assert torch.equal(bias, before[1]), f"{subject}: it changes the bias"

    # ------------------------------------------------------------------------------------------ parts of a linear

    def test_stacked_parts_equal_the_parts_one_by_one(self) -> None:
        for subject in self._subjects():
            if not subject.method.can_stack:
                continue
            stored = [subject.stored(shape) for shape in subject.part_shapes]
            whole = replace(subject.shape, out_features=sum(shape.out_features for shape in subject.part_shapes))
            parts = [subject.tensors(each) for each in stored]
            weights = [subject.method.dequantize(*part) for part in zip(subject.part_shapes, parts, strict=True)]
            together = subject.method.prepare(whole, parts)
            for num_rows in NUM_ROWS:
                subject.check(together, torch.cat(weights), num_rows, bias=True)

    def test_linear_cut_on_its_outputs_is_rows_of_the_whole(self) -> None:
        for subject in self._subjects():
            stored = subject.stored()
            for index, rows in enumerate(stored.weight.chunk(2, dim=0)):
                subject.check_cut(stored, "output_axis", index, subject.half_output, rows)

    def test_linear_cut_on_its_inputs_is_columns_of_the_whole(self) -> None:
        for subject in self._subjects():
            stored = subject.stored()
            if _is_cut_on_input(subject.method.parameters(PREFIX, subject.shape)):
                for index, columns in enumerate(stored.weight.chunk(2, dim=1)):
                    subject.check_cut(stored, "input_axis", index, subject.half_input, columns)

    # ---------------------------------------------------------------------------------------------------- memory

    def test_prepare_leaves_the_checkpoint_s_tensors_as_they_are(self) -> None:
        for subject in self._subjects():
            stacks = [[subject.shape]] + ([subject.part_shapes] if subject.method.can_stack else [])
            for shapes in stacks:
                parts = [subject.tensors(subject.stored(shape)) for shape in shapes]
                before = [{name: tensor.clone() for name, tensor in part.items()} for part in parts]
                whole = replace(subject.shape, out_features=sum(shape.out_features for shape in shapes))
                subject.method.prepare(whole, parts)
                for part, old in zip(parts, before, strict=True):
                    assert set(part) == set(old), f"{subject}: prepare takes tensors out of the mapping it is given"
                    for name, tensor in part.items():
                        assert _same_bits(tensor, old[name]), f"{subject}: prepare changes {name}"

    def test_prepare_lets_go_of_tensors_that_the_product_does_not_read(self) -> None:
        for subject in self._subjects():
            memory, tensors = _watched(subject.tensors(subject.stored()))
            prepared = subject.method.prepare(subject.shape, [tensors])
            tensors.clear()
            before = subject.apply(prepared)
            for name, reference in memory.items():
                if (bytes_of := reference()) is not None:
                    bytes_of[:] = 0
                    assert not torch.equal(subject.apply(prepared), before), f"{subject}: {name} is kept and not read"

    def test_method_keeps_nothing_of_a_linear_that_is_gone(self) -> None:
        for subject in self._subjects():
            memory, tensors = _watched(subject.tensors(subject.stored()))
            prepared = subject.method.prepare(subject.shape, [tensors])
            tensors.clear()
            del prepared
            kept = [name for name, reference in memory.items() if reference() is not None]
            assert kept == [], f"{subject}: the method itself keeps these tensors in memory"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Subject:
    """A method made for one case, and what it is given."""

    case: QuantizationCase
    method: QuantizationMethod
    tolerance: float
    device: str

    def __str__(self) -> str:
        return f"{self.case.name}, {self.method.dtype}"

    @property
    def shape(self) -> LinearShape:
        return self.case.shape

    @property
    def part_shapes(self) -> list[LinearShape]:
        """Of a stack: once, twice and three times as many outputs, so that no part can be taken for another."""
        return [replace(self.shape, out_features=times * self.shape.out_features) for times in (1, 2, 3)]

    @property
    def half_output(self) -> LinearShape:
        return replace(self.shape, out_features=self.shape.out_features // 2)

    @property
    def half_input(self) -> LinearShape:
        return replace(self.shape, in_features=self.shape.in_features // 2)

    def stored(self, shape: LinearShape | None = None) -> StoredLinear:
        """Another linear for each number of outputs, the same for each call."""
        shape = shape or self.shape
        return self.case.store(shape, torch.Generator().manual_seed(shape.out_features))

    def tensors(self, stored: StoredLinear) -> dict[str, Tensor]:
        """As the loader hands them over: those of any dtype in the model's, the others as they are stored."""
        any_dtype = {spec.name for spec in self.method.parameters(PREFIX, self.shape) if spec.dtype is None}
        return {
            name: tensor.to(self.method.dtype, copy=True) if name in any_dtype else tensor.clone()
            for name, tensor in stored.tensors.items()
        }

    def prepare(self, stored: StoredLinear) -> object:
        return self.method.prepare(self.shape, [self.tensors(stored)])

    def x(self, num_rows: int, in_features: int | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(num_rows)
        x = torch.randn(num_rows, in_features or self.shape.in_features, generator=generator)
        return x.to(self.method.dtype).to(self.device)

    def bias(self, shape: LinearShape) -> Tensor:
        return torch.linspace(-2, 2, shape.out_features).to(self.method.dtype).to(self.device)

    def apply(self, prepared: object, num_rows: int = 17) -> Tensor:
        return self.method.apply(prepared, self.x(num_rows), None)

    def check(self, prepared: object, weight: Tensor, num_rows: int, *, bias: bool) -> None:
        """Compare the product with this weight's, in float64."""
        shape = LinearShape(in_features=weight.shape[1], out_features=weight.shape[0])
        x, b = self.x(num_rows, shape.in_features), self.bias(shape) if bias else None
        y = self.method.apply(prepared, x, b)
        where = f"{self}, {num_rows} row(s)"
        assert y.dtype == self.method.dtype, f"{where}: the product is {y.dtype}"
        assert y.shape == (num_rows, shape.out_features), f"{where}: [num_tokens, out_features] is wanted"
        x, weight = x.cpu().double(), weight.cpu().double()
        wanted, bound = x @ weight.T, x.abs() @ weight.abs().T
        if b is not None:
            wanted, bound = wanted + b.cpu().double(), bound + b.cpu().double().abs()
        share = ((y.cpu().double() - wanted).abs() / bound).nan_to_num(nan=math.inf).max()
        assert share <= self.tolerance, f"{where}: wrong by {share:.2g} of |x| @ |W|.T, allowed is {self.tolerance:g}"

    def check_cut(self, stored: StoredLinear, axis_name: str, index: int, half: LinearShape, weight: Tensor) -> None:
        """The tensors cut along their declared axes are a linear whose weight is this part of the whole's."""
        tensors = self.tensors(stored)
        for spec in self.method.parameters(PREFIX, self.shape):
            if (axis := getattr(spec, axis_name)) is not None:
                tensors[spec.name] = tensors[spec.name].chunk(2, dim=axis)[index].contiguous()
        found = self.method.dequantize(half, tensors)
        assert found.shape == weight.shape, f"{self}: part {index} along {axis_name} is {tuple(found.shape)}"
        allowed = torch.finfo(self.method.dtype).eps * stored.weight.abs().max()
        error = (found.cpu() - weight).abs().max()
        assert error <= allowed, f"{self}: part {index} along {axis_name} is not that part of the whole"
        self.check(self.method.prepare(half, [tensors]), found, 3, bias=False)


def _need_of(case: QuantizationCase, device: str, dtype: str) -> QuantizationNeed:
    bits = case.config.get("bits")
    return QuantizationNeed(
        device=device,
        dtype=dtype,
        format=str(case.config.get("quant_method", "none")),
        bits=bits if isinstance(bits, int) else None,
    )


def _is_cut_on_input(specs: Sequence[ParameterSpec]) -> bool:
    return any(spec.input_axis is not None for spec in specs)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _watched(tensors: Mapping[str, Tensor]) -> tuple[dict[str, weakref.ref[np.ndarray]], dict[str, Tensor]]:  # type: ignore[type-arg]
    """Copies of the tensors, and references to their memory that are dead once nobody holds it."""
    memory, copies = {}, {}
    for name, tensor in tensors.items():
        bytes_of = np.array(tensor.contiguous().flatten().view(torch.uint8).numpy())
        memory[name] = weakref.ref(bytes_of)
        copies[name] = torch.from_numpy(bytes_of).view(tensor.dtype).view(tensor.shape)
    return memory, copies
