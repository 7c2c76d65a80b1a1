"""Qwen through LLM against transformers, from folders as transformers saves them; real sizes; what is refused."""

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
from tiny_model import SIZES, write_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen2Config, Qwen3Config

from octavo import LLM
from octavo.errors import CheckpointError
from octavo.testing.model_under_test import ModelUnderTest
from octavo_model_qwen.qwen import Qwen

WINDOW = 12  # of tokens, less than the prompts have
KINDS: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen2 tied": Qwen2Config(**SIZES | {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": Qwen3Config(**SIZES, head_dim=20),
    "qwen2 with windows in its later layers": Qwen2Config(
        **SIZES | {"num_hidden_layers": 3}, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen2 with yarn": Qwen2Config(
        **SIZES,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "qwen3 with windows where it says so": Qwen3Config(
        **SIZES,
        head_dim=12,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "qwen3 tied with biases": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True, attention_bias=True),
}

QWEN2_5_0_5B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("qwen"), KINDS[request.param])


@pytest.fixture(scope="module")
def references(folder: Path) -> list[Reference]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [reference_of(model, prompt, 32) for prompt in prompts(1, 50, 17)]


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


# ------------------------------------------------------------------------------------------------------ real sizes


@pytest.mark.parametrize("raw", [QWEN2_5_0_5B, QWEN3_0_6B], ids=["Qwen2.5-0.5B", "Qwen3-0.6B"])
def test_tensors_of_a_real_size_are_those_of_transformers(raw: dict[str, Any]) -> None:
    config_class = {"Qwen2ForCausalLM": Qwen2Config, "Qwen3ForCausalLM": Qwen3Config}[raw["architectures"][0]]
    with torch.device("meta"):
        state: dict[str, Tensor] = AutoModelForCausalLM.from_config(config_class(**raw)).state_dict()
    wanted = {name: {tuple(tensor.shape)} for name, tensor in state.items() if name != "lm_head.weight"}
    assert built(raw).asked.shapes == wanted


def test_a_window_that_is_switched_off_is_none() -> None:
    assert built(QWEN2_5_0_5B).config.sliding_window is None


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'; only 'silu' is computed"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types has 'sliding_attention', and no sliding_window is in use",
        ),
        ({"layer_types": ["full_attention", "linear_attention"]}, r"layer_types has 'linear_attention'"),
    ],
)
def test_a_computation_that_is_not_qwens_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        built(QWEN3_0_6B | changes)


def test_layers_said_to_be_full_attention_are_taken() -> None:
    assert len(built(QWEN3_0_6B | {"layer_types": ["full_attention"] * 28}).model.layers) == 28


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., str]:
    """A tiny Qwen2 whose config.json was changed."""

    def change(**changes: object) -> str:
        folder = write_tiny_model(tmp_path, KINDS["qwen2"])
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return str(folder)

    return change


@pytest.mark.parametrize("max_window_layers", [1, 0])
def test_layers_from_max_window_layers_on_have_a_window(changed: Callable[..., str], max_window_layers: int) -> None:
    folder = changed(use_sliding_window=True, sliding_window=5, max_window_layers=max_window_layers, layer_types=None)
    listed = ["full_attention"] * max_window_layers + ["sliding_attention"] * (2 - max_window_layers)
    by_number, by_list = (
        ModelUnderTest(
            Qwen,
            json.loads(Path(folder, "config.json").read_text()) | changes,
            load_file(f"{folder}/model.safetensors"),
        )
        for changes in ({}, {"layer_types": listed, "max_window_layers": 28})
    )
    (token_ids,) = prompts(20)
    assert torch.equal(by_number.logits([token_ids])[0], by_list.logits([token_ids])[0])


def test_a_window_of_no_layer_is_not_asked_of_the_attention_backend() -> None:
    raw = QWEN2_5_0_5B | {"use_sliding_window": True, "sliding_window": 64}
    assert built(raw | {"max_window_layers": 24}).config.attention_features(128) == frozenset()
    assert built(raw | {"max_window_layers": 23}).config.attention_features(128) == {"sliding_window"}


def test_a_checkpoint_without_a_bias_is_refused_by_its_name(changed: Callable[..., str]) -> None:
    folder = changed()
    tensors = load_file(f"{folder}/model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.self_attn\.k_proj\.bias"):
        LLM(folder, dtype="float32")


def built(raw: dict[str, Any]) -> ModelUnderTest:
    """Built without weights, so at any size."""
    return ModelUnderTest(Qwen, raw)
