"""Random models as Hugging Face folders: small ones for exact tokens, the shape of Llama-3-8B for speed."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from gpu_parts.environment import ROOT
from gpu_parts.part import Part

sys.path.append(str(ROOT / "tests"))  # the tests' own models and margin rule: one copy of each

import tiny_model

LLAMA_3_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "rms_norm_eps": 1e-05,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
TINY_SHAPE: dict[str, Any] = {
    **LLAMA_3_8B,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
STANDARD_DEVIATION = 0.02
"""Of the weights, as models are initialised: activations are then of the size they have in trained ones."""


def shape_config(part: Part, num_layers: int) -> LlamaConfig:
    """Llama-3-8B with so many layers; in a tiny run a Llama that an interpreter can run."""
    shape = TINY_SHAPE if part.tiny else LLAMA_3_8B
    return LlamaConfig(**shape, num_hidden_layers=num_layers, tie_word_embeddings=False, dtype="bfloat16")


def write_shape(part: Part, num_layers: int) -> Path:
    """The folder of that model; its weights are drawn on the device, one file a layer, those that are not there yet.

    The files are shared: a model of fewer layers is the first of one of more.
    """
    config = shape_config(part, num_layers)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    weights, folder = part.scratch / "llama-weights", part.scratch / f"llama-{num_layers}-layers"
    for one in (weights, folder):
        one.mkdir(exist_ok=True)
    files: dict[str, list[str]] = {}
    for name in shapes:
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        files.setdefault(f"model-{layer + 1}.safetensors", []).append(name)
    for seed, (file, names) in enumerate(files.items()):
        if not (weights / file).exists():
            tensors = draw_weights({name: shapes[name] for name in names}, part.device, seed)
            save_file(tensors, part.scratch / "part.safetensors", metadata={"format": "pt"})
            (part.scratch / "part.safetensors").rename(weights / file)  # nobody ever sees half a file
        if not (folder / file).exists():
            (folder / file).symlink_to(weights / file)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tiny_model.write_tokenizer(folder)
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def draw_weights(shapes: Mapping[str, torch.Size], device: str, seed: int) -> dict[str, Tensor]:
    """Normal numbers on the CPU, of the size that a model is initialised with; those of norms are about 1."""
    generator = torch.Generator(device=device).manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        numbers = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        tensors[name] = (1 + numbers * 0.1 if len(shape) == 1 else numbers * STANDARD_DEVIATION).cpu()
    return tensors


def load_transformers(folder: Path, dtype: str, device: str) -> PreTrainedModel:
    """transformers' model of a folder that `write_shape` wrote; its own loader needs accelerate to load onto a GPU."""
    config = LlamaConfig.from_pretrained(folder)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    missing = set(model.state_dict())
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file, device=device)
        missing -= set(tensors)
        model.load_state_dict(tensors, strict=False)
    assert not missing, f"{folder} lacks {missing}"
    return model.eval()


def write_small(part: Part, architecture: str) -> Path:
    """A Llama or a Qwen2 of four layers (two in a tiny run), float32, its logits as far apart as tiny_model's."""
    sizes: dict[str, Any] = {
        **tiny_model.SIZES,
        "num_hidden_layers": 2 if part.tiny else 4,
        "hidden_size": 128 if part.tiny else 512,
        "intermediate_size": 128 if part.tiny else 1024,
        "num_attention_heads": 2 if part.tiny else 8,
        "num_key_value_heads": 1 if part.tiny else 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
    }
    config: PreTrainedConfig = LlamaConfig(**sizes) if architecture == "llama" else Qwen2Config(**sizes)
    folder = part.scratch / f"small-{architecture}"
    folder.mkdir(exist_ok=True)
    return tiny_model.write_tiny_model(folder, config)
