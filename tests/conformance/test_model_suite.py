"""ModelSuite: Llama passes it, and it catches every planted fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from conformance.model_mutants import MUTANTS, WRONG_FORMULAS, MakeModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from octavo.interfaces import LayerFactory, ModelArchitecture
from octavo.model_config import ModelConfig
from octavo.testing import ModelSuite, run_suite

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


class LlamaSuite(ModelSuite):
    component = "builtin/llama"
    config = CONFIG

    @torch.no_grad()
    def reference(self, tensors: Mapping[str, Tensor], token_ids: Sequence[int]) -> Tensor:
        model = LlamaForCausalLM(LlamaConfig(**self.config))
        head = {"lm_head.weight": tensors["model.embed_tokens.weight"]} if self.config["tie_word_embeddings"] else {}
        model.load_state_dict({**tensors, **head})
        logits: Tensor = model(torch.tensor([token_ids])).logits[0]
        return logits


class TestLlama(LlamaSuite):
    pass


class TestLlamaWithATiedHeadAndBiases(LlamaSuite):
    config = CONFIG | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3}


class SuiteWithoutAReference(ModelSuite):
    component = "builtin/llama"
    config = CONFIG


def run_on(mutant: MakeModel, suite: type[ModelSuite]) -> dict[str, str]:
    """The outcomes of a suite whose model is the mutant."""

    class SuiteOfMutant(suite):
        def make(self, config: ModelConfig, factory: LayerFactory) -> ModelArchitecture:
            return mutant(config, factory)

    return run_suite(SuiteOfMutant)


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_fault_is_caught(name: str) -> None:
    mutant, test = MUTANTS[name]
    outcomes = run_on(mutant, SuiteWithoutAReference)
    assert outcomes[test].startswith("failed")


@pytest.mark.parametrize("name", WRONG_FORMULAS)
def test_wrong_formula_is_caught_by_the_reference(name: str) -> None:
    failed = [test for test, outcome in run_on(WRONG_FORMULAS[name], LlamaSuite).items() if outcome != "passed"]
    assert failed == ["test_equals_the_reference"]
