"""HuggingFaceCheckpoint: a folder with config.json, safetensors and tokenizer.json, the reference checkpoint format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from octavo.errors import CheckpointError
from octavo.interfaces.checkpoint import Checkpoint, TensorHeader, TokenizerData

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
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
        return self._json("config.json")

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
        return dict(self._read(self._shards(), _header))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        # The shards are looked for now, not when the first tensor is asked for.
        return self._read(self._shards(), lambda shard, name: shard.get_tensor(name))

    def _read(
        self, shards: Mapping[Path, list[str] | None], read: Callable[[Any, str], _T]
    ) -> Iterator[tuple[str, _T]]:
        """(name, what `read` takes of it) of every tensor."""
        from safetensors import SafetensorError, safe_open

        for path, names in shards.items():
            try:
                with safe_open(path, framework="pt") as shard:
                    present = shard.keys()
                    if missing := sorted(set(names or ()) - set(present)):
                        raise CheckpointError(
                            f"{path} lacks {len(missing)} tensors that {_INDEX} says it has: {_some(missing)}."
                        )
                    wanted = set(present if names is None else names)
                    for name in filter(wanted.__contains__, present):  # in the file's order
                        yield name, read(shard, name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(_damage(path, error)) from error

    def _shards(self) -> dict[Path, list[str] | None]:
        """File -> the tensors to take from it, None for all; decided by the index, never by what lies about."""
        if (self._folder / _INDEX).is_file():
            return self._indexed_shards()
        if (self._folder / _SINGLE).is_file():
            return {self._folder / _SINGLE: None}
        pickled = sorted(path.name for pattern in _PICKLES for path in self._folder.glob(pattern))
        if pickled:
            raise CheckpointError(
                f"{self._folder} has its weights only as Python pickles ({_some(pickled)}), which can run any "
                "code when opened and are not read; convert them to safetensors."
            )
        raise CheckpointError(f"{self._folder} has no weights: neither {_SINGLE} nor {_INDEX} is there.")

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


def _header(shard: Any, name: str) -> TensorHeader:
    tensor = shard.get_slice(name)
    shape, dtype = tuple(tensor.get_shape()), str(tensor.get_dtype())
    bits = re.search(r"\d+", dtype)  # "BF16", "F8_E4M3", "U8"; BOOL is a byte
    return TensorHeader(shape=shape, dtype=dtype, num_bytes=prod(shape) * (int(bits[0]) if bits else 8) // 8)


def _damage(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            return f"{path} is only Git LFS's note of where the weights are; run `git lfs pull` in its folder."
    return f"{path} is cut short or damaged ({error}); fetch it again."


def _content(token: object) -> str:
    """A special token is written as a string or as {"content": "<s>", ...}."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
