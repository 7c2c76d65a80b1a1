"""Qwen2 and Qwen3 by the conformance suite, with transformers as the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from octavo.testing import ModelSuite

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


@torch.no_grad()
def logits_of(model: PreTrainedModel, tensors: Mapping[str, Tensor], token_ids: Sequence[int]) -> Tensor:
    """The model's answer with these weights; a tied head is the embedding's tensor."""
    model.load_state_dict({"lm_head.weight": tensors["model.embed_tokens.weight"], **tensors})
    logits: Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


class TestQwen2(ModelSuite):
    component = "model-qwen/qwen2"
    config = SIZES | {"architectures": ["Qwen2ForCausalLM"]}

    def reference(self, tensors: Mapping[str, Tensor], token_ids: Sequence[int]) -> Tensor:
        return logits_of(Qwen2ForCausalLM(Qwen2Config(**self.config)), tensors, token_ids)


class TestQwen2WithATiedHead(TestQwen2):
    config = TestQwen2.config | {"tie_word_embeddings": True, "num_hidden_layers": 3, "rope_theta": 1e6}


class TestQwen3(ModelSuite):
    component = "model-qwen/qwen3"
    config = SIZES | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}

    def reference(self, tensors: Mapping[str, Tensor], token_ids: Sequence[int]) -> Tensor:
        return logits_of(Qwen3ForCausalLM(Qwen3Config(**self.config)), tensors, token_ids)


class TestQwen2WithWindows(TestQwen2):
    config = TestQwen2.config | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}


class TestQwen3WithATiedHeadAndBiases(TestQwen3):
    config = TestQwen3.config | {"tie_word_embeddings": True, "attention_bias": True, "rms_norm_eps": 1e-3}
