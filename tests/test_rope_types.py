"""Frequencies and attention scaling of every rope type against transformers' own functions, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from octavo.errors import CheckpointError
from octavo.interfaces.attention import rotate
from octavo.model_config import ModelConfig, RopeConfig
from octavo.nn.rope_types import frequencies, rotary_dim
from octavo.nn.rotary import RotaryTable

SHORT = [1.0 + 0.01 * index for index in range(32)]
LONG = [1.0 + 0.5 * index for index in range(32)]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONGROPE = {"short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 4096}
TYPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "llama3, factor 32": {"rope_type": "llama3", **LLAMA3, "factor": 32.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn, its original length left out": {"rope_type": "yarn", "factor": 4.0},
    "yarn with its betas": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
        "attention_factor": 0.8,
    },
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
    "yarn without truncation": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    "longrope": {"rope_type": "longrope", **LONGROPE},
    "longrope with a factor": {"rope_type": "longrope", **LONGROPE, "factor": 16.0},
    "longrope with an attention factor": {"rope_type": "longrope", **LONGROPE, "attention_factor": 1.1},
}
MAX_POSITIONS = 16384


def raw_config(rope: dict[str, Any], theta: float = 500_000.0, **keys: Any) -> dict[str, Any]:
    """config.json of a Llama with heads of 64, as transformers writes it."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_theta": theta, **rope},
        **keys,
    ).to_dict()


def theirs(raw: dict[str, Any], seq_len: int) -> tuple[Tensor, float]:
    config = LlamaConfig(**raw)
    rope_type = config.rope_parameters["rope_type"]
    if rope_type == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    found: tuple[Tensor, float] = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", seq_len=seq_len)
    return found


@pytest.mark.parametrize("length", [100, 4096, MAX_POSITIONS, 40_000])
@pytest.mark.parametrize("name", TYPES)
def test_frequencies_and_scaling_equal_transformers(name: str, length: int) -> None:
    raw = raw_config(TYPES[name])
    rope = ModelConfig.from_dict(raw, {}).rope
    radians, scaling = frequencies(rope, 64, length)
    wanted, wanted_scaling = theirs(raw, length)
    assert scaling == pytest.approx(wanted_scaling, rel=1e-12)
    torch.testing.assert_close(radians, wanted, rtol=3e-7, atol=0)  # one unit in the last place, or two


@pytest.mark.parametrize("name", ["default", "linear", "dynamic", "yarn", "yarn with mscale", "longrope"])
def test_frequencies_are_the_same_bits(name: str) -> None:
    raw = raw_config(TYPES[name], theta=10_000.0)
    radians, _ = frequencies(ModelConfig.from_dict(raw, {}).rope, 64, 40_000)
    assert torch.equal(radians, theirs(raw, 40_000)[0])


@pytest.mark.parametrize("name", ["linear", "dynamic", "llama3", "yarn"])
def test_part_of_a_head_is_rotated_as_transformers_does(name: str) -> None:
    raw = raw_config(TYPES[name] | {"partial_rotary_factor": 0.75})
    rope = ModelConfig.from_dict(raw, {}).rope
    assert rotary_dim(rope, 64) == 48
    torch.testing.assert_close(frequencies(rope, 64, 100)[0], theirs(raw, 100)[0], rtol=3e-7, atol=0)


def test_the_rest_of_a_head_is_kept() -> None:
    rope = RopeConfig(partial_rotary_factor=0.5)
    x = torch.randn(3, 2, 8)
    positions = torch.tensor([0, 1, 7])
    turned = rotate(x, RotaryTable(rope, 8, 10, torch.float32, "cpu")(positions))
    of_half = rotate(x[..., :4], RotaryTable(RopeConfig(), 4, 10, torch.float32, "cpu")(positions))
    assert torch.equal(turned, torch.cat((of_half, x[..., 4:]), dim=-1))


@pytest.mark.parametrize("name", ["yarn", "longrope"])
def test_the_table_is_scaled(name: str) -> None:
    raw = raw_config(TYPES[name])
    rope = ModelConfig.from_dict(raw, {}).rope
    length = 20_000
    positions = torch.tensor([0, 1, 77, 19_999])
    cos, sin = LlamaRotaryEmbedding(LlamaConfig(**raw))(torch.empty(1), positions.unsqueeze(0))
    found = RotaryTable(rope, 64, length, torch.float32, "cpu")(positions)
    torch.testing.assert_close(found[0].squeeze(1), cos[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(found[1].squeeze(1)[:, 32:], sin[0, :, 32:], rtol=0, atol=2e-3)


# ------------------------------------------------------------------------------- the types that go by the length


@pytest.mark.parametrize("length", [100, MAX_POSITIONS])
def test_dynamic_is_plain_up_to_the_length_the_model_was_trained_with(length: int) -> None:
    rope = ModelConfig.from_dict(raw_config(TYPES["dynamic"]), {}).rope
    assert torch.equal(frequencies(rope, 64, length)[0], frequencies(RopeConfig(theta=500_000.0), 64, length)[0])


def test_dynamic_slows_down_with_the_longest_context() -> None:
    rope = ModelConfig.from_dict(raw_config(TYPES["dynamic"]), {}).rope
    slower, faster = (frequencies(rope, 64, length)[0][1:] for length in (4 * MAX_POSITIONS, 2 * MAX_POSITIONS))
    assert (slower < faster).all()


@pytest.mark.parametrize(("length", "factors"), [(4096, SHORT), (4097, LONG)])
def test_longrope_takes_the_factors_of_the_longest_context(length: int, factors: list[float]) -> None:
    rope = ModelConfig.from_dict(raw_config(TYPES["longrope"]), {}).rope
    plain, _ = frequencies(RopeConfig(theta=500_000.0), 64, length)
    torch.testing.assert_close(frequencies(rope, 64, length)[0], plain / torch.tensor(factors))


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        ({"rope_type": "default"}, MAX_POSITIONS),
        ({"rope_type": "linear", "factor": 2.0}, 2 * MAX_POSITIONS),
        ({"rope_type": "dynamic", "factor": 2.5}, 40_960),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}, 32_768),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, MAX_POSITIONS),
        ({"rope_type": "llama3", **LLAMA3}, MAX_POSITIONS),
        ({"rope_type": "longrope", **LONGROPE}, MAX_POSITIONS),
    ],
)
def test_the_longest_context_is_what_the_rotation_is_made_for(rope: dict[str, Any], wanted: int) -> None:
    assert ModelConfig.from_dict(raw_config(rope), {}).longest_context == wanted


# --------------------------------------------------------------------------------------------------- GGUF, refusals


def test_given_factors_divide_the_plain_frequencies() -> None:
    found, scaling = frequencies(RopeConfig(rope_type="factors", parameters={"factors": [1.0, 4.0]}), 4, 4096)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.01 / 4]))
    assert scaling == 1.0


def test_an_unknown_rope_type_is_refused_by_name() -> None:
    known = "default, linear, dynamic, llama3, yarn, longrope, factors"
    with pytest.raises(CheckpointError, match=rf"'spiral' is not supported; known: {known}"):
        frequencies(RopeConfig(rope_type="spiral"), 64, 4096)


@pytest.mark.parametrize(
    ("rope_type", "left_out"),
    [("llama3", "low_freq_factor"), ("linear", "factor"), ("dynamic", "factor"), ("longrope", "long_factor")],
)
def test_a_rope_type_without_its_numbers_is_refused_by_their_name(rope_type: str, left_out: str) -> None:
    parameters = {**LLAMA3, **LONGROPE, "max_position_embeddings": MAX_POSITIONS}
    del parameters[left_out]
    with pytest.raises(CheckpointError, match=rf"'{rope_type}' lacks the parameter '{left_out}'"):
        frequencies(RopeConfig(rope_type=rope_type, parameters=parameters), 64, MAX_POSITIONS)


@pytest.mark.parametrize("factors", [[1.0] * 31, [1.0] * 64], ids=len)
def test_factors_of_another_number_than_the_frequencies_are_refused(factors: list[float]) -> None:
    rope = RopeConfig(rope_type="longrope", parameters=LONGROPE | {"long_factor": factors, "factor": 4.0})
    with pytest.raises(CheckpointError, match=f"long_factor has {len(factors)} numbers, and 32 pairs"):
        frequencies(rope, 64, MAX_POSITIONS)


def test_a_number_that_is_none_is_refused_with_what_was_found() -> None:
    rope = RopeConfig(rope_type="linear", parameters={"factor": "four"})
    with pytest.raises(CheckpointError, match=r"'linear' cannot use \{'factor': 'four'\}: could not convert string"):
        frequencies(rope, 64, 4096)
