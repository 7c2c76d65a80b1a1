"""Phi-3 by the conformance suite, with transformers as the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

from octavo.testing import ModelSuite

# The suite's prompts have 37 tokens: the window is left behind.
SIZES: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 10,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


class TestPhi(ModelSuite):
    component = "model-phi/phi3"
    config = SIZES

    @torch.no_grad()
    def reference(self, tensors: Mapping[str, Tensor], token_ids: Sequence[int]) -> Tensor:
        config = {key: dict(value) if isinstance(value, Mapping) else value for key, value in self.config.items()}
        model = Phi3ForCausalLM(Phi3Config(**config))
        model.load_state_dict({"lm_head.weight": tensors["model.embed_tokens.weight"], **tensors})
        logits: Tensor = model(torch.tensor([token_ids])).logits[0]
        return logits


class TestPhiWithATiedHeadAndLongRope(TestPhi):
    config = SIZES | {
        "tie_word_embeddings": True,
        "num_hidden_layers": 3,
        "sliding_window": None,
        "original_max_position_embeddings": 16,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.05, 1.1, 1.2, 1.4, 1.5],
            "long_factor": [1.1, 1.5, 2.0, 4.0, 6.0, 8.0],
        },
    }
