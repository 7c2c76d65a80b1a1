"""The logits rules that the sampling parameters name. In the order they apply: allowed tokens, bad words, min tokens,
logit bias, penalties (their specs' priorities say so), as in vLLM.

What a rule keeps of a request is of the size of what the request asks for, and stays on the host: a step sends to the
device which logits change, and how. None of them is computed over the whole vocabulary but `AllowedTokens`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.interfaces.executor import NewRow
from octavo.interfaces.logits_rule import LogitsRule, RuleLimits
from octavo.runner.transfer import to_device
from octavo.sampling_params import SamplingParams

Array = np.ndarray[Any, np.dtype[Any]]

_FORBIDDEN = float("-inf")


class AllowedTokens(LogitsRule):
    """Nothing but `allowed_token_ids` is sampled."""

    def __init__(self, limits: RuleLimits) -> None:
        super().__init__(limits)
        self._forbidden: dict[int, Tensor] = {}  # row -> [vocab_size] bool, on the device

    def add(self, row: int, request: NewRow) -> bool:
        if request.params.allowed_token_ids is None:
            return False
        forbidden = torch.ones(self.limits.vocab_size, dtype=torch.bool)
        forbidden[list(request.params.allowed_token_ids)] = False
        self._forbidden[row] = forbidden.to(self.limits.device)
        return True

    def remove(self, row: int) -> None:
        del self._forbidden[row]

    def apply(self, logits: Tensor, indices: Sequence[int], rows: Sequence[int], positions: Sequence[int]) -> None:
        chosen = to_device(np.array(indices), logits.device)
        forbidden = torch.stack([self._forbidden[row] for row in rows])
        logits[chosen] = logits[chosen].masked_fill_(forbidden, _FORBIDDEN)


class BadWords(LogitsRule):
    """No output completes one of `bad_words`: the last token of one is not sampled behind those before it."""

    looks_back = True

    def __init__(self, limits: RuleLimits) -> None:
        super().__init__(limits)
        self._words: dict[int, list[tuple[tuple[int, ...], int]]] = {}  # row -> (tokens before the last, the last)
        self._outputs: dict[int, deque[int]] = {}  # row -> its last output tokens, as many as its longest word needs

    def add(self, row: int, request: NewRow) -> bool:
        if not request.bad_words_token_ids:
            return False
        longest = max(map(len, request.bad_words_token_ids))
        self._words[row] = [(word[:-1], word[-1]) for word in request.bad_words_token_ids]
        self._outputs[row] = deque(request.token_ids[request.num_prompt_tokens :], maxlen=longest - 1)
        return True

    def remove(self, row: int) -> None:
        del self._words[row], self._outputs[row]

    def accept(self, row: int, token_ids: Sequence[int]) -> None:
        self._outputs[row].extend(token_ids)

    def apply(self, logits: Tensor, indices: Sequence[int], rows: Sequence[int], positions: Sequence[int]) -> None:
        where: list[int] = []
        what: list[int] = []
        for index, row in zip(indices, rows, strict=True):
            outputs = tuple(self._outputs[row])
            for before, last in self._words[row]:
                if len(before) <= len(outputs) and outputs[len(outputs) - len(before) :] == before:
                    where.append(index)
                    what.append(last)
        _forbid(logits, where, what)


class MinTokens(LogitsRule):
    """Tokens that would end the output are not sampled before `min_tokens`."""

    def __init__(self, limits: RuleLimits) -> None:
        super().__init__(limits)
        self._bans: dict[int, tuple[int, tuple[int, ...]]] = {}  # row -> (allowed from this position, token ids)

    def add(self, row: int, request: NewRow) -> bool:
        if not (request.params.min_tokens and request.stop_token_ids):
            return False
        self._bans[row] = request.num_prompt_tokens + request.params.min_tokens, request.stop_token_ids
        return True

    def remove(self, row: int) -> None:
        del self._bans[row]

    def apply(self, logits: Tensor, indices: Sequence[int], rows: Sequence[int], positions: Sequence[int]) -> None:
        where: list[int] = []
        what: list[int] = []
        for index, row, position in zip(indices, rows, positions, strict=True):
            allowed_from, token_ids = self._bans[row]
            if position < allowed_from:
                where += [index] * len(token_ids)
                what += token_ids
        _forbid(logits, where, what)


class LogitBias(LogitsRule):
    """`logit_bias` is added."""

    def __init__(self, limits: RuleLimits) -> None:
        super().__init__(limits)
        self._biases: dict[int, tuple[Array, Array]] = {}  # row -> (token ids, what is added)

    def add(self, row: int, request: NewRow) -> bool:
        bias = request.params.logit_bias
        if not bias:
            return False
        size = len(bias)
        self._biases[row] = np.fromiter(bias, np.int64, size), np.fromiter(bias.values(), np.float32, size)
        return True

    def remove(self, row: int) -> None:
        del self._biases[row]

    def apply(self, logits: Tensor, indices: Sequence[int], rows: Sequence[int], positions: Sequence[int]) -> None:
        token_ids, added = zip(*(self._biases[row] for row in rows), strict=True)
        cells = _cells(logits, indices, token_ids)
        logits[cells] += to_device(np.concatenate(added), logits.device)


class Penalties(LogitsRule):
    """A token that was there already becomes less probable.

    With c its count in the output: first the repetition penalty r, for tokens in prompt or output, x / r where x > 0
    and else x * r; then x - frequency_penalty * c - presence_penalty * (c > 0).

    Source: Keskar et al. 2019, CTRL, arXiv:1909.05858, section 4.1, as in transformers; OpenAI's API reference.
    """

    looks_back = True

    def __init__(self, limits: RuleLimits) -> None:
        super().__init__(limits)
        self._seen: dict[int, _SeenTokens] = {}

    def add(self, row: int, request: NewRow) -> bool:
        params = request.params
        if (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) == (1, 0, 0):
            return False
        self._seen[row] = _SeenTokens(request)
        return True

    def remove(self, row: int) -> None:
        del self._seen[row]

    def accept(self, row: int, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            self._seen[row].count(token_id)

    def apply(self, logits: Tensor, indices: Sequence[int], rows: Sequence[int], positions: Sequence[int]) -> None:
        seen = [self._seen[row] for row in rows]
        token_ids = [one.token_ids[: one.size] for one in seen]
        cells = _cells(logits, indices, token_ids)
        counts = np.concatenate([one.counts[: one.size] for one in seen])
        repetition, frequency, presence = (
            np.repeat(np.array([getattr(one.params, name) for one in seen], np.float32), list(map(len, token_ids)))
            for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
        )
        factor = to_device(repetition, logits.device)
        less = to_device(frequency * counts + presence * (counts > 0), logits.device)
        values = logits[cells]
        logits[cells] = torch.where(values > 0, values / factor, values * factor) - less


class _SeenTokens:
    """The different tokens of one request and how often each is in its output; 0 is of tokens of the prompt alone.

    Attributes:
        token_ids: int64, counts: float32; the first `size` of each, the rest is room.
    """

    def __init__(self, request: NewRow) -> None:
        self.params: SamplingParams = request.params
        token_ids, num_prompt_tokens = np.array(request.token_ids, np.int64), request.num_prompt_tokens
        output, counts = np.unique(token_ids[num_prompt_tokens:], return_counts=True)
        # Without a repetition penalty tokens of the prompt alone change nothing.
        self.token_ids: Array = np.unique(token_ids) if request.params.repetition_penalty != 1 else output
        self.counts: Array = np.zeros(len(self.token_ids), np.float32)
        self.counts[np.searchsorted(self.token_ids, output)] = counts
        self.size = len(self.token_ids)

    def count(self, token_id: int) -> None:
        """One more in the output."""
        (places,) = np.nonzero(self.token_ids[: self.size] == token_id)
        if len(places):
            self.counts[places] += 1
            return
        if self.size == len(self.token_ids):
            room = max(16, self.size)
            self.token_ids = np.concatenate((self.token_ids, np.zeros(room, np.int64)))
            self.counts = np.concatenate((self.counts, np.zeros(room, np.float32)))
        self.token_ids[self.size], self.counts[self.size] = token_id, 1
        self.size += 1


def _forbid(logits: Tensor, indices: Sequence[int], token_ids: Sequence[int]) -> None:
    """logits[indices[i], token_ids[i]] = -inf, for all i."""
    if indices:
        logits[to_device(np.array([indices, token_ids]), logits.device).unbind()] = _FORBIDDEN


def _cells(logits: Tensor, indices: Sequence[int], token_ids: Sequence[Array]) -> tuple[Tensor, Tensor]:
    """What `logits` is indexed with to get, one after another, the logits of `token_ids[i]` at `indices[i]`."""
    where = np.repeat(np.array(indices, np.int64), list(map(len, token_ids)))
    cells = to_device(np.stack((where, np.concatenate(token_ids))), logits.device)
    return cells[0], cells[1]
