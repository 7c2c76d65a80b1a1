"""LoRA adapters drawn at random for a model, as PEFT folders: what they say means nothing, what they cost is real."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from octavo import open_checkpoint

SUFFIXES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FILES = ("adapter_config.json", "adapter_model.safetensors")


def draw_adapters(root: Path, model: str, num_adapters: int, rank: int) -> dict[str, str]:
    """Write as many below `root`, for all linears of the model's layers; name -> folder."""
    headers = open_checkpoint(model).tensor_headers()
    names = [name.removesuffix(".weight") for name in headers]
    linears = {name: headers[f"{name}.weight"].shape for name in names if name.endswith(SUFFIXES)}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank}
    config |= {"target_modules": list(SUFFIXES), "base_model_name_or_path": model}
    found = {}
    for index in range(num_adapters):
        generator = torch.Generator().manual_seed(index)
        tensors = {}
        for name, (out_features, in_features) in linears.items():
            a, b = (
                torch.randn(rank, in_features, generator=generator),
                torch.randn(out_features, rank, generator=generator),
            )
            tensors[f"base_model.model.{name}.lora_A.weight"] = (a / in_features**0.5).bfloat16()
            tensors[f"base_model.model.{name}.lora_B.weight"] = (b / rank**0.5 / 8).bfloat16()
        folder = root / f"adapter-{index}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _FILES[0]).write_text(json.dumps(config))
        save_file(tensors, folder / _FILES[1])
        found[folder.name] = str(folder)
    return found
