"""Gemma through LLM against transformers, from folders as transformers saves them; real sizes; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from greedy_reference import prompts, reference_of
from margin_rule import Reference, check, generate, greedy, next_tokens_of, token_ids_of
from safetensors.torch import load_file, save_file
from tiny_model import SIZES, VOCAB_SIZE, write_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, PreTrainedConfig

from octavo import LLM
from octavo.errors import CheckpointError
from octavo.model_config import ModelConfig
from octavo.testing.model_under_test import ModelUnderTest
from octavo_model_gemma.gemma import Gemma, layer_types, rope_of

# Windows are shorter than the contexts, and caps so low that scores and logits reach them.
TINY: dict[str, Any] = SIZES | {"head_dim": 16, "num_hidden_layers": 3, "sliding_window": 8, "pad_token_id": 0}
KINDS: dict[str, PreTrainedConfig] = {
    "gemma2": Gemma2Config(**TINY, query_pre_attn_scalar=20, attn_logit_softcapping=2.0, final_logit_softcapping=20.0),
    "gemma2 uncapped with biases": Gemma2Config(
        **TINY | {"tie_word_embeddings": False, "num_key_value_heads": 1},
        query_pre_attn_scalar=16,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        attention_bias=True,
    ),
    "gemma3": Gemma3TextConfig(
        **TINY,
        query_pre_attn_scalar=20,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "gemma3 in one rotation": Gemma3TextConfig(
        **TINY | {"tie_word_embeddings": False, "num_key_value_heads": 4},
        query_pre_attn_scalar=16,
        final_logit_softcapping=20.0,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}

GEMMA_2_2B: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "vocab_size": 256000,
}
GEMMA_3_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
PUBLISHED = pytest.mark.parametrize("raw", [GEMMA_2_2B, GEMMA_3_1B], ids=["Gemma-2-2b", "Gemma-3-1b"])


def write_tiny_gemma(folder: Path, config: PreTrainedConfig) -> Path:
    """The folder of a random model as transformers saves it, and a tokenizer."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # transformers starts them at 0, where faults do not show
            parameter.data += 0.2 * torch.randn_like(parameter)
        if "post_" in name:  # a block's last norm; what it adds is then more than the token, which a tied head repeats
            parameter.data += 3.0
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gemma(tmp_path_factory.mktemp("gemma"), KINDS[request.param])


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


# ---------------------------------------------------------------------------------------------- what is computed


TINY_2 = KINDS["gemma2"].to_dict() | {"architectures": ["Gemma2ForCausalLM"]}
TINY_3 = KINDS["gemma3"].to_dict() | {"architectures": ["Gemma3ForCausalLM"]}
ONE_ROPE = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("raw", "changes"),
    [
        (TINY_2, {"sliding_window": 64}),
        (TINY_2, {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
        (TINY_2, {"attn_logit_softcapping": None}),
        (TINY_2, {"final_logit_softcapping": None}),
        (TINY_2, {"query_pre_attn_scalar": 16}),
        (TINY_3, {"sliding_window": 64}),
        (TINY_3, {"rope_parameters": TINY_3["rope_parameters"] | {"full_attention": ONE_ROPE}}),
        (TINY_3, {"rope_parameters": TINY_3["rope_parameters"] | {"sliding_attention": ONE_ROPE}}),
    ],
    ids=lambda value: " ".join(value) if len(value) == 1 else value["architectures"][0],
)
def test_the_tiny_models_are_such_that_this_would_show(raw: dict[str, Any], changes: dict[str, Any]) -> None:
    tensors = built(raw).asked.random_tensors()
    (before,) = ModelUnderTest(Gemma, raw, tensors).logits(prompts(50))
    (after,) = ModelUnderTest(Gemma, raw | changes, tensors).logits(prompts(50))
    assert (after[-1] - before[-1]).abs().max() > 0.01


def test_embeddings_are_scaled_by_a_factor_rounded_to_the_dtype() -> None:
    raw = TINY_2 | {"hidden_size": 56}
    tensors = built(raw).asked.random_tensors()
    model = ModelUnderTest(Gemma, raw, tensors, torch.bfloat16).model
    stored = tensors["model.embed_tokens.weight"].to(torch.bfloat16)
    assert torch.equal(model.embed(torch.arange(VOCAB_SIZE)), stored * torch.tensor(56**0.5, dtype=torch.bfloat16))
    assert not torch.equal(model.embed(torch.arange(VOCAB_SIZE)), stored * 56**0.5)


# ------------------------------------------------------------------------------------------------------ real sizes


@PUBLISHED
def test_tensors_of_a_real_size_are_those_of_transformers(raw: dict[str, Any]) -> None:
    with torch.device("meta"):
        state: dict[str, Tensor] = AutoModelForCausalLM.from_config(transformers_config(raw)).state_dict()
    wanted = {name: {tuple(tensor.shape)} for name, tensor in state.items() if name != "lm_head.weight"}
    assert built(raw).asked.shapes == wanted


@PUBLISHED
def test_layer_types_of_a_published_model_are_those_of_transformers(raw: dict[str, Any]) -> None:
    assert layer_types(ModelConfig.from_dict(raw, {})) == transformers_config(raw).layer_types


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 8.0}])
def test_rotations_of_a_published_gemma_3_are_those_of_transformers(scaling: dict[str, Any] | None) -> None:
    raw = GEMMA_3_1B | {"rope_scaling": scaling}
    for layer_type, wanted in transformers_config(raw).rope_parameters.items():
        rope = rope_of(ModelConfig.from_dict(raw, {}), layer_type)
        assert (rope.theta, rope.rope_type) == (wanted["rope_theta"], wanted["rope_type"])
        assert rope.parameters.get("factor") == wanted.get("factor")


def test_the_head_is_tied_where_the_configuration_does_not_say() -> None:
    assert "tie_word_embeddings" not in GEMMA_2_2B
    assert "lm_head.weight" not in built(GEMMA_2_2B).asked.shapes
    assert "lm_head.weight" in built(GEMMA_2_2B | {"tie_word_embeddings": False}).asked.shapes


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("raw", "changes", "message"),
    [
        (GEMMA_2_2B, {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; only 'gelu_pytorch_tanh'"),
        (GEMMA_3_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention is set"),
        (GEMMA_3_1B, {"attn_logit_softcapping": 50.0}, "Gemma 3's scores have no soft-cap"),
        (GEMMA_3_1B, {"sliding_window": None}, "sliding_window does not say of what length"),
        (GEMMA_3_1B, {"layer_types": ["chunked_attention"] * 26}, "layer_types has 'chunked_attention'; known"),
        (GEMMA_3_1B, {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 26 layers"),
    ],
)
def test_a_computation_that_is_not_gemmas_is_refused(
    raw: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        built(raw | changes)


@pytest.mark.parametrize("key", ["head_dim", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping"])
def test_a_fact_without_a_neutral_default_must_be_stated(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        built({name: value for name, value in GEMMA_2_2B.items() if name != key})


def test_layers_that_are_all_full_need_no_window() -> None:
    raw = GEMMA_3_1B | {"sliding_window": None, "layer_types": ["full_attention"] * 26}
    assert len(built(raw).model.layers) == 26


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., str]:
    """A tiny Gemma 3 whose config.json was changed."""

    def change(**changes: object) -> str:
        folder = write_tiny_gemma(tmp_path, KINDS["gemma3"])
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return str(folder)

    return change


def test_a_rotation_that_is_not_known_is_refused_rather_than_left_out(changed: Callable[..., str]) -> None:
    ropes = {"full_attention": {"rope_type": "spiral", "rope_theta": 1e6}}
    with pytest.raises(CheckpointError, match="'spiral'"):
        LLM(changed(rope_parameters=ropes), dtype="float32")


def test_a_model_for_images_and_text_is_refused(changed: Callable[..., str]) -> None:
    folder = Path(changed())
    text = json.loads((folder / "config.json").read_text())
    nested = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(nested))
    with pytest.raises(CheckpointError, match=r"config\.json lacks vocab_size"):
        LLM(str(folder), dtype="float32")


def test_a_checkpoint_without_a_norm_is_refused_by_its_name(changed: Callable[..., str]) -> None:
    folder = changed()
    tensors = load_file(f"{folder}/model.safetensors")
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.self_attn\.q_norm\.weight"):
        LLM(folder, dtype="float32")


def test_a_window_longer_than_the_context_changes_nothing(changed: Callable[..., str]) -> None:
    with LLM(changed(sliding_window=4096), dtype="float32") as llm:
        assert len(llm.generate([[5, 6, 7]], greedy(3))[0].outputs[0].token_ids) == 3


def transformers_config(raw: dict[str, Any]) -> PreTrainedConfig:
    classes: dict[str, type[PreTrainedConfig]] = {
        "Gemma2ForCausalLM": Gemma2Config,
        "Gemma3ForCausalLM": Gemma3TextConfig,
    }
    return classes[raw["architectures"][0]](**raw)


def built(raw: dict[str, Any]) -> ModelUnderTest:
    """Built without weights, so at any size."""
    return ModelUnderTest(Gemma, raw)
