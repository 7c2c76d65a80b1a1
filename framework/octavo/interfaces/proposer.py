"""Proposer socket: guesses the next tokens of requests, for the model to verify several in one step.

A guess can only cost time: what is kept is what the model would have sampled without it, token for token.
Source: Leviathan et al. 2023, arXiv:2211.17192.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from octavo.interfaces.manifest import Manifest
from octavo.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """A request whose next tokens may be guessed.

    Attributes:
        request_id: as in the steps.
        token_ids: [num_tokens] int64 on the host: every token so far, the one just sampled included. Read only, and
            good during the call.
        max_drafts: guess at most this many, >= 1.
        params, seed, sample_index: what its next tokens will be drawn with. The noise of a draw is known beforehand,
            so whoever has nearly the right probabilities and draws with the same noise nearly always draws the same.
    """

    request_id: str
    token_ids: np.ndarray[Any, np.dtype[np.int64]]
    max_drafts: int
    params: SamplingParams
    seed: int
    sample_index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ProposerContext:
    """What a proposer is constructed with.

    Attributes:
        manifest: what is built in this process.
        vocab_size: of the model it guesses for.
        draft_model: the model that its options name, when its spec says `draft_model`; it has the same vocabulary.
    """

    manifest: Manifest
    vocab_size: int
    draft_model: IncrementalModel | None = None


class IncrementalModel(ABC):
    """A model that runs beside the served one. Not a plugin's to write: what a proposer is given.

    It keeps what it has computed of each request in a KV cache of its own, so that whoever asks again and again, as a
    text grows, pays for the new tokens only.
    """

    @abstractmethod
    def next_tokens(self, continuations: Sequence[Continuation]) -> dict[str, int]:
        """By request id, the token that this model would sample next, with the request's own parameters and noise.

        `max_drafts` is not read. Where tokens differ from those of the call before, they are computed again from the
        first difference on. Requests for which there is no room, in its positions or its KV cache, are missing.
        """

    @abstractmethod
    def forget(self, request_id: str) -> None:
        """Free what is kept of a request; an unknown one is no error."""


class Proposer(ABC):
    """Constructed once, in the process that runs the model.

    One that raises, or returns what is no guess, is put aside for good: the error is logged, and the engine goes on
    without guesses. It must never keep requests from being served.
    """

    def __init__(self, context: ProposerContext) -> None:
        self.context = context

    @abstractmethod
    def propose(self, continuations: Sequence[Continuation]) -> Sequence[Sequence[int]]:
        """For each request the tokens guessed to come next, at most `max_drafts`; an empty list guesses nothing."""

    def forget(self, request_id: str) -> None:
        """A request has ended, or was put back; when it comes again, its tokens come whole."""
        return None
