"""Checkpoint socket: a format of model files, opened once, read once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer as TokenizersTokenizer


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
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor once, by its Hugging Face name, on the CPU, in the order that is cheapest to read."""
