"""AWQ against its tools: linears that AutoAWQ packed, and whole checkpoints with what their tool says of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from awq_layers import make_method
from quantized_goldens import check_engine_against, check_tokens, golden_dirs, make_llm, read_oracle, unit_layers
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.interfaces import LinearShape, StoredLinear
from octavo.testing.stored_weight import PREFIX, headers_of
from octavo_quant_awq.method import AWQMethod

UNIT_LAYERS = [*unit_layers("autoawq-gemm-"), *unit_layers("autoawq-gemv-")]
GOLDENS = golden_dirs("awq-")


def split(layer: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, LinearShape]:
    """(the checkpoint's tensors, the weight [out_features, in_features], its shape)."""
    tensors = {name: tensor for name, tensor in layer.items() if name not in ("W_f32_KN", "x", "y_f64")}
    weight = layer["W_f32_KN"].T
    return tensors, weight, LinearShape(in_features=weight.shape[1], out_features=weight.shape[0])


def method_of(name: str, tensors: Mapping[str, Tensor]) -> AWQMethod:
    _, version, group_size, _ = name.split("-")
    return make_method({"version": version, "group_size": int(group_size.removeprefix("g"))}, headers_of(tensors))


@pytest.mark.parametrize(("name", "entry", "layer"), UNIT_LAYERS, ids=[name for name, _, _ in UNIT_LAYERS])
def test_linear_that_autoawq_packed_is_read_bit_by_bit(
    name: str, entry: Mapping[str, object], layer: dict[str, Tensor]
) -> None:
    tensors, weight, shape = split(layer)
    method = method_of(name, tensors)
    assert {one.name for one in method.parameters(PREFIX, shape)} == set(tensors)
    bias = tensors.pop("bias", None)
    found = method.dequantize(StoredLinear(prefix=PREFIX, shape=shape, tensors=tensors))
    assert torch.equal(found, weight)
    y = layer["x"].double() @ found.double().T + (0 if bias is None else bias.double())
    assert torch.allclose(y, layer["y_f64"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "layer"),
    [(name, layer) for name, _, layer in unit_layers("autoawq-gemv_fast-")],
    ids=lambda one: str(one)[:30],
)
def test_gemv_fast_linears_are_refused_by_their_tensors_too(name: str, layer: dict[str, Tensor]) -> None:
    tensors, _, shape = split(layer)
    method = make_method({"group_size": int(name.split("-")[2].removeprefix("g"))}, headers_of(tensors))
    with pytest.raises(CheckpointError, match=r"up_proj\.qweight is I16; AWQ of version 'gemm' stores it as I32"):
        method.parameters(PREFIX, shape)


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.name)
@pytest.mark.parametrize("linear_kernel", ["torch-packed", "torch-dequantized"])
def test_golden_checkpoint_has_the_tool_s_weights_logits_and_tokens(golden: Path, linear_kernel: str) -> None:
    check_engine_against(golden, read_oracle(golden), linear_kernel=linear_kernel)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_golden_checkpoint_answers_in_16_bits(dtype: str) -> None:
    [golden] = golden_dirs("awq-w4-g64-gemm")
    check_engine_against(golden, read_oracle(golden), dtype=dtype)


@pytest.mark.parametrize("config", [{"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}, None])
def test_golden_checkpoint_with_the_original_configuration_or_none_is_recognised(
    config: dict[str, object] | None, tmp_path: Path
) -> None:
    [golden] = golden_dirs("awq-w4-g64-gemm")
    copy_with(golden, tmp_path, None)
    if config is not None:
        (tmp_path / "quant_config.json").write_text(json.dumps(config))
    with make_llm(tmp_path) as llm:
        check_tokens(llm, read_oracle(golden))


def test_golden_checkpoint_under_a_wrong_group_size_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    [golden] = golden_dirs("awq-w4-g64-gemm")
    copy_with(golden, tmp_path, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"})
    with pytest.raises(CheckpointError, match=r"self_attn\.q_proj\.scales is \[9, 576\].*with group_size 64"):
        make_llm(tmp_path)


def copy_with(golden: Path, folder: Path, quantization_config: dict[str, object] | None) -> None:
    """A copy of the checkpoint whose config.json says this, or nothing, of its quantization."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(golden / name, folder)
    model = json.loads((golden / "config.json").read_text())
    del model["quantization_config"]
    if quantization_config is not None:
        model["quantization_config"] = quantization_config
    (folder / "config.json").write_text(json.dumps(model))
