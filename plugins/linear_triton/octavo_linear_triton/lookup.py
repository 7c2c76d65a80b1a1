"""TritonLookup: products with codes into codebooks."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor
from torch.nn import functional

from octavo.interfaces import LinearKernel, LookupWeight, PackedWeight, WeightFacts
from octavo.plugins.tuned_data import target_capability
from octavo_linear_triton import layout
from octavo_linear_triton.kernels.dequantize import dequantize_lookup
from octavo_linear_triton.kernels.lookup_linear import lookup_linear
from octavo_linear_triton.kernels.outliers import outliers_linear
from octavo_linear_triton.kernels.partials import add_partials, make_partials
from octavo_linear_triton.tuned import most_splits, product_config

_MAX_BITS = 4
"""A codebook of more entries than a slab has places does not fit beside what a program reads."""


class TritonLookup(LinearKernel):
    """Few tokens: codes are looked up in shared memory. Many: the weight is written out, and torch multiplies.

    Outliers are a sparse product of their own, of which the sums are one part more; or are added to what is written.
    """

    @cached_property
    def _capability(self) -> int:  # only once there is something to launch: a plan may be for another machine
        return target_capability()

    def why_not(self, facts: WeightFacts) -> list[str]:
        if facts.bits <= _MAX_BITS:
            return []
        return [f"looks up codes of at most {_MAX_BITS} bits; these have {facts.bits}"]

    def num_bytes(self, facts: WeightFacts) -> int:
        return layout.num_lookup_bytes(facts, self.dtype)

    def prepare(self, weight: PackedWeight) -> object:
        assert isinstance(weight, LookupWeight)
        return layout.pack_lookup(weight, self.dtype)

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        assert isinstance(prepared, layout.PackedLookup)
        codes, outliers = prepared.codes, prepared.outliers
        if len(x) == 0:
            return x.new_empty(0, codes.out_features)
        x = x if x.stride(1) == 1 else x.contiguous()
        config = product_config(self._capability, "lookup_linear", codes.bits, x.dtype, len(x))
        if config is None:
            return functional.linear(x, dequantize_lookup(prepared), bias)
        splits = most_splits(self._capability, config, x, codes.out_features)
        partials = make_partials(x, codes.out_features, codes.num_blocks, splits, num_others=outliers is not None)
        lookup_linear(x, prepared, partials, config)
        if outliers is not None:
            outliers_linear(x, outliers, partials.sums[partials.num_splits])
        return add_partials(partials, bias, x.dtype)
