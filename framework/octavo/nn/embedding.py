"""The token embedding table."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from octavo.nn.weights import Shard, WeightLoader


class Embedding:
    """token_ids [num_tokens] -> rows of the table [num_tokens, hidden_size].

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
    ) -> None:
        self._device = device
        self._table: Tensor
        shard = Shard(axis=0, num_shards=num_ranks) if num_ranks > 1 else None
        loader.expect(f"{prefix}.weight", (vocab_size, hidden_size), dtype, self._receive, shard)

    def _receive(self, table: Tensor) -> None:
        self._table = table.to(self._device)

    def __call__(self, token_ids: Tensor) -> Tensor:
        return functional.embedding(token_ids, self._table)
