"""Checkpoints whose configuration and tensors disagree: an error that names the tensor and both facts."""

from __future__ import annotations

import pytest
import torch
from gptq_layers import Kind, make_method
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.interfaces import LinearShape, StoredLinear
from octavo.testing.stored_weight import PREFIX, headers_of

SHAPE = LinearShape(in_features=256, out_features=48)
FOUR_BITS = Kind(4, 64).config


def tensors(bits: int = 4, group_size: int = 64) -> dict[str, Tensor]:
    return dict(Kind(bits, group_size).store(SHAPE).tensors)


def message(found: dict[str, Tensor], config: dict[str, object], shape: LinearShape = SHAPE) -> str:
    """Of the error that reading one linear raises."""
    with pytest.raises(CheckpointError) as error:
        make_method(config, headers_of(found)).parameters(PREFIX, shape)
    text = str(error.value)
    assert text.startswith(f"{PREFIX}."), text
    return text.removeprefix(f"{PREFIX}.")


def test_tensors_that_agree_are_no_error() -> None:
    make_method(FOUR_BITS, headers_of(tensors())).parameters(PREFIX, SHAPE)


def test_wrong_group_size_is_told() -> None:
    text = message(tensors(group_size=64), Kind(4, 128).config)
    assert text.startswith("scales has 4 groups, but 256 inputs in groups of 128, as quantization_config says, are 2.")
    assert " 4 rows are groups of 64. " in text


def test_wrong_bits_are_told_with_the_right_ones() -> None:
    text = message(tensors(bits=4), Kind(8, 64).config)
    assert "qweight has 32 rows of words, but 256 inputs of 8 bits, as quantization_config says, take 64." in text
    assert "So many are 4 bits" in text


@pytest.mark.parametrize("rows", [31, 0])
def test_truncated_qweight_is_told(rows: int) -> None:
    found = tensors()
    found["qweight"] = found["qweight"][:rows]
    text = message(found, FOUR_BITS)
    assert f"qweight has {rows} rows of words, but 256 inputs of 4 bits" in text
    assert "The file is damaged" in text


def test_qweight_of_fewer_outputs_than_its_scales_is_told() -> None:
    found = tensors()
    found["qweight"] = found["qweight"][:, :40]
    assert f"scales has 48 outputs, but {PREFIX}.qweight has 40." in message(found, FOUR_BITS)


@pytest.mark.parametrize("name", ["scales", "qweight", "qzeros"])
def test_missing_tensor_is_told(name: str) -> None:
    found = tensors()
    del found[name]
    assert message(found, FOUR_BITS).startswith(f"{name} is missing, but {PREFIX}.")


def test_missing_zeros_of_symmetric_weights_are_not_missed() -> None:
    found = tensors()
    del found["qzeros"]
    method = make_method(Kind(4, 64, symmetric=True).config, headers_of(found))
    assert [spec.name for spec in method.parameters(PREFIX, SHAPE)] == ["qweight", "scales", "g_idx"]
    assert method.weight(StoredLinear(prefix=PREFIX, shape=SHAPE, tensors=found)).zeros is None


@pytest.mark.parametrize("width", [5, 7, 12])
def test_zeros_of_another_width_are_told(width: int) -> None:
    found = tensors()
    found["qzeros"] = torch.zeros(4, width, dtype=torch.int32)
    text = message(found, FOUR_BITS)
    assert f"qzeros has {width} words a group, but the 48 outputs of {PREFIX}.qweight, 4 bits each, take 6." in text


def test_zeros_of_other_groups_than_the_scales_are_told() -> None:
    found = tensors()
    found["qzeros"] = found["qzeros"][:3]
    assert message(found, FOUR_BITS).startswith("qzeros has 3 groups, but 256 inputs in groups of 64")


def test_index_of_other_inputs_is_told() -> None:
    found = tensors()
    found["g_idx"] = found["g_idx"][:200]
    text = message(found, FOUR_BITS)
    assert text.startswith("g_idx names the groups of 200 inputs, but the linear has 256.")


@pytest.mark.parametrize(
    ("name", "dtype", "stored_as"),
    [
        ("scales", torch.int32, "F16 or BF16 or F32"),
        ("qweight", torch.int16, "I32"),
        ("g_idx", torch.float32, "I32 or I64"),
    ],
)
def test_tensor_of_a_wrong_dtype_is_told(name: str, dtype: torch.dtype, stored_as: str) -> None:
    found = tensors()
    found[name] = found[name].to(dtype)
    assert f"; GPTQ stores it as {stored_as}." in message(found, FOUR_BITS)


def test_tensor_of_other_dimensions_is_told() -> None:
    found = tensors()
    found["scales"] = found["scales"].unsqueeze(0)
    assert message(found, FOUR_BITS).startswith("scales is [1, 4, 48]; 2 dimensions are wanted.")


def test_scales_of_mixed_dtypes_are_told() -> None:
    found, other = tensors(), "model.layers.0.mlp.down_proj"
    headers = {**headers_of(tensors(), other), **headers_of({**found, "scales": found["scales"].bfloat16()})}
    with pytest.raises(CheckpointError, match=rf"{PREFIX}.scales is BF16, but {other}.scales is F16"):
        make_method(FOUR_BITS, headers).parameters(PREFIX, SHAPE)


def test_part_of_a_larger_linear_whose_zeros_are_no_whole_words_is_told() -> None:
    text = message(tensors(), FOUR_BITS, LinearShape(in_features=256, out_features=12))
    assert text.startswith("qzeros holds 8 outputs in whole words, but of its 48 outputs a part with 12 is wanted")


@pytest.mark.parametrize("group", [4, -1])
def test_index_of_a_group_that_is_not_there_is_told(group: int) -> None:
    found = tensors()
    found["g_idx"][7] = group
    method = make_method(FOUR_BITS, headers_of(found))
    with pytest.raises(CheckpointError, match=r"g_idx names the groups -?\d to \d, but .*scales has 4, from 0"):
        method.weight(StoredLinear(prefix=PREFIX, shape=SHAPE, tensors=found))
