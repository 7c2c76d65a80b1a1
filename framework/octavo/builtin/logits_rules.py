"""The logits rules that the sampling parameters name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from octavo.interfaces.executor import NewRow
from octavo.interfaces.logits_rule import LogitsRule, RuleLimits

_FORBIDDEN = float("-inf")


class MinTokens(LogitsRule):
    """Tokens that would end the output are not sampled before `min_tokens`."""

    def __init__(self, limits: RuleLimits) -> None:
        super().__init__(limits)
        self._bans: dict[int, tuple[int, list[int]]] = {}  # row -> (allowed from this position, token ids)

    def add(self, row: int, request: NewRow) -> bool:
        if not (request.params.min_tokens and request.stop_token_ids):
            return False
        self._bans[row] = request.num_prompt_tokens + request.params.min_tokens, list(request.stop_token_ids)
        return True

    def remove(self, row: int) -> None:
        del self._bans[row]

    def apply(self, logits: Tensor, indices: Sequence[int], rows: Sequence[int], positions: Sequence[int]) -> None:
        for index, row, position in zip(indices, rows, positions, strict=True):
            allowed_from, token_ids = self._bans[row]
            if position < allowed_from:
                logits[index, token_ids] = _FORBIDDEN
