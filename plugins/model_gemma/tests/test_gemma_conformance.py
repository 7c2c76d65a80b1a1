"""Gemma 2 and Gemma 3 by the conformance suite, with transformers as the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from octavo.testing import ModelSuite

# The suite's prompts have 37 tokens: the window is left behind, and each type of layer comes twice.
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 20,
    "sliding_window": 10,
    "tie_word_embeddings": True,
}


@torch.no_grad()
def logits_of(model: PreTrainedModel, tensors: Mapping[str, Tensor], token_ids: Sequence[int]) -> Tensor:
    """The model's answer with these weights; a tied head is the embedding's tensor."""
    model.load_state_dict({"lm_head.weight": tensors["model.embed_tokens.weight"], **tensors})
    logits: Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


class TestGemma2(ModelSuite):
    component = "model-gemma/gemma2"
    config = SIZES | {
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 10.0,
    }

    def reference(self, tensors: Mapping[str, Tensor], token_ids: Sequence[int]) -> Tensor:
        return logits_of(Gemma2ForCausalLM(Gemma2Config(**self.config)), tensors, token_ids)


class TestGemma2WithAHeadOfItsOwnAndBiases(TestGemma2):
    config = TestGemma2.config | {
        "tie_word_embeddings": False,
        "attention_bias": True,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"],
    }


class TestGemma3(ModelSuite):
    component = "model-gemma/gemma3"
    config = SIZES | {
        "architectures": ["Gemma3ForCausalLM"],
        "sliding_window_pattern": 2,
        "rope_theta": 100_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "rope_local_base_freq": 100.0,
    }

    def reference(self, tensors: Mapping[str, Tensor], token_ids: Sequence[int]) -> Tensor:
        config = {key: dict(value) if key == "rope_scaling" else value for key, value in self.config.items()}
        return logits_of(Gemma3ForCausalLM(Gemma3TextConfig(**config)), tensors, token_ids)


class TestGemma3WithACapOnItsLogits(TestGemma3):
    config = TestGemma3.config | {"final_logit_softcapping": 10.0, "rms_norm_eps": 1e-3, "sliding_window_pattern": 3}
