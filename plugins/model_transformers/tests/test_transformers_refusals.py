"""What is refused when its configuration is known or its class is run without weights, each with its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_model import SIZES
from tiny_transformers import random_model, raw_config
from torch import Tensor, nn
from transformers import (
    DiffLlamaConfig,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MiniCPM3Config,
    MixtralConfig,
    MoshiConfig,
    NemotronConfig,
    Olmo2Config,
    OPTConfig,
    PreTrainedConfig,
    Starcoder2Config,
)

from octavo.errors import CheckpointError
from octavo.testing.model_under_test import ModelUnderTest
from octavo_model_transformers.attention import AttentionTrace, Mask
from octavo_model_transformers.model import TransformersModel

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 6,
    "long_factor": [2.0] * 6,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def refusal_of(config: PreTrainedConfig, architecture: str, **changes: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        ModelUnderTest(TransformersModel, config.to_dict() | {"architectures": [architecture]} | changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "architecture", "reason"),
    [
        (
            MixtralConfig(**SIZES, num_local_experts=2),
            "MixtralForCausalLM",
            "checkpoints, nor are 3 others, as in mixtures of experts",
        ),
        (
            Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
            "Lfm2ForCausalLM",
            "layer_types has 'conv'; layers of full and sliding attention are served; "
            "tokens reach each other past its attention, through Conv1d",
        ),
        (
            Olmo2Config(**SIZES, rope_parameters=LONGROPE),
            "Olmo2ForCausalLM",
            "its rotation (longrope) would change with the longest request of the batch",
        ),
        (
            Olmo2Config(**SIZES, rope_parameters=DYNAMIC),
            "Olmo2ForCausalLM",
            "its rotation (dynamic) would change with the longest request of the batch",
        ),
        (NemotronConfig(**SIZES), "NemotronForCausalLM", "does not hand on to NemotronAttention what it was called"),
        (DiffLlamaConfig(**SIZES), "DiffLlamaForCausalLM", "one DiffLlamaAttention serves several layers"),
        (MiniCPM3Config(**SIZES), "MiniCPM3ForCausalLM", "MiniCPM3Attention has keys of 96 numbers and values of 12"),
        (
            GPTNeoXConfig(**SIZES),
            "GPTNeoXForCausalLM",
            "layer 0 has (heads, KV heads, head size) (4, 4, 12), the KV cache is made for (4, 2, 12)",
        ),
        (
            LlamaConfig(**SIZES, is_encoder_decoder=True),
            "LlamaForCausalLM",
            "it attends to an encoder too",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith("LM") else "",
)
def test_a_configuration_that_cannot_be_served_is_refused_with_its_reason(
    config: PreTrainedConfig, architecture: str, reason: str
) -> None:
    refusal = refusal_of(config, architecture)
    assert refusal.startswith(f"{architecture} cannot be served through transformers ")
    assert reason in refusal


def test_several_models_in_one_are_refused() -> None:
    config = MoshiConfig(**{name: value for name, value in SIZES.items() if name != "intermediate_size"}, ffn_dim=96)
    refusal = refusal_of(config, "MoshiForCausalLM", intermediate_size=96)
    assert "it is several models in one (audio_encoder_config, depth_decoder_config)" in refusal


def test_a_decoder_inside_another_module_is_refused() -> None:
    config = OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=48)
    assert "run once without weights, it raised AttributeError" in refusal_of(config, "OPTForCausalLM")


def test_a_window_that_is_not_the_configurations_is_refused() -> None:
    """The engine asked for no backend with this window, and would compute without it."""
    config = Starcoder2Config(**SIZES, sliding_window=24)
    refusal = refusal_of(config, "Starcoder2ForCausalLM", use_sliding_window=False)
    assert "attention has a sliding_window of 24, config.json says None" in refusal


def test_a_configuration_that_its_class_refuses_is_quoted() -> None:
    refusal = refusal_of(LlamaConfig(**SIZES), "LlamaForCausalLM", num_attention_heads=5, head_dim=None)
    assert "its class does not take this config.json: " in refusal
    assert "5" in refusal


def test_a_class_that_transformers_lacks_is_named() -> None:
    with pytest.raises(CheckpointError, match="has no NoSuchForCausalLM"):
        ModelUnderTest(
            TransformersModel, raw_config(random_model(LlamaConfig(**SIZES))) | {"architectures": ["NoSuchForCausalLM"]}
        )


# ----------------------------------------------------------------------------------------------- what attention asks


def heads(num_heads: int, head_dim: int = 8) -> Tensor:
    return torch.empty(1, num_heads, 3, head_dim, device="meta")


def faults_of(mask: object = Mask(window=None), module: nn.Module | None = None, **arguments: object) -> list[str]:
    trace = AttentionTrace()
    trace(module or nn.Identity(), heads(4), heads(2), heads(2), mask, arguments)
    return trace.faults


def test_plain_attention_has_no_faults() -> None:
    assert faults_of(scaling=0.5, dropout=0.0, sliding_window=16, position_ids=heads(1), s_aux=None) == []


def test_what_attention_does_not_compute_is_named() -> None:
    assert faults_of(s_aux=heads(1), sinks=heads(1)) == [
        "Identity gives attention s_aux, sinks, which it does not compute"
    ]


def test_a_mask_of_the_models_own_is_refused() -> None:
    assert faults_of(mask=heads(1)) == ["Identity makes its attention mask by itself"]


def test_attention_in_both_directions_is_refused() -> None:
    both_ways = nn.Identity()
    both_ways.is_causal = False
    assert faults_of(is_causal=False) == faults_of(module=both_ways) == ["Identity is not causal"]
