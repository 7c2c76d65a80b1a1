"""What is refused by an architecture's name alone, and that nothing heavy is imported to find out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from octavo.errors import PluginError
from octavo.plugins.specs import ModelNeed
from octavo_model_transformers import octavo_components, probe
from octavo_model_transformers.probe import why_not

(SPEC,) = octavo_components()


@pytest.mark.parametrize(
    "architecture", ["OlmoForCausalLM", "GraniteForCausalLM", "GPTNeoXForCausalLM", "LlamaForCausalLM"]
)
def test_a_decoder_of_transformers_has_no_reason_against_it(architecture: str) -> None:
    assert SPEC.why_not(ModelNeed(architecture=architecture)) == []


@pytest.mark.parametrize(
    "architecture",
    ["T5ForConditionalGeneration", "LlavaForConditionalGeneration", "BertModel", "NoSuchForCausalLM", "*"],
    ids=["encoder and decoder", "multimodal", "encoder", "unknown", "any"],
)
def test_what_is_no_causal_language_model_is_refused(architecture: str) -> None:
    (reason,) = why_not(ModelNeed(architecture=architecture))
    assert reason.startswith(f"{architecture} is none of the decoder-only language models of transformers ")


@pytest.mark.parametrize("architecture", ["MambaForCausalLM", "JambaForCausalLM", "RecurrentGemmaForCausalLM"])
def test_a_model_with_a_recurrent_state_is_refused(architecture: str) -> None:
    (reason,) = why_not(ModelNeed(architecture=architecture))
    assert reason == f"{architecture} keeps a recurrent state beside its keys and values, or instead of them"


@pytest.mark.parametrize("architecture", ["BloomForCausalLM", "StableLmForCausalLM"])
def test_a_model_without_the_attention_interface_is_refused(architecture: str) -> None:
    (reason,) = why_not(ModelNeed(architecture=architecture))
    assert reason.startswith(f"{architecture} does not take its attention from the attention interface of transformers")


def test_the_probe_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from octavo.plugins.specs import ModelNeed; from octavo_model_transformers.probe import why_not; "
        "assert why_not(ModelNeed(architecture='OlmoForCausalLM')) == []; "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_transformers_without_the_table_is_said_to_be_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_package", lambda: tmp_path)
    with pytest.raises(PluginError, match="has no table MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"):
        why_not(ModelNeed(architecture="OlmoForCausalLM"))
