"""Drafting: what the proposer guesses to follow a step's samples, checked before anyone relies on it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from operator import index

from octavo.errors import PluginError
from octavo.interfaces.executor import NewRow
from octavo.interfaces.proposer import Continuation, Proposer
from octavo.runner.transfer import Array

logger = logging.getLogger(__name__)


class Drafter:
    """Asks a proposer, and does without it from its first fault on.

    Guesses are a matter of speed only: whoever is being served would rather wait longer than lose an answer.

    Args:
        name: of the proposer, as the user knows it.
        num_drafts: tokens of one request guessed at once, at most.
        vocab_size: guesses are below it.
        max_model_len: no request grows longer.
    """

    def __init__(self, proposer: Proposer, name: str, num_drafts: int, vocab_size: int, max_model_len: int) -> None:
        self._proposer: Proposer | None = proposer
        self._name = name
        self._num_drafts = num_drafts
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._requests: dict[str, NewRow] = {}

    def enter(self, request: NewRow) -> None:
        """A request has got a row."""
        self._requests[request.request_id] = request

    def leave(self, request_id: str) -> None:
        """A request's row is free again."""
        self._requests.pop(request_id, None)
        if self._proposer is not None:
            try:
                self._proposer.forget(request_id)
            except Exception as error:  # a plugin's, of any kind: its requests are none the worse for it
                self._put_aside(error)

    def propose(self, known: Mapping[str, Array]) -> dict[str, list[int]]:
        """Guesses by request id, of those that have any.

        Args:
            known: request id -> [num_tokens] int64, every token so far.
        """
        if self._proposer is None:
            return {}
        continuations = [
            Continuation(
                request_id=request_id,
                token_ids=token_ids,
                max_drafts=room,
                params=request.params,
                seed=request.seed,
                sample_index=request.sample_index,
            )
            for request_id, token_ids in known.items()
            if (room := self._room(request := self._requests[request_id], token_ids)) > 0
        ]
        if not continuations:
            return {}
        try:
            guesses = _checked(self._proposer.propose(continuations), continuations, self._vocab_size)
        except Exception as error:  # a plugin's, of any kind
            self._put_aside(error)
            return {}
        return {one.request_id: guess for one, guess in zip(continuations, guesses, strict=True) if guess}

    def _room(self, request: NewRow, token_ids: Array) -> int:
        """Guesses that could be of use: the model samples one token more than it is given, and none after the last."""
        if request.chosen_outside:
            return 0
        longest = self._max_model_len
        if request.params.max_tokens is not None:
            longest = min(longest, request.num_prompt_tokens + request.params.max_tokens)
        return 0 if token_ids[-1] in request.stop_token_ids else min(self._num_drafts, longest - len(token_ids) - 1)

    def _put_aside(self, error: Exception) -> None:
        self._proposer = None
        logger.error(
            "Proposer %s failed and is not asked again: the engine goes on without speculative decoding, slower and "
            "with the same output. %s: %s",
            self._name,
            type(error).__name__,
            error,
            exc_info=error,
        )


def _checked(
    guesses: Sequence[Sequence[int]], continuations: Sequence[Continuation], vocab_size: int
) -> list[list[int]]:
    """The guesses as plain integers.

    Raises:
        PluginError: they are not what the socket promises; says what was wanted and found.
    """
    if len(guesses) != len(continuations):
        raise PluginError(f"propose was given {len(continuations)} requests and returned {len(guesses)} guesses.")
    checked = []
    for one, guess in zip(continuations, guesses, strict=True):
        if len(guess) > one.max_drafts:
            raise PluginError(
                f"propose guessed {len(guess)} tokens for request {one.request_id!r}; it may guess {one.max_drafts}."
            )
        try:
            token_ids = [index(token_id) for token_id in guess]
        except TypeError as error:
            raise PluginError(f"propose guessed {guess!r}, which are no token ids: integers are wanted.") from error
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
            raise PluginError(f"propose guessed {token_ids}; token ids are 0 to {vocab_size - 1}.")
        checked.append(token_ids)
    return checked
