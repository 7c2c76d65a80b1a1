"""Adapters of every kind that is served: what is read of them computes what peft's own model does."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from adapters import (
    LIMITS,
    SAVING,
    TOKENS,
    ModelBase,
    assert_as_peft,
    edit_config,
    octavo_logits,
    save_adapter,
    tiny_llama,
)
from torch import nn

from octavo.interfaces import LoraLimits
from octavo_lora.reader import read_adapter

ATTENTION = ["q_proj", "v_proj"]

VARIANTS: dict[str, dict[str, object]] = {
    "names": {"target_modules": ATTENTION},
    "full names": {"target_modules": ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"]},
    "a regular expression": {"target_modules": r"model\.layers\.\d+\.(mlp\.up_proj|self_attn\.o_proj)"},
    "all linears": {"target_modules": "all-linear"},
    "peft's own targets": {"target_modules": None},
    "excluded names": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "an excluding expression": {"target_modules": ATTENTION, "exclude_modules": r".*layers\.0\..*"},
    "one layer": {"target_modules": ATTENTION, "layers_to_transform": 1},
    "layers of a pattern": {"target_modules": ATTENTION, "layers_to_transform": [0], "layers_pattern": "layers"},
    "rank 1": {"target_modules": ATTENTION, "r": 1},
    "rsLoRA": {"target_modules": ATTENTION, "use_rslora": True},
    "DoRA": {"target_modules": "all-linear", "use_dora": True},
    "DoRA with rsLoRA": {"target_modules": ATTENTION, "use_dora": True, "use_rslora": True},
    "patterns of ranks": {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 2, r".*\.1\.self_attn\.v_proj": 9}},
    "patterns of alphas": {"target_modules": ATTENTION, "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 31}},
    "no start at zero": {"target_modules": ATTENTION, "init_lora_weights": False},
    "a gaussian start": {"target_modules": ATTENTION, "init_lora_weights": "gaussian"},
    "an orthogonal start": {"target_modules": ATTENTION, "init_lora_weights": "orthogonal"},
    "a start of minor components": {"target_modules": ATTENTION, "init_lora_weights": "mica"},
    "VeLoRA": {"target_modules": ATTENTION, "velora_config": {"num_groups": 4}},
    "the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "the embedding with DoRA": {"target_modules": ["embed_tokens"], "use_dora": True},
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "the head with DoRA": {"target_modules": ["lm_head"], "use_dora": True},
    "a bias of B": {"target_modules": ATTENTION, "lora_bias": True},
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_variant_computes_what_pefts_model_does(tmp_path: Path, config: dict[str, object]) -> None:
    save_adapter(tmp_path, **config)
    assert_as_peft(tmp_path)


BIASES: dict[str, dict[str, object]] = {
    "all": {"bias": "all"},
    "of targets": {"bias": "lora_only"},
    "untrained": {"bias": "none"},
    "with DoRA": {"bias": "lora_only", "use_dora": True},
    "with a bias of B": {"bias": "lora_only", "lora_bias": True},
}


@pytest.mark.parametrize("config", BIASES.values(), ids=BIASES)
def test_biases_over_a_base_with_biases_compute_what_pefts_model_does(
    tmp_path: Path, config: dict[str, object]
) -> None:
    make = partial(tiny_llama, bias=True)
    save_adapter(tmp_path, model=make(), target_modules=ATTENTION, **config)
    assert_as_peft(tmp_path, make)


def test_a_module_with_but_a_trained_bias_has_rank_0(tmp_path: Path) -> None:
    make = partial(tiny_llama, bias=True)
    save_adapter(tmp_path, model=make(), target_modules=["q_proj"], bias="all")
    low_ranks = read_adapter(str(tmp_path), ModelBase(make()), LIMITS).low_ranks
    assert low_ranks["model.layers.0.mlp.up_proj"].a.shape == (0, 16)
    assert low_ranks["model.layers.0.self_attn.q_proj"].a.shape == (4, 16)


def test_an_untrained_bias_gives_no_shift(tmp_path: Path) -> None:
    make = partial(tiny_llama, bias=True)

    def as_the_base(model: nn.Module) -> None:
        for name, parameter in tiny_llama(bias=True).named_parameters():
            if name.endswith("bias"):
                holder, _, _ = name.rpartition(".")
                module = model.base_model.model.get_submodule(holder)
                getattr(module, "base_layer", module).bias.copy_(parameter)

    save_adapter(tmp_path, model=make(), target_modules=["q_proj"], bias="all", trained=as_the_base)
    adapter = read_adapter(str(tmp_path), ModelBase(make()), LIMITS)
    assert {name.rpartition(".")[2] for name in adapter.low_ranks} == {"q_proj"}
    assert all(low_rank.shift is None for low_rank in adapter.low_ranks.values())


TIED: dict[str, dict[str, object]] = {
    "the embedding alone": {"target_modules": ["embed_tokens"]},
    "the head alone": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "the embedding, tied": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("config", TIED.values(), ids=TIED)
def test_adapters_of_tied_embeddings_are_as_in_pefts_unmerged_model(tmp_path: Path, config: dict[str, object]) -> None:
    make = partial(tiny_llama, tied=True)
    save_adapter(tmp_path, model=make(), **config)
    assert_as_peft(tmp_path, make)


SAVED: dict[str, dict[str, object]] = {
    "the embedding": {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
    "the head": {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
    "both": {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", SAVED.values(), ids=SAVED)
def test_modules_to_save_compute_what_pefts_model_does(tmp_path: Path, config: dict[str, object], tied: bool) -> None:
    make = partial(tiny_llama, tied=tied)
    save_adapter(tmp_path, model=make(), **config)
    adapter = assert_as_peft(tmp_path, make, SAVING)
    assert len(adapter.saved) == len(config["modules_to_save"])


def test_embeddings_saved_and_tied_compute_what_pefts_model_does(tmp_path: Path) -> None:
    make = partial(tiny_llama, tied=True)
    config = {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    save_adapter(tmp_path, model=make(), **config)
    assert set(assert_as_peft(tmp_path, make, SAVING).saved) == {"lm_head", "model.embed_tokens"}


def test_the_merged_model_computes_the_same(tmp_path: Path) -> None:
    trained = save_adapter(tmp_path, target_modules="all-linear", use_dora=True, rank_pattern={"q_proj": 2})
    ours = octavo_logits(read_adapter(str(tmp_path), ModelBase(tiny_llama()), LIMITS), tiny_llama())
    with torch.no_grad():
        merged = trained.merge_and_unload()(TOKENS).logits
    torch.testing.assert_close(ours.float(), merged, rtol=1e-4, atol=1e-4)


def test_the_bases_weights_are_read_once_for_all_modules(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=ATTENTION, use_dora=True)
    base = ModelBase(tiny_llama())
    read_adapter(str(tmp_path), base, LIMITS)
    assert [len(names) for names in base.asked] == [4]


def test_the_bases_weights_are_not_read_for_plain_matrices(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules="all-linear")
    base = ModelBase(tiny_llama())
    read_adapter(str(tmp_path), base, LIMITS)
    assert base.asked == []


def test_all_linears_are_all_but_the_head(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules="all-linear")
    base = ModelBase(tiny_llama())
    info = read_adapter(str(tmp_path), base, LIMITS).info
    assert set(info.modules) == base.modules.keys() - {"lm_head", "model.embed_tokens"}
    assert info.warnings == ()


def test_the_bases_weights_are_not_read_for_modules_to_save(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    base = ModelBase(tiny_llama())
    read_adapter(str(tmp_path), base, SAVING)
    assert base.asked == []


def test_the_scaling_is_multiplied_in_float32_and_rounded_once(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"], r=3, lora_alpha=7)
    limits = LoraLimits(max_loras=1, max_lora_rank=3, max_num_rows=1, dtype=torch.bfloat16, device="cpu")
    exact = read_adapter(str(tmp_path), ModelBase(tiny_llama()), LIMITS).low_ranks
    rounded = read_adapter(str(tmp_path), ModelBase(tiny_llama()), limits).low_ranks
    for name, low_rank in rounded.items():
        assert torch.equal(low_rank.b, exact[name].b.bfloat16())
        assert torch.equal(low_rank.a, exact[name].a.bfloat16())


def test_weights_saved_in_another_dtype_are_read(tmp_path: Path) -> None:
    def halve(model: nn.Module) -> None:
        model.half()

    save_adapter(tmp_path, target_modules=ATTENTION, trained=halve)
    low_rank = read_adapter(str(tmp_path), ModelBase(tiny_llama()), LIMITS).low_ranks["model.layers.0.self_attn.q_proj"]
    assert low_rank.a.dtype == torch.float32


def test_the_bases_own_embedding_along_with_matrices_for_it_is_passed_over(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["embed_tokens"], trained=lambda model: model.bfloat16())
    adapter = read_adapter(str(tmp_path), ModelBase(tiny_llama()), LIMITS)
    assert not adapter.saved
    assert list(adapter.low_ranks) == ["model.embed_tokens"]


def test_lora_dropout_and_other_settings_of_training_change_nothing(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=ATTENTION)
    before = read_adapter(str(tmp_path), ModelBase(tiny_llama()), LIMITS)
    edit_config(tmp_path, lora_dropout=0.5, inference_mode=False, task_type="SEQ_CLS", fan_in_fan_out=True)
    assert read_adapter(str(tmp_path), ModelBase(tiny_llama()), LIMITS).info == before.info


def test_info_tells_rank_modules_and_bytes(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"], rank_pattern={r".*\.1\..*q_proj": 6})
    info = read_adapter(str(tmp_path), ModelBase(tiny_llama()), LIMITS).info
    assert info.rank == 6
    assert info.modules == ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    assert info.num_bytes == 4 * (16 + 16) * (4 + 6)
