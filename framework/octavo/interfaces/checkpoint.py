"""Checkpoint socket: a format of model files, opened once, read once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer as TokenizersTokenizer


SAFETENSORS_DTYPES: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
}
"""torch's name of each type that safetensors has, by its name there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerData:
    """What a tokenizer is made of.

    Attributes:
        tokenizer: of the `tokenizers` library.
        chat_template: Jinja source; None when the model has none.
        special_tokens: what a template may name: "bos_token" -> "<s>", "eos_token", ...
    """

    tokenizer: TokenizersTokenizer
    chat_template: str | None
    special_tokens: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorHeader:
    """What a checkpoint's header says of one tensor.

    Attributes:
        shape: as `Checkpoint.tensors` gives it.
        dtype: the format's own name of it: "BF16", "Q4_1".
        num_bytes: in the file.
    """

    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


class Checkpoint(ABC):
    """An opened checkpoint. The constructor takes its path and reads headers only; it raises CheckpointError."""

    def __init__(self, path: str) -> None:
        self.path = path

    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """The model's configuration, with the keys of Hugging Face's config.json."""

    @abstractmethod
    def generation_config(self) -> Mapping[str, Any]:
        """The keys of generation_config.json; {} when there is none."""

    @abstractmethod
    def tokenizer(self) -> TokenizerData:
        """The tokenizer, read without importing torch or transformers."""

    @abstractmethod
    def tensor_headers(self) -> Mapping[str, TensorHeader]:
        """Every tensor that `tensors` gives, by the same name, from headers alone; {} when no weights are there yet.

        Raises:
            CheckpointError: weights are there, but not all or not readable.
        """

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor once, by its Hugging Face name, on the CPU, in the order that is cheapest to read."""
