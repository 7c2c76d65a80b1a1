"""Tiny random checkpoints of several architectures, and what transformers answers with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_model import SIZES, VOCAB_SIZE, write_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    OlmoConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Starcoder2Config,
)

ALL_HEADS: dict[str, Any] = SIZES | {"num_key_value_heads": SIZES["num_attention_heads"]}

KINDS: dict[str, PreTrainedConfig] = {
    "OLMo, norms without weights": OlmoConfig(**SIZES, pad_token_id=0, clip_qkv=0.9),
    "OLMo 2, norms behind each half": Olmo2Config(**SIZES, pad_token_id=0),
    "Granite, four multipliers": GraniteConfig(
        **SIZES, embedding_multiplier=3.0, residual_multiplier=0.7, attention_multiplier=0.2, logits_scaling=0.5
    ),
    "StarCoder2, LayerNorm, biases and a window": Starcoder2Config(**SIZES, sliding_window=24),
    "GPT-NeoX, halves in parallel, part of a head rotated": GPTNeoXConfig(**ALL_HEADS, rotary_pct=0.5),
    "Cohere, a tied and scaled head": CohereConfig(**SIZES, pad_token_id=0, logit_scale=10.0),
    "Llama, YaRN": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "Phi, a head with a bias": PhiConfig(**ALL_HEADS, partial_rotary_factor=0.5),
    "Gemma 2, scaled embeddings, soft-caps, alternating windows": Gemma2Config(
        **SIZES, head_dim=12, sliding_window=24, attn_logit_softcapping=2.0, query_pre_attn_scalar=12
    ),
}


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The same one each time, with transformers' plainest attention as the reference."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # transformers starts them at 0 and 1, where faults do not show
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def raw_config(model: PreTrainedModel) -> dict[str, Any]:
    """As config.json of the saved model has it."""
    raw: dict[str, Any] = model.config.to_dict()
    return raw | {"architectures": [type(model).__name__]}


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """By the names that a checkpoint has for them."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder, "model.safetensors"))


def write_model(folder: Path, model: PreTrainedModel) -> Path:
    """The folder as transformers saves it, and a tokenizer."""
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def logits_of(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits
