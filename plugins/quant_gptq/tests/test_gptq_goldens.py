"""Checkpoints and single linears that GPTQModel and AutoGPTQ made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import quantized_goldens as goldens
import torch
from quantized_goldens import Oracle
from torch import Tensor

from octavo import LLM
from octavo.builtin.torch_linear import TorchPacked
from octavo.interfaces import LinearKernels, LinearShape, StoredLinear
from octavo.testing.stored_weight import PREFIX, headers_of
from octavo_quant_gptq.method import GPTQMethod

GOLDENS = goldens.golden_dirs("gptq")
ASYMMETRIC = [path for path in GOLDENS if path.name.startswith("gptq-") and "asym" in path.name]
COMMITTED = ("gptq-w2-g32-asym-desc_act", "gptq-w4-g64-sym")
UNIT_LAYERS = [*goldens.unit_layers("gptq"), *goldens.unit_layers("autogptq")]


@pytest.fixture(scope="module", params=GOLDENS, ids=lambda path: path.name)
def golden(request: pytest.FixtureRequest) -> Iterator[tuple[LLM, Oracle]]:
    with goldens.make_llm(request.param, linear_kernel="torch-packed") as llm:
        yield llm, goldens.read_oracle(request.param)


def test_weights_are_those_of_the_tool_bit_by_bit(golden: tuple[LLM, Oracle]) -> None:
    goldens.check_weights(*golden)


def test_logits_are_those_recorded(golden: tuple[LLM, Oracle]) -> None:
    goldens.check_logits(*golden)


def test_greedy_tokens_are_those_recorded(golden: tuple[LLM, Oracle]) -> None:
    goldens.check_tokens(*golden)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", COMMITTED)
def test_engine_in_sixteen_bits_answers_as_recorded(name: str, dtype: str) -> None:
    path = goldens.COMMITTED / name
    goldens.check_engine_against(path, goldens.read_oracle(path), dtype=dtype)


@pytest.mark.parametrize("name", COMMITTED)
def test_engine_that_dequantizes_when_loading_answers_as_recorded(name: str) -> None:
    path = goldens.COMMITTED / name
    goldens.check_engine_against(path, goldens.read_oracle(path), linear_kernel="torch-dequantized")


def test_checkpoint_as_autogptq_saved_it_is_read(tmp_path: Path) -> None:
    """Its settings lie in quantize_config.json, which names no method, and the weights are named after them."""
    golden = goldens.COMMITTED / "gptq-w4-g64-sym"
    config = json.loads((golden / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = {"bits": 4, "group_size": 64, "damp_percent": 0.01, "desc_act": False, "sym": True, "true_sequential": True}
    (tmp_path / "quantize_config.json").write_text(json.dumps(said))
    (tmp_path / "gptq_model-4bit-64g.safetensors").symlink_to(golden / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(golden / name)
    goldens.check_engine_against(tmp_path, goldens.read_oracle(golden))


@pytest.mark.parametrize("kept", [None, ("bits", "group_size"), ()], ids=["all but sym", "bits and groups", "nothing"])
@pytest.mark.parametrize("path", ASYMMETRIC, ids=lambda path: path.name)
def test_asymmetric_checkpoint_that_does_not_say_so_answers_as_recorded(
    path: Path, kept: tuple[str, ...] | None, tmp_path: Path
) -> None:
    for file in path.iterdir():
        if file.name not in ("config.json", "quantize_config.json"):
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((path / "config.json").read_text())
    said = config.pop("quantization_config")
    said = {key: said[key] for key in said if key != "sym" and (kept is None or key in kept)}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": said} if said else config))
    goldens.check_engine_against(tmp_path, goldens.read_oracle(path))


def method_of(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GPTQMethod:
    kernels = LinearKernels({"torch-packed": TorchPacked(torch.float32, "cpu")})
    config = {"quant_method": "gptq", **entry}
    return GPTQMethod(config, torch.float32, "cpu", headers_of(tensors, PREFIX), kernels)


def stored_linear(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[StoredLinear, dict[str, Tensor]]:
    """The linear, and the tensors of the checkpoint: not what a test compares with."""
    of_checkpoint = {name: each for name, each in tensors.items() if name not in ("x", "y_f64", "W_f32_KN")}
    shape = LinearShape(in_features=entry["K"], out_features=entry["N"])
    linear = {name: each for name, each in of_checkpoint.items() if name != "bias"}
    return StoredLinear(prefix=PREFIX, shape=shape, tensors=linear), of_checkpoint


@pytest.mark.parametrize(("name", "entry", "tensors"), UNIT_LAYERS, ids=[name for name, _, _ in UNIT_LAYERS])
def test_linear_that_a_tool_packed_is_the_weight_it_packed(
    name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    linear, of_checkpoint = stored_linear(entry, tensors)
    method = method_of(entry, of_checkpoint)
    assert {spec.name: spec.shape for spec in method.parameters(PREFIX, linear.shape)} == {
        name: tuple(each.shape) for name, each in of_checkpoint.items()
    }
    assert torch.equal(method.dequantize(linear).T, tensors["W_f32_KN"])


@pytest.mark.parametrize(("name", "entry", "tensors"), UNIT_LAYERS, ids=[name for name, _, _ in UNIT_LAYERS])
def test_product_with_a_linear_that_a_tool_packed_is_its_product(
    name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    linear, of_checkpoint = stored_linear(entry, tensors)
    method = method_of(entry, of_checkpoint)
    bias = of_checkpoint.get("bias")
    y = method.apply(method.prepare([linear]), tensors["x"], None if bias is None else bias.float())
    bound = tensors["x"].double().abs() @ tensors["W_f32_KN"].double().abs()
    assert ((y - tensors["y_f64"]).abs() / bound).max() < 2e-6
