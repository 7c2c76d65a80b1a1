"""HuggingFaceCheckpoint: a folder with config.json, safetensors and tokenizer.json, the reference checkpoint format."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from octavo.errors import CheckpointError
from octavo.interfaces.checkpoint import SAFETENSORS_DTYPES, Checkpoint, TensorHeader, TokenizerData

if TYPE_CHECKING:
    import torch

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"-of-\d+\.")
_QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json")
"""Where tools older than config.json's quantization_config say it."""
_PICKLES = ("*.bin", "*.pt", "*.pth")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class HuggingFaceCheckpoint(Checkpoint):
    """One folder. Weights are read tensor by tensor, so at most one is in memory beside what the model keeps.

    Raises:
        CheckpointError: the path is not a folder.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._folder = Path(path)
        if not self._folder.is_dir():
            raise CheckpointError(f"{path} is not a folder; a Hugging Face checkpoint is one.")

    def config(self) -> Mapping[str, Any]:
        if not (self._folder / "config.json").is_file():
            raise CheckpointError(f"{self._folder} has no config.json; without it the model's sizes are unknown.")
        config = self._json("config.json")
        if config.get("quantization_config"):
            return config
        beside = (self._json(name) for name in _QUANTIZATION_FILES)
        quantization = next((found for found in beside if found), None)
        return config if quantization is None else {**config, "quantization_config": quantization}

    def generation_config(self) -> Mapping[str, Any]:
        return self._json("generation_config.json")

    def tokenizer(self) -> TokenizerData:
        from tokenizers import Tokenizer

        path = self._folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(self._no_tokenizer())
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error
        config = {**self._json("special_tokens_map.json"), **self._json("tokenizer_config.json")}
        special_tokens = {name: _content(config[name]) for name in _SPECIAL_TOKENS if config.get(name)}
        return TokenizerData(
            tokenizer=tokenizer, chat_template=self._chat_template(config), special_tokens=special_tokens
        )

    def tensor_headers(self) -> Mapping[str, TensorHeader]:
        if not any(any(self._folder.glob(pattern)) for pattern in ("*.safetensors", *_PICKLES)):
            return {}
        return {
            name: TensorHeader(shape=tuple(entry["shape"]), dtype=entry["dtype"], num_bytes=end - start)
            for _, name, entry, start, end in self._read(self._shards())
        }

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        # The shards are looked for now, not when the first tensor is asked for.
        return (
            (name, _tensor(file, name, entry, start, end))
            for file, name, entry, start, end in self._read(self._shards())
        )

    def _read(
        self, shards: Mapping[Path, list[str] | None]
    ) -> Iterator[tuple[BinaryIO, str, Mapping[str, Any], int, int]]:
        """(file, name, its entry in the header, first byte, byte after the last) of every tensor, in the file's order.

        The library checks each file: that the header is whole, and that the tensors fill the rest without gaps. The
        bytes are then read, not mapped: a tensor that a layer keeps as it is would hold its file's mapping, and the
        pages of all that was read from it count as memory beside what the layers made of them.
        """
        from safetensors import SafetensorError, safe_open

        for path, names in shards.items():
            try:
                with safe_open(path, framework="np"), path.open("rb") as file:
                    header_size = int.from_bytes(file.read(8), "little")
                    header = json.loads(file.read(header_size))
                    header.pop("__metadata__", None)
                    if missing := sorted(set(names or ()) - set(header)):
                        raise CheckpointError(
                            f"{path} lacks {len(missing)} tensors that {_INDEX} says it has: {_some(missing)}."
                        )
                    wanted = set(header if names is None else names)
                    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                        if name in wanted:
                            start, end = (8 + header_size + offset for offset in entry["data_offsets"])
                            yield file, name, entry, start, end
            except (SafetensorError, OSError) as error:
                raise CheckpointError(_damage(path, error)) from error

    def _shards(self) -> dict[Path, list[str] | None]:
        """File -> the tensors to take from it, None for all; decided by the index, never by what lies about."""
        if (self._folder / _INDEX).is_file():
            return self._indexed_shards()
        if (self._folder / _SINGLE).is_file():
            return {self._folder / _SINGLE: None}
        # Older quantization tools name the one file after the method: gptq_model-4bit-128g.safetensors.
        others = list(self._folder.glob("*.safetensors"))
        if len(others) == 1 and not _SHARD.search(others[0].name):
            return {others[0]: None}
        pickled = sorted(path.name for pattern in _PICKLES for path in self._folder.glob(pattern))
        if pickled:
            raise CheckpointError(
                f"{self._folder} has its weights only as Python pickles ({_some(pickled)}), which can run any "
                "code when opened and are not read; convert them to safetensors."
            )
        found = f" Which of {_some(sorted(other.name for other in others))} is meant cannot be told." if others else ""
        raise CheckpointError(f"{self._folder} has no weights: neither {_SINGLE} nor {_INDEX} is there.{found}")

    def _indexed_shards(self) -> dict[Path, list[str] | None]:
        weight_map = self._json(_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                f"{self._folder / _INDEX} has no weight_map: it does not say which tensor lies where."
            )
        shards: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            shards.setdefault(str(file), []).append(name)
        if missing := sorted(file for file in shards if Path(file).name != file or not (self._folder / file).is_file()):
            raise CheckpointError(
                f"{self._folder} lacks {len(missing)} of the {len(shards)} files that {_INDEX} names: "
                f"{_some(missing)}. Fetch them again."
            )
        return {self._folder / file: names for file, names in shards.items()}

    def _chat_template(self, config: Mapping[str, Any]) -> str | None:
        """The template: a file of its own (newer), or a key of tokenizer_config.json, there perhaps one of several."""
        if (path := self._folder / "chat_template.jinja").is_file():
            return path.read_text(encoding="utf-8")
        template = self._json("chat_template.json").get("chat_template") or config.get("chat_template")
        if isinstance(template, list):
            named = {str(entry.get("name")): str(entry.get("template")) for entry in template}
            return named.get("default")
        return None if template is None else str(template)

    def _json(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder; {} when the file is not there."""
        path = self._folder / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object.")
        return value

    def _no_tokenizer(self) -> str:
        hint = "A model trained without one has it in the folder of its base model"
        if (self._folder / "tokenizer.model").is_file():
            hint = "tokenizer.model (sentencepiece) is there: transformers' AutoTokenizer can save it as tokenizer.json"
        return (
            f"{self._folder} has no tokenizer.json, which is needed to encode text. {hint}; or name another tokenizer."
        )


def _tensor(file: BinaryIO, name: str, entry: Mapping[str, Any], start: int, end: int) -> torch.Tensor:
    import torch

    dtype = getattr(torch, SAFETENSORS_DTYPES.get(entry["dtype"], ""), None)
    if dtype is None:
        raise CheckpointError(
            f"{file.name} stores {name} as {entry['dtype']}, which this torch has no type for; those that are read "
            f"are {', '.join(SAFETENSORS_DTYPES)}."
        )
    data = torch.empty(end - start, dtype=torch.uint8)
    file.seek(start)
    if file.readinto(data.numpy()) != end - start:  # type: ignore[attr-defined]
        raise CheckpointError(f"{file.name} was cut short while it was read; fetch it again.")
    return data.view(dtype).view(entry["shape"])


def _damage(path: Path, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return f"{path} may not be read by this user ({error.strerror})."
    with path.open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            return f"{path} is only Git LFS's note of where the weights are; run `git lfs pull` in its folder."
    return f"{path} is cut short or damaged ({error}); fetch it again."


def _content(token: object) -> str:
    """A special token is written as a string or as {"content": "<s>", ...}."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
