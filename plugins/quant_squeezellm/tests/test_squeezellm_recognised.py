"""How a checkpoint is known to be SqueezeLLM's: by its configuration, or by its tensors where it has none."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from squeezellm_layers import method_of, random_tensors

from octavo.interfaces import LinearShape, TensorHeader
from octavo.plugins.quantized_checkpoint import quantization_config, quantization_need
from octavo.plugins.registry import default_registry
from octavo.testing.stored_weight import PREFIX, headers_of

SHAPE = LinearShape(in_features=32, out_features=4)
PLAIN = {"model.layers.0.mlp.up_proj.weight": TensorHeader(shape=(4, 32), dtype="F16", num_bytes=256)}


def headers() -> dict[str, TensorHeader]:
    return headers_of(random_tensors(SHAPE, 4, torch.Generator()))


@pytest.mark.parametrize(
    "config",
    [{}, {"wbits": 4}, {"quant_method": "squeezellm", "wbits": 4}, {"quant_method": "SqueezeLLM"}],
    ids=["no configuration", "the tool's quant_config.json", "quantization_config", "without bits, in capitals"],
)
def test_checkpoint_is_recognised_with_its_tensors(config: Mapping[str, object]) -> None:
    found = quantization_config(default_registry(), config, headers())
    assert found == {**config, "quant_method": "squeezellm"}
    choice = default_registry().choose("quantization", quantization_need(found, "cpu", "float32"))
    assert choice.get().name == "squeezellm"


def test_tool_s_quant_config_is_recognised_before_there_are_weights() -> None:
    found = quantization_config(default_registry(), {"wbits": 3}, {})
    assert found == {"wbits": 3, "quant_method": "squeezellm"}
    specs = {spec.name: spec.shape for spec in method_of({}, found).parameters(PREFIX, SHAPE)}
    assert specs == {"qweight": (3, 4), "lookup_table": (4, 8)}


def test_plain_weights_are_not_taken_for_squeezellm_s() -> None:
    assert quantization_config(default_registry(), {}, PLAIN) == {}


@pytest.mark.parametrize("bits", [2, 8])
def test_other_bits_are_refused_with_both_numbers(bits: int) -> None:
    need = quantization_need({"quant_method": "squeezellm", "wbits": bits}, "cpu", "float32")
    reasons = default_registry().choose("quantization", need).error
    assert f"supports 3, 4 bits; the checkpoint has {bits}" in str(reasons)


def test_linears_with_codebooks_are_quantized_and_others_are_not() -> None:
    method = method_of(headers() | {"model.layers.0.mlp.down_proj.weight": PLAIN[f"{PREFIX}.weight"]})
    assert method.quantizes(PREFIX)
    assert not method.quantizes("model.layers.0.mlp.down_proj")


def test_without_weights_the_linears_of_layers_are_quantized_and_the_head_is_not() -> None:
    method = method_of({}, {"wbits": 4})
    assert method.quantizes(PREFIX)
    assert not method.quantizes("lm_head")
