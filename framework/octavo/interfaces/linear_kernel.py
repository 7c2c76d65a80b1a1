"""LinearKernel socket: how a linear's packed weights are multiplied, whatever format stored them.

A quantization method reads a format and says what its tensors mean, as one of the weights here; the best kernel that
serves this weight multiplies with it. So a kernel serves every format of its form, and a format needs no kernel.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from octavo.errors import UnavailableComponentError


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFacts:
    """What is known of a packed weight before its tensors are there; what kernels are asked with.

    Attributes:
        form: "affine" (AffineWeight) or "lookup" (LookupWeight).
        group_size: inputs that share a scale; `in_features` where there are no groups.
        act_order: inputs belong to groups in an order of their own.
        symmetric: every zero is 2 ** (bits - 1).
        outliers: how many weights lie beside the codes, sparse; about as many where it is not known yet.
    """

    form: str
    bits: int
    in_features: int
    out_features: int
    group_size: int
    act_order: bool = False
    symmetric: bool = False
    outliers: int = field(default=0, compare=False)

    def join(self, other: WeightFacts) -> WeightFacts | None:
        """Of both as one weight, the outputs of `other` behind its own; None: they cannot be one."""
        symmetric, outputs = self.symmetric and other.symmetric, self.out_features + other.out_features
        whole = replace(self, out_features=outputs, symmetric=symmetric, outliers=self.outliers + other.outliers)
        alike = replace(other, out_features=outputs, symmetric=symmetric)
        return whole if whole == alike else None

    def __str__(self) -> str:
        groups = "no groups" if self.group_size >= self.in_features else f"groups of {self.group_size}"
        more = [
            word
            for word, said in (
                ("act-order", self.act_order),
                ("asymmetric", self._asymmetric),
                ("sparse", self.outliers),
            )
            if said
        ]
        words = [f"{self.bits} bits", *([groups] if self.form == "affine" else ["lookup"]), *more]
        return f"{self.in_features} -> {self.out_features}, {', '.join(words)}"

    @property
    def _asymmetric(self) -> bool:
        return self.form == "affine" and not self.symmetric


@dataclass(frozen=True, kw_only=True, slots=True)
class AffineWeight:
    """W[n, k] = scales[g(k), n] * (codes[n, k] - zeros[g(k), n]).

    Attributes:
        bits: of a code, 1 to 8.
        codes: [out_features, in_features] uint8, each below 2 ** bits.
        scales: [num_groups, out_features], of the floating dtype they are stored in.
        zeros: [num_groups, out_features] uint8; None: every zero is 2 ** (bits - 1).
        group_size: inputs of a group; the last group may be shorter.
        group_index: [in_features] int32, g; None: g(k) = k // group_size. A device's share of inputs in an order of
            their own may be in some of the groups only.

    Source: Frantar et al. 2022, GPTQ, arXiv:2210.17323; Lin et al. 2023, AWQ, arXiv:2306.00978.
    """

    bits: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_size: int
    group_index: Tensor | None = None

    @property
    def facts(self) -> WeightFacts:
        out_features, in_features = self.codes.shape
        return WeightFacts(
            form="affine",
            bits=self.bits,
            in_features=in_features,
            out_features=out_features,
            group_size=min(self.group_size, in_features),
            act_order=self.group_index is not None,
            symmetric=self.zeros is None,
        )

    def groups(self) -> Tensor:
        """[in_features] int64: the group of every input."""
        if self.group_index is not None:
            return self.group_index.long()
        return torch.arange(self.codes.shape[1], device=self.codes.device) // self.group_size

    def dequantize(self) -> Tensor:
        """[out_features, in_features] float32, each product rounded once: the reference of every kernel."""
        groups = self.groups()
        zeros = 2 ** (self.bits - 1) if self.zeros is None else self.zeros.float()[groups].T
        return (self.codes.float() - zeros) * self.scales.float()[groups].T

    def of_outputs(self, rows: slice) -> AffineWeight:
        """The weight of some outputs, as views."""
        zeros = None if self.zeros is None else self.zeros[:, rows]
        return replace(self, codes=self.codes[rows], scales=self.scales[:, rows], zeros=zeros)

    def joins(self, other: PackedWeight) -> bool:
        """Whether both are one weight when the outputs of `other` follow its own."""
        if not isinstance(other, AffineWeight):
            return False
        same = (self.bits, self.group_size, self.scales.dtype) == (other.bits, other.group_size, other.scales.dtype)
        return same and _equal(self.group_index, other.group_index)

    @staticmethod
    def join(weights: Sequence[AffineWeight]) -> AffineWeight:
        """Weights that `joins` said yes to, their outputs behind each other."""
        first = weights[0]
        middle = 2 ** (first.bits - 1)
        zeros = None
        if any(one.zeros is not None for one in weights):
            zeros = torch.cat(
                [
                    torch.full_like(one.scales, middle, dtype=torch.uint8) if one.zeros is None else one.zeros
                    for one in weights
                ],
                dim=1,
            )
        return AffineWeight(
            bits=first.bits,
            codes=torch.cat([one.codes for one in weights]),
            scales=torch.cat([one.scales for one in weights], dim=1),
            zeros=zeros,
            group_size=first.group_size,
            group_index=first.group_index,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LookupWeight:
    """W[n, k] = table[n, codes[n, k]] + outliers[n, k].

    Attributes:
        bits: of a code, 1 to 8.
        codes: [out_features, in_features] uint8, each below 2 ** bits.
        table: [out_features, 2 ** bits] float32, a codebook for each output, in any order.
        outliers: [out_features, in_features] float32, made by `sparse_rows`; None: there are none.

    Source: Kim et al. 2023, SqueezeLLM, arXiv:2306.07629.
    """

    bits: int
    codes: Tensor
    table: Tensor
    outliers: Tensor | None = None

    @property
    def facts(self) -> WeightFacts:
        out_features, in_features = self.codes.shape
        return WeightFacts(
            form="lookup",
            bits=self.bits,
            in_features=in_features,
            out_features=out_features,
            group_size=in_features,
            outliers=0 if self.outliers is None else self.outliers.values().numel(),
        )

    def dequantize(self) -> Tensor:
        """[out_features, in_features] float32: the reference of every kernel."""
        weight = self.table.float().gather(1, self.codes.long())
        return weight if self.outliers is None else weight + self.outliers.to_dense()

    def of_outputs(self, rows: slice) -> LookupWeight:
        """The weight of some outputs; codes and tables are views."""
        outliers = None
        if self.outliers is not None:
            starts = self.outliers.crow_indices()[rows.start : rows.stop + 1].long()
            here = slice(int(starts[0]), int(starts[-1]))
            columns, values = self.outliers.col_indices()[here], self.outliers.values()[here]
            outliers = sparse_rows(starts.diff(), columns, values, self.codes.shape[1])
        return replace(self, codes=self.codes[rows], table=self.table[rows], outliers=outliers)

    def joins(self, other: PackedWeight) -> bool:
        """Whether both are one weight when the outputs of `other` follow its own."""
        return isinstance(other, LookupWeight) and self.bits == other.bits

    @staticmethod
    def join(weights: Sequence[LookupWeight]) -> LookupWeight:
        """Weights that `joins` said yes to, their outputs behind each other."""
        return LookupWeight(
            bits=weights[0].bits,
            codes=torch.cat([one.codes for one in weights]),
            table=torch.cat([one.table for one in weights]),
            outliers=_joined_outliers(weights),
        )


PackedWeight: TypeAlias = "AffineWeight | LookupWeight"


def sparse_rows(num_in_rows: Tensor, columns: Tensor, values: Tensor, num_columns: int) -> Tensor:
    """[rows, num_columns] in torch's sparse CSR, with 32-bit indices: what LookupWeight.outliers are.

    Args:
        num_in_rows: [rows] integers, how many of the values lie in each row.
        columns: [num_values] integers below num_columns, row by row; not checked.
        values: [num_values].
    """
    starts = torch.nn.functional.pad(num_in_rows.cumsum(0), (1, 0)).int()
    with warnings.catch_warnings():
        # torch says once in a process that CSR is in beta: to those who wrote what uses it, not to who serves a model.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            starts, columns.int(), values, size=(len(starts) - 1, num_columns), check_invariants=False
        )


class LinearKernel(ABC):
    """y = x @ W.T + b for packed weights, which are brought once into the layout that the kernel reads fastest.

    Constructed once for a model. Its spec names the forms, devices and dtypes it serves; `why_not` knows of shapes.
    On a GPU `apply` allocates only through torch, reads nothing back, and so can be captured into a graph.

    Attributes:
        dtype: of activations. device: "cpu", "cuda".
    """

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype = dtype
        self.device = device

    @abstractmethod
    def why_not(self, facts: WeightFacts) -> list[str]:
        """Every reason, in sentences, why it cannot serve such a weight; empty means it can."""

    @abstractmethod
    def num_bytes(self, facts: WeightFacts) -> int:
        """That a prepared weight takes on the device, sparse outliers not counted; for the memory plan."""

    @abstractmethod
    def prepare(self, weight: PackedWeight) -> object:
        """Bring a weight into the layout `apply` reads; called once. Keeps none of the weight's tensors it need not."""

    @abstractmethod
    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [num_tokens, in_features] -> [num_tokens, out_features], both of the model's dtype, accumulated in float32.

        bias: [out_features], the model's dtype.
        """


class PreparedLinear:
    """What kernels made of the weights of one linear, whose outputs lie behind each other."""

    def __init__(self, pieces: Sequence[tuple[LinearKernel, object, int]]) -> None:
        self._pieces = pieces

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [num_tokens, in_features] -> [num_tokens, out_features]."""
        if len(self._pieces) == 1:
            kernel, prepared, _ = self._pieces[0]
            return kernel.apply(prepared, x, bias)
        sizes = [size for _, _, size in self._pieces]
        biases = [None] * len(sizes) if bias is None else torch.split(bias, sizes)
        return torch.cat(
            [kernel.apply(prepared, x, part) for (kernel, prepared, _), part in zip(self._pieces, biases, strict=True)],
            dim=-1,
        )


class LinearKernels:
    """The kernels chosen for a model, the preferred first; each weight gets the first that serves it.

    Args:
        kernels: by their full names, "plugin/name".
    """

    form_names: ClassVar[tuple[str, ...]] = ("affine", "lookup")

    def __init__(self, kernels: Mapping[str, LinearKernel]) -> None:
        self._kernels = dict(kernels)

    def ask(self, facts: WeightFacts) -> dict[str, list[str]]:
        """By name, every kernel's reasons against such a weight; the first without any is the one that serves."""
        return {name: kernel.why_not(facts) for name, kernel in self._kernels.items()}

    def choose(self, facts: WeightFacts) -> LinearKernel:
        """The first kernel that serves.

        Raises:
            UnavailableComponentError: none does; quotes their reasons.
        """
        asked = self.ask(facts)
        for name, reasons in asked.items():
            if not reasons:
                return self._kernels[name]
        lines = "".join(f"\n  {name}: {'; '.join(reasons)}" for name, reasons in asked.items())
        raise UnavailableComponentError(
            f"No linear kernel that was chosen can serve a weight of {facts}.{lines or ' There are none.'}\n"
            'Set linear_kernel="auto" to let every installed kernel be asked.'
        )

    def prepare(self, weights: Iterable[PackedWeight]) -> PreparedLinear:
        """Join neighbours where they can be one weight, and prepare each for the kernel that serves it."""
        pieces = []
        for weight in _joined(weights):
            kernel = self.choose(weight.facts)
            pieces.append((kernel, kernel.prepare(weight), weight.facts.out_features))
        return PreparedLinear(pieces)


def _joined(weights: Iterable[PackedWeight]) -> list[PackedWeight]:
    runs: list[list[PackedWeight]] = []
    for weight in weights:
        if runs and runs[-1][0].joins(weight):
            runs[-1].append(weight)
        else:
            runs.append([weight])
    return [run[0] if len(run) == 1 else type(run[0]).join(run) for run in runs]  # type: ignore[arg-type]


def _joined_outliers(weights: Sequence[LookupWeight]) -> Tensor | None:
    sparse = [one.outliers for one in weights if one.outliers is not None]
    if not sparse:
        return None
    num_in_rows = [
        one.codes.new_zeros(one.codes.shape[0], dtype=torch.int32)
        if one.outliers is None
        else one.outliers.crow_indices().diff()
        for one in weights
    ]
    columns, values = [one.col_indices() for one in sparse], [one.values() for one in sparse]
    return sparse_rows(torch.cat(num_in_rows), torch.cat(columns), torch.cat(values), sparse[0].shape[1])


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
