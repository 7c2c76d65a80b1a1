"""What explain says of quantized linears: which kernel serves each kind, and why those asked before it refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from affine_plugin import install_affine_plugin
from tiny_model import write_tiny_llama

from octavo import explain
from octavo.explanation import ExplainedCandidate, Explanation

ALONE: dict[str, Any] = {"plugins": {"allow": ["eight"]}}
"""Whatever else is installed may have a better kernel."""


@pytest.fixture
def weightless(tmp_path: Path) -> Path:
    """A model's folder without its weights."""
    folder = write_tiny_llama(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def eight_bits(weightless: Path, site_packages: Any) -> Path:
    """A model in a format whose linears kernels multiply: the kernel "wide" serves those that do not narrow."""
    install_affine_plugin(site_packages)
    config = json.loads((weightless / "config.json").read_text())
    (weightless / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "eight"}}))
    return weightless


def kernel(explanation: Explanation, name: str) -> ExplainedCandidate:
    (socket,) = [one for one in explanation.sockets if one.name == "linear_kernel"]
    return next(one for one in socket.candidates if one.name == name)


def test_each_kind_of_quantized_linear_is_told_with_the_kernel_that_serves_it(eight_bits: Path) -> None:
    linears = {one.names: one for one in explain(str(eight_bits), device="cpu", **ALONE).linears}
    assert {names: one.kernel for names, one in linears.items()} == {
        "model.layers.*.self_attn.q_proj+k_proj+v_proj": "eight/wide",
        "model.layers.*.self_attn.o_proj": "eight/wide",
        "model.layers.*.mlp.gate_proj+up_proj": "eight/wide",
        "model.layers.*.mlp.down_proj": "builtin/torch-packed",
    }
    assert linears["model.layers.*.mlp.down_proj"].refused == {"eight/wide": ("it is for linears that widen",)}
    assert all(one.count == 2 for one in linears.values())


def test_kernels_that_serve_no_linear_are_not_marked_as_chosen(eight_bits: Path) -> None:
    explanation = explain(str(eight_bits), device="cpu", **ALONE)
    names = ("wide", "torch-packed", "torch-dequantized", "tables")
    chosen = [kernel(explanation, name).chosen for name in names]
    assert chosen == [True, True, False, False]
    (line,) = [line for line in str(explanation).splitlines() if "builtin/torch-dequantized" in line]
    assert line.endswith("could serve; no quantized linear of this model is left for it")


def test_kernels_for_other_weights_are_refused_with_both_forms(eight_bits: Path) -> None:
    tables = kernel(explain(str(eight_bits), device="cpu", **ALONE), "tables")
    assert tables.reasons == ("multiplies with lookup weights; the quantization method's are affine",)


def test_a_named_kernel_that_serves_not_every_linear_cannot_run(eight_bits: Path) -> None:
    explanation = explain(str(eight_bits), device="cpu", **ALONE, linear_kernel="wide")
    assert not explanation.can_run
    assert [one.names for one in explanation.linears if one.kernel is None] == ["model.layers.*.mlp.down_proj"]
    assert "no kernel serves" in str(explanation)


def test_plain_weights_have_no_linear_kernels(weightless: Path) -> None:
    explanation = explain(str(weightless), device="cpu")
    assert explanation.linears == ()
    assert "linear_kernel" not in [socket.name for socket in explanation.sockets]
