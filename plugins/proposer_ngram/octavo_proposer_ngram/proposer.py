"""Guesses from the request's own tokens: texts that are quoted, edited or summed up repeat themselves.

Source: Saxena 2023, Prompt Lookup Decoding, https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from octavo.interfaces.proposer import Continuation, Proposer, ProposerContext
from octavo_proposer_ngram.options import NgramOptions

TokenIds = np.ndarray[Any, np.dtype[np.int64]]


class NgramProposer(Proposer):
    """Keeps nothing between steps."""

    def __init__(self, context: ProposerContext, *, options: NgramOptions) -> None:
        super().__init__(context)
        self._shortest, self._longest = options.lengths

    def propose(self, continuations: Sequence[Continuation]) -> list[list[int]]:
        return [look_up(one.token_ids, self._shortest, self._longest, one.max_drafts) for one in continuations]


def look_up(token_ids: TokenIds, shortest: int, longest: int, max_drafts: int) -> list[int]:
    """What followed the last tokens where they stood before.

    Of all places the one where most of the last tokens stand, `longest` at most, and of these the latest. Where fewer
    than `max_drafts` tokens have followed since, the text is repeating itself, and the guess goes round with it.

    Args:
        token_ids: [num_tokens] int64.

    Returns:
        `max_drafts` tokens, or none when not even the `shortest` last ones stand anywhere before.
    """
    last = len(token_ids) - 1
    ends = np.flatnonzero(token_ids[:last] == token_ids[last])  # where the n-gram's last token stands
    length = 1
    while len(ends) and length < longest:
        longer = ends[ends >= length]
        longer = longer[token_ids[longer - length] == token_ids[last - length]]
        if not len(longer):
            break
        ends, length = longer, length + 1
    if not len(ends) or length < shortest:
        return []
    return [int(token_id) for token_id in np.resize(token_ids[ends[-1] + 1 :], max_drafts)]
