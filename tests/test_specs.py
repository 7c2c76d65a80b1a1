"""Specs: what a plugin offers as data, and why a component cannot serve a need."""

from __future__ import annotations

import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from octavo.errors import PluginError
from octavo.plugins.specs import (
    SPEC_KINDS,
    AttentionNeed,
    AttentionSpec,
    CheckpointNeed,
    CheckpointSpec,
    ModelNeed,
    ModelSpec,
    Need,
    QuantizationNeed,
    QuantizationSpec,
    SchedulerSpec,
    load_target,
)

ATTENTION_NEED = AttentionNeed(
    device="cpu",
    dtype="bfloat16",
    features=frozenset({"decode"}),
    num_heads=8,
    num_kv_heads=2,
    head_dim=72,
    block_size=16,
)


# ---------------------------------------------------------------------------------------------------- reasons


def test_spec_that_states_nothing_serves_any_need() -> None:
    assert SchedulerSpec(name="x", target="a:B").why_not(Need(device="cpu", dtype="float16")) == []


def test_need_that_asks_nothing_is_served_by_any_device() -> None:
    assert SchedulerSpec(name="x", target="a:B", devices=("cuda",), dtypes=("float16",)).why_not(Need()) == []


def test_missing_package_is_a_reason_with_the_install_hint() -> None:
    spec = SchedulerSpec(name="x", target="a:B", requires=("json", "no_such_library"), install="pip install octavo[x]")
    assert spec.why_not(Need()) == [
        "needs the Python package 'no_such_library', which is not installed; install it with `pip install octavo[x]`"
    ]


def test_looking_for_a_package_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "heavy_library").mkdir()
    (tmp_path / "heavy_library" / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = SchedulerSpec(name="x", target="a:B", requires=("heavy_library.sub",))
    assert spec.why_not(Need()) == []
    assert "heavy_library" not in sys.modules


def test_every_reason_is_told_at_once() -> None:
    spec = AttentionSpec(
        name="x",
        target="a:B",
        devices=("cuda",),
        dtypes=("float16",),
        features=frozenset({"prefill"}),
        head_sizes=(64, 128),
        block_sizes=(32,),
    )
    assert spec.why_not(ATTENTION_NEED) == [
        "runs on cuda; this engine runs on cpu",
        "supports float16; the model computes in bfloat16",
        "does not support decode",
        "supports head sizes 64, 128; the model has 72",
        "supports block sizes 32; block_size is 16",
    ]


def test_quantization_is_refused_by_format_and_bits() -> None:
    spec = QuantizationSpec(name="x", target="a:B", formats=("gptq",), bits=(4, 8))
    assert spec.why_not(QuantizationNeed(format="gptq", bits=4)) == []
    assert spec.why_not(QuantizationNeed(format="gptq")) == []
    assert spec.why_not(QuantizationNeed(format="awq", bits=3)) == [
        "reads checkpoints of format gptq; this one is 'awq'",
        "supports 4, 8 bits; the checkpoint has 3",
    ]


def test_checkpoint_is_recognised_by_a_file_s_suffix_or_a_folder_s_files() -> None:
    file = CheckpointSpec(name="gguf", target="a:B", suffixes=(".gguf",))
    folder = CheckpointSpec(name="hf", target="a:B", folder_files=("config.json",))
    model_file = CheckpointNeed(path="/m/x.gguf", filenames=("x.gguf",))
    model_folder = CheckpointNeed(path="/m", filenames=("config.json", "model.safetensors"))
    assert (file.why_not(model_file), folder.why_not(model_folder)) == ([], [])
    assert file.why_not(model_folder) == ["reads *.gguf files; this is /m"]
    assert folder.why_not(model_file) == ["reads folders with config.json; this is /m/x.gguf"]


def test_unknown_architecture_is_advised_the_nearest_ones_and_how_to_add_it() -> None:
    specs = [ModelSpec(name="x", target="a:B", architectures=("LlamaForCausalLM", "BertModel", "MistralForCausalLM"))]
    advice = ModelNeed(architecture="Llama4ForCausalLM").advice(specs)
    assert advice.startswith("Nearest architectures installed: LlamaForCausalLM, ")
    assert "ModelSpec(architectures=('Llama4ForCausalLM',)" in advice


def test_a_model_spec_of_any_architecture_leaves_it_to_its_probe(probes: str) -> None:
    need = ModelNeed(device="cpu", architecture="NoSuchForCausalLM")
    assert ModelSpec(name="any", target="a:B", architectures=("*",), probe=f"{probes}:yes").why_not(need) == []
    refused = ModelSpec(name="any", target="a:B", architectures=("*",), probe=f"{probes}:no").why_not(need)
    assert refused == ["the driver is too old for cpu"]


def test_any_architecture_is_not_advised_as_a_near_name() -> None:
    advice = ModelNeed(architecture="*ForCausalLM").advice([ModelSpec(name="x", target="a:B", architectures=("*",))])
    assert advice.startswith("A plugin adds this one")


# ------------------------------------------------------------------------------------------------------ probe


@pytest.fixture
def probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of probes, importable by this name."""
    (tmp_path / "dummy_probes.py").write_text(
        "asked = []\n"
        "def yes(need): asked.append(need); return []\n"
        "def no(need): return [f'the driver is too old for {need.device}']\n"
        "def broken(need): return need.no_such_field\n"
        "def sloppy(need): return 'no'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "dummy_probes", raising=False)
    return "dummy_probes"


def why_not(probe: str, need: Need) -> list[str]:
    return SchedulerSpec(name="x", target="a:B", devices=("cuda",), probe=probe).why_not(need)


def test_probe_answers_last(probes: str) -> None:
    assert why_not(f"{probes}:yes", Need(device="cuda")) == []
    assert why_not(f"{probes}:no", Need(device="cuda")) == ["the driver is too old for cuda"]


def test_probe_is_not_imported_when_the_facts_already_refuse(probes: str) -> None:
    assert why_not(f"{probes}:yes", Need(device="cpu")) == ["runs on cuda; this engine runs on cpu"]
    assert probes not in sys.modules


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("broken", "raised AttributeError: 'Need' object has no attribute 'no_such_field'"),
        ("sloppy", "returned 'no', not a list of sentences"),
        ("absent", "raised PluginError: "),
    ],
)
def test_broken_probe_is_a_reason_not_a_crash(probes: str, function: str, reason: str) -> None:
    (found,) = why_not(f"{probes}:{function}", Need(device="cuda"))
    assert found.startswith(f"its probe {probes}:{function} {reason}")


# ----------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"devices": "cuda"}, "devices must be a tuple, not 'cuda'"),
        ({"requires": ["triton"]}, "requires must be a tuple, not ['triton']"),
        ({"features": {"decode"}}, "features must be a frozenset, not {'decode'}"),
        ({"priority": "high"}, "priority must be a int, not 'high'"),
        ({"name": "a/b"}, "name must be a word"),
        ({"name": ""}, "name must be a word"),
        ({"name": "auto"}, "'auto' is not a name"),
        ({"target": "not a module"}, "target must be \"package.module:Attribute\", not 'not a module'"),
        ({"probe": "a:b:c"}, "probe must be"),
        ({"options": int}, "options must be"),
    ],
)
def test_field_of_wrong_shape_is_refused_when_the_spec_is_made(fields: dict[str, object], fault: str) -> None:
    with pytest.raises(PluginError) as caught:
        SchedulerSpec(**{"name": "x", "target": "a.b:C", **fields})  # type: ignore[arg-type]
    assert fault in str(caught.value)


def test_specs_and_needs_are_frozen_and_hashable() -> None:
    spec = SchedulerSpec(name="x", target="a:B")
    assert len({spec, SchedulerSpec(name="x", target="a:B"), ATTENTION_NEED}) == 2
    with pytest.raises(FrozenInstanceError):
        spec.name = "y"  # type: ignore[misc]


def test_every_kind_has_a_name_and_a_noun() -> None:
    assert [kind for kind, spec in SPEC_KINDS.items() if spec.kind != kind or spec.noun == "component"] == []


# ----------------------------------------------------------------------------------------------------- target


def test_target_is_an_attribute_or_a_module() -> None:
    assert load_target("octavo.errors:PluginError") is PluginError
    assert load_target("octavo.errors") is sys.modules["octavo.errors"]


@pytest.mark.parametrize("target", ["no_such_library.x:Y", "octavo.errors:NoSuchError"])
def test_target_that_is_not_there_is_a_plugin_error_with_the_cause(target: str) -> None:
    with pytest.raises(PluginError, match="cannot be imported") as caught:
        load_target(target)
    assert target in str(caught.value)
    assert isinstance(caught.value.__cause__, (ImportError, AttributeError))
