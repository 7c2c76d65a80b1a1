"""Checkpoints whose configuration and tensors disagree: an error that names the tensor and both facts."""

from __future__ import annotations

import re

import pytest
import torch
from awq_layers import make_method, store

from octavo.errors import CheckpointError
from octavo.interfaces import LinearShape
from octavo.testing.stored_weight import PREFIX, headers_of

SHAPE = LinearShape(in_features=256, out_features=48)
DAMAGED = "The file is damaged, or not this model's: fetch it again."
GEMM_64 = {"version": "gemm", "group_size": 64}


def tensors(version: str = "gemm", group_size: int = 64) -> dict[str, torch.Tensor]:
    return dict(store(version, group_size)(SHAPE, torch.Generator()).tensors)


def message(found: dict[str, torch.Tensor], config: dict[str, object], shape: LinearShape = SHAPE) -> str:
    """Of the error that reading one linear raises."""
    with pytest.raises(CheckpointError) as error:
        make_method(config, headers_of(found)).parameters(PREFIX, shape)
    text = str(error.value)
    assert text.startswith(f"{PREFIX}."), text
    return text


def test_wrong_group_size_is_told_with_the_right_one() -> None:
    text = message(tensors(group_size=64), {"version": "gemm", "group_size": 128})
    assert f"{PREFIX}.scales is [4, 48], but version 'gemm' and group_size 128" in text
    assert "make it [2, 48]" in text
    assert "These tensors are version 'gemm' with group_size 64" in text


def test_wrong_version_is_told_with_the_right_one() -> None:
    text = message(tensors("gemv"), GEMM_64)
    assert f"{PREFIX}.qweight is [48, 32], but version 'gemm'" in text
    assert "These tensors are version 'gemv' with group_size 64" in text


def test_wrong_version_of_more_outputs_than_inputs_is_told() -> None:
    shape = LinearShape(in_features=64, out_features=256)
    found = dict(store("gemv", 64)(shape, torch.Generator()).tensors)
    assert "These tensors are version 'gemv' with group_size 64" in message(found, GEMM_64, shape)


def test_gemm_tensors_under_version_gemv_are_told() -> None:
    text = message(tensors("gemm"), {"version": "gemv", "group_size": 64})
    assert "but version 'gemv'" in text
    assert "These tensors are version 'gemm' with group_size 64" in text


def test_gptq_tensors_are_told() -> None:
    found = tensors() | {"qweight": torch.zeros(32, 48, dtype=torch.int32)}
    assert 'set "quant_method": "gptq"' in message(found, GEMM_64)


@pytest.mark.parametrize("cut", [slice(0, 255), slice(0, 0)])
def test_truncated_qweight_is_told(cut: slice) -> None:
    found = tensors()
    found["qweight"] = found["qweight"][cut]
    text = message(found, GEMM_64)
    assert f"{PREFIX}.qweight is [{found['qweight'].shape[0]}, 6]" in text
    assert "with 256 inputs" in text
    assert "make it [256, 6]. The file is damaged" in text


def test_qweight_of_fewer_outputs_than_its_scales_is_told() -> None:
    found = tensors()
    found["qweight"] = found["qweight"][:, :5]
    text = message(found, GEMM_64)
    assert f"{PREFIX}.qweight is [256, 5]" in text
    assert f"{PREFIX}.scales of [4, 48], make it [256, 6]" in text


@pytest.mark.parametrize("name", ["scales", "qweight", "qzeros"])
def test_missing_tensor_is_told(name: str) -> None:
    found = tensors()
    del found[name]
    method = make_method(GEMM_64, headers_of(found))
    assert method.quantizes(PREFIX), "an incomplete linear is taken for plain weights"
    text = message(found, GEMM_64)
    assert f"{PREFIX}.{name} is missing, but" in text
    assert all(f"{PREFIX}.{there}" in text for there in found)
    assert text.endswith('set "zero_point": false there.' if name == "qzeros" else DAMAGED)


def test_integer_scales_are_told() -> None:
    found = tensors() | {"scales": torch.ones(4, 48, dtype=torch.int32)}
    wanted = f"{PREFIX}.scales is I32; AWQ of version 'gemm' stores it as F16 or BF16 or F32. {DAMAGED}"
    assert message(found, GEMM_64) == wanted


def test_qweight_of_gemv_fast_is_told() -> None:
    found = tensors() | {"qweight": torch.zeros(12, 256, dtype=torch.int16)}
    text = message(found, GEMM_64)
    assert f"{PREFIX}.qweight is I16; AWQ of version 'gemm' stores it as I32" in text
    assert "Words of 16 bits are gemv_fast's or llm-awq's. Take a checkpoint of version \"gemm\"" in text


def test_scales_of_mixed_dtypes_are_told() -> None:
    first = headers_of(tensors(), "model.layers.0.mlp.down_proj")
    second = headers_of(tensors() | {"scales": torch.ones(4, 48, dtype=torch.bfloat16)})
    method = make_method(GEMM_64, first | second)
    with pytest.raises(CheckpointError, match=re.escape(f"{PREFIX}.scales is BF16, but model.layers.0.mlp.down_proj.")):
        method.parameters(PREFIX, SHAPE)


def test_scales_that_are_no_matrix_are_told() -> None:
    found = tensors() | {"scales": torch.tensor(1.0, dtype=torch.float16)}
    assert message(found, GEMM_64) == f"{PREFIX}.scales is []; AWQ stores it as a matrix. {DAMAGED}"


@pytest.mark.parametrize("headers", [True, False], ids=["with tensors", "without tensors"])
def test_inputs_that_are_not_whole_groups_are_told(headers: bool) -> None:
    shape = LinearShape(in_features=96, out_features=48)
    found = store("gemm", 32)(shape, torch.Generator()).tensors
    method = make_method(GEMM_64, headers_of(found) if headers else {})
    with pytest.raises(CheckpointError, match=r"up_proj\.scales.*96 inputs are not whole groups of 64"):
        method.parameters(PREFIX, shape)


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_group_size_that_does_not_divide_the_inputs_is_told_with_the_one_of_the_tensors(version: str) -> None:
    shape = LinearShape(in_features=576, out_features=48)
    found = dict(store(version, 64)(shape, torch.Generator()).tensors)
    text = message(found, {"version": version, "group_size": 128}, shape)
    assert (
        f"{PREFIX}.scales of {list(found['scales'].shape)}: the linear's 576 inputs are not whole groups of 128" in text
    )
    assert f"These tensors are version '{version}' with group_size 64: correct quantization_config." in text


def test_group_size_that_does_not_divide_the_inputs_is_to_be_corrected_where_tensors_do_not_tell_it() -> None:
    text = message(tensors() | {"scales": torch.ones(7, 48, dtype=torch.float16)}, {"group_size": 96})
    assert "256 inputs are not whole groups of 96" in text
    assert text.endswith("Correct it, or quantize the model again with one that divides them.")


def test_outputs_that_are_not_whole_words_are_told() -> None:
    shape = LinearShape(in_features=256, out_features=44)
    with pytest.raises(CheckpointError, match=r"up_proj\.qweight: the linear's 44 outputs are no multiple of 8"):
        make_method(GEMM_64, {}).parameters(PREFIX, shape)
