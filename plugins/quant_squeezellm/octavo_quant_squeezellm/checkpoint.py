"""SqueezeLLMCheckpoint: a folder with the tool's own .pt, and the configuration and tokenizer of the base model."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo import HuggingFaceCheckpoint
from octavo.errors import CheckpointError
from octavo.interfaces import SAFETENSORS_DTYPES, Checkpoint, TensorHeader, TokenizerData

_NAMES_OF_DTYPES = {
    getattr(torch, theirs): name for name, theirs in SAFETENSORS_DTYPES.items() if hasattr(torch, theirs)
}


class SqueezeLLMCheckpoint(Checkpoint):
    """One .pt in a folder: the state dict that SqueezeLLM's pack.py saves. The rest is a Hugging Face folder.

    The file is only ever opened as tensors: code that a pickle asks to run is refused.

    Raises:
        CheckpointError: the path is not a folder, or has not exactly one .pt.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._folder = HuggingFaceCheckpoint(path)
        files = sorted(Path(path).glob("*.pt"))
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise CheckpointError(
                f"{path} has {len(files)} .pt files ({names}); SqueezeLLM's weights are one. Leave that one there."
            )
        self._file = files[0]

    def config(self) -> Mapping[str, Any]:
        return self._folder.config()

    def generation_config(self) -> Mapping[str, Any]:
        return self._folder.generation_config()

    def tokenizer(self) -> TokenizerData:
        return self._folder.tokenizer()

    def tensor_headers(self) -> Mapping[str, TensorHeader]:
        return {
            name: TensorHeader(shape=tuple(tensor.shape), dtype=_NAMES_OF_DTYPES[tensor.dtype], num_bytes=tensor.nbytes)
            for name, tensor in self._mapped_tensors().items()
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        mapped = self._mapped_tensors()
        # Copies: a tensor that a layer keeps as it is would keep the whole file mapped.
        return ((name, tensor.clone(memory_format=torch.contiguous_format)) for name, tensor in mapped.items())

    def _mapped_tensors(self) -> dict[str, Tensor]:
        """By name, backed by the file. The numbers among them, the tool's sparse_threshold.*, are left out."""
        try:
            found = torch.load(self._file, weights_only=True, mmap=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{self._file} holds more than tensors: opening it would run Python code that it names, which is never "
                "done. Save its state dict alone."
            ) from error
        except (RuntimeError, OSError, EOFError) as error:
            raise CheckpointError(
                f"{self._file} cannot be opened as what torch.save writes ({_first_line(error)}): it is cut short, of "
                "a torch before 1.6, or only Git LFS's note of where the weights are. Fetch it again."
            ) from error
        if not isinstance(found, Mapping):
            raise CheckpointError(
                f"{self._file} holds a {type(found).__name__}; wanted is a state dict, tensors by their names."
            )
        tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
        if not any(name.endswith(".lookup_table") for name in tensors):
            raise CheckpointError(
                f"{self._file} is no SqueezeLLM checkpoint: none of its {len(found)} entries ({_some(found)}) is a "
                "lookup_table. Weights of other formats are read as safetensors."
            )
        if strange := [name for name, tensor in tensors.items() if tensor.dtype not in _NAMES_OF_DTYPES]:
            raise CheckpointError(
                f"{self._file} stores {strange[0]} as {tensors[strange[0]].dtype}; those that are read are "
                f"{', '.join(SAFETENSORS_DTYPES.values())}."
            )
        return tensors


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _some(found: Mapping[object, object]) -> str:
    names = [str(name) for name in found]
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
