"""A plugin whose quantization method leaves the product to linear kernels, for tests of what chooses and counts."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

_PLUGIN = """
    from octavo import LinearKernelSpec, QuantizationSpec, hookimpl
    OCTAVO_API = "1.0"

    @hookimpl
    def octavo_components():
        return [
            QuantizationSpec(
                name="eight", target="dummy_eight.parts:EightBits", formats=("eight",), weight_form="affine"
            ),
            LinearKernelSpec(name="wide", target="dummy_eight.parts:Wide", forms=("affine",), priority=100),
            LinearKernelSpec(name="tables", target="dummy_eight.parts:Wide", forms=("lookup",), priority=100),
        ]
"""
_PARTS = """
    import torch
    from octavo.builtin.torch_linear import TorchPacked
    from octavo.interfaces import AffineWeight, ParameterSpec, QuantizationMethod, WeightFacts

    class EightBits(QuantizationMethod):
        def quantizes(self, prefix):
            return prefix != "lm_head" and "embed" not in prefix

        def parameters(self, prefix, shape):
            out, inputs = shape.out_features, shape.in_features
            return (
                ParameterSpec(name="codes", shape=(out, inputs), dtype=torch.uint8, output_axis=0, input_axis=1),
                ParameterSpec(name="scales", shape=(1, out), dtype=torch.float16, output_axis=1),
            )

        def facts(self, prefix, shape):
            return WeightFacts(
                form="affine", bits=8, in_features=shape.in_features, out_features=shape.out_features,
                group_size=shape.in_features, symmetric=True,
            )

        def weight(self, stored):
            return AffineWeight(
                bits=8, codes=stored.tensors["codes"], scales=stored.tensors["scales"], zeros=None,
                group_size=stored.shape.in_features,
            )

    class Wide(TorchPacked):
        def why_not(self, facts):
            return [] if facts.out_features >= facts.in_features else ["it is for linears that widen"]

        def num_bytes(self, facts):
            return 3 * facts.in_features * facts.out_features
"""


def install_affine_plugin(site_packages: Any) -> None:
    """Format "eight": 8 bits, one scale for each output; kernel "wide" serves linears that do not narrow."""
    folder: Path = site_packages.install("eight", _PLUGIN).parent
    (folder / "parts.py").write_text(dedent(_PARTS))
