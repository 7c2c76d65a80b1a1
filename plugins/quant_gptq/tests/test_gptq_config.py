"""What a configuration says of each linear, and which are refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from gptq_layers import Kind, make_method, pack_zeros, words

from octavo.builtin.torch_linear import TorchPacked
from octavo.errors import CheckpointError
from octavo.interfaces import LinearKernels, LinearShape, StoredLinear, TensorHeader
from octavo.plugins.quantized_checkpoint import quantization_need
from octavo.testing.stored_weight import PREFIX, headers_of
from octavo_quant_gptq import octavo_components
from octavo_quant_gptq.config import GPTQConfig, LinearConfig, recognise
from octavo_quant_gptq.method import GPTQMethod

DOWN = "model.layers.0.mlp.down_proj"
SHAPE = LinearShape(in_features=128, out_features=64)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


def general(**config: object) -> LinearConfig:
    return GPTQConfig.read({"quant_method": "gptq", **config}).general


def reasons_against(config: dict[str, object]) -> list[str]:
    [spec] = octavo_components()
    return spec.why_not(quantization_need({"quant_method": "gptq", **config}, "cpu", "float32"))


# --------------------------------------------------------------------------------------------- the general keys


def test_what_is_not_said_is_as_the_tools_take_it() -> None:
    assert general() == LinearConfig(bits=4, group_size=128, symmetric=None, act_order=False, format="gptq")


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        ({"w_bit": 3}, "bits", 3),
        ({"bits": "3"}, "bits", 3),
        ({"bits": None}, "bits", 4),
        ({"bits": None, "w_bit": 3}, "bits", 3),
        ({"group_size": "-1"}, "group_size", -1),
        ({"group_size": None}, "group_size", 128),
        ({"sym": None}, "symmetric", None),
        ({"zero_point": None}, "symmetric", None),
        ({"wbits": 8}, "bits", 8),
        ({"q_group_size": 32}, "group_size", 32),
        ({"group_size": -1}, "group_size", -1),
        ({"sym": False}, "symmetric", False),
        ({"zero_point": True}, "symmetric", False),
        ({"zero_point": False}, "symmetric", True),
        ({"sym": True, "zero_point": True}, "symmetric", True),
        ({"desc_act": True}, "act_order", True),
        ({"desc_act": None}, "act_order", False),
        ({"format": "gptq_v2"}, "format", "gptq_v2"),
        ({"version": "gptq_v2"}, "format", "gptq_v2"),
        ({"checkpoint_format": "GPTQ_P", "format": "gptq"}, "format", "gptq_p"),
        ({"checkpoint_format": None}, "format", "gptq"),
    ],
)
def test_key_and_its_synonyms_are_read(config: dict[str, object], name: str, value: object) -> None:
    assert getattr(general(**config), name) == value


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"bits": 9}, r"read with 2 to 8 bits; this says 9"),
        ({"bits": "9"}, r"read with 2 to 8 bits; this says 9"),
        ({"bits": "four"}, r"bits is 'four', which is no whole number: write a number, such as 4"),
        ({"bits": 4.0}, r"bits is 4\.0, .*write a number"),
        ({"bits": True}, r"bits is True, .*write a number"),
        ({"group_size": [128]}, r"group_size is \[128\], .*write a number, such as 128"),
        ({"group_size": 0}, r"group_size is a number of inputs, or -1 for all; found 0"),
        ({"dynamic": ["x"]}, r"dynamic is settings by name; found \['x'\]"),
        ({"dynamic": {"x(": {}}}, r"dynamic\['x\('\] is no regular expression"),
        ({"dynamic": {"x": 4}}, r"dynamic\['x'\]: settings by name are wanted, found 4"),
        ({"dynamic": {"x": {"bits": 1}}}, r"dynamic\['x'\]: GPTQ checkpoints are read with 2 to 8 bits; this says 1"),
        ({"checkpoint_format": "marlin"}, r"not 'marlin'"),
    ],
)
def test_what_is_not_read_is_an_error(config: dict[str, object], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        general(**config)


# ------------------------------------------------------------------------------------- what is refused, and told


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "gptq_p"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_formats_and_bits_that_are_read_are_accepted(format: str, bits: int) -> None:
    assert reasons_against({"bits": bits, "checkpoint_format": format, "pack_dtype": "int32"}) == []


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        ({"checkpoint_format": "marlin"}, ["'marlin'", "tiles of one GPU kernel", "quantize the model again"]),
        ({"is_marlin_format": True}, ["'marlin'", "tiles of one GPU kernel", "quantize the model again"]),
        ({"format": "gptq_marlin_24"}, ["half of its weights are left out", "quantize the model again"]),
        ({"format": "bitblas"}, ["'bitblas'", "tiles of one GPU kernel", "quantize the model again"]),
        ({"format": "qqq"}, ["8-bit activations", "quantize the model again"]),
        ({"format": "gemm"}, ["a version of AWQ", '"quant_method": "awq"']),
        ({"format": "new"}, ["not 'new'", "not known", "quantize the model again"]),
        ({"pack_dtype": "int16"}, ["pack_dtype is 'int16'", "quantize the model again"]),
        ({"packing_format": "auto_round:auto_awq"}, ["'auto_round:auto_awq'", "Export the model again"]),
        ({"data_type": "mx_fp"}, ["data_type \"int\"; this is 'mx_fp'", "quantize the model again"]),
        ({"bits": 1}, ["bits; the checkpoint has 1"]),
    ],
)
def test_what_is_refused_is_told_with_what_to_do(config: dict[str, object], facts: list[str]) -> None:
    [reason] = reasons_against({"bits": 4, **config})
    for fact in facts:
        assert fact in reason


def test_export_of_autoround_is_read() -> None:
    [spec] = octavo_components()
    config = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "data_type": "int",
        "sym": True,
        "extra_config": {f"{DOWN}": {"bits": 16}, "lm_head": {"bits": 8, "group_size": 32}},
    }
    assert spec.why_not(quantization_need(config, "cpu", "float32")) == []
    read = GPTQConfig.read(config)
    assert read.rule_of(DOWN) is None
    assert read.rule_of(f"{DOWN}2") == read.general
    head = read.rule_of("lm_head")
    assert head is not None
    assert (head.bits, head.group_size) == (8, 32)


def test_configuration_of_autogptq_is_recognised_without_a_method() -> None:
    said = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    assert recognise(said, {}) == {**said, "quant_method": "gptq"}
    assert recognise({"bits": 4, "checkpoint_format": "gptq_v2"}, {}) is not None


@pytest.mark.parametrize("config", [{}, {"w_bit": 4, "q_group_size": 128, "version": "GEMM"}, {"wbits": 4}])
def test_configurations_of_others_are_not_recognised(config: dict[str, object]) -> None:
    assert recognise(config, {}) is None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [32, 64, -1])
@pytest.mark.parametrize("indexed", [True, False])
def test_tensors_of_gptq_are_recognised_without_a_configuration(bits: int, size: int, *, indexed: bool) -> None:
    tensors = dict(Kind(bits, size).store(SHAPE).tensors)
    if not indexed:
        del tensors["g_idx"]
    assert recognise({}, headers_of(tensors)) == {"quant_method": "gptq", "bits": bits, "group_size": size}


def test_group_size_is_the_one_of_every_linear() -> None:
    headers = {
        **headers_of(Kind(4, 64).store(LinearShape(in_features=96, out_features=64)).tensors),
        **headers_of(Kind(4, 64).store(SHAPE).tensors, DOWN),
    }
    assert recognise({}, headers) == {"quant_method": "gptq", "bits": 4, "group_size": 64}


def test_what_the_configuration_says_is_kept_beside_recognised_tensors() -> None:
    headers = headers_of(Kind(4, 64).store(SHAPE).tensors)
    said = {"bits": 4, "group_size": 64}
    assert recognise(said, headers) == {**said, "quant_method": "gptq"}
    assert recognise({"wbits": 8}, headers) == {"wbits": 8, "group_size": 64, "quant_method": "gptq"}


def test_tensors_of_awq_are_not_recognised() -> None:
    headers = {
        f"{PREFIX}.{name}": TensorHeader(shape=shape, dtype=dtype, num_bytes=0)
        for name, shape, dtype in (("qweight", (128, 8), "I32"), ("qzeros", (2, 8), "I32"), ("scales", (2, 64), "F16"))
    }
    assert recognise({}, headers) is None
    assert recognise({"bits": 4, "group_size": 64}, headers) is None


# ------------------------------------------------------------------------------------------- rules of single linears


def test_first_dynamic_rule_that_matches_the_name_s_beginning_is_about_it() -> None:
    dynamic = {
        r"-:.*\.layers\.1\.": {},
        r"+:model\.layers\.\d+\.mlp": {"bits": 8, "group_size": 32, "sym": False},
        r"model\.layers\.0": {"desc_act": True},
        "mlp": {"bits": 2},
    }
    read = GPTQConfig.read({**GPTQ, "dynamic": dynamic})
    eight = LinearConfig(bits=8, group_size=32, symmetric=False, act_order=False, format="gptq")
    assert read.rule_of("model.layers.1.mlp.up_proj") is None
    assert read.rule_of("model.layers.2.mlp.up_proj") == eight
    q_proj = read.rule_of("model.layers.0.self_attn.q_proj")
    assert q_proj is not None
    assert (q_proj.bits, q_proj.act_order) == (4, True)
    assert read.rule_of("model.layers.2.self_attn.q_proj") == read.general


def test_parts_of_a_stack_may_have_different_bits() -> None:
    names = [f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv"]
    config = {**Kind(4, 32).config, "dynamic": {r".*k_proj": {"bits": 8, "group_size": 64}}}
    made = [kind.store(SHAPE) for kind in (Kind(4, 32), Kind(8, 64), Kind(4, 32))]
    headers: dict[str, TensorHeader] = {}
    for name, stored in zip(names, made, strict=True):
        headers |= headers_of(stored.tensors, name)
    kernels = LinearKernels({"torch-packed": TorchPacked(torch.float32, "cpu")})
    method = GPTQMethod(config, torch.float32, "cpu", headers, kernels)
    for name in names:
        method.parameters(name, SHAPE)
    parts = [
        StoredLinear(prefix=name, shape=SHAPE, tensors=stored.tensors) for name, stored in zip(names, made, strict=True)
    ]
    x = torch.randn(3, 128)
    found = method.apply(method.prepare(parts), x, None)
    torch.testing.assert_close(found, x @ torch.cat([stored.weight for stored in made]).T)


# --------------------------------------------------------------------------------------------- what is quantized


def test_tensors_decide_what_is_quantized() -> None:
    says_others = {"dynamic": {f"-:{PREFIX}": {}}, "modules_in_block_to_quantize": ["self_attn.q_proj"]}
    stored = Kind(4, 32).store(SHAPE)
    headers = {**headers_of(stored.tensors), f"{DOWN}.weight": TensorHeader(shape=(8, 8), dtype="F16", num_bytes=128)}
    method = make_method({**Kind(4, 32).config, **says_others}, headers)
    assert method.quantizes(PREFIX)
    assert not method.quantizes(DOWN)
    assert torch.equal(
        method.dequantize(StoredLinear(prefix=PREFIX, shape=SHAPE, tensors=stored.tensors)), stored.weight
    )


@pytest.mark.parametrize(
    ("config", "prefix", "quantized"),
    [
        ({}, DOWN, True),
        ({}, "lm_head", False),
        ({"lm_head": True}, "lm_head", True),
        ({"lm_head": True, "dynamic": {"-:lm_head": {}}}, "lm_head", False),
        ({}, "model.layers.0.mlp.gate", False),
        ({"dynamic": {r"-:.*down_proj": {}}}, DOWN, False),
        ({"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.down_proj"]]}, DOWN, True),
        ({"modules_in_block_to_quantize": ["self_attn.q_proj"]}, DOWN, False),
        ({"modules_in_block_to_quantize": None}, DOWN, True),
    ],
)
def test_configuration_decides_where_no_tensors_are_there(config: dict[str, Any], prefix: str, quantized: bool) -> None:
    assert make_method({**GPTQ, **config}, {}).quantizes(prefix) == quantized


def test_parameters_are_known_before_there_are_tensors() -> None:
    config = {**Kind(4, 128).config, "dynamic": {"lm_head": {"bits": 3, "group_size": -1}}}
    method = make_method(config, {})
    shapes = {spec.name: spec.shape for spec in method.parameters("lm_head", SHAPE)}
    assert shapes == {"qweight": (12, 64), "qzeros": (1, 6), "scales": (1, 64), "g_idx": (128,)}


def test_bias_that_the_checkpoint_has_is_a_parameter() -> None:
    stored = Kind(4, 32, bias=True).store(SHAPE)
    method = make_method(Kind(4, 32).config, headers_of(stored.tensors))
    assert method.parameters(PREFIX, SHAPE)[-1].name == "bias"


# ------------------------------------------------------------------------------------------------------ zeros, index


def symmetric(zeros: torch.Tensor, format: str = "gptq") -> tuple[GPTQMethod, StoredLinear]:
    """A symmetric linear whose file holds these zeros, [groups, outputs]; with the method that reads it."""
    tensors = dict(Kind(4, 32, symmetric=True).store(SHAPE).tensors)
    tensors["qzeros"] = words(pack_zeros(zeros.numpy(), 4, format))
    method = make_method(Kind(4, 32, symmetric=True).config, headers_of(tensors))
    return method, StoredLinear(prefix=PREFIX, shape=SHAPE, tensors=tensors)


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_zeros_of_symmetric_weights_are_the_middle_however_they_are_stored(
    format: str, caplog: pytest.LogCaptureFixture
) -> None:
    method, stored = symmetric(torch.full((4, 64), 8), format)
    with caplog.at_level(logging.WARNING):
        assert method.weight(stored).zeros is None
    assert caplog.records == []


def test_other_zeros_of_symmetric_weights_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    zeros = torch.full((4, 64), 8)
    zeros[3, 63] = 7
    method, stored = symmetric(zeros)
    with caplog.at_level(logging.WARNING):
        assert method.weight(stored).zeros is None
        method.weight(stored)
    [record] = caplog.records
    assert f"{PREFIX}.qzeros holds other zeros than 8 or, less one, 7. Every zero is taken as 8." in record.getMessage()


def unsaid(zeros: torch.Tensor, stored_as: str, **config: object) -> tuple[GPTQMethod, StoredLinear]:
    """A linear that holds these zeros, of a configuration that does not say `sym`."""
    _, stored = symmetric(zeros, stored_as)
    return make_method({**GPTQ, "group_size": 32, **config}, headers_of(stored.tensors)), stored


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_stored_zeros_are_read_where_nothing_says_symmetric(format: str) -> None:
    zeros = torch.arange(256).reshape(4, 64) % 16
    method, stored = unsaid(zeros, format, checkpoint_format=format)
    found = method.weight(stored).zeros
    assert found is not None
    assert torch.equal(found.long(), zeros)
    assert not method.facts(PREFIX, SHAPE).symmetric


@pytest.mark.parametrize(("said", "stored_as"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq"), ("gptq", "gptq")])
def test_zeros_that_are_all_the_middle_of_either_format_are_the_middle(said: str, stored_as: str) -> None:
    method, stored = unsaid(torch.full((4, 64), 8), stored_as, checkpoint_format=said)
    found = method.weight(stored).zeros
    assert found is not None
    assert (found == 8).all()


def test_zeros_whose_format_nothing_says_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    method, stored = unsaid(torch.arange(256).reshape(4, 64) % 16, "gptq")
    with caplog.at_level(logging.WARNING):
        method.weight(stored)
        method.weight(stored)
    [record] = caplog.records
    assert f"the zeros in {PREFIX}.qzeros" in record.getMessage()


def test_linear_without_zeros_is_symmetric_where_nothing_says_so() -> None:
    _, stored = symmetric(torch.full((4, 64), 8))
    tensors = {name: each for name, each in stored.tensors.items() if name != "qzeros"}
    method = make_method({**GPTQ, "group_size": 32}, headers_of(tensors))
    method.parameters(PREFIX, SHAPE)
    assert method.facts(PREFIX, SHAPE).symmetric


def test_index_of_int64_is_read() -> None:
    stored = Kind(4, 32, act_order=True).store(SHAPE)
    tensors = {**stored.tensors, "g_idx": stored.tensors["g_idx"].long()}
    method = make_method(Kind(4, 32, act_order=True).config, headers_of(tensors))
    assert {spec.name: spec.dtype for spec in method.parameters(PREFIX, SHAPE)}["g_idx"] == torch.int32
    weight = method.weight(StoredLinear(prefix=PREFIX, shape=SHAPE, tensors=tensors))
    assert weight.group_index is not None
    assert weight.group_index.dtype == torch.int32
    assert torch.equal(weight.group_index, stored.tensors["g_idx"])


def test_index_of_zeros_alone_is_the_natural_one() -> None:
    stored = Kind(4, 32).store(SHAPE)
    tensors = {**stored.tensors, "g_idx": torch.zeros(128, dtype=torch.int32)}
    method = make_method(Kind(4, 32, act_order=True).config, headers_of(tensors))
    linear = StoredLinear(prefix=PREFIX, shape=SHAPE, tensors=tensors)
    assert method.weight(linear).group_index is None
    assert torch.equal(method.dequantize(linear), stored.weight)


def test_index_that_is_the_natural_one_is_none() -> None:
    stored = Kind(4, 32).store(SHAPE)
    method = make_method(Kind(4, 32, act_order=True).config, headers_of(stored.tensors))
    assert method.weight(StoredLinear(prefix=PREFIX, shape=SHAPE, tensors=stored.tensors)).group_index is None


def test_index_is_read_whatever_the_configuration_says() -> None:
    stored = Kind(4, 32, act_order=True).store(SHAPE)
    method = make_method(Kind(4, 32, act_order=False).config, headers_of(stored.tensors))
    linear = StoredLinear(prefix=PREFIX, shape=SHAPE, tensors=stored.tensors)
    assert torch.equal(method.dequantize(linear), stored.weight)


def test_checkpoint_without_an_index_is_read() -> None:
    stored = Kind(4, 32).store(SHAPE)
    tensors = {name: each for name, each in stored.tensors.items() if name != "g_idx"}
    method = make_method(Kind(4, 32).config, headers_of(tensors))
    assert [spec.name for spec in method.parameters(PREFIX, SHAPE)] == ["qweight", "qzeros", "scales"]
    assert torch.equal(method.dequantize(StoredLinear(prefix=PREFIX, shape=SHAPE, tensors=tensors)), stored.weight)
