"""LogprobTexts: log-probabilities from token ids to what a user reads, beside the detokenizer."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import chain

from octavo.outputs import Logprob, TokenLogprobs
from octavo.tokenizer import Tokenizer

_LONGEST_CHARACTER = 4  # bytes of UTF-8; so at most this many tokens can hold the beginning of one
_decoder_class = codecs.getincrementaldecoder("utf-8")


class LogprobTexts:
    """One position after the other, so that a token which completes a character is shown as that character.

    Args:
        tokenizer: None leaves the texts out.
        token_ids: the tokens before the first position.
    """

    def __init__(self, tokenizer: Tokenizer | None, token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}  # of tokens between characters, where most are
        self._decoder = _decoder_class("ignore")
        for token_id in token_ids[-_LONGEST_CHARACTER:]:
            self._advance(token_id)

    def next(self, logprobs: TokenLogprobs) -> dict[int, Logprob]:
        """The next position: by token id the token that is there, first, and the most probable ones, best first."""
        ranks = chain((logprobs.rank,), range(1, len(logprobs.token_ids)))
        entries: dict[int, Logprob] = {}
        for token_id, logprob, rank in zip(logprobs.token_ids, logprobs.logprobs, ranks, strict=True):
            if token_id not in entries:
                entries[token_id] = Logprob(logprob, rank, self._text(token_id))
        self._advance(logprobs.token_ids[0])
        return entries

    def _advance(self, token_id: int) -> None:
        if self._tokenizer is not None:
            self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def _text(self, token_id: int) -> str | None:
        """What a token adds here."""
        if self._tokenizer is None:
            return None
        state = self._decoder.getstate()
        if not state[0] and (known := self._texts.get(token_id)) is not None:
            return known
        text = self._decoder.decode(self._tokenizer.token_bytes(token_id))
        self._decoder.setstate(state)
        if not state[0]:
            self._texts[token_id] = text
        return text
