"""Phi through LLM against transformers, from folders as transformers saves them; real sizes; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from greedy_reference import prompts, reference_of
from margin_rule import Reference, check, generate, next_tokens_of, token_ids_of
from safetensors.torch import load_file, save_file
from tiny_model import MAX_POSITIONS, SIZES, write_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedConfig

from octavo import LLM
from octavo.errors import CheckpointError
from octavo.model_config import ModelConfig
from octavo.testing.model_under_test import ModelUnderTest
from octavo_model_phi.phi import Phi

# The window is shorter than the contexts. Heads have 16 elements, of which a partial rotation turns 12.
TINY: dict[str, Any] = SIZES | {"hidden_size": 64, "pad_token_id": 0, "sliding_window": 8}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e3,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.4, 1.5],
    "long_factor": [1.1, 1.5, 2.0, 4.0, 6.0, 8.0],
}
KINDS: dict[str, PreTrainedConfig] = {
    "phi3": Phi3Config(**TINY),
    "phi3 without a window": Phi3Config(**TINY | {"sliding_window": None, "num_key_value_heads": 4}),
    # transformers goes by the text's length, here by max_model_len: so all texts are longer than 16, and none than 128.
    "longrope, long": Phi3Config(
        **TINY | {"tie_word_embeddings": True, "sliding_window": 200},
        original_max_position_embeddings=16,
        rope_parameters=dict(LONGROPE),
    ),
    "longrope, short": Phi3Config(
        **TINY, original_max_position_embeddings=MAX_POSITIONS, rope_parameters=LONGROPE | {"factor": 4.0}
    ),
}

PHI_3_MINI_4K: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}
PHI_4: dict[str, Any] = PHI_3_MINI_4K | {
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "max_position_embeddings": 16384,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 10,
    "original_max_position_embeddings": 16384,
    "rope_theta": 250000,
    "sliding_window": None,
    "vocab_size": 100352,
}
PHI_4_MINI: dict[str, Any] = PHI_3_MINI_4K | {
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("phi"), KINDS[request.param])


@pytest.fixture(scope="module")
def references(folder: Path) -> list[Reference]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [reference_of(model, prompt, 32) for prompt in prompts(17, 50, 33)]


# --------------------------------------------------------------------------------------------------- greedy tokens


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 16}, {"block_size": 4, "max_num_seqs": 2}],
    ids=["batched", "prompts in chunks", "small blocks"],
)
def test_greedy_tokens_equal_transformers(folder: Path, references: list[Reference], settings: dict[str, Any]) -> None:
    with LLM(str(folder), dtype="float32", **settings) as llm:
        check(references, token_ids_of(generate(llm, references)), next_tokens_of(llm))


def test_greedy_tokens_of_each_request_alone_equal_transformers(folder: Path, references: list[Reference]) -> None:
    with LLM(str(folder), dtype="float32") as llm:
        for reference in references:
            check([reference], token_ids_of(generate(llm, [reference])), next_tokens_of(llm))


def test_greedy_tokens_behind_a_cached_prefix_equal_transformers(folder: Path, references: list[Reference]) -> None:
    longest = [reference for reference in references if len(reference.prompt_token_ids) == 50]
    with LLM(str(folder), dtype="float32", block_size=8) as llm:
        generate(llm, longest)
        again = generate(llm, longest)
        assert again[0].num_cached_tokens == 48
        check(longest, token_ids_of(again), next_tokens_of(llm))


def test_bfloat16_chooses_the_same_token_wherever_float32_is_sure(folder: Path, references: list[Reference]) -> None:
    sure = [(one, step) for one in references for step, margin in enumerate(one.margins) if margin > 0.5]
    assert len(sure) >= 20
    with LLM(str(folder), dtype="bfloat16") as llm:
        found = next_tokens_of(llm)([one.prompt_token_ids + one.token_ids[:step] for one, step in sure])
    assert found == [one.token_ids[step] for one, step in sure]


# ---------------------------------------------------------------------------------------------- what is computed


TINY_PHI = KINDS["phi3"].to_dict() | {"architectures": ["Phi3ForCausalLM"]}
TINY_LONG = KINDS["longrope, long"].to_dict() | {"architectures": ["Phi3ForCausalLM"]}


@pytest.mark.parametrize(
    ("raw", "changes"),
    [
        (TINY_PHI, {"sliding_window": 64}),
        (TINY_LONG, {"rope_parameters": TINY_LONG["rope_parameters"] | {"long_factor": LONGROPE["short_factor"]}}),
        (TINY_LONG, {"rope_parameters": TINY_LONG["rope_parameters"] | {"attention_factor": 1.0}}),
    ],
    ids=["window", "factors", "attention_factor"],
)
def test_the_tiny_models_are_such_that_this_would_show(raw: dict[str, Any], changes: dict[str, Any]) -> None:
    tensors = built(raw).asked.random_tensors()
    (before,) = ModelUnderTest(Phi, raw, tensors).logits(prompts(50))
    (after,) = ModelUnderTest(Phi, raw | changes, tensors).logits(prompts(50))
    assert (after[-1] - before[-1]).abs().max() > 0.01


# ------------------------------------------------------------------------------------------------------ real sizes


@pytest.mark.parametrize("raw", [PHI_3_MINI_4K, PHI_4, PHI_4_MINI], ids=["Phi-3-mini-4k", "Phi-4", "Phi-4-mini"])
def test_tensors_of_a_real_size_are_those_of_transformers(raw: dict[str, Any]) -> None:
    config = Phi3Config(**raw | {"rope_scaling": raw["rope_scaling"] and dict(raw["rope_scaling"])})
    with torch.device("meta"):
        state: dict[str, Tensor] = AutoModelForCausalLM.from_config(config).state_dict()
    left_out = {"lm_head.weight"} if raw["tie_word_embeddings"] else set()
    wanted = {name: {tuple(tensor.shape)} for name, tensor in state.items() if name not in left_out}
    assert built(raw).asked.shapes == wanted


def test_phi_4_mini_rotates_three_quarters_of_a_head_by_longrope() -> None:
    rope = ModelConfig.from_dict(PHI_4_MINI, {}).rope
    assert (rope.rope_type, rope.partial_rotary_factor) == ("longrope", 0.75)
    assert rope.parameters["original_max_position_embeddings"] == 4096


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is computed"),
        ({"lm_head_bias": True}, "lm_head_bias is set; no projection has a bias"),
        ({"attention_bias": True, "mlp_bias": True}, "attention_bias is set.*mlp_bias is set"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "the rope type is 'linear'; known: 'default', 'longrope'",
        ),
        ({"original_max_position_embeddings": None}, "original_max_position_embeddings is missing"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'full_attention', 'sliding"),
    ],
)
def test_a_computation_that_is_not_phis_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        built(PHI_4_MINI | changes)


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., str]:
    """A tiny Phi-3 whose config.json was changed."""

    def change(kind: str, **changes: object) -> str:
        folder = write_tiny_model(tmp_path, KINDS[kind])
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return str(folder)

    return change


def test_the_older_name_of_longrope_is_read(changed: Callable[..., str]) -> None:
    (prompt,) = prompts(40)
    older = changed("longrope, long", rope_parameters=None, rope_theta=1e3, rope_scaling=LONGROPE | {"rope_type": "su"})
    with LLM(older, dtype="float32") as llm:
        found = next_tokens_of(llm)([prompt])
    with LLM(changed("longrope, long"), dtype="float32") as llm:
        assert next_tokens_of(llm)([prompt]) == found


def test_a_checkpoint_without_a_stacked_projection_is_refused_by_its_name(changed: Callable[..., str]) -> None:
    folder = changed("phi3")
    tensors = load_file(f"{folder}/model.safetensors")
    del tensors["model.layers.1.self_attn.qkv_proj.weight"]
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.self_attn\.qkv_proj\.weight"):
        LLM(folder, dtype="float32")


def built(raw: dict[str, Any]) -> ModelUnderTest:
    """Built without weights, so at any size."""
    return ModelUnderTest(Phi, raw)
