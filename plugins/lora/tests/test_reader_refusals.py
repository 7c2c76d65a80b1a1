"""Adapters that cannot be served: each is refused with the reason; what is passed over is told."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from adapters import LIMITS, SAVING, ModelBase, edit_config, edit_tensors, save_adapter, tiny_llama
from peft import LoraConfig
from torch import Tensor, nn

from octavo.errors import AdapterError
from octavo.interfaces import LoraLimits
from octavo_lora.peft_config import NOT_OUTPUTS, REFUSED, SERVED
from octavo_lora.reader import read_adapter

Q0, Q1 = (f"model.layers.{layer}.self_attn.q_proj" for layer in range(2))
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_adapter(tmp_path, target_modules=["q_proj"])
    return tmp_path


def key(module: str, name: str) -> str:
    return f"base_model.model.{module}.{name}"


def refusal(folder: Path, model: nn.Module | None = None, limits: LoraLimits = LIMITS) -> str:
    with pytest.raises(AdapterError) as refused:
        read_adapter(str(folder), ModelBase(tiny_llama() if model is None else model), limits)
    return str(refused.value)


def warned(folder: Path) -> tuple[str, ...]:
    return read_adapter(str(folder), ModelBase(tiny_llama()), LIMITS).info.warnings


def test_every_field_of_pefts_configuration_is_decided_on() -> None:
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= SERVED.keys() | NOT_OUTPUTS | REFUSED.keys()


def test_no_field_is_decided_on_twice() -> None:
    names = [*SERVED, *NOT_OUTPUTS, *REFUSED]
    assert len(names) == len(set(names))


SET: dict[str, object] = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 0.1},
    "layer_replication": [[0, 2], [1, 2]],
    "megatron_config": {"x": 1},
    "monteclora_config": {"num_samples": 4},
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "trainable_token_indices": [3],
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_changes_outputs_otherwise_is_refused_by_name(adapter: Path, name: str) -> None:
    edit_config(adapter, **{name: SET[name]})
    assert f"{name} is set: {REFUSED[name]}" in refusal(adapter)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "PiSSA"])
def test_a_start_that_changed_the_base_is_refused(adapter: Path, init: str) -> None:
    edit_config(adapter, init_lora_weights=init)
    message = refusal(adapter)
    assert f"init_lora_weights={init!r}" in message
    assert "path_initial_model_for_weight_conversion" in message


def test_a_start_that_nobody_knows_is_refused(adapter: Path) -> None:
    edit_config(adapter, init_lora_weights="of a newer version")
    assert "'of a newer version' is not known here" in refusal(adapter)


def test_an_adapter_started_by_eva_is_served(adapter: Path) -> None:
    edit_config(adapter, init_lora_weights="eva", eva_config={"rho": 2.0})
    assert warned(adapter) == ()


WRONG: dict[str, object] = {
    "r": 0,
    "lora_alpha": float("nan"),
    "use_rslora": "yes",
    "use_dora": 1,
    "bias": "some",
    "lora_bias": None,
    "target_modules": 3,
    "exclude_modules": {"a": 1},
    "layers_to_transform": ["1"],
    "layers_pattern": [1],
    "rank_pattern": {"q_proj": -2},
    "alpha_pattern": ["q_proj"],
    "modules_to_save": "lm_head",
    "ensure_weight_tying": "no",
}


@pytest.mark.parametrize("name", SERVED)
def test_a_value_of_a_wrong_kind_is_refused_by_name(adapter: Path, name: str) -> None:
    edit_config(adapter, **{name: WRONG[name]})
    assert f"{name}={WRONG[name]}" in refusal(adapter)


def test_faults_of_a_configuration_are_told_together(adapter: Path) -> None:
    edit_config(adapter, r=0, use_qalora=True, init_lora_weights="pissa")
    message = refusal(adapter)
    assert all(name in message for name in ("r=0", "use_qalora", "pissa"))


def test_what_peft_itself_refuses_is_refused_in_its_words(adapter: Path) -> None:
    edit_config(adapter, target_modules=".*q_proj", layers_to_transform=[0])
    assert "`layers_to_transform` cannot be used when `target_modules` is a str" in refusal(adapter)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_pattern_that_is_no_expression_is_refused(adapter: Path, field: str) -> None:
    edit_config(adapter, **{field: "(q_proj"})
    assert "no regular expression" in refusal(adapter)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_key_of_a_pattern_that_is_no_expression_is_refused(adapter: Path, field: str) -> None:
    edit_config(adapter, **{field: {"(q_proj": 4}})
    assert f"{field} is no regular expression" in refusal(adapter)


def test_no_targets_and_an_architecture_unknown_to_peft_are_refused(adapter: Path) -> None:
    edit_config(adapter, target_modules=None)
    base = ModelBase(tiny_llama())
    base.config["model_type"] = "of_its_own"
    with pytest.raises(AdapterError, match="no default ones for model_type 'of_its_own'"):
        read_adapter(str(adapter), base, LIMITS)


@pytest.mark.parametrize(
    ("targets", "said"), [(["query"], "targets query,"), ("transformer.*", "'transformer.*'"), ([], "targets nothing,")]
)
def test_an_adapter_of_no_module_of_the_base_is_refused(adapter: Path, targets: object, said: str) -> None:
    edit_config(adapter, target_modules=targets)
    message = refusal(adapter)
    assert "changes no module of this base" in message
    assert said in message
    assert "down_proj, embed_tokens, gate_proj" in message


def test_an_adapter_without_weights_for_its_targets_is_refused(adapter: Path) -> None:
    edit_config(adapter, target_modules=["v_proj"])
    message = refusal(adapter)
    assert "targets v_proj" in message
    assert "its file has no weights for" in message


def test_weights_for_modules_that_the_base_lacks_are_refused_all_together(tmp_path: Path) -> None:
    save_adapter(tmp_path, model=tiny_llama(layers=3), target_modules=["q_proj", "v_proj"])
    message = refusal(tmp_path)
    for module in ("q_proj", "v_proj"):
        assert f"{key(f'model.layers.2.self_attn.{module}', A)} is [4, 16]" in message


def test_weights_of_wrong_sizes_are_refused_all_together_with_both(adapter: Path) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        tensors[key(Q0, A)] = torch.zeros(4, 32)
        tensors[key(Q1, B)] = torch.zeros(8, 4)

    edit_tensors(adapter, widen)
    message = refusal(adapter)
    assert f"{key(Q0, A)} is [4, 32], and base and configuration want [4, 16]" in message
    assert f"{key(Q1, B)} is [8, 4], and base and configuration want [16, 4]" in message


def test_a_rank_other_than_the_configurations_is_refused(adapter: Path) -> None:
    edit_config(adapter, rank_pattern={"q_proj": 2})
    assert f"{key(Q0, A)} is [4, 16], and base and configuration want [2, 16]" in refusal(adapter)


def test_a_rank_above_the_limit_is_refused_with_both_numbers_and_the_flag(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"], r=17)
    message = refusal(tmp_path)
    assert "rank 17, and max_lora_rank is 16: start with --max-lora-rank 17" in message


def test_the_largest_rank_is_served(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"], r=16)
    assert warned(tmp_path) == ()


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"]])
def test_another_vocabulary_is_refused_with_both_numbers(tmp_path: Path, targets: list[str]) -> None:
    save_adapter(tmp_path, model=tiny_llama(vocabulary=48), target_modules=targets)
    assert "the adapter's vocabulary has 48 tokens, the base's 40" in refusal(tmp_path, limits=SAVING)


def test_another_vocabulary_of_a_saved_module_is_refused_with_both_numbers(tmp_path: Path) -> None:
    save_adapter(tmp_path, model=tiny_llama(vocabulary=48), target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert "the adapter's vocabulary has 48 tokens, the base's 40" in refusal(tmp_path, limits=SAVING)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_a_saved_module_is_refused_unless_the_setting_allows_it(tmp_path: Path, name: str) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"], modules_to_save=[name])
    assert "lora_modules_to_save" in refusal(tmp_path)


def test_a_saved_linear_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"], modules_to_save=["down_proj"])
    message = refusal(tmp_path, limits=SAVING)
    assert f"{key('model.layers.0.mlp.down_proj', 'weight')} is a linear's whole weight" in message


def test_a_saved_norm_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"], modules_to_save=["norm"])
    assert "no module 'model.norm' that adapters can change" in refusal(tmp_path, limits=SAVING)


def test_a_saved_module_without_weights_is_refused(adapter: Path) -> None:
    edit_config(adapter, modules_to_save=["lm_head"])
    assert "modules_to_save names lm_head, and the file has no weight of it" in refusal(adapter, limits=SAVING)


def save_changed_embedding(folder: Path) -> None:
    def change(model: nn.Module) -> None:
        model.base_model.model.model.embed_tokens.base_layer.weight.mul_(2)

    save_adapter(folder, target_modules=["embed_tokens"], trained=change)


def test_a_changed_embedding_that_no_setting_names_is_refused(tmp_path: Path) -> None:
    save_changed_embedding(tmp_path)
    assert "lora_modules_to_save" in refusal(tmp_path)


def test_a_changed_embedding_with_matrices_is_refused(tmp_path: Path) -> None:
    save_changed_embedding(tmp_path)
    assert "a whole model.embed_tokens of its own and low-rank matrices" in refusal(tmp_path, limits=SAVING)


def test_a_module_saved_as_the_base_has_it_alone_is_refused_as_nothing(adapter: Path) -> None:
    weight = tiny_llama().lm_head.weight.detach()
    edit_tensors(adapter, lambda tensors: {key("lm_head", "weight"): weight})
    assert "changes nothing" in refusal(adapter)


def drop(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def test_half_a_product_is_refused(adapter: Path) -> None:
    edit_tensors(adapter, drop(key(Q0, B), key(Q1, A)))
    message = refusal(adapter)
    assert f"{Q0} has no lora_B, and the configuration wants one" in message
    assert f"{Q1} has no lora_A, and the configuration wants one" in message


def test_dora_without_a_magnitude_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"], use_dora=True)
    edit_tensors(tmp_path, drop(key(Q0, MAGNITUDE)))
    assert f"{Q0} has no lora_magnitude_vector, and the configuration wants one" in refusal(tmp_path)


def test_a_magnitude_without_dora_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"], use_dora=True)
    edit_config(tmp_path, use_dora=False)
    assert f"{Q0} has a lora_magnitude_vector, and the configuration wants none" in refusal(tmp_path)


def test_a_bias_of_b_that_the_configuration_does_not_want_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"], lora_bias=True)
    edit_config(tmp_path, lora_bias=False)
    assert f"{Q0} has a bias of lora_B, and the configuration wants none" in refusal(tmp_path)


def test_a_bias_that_the_base_has_not_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, model=tiny_llama(bias=True), target_modules=["q_proj"], bias="lora_only")
    assert f"{Q0} of the base has no bias" in refusal(tmp_path)


def test_matrices_of_an_embedding_for_a_linear_are_refused(adapter: Path) -> None:
    edit_tensors(
        adapter,
        lambda tensors: {name.replace(A, "lora_embedding_A"): tensor for name, tensor in tensors.items()},
    )
    assert f"{Q0} of the base is a linear" in refusal(adapter)


def test_matrices_of_a_linear_for_an_embedding_are_refused(adapter: Path) -> None:
    edit_tensors(adapter, lambda tensors: tensors | {key("model.embed_tokens", A): torch.zeros(4, 40)})
    assert "model.embed_tokens of the base is an embedding" in refusal(adapter)


@pytest.mark.parametrize("name", ["q_proj.lora_A.weight", key(Q0, "lora_C"), key(Q0, "lora_A.default.weight")])
def test_tensors_of_other_names_are_refused(adapter: Path, name: str) -> None:
    edit_tensors(adapter, lambda tensors: tensors | {name: torch.zeros(2, 3)})
    assert f"{name} is [2, 3], and" in refusal(adapter)


def test_a_tensor_saved_twice_is_refused(adapter: Path) -> None:
    edit_tensors(
        adapter,
        lambda tensors: tensors | {key("lm_head", n): torch.zeros(40, 16) for n in ("weight", "base_layer.weight")},
    )
    assert "is the same of lm_head again" in refusal(adapter, limits=SAVING)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [A, B])
def test_weights_that_are_not_finite_are_refused(adapter: Path, name: str, value: float) -> None:
    edit_tensors(adapter, lambda tensors: tensors[key(Q1, name)][0, 0].fill_(value))
    assert f"weights for {Q1} that are NaN or infinite" in refusal(adapter)


def test_a_saved_module_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    edit_tensors(tmp_path, lambda tensors: tensors[key("lm_head", "weight")][3, 3].fill_(float("nan")))
    assert "weights for lm_head that are NaN" in refusal(tmp_path, limits=SAVING)


def test_weights_too_large_for_the_dtype_are_refused(adapter: Path) -> None:
    edit_tensors(adapter, lambda tensors: tensors[key(Q1, B)][0, 0].fill_(1e6))
    limits = dataclasses.replace(LIMITS, dtype=torch.float16)
    assert "not finite in torch.float16" in refusal(adapter, limits=limits)


def test_targets_without_weights_are_named_in_a_warning(adapter: Path) -> None:
    edit_config(adapter, target_modules=["q_proj", "v_proj"])
    assert warned(adapter) == (
        "It targets modules that its file has no weights for: model.layers.0.self_attn.v_proj, "
        "model.layers.1.self_attn.v_proj.",
    )


def test_targets_that_match_nothing_are_named_in_a_warning(adapter: Path) -> None:
    edit_config(adapter, target_modules=["q_proj", "query"])
    assert warned(adapter) == ("It targets names that no module of the base has: query.",)


def test_weights_that_are_not_targeted_are_passed_over_as_in_peft_with_a_warning(adapter: Path) -> None:
    edit_config(adapter, target_modules=[Q0])
    result = read_adapter(str(adapter), ModelBase(tiny_llama()), LIMITS)
    assert result.info.modules == (Q0,)
    assert result.info.warnings == (
        f"Its file has weights for modules that it does not target, passed over as in peft: {Q1}.",
    )


def test_keys_that_peft_does_not_know_are_named_in_a_warning(adapter: Path) -> None:
    edit_config(adapter, of_a_newer_version=True)
    assert warned(adapter) == (
        "peft does not know these keys of the configuration, and they are passed over: of_a_newer_version.",
    )


@pytest.mark.parametrize(
    ("trained_on", "called"),
    [
        ("meta/Tiny-Llama", ("/models/tiny-llama",)),
        ("/elsewhere/tiny-llama/", ("some-org/tiny-llama",)),
        ("tiny-llama", ("other", "TINY-LLAMA")),
        (None, ("other",)),
    ],
)
def test_a_base_of_the_same_name_is_no_warning(adapter: Path, trained_on: str | None, called: tuple[str, ...]) -> None:
    edit_config(adapter, base_model_name_or_path=trained_on)
    assert read_adapter(str(adapter), ModelBase(tiny_llama(), called), LIMITS).info.warnings == ()


def test_a_base_of_another_name_is_a_warning_which_is_logged(adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_config(adapter, base_model_name_or_path="some-org/other-7b")
    with caplog.at_level(logging.WARNING):
        told = warned(adapter)
    assert told == ("It was trained on 'some-org/other-7b'; this base is called 'tiny-llama'.",)
    assert told[0] in caplog.text


def test_host_tensors_are_pinned_for_cuda_alone(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    read = partial(read_adapter, str(adapter), ModelBase(tiny_llama()))
    read(LIMITS)
    assert not pinned
    read(dataclasses.replace(LIMITS, device="cuda"))
    assert len(pinned) == 4
