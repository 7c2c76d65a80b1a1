"""A model as a plain Hugging Face folder, which every quantising tool reads, from any format that Octavo reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from octavo import HuggingFaceCheckpoint
from octavo.errors import CheckpointError
from octavo.interfaces import Checkpoint, TokenizerData

_SHARD_BYTES = 4 << 30


def plain_folder(checkpoint: Checkpoint, scratch: Path) -> Path:
    """The checkpoint's own folder where it is one in Hugging Face's format, else one that is written into `scratch`.

    Raises:
        CheckpointError: the model is quantized already.
    """
    if quantization := checkpoint.config().get("quantization_config"):
        method = quantization.get("quant_method", "an unnamed method")
        raise CheckpointError(
            f"{checkpoint.path} is quantized already, by {method}; give the plain model that it was made of."
        )
    if isinstance(checkpoint, HuggingFaceCheckpoint):
        return Path(checkpoint.path)
    write_plain_folder(checkpoint, scratch)
    return scratch


def write_plain_folder(checkpoint: Checkpoint, folder: Path, shard_bytes: int = _SHARD_BYTES) -> None:
    """Write config.json, safetensors, tokenizer.json and tokenizer_config.json, and generation_config.json if any.

    Args:
        folder: made if it is not there.
        shard_bytes: a file of weights ends with the tensor that makes it as large; what is in memory at once.

    Weights are written in the model's own dtype, the configuration's: a format that is dequantised gives wider ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = checkpoint.config()
    _write_json(folder / "config.json", config)
    if generation_config := checkpoint.generation_config():
        _write_json(folder / "generation_config.json", generation_config)
    _write_tokenizer(checkpoint.tokenizer(), folder)
    shards = [
        (_save(tensors, folder / f"{index}.part"), list(tensors))
        for index, tensors in enumerate(_shards(checkpoint, _dtype(config), shard_bytes))
    ]
    if len(shards) == 1:
        shards[0][0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, (part, names) in enumerate(shards):
        name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        part.rename(folder / name)
        weight_map |= dict.fromkeys(names, name)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _shards(checkpoint: Checkpoint, dtype: torch.dtype | None, shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in checkpoint.tensors():
        shard[name] = (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).contiguous()
        num_bytes += shard[name].nbytes
        if num_bytes >= shard_bytes:
            yield shard
            shard, num_bytes = {}, 0
    if shard:
        yield shard


def _dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else None


def _save(tensors: Mapping[str, Tensor], path: Path) -> Path:
    save_file(dict(tensors), path, metadata={"format": "pt"})
    return path


def _write_tokenizer(data: TokenizerData, folder: Path) -> None:
    data.tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **data.special_tokens}
    if data.chat_template is not None:
        config["chat_template"] = data.chat_template
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(value), indent=2) + "\n", encoding="utf-8")
