"""A whole random model in SqueezeLLM's format, in folders of every kind, against transformers with decoded weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from greedy_reference import prompts, reference_of
from margin_rule import Reference, check, generate, next_tokens_of, token_ids_of
from safetensors.torch import load_file, save_file
from squeezellm_layers import decode, random_tensors
from tiny_model import write_tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM

from octavo import LLM, explain
from octavo.errors import CheckpointError
from octavo.interfaces import LinearShape

BITS = 3
NUM_TOKENS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyModel:
    """A folder with all but weights; those, and what transformers answers with them decoded."""

    folder: Path
    state: Mapping[str, Tensor]
    references: list[Reference]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny"), hidden_size=64, intermediate_size=96)
    plain, state = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in plain.items():
        if not name.endswith("_proj.weight"):
            state[name] = tensor
            continue
        shape = LinearShape(in_features=tensor.shape[1], out_features=tensor.shape[0])
        # Of a layer's projections that read one input, only some have outliers.
        dense = "k_proj" in name or "gate_proj" in name
        tensors = random_tensors(shape, BITS, generator, density=None if dense else 0.02, balanced=not dense)
        for suffix, each in tensors.items():
            state[f"{name.removesuffix('weight')}{suffix}"] = each
        plain[name] = decode(tensors, BITS)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.load_state_dict(plain, strict=False)
    (folder / "model.safetensors").unlink()
    return TinyModel(
        folder=folder, state=state, references=[reference_of(model, prompt, NUM_TOKENS) for prompt in prompts(3, 9, 20)]
    )


def write(tiny: TinyModel, folder: Path, *, weights: str, said: str, bits: int = BITS) -> Path:
    copytree(tiny.folder, folder, dirs_exist_ok=True)
    if weights == "pt":
        counts = {f"sparse_threshold.{name[:-5]}": 3 for name in tiny.state if name.endswith(".vals")}
        torch.save({**tiny.state, **counts}, folder / "sq-tiny-w3-s45.pt")
    else:
        save_file(dict(tiny.state), folder / "model.safetensors")
    if said == "quant_config.json":
        (folder / said).write_text(json.dumps({"wbits": bits}))
    elif said == "config.json":
        config = json.loads((folder / said).read_text())
        config["quantization_config"] = {"quant_method": "squeezellm", "wbits": bits}
        (folder / said).write_text(json.dumps(config))
    return folder


def make_llm(folder: Path, **settings: Any) -> LLM:
    return LLM(str(folder), dtype="float32", attention="torch", kernels="torch", **settings)


@pytest.mark.parametrize("weights", ["pt", "safetensors"])
@pytest.mark.parametrize("said", ["quant_config.json", "config.json", "nothing"])
def test_greedy_tokens_are_those_of_the_decoded_weights(
    tiny: TinyModel, tmp_path: Path, weights: str, said: str
) -> None:
    with make_llm(write(tiny, tmp_path, weights=weights, said=said)) as llm:
        check(tiny.references, token_ids_of(generate(llm, tiny.references)), next_tokens_of(llm))


def test_weights_dequantised_at_load_give_the_same_tokens(tiny: TinyModel, tmp_path: Path) -> None:
    folder = write(tiny, tmp_path, weights="pt", said="nothing")
    with make_llm(folder, linear_kernel="torch-dequantized") as llm:
        check(tiny.references, token_ids_of(generate(llm, tiny.references)), next_tokens_of(llm))


def test_bits_that_the_tensors_contradict_stop_the_start(tiny: TinyModel, tmp_path: Path) -> None:
    folder = write(tiny, tmp_path, weights="pt", said="config.json", bits=4)
    with pytest.raises(CheckpointError, match=r"lookup_table has 8 values for each output, which is 3 bits, .* says 4"):
        make_llm(folder)


def test_explain_names_format_method_and_kernel(tiny: TinyModel, tmp_path: Path) -> None:
    text = str(explain(str(write(tiny, tmp_path, weights="pt", said="nothing"))))
    assert [word for word in ("squeezellm-pt", "quant-squeezellm/squeezellm", "torch-packed") if word not in text] == []
