"""Which checkpoints are AWQ's, which are refused before anything is loaded, and which linears are quantized."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from awq_layers import make_method, store

from octavo.errors import CheckpointError
from octavo.interfaces import LinearShape
from octavo.plugins.quantized_checkpoint import quantization_need
from octavo.plugins.specs import QuantizationSpec
from octavo.testing.stored_weight import PREFIX, headers_of
from octavo_quant_awq import octavo_components
from octavo_quant_awq.config import recognise

SHAPE = LinearShape(in_features=256, out_features=48)
ORIGINAL = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}


def stored(version: str = "gemm", group_size: int = 64, *, zero_point: bool = True) -> dict[str, torch.Tensor]:
    return dict(store(version, group_size, zero_point=zero_point)(SHAPE, torch.Generator()).tensors)


def spec() -> QuantizationSpec:
    [one] = octavo_components()
    return one


def reasons(**config: object) -> list[str]:
    return spec().why_not(quantization_need({"quant_method": "awq", **config}, "cpu", "float32"))


# ------------------------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize("version", ["gemm", "GEMM", "gemv", "GEMV"])
def test_versions_gemm_and_gemv_are_read_in_any_case(version: str) -> None:
    assert reasons(bits=4, version=version) == []
    assert make_method({"version": version}, {}).quantizes(PREFIX)


def test_version_that_is_not_said_is_gemm() -> None:
    assert reasons(bits=4) == []
    names = {one.name: one.shape for one in make_method({"group_size": 64}, {}).parameters(PREFIX, SHAPE)}
    assert names == {"qweight": (256, 6), "qzeros": (4, 6), "scales": (4, 48)}


@pytest.mark.parametrize("key", ["version", "format", "checkpoint_format"])
@pytest.mark.parametrize("version", ["marlin", "gemv_fast", "llm-awq", "GEMV_FAST", "exotic"])
def test_other_versions_are_refused_with_what_to_do(key: str, version: str) -> None:
    [reason] = reasons(bits=4, **{key: version})
    assert repr(version.lower()) in reason
    assert 'Take a checkpoint of version "gemm"' in reason


def test_gemv_fast_is_refused_for_its_zeros() -> None:
    [reason] = reasons(version="gemv_fast")
    assert "-scale * zero rounded to 16 bits" in reason


@pytest.mark.parametrize("key", ["bits", "w_bit"])
def test_other_bits_than_4_are_refused(key: str) -> None:
    assert reasons(**{key: 8}) == ["supports 4 bits; the checkpoint has 8"]


def test_config_of_gptqmodel_is_read() -> None:
    config = {"bits": 4, "group_size": 64, "desc_act": False, "method": "awq", "format": "gemm", "pack_dtype": "int32"}
    assert reasons(**config) == []
    specs = make_method(config, headers_of(stored())).parameters(PREFIX, SHAPE)
    assert [one.name for one in specs] == ["qweight", "qzeros", "scales"]


@pytest.mark.parametrize("group_size", [0, -2, "many", None])
def test_group_size_that_is_no_number_of_inputs_is_an_error(group_size: object) -> None:
    with pytest.raises(CheckpointError, match=r"group_size is a number of inputs, or -1 for all; found"):
        make_method({"group_size": group_size}, {})


# ------------------------------------------------------------------------------------------------------ recognise


def test_original_quant_config_is_recognised() -> None:
    config = recognise(ORIGINAL, {})
    assert config == {**ORIGINAL, "quant_method": "awq"}
    assert reasons(**config) == []


def test_original_quant_config_reads_its_group_size() -> None:
    specs = make_method(ORIGINAL, headers_of(stored())).parameters(PREFIX, SHAPE)
    assert {one.name: one.shape for one in specs}["scales"] == (4, 48)


def test_gemm_tensors_without_a_configuration_are_recognised() -> None:
    headers = headers_of(stored())
    config = recognise({}, headers)
    assert config == {"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": 64, "zero_point": True}
    assert len(make_method(config, headers).parameters(PREFIX, SHAPE)) == 3


def test_gemm_tensors_without_zeros_are_recognised() -> None:
    config = recognise({}, headers_of(stored(zero_point=False)))
    assert config is not None
    assert config["zero_point"] is False


def test_what_a_configuration_says_is_kept_when_tensors_are_recognised() -> None:
    config = recognise({"bits": 4, "group_size": 128}, headers_of(stored()))
    assert config is not None
    assert config["group_size"] == 128


def test_gptq_tensors_are_not_recognised() -> None:
    tensors = {
        "qweight": torch.zeros(256 // 8, 48, dtype=torch.int32),
        "qzeros": torch.zeros(4, 6, dtype=torch.int32),
        "scales": torch.ones(4, 48, dtype=torch.float16),
    }
    assert recognise({"bits": 4, "group_size": 64}, headers_of(tensors)) is None


@pytest.mark.parametrize(
    "config", [{}, {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}, {"checkpoint_format": "marlin"}]
)
def test_configurations_of_others_are_not_recognised(config: dict[str, object]) -> None:
    assert recognise(config, {}) is None


@pytest.mark.parametrize("key", ["w_bit", "q_group_size"])
def test_keys_of_the_original_configuration_do_not_decide_against_desc_act(key: str) -> None:
    assert recognise({key: 4, "desc_act": False}, headers_of(stored())) is None


@pytest.mark.parametrize("config", [{}, ORIGINAL], ids=["no configuration", "original configuration"])
def test_tensors_with_a_g_idx_of_any_linear_are_not_recognised(config: dict[str, object]) -> None:
    g_idx = headers_of({"g_idx": torch.zeros(256, dtype=torch.int32)}, "model.layers.1.mlp.up_proj")
    assert recognise(config, {**headers_of(stored()), **g_idx}) is None


def test_plain_weights_are_not_recognised() -> None:
    assert recognise({}, headers_of({"weight": torch.zeros(4, 4)})) is None


def test_recognising_imports_no_torch() -> None:
    code = (
        "import sys; from octavo_quant_awq.config import recognise, reasons_against; "
        "recognise({'w_bit': 4}, {}); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------- which linears, and zeros


@pytest.mark.parametrize("prefix", ["lm_head", "model.embed_tokens", "model.layers.0.mlp.gate"])
def test_head_and_router_of_plain_weights_are_not_quantized(prefix: str) -> None:
    headers = {**headers_of(stored()), **headers_of({"weight": torch.zeros(48, 256)}, prefix)}
    assert not make_method({}, headers).quantizes(prefix)
    assert not make_method({}, {}).quantizes(prefix)


def test_head_with_quantized_tensors_is_quantized() -> None:
    assert make_method({}, headers_of(stored(), "lm_head")).quantizes("lm_head")
    assert make_method({"lm_head": True}, {}).quantizes("lm_head")


def test_modules_to_not_convert_are_parts_of_names_where_no_tensors_are_there() -> None:
    method = make_method({"modules_to_not_convert": ["visual", "layers.3."]}, {})
    assert [method.quantizes(name) for name in (PREFIX, "visual.blocks.0.up", "model.layers.3.mlp.up_proj")] == [
        True,
        False,
        False,
    ]


def test_tensors_decide_against_modules_to_not_convert() -> None:
    prefix = "model.layers.0.mlp.gate_proj"
    config = {"modules_to_not_convert": ["mlp.gate"]}
    assert make_method(config, headers_of(stored(), prefix)).quantizes(prefix)


def test_missing_zeros_are_8_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    tensors = stored(zero_point=False)
    headers = {**headers_of(tensors), **headers_of(tensors, "model.layers.1.mlp.up_proj")}
    with caplog.at_level(logging.WARNING):
        method = make_method({"group_size": 64, "zero_point": False}, headers)
        specs = [method.parameters(name, SHAPE) for name in (PREFIX, "model.layers.1.mlp.up_proj")]
    [record] = caplog.records
    assert "no zeros for 2 linears" in record.getMessage()
    assert [[one.name for one in each] for each in specs] == [["qweight", "scales"]] * 2
    assert method.facts(PREFIX, SHAPE).symmetric


def test_zeros_that_are_there_are_read_whatever_the_configuration_says(caplog: pytest.LogCaptureFixture) -> None:
    method = make_method({"group_size": 64, "zero_point": False}, headers_of(stored()))
    assert "qzeros" in [one.name for one in method.parameters(PREFIX, SHAPE)]
    assert caplog.records == []


def test_bias_of_the_checkpoint_is_declared() -> None:
    headers = headers_of({**stored(), "bias": torch.zeros(48, dtype=torch.float16)})
    assert "bias" in [one.name for one in make_method({"group_size": 64}, headers).parameters(PREFIX, SHAPE)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_the_dtype_they_are_stored_in(dtype: torch.dtype) -> None:
    tensors = {**stored(), "scales": torch.ones(4, 48, dtype=dtype)}
    specs = {one.name: one for one in make_method({"group_size": 64}, headers_of(tensors)).parameters(PREFIX, SHAPE)}
    assert specs["scales"].dtype == dtype


def test_part_of_a_larger_linear_of_the_checkpoint_is_read() -> None:
    method = make_method({"group_size": 64}, headers_of(stored()))
    specs = method.parameters(PREFIX, LinearShape(in_features=256, out_features=16))
    assert {one.name: one.shape for one in specs} == {"qweight": (256, 2), "qzeros": (4, 2), "scales": (4, 16)}
