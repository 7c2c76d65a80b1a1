"""The token embedding table."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from octavo.nn.linear import Adapters
from octavo.nn.weights import Shard, WeightLoader


class Embedding:
    """token_ids [num_tokens] -> rows of the table [num_tokens, hidden_size], changed by each row's LoRA adapter.

    Among several devices each holds some of the rows; the last is padded when the vocabulary does not divide.
    """

    def __init__(
        self,
        loader: WeightLoader,
        prefix: str,
        vocab_size: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: str,
        num_ranks: int = 1,
        adapters: Adapters | None = None,
    ) -> None:
        self._device = device
        self._adapters = adapters
        self._table: Tensor
        shard = Shard(axis=0, num_shards=num_ranks) if num_ranks > 1 else None
        loader.expect(f"{prefix}.weight", (vocab_size, hidden_size), dtype, self._receive, shard)

    def _receive(self, table: Tensor) -> None:
        self._table = table.to(self._device)

    def __call__(self, token_ids: Tensor) -> Tensor:
        rows = functional.embedding(token_ids, self._table)
        if self._adapters is None or not self._adapters.backend.active:
            return rows
        return self._adapters.backend.apply_embedding(self._adapters.slot, token_ids, rows)
