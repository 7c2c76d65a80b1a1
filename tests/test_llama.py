"""Llama, Mistral and SmolLM3 against transformers: equal logits and greedy tokens of tiny random checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from margin_rule import Reference, check, generate, next_tokens_of, token_ids_of
from safetensors.torch import load_file, save_file
from tiny_model import MAX_POSITIONS, SIZES, VOCAB_SIZE, write_tiny_llama, write_tiny_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SmolLM3Config,
)

from octavo import LLM
from octavo.builtin.hf_checkpoint import HuggingFaceCheckpoint
from octavo.builtin.llama import Llama
from octavo.config import EngineConfig
from octavo.errors import CheckpointError, ConfigError
from octavo.plugins.specs import AttentionSpec
from octavo.selection import select
from octavo.testing.model_under_test import ModelUnderTest

WINDOW = 12
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.5, 1.7, 2.0], "long_factor": [1.0, 2.0, 4.0, 6.0, 8.0, 9.0]}
MISTRAL = SIZES | {"hidden_size": 40, "head_dim": 12, "sliding_window": WINDOW}
SMOLLM3 = SIZES | {"num_hidden_layers": 4, "pad_token_id": 0}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A tiny model, and where transformers' answers to it are ours: it decides some rotations by the text's length."""

    config: PreTrainedConfig
    max_model_len: int = MAX_POSITIONS
    prompt_lengths: tuple[int, ...] = (1, 50, 17)
    num_tokens: int = 32


def llama(**changes: Any) -> Kind:
    return Kind(config=LlamaConfig(**(SIZES | changes)))


def llama_of(rope_type: str, **parameters: Any) -> Kind:
    """Llama with a rotation, and enough of it to show within 60 positions."""
    rope = {"rope_type": rope_type, "rope_theta": 100.0, **parameters}
    return llama(rope_parameters=rope)


KINDS = {
    "Llama 2": llama(num_key_value_heads=4),
    "grouped queries": llama(),
    "tied head": llama(tie_word_embeddings=True),
    "biases": llama(attention_bias=True, mlp_bias=True, num_key_value_heads=1),
    "unusual sizes": llama(num_attention_heads=6, num_key_value_heads=3, head_dim=10, rms_norm_eps=1e-3),
    "Llama 3": llama_of(
        "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
    "linear": llama_of("linear", factor=3.0),
    "yarn": llama_of("yarn", factor=4.0, original_max_position_embeddings=32),
    "dynamic": llama_of("dynamic", factor=4.0),
    "longrope, long": replace(
        llama_of("longrope", **FACTORS, original_max_position_embeddings=32), prompt_lengths=(33, 50, 90)
    ),
    "longrope, short": replace(
        llama_of("longrope", **FACTORS, original_max_position_embeddings=100), max_model_len=100
    ),
    "Mistral": Kind(config=MistralConfig(**MISTRAL)),
    "Mistral without a window": Kind(config=MistralConfig(**(MISTRAL | {"sliding_window": None}))),
    "SmolLM3": Kind(config=SmolLM3Config(**SMOLLM3)),
    "SmolLM3 with windows and biases": Kind(
        config=SmolLM3Config(
            **SMOLLM3,
            no_rope_layers=[0, 1, 0, 1],
            use_sliding_window=True,
            sliding_window=WINDOW,
            attention_bias=True,
            mlp_bias=True,
        )
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = KINDS[request.param]
    return found


@pytest.fixture(scope="module")
def folder(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llama"), kind.config)


@pytest.fixture(scope="module")
def reference_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def references(kind: Kind, reference_model: PreTrainedModel) -> list[Reference]:
    return [greedy_reference(reference_model, prompt, kind.num_tokens) for prompt in prompts(*kind.prompt_lengths)]


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def logits_of(
    folder: Path, token_ids: Sequence[int], chunks: Sequence[int], max_model_len: int = MAX_POSITIONS
) -> Tensor:
    """The logits behind every token, computed in steps of so many tokens."""
    checkpoint = HuggingFaceCheckpoint(str(folder))
    tensors = dict(checkpoint.tensors())
    model = ModelUnderTest(Llama, checkpoint.config(), tensors, max_model_len=max_model_len)
    (logits,) = model.logits([token_ids], [chunks])
    return logits


@torch.inference_mode()
def greedy_reference(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> Reference:
    """What transformers answers, without a cache, and by how much each token won."""
    token_ids, margins = list(prompt), []
    for _ in range(num_tokens):
        best = model(torch.tensor([token_ids])).logits[0, -1].topk(2)
        margins.append(float(best.values[0] - best.values[1]))
        token_ids.append(int(best.indices[0]))
    return Reference(
        name=f"{len(prompt)} tokens",
        prompt_token_ids=list(prompt),
        token_ids=token_ids[len(prompt) :],
        margins=margins,
    )


@pytest.mark.parametrize("chunks", [[60], [16, 16, 16, 12], [50, *[1] * 10]], ids=["whole", "chunks", "decode"])
def test_logits_equal_transformers(
    kind: Kind, folder: Path, reference_model: PreTrainedModel, chunks: list[int]
) -> None:
    (token_ids,) = prompts(60)
    with torch.inference_mode():
        wanted = reference_model(torch.tensor([token_ids])).logits[0]
    found = logits_of(folder, token_ids, chunks, kind.max_model_len)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 16}, {"block_size": 4, "max_steps_in_flight": 2}],
    ids=["batched", "prompts in chunks", "small blocks, two steps in flight"],
)
def test_greedy_tokens_equal_transformers(
    kind: Kind, folder: Path, references: list[Reference], settings: dict[str, Any]
) -> None:
    with LLM(str(folder), dtype="float32", max_num_seqs=4, max_model_len=kind.max_model_len, **settings) as llm:
        check(references, token_ids_of(generate(llm, references)), next_tokens_of(llm))


@pytest.mark.parametrize("chunks", [[60], [16, 44], [50, *[1] * 10]], ids=["whole", "chunks", "decode"])
def test_dynamic_rope_is_that_of_the_longest_context_whatever_the_chunk(tmp_path: Path, chunks: list[int]) -> None:
    """transformers goes by the text's length, which here is the longest that is admitted."""
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    write_tiny_llama(tmp_path, rope_parameters=rope, max_position_embeddings=32)
    (token_ids,) = prompts(60)
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(torch.tensor([token_ids])).logits[
            0
        ]
    torch.testing.assert_close(logits_of(tmp_path, token_ids, chunks, 60), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits_of(tmp_path, token_ids, chunks, 120), wanted, rtol=1e-2, atol=1e-2)


def test_max_model_len_may_be_what_a_scaled_rotation_reaches_and_no_more(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    write_tiny_llama(tmp_path, rope_parameters=rope, max_position_embeddings=32)
    assert select(EngineConfig(model=str(tmp_path))).max_model_len == 32
    assert select(EngineConfig(model=str(tmp_path), max_model_len=64)).max_model_len == 64
    with pytest.raises(ConfigError, match="the model's positions end at 64"):
        select(EngineConfig(model=str(tmp_path), max_model_len=65))


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM", "SmolLM3ForCausalLM"])
def test_another_activation_is_refused_by_name(architecture: str) -> None:
    raw = LlamaConfig(**SIZES, hidden_act="gelu").to_dict() | {"architectures": [architecture]}
    with pytest.raises(CheckpointError, match=f"hidden_act is 'gelu'; {architecture} here computes 'silu' only"):
        ModelUnderTest(Llama, raw)


def test_a_backend_without_windows_is_refused_where_contexts_outgrow_the_window(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, KINDS["Mistral"].config)
    longer, as_long = (
        select(EngineConfig(model=str(tmp_path), max_model_len=length)).attention_need
        for length in (WINDOW + 1, WINDOW)
    )
    without = AttentionSpec(name="plain", target="plain:Plain", features=frozenset({"prefill", "decode"}))
    assert without.why_not(longer) == ["does not support sliding_window"]
    assert without.why_not(as_long) == []


def test_a_checkpoint_without_a_layers_tensor_is_refused_by_its_name(tmp_path: Path) -> None:

    write_tiny_llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.mlp\.down_proj\.weight"):
        LLM(str(tmp_path), dtype="float32")


def test_a_tied_checkpoint_may_also_hold_the_head(tmp_path: Path) -> None:

    write_tiny_llama(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    token_ids = prompts(9)[0]
    alone = logits_of(tmp_path, token_ids, [9])
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(logits_of(tmp_path, token_ids, [9]), alone)
